"""Adapters as folders of the `peft` library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from humpback_jax.artifacts import write_json
from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.llama import Params, flatten, unflatten
from humpback_jax.model.lora import PATHS, PROJECTIONS, adapter_shapes, lora_spec
from humpback_jax.weights.names import MODULE_NAMES, LeafPath, some_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Our leaf -> the suffix of its tensor. peft keeps matrices transposed: [out, in].
SUFFIXES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
# Fields of a config that do not change what the saved tensors mean.
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
_WITHOUT_EFFECT = (
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"),
    *("peft_version", "exclude_modules", "layers_pattern", "megatron_core", "runtime_config"),
    *("qalora_group_size", "eva_config"),
)
# Ways to begin that leave the base as it is; others (pissa, olora, loftq ...) change it.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def base_name(folder: Path) -> str:
    """The base that a PEFT folder names, as `weights.named.resolve` understands it.

    Raises:
      HumpbackError: it names none.
    """
    config = _read_config(folder)
    name = config.get("base_model_name_or_path")
    if not name:
        raise HumpbackError(
            f"{folder / CONFIG}: base_model_name_or_path is empty; name the base model: import has "
            "--base, other verbs take --model=BASE --adapter=FOLDER."
        )
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return str(name)
    return f"hf:{name}" + (f"@{config['revision']}" if config.get("revision") else "")


def names_base(folder: Path, name: str) -> bool:
    """Whether a PEFT folder says that its base is the model of this name."""
    return bool(_read_config(folder).get("base_model_name_or_path")) and base_name(folder) == name


def read_peft(folder: Path, config: LlamaConfig) -> tuple[LoraSpec, Params]:
    """The adapter in a PEFT folder, float32 and stacked by layer.

    Args:
      config: of the base model.

    Raises:
      HumpbackError: an option or a target that this model has no equal of, or tensors that are
        missing, unexpected, misshapen or unreadable; the message names file and field.
    """
    fields, tensors = _read_config(folder), _read_tensors(folder / WEIGHTS)
    _check_options(folder / CONFIG, fields)
    listed = _listed_targets(folder / CONFIG, fields.get("target_modules"))
    layers = range(config.num_hidden_layers)
    targets = tuple(
        name
        for name in PROJECTIONS
        if name in listed
        or any(_tensor(_path(name, leaf), i) in tensors for leaf in SUFFIXES for i in layers)
    )
    if not targets:
        raise HumpbackError(f"{folder / WEIGHTS}: no adapter of a projection; known: {_modules()}.")
    spec = lora_spec(
        fields["r"],
        float(fields["lora_alpha"]),
        float(fields.get("lora_dropout") or 0.0),
        targets,
        "rslora" if fields.get("use_rslora") else "lora",
        bool(fields.get("use_dora")),
    )
    shapes = adapter_shapes(config, spec)
    expected = {_tensor(path, i): shape[:0:-1] for path, shape in shapes.items() for i in layers}
    _check_tensors(folder / WEIGHTS, expected, tensors)
    params = {
        path: np.stack([tensors[_tensor(path, i)].T.astype(np.float32) for i in layers])
        for path in shapes
    }
    return spec, unflatten(params)


def write_peft(
    folder: Path,
    config: LlamaConfig,
    spec: LoraSpec,
    adapter: Params,
    base: str,
    dtype: str | None = None,
) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads onto the base.

    Args:
      adapter: stacked leaves.
      base: name (as `weights.named.resolve` understands it) or path of the base model, for those
        who load the adapter by itself.
      dtype: of the tensors; None keeps float32.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    leaves = flatten(adapter)
    name, _, revision = base.partition("@") if base.startswith("hf:") else (base, "", "")
    tensors = {}
    for path in adapter_shapes(config, spec):
        stacked = np.asarray(leaves[path]).astype(dtype or "float32")
        for layer, leaf in enumerate(stacked):
            tensors[_tensor(path, layer)] = np.ascontiguousarray(leaf.T)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name.removeprefix("hf:"),
        "revision": revision or None,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": [f"{name}_proj" for name in spec.targets],
        "use_rslora": spec.scaling == "rslora",
        "use_dora": spec.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.{os.getpid()}"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise HumpbackError(
            f"{folder / WEIGHTS} cannot be written ({error}). Is the disk full, or the folder "
            "read-only? What stood there is kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    write_json(folder / CONFIG, fields)


def _path(name: str, leaf: str) -> LeafPath:
    return ("layers", *PATHS[name].split("."), leaf)


def _tensor(path: LeafPath, layer: int) -> str:
    module, _ = MODULE_NAMES[path[:-1]]
    return f"{PREFIX}{module.format(i=layer)}.{SUFFIXES[path[-1]]}"


def _modules() -> str:
    return ", ".join(f"{name}_proj" for name in PROJECTIONS)


def _check_tensors(
    path: Path, expected: dict[str, tuple[int, ...]], tensors: dict[str, np.ndarray]
) -> None:
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise HumpbackError(
            f"{path}: {some_of(missing)} missing; every layer of the model needs its adapter on "
            "each target."
        )
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise HumpbackError(
            f"{path}: there is no place for {some_of(unknown)}; only adapters of {_modules()} are "
            "known."
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise HumpbackError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, this base and rank need "
                f"{list(shape)}. Was the adapter trained on another model?"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields["peft_type"]
        if kind == "LORA":
            int(fields["r"]), float(fields["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HumpbackError(f"{path}: not a readable adapter config ({error!r}).") from error
    if kind != "LORA":
        raise HumpbackError(f"{path}: peft_type {kind} is not supported; only LORA is.")
    return fields


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.exists():
        raise HumpbackError(
            f"{path} is missing; only safetensors are read, an adapter_model.bin must be converted."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise HumpbackError(f"{path}: not a readable safetensors file ({error}).") from error


def _check_options(path: Path, fields: dict[str, Any]) -> None:
    """Whatever is set beyond the fields that are understood would change the model."""
    if fields.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise HumpbackError(
            f"{path}: init_lora_weights={fields['init_lora_weights']!r} changes the base model's "
            "weights, so that the adapter does not fit the base; merge it with peft."
        )
    fine = {*_READ, *_WITHOUT_EFFECT, "init_lora_weights"}
    for name, value in fields.items():
        if name not in fine and value and (name, value) != ("bias", "none"):
            raise HumpbackError(
                f"{path}: {name}={value!r} is not supported; merge the adapter with peft "
                "(merge_and_unload) and import the merged model."
            )


def _listed_targets(path: Path, targets: Any) -> set[str]:
    """Our names of the modules that a config lists; a pattern lists none: the tensors tell."""
    if not isinstance(targets, list):
        return set()
    names = {target.rpartition(".")[2] for target in targets}
    unknown = sorted(names - {f"{name}_proj" for name in PROJECTIONS})
    if unknown:
        raise HumpbackError(
            f"{path}: target_modules names {', '.join(unknown)}, which cannot be adapted here; "
            f"known: {_modules()}."
        )
    return {name.removesuffix("_proj") for name in names}
