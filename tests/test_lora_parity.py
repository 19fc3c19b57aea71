"""Adapters mean what peft means by them, before and after merging.

If these fail, adapters trained here do nothing, or something else, in everybody else's tools.
"""

from __future__ import annotations

import functools

import jax
import ml_dtypes
import numpy as np
import optax
import peft
import pytest
import torch
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
from humpback_jax.model.linear import NARROW, matmul
from humpback_jax.model.llama import Params, init_params, stack_layers, unstack_layers
from humpback_jax.model.lora import PROJECTIONS, join, lora_spec, merge_adapter, split_adapter
from humpback_jax.training.optimizer import OptimizerSpec
from humpback_jax.training.packing import best_fit, lay_out
from humpback_jax.training.state import StepSpec, initial_state
from humpback_jax.training.step import batch_nll
from humpback_jax.training.trainer import TrainSpec, train

TARGETS = {"q_and_v": ("q", "v"), "all_linear": PROJECTIONS}
RANK, ALPHA = 4, 8.0


def make_adapted(name: str):
    """(peft model, our config, our base, our adapter), with random A and B."""
    base = torch_llama()
    config, params = from_torch(base)
    modules = [f"{target}_proj" for target in TARGETS[name]]
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, lora_dropout=0.0)
    model = peft.get_peft_model(base, settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, config, params, our_adapter(model, config.num_hidden_layers)


adapted = functools.cache(make_adapted)


def our_adapter(model: peft.PeftModel, layers: int, gradients: bool = False) -> Params:
    """peft's A [rank, in] and B [out, rank] -> lora_a [L, in, rank] and lora_b [L, rank, out]."""
    tensors = {n: p.grad if gradients else p.detach() for n, p in model.named_parameters()}
    adapter: Params = {"layers": {}}
    for part, module in (("attn", "self_attn"), ("mlp", "mlp")):
        for name in PROJECTIONS:
            stem = (
                f"base_model.model.model.layers.{{}}.{module}.{name}_proj.lora_{{}}.default.weight"
            )
            if stem.format(0, "A") in tensors:
                adapter["layers"].setdefault(part, {})[name] = {
                    f"lora_{letter.lower()}": np.stack(
                        [tensors[stem.format(i, letter)].numpy().T for i in range(layers)]
                    )
                    for letter in "AB"
                }
    return adapter


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
@pytest.mark.parametrize("name", TARGETS)
def test_logits_with_an_adapter_equal_peft(name, layout) -> None:
    model, config, params, adapter = adapted(name)
    tokens = random_tokens((2, 30))
    expected = torch_logits(model, tokens)
    with model.disable_adapter():
        assert np.abs(torch_logits(model, tokens) - expected).max() > 0.5, "the adapter must matter"
    tree = join(params, adapter)
    tree = unstack_layers(tree) if layout == "unrolled" else tree
    run = logits_function(config, layout, lora_spec(RANK, ALPHA, 0.0, TARGETS[name]))
    assert np.abs(np.asarray(run(tree, *whole_rows(tokens))) - expected).max() < 1e-4


@pytest.mark.parametrize("name", TARGETS)
def test_merged_weights_equal_peft_s_in_both_layouts(name) -> None:
    _, config, params, adapter = adapted(name)
    spec = lora_spec(RANK, ALPHA, 0.0, TARGETS[name])
    merged = merge_adapter(params, adapter, spec)
    apart = merge_adapter(unstack_layers(params), unstack_layers(adapter), spec)
    assert_trees_close(stack_layers(apart), merged, 1e-6)
    theirs = make_adapted(name)[0].merge_and_unload()  # changes its model in place
    tensors = {n: p.detach().numpy() for n, p in theirs.named_parameters()}
    assert_trees_close(merged, our_params(tensors, config.num_hidden_layers), 1e-6)
    tokens = random_tokens((2, 30))
    logits = np.asarray(logits_function(config)(merged, *whole_rows(tokens)))
    assert np.abs(logits - torch_logits(adapted(name)[0], tokens)).max() < 1e-4


def test_merging_keeps_the_dtype_and_leaves_the_base_alone() -> None:
    _, _, params, adapter = adapted("q_and_v")
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    before = jax.tree.map(np.array, half)
    merged = merge_adapter(half, adapter, lora_spec(RANK, ALPHA, 0.0, ("q", "v")))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}
    assert trees_equal(half, before)
    assert not trees_equal(merged, before)


