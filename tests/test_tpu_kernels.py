"""The kernels for TPU compute what XLA does, and touch nothing else.

They run in Pallas' interpreter for TPU, where memory begins as NaN and transfers happen no sooner
than somebody waits for them. If these fail, users on TPU get other text, or train on other
gradients, than users on CPU do.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import packed_rows
from tiny_llama import assert_trees_close, from_torch, random_examples, torch_llama

from humpback_jax.model import cache as xla_cache
from humpback_jax.model import tpu_cache
from humpback_jax.model.attention import packed_attention
from humpback_jax.model.blockwise import BLOCK, Shared
from humpback_jax.model.cache import LayerCache
from humpback_jax.model.cudnn import cudnn_attention
from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Attend, unstack_layers
from humpback_jax.model.splash import splash_attention
from humpback_jax.sampling.engine import Engine, Request, Shape
from humpback_jax.sampling.prefix import compute_prefix
from humpback_jax.sampling.sampler import Decoding, record_key
from humpback_jax.training.examples import index_of
from humpback_jax.training.order import BatchOrder
from humpback_jax.training.packing import lay_out, plan_packing
from humpback_jax.training.packing import packed_rows as rows_of_batch
from humpback_jax.training.state import StepSpec
from humpback_jax.training.step import batch_nll

TESTS = Path(__file__).parent
ROWS, PREFIX = 5, 128
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}


class Case(NamedTuple):
    """Sizes of one comparison."""

    groups: int = 2
    shared: int = 2
    width: int = 16
    tokens: int = 1
    capacity: int = 256
    dtype: str = "float32"
    rows: int = ROWS


def normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def qkv(case: Case, rows: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    heads = (case.groups * case.shared, case.groups, case.groups)
    shapes = [(rows, tokens, count, case.width) for count in heads]
    return tuple(normal(seed, shape, case.dtype) for seed, shape in enumerate(shapes))


def full_cache(case: Case) -> tuple[LayerCache, Shared]:
    """A cache whose every place has some content, and a shared prefix."""
    empty = xla_cache._piece_sizes(case.capacity)
    no_scales = (None,) * len(empty)
    keys = [(case.rows, case.groups, case.width, size) for size in empty]
    values = [(case.rows, case.groups, size, case.width) for size in empty]
    own = LayerCache(
        tuple(normal(10 + i, shape, case.dtype) for i, shape in enumerate(keys)),
        tuple(normal(30 + i, shape, case.dtype) for i, shape in enumerate(values)),
        no_scales,
        no_scales,
    )
    shared = Shared(
        normal(50, (case.groups, case.width, PREFIX), case.dtype),
        normal(51, (case.groups, PREFIX, case.width), case.dtype),
    )
    return own, shared


def poisoned(cache: LayerCache, reached: np.ndarray) -> LayerCache:
    """NaN in every block of which a row has reached nothing; reached: [B] places."""
    keys, values, begin = [], [], 0
    for key, value in zip(cache.keys, cache.values, strict=True):
        place = begin + np.arange(value.shape[2])
        unread = place[None] >= (-(-reached // BLOCK) * BLOCK)[:, None]
        keys.append(jnp.where(unread[:, None, None, :], jnp.nan, key))
        values.append(jnp.where(unread[:, None, :, None], jnp.nan, value))
        begin += value.shape[2]
    return cache._replace(keys=tuple(keys), values=tuple(values))


def interpreter(mesh: Mesh | None) -> bool | pltpu.InterpretParams:
    """The interpreter for TPU; that of Pallas in general where devices work side by side."""
    return True if mesh else pltpu.InterpretParams(dma_execution_mode="on_wait")


def assert_same(found: LayerCache, expected: LayerCache) -> None:
    for mine, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # NumPy knows no NaN of bfloat16.
        np.testing.assert_array_equal(mine.astype("float32"), reference.astype("float32"))


@functools.cache
def decoders(case: Case, mesh: Mesh | None) -> list[Callable]:
    """(places, live, cache) -> (context, cache), by XLA and by the kernel."""
    _, shared = full_cache(case)
    q, k, v = qkv(case, case.rows, case.tokens)
    counts = jnp.resize(jnp.array([0, 100, PREFIX, 1], jnp.int32), case.rows)

    def program(attention: Callable[..., Attend]) -> Callable:
        @jax.jit
        def run(places: jax.Array, live: jax.Array, own: LayerCache) -> tuple:
            attend = attention(places, counts, live, Precision(case.dtype, "float32"))
            context, (own, _) = attend(q, k, v, (own, shared))
            return context, own

        return run

    kernel = functools.partial(tpu_cache.decode_attention, mesh=mesh, interpret=interpreter(mesh))
    return [program(xla_cache.decode_attention), program(kernel)]


def check_decoding(
    case: Case, places: list[int], live: list[bool], mesh: Mesh | None = None
) -> None:
    mine = np.array(live)
    # As in the engine, a slot without a live row stands behind the last place.
    at = np.where(mine, places, case.capacity).astype(np.int32)
    reached = np.where(mine, np.minimum(at + case.tokens, case.capacity), 0)
    own, _ = full_cache(case)
    by_xla, by_kernel = decoders(case, mesh)
    expected, expected_cache = by_xla(at, mine, own)
    found, found_cache = by_kernel(at, mine, poisoned(own, reached))
    error = np.abs(found - expected)[mine]
    assert error.max(initial=0) < TOLERANCE[case.dtype]
    assert np.isfinite(found).all(), "a slot that is not live spreads NaN"
    assert_same(found_cache, poisoned(expected_cache, reached))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.sampled_from([0, 1, 31, 32, 126, 127, 128, 129, 254, 255]) | st.integers(0, 255),
        min_size=ROWS,
        max_size=ROWS,
    ),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
)
def test_a_row_reads_and_writes_its_own_places_and_no_block_beyond(places, live) -> None:
    check_decoding(Case(tokens=2), places, live)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 1, 64, 1, 1024, "float32"),
        Case(3, 3, 64, 5, 512, "float32"),
        Case(1, 8, 64, 1, 512, "bfloat16"),
        Case(2, 4, 128, 5, 512, "bfloat16"),
    ],
    ids=str,
)
def test_decoding_equals_xla_for_heads_of_all_kinds(case) -> None:
    last = case.capacity - case.tokens
    check_decoding(case, [0, 127, 128, 300, case.capacity - 1], [True] * ROWS)
    check_decoding(case, [255, 5, last, 256, 126], [True, False, True, True, True])
    check_decoding(case, [0] * ROWS, [False] * ROWS)


def check_prefill(case: Case, mesh: Mesh | None = None) -> None:
    """Two chunks of slot 2, the first one of slot 0 (twice), and a late one of slot 4."""
    slots = jnp.array([2, 2, 0, 0, 4], jnp.int32)
    starts = jnp.array([0, 128, 0, 0, case.capacity - 128], jnp.int32)
    counts = jnp.array([0, 0, 7, 7, PREFIX], jnp.int32)
    q, k, v = (x.at[3].set(x[2]) for x in qkv(case, 5, BLOCK))
    if mesh is not None:
        slots = jax.device_put(slots, NamedSharding(mesh, P()))
    own, shared = full_cache(case)
    reached = np.resize([128, 0, 256, 0, case.capacity, 0, 0, 0], case.rows)
    precision = Precision(case.dtype, "float32")
    found = []
    kernel = functools.partial(tpu_cache.chunk_attention, mesh=mesh, interpret=interpreter(mesh))
    for attention, given_cache in (
        (xla_cache.chunk_attention, own),
        (kernel, poisoned(own, reached)),
    ):

        @jax.jit
        def run(slots: jax.Array, q: jax.Array, cache: LayerCache, attention=attention) -> tuple:
            return attention(slots, counts, starts, precision)(q, k, v, (cache, shared))

        context, (cache, _) = run(slots, q, given_cache)
        found.append((context, poisoned(cache, reached)))
    assert np.abs(found[0][0] - found[1][0]).max() < TOLERANCE[case.dtype]
    assert_same(found[0][1], found[1][1])


def test_chunks_of_a_prompt_see_each_other_and_nothing_that_comes_later() -> None:
    check_prefill(Case(tokens=BLOCK))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case(3, 8, 64, BLOCK, 512, "float32"), Case(4, 1, 128, BLOCK, 512, "bfloat16")],
    ids=str,
)
def test_prefill_equals_xla_for_heads_of_all_kinds(case) -> None:
    check_prefill(case)


SHORT = [[50, 30, 10], [1, 100]]
LONG = [[100, 30, 50], [1, 200], [250], [40, 200]]


def check_training(other: Callable[[np.ndarray], Attend], case: Case, longest: int | None) -> None:
    """Contexts and gradients of packed rows, of which the last places are padding."""
    width = case.tokens
    lengths = LONG if width > BLOCK else SHORT
    segments, positions = packed_rows(lengths, width)
    used = (segments > 0)[..., None, None]
    target = normal(9, (len(lengths), width, case.groups * case.shared, case.width), "float32")
    heads = qkv(case, len(lengths), width)

    def loss(attend: Attend, *heads: jax.Array) -> tuple[jax.Array, jax.Array]:
        context = jnp.where(used, attend(*heads, None)[0].astype("float32"), 0)
        return (context * target).sum(), context

    precision = Precision(case.dtype, "float32")
    reference = packed_attention(segments, positions, precision, longest)
    results = []
    for attend in (reference, other(segments)):
        run = jax.jit(jax.grad(functools.partial(loss, attend), argnums=(0, 1, 2), has_aux=True))
        results.append(run(*heads))
    tolerance = {"float32": 1e-5, "bfloat16": 6e-2}[case.dtype]
    tolerances = {"atol": tolerance, "rtol": tolerance / 4}
    for mine, expected in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        mine, expected = mine.astype("float32"), expected.astype("float32")
        np.testing.assert_allclose(mine, expected, **tolerances)


def splash(
    segments: np.ndarray, dtype: str, longest: int | None, mesh: Mesh | None = None
) -> Attend:
    precision = Precision(dtype, "float32")
    return splash_attention(segments, precision, longest, mesh=mesh, interpret=True)


def test_splash_attention_trains_within_examples_alone() -> None:
    # A width that is no multiple of a block; no example is longer than 100.
    check_training(lambda ids: splash(ids, "float32", 100), Case(tokens=120), 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 4, 64, 1024, dtype="float32"),
        Case(4, 1, 128, 512, dtype="bfloat16"),
        Case(1, 8, 64, 512, dtype="bfloat16"),
    ],
    ids=str,
)
def test_splash_attention_equals_xla_for_heads_of_all_kinds(case) -> None:
    check_training(lambda ids: splash(ids, case.dtype, None), case, None)


def as_cudnn(segments: np.ndarray, mesh: Mesh | None = None) -> Attend:
    """What cuDNN is asked for, computed by XLA."""

    def never(*_: object) -> tuple:
        raise AssertionError("cuDNN takes these shapes")

    precision = Precision("bfloat16", "float32")
    return cudnn_attention(segments, precision, never, mesh=mesh, implementation="xla")


def test_what_cudnn_is_asked_for_trains_within_examples_alone() -> None:
    check_training(as_cudnn, Case(tokens=120, dtype="bfloat16"), None)


ON_A_MESH = """
import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_tpu_kernels import Case, as_cudnn, check_decoding, check_prefill, check_training, splash

