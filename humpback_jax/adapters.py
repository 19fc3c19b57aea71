"""Adapters of language models: read from where they are kept, put on a base, and taken off again.

One base and any number of adapters are one model each: `with_adapter(base, adapter)` shares all
that the adapter leaves alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from humpback_jax.checkpoint import load_params
from humpback_jax.errors import HumpbackError
from humpback_jax.folder_swap import part
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.llama import Params, flatten
from humpback_jax.model.lora import adapter_shapes, merge_adapter, unmerge_adapter, with_norms
from humpback_jax.text.template import Tags, Template, require_same_template

if TYPE_CHECKING:
    from humpback_jax.models import LanguageModel

DESCRIPTION = "humpback.json"  # marks a folder as one of our checkpoints
ADAPTER = "adapter"  # the folder in it with the adapter that its weights contain


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank adapter, its leaves stacked by layer.

    Attributes:
      base: name of the model that it was trained on.
      tags: the tags that it was trained for; None where that is not known.
    """

    spec: LoraSpec
    params: Params
    base: str
    tags: Tags | None = None

    def record(self) -> dict[str, Any]:
        """All but the arrays, for a checkpoint's description."""
        return {"spec": dataclasses.asdict(self.spec), "base": self.base, "tags": self.tags}


def with_adapter(model: LanguageModel, adapter: Adapter | None) -> LanguageModel:
    """The model's base with this adapter merged into it, or with none.

    An adapter that the model has is taken off first: arms of an experiment replace each other. It
    stays under one that says it was trained on the model by its own name, not on that one's base.

    Raises:
      HumpbackError: the adapter's arrays do not fit the model.
    """
    params, tags = model.params, model.tags
    own = model.adapter
    if own is not None and not (adapter and own.base != model.name == adapter.base):
        params = unmerge_adapter(params, own.params, own.spec)
    if adapter is not None:
        _check_fit(model, adapter)
        held = with_norms(params, adapter.params, adapter.spec)
        params = merge_adapter(params, held, adapter.spec)
        adapter = dataclasses.replace(adapter, params=held)
        tags = adapter.tags or tags
    return dataclasses.replace(model, params=params, tags=tags, adapter=adapter)


def load_adapter(name: str, model: LanguageModel) -> Adapter:
    """The adapter in a PEFT folder (or `hf:ORG/NAME`), or in one of our checkpoints.

    Args:
      model: what it is meant for; it has to be prompted as the adapter was trained.

    Raises:
      HumpbackError: no adapter stands there, or it belongs to another kind of model.
    """
    from humpback_jax.weights.named import resolve

    found = resolve(name)
    if found.kind == "peft":
        return from_peft(found.path, model)
    raw = _description(found.path) if found.kind == "checkpoint" else {}
    adapter = stored_adapter(found.path, raw)
    if adapter is None:
        raise HumpbackError(
            f"{name} has no adapter: expected a PEFT folder, or a checkpoint trained with "
            "--config.train.lora.rank."
        )
    template = Template.from_json(json.dumps(raw["template"]), str(found.path))
    require_same_template(template, model.template, f"--adapter={name}")
    return adapter


def from_peft(folder: Path, model: LanguageModel) -> Adapter:
    """The adapter of a PEFT folder.

    Raises:
      HumpbackError: see `weights.peft_io.read_peft`.
    """
    from humpback_jax.weights.peft_io import names_base, read_peft

    spec, params = read_peft(folder, model.config)
    if model.adapter is None or names_base(folder, model.name):
        return Adapter(spec, params, model.name)
    return Adapter(spec, params, model.adapter.base)


def stored_adapter(folder: Path, description: dict[str, Any]) -> Adapter | None:
    """The adapter in a checkpoint's folder; None where its description (`Adapter.record`) has none.

    Raises:
      HumpbackError: it is incomplete or unreadable.
    """
    found = description.get("adapter")
    if found is None:
        return None
    try:
        fields = {**found["spec"], "targets": tuple(found["spec"]["targets"])}
        spec, base, tags = LoraSpec(**fields), found["base"], found["tags"]
    except (KeyError, TypeError) as error:
        raise HumpbackError(
            f"{folder / DESCRIPTION}: not a readable description of an adapter ({error!r})."
        ) from error
    return Adapter(spec, load_params(part(folder, ADAPTER)), base, tags)


def _description(folder: Path) -> dict[str, Any]:
    path = part(folder, DESCRIPTION)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HumpbackError(f"{path}: not a readable checkpoint description ({error}).") from error
    return raw


def _check_fit(model: LanguageModel, adapter: Adapter) -> None:
    expected = adapter_shapes(model.config, adapter.spec)
    found = flatten(adapter.params)
    for path, shape in expected.items():
        if path not in found or found[path].shape != shape:
            given = found[path].shape if path in found else "none"
            raise HumpbackError(
                f"the adapter does not fit {model.name}: its {'.'.join(path)} has shape {given}, "
                f"this model needs {shape}. It was trained on {adapter.base}."
            )
