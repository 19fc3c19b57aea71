"""Optimizers and schedules beside independent ones.

If these fail, a named optimizer learns something else than what its name says, or takes more
memory than the machine was chosen for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from tiny_llama import from_torch, random_examples, torch_llama
from transformers.optimization import Adafactor

from humpback_jax.errors import HumpbackError
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Params, flatten, init_params, stack_layers, unstack_layers
from humpback_jax.model.shapes import SHAPES
from humpback_jax.training.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    OptimizerSpec,
    learning_rate,
    make_optimizer,
)
from humpback_jax.training.packing import best_fit, lay_out
from humpback_jax.training.state import StepSpec, initial_state, state_shardings
from humpback_jax.training.step import batch_nll, make_train_step

STEPS = 6
# Two layers, a matrix of each orientation; norm scales are not decayed. Adafactor wants 128.
SIZES = {"tall": (192, 128), "wide": (128, 160), "square": (128, 128)}


def weights(seed: int, scale: float = 1.0) -> Params:
    """In the layout "unrolled", as `init_params` names them; the second layer's are larger."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int, by: float = 1.0) -> np.ndarray:
        return (scale * by * generator.normal(size=shape)).astype(np.float32)

    layers = {
        index: {
            "mlp": {name: {"kernel": normal(*size, by=by)} for name, size in SIZES.items()},
            "norm": {"scale": normal(128, by=by)},
        }
        for index, by in enumerate((1.0, 30.0))
    }
    return {"layers": layers, "embed": {"embedding": normal(300, 128)}}


# Sizes that rise and fall: Adafactor's updates exceed its bound in some tensors alone.
GRADIENTS = [weights(10 + step, scale) for step, scale in enumerate((1, 0.1, 2, 9, 0.3, 4))]


def after_steps(spec: OptimizerSpec, stacked: bool = False) -> Params:
    arrange: Callable[[Params], Params] = stack_layers if stacked else lambda tree: tree
    params, optimizer = arrange(weights(0)), make_optimizer(spec, STEPS)

    @jax.jit
    def step(params: Params, state: Any, gradient: Params) -> tuple[Params, Any]:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in GRADIENTS:
        params, state = step(params, state, arrange(gradient))
    return params


def adafactor_of_transformers() -> dict[Any, np.ndarray]:
    """What it makes of the same weights; the rates are those of `RATES`."""
    params = {path: torch.tensor(leaf) for path, leaf in flatten(weights(0)).items()}
    groups = [
        {"params": [p for path, p in params.items() if path[-1] != "scale"], "weight_decay": 0.1},
        {"params": [p for path, p in params.items() if path[-1] == "scale"], "weight_decay": 0.0},
    ]
    optimizer = Adafactor(
        groups, lr=1.0, scale_parameter=False, relative_step=False, warmup_init=False
    )
    rate = learning_rate(RATES, STEPS)
    for step, gradient in enumerate(GRADIENTS):
        for path, leaf in flatten(gradient).items():
            params[path].grad = torch.tensor(leaf)
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        optimizer.step()
    return {path: p.numpy() for path, p in params.items()}


RATES = OptimizerSpec(0.02, 0.004, weight_decay=0.1, clip_norm=1e9)


def assert_moved_alike(ours: dict[Any, Any], theirs: dict[Any, Any]) -> None:
    start = flatten(weights(0))
    assert ours.keys() == theirs.keys() == start.keys()
    for path, before in start.items():
        moved = np.linalg.norm(theirs[path] - before)
        assert np.linalg.norm(np.asarray(ours[path]) - theirs[path]) < 1e-4 * moved, path


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scan"])
def test_adafactor_learns_something_else_than_that_of_transformers(stacked) -> None:
    """`test_loss_parity.py` compares AdamW with torch's."""
    params = after_steps(dataclasses.replace(RATES, name="adafactor"), stacked)
    ours = flatten(unstack_layers(params) if stacked else params)
    assert_moved_alike(ours, adafactor_of_transformers())