axes = ("data", "fsdp", "tensor")
for shape in ((2, 2, 2), (1, 1, 8)):  # eight devices do not divide two key/value heads
    mesh = Mesh(np.array(jax.devices()).reshape(shape), axes)
    places, live = [0, 127, 128, 255, 5, 64, 200, 9], [True, False] * 2 + [True] * 4
    check_decoding(Case(tokens=2, rows=8), places, live, mesh)
    check_prefill(Case(rows=8), mesh)
    check_training(lambda ids: splash(ids, "float32", 250, mesh), Case(tokens=256), 250)
    check_training(lambda ids: as_cudnn(ids, mesh), Case(tokens=256, dtype="bfloat16"), None)
"""


@pytest.mark.slow
def test_devices_of_a_mesh_share_the_work_of_kernels() -> None:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_cudnn_does_not_take_goes_to_xla() -> None:
    def xla(*_: object) -> tuple[str, None]:
        return "by XLA", None

    for dtype, width, length in (("float32", 64, 256), ("bfloat16", 256, 256), ("bfloat16", 64, 7)):
        segments, heads = np.ones((1, length), np.int32), qkv(Case(width=width), 1, length)
        context, _ = cudnn_attention(segments, Precision(dtype), xla)(*heads, None)
        assert context == "by XLA"


def test_each_platform_gets_its_kernels() -> None:
    kinds = {name: Kernels.of_platform(name).kind for name in ("cpu", "tpu", "gpu", "else")}
    assert kinds == {"cpu": "xla", "tpu": "pallas", "gpu": "cudnn", "else": "xla"}


@pytest.mark.slow
def test_text_by_the_kernels_is_the_text_by_xla() -> None:
    config, params = from_torch(torch_llama(max_position_embeddings=512))
    params = unstack_layers(params)
    shape = Shape(3, chunks=2, chunk_tokens=BLOCK, steps=5, refill=1)
    generator = np.random.default_rng(0)
    opening = tuple(range(6, 40))
    requests = []
    for index, length in enumerate((1, 100, 128, 129, 260, 40)):
        prompt = np.array([*opening, *generator.integers(6, 128, length)], np.int32)
        key = record_key(0, "test", str(index), 0)
        requests.append(Request(str(index), prompt, key, Decoding(0.7, max_new_tokens=20)))
    texts = []
    for kernels in (XLA, Kernels("pallas", interpret=True)):
        engine = Engine(config, params, (5,), shape=shape, kernels=kernels)
        prefix = compute_prefix(config, params, opening, engine.precision)
        texts.append(engine.generate(requests, prefix))
    for mine, expected in zip(*texts, strict=True):
        assert mine.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(mine.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.slow
def test_a_model_trains_on_the_gradients_of_xla_with_layers_scanned_and_recomputed() -> None:
    config, params = from_torch(torch_llama())
    examples = random_examples(12, longest=60)
    index = index_of(examples)
    order = BatchOrder(index.keys, 12, 0)
    plan = plan_packing(index, order, 1, 256, 1)
    rows = rows_of_batch(index, order.indices(0), plan)
    batch = lay_out(examples, rows, plan.num_rows, plan.row_tokens, index.names)
    gradients = []
    for kernels in (XLA, Kernels("pallas", interpret=True)):
        spec = StepSpec(
            config,
            2,
            remat="named",
            longest=plan.longest,
            kernels=kernels,
        )
        run = jax.jit(jax.grad(functools.partial(batch_nll, spec), has_aux=True))
        gradients.append(run(params, batch)[0])
    assert_trees_close(gradients[1], gradients[0], 1e-5)
