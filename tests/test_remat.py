"""What the backward pass computes again: if these fail, users pay for it and get nothing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
import pytest
from tiny_llama import FLOAT32, assert_trees_close, random_examples

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Layout, Params, init_params
from humpback_jax.model.remat import Remat
from humpback_jax.training.packing import lay_out
from humpback_jax.training.state import StepSpec, abstract_state
from humpback_jax.training.step import batch_nll, make_train_step

DEEP = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
ROWS, WIDTH = 4, 128


@functools.cache
def gradient(remat: Remat) -> tuple[int, Params]:
    """(bytes that the compiled program needs beside its arguments, the gradient itself)."""
    examples = random_examples(ROWS, WIDTH, WIDTH - 8, vocab=32)
    batch = lay_out(examples, [[i] for i in range(ROWS)], ROWS, WIDTH, ("seed", "web"))
    spec = StepSpec(DEEP, 2, layout="scan", precision=FLOAT32, dropout=0.1, remat=remat)

    def total(params: Params, key: jax.Array) -> Any:
        return batch_nll(spec, params, batch, key)[0]

    arguments = init_params(DEEP, jax.random.key(0)), jax.random.key(1)
    compiled = jax.jit(jax.grad(total)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled(*arguments)


@pytest.mark.parametrize(
    "remat", ["full", "named", pytest.param("offload", marks=pytest.mark.slow)]
)
def test_what_is_computed_again_differs_from_what_was_kept(remat: Remat) -> None:
    """Dropout's masks, too."""
    assert_trees_close(gradient(remat)[1], gradient("none")[1], 1e-4)


def test_computing_again_saves_no_memory() -> None:
    none, full, named = (gradient(remat)[0] for remat in ("none", "full", "named"))
    tokens, width = ROWS * WIDTH, DEEP.hidden_size
    # q, context, attended: D each; k, v: D / 2 each. Float32, for each layer.
    expected = 4 * width * tokens * 4 * DEEP.num_hidden_layers
    assert named - full == pytest.approx(expected, rel=0.1)
    assert none > 2 * named


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_a_training_step_that_computes_again_saves_no_memory(layout: Layout) -> None:
    """A CPU's layout is unrolled, where its compiler may compute everything again at once."""

    def temporary(remat: Remat) -> int:
        spec = StepSpec(DEEP, 2, layout=layout, precision=FLOAT32, remat=remat)
        optimizer = optax.adamw(1e-3)
        examples = random_examples(ROWS, WIDTH, WIDTH - 8, vocab=32)
        batch = lay_out(examples, [[i] for i in range(ROWS)], ROWS, WIDTH, ("seed", "web"))
        micro_batches = jax.tree.map(lambda x: x[None], batch)
        state = abstract_state(spec, optimizer)
        step = make_train_step(spec, optimizer).lower(state, micro_batches, jax.random.key(0))
        return step.compile().memory_analysis().temp_size_in_bytes

    assert temporary("full") < 0.4 * temporary("none")
