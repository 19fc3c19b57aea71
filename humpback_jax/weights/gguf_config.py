"""The hyperparameters of a LLaMA from the metadata of a GGUF file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.weights.gguf_file import GgufHeader
from humpback_jax.weights.gguf_special import special_ids

ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 to 3.3 differ in `factor` alone, which is the largest of the stored factors.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_UNSUPPORTED_YARN = ("attn_factor", "yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor")


def config_from_gguf(
    path: Path, header: GgufHeader, rope_factors: np.ndarray | None
) -> LlamaConfig:
    """The model that a GGUF header describes.

    Args:
      path: named in errors.
      rope_factors: contents [head_dim / 2] of the tensor `ROPE_FACTORS`, if the file has it.

    Raises:
      HumpbackError: a part of a model, another architecture, a key missing or absurd, or a
        variant of the model or of its position scaling that is not supported.
    """
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise HumpbackError(
            f"{path}: this is one of the {parts} files of a split model; join them with llama.cpp: "
            "llama-gguf-split --merge FIRST_FILE MODEL.gguf."
        )
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise HumpbackError(
            f"{path}: general.architecture is {architecture!r}; only 'llama' is supported."
        )
    meta = _Metadata(path, header.metadata)
    if meta.get("llama.expert_count"):
        raise HumpbackError(f"{path}: mixtures of experts are not supported.")
    heads = meta.count("llama.attention.head_count")
    hidden = meta.count("llama.embedding_length")
    head_dim = meta.count("llama.attention.key_length", default=hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if meta.count(key, default=head_dim) != head_dim:
            raise HumpbackError(
                f"{path}: {key}={meta.get(key)}, but heads have width {head_dim}; only equal "
                "widths are supported."
            )
    theta = meta.number("llama.rope.freq_base", default=10000.0)
    rope_type, rope_scaling = _rope(meta, theta, head_dim, rope_factors)
    tokens = meta.get("tokenizer.ggml.tokens") or ()
    vocab_size = meta.count("llama.vocab_size", default=len(tokens))
    special = special_ids(path, header.metadata, vocab_size)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=meta.count("llama.feed_forward_length"),
        num_hidden_layers=meta.count("llama.block_count", limit=len(header.tensors)),
        num_attention_heads=heads,
        num_key_value_heads=meta.count("llama.attention.head_count_kv", default=heads),
        head_dim=head_dim,
        max_position_embeddings=meta.count("llama.context_length"),
        rms_norm_eps=meta.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_type=rope_type,
        rope_scaling=tuple(sorted(rope_scaling.items())),
        tie_word_embeddings="output.weight" not in header.tensors,
        attention_bias="blk.0.attn_q.bias" in header.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
        bos_token_id=special.bos,
        eos_token_ids=special.ends,
        pad_token_id=special.pad,
    )


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """Typed access to the keys of one file."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def count(self, key: str, default: int | None = None, limit: int = 2**31) -> int:
        """A positive size; a list with one value per layer must hold equal ones."""
        value = self._need(key, default)
        distinct = set(value) if isinstance(value, list) else {value}
        if len(distinct) > 1:
            raise HumpbackError(
                f"{self.path}: {key} differs between layers ({sorted(distinct)}), which is not "
                "supported."
            )
        size = distinct.pop() if distinct else None
        if not isinstance(size, int) or not 0 < size <= limit:
            raise HumpbackError(f"{self.path}: {key}={value!r} is not a possible size.")
        return size

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal that is the same float32: 1e-05 again."""
        value = self._need(key, default)
        if not isinstance(value, int | float) or not value > 0:
            raise HumpbackError(f"{self.path}: {key}={value!r} is not a positive number.")
        return _shortest(value)

    def _need(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise HumpbackError(f"{self.path}: the metadata key {key!r} is missing.")
        return value


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _rope(
    meta: _Metadata, theta: float, head_dim: int, factors: np.ndarray | None
) -> tuple[str, dict[str, float]]:
    """Type and parameters of the position scaling, in Hugging Face's terms."""
    kind = meta.get("llama.rope.scaling.type")
    if kind is None and meta.get("llama.rope.scale_linear"):  # files of 2023
        return "linear", {"factor": meta.number("llama.rope.scale_linear")}
    if factors is not None:
        if kind not in (None, "none"):
            raise HumpbackError(
                f"{meta.path}: both {ROPE_FACTORS!r} and llama.rope.scaling.type={kind!r} scale "
                "the positions; only one of them is supported."
            )
        return _llama3_rope(meta.path, theta, head_dim, factors)
    if kind in (None, "none"):
        return "default", {}
    if kind == "linear":
        return "linear", {"factor": meta.number("llama.rope.scaling.factor")}
    if kind == "yarn":
        return "yarn", _yarn_rope(meta)
    raise HumpbackError(
        f"{meta.path}: llama.rope.scaling.type={kind!r} is not supported (known: none, linear, "
        "yarn)."
    )


def _yarn_rope(meta: _Metadata) -> dict[str, float]:
    for key in _UNSUPPORTED_YARN:
        if meta.get(f"llama.rope.scaling.{key}") is not None:
            raise HumpbackError(
                f"{meta.path}: llama.rope.scaling.{key} is set, which is not supported."
            )
    scaling = {"factor": meta.number("llama.rope.scaling.factor")}
    if meta.get("llama.rope.scaling.original_context_length") is not None:
        scaling["original_max_position_embeddings"] = meta.count(
            "llama.rope.scaling.original_context_length"
        )
    for beta in ("beta_fast", "beta_slow"):
        if meta.get(f"llama.rope.scaling.yarn_{beta}") is not None:
            scaling[beta] = meta.number(f"llama.rope.scaling.yarn_{beta}")
    return scaling


def _llama3_rope(
    path: Path, theta: float, head_dim: int, factors: np.ndarray
) -> tuple[str, dict[str, float]]:
    """Recovers Llama 3.1's parameters from the divisor of each frequency that llama.cpp stores."""
    factor = _shortest(factors.max())
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3_ROPE["original_max_position_embeddings"] / wavelengths
    kept = np.clip((turns - low) / (high - low), 0, 1)
    if factors.shape != turns.shape or not np.allclose(
        factors, 1 / (kept + (1 - kept) / factor), rtol=1e-4
    ):
        raise HumpbackError(
            f"{path}: the frequency factors in {ROPE_FACTORS!r} are not those of Llama 3.1 to "
            "3.3; use the model's Hugging Face folder, which states its position scaling."
        )
    return "llama3", {"factor": factor, **_LLAMA3_ROPE}
