"""How a batch's examples are laid out in rows of fixed shape.

Nothing of it is stored: to pack a step again takes one or two microseconds an example, from lengths
alone, and gives the same rows in every process and after every restart.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from humpback_jax.errors import HumpbackError
from humpback_jax.parallel.batches import place_rows
from humpback_jax.training.examples import ExampleIndex, TrainingExample
from humpback_jax.training.loss import Batch
from humpback_jax.training.order import BatchOrder

BOUNDS = 128  # static bounds are multiples of it
PLANNED = 64  # steps that are looked at to find the best length of rows


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

    def summary(self) -> str:
        """One line for people."""
        return (
            f"batches of at most {self.num_rows} rows of {self.row_tokens:,} places; "
            f"{self.efficiency:.1%} of the computed places hold tokens"
        )


def plan_packing(
    index: ExampleIndex,
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
    longest = static_bound(int(index.lengths.max()), row_tokens, multiple_of)
    looked_at = sorted({steps * place // PLANNED for place in range(PLANNED)})

    def cost(width: int) -> tuple[int, int]:
        counts = [len(packed_rows(index, order.indices(step), width)) for step in looked_at]
        return _computed(counts, accumulation, parts)[2] * width, -width

    row_tokens = min({*range(longest, row_tokens, multiple_of), row_tokens}, key=cost)
    counts, max_targets, used = [], 1, 0
    for step in range(steps):
        indices = order.indices(step)
        rows = packed_rows(index, indices, row_tokens)
        counts.append(len(rows))
        used += int(index.lengths[indices].sum())
        supervised = dict(zip(indices.tolist(), index.supervised[indices].tolist(), strict=True))
        fullest = max(sum(supervised[example] for example in row) for row in rows)
        max_targets = max(max_targets, fullest)
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


def packed_rows(index: ExampleIndex, indices: np.ndarray, row_tokens: int) -> list[list[int]]:
    """The rows of the batch of these examples: for each row, indices of examples.

    Raises:
      HumpbackError: an example is longer than a row.
    """
    examples = indices.tolist()
    rows = best_fit(index.lengths[indices].tolist(), row_tokens)
    return [[examples[place] for place in row] for row in rows]


def place_batch(
    examples: Sequence[TrainingExample],
    rows: Sequence[Sequence[int]],
    plan: PackingPlan,
    sources: Sequence[str],
    mesh: Mesh | None,
) -> Batch:
    """Lays out a batch [micro-batches, micro_rows, tokens] on the mesh.

    A process reads only the examples in the rows of its own devices.

    Args:
      rows: `packed_rows`, in the order in which micro-batches take them.
    """
    places = np.arange(plan.num_rows).reshape(-1, plan.micro_rows)

    def read(chosen: slice) -> Batch:
        ours = places[:, chosen]
        filled = [rows[place] if place < len(rows) else () for place in ours.ravel().tolist()]
        batch = lay_out(examples, filled, len(filled), plan.row_tokens, sources)
        return Batch._make(x.reshape(*ours.shape, plan.row_tokens) for x in batch)

    return place_rows(read, plan.micro_rows, mesh, 1)
