"""int8 weights and int8 keys and values: the same model, rounded, and the same rules of the engine.

If these fail, users who save memory get another model's text, or text that its neighbours change.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_sampling import GREEDY, STOP, WINDOW, as_tuples, model_of, requests_by_hash, small
from tiny_llama import (
    FLOAT32,
    from_torch,
    logits_function,
    logits_through_the_cache,
    our_config,
    random_examples,
    random_tokens,
    torch_llama,
    torch_logits,
    torch_nll,
    whole_rows,
)
from tiny_run import tiny_config

from humpback_jax import inference
from humpback_jax.cli import main
from humpback_jax.compute import choose_compute
from humpback_jax.errors import HumpbackError
from humpback_jax.evaluation.fidelity import fidelity
from humpback_jax.evaluation.nll import response_nll
from humpback_jax.evaluation.statistics import token_mean
from humpback_jax.inference import Inference
from humpback_jax.loop import run
from humpback_jax.model.attention import packed_attention
from humpback_jax.model.cache import (
    cache_bytes,
    decode_attention,
    empty_cache,
)
from humpback_jax.model.linear import LoraSpec, Precision
from humpback_jax.model.llama import (
    bind,
    flatten,
    init_params,
    quantize_params,
    unflatten,
    unstack_layers,
)
from humpback_jax.model.lora import lora_spec
from humpback_jax.model.quantize import quantize
from humpback_jax.models import load_model
from humpback_jax.parallel import rules
from humpback_jax.parallel.mesh import MeshShape, make_mesh
from humpback_jax.run_view import RunView
from humpback_jax.sampling.engine import Engine
from humpback_jax.sampling.likelihood import sequence_nll
from humpback_jax.sampling.prefix import compute_prefix
from humpback_jax.sampling.programs import empty_slots
from humpback_jax.stages.sources import packaged_pairs
from humpback_jax.training.state import StepSpec, _int8_base

INT8_KV = Precision(kv="int8")
MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def rounded(weights: np.ndarray) -> np.ndarray:
    """Each row's elements as the nearest of 255 evenly spaced numbers: written for the tests."""
    scale = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(weights / scale) * scale


@functools.cache
def rounded_model(name: str):
    """A torch model whose matrices are rounded, and the params of it before."""
    model = torch_llama(**MODELS[name])
    config, params = from_torch(model)
    with torch.no_grad():
        for parameter in dict(model.named_parameters()).values():
            if parameter.ndim == 2:
                parameter.copy_(torch.tensor(rounded(parameter.numpy())))
    return model, config, params


