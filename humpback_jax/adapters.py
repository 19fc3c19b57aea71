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
from humpback_jax.text.prompting import prompting
from humpback_jax.text.template import Tags, Template, require_same_template
from humpback_jax.text.tokenizer import Tokenizer, within_vocabulary

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
        tokenizer = peft_tokenizer(found.path)
        if tokenizer is None:
            return from_peft(found.path, model, None)
        own = prompting(within_vocabulary(tokenizer, model.config.vocab_size), "auto")
        if not same_wording(own.template, model.template):
            where = f"--adapter={name} (as --model it is prompted in its own wording)"
            require_same_template(own.template, model.template, where)
        return from_peft(found.path, model, own.tags)
    raw = read_description(found.path) if found.kind == "checkpoint" else {}
    adapter = stored_adapter(found.path, raw)
    if adapter is None:
        raise HumpbackError(
            f"{name} has no adapter: expected a PEFT folder, or a checkpoint trained with "
            "--config.train.lora.rank."
        )
    template = Template.from_json(json.dumps(raw["template"]), str(found.path))
    require_same_template(template, model.template, f"--adapter={name}")
    return adapter


def from_peft(folder: Path, model: LanguageModel, tags: Tags | None) -> Adapter:
    """The adapter of a PEFT folder, which was trained for these tags.

    Raises:
      HumpbackError: see `weights.peft_io.read_peft`.
    """
    from humpback_jax.weights.peft_io import names_base, read_peft

    spec, params = read_peft(folder, model.config)
    if model.adapter is None or names_base(folder, model.name):
        return Adapter(spec, params, model.name, tags)
    return Adapter(spec, params, model.adapter.base, tags)


def peft_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a PEFT folder, if it has one with a chat template.

    Raises:
      HumpbackError: it cannot be read.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer if tokenizer.chat_template else None


def same_wording(a: Template, b: Template) -> bool:
    """Whether conversations read the same: files differ in how many special tokens they name."""
    return (a.chat_template, a.system) == (b.chat_template, b.system)


def require_same_ids(own: Tokenizer, base: Tokenizer, folder: Path) -> None:
    """Raises HumpbackError when the tokenizer of a PEFT folder has other ids than its base's."""
    ours, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (own, base))
    differing = sorted({token for token, _ in ours.items() ^ theirs.items()})
    if differing:
        first = differing[0]
        raise HumpbackError(
            f"{folder}: its chat template is not the base's, and cannot be used with the base's "
            f"weights: {len(differing)} token(s) have other ids, for example {first!r} with "
            f"{ours.get(first)} here and {theirs.get(first)} there. Name the base that the adapter "
            "was trained on, or remove the tokenizer's files to prompt as the base is."
        )


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


def read_description(folder: Path) -> dict[str, Any]:
    """What `humpback.json` of a checkpoint says.

    Raises:
      HumpbackError: it is absent, or not readable.
    """
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
