"""rsLoRA, LoRA+, DoRA and adapters over int8 weights: what peft and torch make of the same numbers.

If these fail, a run that says "DoRA" or "QLoRA" trains something else, and its figures mislead.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from test_lora_parity import our_adapter
from tiny_llama import (
    FLOAT32,
    assert_trees_close,
    from_torch,
    logits_function,
    our_params,
    random_examples,
    random_tokens,
    torch_llama,
    torch_logits,
    torch_nll,
    trees_equal,
    whole_rows,
)

from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import (
    flatten,
    quantize_params,
    stack_layers,
    unflatten,
    unstack_layers,
)
from humpback_jax.model.lora import (
    PROJECTIONS,
    join,
    lora_spec,
    merge_adapter,
    unmerge_adapter,
    with_norms,
)
from humpback_jax.training.optimizer import OptimizerSpec, make_optimizer
from humpback_jax.training.packing import best_fit, lay_out
from humpback_jax.training.state import StepSpec, TrainState, initial_state
from humpback_jax.training.step import batch_nll, make_train_step
from humpback_jax.training.trainer import TrainSpec, train

RANK, ALPHA = 4, 8.0
KINDS = {"lora": {}, "rslora": {"scaling": "rslora"}, "dora": {"dora": True}}
LAYERS = {"lora": 1, "rslora": 1, "dora": 2}
RATE = 1e-2


def make_adapted(kind: str):
    """(peft model, our config, our base, our adapter, its spec), with random numbers everywhere."""
    base = torch_llama(attention_bias=True, num_hidden_layers=LAYERS[kind])
    config, params = from_torch(base)
    spec = lora_spec(RANK, ALPHA, 0.0, ("attn.*", "down"), **KINDS[kind])
    settings = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[f"{name}_proj" for name in spec.targets],
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
    )
    model = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif "lora_" in name:
                parameter.copy_(0.3 * noise)
    return model, config, params, adapter_of(model, config.num_hidden_layers), spec


adapted = functools.cache(make_adapted)


def adapter_of(model: peft.PeftModel, layers: int, gradients: bool = False):
    """`our_adapter`, with DoRA's magnitudes."""
    adapter = our_adapter(model, layers, gradients)
    tensors = {n: p.grad if gradients else p.detach() for n, p in model.named_parameters()}
    stem = "base_model.model.model.layers.{}.{}.{}_proj.lora_magnitude_vector.default.weight"
    for part, module in (("attn", "self_attn"), ("mlp", "mlp")):
        for name in adapter["layers"].get(part, {}):
            if stem.format(0, module, name) in tensors:
                adapter["layers"][part][name]["lora_magnitude"] = np.stack(
                    [tensors[stem.format(i, module, name)].numpy() for i in range(layers)]
                )
    return adapter


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", [pytest.param("rslora", marks=SLOW), "dora"])
def test_logits_and_merged_weights_equal_peft_s(kind) -> None:
    model, config, params, adapter, spec = make_adapted(kind)
    tokens = random_tokens((2, 30))
    expected = torch_logits(model.eval(), tokens)
    run = logits_function(config, lora=spec)
    assert np.abs(run(join(params, adapter), *whole_rows(tokens)) - expected).max() < 1e-4
    plain = dataclasses.replace(spec, scaling="lora", dora=False)
    merged = merge_adapter(params, adapter, spec)
    other = merge_adapter(params, adapter, plain)["layers"]["attn"]["q"]["kernel"]
    assert np.abs(merged["layers"]["attn"]["q"]["kernel"] - other).max() > 0.1
    theirs = model.merge_and_unload()
    tensors = {n: p.detach().numpy() for n, p in theirs.named_parameters()}
    assert_trees_close(merged, our_params(tensors, config.num_hidden_layers), 1e-5)


