"""Writes a LLaMA as a GGUF file, the format of llama.cpp and what is built on it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Params
from humpback_jax.model.rope import llama3_stretch, yarn_attention_factor
from humpback_jax.weights.gguf_config import ROPE_FACTORS
from humpback_jax.weights.gguf_io import rotated_heads
from humpback_jax.weights.outgoing import OutgoingTensor, outgoing_tensors

ARCHITECTURE = "llama"
_KINDS = {
    "float32": (Kind.F32, LlamaFileType.ALL_F32),
    "float16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
}
# llama.cpp reads no fields of a plain llama for these: it takes what they are by default.
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def save_gguf(
    path: Path,
    config: LlamaConfig,
    params: Params,
    vocabulary: Mapping[str, Any],
    name: str,
    dtype: str | None = None,
) -> None:
    """Writes the model as one file, which gets its name when it is complete.

    Norms and biases are float32, as llama.cpp wants them. One tensor at a time is held beside the
    parameters.

    Args:
      params: numpy or jax arrays, layers stacked or kept apart.
      vocabulary: fields of the tokenizer (`text.gguf_vocabulary.gguf_fields`).
      name: of the model, as clients show it.
      dtype: of the matrices: float32, float16 or bfloat16; None keeps each array's own.

    Raises:
      HumpbackError: `params` is not a complete, merged model of this config, or its positions are
        scaled in a way that llama.cpp does not know.
    """
    outgoing = [_as_stored(entry) for entry in outgoing_tensors(config, params, dtype)]
    matrices = next(entry.dtype.name for entry in outgoing if entry.tensor.path[0] == "embed")
    fields = {
        "general.name": _shown_name(name),
        "general.file_type": int(_KINDS[matrices][1]),
        **_model_fields(config),
        **vocabulary,
    }
    extra = {ROPE_FACTORS: llama3_stretch(config)} if config.rope_type == "llama3" else {}
    with (
        _replacing(path) as temporary,
        contextlib.closing(GGUFWriter(temporary, ARCHITECTURE)) as writer,
    ):
        for key, value in fields.items():
            _add_field(writer, key, value)
        for key, value in extra.items():
            writer.add_tensor_info(key, value.shape, value.dtype, value.nbytes, Kind.F32)
        for entry in outgoing:
            name, shape, kind = entry.tensor.gguf, entry.tensor.shape, _KINDS[entry.dtype.name][0]
            writer.add_tensor_info(name, shape, entry.dtype, entry.size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for value in extra.values():
            writer.write_tensor_data(value)
        for entry in outgoing:
            writer.write_tensor_data(_values(config, entry))
        for file in writer.fout or []:
            file.flush()
            os.fsync(file.fileno())


def _shown_name(name: str) -> str:
    """llama.cpp takes any model with "phi3" in its name for Phi 3, and looks for its tokens."""
    return re.sub("(?i)(phi)-?(?=3)", r"\1_", name)


def _model_fields(config: LlamaConfig) -> dict[str, Any]:
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        **_rope_fields(config),
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in own.items()}


def _rope_fields(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_parameters
    if config.rope_type in ("default", "llama3"):
        return {}
    unknown = _beyond_llama_cpp(config.rope_type, scaling)
    if unknown:
        raise HumpbackError(
            f"llama.cpp has no positions scaled by {unknown}, so that a GGUF file would be another "
            "model. Export with --format=hf."
        )
    fields: dict[str, Any] = {"type": config.rope_type, "factor": float(scaling["factor"])}
    if config.rope_type == "yarn":
        original = scaling.get("original_max_position_embeddings")
        fields["original_context_length"] = int(original or config.max_position_embeddings)
    return {f"rope.scaling.{key}": value for key, value in fields.items()}


def _beyond_llama_cpp(rope_type: str, scaling: Mapping[str, float]) -> str:
    """What of a position scaling llama.cpp cannot be told; "" if nothing."""
    if rope_type != "yarn":
        return "" if rope_type == "linear" else f"rope type {rope_type!r}"
    given = {name: scaling.get(name) or default for name, default in _YARN_DEFAULTS.items()}
    given["truncate"] = scaling.get("truncate", True)
    other = [name for name, default in _YARN_DEFAULTS.items() if given[name] != default]
    plain = yarn_attention_factor({"factor": scaling["factor"]})
    if not math.isclose(yarn_attention_factor(scaling), plain):
        other.append("attention_factor or mscale")
    return f"rope type 'yarn' with its own {', '.join(other)}" if other else ""


def _add_field(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _as_stored(entry: OutgoingTensor) -> OutgoingTensor:
    vector = len(entry.tensor.shape) == 1
    return dataclasses.replace(entry, dtype=np.dtype(np.float32)) if vector else entry


def _values(config: LlamaConfig, entry: OutgoingTensor) -> np.ndarray:
    values = entry.values()
    heads = rotated_heads(config, entry.tensor)
    return values if heads is None else np.ascontiguousarray(_to_neighbours(values, heads))


def _to_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k (or biases) in the order of llama.cpp, see `gguf_io`."""
    by_half = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return by_half.swapaxes(1, 2).reshape(rows.shape)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its name on success, and else is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