FINITE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@settings(max_examples=50)
@given(hnp.arrays(np.float32, (3, 4), elements=FINITE))
def test_no_number_is_off_by_more_than_half_a_step(x) -> None:
    for axis in (-1, -2):
        values, scale = quantize(jnp.asarray(x), axis)
        step = np.expand_dims(np.asarray(scale, np.float64), axis)
        assert values.dtype == jnp.int8
        assert int(jnp.abs(values.astype(jnp.int32)).max()) <= 127
        gap = np.abs(np.asarray(values, np.float64) * step - x)
        assert (gap <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize(
    ("name", "layout"), [("untied", "scan"), ("tied", "unrolled"), ("biases", "unrolled")]
)
def test_int8_weights_give_the_logits_of_torch_with_rounded_weights(name, layout) -> None:
    model, config, params = rounded_model(name)
    params = unstack_layers(params) if layout == "unrolled" else params
    tokens = random_tokens((2, 40))
    logits = logits_function(config, layout)(quantize_params(params), *whole_rows(tokens))
    assert np.abs(np.asarray(logits) - torch_logits(model, tokens)).max() < 1e-4
    before = torch_logits(torch_llama(**MODELS[name]), tokens)
    assert np.abs(np.asarray(logits) - before).max() > 1e-2  # else nothing has been rounded


def test_scores_under_int8_weights_are_those_of_torch_with_rounded_weights() -> None:
    model, config, params = rounded_model("untied")
    examples = random_examples(6)
    quantized = quantize_params(unstack_layers(params))
    nll, _ = sequence_nll(config, quantized, examples, FLOAT32)
    with torch.no_grad():
        assert nll == pytest.approx(torch_nll(model, examples).numpy(), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_logits_of_a_part_of_the_vocabulary_have_their_own_scales(name) -> None:
    _, config, params = rounded_model(name)
    model = bind(config, quantize_params(params))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    whole = model.logits(hidden, FLOAT32)
    part = model.some_logits(hidden, jnp.int32(40), 32, FLOAT32)
    np.testing.assert_allclose(part, whole[:, 40:72], rtol=1e-5, atol=1e-5)


def test_an_adapter_beside_int8_weights_stays_exact() -> None:
    _, config, params = rounded_model("biases")
    spec = LoraSpec(4, 8.0, targets=("q", "down"))
    fresh = flatten(init_params(config, jax.random.key(1), lora=spec))
    fresh |= flatten(params)
    for path, leaf in fresh.items():
        if path[-1] == "lora_b":
            fresh[path] = leaf + 0.1
    quantized = quantize_params(unflatten(fresh))
    flat = flatten(quantized)
    plain = {path: leaf for path, leaf in flat.items() if leaf.dtype != jnp.int8}
    for path, leaf in flat.items():
        if leaf.dtype == jnp.int8:
            axis = -1 if path[-1] == "embedding" else -2
            plain[path] = leaf.astype("float32") * jnp.expand_dims(
                plain.pop((*path[:-1], "scale")), axis
            )
    run = logits_function(config, lora=spec)
    inputs = whole_rows(random_tokens((2, 40)))
    exact = run(unflatten(plain), *inputs)
    assert np.abs(run(quantized, *inputs) - exact).max() < 1e-4
    without = logits_function(config)(quantize_params(params), *inputs)
    assert np.abs(without - exact).max() > 1e-2


def test_int8_weights_take_a_quarter_of_the_memory() -> None:
    """At the default model's shapes; norms, scales and biases are all that stays wide."""
    config = dataclasses.replace(
        our_config(torch_llama(tie_word_embeddings=True)),
        **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    )
    whole = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    small = jax.eval_shape(quantize_params, whole)

    def size(params) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))

    assert 0.25 < size(small) / size(whole) < 0.253


@pytest.mark.parametrize("use", ["sampling", "training"])
@pytest.mark.parametrize("mesh", [None, "fsdp=1"])
def test_int8_weights_need_room_for_the_wide_ones_of_all_layers(use, mesh, monkeypatch) -> None:
    model = load_model("tiny-random")
    params = init_params(dataclasses.replace(model.config, num_hidden_layers=12), jax.random.key(0))
    config = dataclasses.replace(model.config, num_hidden_layers=12)
    params = jax.tree.map(np.array, params)
    deep = dataclasses.replace(model, config=config, params=params)
    gc.collect()
    before, held = _device_bytes(), []

    class Watched(dict):
        def items(self):
            for item in super().items():
                held.append(_device_bytes() - before)
                yield item

    monkeypatch.setattr(rules, "flatten", lambda params: Watched(flatten(params)))
    where = None if mesh is None else make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    if use == "sampling":
        found = inference._prepare(deep, "int8", where)
    else:
        lora = lora_spec(2, 4, 0.0, ("q",), base="int8")
        spec = StepSpec(config, 1, layout="unrolled", precision=Precision(), lora=lora, mesh=where)
        found = _int8_base(spec, params)
    expected = flatten(quantize_params(unstack_layers(params)))
    assert flatten(found).keys() == expected.keys()
    for path, leaf in flatten(found).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=str(path))
    wide = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert max(held) < 0.5 * wide, "with the int8 ones, a quarter of it"
    assert max(held) > 0.2 * wide


def _device_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def test_a_quantised_tree_without_a_scale_is_an_error_that_names_it() -> None:
    _, config, params = rounded_model("tied")
    flat = flatten(quantize_params(params))
    del flat["layers", "attn", "q", "scale"]
    with pytest.raises(HumpbackError, match=r"missing layers\.attn\.q\.scale"):
        bind(config, unflatten(flat))


