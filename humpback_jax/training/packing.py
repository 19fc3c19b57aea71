"""Which examples form batch t, and how they are laid out in rows of fixed shape."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.training.loss import Batch

BOUNDS = 128  # static bounds are multiples of it


@dataclasses.dataclass(frozen=True)
class TrainingExample:
    """A tokenised example. `mask[i]` says that token i is supervised, i.e. learnt as a target."""

    id: str
    ids: np.ndarray  # int32 [n]
    mask: np.ndarray  # bool [n]
    source: str = "seed"

    def __post_init__(self) -> None:
        if not 0 < len(self.ids) == len(self.mask):
            raise HumpbackError(
                f"example {self.id} has {len(self.ids)} tokens and a mask of {len(self.mask)}; it "
                "needs at least one token and a mask of the same length."
            )

    @property
    def length(self) -> int:
        """Places it takes in a row: the last token is a target only."""
        return len(self.ids) - 1

    @property
    def supervised(self) -> int:
        return int(self.mask[1:].sum())


def epoch_order(ids: Sequence[str], seed: int, epoch: int) -> list[int]:
    """The order of one epoch: examples sorted by a hash of (seed, epoch, id).

    Keyed by identity, so that it depends neither on the order of the input nor, for the examples
    that stay, on rows added or removed.
    """

    def rank(index: int) -> bytes:
        text = f"{seed}/{epoch}/{ids[index]}".encode()
        return hashlib.blake2b(text, digest_size=8).digest()

    return sorted(range(len(ids)), key=lambda index: (rank(index), ids[index]))


class BatchOrder:
    """Batch t as a function of (seed, t): a window over the epochs' orders, one after another."""

    def __init__(self, ids: Sequence[str], batch_examples: int, seed: int) -> None:
        if batch_examples > len(ids):
            raise HumpbackError(
                f"{len(ids)} training examples are fewer than one batch (batch_examples="
                f"{batch_examples}). Lower batch_examples or add data."
            )
        self._ids, self._size, self._seed = list(ids), batch_examples, seed
        self._epochs: dict[int, list[int]] = {}

    def indices(self, step: int) -> list[int]:
        """Indices of the examples of batch `step` (from 0)."""
        places = range(step * self._size, (step + 1) * self._size)
        count = len(self._ids)
        return [self._epoch(place // count)[place % count] for place in places]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            recent = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs = {**recent, epoch: epoch_order(self._ids, self._seed, epoch)}
        return self._epochs[epoch]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing.

    Returns rows of indices into `lengths`, longest first; each row's lengths sum to at most
    `capacity`. Deterministic: ties are broken by index.

    Raises:
      HumpbackError: an example alone is longer than a row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free places, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise HumpbackError(
                f"an example takes {lengths[index]} places but a row holds {capacity}; "
                "raise row_tokens or let on_long drop or truncate it."
            )
        tightest = bisect.bisect_left(rooms, (lengths[index], 0))
        if tightest == len(rooms):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free, row = rooms.pop(tightest)
        rows[row].append(index)
        bisect.insort(rooms, (free - lengths[index], row))
    return rows


def lay_out(
    examples: Sequence[TrainingExample],
    rows: Sequence[Sequence[int]],
    num_rows: int,
    row_tokens: int,
    sources: Sequence[str] = (),
) -> Batch:
    """Writes packed examples into arrays [num_rows, row_tokens]; see `Batch` for the fields.

    Args:
      rows: for each row, indices into `examples`; segment s of a row is its s-th index, from 1.
      sources: names whose index is written to `Batch.sources`.
    """
    shape = (num_rows, row_tokens)
    tokens, targets, positions, segment_ids, source_ids = (
        np.zeros(shape, np.int32) for _ in range(5)
    )
    mask = np.zeros(shape, bool)
    source_index = {name: index for index, name in enumerate(sources)}
    for r, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row, start=1):
            example = examples[index]
            place = slice(start, start + example.length)
            tokens[r, place] = example.ids[:-1]
            targets[r, place] = example.ids[1:]
            positions[r, place] = np.arange(example.length)
            segment_ids[r, place] = segment
            source_ids[r, place] = source_index.get(example.source, 0)
            mask[r, place] = example.mask[1:]
            start += example.length
    return Batch._make((tokens, targets, positions, segment_ids, source_ids, mask))


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """The one shape that fits every batch of a training run.

    Attributes:
      num_rows: rows of a batch, a multiple of the parts that it is cut into.
      max_targets: no row has more supervised positions (static bound for the loss).
      longest: no example takes more places (static bound for attention).
      efficiency: share of row places that hold tokens, over the planned steps.
    """

    num_rows: int
    row_tokens: int
    max_targets: int
    longest: int
    efficiency: float


def plan_packing(
    examples: Sequence[TrainingExample],
    order: BatchOrder,
    steps: int,
    row_tokens: int,
    rows_in: int = 1,
    multiple_of: int = BOUNDS,
) -> PackingPlan:
    """Packs every batch of the run once, on lengths alone, to find the shape that fits them all.

    Args:
      rows_in: parts that a batch is cut into, micro-batches times devices with rows of their own.

    The bounds are multiples of `multiple_of`, so that similar runs share a compiled program.

    Raises:
      HumpbackError: an example is longer than a row.
    """
    for example in examples:
        if example.length > row_tokens:
            raise HumpbackError(
                f"training example {example.id} takes {example.length} places but a row holds "
                f"{row_tokens}; raise row_tokens or let on_long drop or truncate it."
            )
    lengths = [example.length for example in examples]
    supervised = [example.supervised for example in examples]
    num_rows, max_targets, used = 1, 1, 0
    for indices, rows in _packed_steps(lengths, order, steps, row_tokens):
        num_rows = max(num_rows, len(rows))
        used += sum(lengths[i] for i in indices)
        for row in rows:
            max_targets = max(max_targets, sum(supervised[indices[place]] for place in row))
    num_rows = -(-num_rows // rows_in) * rows_in
    efficiency = used / (steps * num_rows * row_tokens)
    max_targets, longest = (
        static_bound(bound, row_tokens, multiple_of) for bound in (max_targets, max(lengths))
    )
    return PackingPlan(num_rows, row_tokens, max_targets, longest, efficiency)


def static_bound(bound: int, row_tokens: int, multiple_of: int = BOUNDS) -> int:
    """At least `bound`, coarse enough that similar data share a compiled program."""
    return min(-(-bound // multiple_of) * multiple_of, row_tokens)


def _packed_steps(
    lengths: Sequence[int], order: BatchOrder, steps: int, row_tokens: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    for step in range(steps):
        indices = order.indices(step)
        yield indices, best_fit([lengths[i] for i in indices], row_tokens)


def batch_at(
    examples: Sequence[TrainingExample],
    order: BatchOrder,
    step: int,
    plan: PackingPlan,
    sources: Sequence[str],
) -> tuple[Batch, list[str]]:
    """Batch `step` as numpy arrays [num_rows, row_tokens], and the ids of its examples."""
    chosen = [examples[index] for index in order.indices(step)]
    rows = best_fit([example.length for example in chosen], plan.row_tokens)
    batch = lay_out(chosen, rows, plan.num_rows, plan.row_tokens, sources)
    if not np.asarray(batch.mask).any():
        raise HumpbackError(
            f"batch {step} has no supervised token; its examples: "
            f"{', '.join(example.id for example in chosen)}."
        )
    return batch, [example.id for example in chosen]