def test_lion_is_not_the_sign_of_an_average() -> None:
    ours = flatten(after_steps(dataclasses.replace(RATES, name="lion", beta2=0.99)))
    expected, rate = flatten(weights(0)), learning_rate(RATES, STEPS)
    moments = {path: np.zeros_like(leaf) for path, leaf in expected.items()}
    for step, gradients in enumerate(GRADIENTS):
        for path, g in flatten(gradients).items():
            decay = 0.0 if path[-1] == "scale" else 0.1
            update = np.sign(0.9 * moments[path] + 0.1 * g) + decay * expected[path]
            expected[path] = expected[path] - float(rate(step)) * update
            moments[path] = 0.99 * moments[path] + 0.01 * g
    assert_moved_alike(ours, expected)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_a_low_memory_optimizer_takes_more_than_it_promises(layout) -> None:
    """Bytes of state for each parameter of a LLaMA."""
    config = SHAPES["tinyllama"]
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), layout=layout))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    taken = {}
    for name in OPTIMIZERS:
        kept = jax.eval_shape(make_optimizer(OptimizerSpec(name=name), 10).init, shapes)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
        taken[name] = size / count
    assert taken.pop("adafactor") < 0.01
    assert taken == pytest.approx({"adamw": 8, "adamw_bf16": 6, "lion": 4}, abs=1e-6)


@functools.cache
def gradient_of_a_model() -> tuple[Params, Callable[[Params], Any]]:
    config, params = from_torch(torch_llama(num_hidden_layers=1), "unrolled")
    examples = random_examples(8)
    batch = lay_out(examples, best_fit([e.length for e in examples], 64), 8, 64, ("seed", "web"))
    spec = StepSpec(config, 2, layout="unrolled", precision=Precision())

    def mean(params: Params) -> jax.Array:
        return batch_nll(spec, params, batch)[0] / batch.mask.sum()

    return jax.tree.map(jnp.asarray, params), jax.jit(jax.value_and_grad(mean))


@pytest.mark.slow
def test_a_bfloat16_moment_leads_elsewhere_than_a_float32_one() -> None:
    """20 steps end within 1 % of the way they went, and see the same losses within 1 %."""
    start, gradient = gradient_of_a_model()
    ends: dict[str, Params] = {}
    losses: dict[str, list[float]] = {"adamw": [], "adamw_bf16": []}
    for name, seen in losses.items():
        optimizer = make_optimizer(OptimizerSpec(1e-3, 1e-4, name=name), 20)
        params, state, update = start, optimizer.init(start), jax.jit(optimizer.update)
        for _ in range(20):
            loss, gradients = gradient(params)
            seen.append(float(loss))
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        ends[name] = params
    assert losses["adamw"][-1] < 0.9 * losses["adamw"][0]
    assert losses["adamw_bf16"] == pytest.approx(losses["adamw"], rel=0.01)
    apart = optax.tree.norm(optax.tree.sub(ends["adamw_bf16"], ends["adamw"]))
    way = optax.tree.norm(optax.tree.sub(ends["adamw"], start))
    assert 0 < float(apart / way) < 0.01


def test_a_clip_norm_of_0_learns_nothing_instead_of_clipping_nothing() -> None:
    """0 switches off, as other settings, and as `max_grad_norm` of transformers."""
    updates = []
    for clip_norm in (0.0, 1e9):
        optimizer = make_optimizer(OptimizerSpec(clip_norm=clip_norm, weight_decay=0.0), 10)
        params = weights(0)
        updates.append(optimizer.update(weights(1), optimizer.init(params), params)[0])
    for found, expected in zip(*map(jax.tree.leaves, updates), strict=True):
        assert np.abs(expected).max() > 0
        assert np.array_equal(found, expected)


def test_an_unknown_optimizer_is_refused_without_naming_the_known() -> None:
    with pytest.raises(HumpbackError, match=r"'sgd' is unknown.*adamw, adamw_bf16, adafactor"):
        make_optimizer(OptimizerSpec(name="sgd"), 10)


