"""The hyperparameters of a LLaMA, read from and written to a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from humpback_jax.errors import HumpbackError

ARCHITECTURE = "LlamaForCausalLM"
Rope = tuple[str, float, tuple[tuple[str, float], ...]]  # rope_type, rope_theta, rope_scaling
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_ROPE_FIELDS: dict[str, tuple[set[str], set[str]]] = {  # type -> (required, optional)
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA-family decoder. Field names are those of Hugging Face's `LlamaConfig`.

    Attributes:
      rope_scaling: parameters of the position scaling as sorted (key, value) pairs, so that the
        config is hashable; `()` means plain RoPE. `rope_type` is always one of `ROPE_TYPES`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_scaling: tuple[tuple[str, float], ...] = ()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise HumpbackError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise HumpbackError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs.")

    @property
    def rope_parameters(self) -> dict[str, float]:
        return dict(self.rope_scaling)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
        """Reads the parsed `config.json` of any LLaMA-family model.

        Accepts both layouts in use: `rope_theta` + `rope_scaling` at the top level, and the
        newer single `rope_parameters` mapping.

        Raises:
          HumpbackError: not a LLaMA, a field missing or of the wrong type, or an unknown rope type
            or activation.
        """
        model_type = raw.get("model_type")
        architectures = raw.get("architectures") or []
        # The type decides, as in transformers: under another one the same architecture's name may
        # stand beside a sliding window, or factors on embeddings and residuals.
        by_architecture = not model_type and ARCHITECTURE in architectures
        if model_type != "llama" and not by_architecture:
            raise HumpbackError(
                f"{where}: model_type={model_type!r}, architectures={architectures!r}; "
                "only the LLaMA family (model_type 'llama') is supported."
            )
        activation = raw.get("hidden_act", "silu")
        if activation != "silu":
            raise HumpbackError(f"{where}: hidden_act={activation!r}; only 'silu' is supported.")

        def whole(key: str, default: int | None = None) -> int:
            value = raw.get(key)
            if value is None and default is None:
                raise HumpbackError(f"{where}: the field {key!r} is missing.")
            return int(_number(key, default if value is None else value, where))

        heads, hidden = whole("num_attention_heads"), whole("hidden_size")
        if hidden % heads and raw.get("head_dim") is None:
            raise HumpbackError(
                f"{where}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}, "
                "and head_dim is not given."
            )
        rope_type, rope_theta, scaling = _rope_from_hf(raw, where)
        return cls(
            vocab_size=whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole("intermediate_size"),
            num_hidden_layers=whole("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=whole("num_key_value_heads", heads),
            head_dim=whole("head_dim", hidden // heads),
            max_position_embeddings=whole("max_position_embeddings", 2048),
            rms_norm_eps=_number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), where),
            rope_theta=rope_theta,
            rope_type=rope_type,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=_id_tuple(raw.get("eos_token_id")),
            pad_token_id=raw.get("pad_token_id"),
        )

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` that `transformers` reads back to the same model."""
        eos = list(self.eos_token_ids)
        raw: dict[str, Any] = {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
            "pad_token_id": self.pad_token_id,
            "torch_dtype": dtype,
            # Without it, versions since 4.57.3 take a vocabulary of over 100,000 tokens for one of
            # Mistral that older versions wrote wrongly, and advise to replace how it cuts text.
            "transformers_version": "5.0.0",
        }
        if self.rope_type != "default":
            raw["rope_scaling"] = {"rope_type": self.rope_type, **self.rope_parameters}
        return raw


def _number(key: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise HumpbackError(f"{where}: the field {key!r} is {value!r}, not a positive number.")
    return value


def _id_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _rope_from_hf(raw: Mapping[str, Any], where: str) -> Rope:
    """Type, theta and parameters; the two fields that may hold them must agree."""
    given = [key for key in ("rope_parameters", "rope_scaling") if raw.get(key)]
    for key in given:
        if not isinstance(raw[key], Mapping):
            raise HumpbackError(f"{where}: the field {key!r} is {raw[key]!r}, not an object.")
    readings = {_read_rope(raw[key], raw, where) for key in given} or {_read_rope({}, raw, where)}
    if len(readings) > 1:
        raise HumpbackError(
            f"{where}: the fields {' and '.join(given)} say different things of the positions; "
            "remove one of them, and keep rope_theta."
        )
    return readings.pop()


def _read_rope(fields: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Rope:
    rope = dict(fields)
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    theta = float(_number("rope_theta", theta, where))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind not in ROPE_TYPES:
        raise HumpbackError(
            f"{where}: rope type {kind!r} is unknown; supported: {', '.join(ROPE_TYPES)}."
        )
    partial = rope.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise HumpbackError(f"{where}: partial_rotary_factor={partial} is not supported.")
    required, optional = _ROPE_FIELDS[kind]
    rope = {key: value for key, value in rope.items() if value is not None}
    for key in required & rope.keys():
        _number(key, rope[key], where)
    if kind in ("llama3", "yarn") and raw.get("original_max_position_embeddings"):
        # transformers lets the field outside overrule the one inside
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    missing, unknown = required - rope.keys(), rope.keys() - required - optional
    if kind == "default":
        unknown -= {"factor"}  # written by some exporters beside the default type, without effect
    if kind == "yarn":
        unknown -= {"finetuned"}  # in YaRN's first models; nothing is computed from it
    if missing or unknown:
        raise HumpbackError(
            f"{where}: rope type {kind!r} has missing fields {sorted(missing)} "
            f"and unknown fields {sorted(unknown)}."
        )
    kept = {key: value for key, value in rope.items() if key in required | optional}
    return kind, theta, tuple(sorted(kept.items()))
