"""Which examples form batch t: a function of the seed and t."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.training.examples import ranks


@dataclasses.dataclass(frozen=True)
class Pool:
    """Examples that are drawn from, in laps: all of them once before any of them again.

    Attributes:
      members: int64 [m], indices of examples. draws: how many an epoch takes.
    """

    members: np.ndarray
    draws: int


def draws_of(pools: Sequence[Pool]) -> int:
    """How many examples an epoch takes from all pools."""
    return sum(pool.draws for pool in pools)


class BatchOrder:
    """Batch t as a function of (seed, t): a window over the epochs' orders, one after another.

    An epoch draws from every pool, going on where the epoch before stopped, and orders its draws by
    a hash of (seed, epoch, key). So a batch depends neither on the order of the input nor, for the
    examples that stay, on rows added or removed; and when an epoch ends, no example of a pool was
    drawn more than once more than another.

    Attributes:
      examples: how many are drawn from. epoch_examples: draws an epoch.
    """

    def __init__(
        self,
        keys: np.ndarray,
        batch_examples: int,
        seed: int,
        pools: Sequence[Pool] | None = None,
    ) -> None:
        """`keys`: those of an `ExampleIndex`. `pools`: None draws each example once an epoch."""
        self._keys, self._size, self._seed = keys, batch_examples, seed
        self._pools = [Pool(np.arange(len(keys)), len(keys))] if pools is None else list(pools)
        self.examples = sum(len(pool.members) for pool in self._pools)
        self.epoch_examples = draws_of(self._pools)
        if batch_examples > self.epoch_examples:
            raise HumpbackError(
                f"{self.epoch_examples} training examples are fewer than one batch "
                f"(batch_examples={batch_examples}). Lower batch_examples or add data."
            )
        self._epochs: dict[int, np.ndarray] = {}

    def epochs(self, steps: int) -> int:
        """How many epochs the first `steps` batches complete."""
        return steps * self._size // self.epoch_examples

    def indices(self, step: int) -> np.ndarray:
        """int64 [batch_examples]: indices of the examples of batch `step` (from 0)."""
        epoch, first = divmod(step * self._size, self.epoch_examples)
        found = self._epoch(epoch)[first : first + self._size]
        missing = self._size - len(found)
        return np.concatenate([found, self._epoch(epoch + 1)[:missing]]) if missing else found

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            recent = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs = {**recent, epoch: self._ordered(epoch)}
        return self._epochs[epoch]

    def _ordered(self, epoch: int) -> np.ndarray:
        drawn, order = [], []
        for pool in self._pools:
            for lap, members in self._drawn(pool, epoch):
                drawn.append(members)
                order.append(ranks(self._keys[members], self._seed, epoch, lap))
        return np.concatenate(drawn)[np.argsort(np.concatenate(order), kind="stable")]

    def _drawn(self, pool: Pool, epoch: int) -> Iterator[tuple[int, np.ndarray]]:
        """(lap, indices of examples) for each lap that the epoch takes part of."""
        count = len(pool.members)
        place, stop = epoch * pool.draws, (epoch + 1) * pool.draws
        while place < stop:
            lap, first = divmod(place, count)
            last = min(count, first + stop - place)
            members = pool.members
            if last - first < count:
                lap_ranks = ranks(self._keys[members], self._seed, "lap", lap)
                members = members[np.argsort(lap_ranks, kind="stable")[first:last]]
            yield lap, members
            place += last - first
