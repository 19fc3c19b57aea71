"""Copies of one model that share the rows of a job, each on devices of its own.

Nothing goes from copy to copy: each is driven by a thread, and a slow row stalls its own copy only.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from humpback_jax.sampling.engine import LOOKAHEAD, Completion, Engine, Request, Work
from humpback_jax.sampling.likelihood import Query, log_probs


class Replicas:
    """Generation and scoring by several engines of one model."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)

    @property
    def work(self) -> Work:
        """What all copies have done so far."""
        each = [dataclasses.astuple(engine.work) for engine in self.engines]
        return Work(*map(sum, zip(*each, strict=True)))

    def forget_work(self) -> None:
        """Counts from 0 again."""
        for engine in self.engines:
            engine.work = Work()

    def programs(self) -> int:
        """How many programs of generation have been compiled, at most, for one copy."""
        return self.engines[0].programs()

    def check(self, name: str, length: int) -> None:
        """See `Engine.check`."""
        self.engines[0].check(name, length)

    def prepare(self, tokens: Sequence[int]) -> None:
        """Computes tokens that prompts may begin with, which happens anyway when they are met."""
        for engine in self.engines:
            engine.prefix(tokens)

    def generate(self, requests: Sequence[Request], tokens: Sequence[int] = ()) -> list[Completion]:
        """Completions in the order of `requests`; see `stream`."""
        results = dict(self.stream(requests, tokens))
        return [results[index] for index in range(len(requests))]

    def stream(
        self, requests: Iterable[Request], tokens: Sequence[int] = ()
    ) -> Iterator[tuple[int, Completion]]:
        """(place in `requests`, what was drawn), as rows end; see `Engine.stream`.

        Args:
          tokens: prompts that begin with them do not compute them again.
        """
        if len(self.engines) == 1:
            engine = self.engines[0]
            yield from engine.stream(requests, engine.prefix(tokens))
            return
        dealer = _Dealer(requests, len(self.engines))
        ended: queue.Queue[tuple[int, Completion] | BaseException | None] = queue.Queue()

        def drive(number: int) -> None:
            try:
                engine, places = self.engines[number], []

                def dealt() -> Iterator[Request]:
                    for place, request in dealer.hand(number):
                        places.append(place)
                        yield request

                for index, completion in engine.stream(dealt(), engine.prefix(tokens)):
                    ended.put((places[index], completion))
                ended.put(None)
            except BaseException as error:
                ended.put(error)

        numbers = range(len(self.engines))
        threads = [threading.Thread(target=drive, args=(n,), daemon=True) for n in numbers]
        try:
            for thread in threads:
                thread.start()
            running = len(threads)
            while running:
                result = ended.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    running -= 1
                else:
                    yield result
        finally:
            dealer.stop()

    def log_probs(self, queries: Sequence[Query], tokens: Sequence[int] = ()) -> list[np.ndarray]:
        """See `likelihood.log_probs`; `tokens` as in `stream`."""
        count = len(self.engines)
        # Dealt by length, so that all copies get the same work.
        order = sorted(range(len(queries)), key=lambda index: -len(queries[index].tokens))
        parts = [order[number::count] for number in range(count)]

        def score(number: int) -> list[np.ndarray]:
            engine = self.engines[number]
            return log_probs(
                engine.config,
                engine.params,
                [queries[index] for index in parts[number]],
                engine.precision,
                prefix=engine.prefix(tokens),
                mesh=engine.mesh,
            )

        if count == 1 or len(queries) < count:
            parts = [list(range(len(queries)))]
            return score(0)
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(score, range(count)))
        results: list[np.ndarray] = [np.zeros(0)] * len(queries)
        for members, values in zip(parts, found, strict=True):
            for index, value in zip(members, values, strict=True):
                results[index] = value
        return results


class _Dealer:
    """Deals requests to copies in turn, as they ask, from one iterator that all read."""

    def __init__(self, requests: Iterable[Request], copies: int) -> None:
        self._rest = enumerate(requests)
        self._hands: list[list[tuple[int, Request]]] = [[] for _ in range(copies)]
        self._lock = threading.Lock()
        self._stopped = False

    def hand(self, number: int) -> Iterator[tuple[int, Request]]:
        """The requests of one copy."""
        while True:
            with self._lock:
                if not self._hands[number] and not self._stopped:
                    self._deal()
                mine, self._hands[number] = self._hands[number], []
            if not mine:
                return
            yield from mine

    def stop(self) -> None:
        """No copy gets more."""
        self._stopped = True

    def _deal(self) -> None:
        """Of a window's rows, by length, each copy gets every so-manyth."""
        copies = len(self._hands)
        window = list(itertools.islice(self._rest, LOOKAHEAD * copies))
        window.sort(key=lambda entry: len(entry[1].prompt))
        for number, mine in enumerate(self._hands):
            mine.extend(window[number::copies])
