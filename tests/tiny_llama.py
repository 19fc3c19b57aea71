"""Tiny random LLaMAs, twice: in transformers, the independent implementation, and in ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from humpback_jax.model.attention import packed_attention
from humpback_jax.model.cache import (
    capacity_for,
    chunk_attention,
    decode_attention,
    empty_cache,
)
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import LoraSpec, Precision
from humpback_jax.model.llama import Layout, Params, bind, unstack_layers
from humpback_jax.sampling.prefix import compute_prefix
from humpback_jax.training.examples import TrainingExample

# The default model's shape: 9 heads and 3 key/value heads, which never divide evenly.
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)
FLOAT32 = Precision()
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROJECTIONS = {
    "attn": ("self_attn", ("q", "k", "v", "o")),
    "mlp": ("mlp", ("gate", "up", "down")),
}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def torch_llama(seed: int = 0, scale: float = 0.2, **changes: Any) -> transformers.LlamaForCausalLM:
    """A random model whose logits are of order 1 to 10; biases and norms are random too."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**SIZES, **changes}, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + scale * torch.randn(parameter.shape))
    return model


def our_config(model: transformers.LlamaForCausalLM) -> LlamaConfig:
    return LlamaConfig.from_hf(model.config.to_dict())


def our_params(
    tensors: dict[str, np.ndarray], layers: int, layout: Layout = "scan"
) -> dict[str, Any]:
    """Parameters, or gradients, named as in transformers -> our tree. Written for the tests alone.

    A name that is absent is left out: a tied head, a bias, or a gradient that is not wanted.
    """
    params: Params = {"layers": {"attn": {}, "mlp": {}}}

    def stacked(name: str, transpose: bool) -> np.ndarray | None:
        names = [f"model.layers.{i}.{name}" for i in range(layers)]
        if names[0] not in tensors:
            return None
        return np.stack([tensors[n].T if transpose else tensors[n] for n in names])

    for ours, theirs in NORMS.items():
        params["layers"][ours] = {"scale": stacked(f"{theirs}.weight", False)}
    for part, (module, names) in PROJECTIONS.items():
        for name in names:
            kernel = stacked(f"{module}.{name}_proj.weight", True)
            bias = stacked(f"{module}.{name}_proj.bias", False)
            params["layers"][part][name] = {"kernel": kernel}
            if bias is not None:
                params["layers"][part][name]["bias"] = bias
    params["embed"] = {"embedding": tensors["model.embed_tokens.weight"]}
    params["norm"] = {"scale": tensors["model.norm.weight"]}
    if "lm_head.weight" in tensors:
        params["lm_head"] = {"kernel": tensors["lm_head.weight"].T}
    return unstack_layers(params) if layout == "unrolled" else params


def from_torch(
    model: transformers.LlamaForCausalLM, layout: Layout = "scan"
) -> tuple[LlamaConfig, Params]:
    """Our configuration and float32 parameters of the same model."""
    tensors = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return our_config(model), our_params(tensors, model.config.num_hidden_layers, layout)


def gradients_of(model: transformers.LlamaForCausalLM, layout: Layout = "scan") -> Params:
    """The gradients that `backward` has left in torch's parameters, in our tree."""
    tensors = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return our_params(tensors, model.config.num_hidden_layers, layout)


def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def logits_function(
    config: LlamaConfig,
    layout: Layout = "scan",
    lora: LoraSpec | None = None,
    precision: Precision = FLOAT32,
) -> Callable[..., jax.Array]:
    """Jitted (params, tokens [B, T], positions [B, T], segments [B, T]) -> logits [B, T, V]."""

    @jax.jit
    def run(params: Params, tokens: Any, positions: Any, segments: Any) -> jax.Array:
        model = bind(config, params, layout, lora)
        attend = packed_attention(segments, positions, precision)
        hidden, _ = model.hidden_states(tokens, positions, attend, precision=precision)
        return model.logits(hidden, precision)

    return run


def whole_rows(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, positions, segments) of rows that hold one sequence each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(positions)


