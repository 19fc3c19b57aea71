"""Shapes of well-known models: speed and memory depend on nothing else."""

from __future__ import annotations

from humpback_jax.model.config import LlamaConfig

# The windows are 4,096 throughout, since random models read bytes.
WINDOW = 4096


def _llama(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    groups: int | None = None,
    vocab: int = 32000,
    rope_theta: float = 10000.0,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups or heads,
        head_dim=width // heads,
        max_position_embeddings=WINDOW,
        rope_theta=rope_theta,
    )


SHAPES: dict[str, LlamaConfig] = {
    "tiny": _llama(64, 128, 2, 4, 2, vocab=259),
    "tinyllama": _llama(2048, 5632, 22, 32, 4),  # TinyLlama 1.1B
    "7b": _llama(4096, 11008, 32, 32),  # LLaMA, table 2
    "13b": _llama(5120, 13824, 40, 40),
    "33b": _llama(6656, 17920, 60, 52),
    "65b": _llama(8192, 22016, 80, 64),
    "llama2_7b": _llama(4096, 11008, 32, 32),
    "llama2_70b": _llama(8192, 28672, 80, 64, 8),
    "llama3_8b": _llama(4096, 14336, 32, 32, 8, vocab=128256, rope_theta=500000.0),
}

# Names under which the weights are known elsewhere.
PUBLISHED = {
    **{f"llama-1-{size}": size for size in ("7b", "13b", "33b", "65b")},
    "hf:meta-llama/Llama-2-7b-hf": "llama2_7b",
    "hf:meta-llama/Llama-2-70b-hf": "llama2_70b",
    "hf:meta-llama/Meta-Llama-3-8B": "llama3_8b",
    "hf:TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": "tinyllama",
}
