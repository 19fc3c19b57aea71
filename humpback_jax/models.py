"""A language model as one object: weights, tokenizer and template, loaded by name and saved."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from humpback_jax.adapters import (
    ADAPTER,
    DESCRIPTION,
    Adapter,
    from_peft,
    peft_tokenizer,
    read_description,
    require_same_ids,
    same_wording,
    stored_adapter,
    with_adapter,
)
from humpback_jax.artifacts import write_json
from humpback_jax.checkpoint import holds_params, load_params, save_params
from humpback_jax.errors import HumpbackError
from humpback_jax.folder_swap import part, replaced_together
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Params, init_params
from humpback_jax.model.shapes import PUBLISHED, SHAPES
from humpback_jax.text.baked import baked_chat_template
from humpback_jax.text.prompting import choose_template, prompting
from humpback_jax.text.template import Tags, Template, require_same_template
from humpback_jax.text.tokenizer import Tokenizer, within_vocabulary
from humpback_jax.weights.hashing import params_hash
from humpback_jax.weights.names import leaf_shapes


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Everything needed to prompt, train or export a model. `params` are stacked by layer.

    Attributes:
      tags: the tags it is prompted with by default, those it was trained for.
      adapter: what has been merged into `params`, if that is known.
    """

    name: str
    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer
    template: Template
    tags: Tags = "none"
    adapter: Adapter | None = None

    @functools.cached_property
    def hash(self) -> str:
        """Identity by content: weights, config, tokenizer and template, whatever the path."""
        config = json.dumps(dataclasses.asdict(self.config), sort_keys=True)
        parts = [params_hash(self.params), config, self.tokenizer.content_hash()]
        parts.append(self.template.content_hash())
        return hashlib.sha256("/".join(parts).encode()).hexdigest()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(sorted({*self.tokenizer.eos_ids, *self.config.eos_token_ids}))


def load_model(
    name: str, template: str = "auto", seed: int = 0, stored: bool = False
) -> LanguageModel:
    """Loads a model by name (`weights.named.resolve`), or one of random weights.

    A PEFT adapter is merged into the model that it names as its base.

    Args:
      name: also "tiny-random", for rehearsals, or "random:SHAPE" (`model/shapes.py`), to measure.
      template: "auto" (the model's own chat template, else plain), "chat" or "plain". A checkpoint
        of ours brings its own; asking for another one is an error.
      stored: leave safetensors weights in their files (`weights/stored.py`), for a mesh of which
        each process reads its own part.

    Raises:
      HumpbackError: no such model, unreadable files, or a tokenizer that does not fit the weights.
    """
    if is_random(name):
        return _random(name, seed, template)
    from humpback_jax.weights.gguf_io import load_gguf
    from humpback_jax.weights.named import resolve
    from humpback_jax.weights.peft_io import base_name
    from humpback_jax.weights.safetensors_io import load_hf, open_hf

    found = resolve(name)
    if found.kind == "checkpoint":
        return dataclasses.replace(load_checkpoint(found.path, template), name=name)
    if found.kind == "peft":
        adapted = load_peft(found.path, base_name(found.path), template, seed)
        return dataclasses.replace(adapted, name=name)
    if found.kind == "gguf":
        config, params = load_gguf(found.path)
        tokenizer = Tokenizer.from_gguf(found.path)
    else:
        config, params = open_hf(found.path) if stored else load_hf(found.path)
        tokenizer = Tokenizer.from_folder(found.path)
    tokenizer = within_vocabulary(tokenizer, config.vocab_size)
    return LanguageModel(name, config, params, *prompting(tokenizer, template))


def outlined(name: str) -> LanguageModel:
    """As `load_model`; of random weights, though, only the shapes: nothing as large is made."""
    return _random(name, 0, "auto", drawn=False) if is_random(name) else load_model(name)


