"""Which examples a step trains on, and where they lie in its rows.

If these fail, examples are lost, seen twice, or joined to their neighbours, and a resumed run
trains on other batches than the unbroken one.
"""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from humpback_jax.errors import HumpbackError
from humpback_jax.training.examples import TrainingExample, index_of, keys_of
from humpback_jax.training.order import BatchOrder, Pool
from humpback_jax.training.packing import (
    best_fit,
    lay_out,
    pack,
    packed_rows,
    place_batch,
    plan_packing,
)

WIDTH = 32
SOURCES = ("seed", "web")
some_lengths = st.lists(st.integers(2, WIDTH + 1), min_size=1, max_size=40)


def example(index: int, tokens: int, supervised: int | None = None) -> TrainingExample:
    """Tokens that tell which example and place they are from; the last `supervised` are learnt."""
    ids = np.arange(tokens, dtype=np.int32) + 1000 * (index + 1)
    learnt = tokens // 2 if supervised is None else supervised
    return TrainingExample(
        f"id-{index}", ids, np.arange(tokens) >= tokens - learnt, SOURCES[index % 2]
    )


def examples_of(lengths: list[int]) -> list[TrainingExample]:
    return [example(index, length, max(1, length // 2)) for index, length in enumerate(lengths)]


def keys(ids: list[str]) -> np.ndarray:
    return keys_of([("seed", name) for name in ids])


def epoch_order(ids: list[str], seed: int, epoch: int) -> list[int]:
    return BatchOrder(keys(ids), len(ids), seed).indices(epoch).tolist()


def plainly_packed(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit, longest first, in the plainest words."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [capacity - sum(lengths[i] for i in row) for row in rows]
        fitting = [(room, r) for r, room in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    return rows


@given(st.lists(st.integers(0, WIDTH), max_size=60))
def test_packing_places_every_example_once_and_overfills_no_row(lengths) -> None:
    rows = best_fit(lengths, WIDTH)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= WIDTH for row in rows)
    assert rows == plainly_packed(lengths, WIDTH)
    half_full = sum(sum(lengths[i] for i in row) * 2 <= WIDTH for row in rows)
    assert half_full <= 1, "two half-empty rows would have fitted in one"


def test_packing_many_texts_takes_seconds() -> None:
    """Scoring packs all it is given at once; looking through all rows would be quadratic."""
    lengths = np.random.default_rng(0).integers(20, 1500, 50_000).tolist()
    start = time.process_time()
    rows = best_fit(lengths, 2048)
    assert time.process_time() - start < 5
    assert sum(map(len, rows)) == len(lengths)


@given(some_lengths)
def test_rows_hold_each_example_s_tokens_targets_mask_and_positions(lengths) -> None:
    examples = examples_of(lengths)
    rows = best_fit([e.length for e in examples], WIDTH)
    batch = lay_out(examples, rows, len(rows) + 1, WIDTH, SOURCES)
    found = Counter()
    for r, row in enumerate(rows):
        for segment, index in enumerate(row, start=1):
            places = np.flatnonzero(batch.segment_ids[r] == segment)
            each = examples[index]
            assert np.array_equal(places, places[0] + np.arange(each.length)), "in one piece"
            assert np.array_equal(batch.tokens[r, places], each.ids[:-1])
            assert np.array_equal(batch.targets[r, places], each.ids[1:])
            assert np.array_equal(batch.mask[r, places], each.mask[1:])
            assert np.array_equal(batch.positions[r, places], np.arange(each.length))
            assert set(batch.sources[r, places]) == {SOURCES.index(each.source)}
            found[index] += 1
    assert found == Counter(range(len(examples)))
    padding = batch.segment_ids == 0
    assert padding[-1].all()
    assert not batch.mask[padding].any()
    assert batch.mask.sum() == sum(each.supervised for each in examples)
    assert (~padding).sum() == sum(each.length for each in examples)


@given(
    some_lengths,
    st.integers(0, 5),
    st.integers(1, 8),
    st.sampled_from([None, 1, 2, 3]),
    st.integers(1, 2),
)
def test_the_plan_fits_every_batch_of_the_run_exactly(
    lengths, seed, size, accumulation, parts
) -> None:
    assume(size <= len(lengths))
    examples, steps = examples_of(lengths), 7
    index = index_of(examples)
    order = BatchOrder(index.keys, size, seed)
    plan = plan_packing(index, order, steps, WIDTH, accumulation, parts, multiple_of=8)
    if accumulation is None:
        assert plan.micro_rows == parts
    else:
        assert plan.num_rows == accumulation * plan.micro_rows
    assert plan.micro_rows % parts == 0
    longest = max(example.length for example in examples)
    assert longest <= plan.longest < longest + 8
    assert longest <= plan.row_tokens <= WIDTH
    most_rows, used, computed = 0, 0, 0
    for step in range(steps):
        indices = order.indices(step)
        rows = packed_rows(index, indices, plan)
        batch = lay_out(examples, rows, plan.num_rows, plan.row_tokens, SOURCES)
        placed = place_batch(examples, rows, plan, SOURCES, None)
        for one, other in zip(batch, placed, strict=True):
            assert np.array_equal(one, other.reshape(one.shape))
        assert batch.tokens.shape == (plan.num_rows, plan.row_tokens)
        assert sorted(i for row in rows for i in row) == sorted(indices)
        in_use = (batch.segment_ids > 0).sum(axis=1)
        assert sorted(in_use, reverse=True) == in_use.tolist(), "the fullest rows come first"
        most_rows = max(most_rows, int((in_use > 0).sum()))
        for fullest in in_use[:: plan.micro_rows]:
            if fullest:
                width = min(width for width in plan.widths if width >= fullest)
                computed += plan.micro_rows * width
        used += int((batch.segment_ids > 0).sum())
    assert plan.num_rows < most_rows + (accumulation or 4) * parts
    assert plan.efficiency == pytest.approx(used / computed)


def test_short_texts_fill_a_fraction_of_rows_made_for_long_ones() -> None:
    """Eight examples of 150 places in rows of 2,048 would compute 850 places for nothing."""
    examples = [example(index, 151) for index in range(64)]
    index = index_of(examples)
    order = BatchOrder(index.keys, 8, 0)
    assert plan_packing(index, order, 8, 2048, 1).efficiency > 0.9


def test_a_long_example_makes_every_batch_as_wide_as_itself() -> None:
    """Real sets have a few long rows: the others would be computed in rows made for those."""
    examples = [example(0, 1001), *(example(index, 101) for index in range(1, 64))]
    index = index_of(examples)
    order = BatchOrder(index.keys, 2, 0)
    plan = plan_packing(index, order, 32, 2048, None)
    assert plan.widths == (256, 512, 1024)
    assert plan.efficiency > 0.75 > 2 * plan_packing(index, order, 32, 2048, 1).efficiency


def test_examples_that_no_step_takes_are_said_to_be_trained_on() -> None:
    index = index_of(examples_of([10] * 12))
    order = BatchOrder(index.keys, 2, 0)
    for steps in (1, 5, 6, 20):
        plan = plan_packing(index, order, steps, WIDTH)
        taken = {int(i) for step in range(steps) for i in order.indices(step)}
        for number, source in enumerate(SOURCES):
            own = [i for i in taken if index.sources[i] == number]
            tokens = sum(int(index.supervised[i]) for i in own)
            assert plan.seen[source] == {"examples": len(own), "supervised_tokens": tokens}
        said = f"{2 * steps} of 12 examples are seen in {steps} steps"
        assert (said in plan.summary()) == (steps < 6)
    chosen = BatchOrder(index.keys, 2, 0, [Pool(np.arange(4), 4)])
    assert "are seen" not in plan_packing(index, chosen, 2, WIDTH).summary()


def test_a_row_of_its_own_is_free_or_dearer_than_all_places() -> None:
    """Weights are cast and gradients added up once a micro-batch: with small models that counts."""
    assert len(pack([256] * 4, (256, 1024))) == 1, "as many places, in one micro-batch"
    assert len(pack([256] * 2, (256, 1024))) == 2, "half of the places"


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3))
def test_each_epoch_sees_every_example_exactly_once_in_an_order_of_its_own(
    count, size, seed
) -> None:
    assume(size <= count)
    order = BatchOrder(keys([f"id-{i}" for i in range(count)]), size, seed)
    steps = -(-3 * count // size)
    stream = [index for step in range(steps) for index in order.indices(step)]
    epochs = [stream[e * count : (e + 1) * count] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 12:
        assert epochs[0] != epochs[1] != epochs[2] != list(range(count))


@given(st.permutations(range(12)), st.integers(0, 40), st.integers(0, 3))
def test_a_batch_depends_on_seed_and_step_not_on_the_input_s_order_or_on_history(
    permutation, step, seed
) -> None:
    ids = [f"id-{i}" for i in range(12)]
    shuffled = [ids[i] for i in permutation]
    fresh = [ids[i] for i in BatchOrder(keys(ids), 5, seed).indices(step)]
    used = BatchOrder(keys(shuffled), 5, seed)
    for earlier in range(step + 3):  # also beyond, as a resumed run never was
        used.indices(earlier)
    assert [shuffled[i] for i in used.indices(step)] == fresh
    assert [shuffled[i] for i in BatchOrder(keys(shuffled), 5, seed).indices(step)] == fresh


@settings(max_examples=20)
@given(st.permutations(range(10)), st.integers(0, 6))
def test_whole_batches_are_the_same_arrays_whatever_the_input_s_order(permutation, step) -> None:
    examples = examples_of([5, 9, 33, 12, 12, 7, 30, 3, 21, 12])
    arrays = []
    for given_order in (examples, [examples[i] for i in permutation]):
        index = index_of(given_order)
        order = BatchOrder(index.keys, 4, 0)
        plan = plan_packing(index, order, 7, WIDTH)
        rows = packed_rows(index, order.indices(step), plan)
        arrays.append((plan, place_batch(given_order, rows, plan, SOURCES, None)))
    assert arrays[0][0] == arrays[1][0]
    for one, other in zip(arrays[0][1], arrays[1][1], strict=True):
        assert np.array_equal(one, other)


def test_seeds_and_epochs_give_different_orders_and_added_rows_disturb_no_others() -> None:
    ids = [f"id-{i}" for i in range(50)]
    orders = {tuple(epoch_order(ids, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    before = [ids[i] for i in epoch_order(ids, 0, 0)]
    more = ["new-1", *ids, "new-2"]
    after = [more[i] for i in epoch_order(more, 0, 0) if not more[i].startswith("new")]
    assert after == before


def test_the_first_positions_of_an_order_are_uniform() -> None:
    """A weak hash would favour some rows at the start of training."""
    ids = [f"id-{i}" for i in range(10)]
    firsts = Counter(epoch_order(ids, seed, 0)[0] for seed in range(2000))
    assert min(firsts.values()) > 140 and max(firsts.values()) < 265


def test_T30_fewer_examples_than_one_batch_is_an_error_that_says_so() -> None:
    with pytest.raises(HumpbackError, match=r"3 training examples.*batch_examples=8"):
        BatchOrder(keys(["a", "b", "c"]), 8, 0)
    with pytest.raises(HumpbackError, match="0 training examples"):
        BatchOrder(keys([]), 1, 0)


def test_an_example_longer_than_a_row_overflows_into_its_neighbours() -> None:
    index = index_of([example(0, 10), example(1, WIDTH + 2), example(2, WIDTH + 1)])
    with pytest.raises(HumpbackError, match=f"{WIDTH + 1} places.*{WIDTH}"):
        plan_packing(index, BatchOrder(index.keys, 2, 0), 2, WIDTH)
    with pytest.raises(HumpbackError, match=f"{WIDTH + 1} places"):
        best_fit([WIDTH + 1], WIDTH)


def test_an_example_that_fits_exactly_needs_no_place_for_its_last_token() -> None:
    each = example(0, WIDTH + 1)
    batch = lay_out([each], best_fit([each.length], WIDTH), 1, WIDTH)
    assert batch.targets[0, -1] == each.ids[-1]
    assert batch.mask[0, -1]


def test_a_supervised_first_token_is_not_counted_since_nothing_predicts_it() -> None:
    ids, mask = np.arange(4, dtype=np.int32), np.array([True, False, True, True])
    each = TrainingExample("x", ids, mask)
    batch = lay_out([each], [[0]], 1, WIDTH)
    assert each.supervised == batch.mask.sum() == 2


@pytest.mark.parametrize(
    ("ids", "mask"),
    [(np.zeros(0), np.zeros(0)), (np.zeros(3), np.ones(2))],
    ids=["empty", "uneven"],
)
def test_an_example_without_tokens_or_with_another_mask_is_an_error_that_names_it(
    ids, mask
) -> None:
    """Its length would be -1, and shift its neighbours in the row."""
    with pytest.raises(HumpbackError, match="broken-row"):
        TrainingExample("broken-row", ids.astype(np.int32), mask.astype(bool))
