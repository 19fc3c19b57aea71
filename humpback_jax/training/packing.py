"""Which examples form batch t, and how they are laid out in rows of fixed shape."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.training.loss import Batch

BOUNDS = 128  # static bounds are multiples of it
PLANNED = 64  # steps that are looked at to find the best length of rows


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
      num_rows: rows of a batch, a multiple of those of a micro-batch.
      row_tokens: places of a row.
      micro_rows: rows that are computed at one time. A batch that fills fewer rows than `num_rows`
        leaves its last micro-batches empty, and they cost nothing.
      max_targets: no row has more supervised positions (static bound for the loss).
      longest: no example takes more places (static bound for attention).
      efficiency: share of the computed places that hold tokens, over the planned steps.
    """

    num_rows: int
    row_tokens: int
    micro_rows: int
    max_targets: int
    longest: int
    efficiency: float


def plan_packing(
    examples: Sequence[TrainingExample],
    order: BatchOrder,
    steps: int,
    row_tokens: int,
    accumulation: int | None = 1,
    parts: int = 1,
    multiple_of: int = BOUNDS,
) -> PackingPlan:
    """Packs every batch of the run once, on lengths alone, to find the shape that fits them all.

    Rows are of the length, up to `row_tokens`, with which the least is computed.

    Args:
      accumulation: micro-batches of a batch; None: each has a single row for each device.
      parts: devices with rows of their own.
      multiple_of: of rows' lengths and of the bounds, so that similar runs share a compiled
        program.

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
    longest = static_bound(max(lengths), row_tokens, multiple_of)
    looked_at = sorted({steps * place // PLANNED for place in range(PLANNED)})

    def cost(width: int) -> tuple[int, int]:
        counts = [len(rows) for _, rows in _packed(lengths, order, looked_at, width)]
        return _computed(counts, accumulation, parts)[2] * width, -width

    row_tokens = min({*range(longest, row_tokens, multiple_of), row_tokens}, key=cost)
    counts, max_targets, used = [], 1, 0
    for indices, rows in _packed(lengths, order, range(steps), row_tokens):
        counts.append(len(rows))
        used += sum(lengths[i] for i in indices)
        for row in rows:
            max_targets = max(max_targets, sum(supervised[indices[place]] for place in row))
    num_rows, micro_rows, computed = _computed(counts, accumulation, parts)
    return PackingPlan(
        num_rows,
        row_tokens,
        micro_rows,
        static_bound(max_targets, row_tokens, multiple_of),
        longest,
        used / (computed * row_tokens),
    )


def _computed(counts: Sequence[int], accumulation: int | None, parts: int) -> tuple[int, int, int]:
    """(rows of a batch, of a micro-batch, all that are computed) where batches fill `counts`."""
    unit = parts * (accumulation or 1)
    num_rows = -(-max(counts) // unit) * unit
    micro_rows = num_rows // accumulation if accumulation else parts
    return num_rows, micro_rows, sum(-(-count // micro_rows) * micro_rows for count in counts)


def static_bound(bound: int, row_tokens: int, multiple_of: int = BOUNDS) -> int:
    """At least `bound`, coarse enough that similar data share a compiled program."""
    return min(-(-bound // multiple_of) * multiple_of, row_tokens)


def _packed(
    lengths: Sequence[int], order: BatchOrder, steps: Iterable[int], row_tokens: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    for step in steps:
        indices = order.indices(step)
        yield indices, best_fit([lengths[i] for i in indices], row_tokens)


def batch_at(
    examples: Sequence[TrainingExample],
    order: BatchOrder,
    step: int,
    plan: PackingPlan,
    sources: Sequence[str],
) -> tuple[Batch, list[TrainingExample]]:
    """Batch `step` as numpy arrays [num_rows, row_tokens], and its examples."""
    chosen = [examples[index] for index in order.indices(step)]
    rows = best_fit([example.length for example in chosen], plan.row_tokens)
    batch = lay_out(chosen, rows, plan.num_rows, plan.row_tokens, sources)
    if not np.asarray(batch.mask).any():
        raise HumpbackError(
            f"batch {step} has no supervised token; its examples: "
            f"{', '.join(example.id for example in chosen)}."
        )
    return batch, chosen