@functools.cache
def logits_with_int8_cache() -> np.ndarray:
    """One text in three rows, of which 1, 17 or 32 tokens are prefilled: [places, 3, V]."""
    _, config, params = model_of()
    texts = np.repeat(random_tokens((1, WINDOW)), 3, axis=0)
    lengths = np.array([1, 17, 32], np.int32)
    return logits_through_the_cache(config, params, texts, lengths, "int8")


def test_decoding_with_the_int8_cache_equals_the_full_pass_over_rounded_keys_and_values() -> None:
    """At every place of the window, through every piece."""
    _, config, params = model_of()
    tokens, positions, segments = whole_rows(random_tokens((1, WINDOW)))
    packed = packed_attention(segments, positions, FLOAT32)

    def near(x):
        scale = jnp.abs(x).max(axis=-1, keepdims=True) / 127
        return jnp.round(x / scale) * scale

    @jax.jit
    def full(params, rounds):
        def attend(q, k, v, cache):
            k, v = (jnp.where(rounds, near(x), x) for x in (k, v))
            return packed(q, k, v, cache)

        model = bind(config, params)
        hidden, _ = model.hidden_states(tokens, positions, attend, precision=FLOAT32)
        return model.logits(hidden, FLOAT32)[0]

    decoded = logits_with_int8_cache()
    for row, start in enumerate((0, 16, 31)):
        expected = full(params, True)[start : start + len(decoded)]
        # An element between two steps may be rounded the other way.
        gap = np.abs(decoded[:, row] - expected)
        assert gap.mean() < 1e-4
        assert gap.max() < 2e-2
    # What rounding itself costs this model, whose logits' spread is 1.6.
    cost = np.abs(full(params, True) - full(params, False))
    assert 1e-3 < cost.mean() < 0.05


def test_prefill_reads_the_rounded_keys_that_decoding_reads() -> None:
    """A prompt's last place is the same, prefilled whole or decoded from earlier on."""
    logits = logits_with_int8_cache()
    whole, from_17, from_1 = logits[0, 2], logits[32 - 17, 1], logits[32 - 1, 0]
    assert np.abs(whole - from_17).max() < 1e-3
    assert np.abs(whole - from_1).max() < 1e-3


@functools.cache
def narrow_engine() -> Engine:
    _, config, params = model_of()
    quantized = quantize_params(unstack_layers(params))
    return Engine(config, quantized, (STOP,), INT8_KV, small(3))


@functools.cache
def narrow_texts() -> list[tuple[list[int], float, str]]:
    return as_tuples(narrow_engine().generate(requests_by_hash(14, GREEDY)))


@settings(max_examples=6)
@given(order=st.permutations(range(14)), count=st.integers(1, 14))
def test_with_int8_a_text_depends_on_neither_order_nor_neighbours_nor_the_slot_s_last_row(
    order, count
) -> None:
    requests, together = requests_by_hash(14, GREEDY), narrow_texts()
    chosen = order[:count]
    drawn = as_tuples(narrow_engine().generate([requests[i] for i in chosen]))
    assert drawn == [together[i] for i in chosen]


def test_pieces_of_the_int8_cache_that_no_row_has_reached_are_not_read() -> None:
    _, config, _ = model_of()
    cache = empty_cache(config, 2, 512, "int8")[0]
    broken = jnp.full_like(cache.key_scales[1], jnp.nan)
    cache = cache._replace(
        key_scales=(cache.key_scales[0], broken, jnp.concatenate([broken, broken], -1)),
        value_scales=(cache.value_scales[0], broken, jnp.concatenate([broken, broken], -1)),
    )
    shared = compute_prefix(config, {}, (), FLOAT32).arrays.layers[0]
    groups, width, heads = 2, config.head_dim, config.num_attention_heads
    new = jnp.ones((2, 1, groups, width))
    places, none = jnp.array([3, 126]), jnp.zeros(2, jnp.int32)
    attend = decode_attention(places, none, jnp.ones(2, bool), FLOAT32)
    context, _ = attend(jnp.ones((2, 1, heads, width)), new, new, (cache, shared))
    assert np.isfinite(context).all()


