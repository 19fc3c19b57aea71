"""Copies of a model that share a job: if these fail, rows get lost, or mixed up, or wait."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from tiny_llama import FLOAT32, from_torch, random_tokens, torch_llama

from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import unstack_layers
from humpback_jax.sampling.engine import Engine, Request, Shape
from humpback_jax.sampling.likelihood import every_token
from humpback_jax.sampling.replicas import Replicas, _Dealer
from humpback_jax.sampling.sampler import Decoding, record_key


@functools.cache
def replicas(copies: int) -> Replicas:
    """So many engines; that they share one device here makes no difference to what they do."""
    config, params = from_torch(torch_llama())
    params = jax.tree.map(jax.numpy.asarray, unstack_layers(params))
    shape = Shape(4, chunks=2, chunk_tokens=16, steps=4)
    return Replicas([Engine(config, params, (5,), FLOAT32, shape) for _ in range(copies)])


def request(number: int) -> Request:
    tokens = random_tokens(3 + number * 7 % 40, seed=number)
    decoding = Decoding(0.0 if number % 2 else 0.9, max_new_tokens=1 + number % 6)
    return Request(str(number), tokens, record_key(0, "copies", str(number), 0), decoding)


@pytest.mark.parametrize("count", [0, 1, 2, 41])
def test_two_copies_write_other_texts_than_one(count: int) -> None:
    asked = [request(number) for number in range(count)]
    alone, together = replicas(1).generate(asked), replicas(3).generate(asked)
    assert len(alone) == len(together) == count
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
        assert one.finish_reason == other.finish_reason


@pytest.mark.parametrize("count", [0, 1, 2, 19])
def test_two_copies_score_unlike_one(count: int) -> None:
    queries = [every_token(str(n), random_tokens(4 + n * 5 % 60, seed=n)) for n in range(count)]
    alone, together = replicas(1).log_probs(queries), replicas(3).log_probs(queries)
    assert len(alone) == len(together) == count
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_copy_does_all_the_work() -> None:
    copies = replicas(2)
    copies.forget_work()
    copies.generate([request(number) for number in range(40)])
    rows = [engine.work.rows for engine in copies.engines]
    assert sum(rows) == copies.work.rows == 40
    assert min(rows) >= 10


def test_a_copy_begins_later_rows_while_another_has_the_first_ones_still_to_come() -> None:
    """Shards would end together: of each window every copy gets as much as its engine sorts."""
    dealer = _Dealer((request(number) for number in range(40)), 2, 4)
    first, second = dealer.hand(0), dealer.hand(1)
    for start in (0, 8):
        got = [*itertools.islice(first, 4), *itertools.islice(second, 4)]
        assert sorted(place for place, _ in got) == list(range(start, start + 8))


def test_rows_pile_up_for_a_slow_copy_in_memory() -> None:
    read = []

    def endless() -> Iterator[Request]:
        for number in itertools.count():
            read.append(number)
            yield request(number)

    dealer = _Dealer(endless(), 2, 4)
    taken = list(itertools.islice(dealer.hand(0), 40))
    assert len(taken) == 40 and len(read) <= 40 + 4
    waiting = [place for place, _ in itertools.islice(dealer.hand(1), 4)]
    assert sorted([*waiting, *(place for place, _ in taken)]) == read


def test_a_stream_without_end_is_read_to_its_end_first() -> None:
    read = 0

    def endless() -> Iterator[Request]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield request(number)

    found = list(itertools.islice(replicas(2).stream(endless()), 30))
    assert len({place for place, _ in found}) == 30
    assert read <= 30 + 6 * replicas(2).engines[0].lookahead


def test_a_stream_that_is_given_up_leaves_copies_at_work() -> None:
    """Python aborts where a thread is still computing when it ends."""
    before = threading.active_count()
    asked = [
        dataclasses.replace(request(n), decoding=Decoding(0.9, max_new_tokens=90))
        for n in range(40)
    ]
    stream = replicas(2).stream(asked)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_a_bad_row_stops_the_job_without_its_name() -> None:
    asked = [request(number) for number in range(9)]
    empty = Request("the-empty-one", np.zeros(0, np.int32), asked[0].key, asked[0].decoding)
    with pytest.raises(HumpbackError, match="the-empty-one"):
        replicas(2).generate([*asked, empty])


def test_an_error_in_the_input_is_swallowed_by_a_thread() -> None:
    def rows() -> Iterator[Request]:
        yield request(0)
        raise HumpbackError("line 2 is no JSON")

    with pytest.raises(HumpbackError, match="line 2"):
        list(replicas(2).stream(rows()))