@pytest.mark.parametrize(
    ("kind", "ratio"),
    [
        pytest.param("lora", 4.0, marks=SLOW),
        pytest.param("rslora", 1.0, marks=SLOW),
        ("dora", 4.0),
    ],
)
def test_gradient_and_one_adamw_step_equal_torch_s(kind, ratio) -> None:
    """The ratio is LoRA+'s: B's own learning rate in a parameter group of torch."""
    model, config, params, adapter, spec = make_adapted(kind)
    model.train()
    examples = random_examples(4)
    batch = lay_out(examples, best_fit([e.length for e in examples], 96), 2, 96)
    count = sum(example.supervised for example in examples)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "lora_A" in n], "lr": RATE, "weight_decay": 0.1},
        {"params": [p for n, p in named if "lora_B" in n], "lr": RATE * ratio, "weight_decay": 0.1},
        {"params": [p for n, p in named if "magnitude" in n], "lr": RATE, "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), eps=1e-2)
    theirs.zero_grad()
    (torch_nll(model, examples).sum() / count).backward()
    layers = config.num_hidden_layers
    gradient = adapter_of(model, layers, gradients=True)
    theirs.step()

    step = StepSpec(config, 2, layout="unrolled", precision=FLOAT32, lora=spec)
    settings = OptimizerSpec(RATE, RATE, epsilon=1e-2, clip_norm=1e9, lora_plus_ratio=ratio)
    optimizer = make_optimizer(settings, 10)
    trainable = jax.tree.map(jnp.asarray, unstack_layers(adapter))
    state = TrainState(jnp.int32(0), trainable, unstack_layers(params), optimizer.init(trainable))
    batches = jax.tree.map(lambda x: x[None], batch)
    after, metrics = make_train_step(step, optimizer)(state, batches, jax.random.key(0))
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    assert float(metrics.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    moments = after.optimizer[1].mu
    first = jax.tree.map(lambda leaf: leaf / 0.1, stack_layers(moments))  # (1 - beta) * gradient
    assert_trees_close(first, gradient, 1e-4)
    before, moved = flatten(adapter), flatten(stack_layers(after.trainable))
    for path, leaf in flatten(adapter_of(model, layers)).items():
        change = leaf - before[path]
        gap = np.abs(np.asarray(moved[path]) - before[path] - change).max()
        assert gap < 1e-2 * np.abs(change).max(), path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_an_adapter_that_was_merged_can_be_taken_off_again(kind, layout) -> None:
    _, _, params, adapter, spec = adapted(kind)
    if layout == "unrolled":
        params, adapter = unstack_layers(params), unstack_layers(adapter)
    held = with_norms(params, adapter, spec)
    merged = merge_adapter(params, held, spec)
    assert not trees_equal(merged, params)
    assert_trees_close(unmerge_adapter(merged, held, spec), params, 1e-5)


@pytest.mark.parametrize("layout", [pytest.param("scan", marks=SLOW), "unrolled"])
def test_a_fresh_dora_adapter_leaves_the_base_as_it_is(layout) -> None:
    """Its magnitudes have to be those of the base, not of the random weights it is drawn with."""
    config, params = from_torch(torch_llama(num_hidden_layers=1))
    spec = lora_spec(RANK, ALPHA, 0.0, ("q", "down"), dora=True)
    step = StepSpec(config, 1, layout=layout, precision=FLOAT32, lora=spec)
    state = initial_state(step, params, optax.sgd(1.0), seed=3)
    adapter = stack_layers(state.trainable) if layout == "unrolled" else state.trainable
    assert_trees_close(merge_adapter(params, adapter, spec), params, 1e-6)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
@pytest.mark.parametrize("base", ["auto", "int8", None])
def test_the_first_step_deletes_weights_that_the_caller_goes_on_with(base, layout) -> None:
    """A step is given its whole state, frozen norms too; the adapter is merged into the base."""
    config, params = from_torch(torch_llama(num_hidden_layers=1))
    params = jax.tree.map(jnp.asarray, params)
    lora = None if base is None else lora_spec(RANK, ALPHA, 0.0, ("q",), base=base)
    step = StepSpec(config, 1, layout=layout, precision=FLOAT32, lora=lora)
    state = initial_state(step, params, optax.sgd(1.0), seed=0)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    assert not [leaf.shape for leaf in jax.tree.leaves(params) if leaf.is_deleted()]


def rounded(quantized):
    """int8 weights and their scales -> the float32 weights that they stand for."""
    flat = dict(flatten(quantized))
    for path, leaf in flatten(quantized).items():
        if leaf.dtype == jnp.int8:
            axis = -1 if path[-1] == "embedding" else -2
            scale = flat.pop((*path[:-1], "scale"))
            flat[path] = leaf.astype("float32") * jnp.expand_dims(scale, axis)
    return unflatten(flat)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_through_int8_weights_are_those_of_the_rounded_weights(tied) -> None:
    config, params = from_torch(torch_llama(tie_word_embeddings=tied, num_hidden_layers=1))
    spec = lora_spec(RANK, ALPHA, 0.0, ("q", "down"), dora=True, base="int8")
    layout = "scan" if tied else "unrolled"
    step = StepSpec(config, 2, layout=layout, precision=FLOAT32, lora=spec, remat=tied)
    state = initial_state(step, params, optax.sgd(1.0), seed=0)
    assert_trees_close(state.frozen, quantize_params(_arranged(params, step)), 1e-6)
    noise = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape), state.trainable)
    adapter = jax.tree.map(jnp.float32, adapter)
    examples = random_examples(4)
    batch = lay_out(examples, best_fit([e.length for e in examples], 96), 2, 96)
    gradient = jax.jit(jax.value_and_grad(lambda a, base: batch_nll(step, join(base, a), batch)[0]))
    loss, found = gradient(adapter, state.frozen)
    exact, expected = gradient(adapter, rounded(state.frozen))
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
    assert_trees_close(found, expected, 1e-4)


def _arranged(params, step):
    return params if step.layout == "scan" else unstack_layers(params)


def test_over_int8_weights_the_loss_falls_and_the_adapter_goes_to_the_exact_base() -> None:
    config, params = from_torch(torch_llama(num_hidden_layers=1))
    lora = lora_spec(RANK, ALPHA, 0.0, ("v", "down"), base="int8")
    spec = TrainSpec(
        steps=8,
        batch_examples=4,
        row_tokens=64,
        lora=lora,
        layout="unrolled",
        optimizer=OptimizerSpec(2e-2, 2e-2),
    )
    trained = train(config, params, random_examples(4), spec)
    losses = [row["loss"] for row in trained.history]
    assert losses[-1] < 0.8 * losses[0]
    assert trained.adapter is not None
    assert_trees_close(trained.params, merge_adapter(params, trained.adapter, lora), 1e-6)
    step = StepSpec(config, 1, layout="unrolled", precision=FLOAT32, lora=lora)
    state = initial_state(step, params, optax.sgd(1.0), 0)
    held, size = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (state.frozen, params)
    )
    assert held < 0.3 * size


TARGETS = {
    ("all",): PROJECTIONS,
    ("*",): PROJECTIONS,
    ("mlp.*",): ("gate", "up", "down"),
    ("attn.[qv]", "up_proj"): ("q", "v", "up"),
}


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_are_named_or_matched_by_patterns(targets) -> None:
    assert lora_spec(4, 8, 0.0, targets).targets == TARGETS[targets]


def test_targets_that_match_nothing_are_all_named_in_one_message() -> None:
    with pytest.raises(HumpbackError, match=r"'query', 'attention\.\*'.*attn\.q") as error:
        lora_spec(4, 8, 0.0, ("query", "v", "attention.*"))
    assert "'v'" not in str(error.value)
