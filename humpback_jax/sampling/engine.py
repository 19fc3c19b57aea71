"""Batched generation with full batches: rows leave their slot when they end, the next ones enter.

A row's text depends on its prompt, its key and the engine's shape alone: a prompt is prefilled in
chunks that begin at its own first token, every product over a batch treats its rows alike, and
attention skips what nobody can see without a trace (`model/blockwise.py`). Which rows meet in a
batch, and when, changes nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from humpback_jax.errors import HumpbackError
from humpback_jax.model.cache import capacity_for
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Params
from humpback_jax.parallel.mesh import axis_size
from humpback_jax.sampling.memory import device_bytes, rows_that_fit, tree_bytes
from humpback_jax.sampling.prefix import Prefix, compute_prefix
from humpback_jax.sampling.programs import (
    Chunks,
    Drawn,
    Slots,
    decode_program,
    empty_slots,
    prefill_program,
)
from humpback_jax.sampling.sampler import Decoding, controls_of


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shapes of an engine's programs, for each copy of the model.

    Attributes:
      slots: rows decoded together.
      chunks, chunk_tokens: a prefill call computes so many pieces of prompts, of so many tokens.
      steps: of drawing before the host looks. refill: rows that end before it looks earlier.
      drafts: tokens guessed in each step (`sampling/drafts.py`).
    """

    slots: int = 32
    chunks: int = 16
    chunk_tokens: int = 32
    steps: int = 16
    refill: int = 1
    drafts: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One draw: `key` is `sampler.record_key(...)`, prompt int32 [n].

    Attributes:
      cut: called with all tokens drawn so far; says how many of them to keep if the text ends
        there (stop strings), else None.
    """

    id: str
    prompt: np.ndarray
    key: np.ndarray
    decoding: Decoding
    cut: Callable[[list[int]], int | None] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was drawn.

    Attributes:
      tokens: int32 [m], without the stop token.
      logprobs: float32 [m], or [m + 1] with the stop token's, in nats, under the model itself.
      finish_reason: "stop" (a stop token was drawn, or the text was cut) or "length".
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str

    @property
    def logprob(self) -> float:
        """The sum over all drawn tokens, the stop token included."""
        return float(self.logprobs.astype(np.float64).sum())


@dataclasses.dataclass
class Work:
    """What an engine has done so far.

    Attributes:
      prompt_tokens, shared_tokens: prefilled, and taken from the prefix instead.
      prefilled_places: places of all prefill calls, padding included.
      new_tokens: drawn. row_steps, live_row_steps: of decode calls while rows were waiting.
      scored_tokens: read for their likelihood or that of what follows, from the prefix or not.
    """

    rows: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    prefilled_places: int = 0
    new_tokens: int = 0
    row_steps: int = 0
    live_row_steps: int = 0
    scored_tokens: int = 0

    @property
    def occupancy(self) -> float:
        """Share of row-steps that drew a token, while rows were waiting for a slot."""
        return self.live_row_steps / self.row_steps if self.row_steps else 1.0

    def speed(self, seconds: float) -> str:
        """For people: tokens a second, and how full the slots were, if there were any."""
        tokens = self.prompt_tokens + self.shared_tokens + self.new_tokens + self.scored_tokens
        slots = f", slots {self.occupancy:.0%} full" if self.new_tokens else ""
        return f"{tokens / seconds:,.0f} tokens/s{slots}"


class Engine:
    """Holds a model ready for decoding.

    Attributes:
      lookahead: how many rows are read, and sorted by length, at a time.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        stop_ids: Sequence[int],
        precision: Precision = Precision(),
        shape: Shape = Shape(),
        mesh: Mesh | None = None,
        memory: int | None = None,
        kernels: Kernels = XLA,
    ) -> None:
        """`params` are in layout "unrolled" and, for speed, in `precision.compute`.

        Args:
          mesh: the devices that hold `params` together, if not one alone.
          memory: bytes of one device that weights and slots may take; None for what it has.
          kernels: how tokens attend.
        """
        self.config, self.precision, self.shape, self.mesh = config, precision, shape, mesh
        self.stop_ids = tuple(sorted(set(stop_ids)))
        if not self.stop_ids:
            raise HumpbackError("the model names no end-of-turn token, so text would never stop.")
        self.work = Work()
        self.lookahead = LOOKAHEAD * shape.slots
        self.memory, self.kernels = memory, kernels
        self.params = params if mesh else jax.tree.map(jnp.asarray, params)
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._slots_of: dict[int, int] = {}  # by capacity
        self._prefill = prefill_program(config, precision, mesh, kernels)
        self._decode = decode_program(config, precision, shape.steps, shape.drafts, mesh, kernels)

    def generate(
        self, requests: Sequence[Request], prefix: Prefix | None = None
    ) -> list[Completion]:
        """Completions in the order of `requests`; see `stream`."""
        results: dict[int, Completion] = dict(self.stream(requests, prefix))
        return [results[index] for index in range(len(requests))]

    def stream(
        self,
        requests: Iterable[Request],
        prefix: Prefix | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Completion]]:
        """(place in `requests`, what was drawn), as rows end.

        Args:
          requests: read as slots become free, a window of `lookahead` ahead.
          prefix: prompts that begin with its tokens do not compute them again.
          stopped: asked before each call of the device whether nobody wants the rest.

        Raises:
          HumpbackError: a prompt is empty or leaves no room in the model's window, or the model's
            probabilities are not numbers.
        """
        prefix = prefix or self.prefix(())
        checked = (self._row(index, each, prefix) for index, each in enumerate(requests))
        yield from _Run(self, prefix).all(_by_length(checked, self.lookahead), stopped)

    def prefix(self, tokens: Sequence[int]) -> Prefix:
        """Tokens that prompts may begin with, computed when first asked for."""
        tokens = tuple(tokens)
        if tokens not in self._prefixes:
            self._prefixes[tokens] = compute_prefix(
                self.config, self.params, tokens, self.precision, mesh=self.mesh
            )
        return self._prefixes[tokens]

    def programs(self) -> int:
        """How many programs have been compiled for engines of this model, precision and steps."""
        programs: tuple[Any, ...] = (self._prefill, self._decode)
        return sum(program._cache_size() for program in programs)

    def check(self, name: str, length: int, new: int, shared: int = 0) -> None:
        """Raises HumpbackError where window or memory have no room for a row.

        Args:
          length: tokens of its prompt. new: drawn after it, at most. shared: of the prompt's, in
            the prefix.
        """
        window = self.config.max_position_embeddings
        if not 0 < length < window:
            raise HumpbackError(
                f"record {name}: the prompt has {length} tokens; the model's window of {window} "
                "must hold it and at least one new token. Shorten the record."
            )
        try:
            self.slots_of(self.capacity_of(length - shared + new))
        except HumpbackError as error:
            raise HumpbackError(f"record {name}: {error}") from error

    def capacity_of(self, places: int) -> int:
        """Places of the slots of rows that use so many; jobs of all kinds share programs."""
        window = self.config.max_position_embeddings
        return capacity_for(max(min(places, window), min(CAPACITY, window)))

    def slots_of(self, capacity: int) -> int:
        """How many slots of so many places there are.

        Raises:
          HumpbackError: not even one fits into the memory.
        """
        if capacity not in self._slots_of:
            shape = self.shape
            device = jax.tree.leaves(self.params)[0].addressable_shards[0].device
            self._slots_of[capacity] = rows_that_fit(
                self.config,
                self.precision.kv or self.precision.activations,
                capacity,
                shape.slots,
                self.memory or device_bytes(device),
                tree_bytes(self.params),
                shape.chunks * shape.chunk_tokens,
                axis_size(self.mesh, "tensor"),
                axis_size(self.mesh, "fsdp") if self.kernels.cuts_the_cache(self.precision) else 1,
                shape.drafts,
            )
        return self._slots_of[capacity]

    def _row(self, index: int, request: Request, prefix: Prefix) -> _Row:
        row = _Row(index, request, prefix.shared_by(request.prompt))
        new = request.decoding.max_new_tokens
        self.check(request.id, len(request.prompt), new, row.shared)
        return row