def load_peft(folder: Path, base: str, template: str = "auto", seed: int = 0) -> LanguageModel:
    """The adapter of a PEFT folder on the base of this name, prompted as the folder says.

    Raises:
      HumpbackError: as `load_model`, or the folder's tokenizer has other ids than the base's.
    """
    tokenizer = peft_tokenizer(folder)
    # A base may lack the chat template that its adapter was trained in.
    model = load_model(base, template if tokenizer is None or template == "plain" else "auto", seed)
    model = dataclasses.replace(model, adapter=None)  # its own is part of what the config names
    if tokenizer is None:
        return with_adapter(model, from_peft(folder, model, None))
    own = prompting(within_vocabulary(tokenizer, model.config.vocab_size), template)
    if not same_wording(own.template, model.template):
        require_same_ids(own.tokenizer, model.tokenizer, folder)
        model = dataclasses.replace(model, tokenizer=own.tokenizer, template=own.template)
    return with_adapter(model, from_peft(folder, model, own.tags))


def load_config(name: str) -> LlamaConfig:
    """The architecture of a model, without its weights; of well-known ones without any file.

    Raises:
      HumpbackError: as `load_model`.
    """
    if is_random(name):
        return _random_config(name)
    if name in PUBLISHED:
        return SHAPES[PUBLISHED[name]]
    from humpback_jax.weights.gguf_io import read_gguf_config
    from humpback_jax.weights.named import fetch_hub_config, resolve
    from humpback_jax.weights.peft_io import base_name
    from humpback_jax.weights.safetensors_io import read_config

    if name.startswith("hf:"):
        folder = fetch_hub_config(name)
        if (folder / "config.json").is_file():
            return read_config(folder)
        return load_config(base_name(folder))
    found = resolve(name)
    match found.kind:
        case "hf":
            return read_config(found.path)
        case "gguf":
            return read_gguf_config(found.path)
        case "checkpoint":
            return _stored_config(found.path, read_description(found.path))
        case "peft":
            return load_config(base_name(found.path))


def save_checkpoint(folder: Path, model: LanguageModel, details: dict[str, Any]) -> None:
    """Writes weights (Orbax), tokenizer, template and config.

    A model that stands there is there until this one is complete. Processes that hold the weights
    together call it together; the first writes what is small.

    Raises:
      HumpbackError: it cannot be written.
    """
    import jax

    with replaced_together(folder) as new:
        save_params(new / "weights", model.params)
        if model.adapter is not None:
            save_params(new / ADAPTER, model.adapter.params)
        _ = model.hash  # which takes all processes
        if jax.process_index() == 0:
            _describe(new, model, details)


def _describe(folder: Path, model: LanguageModel, details: dict[str, Any]) -> None:
    model.tokenizer.save(folder / "tokenizer")
    description = {
        "name": model.name,
        "tags": model.tags,
        "config": dataclasses.asdict(model.config),
        "template": json.loads(model.template.to_json()),
        "hash": model.hash,
        "adapter": model.adapter and model.adapter.record(),
        "details": details,
    }
    write_json(folder / DESCRIPTION, description)


def holds_checkpoint(folder: Path) -> bool:
    """Whether what `save_checkpoint` wrote is there still."""
    return part(folder, DESCRIPTION).is_file() and holds_params(part(folder, "weights"))


def export_hf(folder: Path, model: LanguageModel, dtype: str | None = None) -> None:
    """Weights, config and tokenizer as a folder that `transformers` loads.

    Args:
      dtype: of the weights; None keeps each tensor's own.
    """
    from humpback_jax.weights.safetensors_io import save_hf

    save_hf(folder, model.config, model.params, dtype)
    _export_tokenizer(folder, model)
    generation = {
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": list(model.stop_ids),
        "pad_token_id": model.tokenizer.pad_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))


def export_peft(
    folder: Path, model: LanguageModel, base: str | None = None, dtype: str | None = None
) -> None:
    """The model's adapter alone, and its tokenizer, as a folder that `peft` loads.

    Args:
      base: what the folder calls the base model; None: the name it was trained under.
      dtype: of the weights; None is float32.

    Raises:
      HumpbackError: the model has no adapter.
    """
    from humpback_jax.weights.peft_io import write_peft

    if model.adapter is None:
        raise HumpbackError(
            f"{model.name} has no adapter, which --format=peft writes; export it with --format=hf, "
            "or train with --config.train.lora.rank."
        )
    adapter = model.adapter
    named = base or adapter.base
    write_peft(folder, model.config, adapter.spec, adapter.params, named, dtype)
    _export_tokenizer(folder, model)


