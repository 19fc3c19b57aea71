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

from humpback_jax.allocator import return_free_memory
from humpback_jax.sampling.engine import Completion, Engine, Request, Work
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

    def check(self, name: str, length: int, new: int) -> None:
        """See `Engine.check`."""
        self.engines[0].check(name, length, new)

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
        try:
            if len(self.engines) == 1:
                engine = self.engines[0]
                yield from engine.stream(requests, engine.prefix(tokens))
            else:
                yield from self._dealt(requests, tokens)
        finally:
            # glibc does not find the pieces that the slots leave behind when the next job asks for
            # slots: each job would add theirs.
            return_free_memory()

    def _dealt(
        self, requests: Iterable[Request], tokens: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Each copy generates in a thread of its own."""
        dealer = _Dealer(requests, len(self.engines), self.engines[0].lookahead)
        ended: queue.Queue[_Ended] = queue.Queue()
        threads = [
            threading.Thread(target=_drive, args=(engine, dealer, number, tokens, ended))
            for number, engine in enumerate(self.engines)
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                match ended.get():
                    case None:
                        running -= 1
                    case BaseException() as error:
                        raise error
                    case result:
                        yield result
        finally:
            dealer.stopped = True
            for thread in threads:  # Python aborts at its end where one is still at work
                thread.join()

    def log_probs(self, queries: Sequence[Query], tokens: Sequence[int] = ()) -> list[np.ndarray]:
        """See `likelihood.log_probs`; `tokens` as in `stream`."""
        copies = min(len(self.engines), max(len(queries), 1))
        # Dealt by length, so that all copies get the same work.
        order = sorted(range(len(queries)), key=lambda index: -len(queries[index].tokens))

        def score(number: int) -> list[np.ndarray]:
            engine = self.engines[number]
            mine = [queries[index] for index in order[number::copies]]
            engine.work.scored_tokens += sum(len(query.tokens) for query in mine)
            return log_probs(
                engine.config,
                engine.params,
                mine,
                engine.precision,
                prefix=engine.prefix(tokens),
                mesh=engine.mesh,
            )

        with ThreadPoolExecutor(copies) as pool:
            found = list(pool.map(score, range(copies)))
        results: dict[int, np.ndarray] = {}
        for number, values in enumerate(found):
            results |= zip(order[number::copies], values, strict=True)
        return [results[index] for index in range(len(queries))]


# What a thread reports: (place, text) of a row, why it failed, or that it is through.
_Ended = tuple[int, Completion] | BaseException | None


def _drive(
    engine: Engine,
    dealer: _Dealer,
    number: int,
    tokens: Sequence[int],
    ended: queue.Queue[_Ended],
) -> None:
    """Generates copy `number`'s rows, until there are none or nobody wants them."""
    places: list[int] = []

    def dealt() -> Iterator[Request]:
        for place, request in dealer.hand(number):
            places.append(place)
            yield request

    try:
        prefix = engine.prefix(tokens)
        for index, completion in engine.stream(dealt(), prefix, lambda: dealer.stopped):
            ended.put((places[index], completion))
        ended.put(None)
    except BaseException as error:
        ended.put(error)


class _Dealer:
    """Deals requests to copies in turn, as they ask, from one iterator that all read.

    Each gets `window` at a time, which its engine takes together, too.
    """

    def __init__(self, requests: Iterable[Request], copies: int, window: int) -> None:
        self._rest, self._window = enumerate(requests), window
        self._hands: list[list[tuple[int, Request]]] = [[] for _ in range(copies)]
        self._lock = threading.Lock()
        self.stopped = False  # by who takes the results

    def hand(self, number: int) -> Iterator[tuple[int, Request]]:
        """The requests of one copy."""
        while True:
            with self._lock:
                if not self._hands[number] and not self.stopped:
                    self._deal()
                mine, self._hands[number] = self._hands[number], []
            if not mine:
                return
            yield from mine

    def _deal(self) -> None:
        """Of so many windows' rows, by length, each copy without any gets every so-manyth.

        The others are slower: rows would pile up for them.
        """
        empty = [mine for mine in self._hands if not mine]
        rows = list(itertools.islice(self._rest, self._window * len(empty)))
        rows.sort(key=lambda entry: len(entry[1].prompt))
        for number, mine in enumerate(empty):
            mine.extend(rows[number :: len(empty)])