CAPACITY = 1024  # places of a slot, where rows do not need more
# Rows a slot that are sorted by length: more would end together, and be lost together by a kill.
LOOKAHEAD = 4


@dataclasses.dataclass
class _Row:
    """A request on its way: its first `shared` tokens are the prefix."""

    index: int
    request: Request
    shared: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)

    @property
    def own(self) -> np.ndarray:
        return self.request.prompt[self.shared :]

    @property
    def places(self) -> int:
        """Places that the row may come to use in its slot, if the model's window has so many."""
        return len(self.own) + self.request.decoding.max_new_tokens


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Tokens of a row's prompt, from its place `start` on, bound for its slot."""

    row: _Row
    slot: int
    start: int
    tokens: np.ndarray

    @property
    def final(self) -> bool:
        return self.start + len(self.tokens) == len(self.row.own)


_ANY, _NO_KEY = Decoding(0.0), np.zeros(2, np.uint32)  # of places without a piece


def _by_length(rows: Iterable[_Row], count: int) -> Iterator[_Row]:
    """Rows of like length together, `count` by `count`, up and down in turn."""
    for number, window in enumerate(_windows(rows, count)):
        yield from sorted(window, key=lambda row: row.places, reverse=number % 2 == 0)


def _windows(rows: Iterable[_Row], count: int) -> Iterator[list[_Row]]:
    rest = iter(rows)
    while window := list(itertools.islice(rest, count)):
        yield window


