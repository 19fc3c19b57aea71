"""Texts for items that come in shards: no slot of the engine waits for the end of a shard."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from humpback_jax.inference import Generation, Inference, Opening
from humpback_jax.sampling.sampler import Decoding

Item = TypeVar("Item")
# (record id, prompt, key by `record_key`, how to draw)
Asked = tuple[str, str, np.ndarray, Decoding]


def draw_shards(
    reader: Inference,
    shards: Iterable[tuple[int, Sequence[Item]]],
    ask: Callable[[Item], Asked],
    opening: Opening | None = None,
    drawn: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, list[tuple[Item, Generation]]]]:
    """(number of a shard, its items in order, each with its text) once a shard is complete.

    One with a long text stays open while later ones are at work, so that shards need not end in
    order.

    Args:
      shards: (number, items), read as slots become free.
      ask: what the model is asked about an item.
      opening: what all prompts share; see `Inference`.
      drawn: called for each text that ends.
    """
    places: dict[int, tuple[int, int]] = {}  # of the texts under way
    opened: dict[int, Sequence[Item]] = {}
    texts: dict[int, dict[int, Generation]] = {}
    complete: collections.deque[int] = collections.deque()

    def prompts() -> Iterator[Asked]:
        index = itertools.count()
        for number, items in shards:
            opened[number], texts[number] = items, {}
            if not items:
                complete.append(number)
            for place, item in enumerate(items):
                places[next(index)] = number, place
                yield ask(item)

    def ended() -> Iterator[tuple[int, list[tuple[Item, Generation]]]]:
        while complete:
            number = complete.popleft()
            found = texts.pop(number)
            items = opened.pop(number)
            yield number, [(item, found[place]) for place, item in enumerate(items)]

    for index, generation in reader.stream(prompts(), opening):
        number, place = places.pop(index)
        texts[number][place] = generation
        drawn()
        if len(texts[number]) == len(opened[number]):
            complete.append(number)
        yield from ended()
    yield from ended()
