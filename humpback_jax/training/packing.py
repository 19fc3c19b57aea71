"""Which examples form batch t, and how they are laid out in rows of fixed shape."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.training.loss import Batch

BOUNDS = 128  # static bounds are multiples of it
PLANNED = 64  # batches that are looked at to find the best width of rows
FRACTIONS = (1, 2, 4)  # of a row that may be computed
SPARE_ROWS = 4  # of which rows are a multiple where empty ones cost nothing


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


def pack(lengths: Sequence[int], widths: Sequence[int], micro_rows: int = 1) -> list[list[int]]:
    """Rows of indices into `lengths`, fullest first, with which the fewest places are computed.

    Rows are packed for each of the widths that hold the longest example, and the best are kept.

    Args:
      widths: ascending; of the rows of a micro-batch that many places are computed which hold
        the fullest of them.

    Raises:
      HumpbackError: an example alone is longer than a row.
    """
    longest = max(lengths, default=0)
    fitting = [width for width in widths if width >= longest] or widths[-1:]
    packings = []
    for width in fitting:
        rows = best_fit(lengths, width)
        rows.sort(key=lambda row: -sum(lengths[index] for index in row))
        packings.append(rows)
    return min(packings, key=lambda rows: _places(rows, lengths, widths, micro_rows))


def _places(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], widths: Sequence[int], micro_rows: int
) -> int:
    """Places that are computed, by all devices together."""
    fullest = [sum(lengths[index] for index in row) for row in rows[::micro_rows]]
    return micro_rows * sum(widths[bisect.bisect_left(widths, used)] for used in fullest)


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """The shapes that fit every batch of a training run.

    Attributes:
      num_rows: rows of a batch, a multiple of those of a micro-batch.
      micro_rows: rows that are computed at one time. A batch that fills fewer rows than `num_rows`
        leaves its last micro-batches empty, and they cost nothing.
      widths: places of a row that may be computed, ascending; rows are laid out in the last.
      longest: no example takes more places (static bound for attention).
      efficiency: share of the computed places that hold tokens, over the planned steps.
    """

    num_rows: int
    micro_rows: int
    widths: tuple[int, ...]
    longest: int
    efficiency: float

    @property
    def row_tokens(self) -> int:
        return self.widths[-1]


def plan_packing(
    examples: Sequence[TrainingExample],
    order: BatchOrder,
    steps: int,
    row_tokens: int,
    accumulation: int | None = 1,
    parts: int = 1,
    multiple_of: int = BOUNDS,
) -> PackingPlan:
    """Packs every batch of the run once, on lengths alone, to find the shapes that fit them all.

    Args:
      row_tokens: places of a row, at most. Rows are as long as computes the least.
      accumulation: micro-batches of a batch; None: each has a single row for each device, of which
        a half or a quarter may be computed.
      parts: devices with rows of their own.
      multiple_of: of all bounds, so that similar runs share a compiled program.

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
    longest = static_bound(max(lengths), row_tokens, multiple_of)
    batches = [[lengths[i] for i in order.indices(step)] for step in range(steps)]
    if accumulation is None:
        widths = tuple(
            sorted({static_bound(longest / part, longest, multiple_of) for part in FRACTIONS})
        )
        packed = [pack(batch, widths, parts) for batch in batches]
        num_rows, micro_rows = _multiple(max(map(len, packed)), parts * SPARE_ROWS), parts
    else:
        widths = (_best_width(batches, longest, row_tokens, accumulation * parts, multiple_of),)
        packed = [pack(batch, widths) for batch in batches]
        num_rows = _multiple(max(map(len, packed)), accumulation * parts)
        micro_rows = num_rows // accumulation
    pairs = zip(packed, batches, strict=True)
    computed = sum(_places(rows, batch, widths, micro_rows) for rows, batch in pairs)
    return PackingPlan(num_rows, micro_rows, widths, longest, sum(map(sum, batches)) / computed)


def _best_width(
    batches: Sequence[Sequence[int]], longest: int, row_tokens: int, unit: int, multiple_of: int
) -> int:
    """The width of rows with which the largest of some batches has the fewest places."""
    looked_at = [batches[len(batches) * place // PLANNED] for place in range(PLANNED)]

    def cost(width: int) -> tuple[int, int]:
        rows = max(len(best_fit(batch, width)) for batch in looked_at)
        return _multiple(rows, unit) * width, -width

    return min({*range(longest, row_tokens, multiple_of), row_tokens}, key=cost)


def _multiple(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def static_bound(bound: float, row_tokens: int, multiple_of: int = BOUNDS) -> int:
    """At least `bound`, coarse enough that similar data share a compiled program."""
    return min(math.ceil(bound / multiple_of) * multiple_of, row_tokens)


def batch_at(
    examples: Sequence[TrainingExample],
    order: BatchOrder,
    step: int,
    plan: PackingPlan,
    sources: Sequence[str],
) -> tuple[Batch, list[TrainingExample]]:
    """Batch `step` as numpy arrays [num_rows, row_tokens], and its examples."""
    chosen = [examples[index] for index in order.indices(step)]
    rows = pack([example.length for example in chosen], plan.widths, plan.micro_rows)
    batch = lay_out(chosen, rows, plan.num_rows, plan.row_tokens, sources)
    if not np.asarray(batch.mask).any():
        raise HumpbackError(
            f"batch {step} has no supervised token; its examples: "
            f"{', '.join(example.id for example in chosen)}."
        )
    return batch, chosen