def test_the_adapter_s_gradient_equals_peft_s() -> None:
    model, config, params, adapter = adapted("all_linear")
    spec = lora_spec(RANK, ALPHA, 0.0, PROJECTIONS)
    examples = random_examples(4)
    batch = lay_out(examples, best_fit([e.length for e in examples], 96), 2, 96)
    model.zero_grad()
    torch_nll(model, examples).sum().backward()
    step = StepSpec(config, 1, layout="unrolled", precision=FLOAT32, lora=spec)
    base, trainable = unstack_layers(params), unstack_layers(adapter)
    gradient = jax.jit(jax.grad(lambda a: batch_nll(step, join(base, a), batch)[0]))(trainable)
    expected = our_adapter(model, config.num_hidden_layers, gradients=True)
    assert_trees_close(stack_layers(gradient), expected, 1e-4)


@pytest.mark.parametrize("rank", [2, 16])
def test_the_gradient_of_a_low_rank_matrix_is_the_same_whichever_way_it_is_computed(rank) -> None:
    """Those much narrower than wide take another path, which peft's tiny ranks do not reach."""
    assert 2 * NARROW < 64 < 16 * NARROW
    x, kernel, gradient = (
        np.random.default_rng(0).normal(size=size).astype(np.float32)
        for size in ((2, 5, 64), (64, rank), (2, 5, rank))
    )
    _, pull = jax.vjp(functools.partial(matmul, compute="float32"), x, kernel)
    dx, dkernel = jax.jit(pull)(gradient)
    np.testing.assert_allclose(dkernel, np.einsum("btd,btr->dr", x, gradient), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, gradient @ kernel.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_training_changes_the_adapter_alone_and_returns_it_merged(layout) -> None:
    config, params = from_torch(torch_llama())
    lora = lora_spec(RANK, ALPHA, 0.0, ("q_proj", "down_proj"))
    spec = TrainSpec(
        steps=2,
        batch_examples=3,
        row_tokens=64,
        lora=lora,
        layout=layout,
        optimizer=OptimizerSpec(1e-2, 1e-2),
    )
    trained = train(config, params, random_examples(6), spec)
    assert trained.adapter is not None
    assert set(trained.adapter["layers"]["attn"]) == {"q"}
    assert set(trained.adapter["layers"]["mlp"]) == {"down"}
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(trained.adapter))
    assert_trees_close(trained.params, merge_adapter(params, trained.adapter, lora), 1e-6)
    for path in (("attn", "k"), ("attn", "v"), ("mlp", "up"), ("attn_norm",)):
        ours, base = trained.params["layers"], params["layers"]
        for key in path:
            ours, base = ours[key], base[key]
        assert trees_equal(ours, base), path
    for name in ("embed", "norm", "lm_head"):
        assert trees_equal(trained.params[name], params[name])


def test_a_fresh_adapter_changes_nothing_and_is_the_same_in_both_layouts() -> None:
    """Else a run continued on other hardware, which picks the layout, would start elsewhere."""
    config, params = from_torch(torch_llama())
    lora = lora_spec(RANK, ALPHA, 0.0, PROJECTIONS)
    adapters = []
    for layout in ("scan", "unrolled"):
        spec = StepSpec(config, 1, layout=layout, precision=FLOAT32, lora=lora)
        state = initial_state(spec, params, optax.sgd(1.0), seed=3)
        adapters.append(stack_layers(state.trainable) if layout == "unrolled" else state.trainable)
    assert trees_equal(*adapters)
    assert_trees_close(merge_adapter(params, adapters[0], lora), params, 0.0)
    down = np.asarray(adapters[0]["layers"]["mlp"]["down"]["lora_a"])
    assert np.abs(down[0] - down[1]).max() > 0, "layers must not share their initial values"
    assert np.abs(down).max() <= down.shape[1] ** -0.5, "peft draws A from +-1/sqrt(inputs)"


def test_splitting_a_tree_and_joining_it_again_loses_nothing() -> None:
    config = from_torch(torch_llama())[0]
    spec = lora_spec(2, 4, 0.0, ("v", "o"))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), lora=spec))
    tree = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    base, adapter = split_adapter(tree)
    assert trees_equal(join(base, adapter), tree)
    assert len(jax.tree.leaves(adapter)) == 4
    assert trees_equal(join({}, base), base)


def test_a_misspelt_target_or_an_empty_adapter_is_refused() -> None:
    with pytest.raises(HumpbackError, match="query"):
        lora_spec(4, 8, 0.0, ("query", "v"))
    with pytest.raises(HumpbackError):
        lora_spec(4, 8, 0.0, ())
    with pytest.raises(HumpbackError, match="rank"):
        lora_spec(0, 8, 0.0, ("q",))
    assert lora_spec(4, 8, 0.0, ("v_proj", "q")) == lora_spec(4, 8, 0.0, ("q_proj", "v"))
