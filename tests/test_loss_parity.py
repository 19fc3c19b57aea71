"""The loss is the response's loss, whatever the packing, and its gradient is torch's.

If these fail, users train on other tokens than they marked, or on a loss that changes with the
batch layout, and no curve will show it.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tiny_llama import (
    FLOAT32,
    assert_trees_close,
    from_torch,
    gradients_of,
    logits_function,
    random_examples,
    torch_llama,
    torch_nll,
    trees_equal,
)

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import Precision, dropout
from humpback_jax.model.llama import flatten, init_params, stack_layers, unflatten, unstack_layers
from humpback_jax.model.lora import lora_spec
from humpback_jax.training import loss as loss_module
from humpback_jax.training.examples import TrainingExample
from humpback_jax.training.loss import Batch, Objective
from humpback_jax.training.optimizer import OptimizerSpec, learning_rate, make_optimizer
from humpback_jax.training.packing import best_fit, lay_out
from humpback_jax.training.state import StepSpec, TrainState
from humpback_jax.training.step import batch_nll, make_train_step

SOURCES = ("seed", "web")
ROWS, WIDTH = 8, 96


@functools.cache
def model_of(tied: bool):
    """The tied model has two layers, the other one: what compiles fast serves most tests."""
    model = torch_llama(tie_word_embeddings=tied, num_hidden_layers=2 if tied else 1)
    return model, *from_torch(model, "unrolled")


def packed(examples, rows: int = ROWS, one_each: bool = False) -> Batch:
    lengths = [example.length for example in examples]
    plan = [[i] for i in range(len(examples))] if one_each else best_fit(lengths, WIDTH)
    return lay_out(examples, plan, rows, WIDTH, SOURCES)


def spec_for(config: LlamaConfig, **changes) -> StepSpec:
    plain = StepSpec(config, len(SOURCES), layout="unrolled", precision=FLOAT32)
    return dataclasses.replace(plain, **changes)


@functools.cache
def _mean_and_gradient(spec: StepSpec):
    def mean(params, batch):
        return batch_nll(spec, params, batch)[0] / batch.mask.sum()

    return jax.jit(jax.value_and_grad(mean))


def mean_and_gradient(spec: StepSpec, params, batch: Batch):
    value, gradient = _mean_and_gradient(spec)(params, batch)
    return float(value), gradient


@functools.cache
def _descent(spec: StepSpec):
    return make_train_step(spec, optax.sgd(1.0))


def step_gradient(spec: StepSpec, params, batch: Batch, accumulation: int = 1):
    """(gradient of the step, metrics): plain descent at rate 1 shows the gradient itself."""
    before = jax.tree.map(np.array, params)
    params = jax.tree.map(jnp.array, params)
    state = TrainState(jnp.int32(0), params, {}, optax.sgd(1.0).init(params))
    micro = Batch(*(np.asarray(x).reshape(accumulation, -1, x.shape[-1]) for x in batch))
    state, metrics = _descent(spec)(state, micro, jax.random.key(0))
    return jax.tree.map(lambda old, new: old - np.asarray(new), before, state.trainable), metrics


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_response_only_loss_and_every_gradient_equal_torch(tied) -> None:
    model, config, params = model_of(tied)
    examples = random_examples(7)
    batch = packed(examples)
    count = sum(example.supervised for example in examples)
    assert batch.mask.sum() == count < sum(example.length for example in examples)
    model.zero_grad()
    expected = torch_nll(model, examples).sum() / count
    expected.backward()
    value, gradient = mean_and_gradient(spec_for(config), params, batch)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert_trees_close(gradient, gradients_of(model, "unrolled"), 1e-4)


@pytest.mark.parametrize("remat", ["none", "offload"])
def test_scanned_layers_have_the_same_gradient(remat) -> None:
    _, config, params = model_of(True)
    batch = packed(random_examples(7))
    value, gradient = mean_and_gradient(spec_for(config), params, batch)
    scanned = spec_for(config, layout="scan", remat=remat)
    other, stacked = mean_and_gradient(scanned, stack_layers(params), batch)
    assert other == pytest.approx(value, rel=1e-6)
    assert_trees_close(unstack_layers(stacked), gradient, 1e-5)


def test_packing_does_not_change_the_loss_or_the_gradient() -> None:
    _, config, params = model_of(False)
    examples = random_examples(ROWS, longest=60)
    tight, loose = packed(examples), packed(examples, one_each=True)
    assert tight.segment_ids.max() > 1 == loose.segment_ids.max()
    value, gradient = mean_and_gradient(spec_for(config), params, tight)
    alone, gradient_alone = mean_and_gradient(spec_for(config), params, loose)
    assert value == pytest.approx(alone, rel=1e-6)
    assert_trees_close(gradient, gradient_alone, 1e-5)


def test_unequal_micro_batches_weigh_every_token_alike() -> None:
    """T-21: a mean of micro-batch means would favour the tokens of short micro-batches."""
    _, config, params = model_of(False)
    batch = packed([*random_examples(4, 90, 80), *random_examples(4, 8, seed=1)], one_each=True)
    _, expected = mean_and_gradient(spec_for(config), params, batch)
    for accumulation in (1, 2, 4, 8):
        gradient, metrics = step_gradient(spec_for(config), params, batch, accumulation)
        assert_trees_close(gradient, expected, 1e-5)
        assert metrics.supervised.sum() == batch.mask.sum()
        if accumulation == 1:
            nll = float(metrics.nll.sum())
        assert metrics.nll.sum() == pytest.approx(nll, rel=1e-6)


def test_empty_micro_batches_change_nothing() -> None:
    """A batch of short examples fills fewer rows than the longest batch of the run."""
    _, config, params = model_of(False)
    examples = random_examples(4, 40, 30)
    full = packed(examples, 2)
    assert (full.segment_ids > 0).any(axis=1).all()
    wide = Batch(*(np.concatenate([x, np.zeros_like(x), np.zeros_like(x)]) for x in full))
    expected, metrics = step_gradient(spec_for(config), params, full, 2)
    gradient, others = step_gradient(spec_for(config), params, wide, 6)
    assert trees_equal(gradient, expected)
    assert np.array_equal(metrics.nll, others.nll)


def test_rows_cut_to_what_they_hold_have_the_same_gradient() -> None:
    _, config, params = model_of(False)
    batch = packed(random_examples(5, 40, 8), 5, one_each=True)
    expected, metrics = step_gradient(spec_for(config), params, batch, 5)
    narrow = spec_for(config, widths=(12, 24, WIDTH))
    gradient, others = step_gradient(narrow, params, batch, 5)
    assert_trees_close(gradient, expected, 1e-5)
    np.testing.assert_allclose(metrics.nll, others.nll, rtol=1e-6)


def test_losses_by_source_sum_to_the_whole() -> None:
    model, config, params = model_of(False)
    examples = random_examples(6)
    _, metrics = step_gradient(spec_for(config), params, packed(examples))
    nll = torch_nll(model, examples).detach().numpy()
    for index, source in enumerate(SOURCES):
        of_source = [i for i, example in enumerate(examples) if example.source == source]
        assert metrics.supervised[index] == sum(examples[i].supervised for i in of_source)
        assert metrics.nll[index] == pytest.approx(nll[of_source].sum(), rel=1e-5)
    assert int(metrics.tokens) == sum(example.length for example in examples)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_source_s_weight_is_that_of_its_tokens_in_the_loss_and_in_no_metric(accumulation) -> None:
    model, config, params = model_of(False)
    examples, weights = random_examples(6), (1.0, 0.25)
    each = torch.tensor([weights[SOURCES.index(example.source)] for example in examples])
    counts = torch.tensor([example.supervised for example in examples])
    model.zero_grad()
    nll = torch_nll(model, examples)
    ((each * nll).sum() / (each * counts).sum()).backward()
    batch = packed(examples, one_each=True)
    plain, metrics = step_gradient(spec_for(config), params, batch, accumulation)
    spec = spec_for(config, weights=weights)
    gradient, weighted = step_gradient(spec, params, batch, accumulation)
    assert_trees_close(gradient, gradients_of(model, "unrolled"), 1e-4)
    with pytest.raises(AssertionError):
        assert_trees_close(plain, gradients_of(model, "unrolled"), 1e-2)
    np.testing.assert_allclose(weighted.nll, metrics.nll, rtol=1e-6)
    assert np.array_equal(weighted.supervised, metrics.supervised)


def test_a_run_s_objective_does_not_reach_its_loss() -> None:
    _, config, params = model_of(True)
    batch = packed(random_examples(4), one_each=True)
    logits = logits_function(config, "unrolled")(
        params, batch.tokens, batch.positions, batch.segment_ids
    )
    log_p = torch.log_softmax(torch.tensor(np.asarray(logits, np.float64)), -1)[batch.mask]
    log_z = torch.logsumexp(torch.tensor(np.asarray(logits, np.float64)), -1)[batch.mask]
    targets = torch.tensor(batch.targets[batch.mask].astype(np.int64))
    smoothed = torch.nn.functional.cross_entropy(log_p, targets, label_smoothing=0.1)
    expected = float(smoothed + 1e-3 * log_z.square().mean())
    spec = spec_for(config, objective=Objective(label_smoothing=0.1, z_loss=1e-3))
    assert mean_and_gradient(spec, params, batch)[0] == pytest.approx(expected, rel=1e-5)
    plain, _ = mean_and_gradient(spec_for(config), params, batch)
    assert abs(plain / expected - 1) > 1e-3


def test_the_mask_alone_decides_what_is_learnt() -> None:
    """Tokens that look like padding (0) or like the end of text (2) are learnt where marked."""
    model, config, params = model_of(True)
    ids = np.array([0, 2, 0, 0, 2, 2, 7, 0, 2], np.int32)
    examples = [
        TrainingExample("a", ids, np.arange(9) >= 2),
        TrainingExample("b", ids[::-1].copy(), np.arange(9) % 2 == 1),
    ]
    batch = packed(examples)
    expected = torch_nll(model, examples).sum().item() / batch.mask.sum()
    value, _ = mean_and_gradient(spec_for(config), params, batch)
    assert value == pytest.approx(expected, rel=1e-5)


OBJECTIVES = (Objective(), Objective(label_smoothing=0.1), Objective(z_loss=1e-3))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("chunk", [7, 64, 65])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["nll", "smoothed", "with_z_loss"])
def test_chunking_the_vocabulary_loss_does_not_change_it(
    tied, chunk, objective, monkeypatch
) -> None:
    hidden, kernel, targets, weights = _projection(tied)
    count = 50  # later places have weight 0
    weights[count:] = 0

    def plain(hidden, kernel):
        logits = jnp.matmul(hidden, kernel.T if tied else kernel, precision="highest")
        log_z = jax.nn.logsumexp(logits, -1)
        wanted = jax.nn.one_hot(targets, 37) * (1 - objective.label_smoothing)
        wanted = wanted + objective.label_smoothing / 37
        nll = -(wanted * (logits - log_z[:, None])).sum(-1) + objective.z_loss * log_z**2
        return 3 * (nll * weights).sum()

    def chunked(hidden, kernel):
        return (
            3
            * loss_module._projected_nll(
                hidden[None],
                kernel,
                targets[None],
                weights[None],
                np.int32(count),
                0 if tied else 1,
                "float32",
                None,
                objective,
            )[0]
        )

    monkeypatch.setattr(loss_module, "chunk_size", lambda places: min(places, chunk))
    expected = jax.value_and_grad(plain, (0, 1))(hidden, kernel)
    value = jax.jit(chunked)(hidden, kernel)
    with_gradient = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, kernel)
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-6)
    assert float(with_gradient[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for ours, theirs in zip(with_gradient[1], expected[1], strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def _projection(tied: bool):
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(37, 16) if tied else (16, 37)).astype(np.float32)
    hidden = generator.normal(size=(65, 16)).astype(np.float32)
    targets = generator.integers(0, 37, 65).astype(np.int32)
    return hidden, kernel, targets, generator.choice([0, 0.5, 1, 3], 65).astype(np.float32)


def test_a_target_far_from_the_mode_has_a_finite_exact_loss() -> None:
    """Logits of order 1,000: a loss through exp, then log, would be infinite."""
    hidden = np.array([[[1000.0, 0.0]]], np.float32)
    kernel = np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    target, weight = np.array([[1]], np.int32), np.ones((1, 1), np.float32)
    total, _ = loss_module._projected_nll(
        hidden, kernel, target, weight, np.int32(1), 1, "float32", None, Objective()
    )
    assert float(total) == pytest.approx(2000.0)


def test_no_tokens_by_vocab_array(monkeypatch) -> None:
    """Logits exist for CHUNK positions at most: a 128k vocabulary would not fit otherwise."""
    vocab, hidden, chunk = 2053, 64, 16
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    config = dataclasses.replace(model_of(True)[1], vocab_size=vocab, hidden_size=hidden)
    optimizer = make_optimizer(OptimizerSpec(), 10)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), layout="unrolled"))
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, {}, jax.eval_shape(optimizer.init, params)
    )
    batch = Batch(*(x[None] for x in packed(random_examples(ROWS))))
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = make_train_step(spec_for(config), optimizer).lower(state, batch, key)
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", lowered.as_text())
    shapes += re.findall(r"\b[a-z]\w*\[([\d,]+)\]", lowered.compile().as_text())
    sizes = [[int(n) for n in re.findall(r"\d+", shape)] for shape in shapes]
    beside_vocab = {int(np.prod(size)) // vocab for size in sizes if vocab in size}
    assert {chunk, hidden} <= beside_vocab, "the expressions above find nothing"
    assert max(beside_vocab) == max(chunk, hidden) < batch.mask.size


def test_bfloat16_products_give_nearly_the_float32_loss_and_gradient() -> None:
    _, config, params = model_of(False)
    batch = packed(random_examples(6))
    value, gradient = mean_and_gradient(spec_for(config), params, batch)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
    for precision in (Precision("bfloat16", "float32"), Precision("bfloat16", "bfloat16")):
        spec = spec_for(config, precision=precision)
        other_value, other = mean_and_gradient(spec, params, batch)
        other_flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(other)])
        assert other_value == pytest.approx(value, rel=0.01)
        cosine = flat @ other_flat / np.linalg.norm(flat) / np.linalg.norm(other_flat)
        assert cosine > 0.995
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(other))


def test_the_number_of_supervised_tokens_decides_how_long_gradients_in_bfloat16_are() -> None:
    """A third is 0.2 % more in bfloat16, for all tokens alike."""
    hidden, kernel, targets, weights = _projection(True)

    def scaled_sum(hidden, factor):
        total, _ = loss_module._projected_nll(
            hidden, kernel, targets[None], weights[None], 65, 0, "bfloat16", None, Objective()
        )
        return factor * total

    half = jnp.asarray(hidden, "bfloat16")[None]
    whole, third = (
        np.abs(jax.grad(scaled_sum)(half, jnp.float32(factor)).astype("float32")).sum()
        for factor in (1.0, 1 / 3)
    )
    assert float(third) == pytest.approx(float(whole) / 3, rel=5e-4)


def test_adamw_steps_equal_torch() -> None:
    """Same clip, same rates, same decay mask: embeddings and kernels, not norms and biases.

    Compared by the norm of each tensor's movement: Adam divides by the gradient's own size, so
    that single entries with gradients near 0 move by their rounding error in torch, too.
    """
    model = torch_llama(seed=3, attention_bias=True, num_hidden_layers=1)
    config, params = from_torch(model, "unrolled")
    examples, steps = random_examples(5), 6
    batch = packed(examples)
    settings = OptimizerSpec(1e-2, 2e-3, weight_decay=0.1, clip_norm=0.5, warmup_steps=2)
    optimizer = make_optimizer(settings, steps)
    rate = learning_rate(settings, steps)
    step = make_train_step(spec_for(config), optimizer)
    start = params
    params = jax.tree.map(jnp.array, params)
    state = TrainState(jnp.int32(0), params, {}, optimizer.init(params))

    def decays(name: str) -> bool:
        return "norm" not in name and not name.endswith("bias")

    groups = [
        {"params": [p for n, p in model.named_parameters() if decays(n)], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if not decays(n)], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for index in range(steps):
        state, metrics = step(state, Batch(*(x[None] for x in batch)), jax.random.key(0))
        for group in reference.param_groups:
            group["lr"] = float(rate(index))
        reference.zero_grad()
        (torch_nll(model, examples).sum() / batch.mask.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5, "the clip must act"
        assert float(metrics.grad_norm) == pytest.approx(norm.item(), rel=1e-4)
        reference.step()
    expected = flatten(from_torch(model, "unrolled")[1])
    for path, before in flatten(start).items():
        theirs = expected[path] - before
        ours = np.asarray(flatten(state.trainable)[path]) - before
        assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs), path


def test_norms_and_biases_are_not_decayed_and_everything_else_is() -> None:
    config = dataclasses.replace(model_of(False)[1], attention_bias=True, mlp_bias=True)
    spec = lora_spec(2, 4, 0.0, ("q", "down"))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), lora=spec))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    optimizer = make_optimizer(OptimizerSpec(1.0, 1.0, weight_decay=0.5), 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(params), params)
    for path, update in flatten(updates).items():
        expected = 0.0 if path[-1] in ("scale", "bias") else -0.5
        assert np.allclose(update, expected), path


def test_T04_the_learning_rate_ends_at_an_absolute_rate_not_at_a_fraction() -> None:
    """Seen elsewhere: 9e-6 was taken as a share of 1e-5, and the rate fell to about zero."""
    default = learning_rate(OptimizerSpec(), 1000)
    assert float(default(0)) == pytest.approx(1e-5)
    assert float(default(500)) == pytest.approx(9.5e-6)
    assert float(default(1000)) == pytest.approx(9e-6)
    assert float(default(2000)) == pytest.approx(9e-6)
    for schedule in ("linear", "cosine"):
        rate = learning_rate(OptimizerSpec(2e-4, 2e-5, schedule, warmup_steps=10), 110)
        assert float(rate(0)) == 0.0
        assert float(rate(5)) == pytest.approx(1e-4)
        assert float(rate(10)) == pytest.approx(2e-4)
        assert float(rate(60)) == pytest.approx(1.1e-4)
        assert float(rate(110)) == pytest.approx(2e-5)
        falling = [float(rate(step)) for step in range(10, 111)]
        assert falling == sorted(falling, reverse=True)
    constant = learning_rate(OptimizerSpec(3e-4, 9e-6, "constant"), 50)
    assert [float(constant(step)) for step in (0, 49)] == pytest.approx([3e-4, 3e-4])
    with pytest.raises(HumpbackError, match="triangle"):
        learning_rate(OptimizerSpec(schedule="triangle"), 10)


@pytest.mark.parametrize("where", ["residual", "adapter"])
def test_dropout_acts_with_a_key_only_and_follows_it(where) -> None:
    _, config, params = model_of(False)
    batch = packed(random_examples(4))
    spec, without = spec_for(config, dropout=0.3), spec_for(config)
    if where == "adapter":
        lora = lora_spec(4, 8, 0.3, ("q", "down"))
        spec, without = (
            spec_for(config, lora=lora),
            spec_for(config, lora=dataclasses.replace(lora, dropout=0.0)),
        )
        shapes = jax.eval_shape(
            lambda: init_params(config, jax.random.key(0), layout="unrolled", lora=lora)
        )
        generator = np.random.default_rng(0)
        adapter = {
            path: generator.normal(size=leaf.shape).astype(np.float32)
            for path, leaf in flatten(shapes).items()
            if path[-1] in ("lora_a", "lora_b")
        }
        params = unflatten({**flatten(params), **adapter})
    run = jax.jit(lambda key: batch_nll(spec, params, batch, key)[0])
    plain = float(jax.jit(lambda: batch_nll(without, params, batch)[0])())
    one, two = jax.random.key(1), jax.random.key(2)
    assert float(run(None)) == pytest.approx(plain, rel=1e-6)
    assert float(run(one)) == float(run(one))
    assert len({round(float(x), 3) for x in (run(one), run(two), plain)}) == 3


def test_dropout_keeps_the_mean() -> None:
    dropped = np.asarray(
        dropout(jnp.ones((2, 100, 500)), 0.25, jax.random.split(jax.random.key(0), (2, 100)))
    )
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)


def test_micro_batches_and_steps_are_thinned_by_masks_of_their_own() -> None:
    _, config, params = model_of(False)
    twin = random_examples(1, 40, 40)[0]
    batch = packed([twin, dataclasses.replace(twin, source="web")], 2, one_each=True)
    step = make_train_step(spec_for(config, dropout=0.2), optax.sgd(0.0))
    state = TrainState(
        jnp.int32(0), jax.tree.map(jnp.array, params), {}, optax.sgd(0.0).init(params)
    )
    losses = set()
    for _ in range(2):
        state, metrics = step(state, Batch(*(x[:, None] for x in batch)), jax.random.key(0))
        losses |= {round(float(nll), 3) for nll in metrics.nll}
    assert len(losses) == 4
