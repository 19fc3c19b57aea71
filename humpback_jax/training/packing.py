"""How a batch's examples are laid out in rows of fixed shape.

Nothing of it is stored: to pack a step again takes one or two microseconds an example, from lengths
alone, and gives the same rows in every process and after every restart.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from humpback_jax.errors import HumpbackError
from humpback_jax.parallel.batches import place_rows
from humpback_jax.training.examples import ExampleIndex, TrainingExample, example_key
from humpback_jax.training.loss import Batch
from humpback_jax.training.order import BatchOrder

BOUNDS = 128  # static bounds are multiples of it
PLANNED = 64  # batches that are looked at to find the best width of rows
# Of a row, that may be computed where a micro-batch has one for each device: one of these sets.
FRACTIONS = ((1 / 4, 1 / 2, 1), (1 / 3, 2 / 3, 1), (1 / 2, 3 / 4, 1))
# Places: what a micro-batch costs beside its own, for weights that are cast and gradients summed;
# measured with the default model on a CPU (150 in bfloat16).
MICRO_BATCH = 128
SPARE_ROWS = 4  # of which rows are a multiple where empty ones cost nothing


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
    mask, keys = np.zeros(shape, bool), np.zeros(shape, np.uint32)
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
            keys[r, place] = example_key(example.source, example.id) & 0xFFFFFFFF
            start += example.length
    return Batch._make((tokens, targets, positions, segment_ids, source_ids, mask, keys))


def pack(lengths: Sequence[int], widths: Sequence[int], micro_rows: int = 1) -> list[list[int]]:
    """Rows of indices into `lengths`, fullest first, with which a step takes the least time.

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
    return min(packings, key=lambda rows: _cost(rows, lengths, widths, micro_rows))


def _places(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], widths: Sequence[int], micro_rows: int
) -> int:
    """Places that are computed, by all devices together."""
    fullest = [sum(lengths[index] for index in row) for row in rows[::micro_rows]]
    return micro_rows * sum(widths[bisect.bisect_left(widths, used)] for used in fullest)


def _cost(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], widths: Sequence[int], micro_rows: int
) -> int:
    """Time of a step, in places."""
    return _places(rows, lengths, widths, micro_rows) + MICRO_BATCH * _multiple(
        len(rows), micro_rows
    )


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """What the batches of a training run hold, and the shapes that fit every one of them.

    Attributes:
      steps: batches of the run. epochs: that these complete. examples: that they are drawn from.
      seen: by source, of those that a step takes at least once: "examples" and their
        "supervised_tokens".
      num_rows: rows of a batch, a multiple of those of a micro-batch.
      micro_rows: rows that are computed at one time. A batch that fills fewer rows than `num_rows`
        leaves its last micro-batches empty, and they cost nothing.
      widths: places of a row that may be computed, ascending; rows are laid out in the last.
      longest: no example takes more places (static bound for attention).
      efficiency: share of the computed places that hold tokens, over the planned steps.
    """

    steps: int
    epochs: int
    examples: int
    seen: dict[str, dict[str, int]]
    num_rows: int
    micro_rows: int
    widths: tuple[int, ...]
    longest: int
    efficiency: float

    @property
    def row_tokens(self) -> int:
        return self.widths[-1]

    def summary(self) -> str:
        """One line for people."""
        packing = (
            f"batches of at most {self.num_rows} rows of {self.row_tokens:,} places, "
            f"{self.efficiency:.1%} of the computed places hold tokens"
        )
        seen = sum(counts["examples"] for counts in self.seen.values())
        if seen == self.examples:
            return packing
        return f"{packing}; {seen:,} of {self.examples:,} examples are seen in {self.steps:,} steps"


def plan_packing(
    index: ExampleIndex,
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
        a part may be computed.
      parts: devices with rows of their own.
      multiple_of: of all bounds, so that similar runs share a compiled program.

    Raises:
      HumpbackError: an example is longer than a row.
    """
    longest = static_bound(int(index.lengths.max()), row_tokens, multiple_of)
    drawn = [order.indices(step) for step in range(steps)]
    batches = [index.lengths[indices].tolist() for indices in drawn]
    if accumulation is None:
        widths = _best_widths(batches, longest, row_tokens, parts, multiple_of)
        packed = [pack(batch, widths, parts) for batch in batches]
        num_rows, micro_rows = _multiple(max(map(len, packed)), parts * SPARE_ROWS), parts
    else:
        widths = (_best_width(batches, longest, row_tokens, accumulation * parts, multiple_of),)
        packed = [pack(batch, widths) for batch in batches]
        num_rows = _multiple(max(map(len, packed)), accumulation * parts)
        micro_rows = num_rows // accumulation
    pairs = zip(packed, batches, strict=True)
    computed = sum(_places(rows, batch, widths, micro_rows) for rows, batch in pairs)
    return PackingPlan(
        steps,
        order.epochs(steps),
        order.examples,
        _seen(index, np.unique(np.concatenate(drawn))),
        num_rows,
        micro_rows,
        widths,
        longest,
        sum(map(sum, batches)) / computed,
    )


def _seen(index: ExampleIndex, drawn: np.ndarray) -> dict[str, dict[str, int]]:
    """`PackingPlan.seen`, of the examples with these indices."""
    sources, supervised = index.sources[drawn], index.supervised[drawn]
    return {
        name: {
            "examples": int((sources == number).sum()),
            "supervised_tokens": int(supervised[sources == number].sum()),
        }
        for number, name in enumerate(index.names)
    }


def _best_width(
    batches: Sequence[Sequence[int]], longest: int, row_tokens: int, unit: int, multiple_of: int
) -> int:
    """The width of rows with which the largest of some batches has the fewest places."""
    looked_at = _sample(batches)

    def cost(width: int) -> tuple[int, int]:
        rows = max(len(best_fit(batch, width)) for batch in looked_at)
        return _multiple(rows, unit) * width, -width

    return min({*range(longest, row_tokens, multiple_of), row_tokens}, key=cost)


def _best_widths(
    batches: Sequence[Sequence[int]], longest: int, row_tokens: int, parts: int, multiple_of: int
) -> tuple[int, ...]:
    """The widths of single rows with which some batches take the least time."""
    looked_at = _sample(batches)
    choices = {
        tuple(sorted({static_bound(width * share, width, multiple_of) for share in fractions}))
        for width in {*range(longest, row_tokens, multiple_of), row_tokens}
        for fractions in FRACTIONS
    }

    def cost(widths: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        packed = [pack(batch, widths, parts) for batch in looked_at]
        pairs = zip(packed, looked_at, strict=True)
        return sum(_cost(rows, batch, widths, parts) for rows, batch in pairs), widths

    return min(choices, key=cost)


def _sample(batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    return [batches[len(batches) * place // PLANNED] for place in range(PLANNED)]


def _multiple(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def static_bound(bound: float, row_tokens: int, multiple_of: int = BOUNDS) -> int:
    """At least `bound`, coarse enough that similar data share a compiled program."""
    return min(math.ceil(bound / multiple_of) * multiple_of, row_tokens)


def packed_rows(index: ExampleIndex, indices: np.ndarray, plan: PackingPlan) -> list[list[int]]:
    """The rows of the batch of these examples: for each row, indices of examples.

    Raises:
      HumpbackError: an example is longer than a row.
    """
    examples = indices.tolist()
    rows = pack(index.lengths[indices].tolist(), plan.widths, plan.micro_rows)
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
