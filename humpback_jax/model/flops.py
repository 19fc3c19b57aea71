"""How many floating-point operations the model's work takes, whoever does it."""

from __future__ import annotations

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.remat import Remat


def layer_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """[d_in, d_out] of each matrix of a layer."""
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    attention = [(width, heads), (width, groups), (width, groups), (heads, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def forward_flops(config: LlamaConfig, tokens: int, pairs: float) -> tuple[float, float]:
    """(matrix products, attention) of all layers: 2 x their parameters x tokens, and 4 x H x K for
    each pair of a query and a key that it sees.
    """
    depth, heads = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    layer = sum(a * b for a, b in layer_shapes(config))
    return depth * 2.0 * layer * tokens, depth * 4.0 * heads * pairs


def recomputed_flops(config: LlamaConfig, tokens: int, pairs: float, remat: Remat) -> float:
    """Operations of the forward pass that the backward pass does again (`model/remat.py`)."""
    match remat:
        case "none":
            return 0.0
        case "full":
            return sum(forward_flops(config, tokens, pairs))
        case "named" | "offload":  # the MLP's gate and up
            gate_and_up = 2 * config.hidden_size * config.intermediate_size
            return config.num_hidden_layers * 2.0 * gate_and_up * tokens


def training_flops(
    config: LlamaConfig, tokens: int, supervised: int, pairs: float, frozen: bool = False
) -> float:
    """Model operations of a training step, nothing computed twice.

    3 x those of the forward pass: layers, attention, and 2 x D x V for each supervised place.

    Args:
      frozen: an adapter is trained, and no gradient of the base's matrices is needed: 2 x for
        these. The adapter's own operations, about one in a hundred, are not counted.
    """
    products, attention = forward_flops(config, tokens, pairs)
    products += 2.0 * config.hidden_size * config.vocab_size * supervised
    return (2.0 if frozen else 3.0) * products + 3.0 * attention