def export_gguf(path: Path, model: LanguageModel, dtype: str | None = None) -> list[str]:
    """Weights, config and tokenizer as one GGUF file, which llama.cpp loads.

    Args:
      dtype: of the matrices; None keeps each one's own.

    Returns:
      what is different in llama.cpp nevertheless, as sentences.

    Raises:
      HumpbackError: the tokenizer or the position scaling has no equal in llama.cpp.
    """
    from humpback_jax.text.gguf_vocabulary import gguf_fields
    from humpback_jax.weights.gguf_export import save_gguf

    tokenizer, size = _exported_tokenizer(model), model.config.vocab_size
    fields, notes = gguf_fields(tokenizer, size, _sample_prompts(model), model.stop_ids)
    save_gguf(path, model.config, model.params, fields, Path(model.name).name, dtype)
    if tokenizer.chat_template != model.tokenizer.chat_template:
        notes.append(
            "the chat template differs from the one this model came with; llama.cpp applies it "
            "where it runs Jinja (--jinja), else it takes a similar one that it knows."
        )
    return notes


def _sample_prompts(model: LanguageModel) -> list[str]:
    asked = [{"role": "user", "content": "What is ice?"}]
    answered = {"role": "assistant", "content": "Frozen water.\n\nIt floats."}
    turns = [asked, [*asked, answered, {"role": "user", "content": "  1 + 1 = ?"}]]
    return [model.template.forward_prompt(messages, model.tags) for messages in turns]


def _export_tokenizer(folder: Path, model: LanguageModel) -> None:
    _exported_tokenizer(model).save(folder)


def _exported_tokenizer(model: LanguageModel) -> Tokenizer:
    """With a chat template that does by itself what ours does with the model's tags."""
    return model.tokenizer.with_chat_template(baked_chat_template(model.template, model.tags))


def load_checkpoint(folder: Path, template: str = "auto") -> LanguageModel:
    """Reads what `save_checkpoint` wrote.

    Raises:
      HumpbackError: incomplete or unreadable, or another template was asked for.
    """
    raw = read_description(folder)
    config = _stored_config(folder, raw)
    try:
        stored = Template.from_json(json.dumps(raw["template"]), str(folder / DESCRIPTION))
        name, tags = raw["name"], raw["tags"]
    except KeyError as error:
        raise _undescribed(folder, error) from error
    tokenizer = Tokenizer.from_folder(part(folder, "tokenizer"))
    tokenizer = within_vocabulary(tokenizer, config.vocab_size)
    if template != "auto":
        require_same_template(stored, choose_template(tokenizer, template), str(folder))
    params = load_params(part(folder, "weights"), leaf_shapes(config))
    adapter = stored_adapter(folder, raw)
    return LanguageModel(name, config, params, tokenizer, stored, tags, adapter)


def _stored_config(folder: Path, description: dict[str, Any]) -> LlamaConfig:
    try:
        fields = description["config"]
        fields["rope_scaling"] = tuple((key, value) for key, value in fields["rope_scaling"])
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return LlamaConfig(**fields)
    except (KeyError, ValueError, TypeError) as error:
        raise _undescribed(folder, error) from error


def _undescribed(folder: Path, error: Exception) -> HumpbackError:
    return HumpbackError(
        f"{folder / DESCRIPTION}: not a readable checkpoint description ({error})."
    )


def is_random(name: str) -> bool:
    """Whether a name asks for random weights, of which there are no files."""
    return name == "tiny-random" or name.startswith("random:")


def _random(name: str, seed: int, template: str, drawn: bool = True) -> LanguageModel:
    """float32 weights for "tiny-random", else bfloat16; tokens are bytes.

    Args:
      drawn: False for the shapes alone.
    """
    import jax

    from humpback_jax.text.byte_tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    config = dataclasses.replace(
        _random_config(name), eos_token_ids=tokenizer.eos_ids, pad_token_id=tokenizer.pad_id
    )
    dtype = "float32" if name == "tiny-random" else "bfloat16"
    init = functools.partial(init_params, config, jax.random.key(seed), dtype)
    params = init() if drawn else jax.eval_shape(init)
    return LanguageModel(name, config, params, tokenizer, choose_template(tokenizer, template))


def _random_config(name: str) -> LlamaConfig:
    shape = "tiny" if name == "tiny-random" else name.removeprefix("random:")
    if shape not in SHAPES:
        raise HumpbackError(f"{name}: no such shape; known: {', '.join(SHAPES)}.")
    return SHAPES[shape]