def scheduled(make: Callable[..., Any], steps: int, **arguments: Any) -> list[float]:
    """Rates of the schedules in transformers, before each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = make(optimizer, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 10])
def test_a_schedule_s_rates_are_not_those_of_transformers(warmup) -> None:
    steps = 100
    wsd = scheduled(
        transformers.get_wsd_schedule,
        steps,
        num_warmup_steps=warmup,
        num_decay_steps=20,
        num_training_steps=steps,
        decay_type="linear",
        min_lr_ratio=0.1,
    )
    root = scheduled(transformers.get_inverse_sqrt_schedule, steps, num_warmup_steps=warmup)
    spec = OptimizerSpec(1e-3, 1e-4, warmup_steps=warmup, decay_share=0.2)
    for name, expected in (("wsd", wsd), ("inverse_sqrt", root)):
        rate = learning_rate(dataclasses.replace(spec, schedule=name), steps)
        ours = [float(rate(step)) for step in range(steps)]
        # In the warm-up, "wsd" of transformers rises from the last rate, and ours from 0.
        assert ours[warmup:] == pytest.approx(expected[warmup:], rel=1e-5), name
        assert ours[:warmup] == pytest.approx([1e-3 * step / 10 for step in range(warmup)])
    rate = learning_rate(dataclasses.replace(spec, schedule="wsd"), steps)
    assert float(rate(79)) == pytest.approx(1e-3) and float(rate(100)) == pytest.approx(1e-4)


@pytest.mark.parametrize(("warmup", "half"), [(0, 30_000), (10, 40)])
def test_an_inverse_root_is_not_at_half_where_the_page_on_training_says(warmup, half) -> None:
    rate = learning_rate(OptimizerSpec(1e-3, warmup_steps=warmup, schedule="inverse_sqrt"), 100)
    assert float(rate(warmup)) == pytest.approx(1e-3)
    assert float(rate(warmup + 1)) < float(rate(warmup))
    assert float(rate(half)) == pytest.approx(5e-4)
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    assert "half at four times the warm-up" in page and "half after 30,000" in page


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_what_adafactor_keeps_of_a_matrix_lies_elsewhere_than_the_matrix(layout) -> None:
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    config = SHAPES["tinyllama"]
    spec = StepSpec(config, 1, layout=layout, precision=Precision(), mesh=mesh)  # type: ignore[arg-type]
    where = state_shardings(spec, make_optimizer(OptimizerSpec(name="adafactor"), 10))
    factors = where.optimizer[1][0]
    layer = ("layers",) if layout == "scan" else ("layers", 0)
    before = (None,) if layout == "scan" else ()
    kept = {
        part: {path: leaf.spec for path, leaf in flatten(getattr(factors, part)).items()}
        for part in ("v_row", "v_col", "v")
    }
    # Of the gate [D, F], the longer axis is averaged away in `v_row`.
    gate = (*layer, "mlp", "gate", "kernel")
    assert kept["v_row"][gate] == P(*before, "fsdp")
    assert kept["v_col"][gate] == P(*before, "tensor")
    assert kept["v"][gate] == P()
    assert kept["v"][(*layer, "mlp_norm", "scale")] == P(*before, "fsdp")
    assert kept["v_row"]["embed", "embedding"] == P("fsdp")
    assert kept["v_col"]["embed", "embedding"] == P("tensor")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rate_of_zero_is_a_division_by_zero(schedule) -> None:
    """Rate 0 is how one measures a base model with the training loop."""
    rate = learning_rate(OptimizerSpec(0.0, 0.0, schedule), 5)
    assert [float(rate(step)) for step in range(5)] == [0.0] * 5


def test_every_rate_of_a_sweep_compiles_its_own_step() -> None:
    config, params = from_torch(torch_llama(num_hidden_layers=1), "scan")
    examples = random_examples(4)
    batch = lay_out(examples, best_fit([e.length for e in examples], 64), 4, 64, ("seed", "web"))
    batch = jax.tree.map(lambda x: x[None], batch)
    spec = StepSpec(config, 2, layout="scan", precision=Precision())
    texts = set()
    for settings in (
        OptimizerSpec(1e-5),
        OptimizerSpec(3e-4, 0.0, "cosine", warmup_steps=3),
        OptimizerSpec(1e-3, schedule="wsd"),
    ):
        for steps in (9, 16):
            optimizer = make_optimizer(settings, steps)
            state = initial_state(spec, params, optimizer, 0)
            step = make_train_step(spec, optimizer)
            texts.add(step.lower(state, batch, jax.random.key(0)).as_text())
    assert len(texts) == 1
