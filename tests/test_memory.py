"""Memory is planned: if these fail, a long job dies of memory that could have been counted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import FLOAT32, SMOLLM2, from_torch, random_tokens, torch_llama
from tiny_run import tiny_config

from humpback_jax import loop
from humpback_jax.allocator import TUNABLES
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import Inference
from humpback_jax.model.cache import cache_bytes
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.kernels import XLA
from humpback_jax.model.llama import count_parameters, unstack_layers
from humpback_jax.parallel.mesh import MeshShape, make_mesh
from humpback_jax.parallel.rules import abstract_params
from humpback_jax.sampling.engine import Engine, Request, Shape
from humpback_jax.sampling.memory import (
    GIB,
    device_bytes,
    parts_that_hold,
    rows_that_fit,
    tree_bytes,
)
from humpback_jax.sampling.prefix import abstract_prefix
from humpback_jax.sampling.programs import abstract_slots, decode_program
from humpback_jax.sampling.sampler import Decoding, record_key
from humpback_jax.stages import train as stage

LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
)


@given(
    st.floats(14, 200),
    st.integers(0, 9),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 2, 4]),
)
def test_planned_rows_take_more_than_the_budget(
    gib: float, power: int, tensor: int, fsdp: int
) -> None:
    parts = tensor * fsdp
    weights, budget = 13 * GIB // parts, int(gib * GIB) // parts

    def cached(rows: int) -> int:
        share = rows // fsdp if rows % fsdp == 0 else rows
        return cache_bytes(LLAMA_7B, share, 2048, "bfloat16") // tensor

    try:
        rows = rows_that_fit(
            LLAMA_7B, "bfloat16", 2048, 2**power, budget, weights, 1024, tensor, fsdp
        )
    except HumpbackError:
        assert weights + cached(1) + 0.5 * GIB > budget
        return
    assert 1 <= rows <= 2**power
    assert weights + cached(rows) <= budget


def test_a_model_that_does_not_fit_dies_later_and_without_advice() -> None:
    with pytest.raises(HumpbackError, match=r"10\.0 GiB.*13\.0 GiB.*--memory-gb.*--mesh"):
        rows_that_fit(LLAMA_7B, "bfloat16", 2048, 8, 10 * GIB, 13 * GIB, 1024)


@given(st.integers(1, 10**12), st.integers(1, 10**11), st.sampled_from([1, 2, 8, 256]))
def test_a_large_model_is_put_on_one_device(weights: int, budget: int, most: int) -> None:
    parts = parts_that_hold(weights, budget, most)
    assert parts <= most
    assert parts == most or weights / parts <= budget / 2
    assert parts == 1 or weights / (parts / 2) > budget / 2


def test_this_machine_is_said_to_have_no_memory_or_that_of_ten() -> None:
    assert 0.1 * GIB < device_bytes(jax.devices()[0]) < 100_000 * GIB


def test_a_small_budget_changes_the_text_or_is_not_kept() -> None:
    _, config, params = from_engine()
    requests = [
        Request(str(i), random_tokens(9 + i), record_key(0, "m", str(i), 0), Decoding(0.0))
        for i in range(6)
    ]
    requests = [
        dataclasses.replace(request, decoding=Decoding(0.0, max_new_tokens=8))
        for request in requests
    ]
    shape = Shape(8, chunks=2, chunk_tokens=16, steps=4)
    wide = Engine(config, params, (5,), shape=shape)
    one = cache_bytes(config, 1, 128, "float32")
    narrow = Engine(config, params, (5,), shape=shape, memory=tree_bytes(params) + 4 * one)
    assert wide.slots_of(128) == 8
    assert 1 <= narrow.slots_of(128) < 8
    for a, b in zip(wide.generate(requests), narrow.generate(requests), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_a_row_too_long_for_the_memory_ends_a_job_midway_without_its_name() -> None:
    _, config, params = from_engine()
    config = dataclasses.replace(config, max_position_embeddings=8192)
    memory = tree_bytes(params) + 3 * cache_bytes(config, 1, 1024, "float32")
    shape = Shape(8, chunks=2, chunk_tokens=16, steps=4)
    engine = Engine(config, params, (5,), shape=shape, memory=memory)
    engine.check("short", 200, 300)
    with pytest.raises(HumpbackError, match="record long: the budget of"):
        engine.check("long", 200, 5000)
    engine.check("mostly shared", 5000, 500, shared=4900)


def test_one_long_row_leaves_all_others_with_its_few_slots_and_another_text() -> None:
    _, config, params = from_engine()
    config = dataclasses.replace(config, max_position_embeddings=2048)
    memory = tree_bytes(params) + 5 * cache_bytes(config, 1, 2048, "float32")
    shape = Shape(8, chunks=4, chunk_tokens=64, steps=4)
    engine = Engine(config, params, (5,), shape=shape, memory=memory)
    slots, decode = [], engine._decode

    def watched(params, slots_, prefix, ended, patience):
        slots.append(len(ended))
        return decode(params, slots_, prefix, ended, patience)

    engine._decode = watched
    how = Decoding(0.9, max_new_tokens=6)
    lengths = [9 + i for i in range(40)]

    def ask(name: int, length: int) -> Request:
        return Request(str(name), random_tokens(length), record_key(0, "m", str(name), 0), how)

    short = [ask(i, n) for i, n in enumerate(lengths)]
    alone = engine.generate(short)
    few, many = engine.slots_of(2048), engine.slots_of(1024)
    assert few < many == max(slots) == min(slots)
    slots.clear()
    beside = engine.generate([*short[:20], ask(99, 1100), *short[20:]])
    assert slots[0] == few and slots[-1] == many, "the long row is read first, as the longest"
    for one, other in zip(alone, [*beside[:20], *beside[21:]], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_job_leaves_its_slots_in_memory() -> None:
    """32 slots of the default model are 1.5 GB a copy."""
    script = Path(__file__).with_name("memory_of_jobs.py")
    environment = {**os.environ, TUNABLES: "glibc.malloc.hugetlb=1"}  # as the program starts itself
    done = subprocess.run(
        [sys.executable, script, "4"], env=environment, capture_output=True, text=True, check=True
    )
    first, *_, last = json.loads(done.stdout)
    assert last < first + 0.5 * GIB


def from_engine():
    model = torch_llama()
    config, params = from_torch(model)
    return model, config, jax.tree.map(jax.numpy.asarray, unstack_layers(params))


def test_decoding_takes_much_memory_that_is_in_no_plan() -> None:
    """Logits and what drawing needs, for the default model; weights and caches are not copied."""
    config = dataclasses.replace(SMOLLM2, max_position_embeddings=LLAMA_7B.max_position_embeddings)
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    params = abstract_params(config, "float32", "unrolled", mesh=mesh)
    arguments = (
        params,
        abstract_slots(config, FLOAT32, 32, 1024, mesh, XLA),
        abstract_prefix(config, FLOAT32, mesh),
        jax.ShapeDtypeStruct((32,), bool),
        np.int32(1),
    )
    compiled = decode_program(config, FLOAT32, 16, 0, mesh).lower(*arguments).compile()
    weights = 4 * count_parameters(config)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * weights


@pytest.mark.parametrize("drafts", [0, 3])
def test_guessing_takes_memory_that_is_in_no_plan(drafts: int) -> None:
    """Each guess is a place of its own, with logits of its own."""
    vocab, rows, capacity = 100_000, 4, 256
    _, config, _ = from_engine()
    config = dataclasses.replace(config, vocab_size=vocab, max_position_embeddings=capacity)
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    arguments = (
        abstract_params(config, "float32", "unrolled", mesh=mesh),
        abstract_slots(config, FLOAT32, rows, capacity, mesh, XLA),
        abstract_prefix(config, FLOAT32, mesh),
        jax.ShapeDtypeStruct((rows,), bool),
        np.int32(1),
    )
    compiled = decode_program(config, FLOAT32, 4, drafts, mesh).lower(*arguments).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    budget = cache_bytes(config, rows, capacity, "float32") + taken
    planned = rows_that_fit(config, "float32", capacity, rows, budget, 0, 0, drafts=drafts)
    assert planned < rows, "the budget has no room for the tokens that the rows contain"
    budget += int(0.1 * taken)
    assert rows_that_fit(config, "float32", capacity, rows, budget, 0, 0, drafts=drafts) == rows


def test_float32_and_bfloat16_rows_are_planned_alike() -> None:
    sizes = [cache_bytes(LLAMA_7B, 3, 256, dtype) for dtype in ("float32", "bfloat16")]
    assert sizes[0] == 2 * sizes[1] == 2 * (2 * 32 * 3 * 4096 * 256 * 2)


@pytest.mark.slow
def test_the_judge_gives_its_memory_back_before_the_next_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Inference]] = []
    alive: list[int] = []
    make, tune = Inference.__init__, stage.tune

    def watched(inference: Inference, *given: Any) -> None:
        make(inference, *given)
        held.append(weakref.ref(inference))

    def counted(*given: Any, **named: Any) -> Any:
        alive.append(sum(reference() is not None for reference in held))
        return tune(*given, **named)

    monkeypatch.setattr(Inference, "__init__", watched)
    monkeypatch.setattr(stage, "tune", counted)
    loop.run(tiny_config(), tmp_path / "run", say=lambda text: None)
    assert alive == [0] * len(alive) and len(alive) == 2 + tiny_config().rounds
    assert len(held) > len(alive)
