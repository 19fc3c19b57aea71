"""Noise of training: NEFTune on the embeddings, and dropout that grows with the layer.

If these fail, users regularise what they did not ask for, or measure a model through noise.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_llama import FLOAT32, from_torch, random_examples, torch_llama, whole_rows

from humpback_jax.compute import choose_compute
from humpback_jax.config import default_config
from humpback_jax.model.attention import packed_attention
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Layout, bind, flatten, init_params, unflatten, unstack_layers
from humpback_jax.stages.settings import train_spec
from humpback_jax.training.loss import Objective
from humpback_jax.training.neftune import with_noise
from humpback_jax.training.packing import best_fit, lay_out
from humpback_jax.training.state import StepSpec, initial_state
from humpback_jax.training.step import batch_nll, token_keys
from humpback_jax.training.validation import make_validation

ALPHA, DIM = 5.0, 48


def test_noise_on_embeddings_does_not_follow_the_examples_length() -> None:
    """alpha / sqrt(L D) at most, L of the example and not of its row; padding gets none."""
    examples = random_examples(9, 60, 5)
    batch = lay_out(examples, best_fit([e.length for e in examples], 96), 6, 96)
    assert batch.segment_ids.max() > 1 and (batch.segment_ids == 0).any()
    keys = token_keys(jax.random.key(3), batch)
    noise = jax.jit(with_noise, static_argnums=2)(
        jnp.zeros((6, 96, DIM)), batch.segment_ids, ALPHA, keys
    )
    for row, segments in enumerate(batch.segment_ids):
        assert not np.asarray(noise)[row, segments == 0].any()
        for segment in range(1, segments.max() + 1):
            mine = np.asarray(noise)[row, segments == segment]
            length = len(mine)
            largest = ALPHA / np.sqrt(length * DIM)
            assert 0.98 * largest < np.abs(mine).max() <= largest
            assert mine.std() == pytest.approx(largest / np.sqrt(3), rel=0.1)
            assert abs(mine.mean()) < 4 * mine.std() / np.sqrt(mine.size)
            # Each token by the formula of the paper, on draws of its own key.
            first = keys[row, segments == segment][0]
            draws = jax.random.uniform(first, (DIM,), minval=-1, maxval=1)
            np.testing.assert_allclose(mine[0], np.asarray(draws) * largest, rtol=1e-5)


def test_noise_disturbs_validation_or_no_training() -> None:
    config, params = from_torch(torch_llama(num_hidden_layers=1))
    examples = random_examples(6)
    plain = StepSpec(config, 2, layout="scan", precision=FLOAT32)
    noisy = dataclasses.replace(plain, neftune_alpha=ALPHA)
    state = initial_state(plain, params, optax.sgd(0.0), 0)
    without, beside = (make_validation(spec, examples, 6)(state) for spec in (plain, noisy))
    assert beside == without
    batch = lay_out(examples, best_fit([e.length for e in examples], 64), 6, 64, ("seed", "web"))
    run = jax.jit(lambda key: batch_nll(noisy, params, batch, key)[0] / batch.mask.sum())
    one, two = float(run(jax.random.key(0))), float(run(jax.random.key(1)))
    assert one != two
    assert without["validation_nll"] != one == float(run(jax.random.key(0)))


def test_packing_decides_what_is_dropped() -> None:
    """Other rows, other micro-batches or another mesh would be another experiment."""
    config, params = from_torch(torch_llama(num_hidden_layers=2))
    examples = random_examples(6, 40, 8)
    noisy = StepSpec(config, 2, layout="scan", precision=FLOAT32, dropout=0.3, neftune_alpha=ALPHA)
    run = jax.jit(lambda batch: batch_nll(noisy, params, batch, jax.random.key(7))[0])
    tight = best_fit([e.length for e in examples], 96)
    assert len(tight) < len(examples)
    layouts = tight, tight[::-1], [[i] for i in range(len(examples))]
    losses = [float(run(lay_out(examples, rows, 8, 96))) for rows in layouts]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    others = [dataclasses.replace(e, id=f"{e.id}'") for e in examples]
    assert float(run(lay_out(others, tight, 8, 96))) != pytest.approx(losses[0], rel=1e-4)


LAYERS, WIDTH = 4, 64


def layers_of_their_own(config: LlamaConfig, layout: Layout) -> Any:
    """Weights with which layer l sets the l-th part of the hidden state to 1, and nothing else."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), layout="scan"))
    flat = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(shapes).items()}
    bias = flat["layers", "attn", "o", "bias"]
    for layer, part in enumerate(np.split(np.arange(WIDTH), LAYERS)):
        bias[layer, part] = 1.0
    flat["norm", "scale"] += 1.0
    return unflatten(flat) if layout == "scan" else unstack_layers(unflatten(flat))


def test_settings_of_noise_and_loss_do_not_reach_the_step() -> None:
    section = default_config().train
    section.update({"dropout": 0.3, "dropout_ramp": True, "label_smoothing": 0.1, "z_loss": 1e-3})
    spec = train_spec(section, choose_compute("float32", 1), 0, 100)
    assert (spec.dropout, spec.dropout_ramp) == (0.3, True)
    assert spec.objective == Objective(label_smoothing=0.1, z_loss=1e-3)
    config, params = from_torch(torch_llama(num_hidden_layers=1))
    examples = random_examples(4, 40, 8)
    batch = lay_out(examples, [[i] for i in range(4)], 4, 64, ("seed", "web"))

    def loss(**changes: Any) -> float:
        step = StepSpec(config, 2, layout="scan", precision=FLOAT32, **changes)
        return float(
            jax.jit(functools.partial(batch_nll, step))(params, batch, jax.random.key(0))[0]
        )

    assert loss(dropout=0.3, dropout_ramp=True) == pytest.approx(loss(), rel=1e-6), "of layer 0"
    assert loss(dropout=0.3) != pytest.approx(loss(), rel=1e-3)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_dropout_does_not_rise_from_nothing_at_the_bottom_to_its_rate_at_the_top(layout) -> None:
    """LIMA: linearly in the layer."""
    model = torch_llama(num_hidden_layers=LAYERS, hidden_size=WIDTH, attention_bias=True)
    config, _ = from_torch(model)
    params = layers_of_their_own(config, layout)
    tokens, positions, segments = whole_rows(np.zeros((16, 64), np.int32))

    @jax.jit
    def hidden_states(params: Any, keys: jax.Array) -> jax.Array:
        attend = packed_attention(segments, positions, FLOAT32)
        rates = jnp.linspace(0.0, 0.3, LAYERS)
        return bind(config, params, layout).hidden_states(
            tokens, positions, attend, precision=FLOAT32, dropout_rate=rates, dropout_keys=keys
        )[0]

    hidden = np.asarray(hidden_states(params, jax.random.split(jax.random.key(0), tokens.shape)))
    dropped = [(part == 0).mean() for part in np.split(hidden, LAYERS, axis=-1)]
    assert dropped[0] == 0.0
    assert dropped[1:] == pytest.approx([0.1, 0.2, 0.3], abs=0.01)
    first = hidden[..., :1]
    kept = [part[part > 0] for part in np.split(hidden / first, LAYERS, axis=-1)]
    for rate, values in zip((0.0, 0.1, 0.2, 0.3), kept, strict=True):
        np.testing.assert_allclose(values, 1 / (1 - rate), rtol=1e-5)