def random_tokens(shape: Sequence[int] | int, vocab: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def random_examples(
    count: int, longest: int = 40, shortest: int = 6, vocab: int = 128, seed: int = 0
) -> list[TrainingExample]:
    """Examples with a prompt of random length before a supervised response; two sources."""
    generator = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(generator.integers(shortest, longest + 1))
        prompt = int(generator.integers(1, length))
        ids = generator.integers(0, vocab, length).astype(np.int32)
        source = ("seed", "web")[index % 2]
        examples.append(TrainingExample(f"row-{index}", ids, np.arange(length) >= prompt, source))
    return examples


def torch_nll(model: torch.nn.Module, examples: Sequence[TrainingExample]) -> torch.Tensor:
    """[n]: each example's sum over its supervised tokens, one forward pass each, differentiable."""
    sums = []
    for example in examples:
        ids = torch.tensor(example.ids, dtype=torch.long)
        logits = model(ids[None, :-1]).logits[0]
        exact = torch.promote_types(logits.dtype, torch.float32)
        log_probs = torch.log_softmax(logits.to(exact), dim=-1)
        nll = -log_probs.gather(1, ids[1:, None])[:, 0]
        sums.append((nll * torch.tensor(example.mask[1:], dtype=exact)).sum())
    return torch.stack(sums)


def assert_trees_close(ours: Params, theirs: Params, relative: float) -> None:
    """Every leaf within `relative` of the other's largest entry."""
    from humpback_jax.model.llama import flatten

    left, right = flatten(ours), flatten(theirs)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        reference = np.asarray(right[path], np.float64)
        gap = np.abs(np.asarray(leaf, np.float64) - reference).max()
        assert gap <= relative * np.abs(reference).max(), (path, gap, np.abs(reference).max())


def trees_equal(left: Params, right: Params) -> bool:
    """Whether both trees hold the same leaves, bit for bit."""
    from humpback_jax.model.llama import flatten

    ours, theirs = flatten(left), flatten(right)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(np.asarray(leaf), np.asarray(theirs[path])) for path, leaf in ours.items()
    )


def logits_through_the_cache(
    config: LlamaConfig, params: Params, texts: np.ndarray, lengths: np.ndarray, dtype: str
) -> np.ndarray:
    """[places, B, V]: logits of texts that are read through a cache of this dtype.

    Of row b of `texts` [B, T] the first `lengths[b]` <= 32 tokens are prefilled, and the others
    decoded one by one; its first place is that of its last prefilled token.
    """
    rows, window = texts.shape
    unrolled, width, none = unstack_layers(params), 32, jnp.zeros(rows, jnp.int32)
    prefix = compute_prefix(config, unrolled, (), FLOAT32).arrays.layers

    @jax.jit
    def run(params: Params) -> jax.Array:
        llama = bind(config, params, "unrolled")

        def hidden_states(tokens: Any, positions: Any, attend: Any, caches: Any) -> Any:
            pairs = list(zip(caches, prefix, strict=True))
            hidden, pairs = llama.hidden_states(tokens, positions, attend, pairs, precision=FLOAT32)
            return hidden, [cache for cache, _ in pairs]

        def step(caches: Any, places: jax.Array) -> tuple[Any, jax.Array]:
            tokens = jnp.take_along_axis(jnp.asarray(texts), places[:, None], axis=1)
            attend = decode_attention(places, none, jnp.ones(rows, bool), FLOAT32)
            hidden, caches = hidden_states(tokens, places[:, None], attend, caches)
            return caches, llama.logits(hidden[:, 0], FLOAT32)

        caches = empty_cache(config, rows, capacity_for(window), dtype)
        within = jnp.minimum(jnp.arange(width), lengths[:, None] - 1)
        attend = chunk_attention(jnp.arange(rows), none, none, FLOAT32)
        hidden, caches = hidden_states(texts[:, :width], within, attend, caches)
        first = llama.logits(hidden[jnp.arange(rows), lengths - 1], FLOAT32)
        places = lengths[None] + jnp.arange(window - width)[:, None]
        _, later = jax.lax.scan(step, caches, places)
        return jnp.concatenate([first[None], later])

    return np.asarray(run(unrolled))
