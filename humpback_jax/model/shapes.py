"""Shapes of well-known models, for random weights: speed depends on nothing else."""

from __future__ import annotations

from humpback_jax.model.config import LlamaConfig

# The windows are 4,096 throughout, since random models read bytes.
SHAPES: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
    ),
    "llama_1b": LlamaConfig(  # TinyLlama 1.1B
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
    ),
    "llama_7b": LlamaConfig(  # Llama 2 7B
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
}