def test_the_int8_cache_is_as_small_as_it_says() -> None:
    _, config, _ = model_of()
    slots = jax.eval_shape(lambda: empty_slots(config, INT8_KV, 3, 256))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(slots.caches))
    assert size == cache_bytes(config, 3, 256, "int8")
    # A scale of four bytes for each vector of int8.
    width = config.head_dim
    assert size / cache_bytes(config, 3, 256, "float32") == (width + 4) / (4 * width)


def test_formats_enter_keys_and_the_default_ones_leave_earlier_artifacts_valid() -> None:
    def formats(weights: str, kv: str) -> tuple[str, str]:
        compute = choose_compute("float32", 4, weights, kv)
        return compute.scoring_formats, compute.sampling_formats

    assert formats("auto", "auto") == ("float32", "float32")
    assert formats("int8", "auto")[0] == formats("int8", "int8")[0] != "float32"
    assert formats("auto", "int8")[0] == "float32"  # scores do not read the cache
    options = ("auto", "int8")
    assert len({formats(weights, kv)[1] for weights in options for kv in options}) == 4


@pytest.mark.parametrize("option", ["weights", "kv"])
def test_an_unknown_format_is_refused(option, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    assert main(["sample", "--model=tiny-random", "--prompt=Hi", f"--{option}=int4"]) == 1
    assert f"compute.{option}='int4'" in capsys.readouterr().err


@pytest.mark.slow
def test_fidelity_is_perfect_for_float32_itself_and_counts_the_cache_s_format() -> None:
    model, examples = load_model("tiny-random"), packaged_pairs("heldout")[:4]
    exact = Inference(model, choose_compute("float32", 4))
    same = fidelity(exact, exact, examples, "none")
    assert same["kl_per_token"].value < 1e-9
    assert same["same_tokens"].value == 1
    narrow = fidelity(
        Inference(model, choose_compute("float32", 4, kv="int8")), exact, examples, "none"
    )
    assert 1e-7 < narrow["kl_per_token"].value < 1e-3


@pytest.mark.slow
def test_another_cache_format_draws_again_and_keeps_what_does_not_depend_on_it(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = RunView(folder).entries
    config = tiny_config()
    config.compute.kv = "int8"
    run(config, folder, say=lambda text: None)
    after = RunView(folder).entries
    for name in ("round_0/M_yx", "round_0/M_0", "evaluation/base", "evaluation/M_0"):
        assert after[name] == before[name]
    for name in ("candidates", "answers/base"):
        assert after[name]["path"] != before[name]["path"]


@pytest.mark.slow
def test_sample_score_and_evaluate_take_both_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    rows = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("yes", "no", "so")]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = ["--model=tiny-random", "--weights=int8", "--kv=int8"]
    sample = ["sample", *both, f"--prompts={data}", f"--out={tmp_path / 'a.jsonl'}"]
    assert main([*sample, "--max-tokens=4"]) == 0
    score = ["score", *both, f"--data={data}", f"--out={tmp_path / 's.jsonl'}", "--curator=rubric"]
    assert main([*score, "--max-tokens=4"]) == 0
    out = tmp_path / "evaluation"
    evaluate = ["evaluate", *both, "--suite=nll,fidelity", f"--data={data}", f"--out={out}"]
    assert main(evaluate) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["formats"] in ("float32, int8 weights, int8 kv", "bfloat16, int8 weights, int8 kv")
    assert found["results"]["fidelity"]["same_tokens"]["n"] == 3


@pytest.mark.slow
@pytest.mark.real_model
def test_the_default_model_keeps_its_quality() -> None:
    """Real prompts; the figures stand in docs/precision.md."""
    model, examples = load_model("smollm2-135m-instruct"), packaged_pairs("heldout")
    exact = Inference(model, choose_compute("float32", 16))
    narrow = Inference(model, choose_compute("float32", 16, "int8", "int8"))
    cost = (
        token_mean(*response_nll(narrow, examples, "none")).value
        - token_mean(*response_nll(exact, examples, "none")).value
    )
    assert abs(cost) < 0.02
    figures = fidelity(narrow, exact, examples[:16], "none")
    assert figures["kl_per_token"].value < 0.03