class _Run:
    """One pass over a stream of rows: which row is in which slot, and what comes next."""

    def __init__(self, engine: Engine, prefix: Prefix) -> None:
        self.engine, self.shape, self.work = engine, engine.shape, engine.work
        self.prefix = prefix.arrays
        self.capacity = 0
        self.slots: Slots | None = None
        self.rows: list[_Row | None] = []
        self.pieces: collections.deque[_Piece] = collections.deque()
        self.live = 0
        self.ended = np.zeros(0, bool)  # by the host; the device does not know yet

    def all(
        self, rows: Iterator[_Row], stopped: Callable[[], bool]
    ) -> Iterator[tuple[int, Completion]]:
        waiting = next(rows, None)
        finished: list[tuple[int, Completion]] = []
        while (waiting is not None or any(self.rows)) and not stopped():
            while waiting is not None and self._fits(waiting):
                self._enter(waiting)
                waiting = next(rows, None)
            more = waiting is not None and self._suits(waiting)
            first = self._prefill(more)
            drawn = self._decode(more)
            yield from finished  # the device is at work meanwhile
            finished = self._collect(first, drawn, waiting is not None)
        yield from finished

    def _fits(self, row: _Row) -> bool:
        """Whether a slot for the row is free; they become what it needs while no row is in them."""
        if not self._suits(row):
            if any(self.rows):
                return False
            self._allocate(self.engine.capacity_of(row.places))
        return None in self.rows

    def _suits(self, row: _Row) -> bool:
        """Whether these slots are long enough, and as many as the row would have by itself.

        Another number may flip a near-tie, and few long slots would slow down all short rows.
        """
        capacity = self.engine.capacity_of(row.places)
        return capacity <= self.capacity and self.engine.slots_of(capacity) == len(self.rows)

    def _allocate(self, capacity: int) -> None:
        engine = self.engine
        self.capacity, count = capacity, engine.slots_of(capacity)
        self.rows, self.ended = [None] * count, np.zeros(count, bool)
        self.slots = None  # the old ones go before the new ones come
        self.slots = empty_slots(
            engine.config, engine.precision, count, capacity, engine.mesh, engine.kernels
        )

    def _enter(self, row: _Row) -> None:
        slot, width = self.rows.index(None), self.shape.chunk_tokens
        self.rows[slot] = row
        self.pieces.extend(
            _Piece(row, slot, start, row.own[start : start + width])
            for start in range(0, len(row.own), width)
        )

    def _prefill(self, more: bool) -> list[tuple[list[int], Drawn]]:
        """Computes pieces of prompts: for each call, the slots whose rows began to draw, or -1.

        Pieces that would not fill a call wait for the next rows, while others are drawing.
        """
        calls = []
        count = self.shape.chunks
        while self.pieces and (len(self.pieces) >= count or not (more and self.live)):
            pieces = [self.pieces.popleft() if self.pieces else None for _ in range(count)]
            assert self.slots is not None
            self.slots, drawn = self.engine._prefill(
                self.engine.params, self.slots, self.prefix, self._chunks(pieces)
            )
            finals = [piece.slot if piece and piece.final else -1 for piece in pieces]
            began = [slot for slot in finals if slot >= 0]
            self.live += len(began)
            self.ended[began] = False
            calls.append((finals, drawn))
        return calls

    def _chunks(self, pieces: list[_Piece | None]) -> Chunks:
        """One call's arrays. Places without a piece write to a slot that does not exist."""
        count, width = len(pieces), self.shape.chunk_tokens
        tokens = np.zeros((count, width), np.int32)
        numbers = np.zeros((5, count), np.int32)
        counts, slots, offsets, starts, final = numbers
        counts[:], slots[:] = 1, len(self.rows)
        requests: list[Request | None] = []
        for place, piece in enumerate(pieces):
            requests.append(piece.row.request if piece else None)
            if piece is not None:
                size = counts[place] = len(piece.tokens)
                tokens[place, :size] = piece.tokens
                slots[place] = piece.slot
                offsets[place], starts[place] = piece.row.shared, piece.start
                final[place] = piece.final
        self.work.prefilled_places += count * width
        decodings = [request.decoding if request else _ANY for request in requests]
        keys = [request.key if request else _NO_KEY for request in requests]
        controls = controls_of(decodings, keys, self.engine.stop_ids)
        # Arrays of the host: which devices they go to is the program's business.
        return Chunks._make((tokens, counts, slots, offsets, starts, final.astype(bool), controls))

    def _decode(self, more: bool) -> Drawn:
        patience = self.shape.refill if more else len(self.rows)
        assert self.slots is not None
        self.slots, drawn = self.engine._decode(
            self.engine.params, self.slots, self.prefix, self.ended.copy(), np.int32(patience)
        )
        self.ended[:] = False
        return drawn

    def _collect(
        self, first: list[tuple[list[int], Drawn]], drawn: Drawn, more: bool
    ) -> list[tuple[int, Completion]]:
        """Takes over what was drawn; returns the rows that have ended."""
        for finals, call in jax.device_get(first):
            for place, slot in enumerate(finals):
                if slot >= 0:
                    self._take(slot, call.tokens[place, :1], call.logprobs[place, :1])
        new = jax.device_get(drawn)
        for slot, count in enumerate(new.counts):
            self._take(slot, new.tokens[slot, :count], new.logprobs[slot, :count])
        if more:
            self.work.row_steps += int(new.steps.max()) * len(new.steps)
            self.work.live_row_steps += int(new.steps.sum())
        finished = []
        for slot, row in enumerate(self.rows):
            if row is None or not row.tokens:
                continue
            completion = self._completion(row, bool(new.live[slot]))
            if completion is not None:
                self.ended[slot] = bool(new.live[slot])
                self.rows[slot] = None
                self.work.rows += 1
                self.work.prompt_tokens += len(row.own)
                self.work.shared_tokens += row.shared
                self.work.new_tokens += len(completion.logprobs)
                finished.append((row.index, completion))
        self.live = sum(row is not None and bool(row.tokens) for row in self.rows)
        return finished

    def _take(self, slot: int, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        if len(tokens):
            row = self._row(slot)
            if not np.isfinite(logprobs).all():
                raise HumpbackError(
                    f"record {row.request.id}: the model's probabilities are not numbers; its "
                    "weights are broken, or overflow in this precision."
                )
            row.tokens.extend(tokens.tolist())
            row.logprobs.extend(logprobs.tolist())

    def _completion(self, row: _Row, live: bool) -> Completion | None:
        """The row's text, if it has ended."""
        stops = {*self.engine.stop_ids, *row.request.decoding.stop_ids}
        drawn = len(row.tokens) - (row.tokens[-1] in stops)
        cut = row.request.cut(row.tokens[:drawn]) if row.request.cut else None
        if live and cut is None:
            return None
        tokens, logprobs = np.array(row.tokens, np.int32), np.array(row.logprobs, np.float32)
        if cut is not None:
            return Completion(tokens[:cut], logprobs[:cut], "stop")
        return Completion(tokens[:drawn], logprobs, "stop" if drawn < len(tokens) else "length")

    def _row(self, slot: int) -> _Row:
        row = self.rows[slot]
        assert row is not None, f"slot {slot} is empty"
        return row
