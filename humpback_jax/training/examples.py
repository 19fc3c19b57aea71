"""Tokenised examples, and what is known of them without reading their tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from humpback_jax.errors import HumpbackError


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


@dataclasses.dataclass(frozen=True)
class ExampleIndex:
    """Of n examples all that decides which of them form a batch, and in which rows they lie.

    Attributes:
      keys: uint64 [n], distinct; hashes of (source, id), which decide every order.
      lengths, supervised: int32 [n], as in `TrainingExample`.
      sources: int32 [n], indices into `names`, which are sorted.
    """

    keys: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    sources: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)


class IndexedExamples(Sequence[TrainingExample]):
    """Examples that know their index without being read: those of a `TokenStore`, on disk."""

    columns: ExampleIndex


def index_of(examples: Sequence[TrainingExample]) -> ExampleIndex:
    """The index that examples have, or else the one of examples in memory."""
    if isinstance(examples, IndexedExamples):
        return examples.columns
    names, sources = numbered([example.source for example in examples])
    return ExampleIndex(
        keys_of([(example.source, example.id) for example in examples]),
        np.array([example.length for example in examples], np.int32),
        np.array([example.supervised for example in examples], np.int32),
        sources,
        names,
    )


def numbered(sources: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """(sorted names, int32 [n] indices into them)."""
    names = tuple(sorted(set(sources)))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[source] for source in sources], np.int32)


def keys_of(identities: Sequence[tuple[str, str]]) -> np.ndarray:
    """uint64 [n]: distinct keys of examples that are known by (source, id)."""
    return distinct(np.array([example_key(*each) for each in identities], np.uint64))


def example_key(source: str, name: str) -> int:
    """64 bits of a hash of who an example is."""
    digest = hashlib.blake2b(f"{len(source)}:{source}{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def distinct(keys: np.ndarray) -> np.ndarray:
    """uint64 [n] -> [n]: the second, third, ... of equal keys get others, by their number."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(keys)]
    if starts.all():
        return keys
    places = np.arange(len(keys))
    number = np.empty(len(keys), np.uint64)
    number[order] = places - np.maximum.accumulate(np.where(starts, places, 0))
    return np.where(number > 0, scrambled(keys + number), keys)


def ranks(keys: np.ndarray, *salt: object) -> np.ndarray:
    """uint64 [n]: random numbers that depend on key and salt alone, distinct like the keys."""
    digest = hashlib.blake2b("/".join(map(str, salt)).encode(), digest_size=8).digest()
    return scrambled(keys ^ np.uint64(int.from_bytes(digest, "little")))


def scrambled(x: np.ndarray) -> np.ndarray:
    """uint64 [n] -> [n]: splitmix64's output function (Steele et al., 2014), a bijection."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
