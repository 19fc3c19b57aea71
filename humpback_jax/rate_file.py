"""A file of pairs to a file of ratings, of any size: shard by shard, kept over a restart."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from humpback_jax.curators import (
    COMBINED,
    PairText,
    Rating,
    combine,
    rate_shards,
    require_rateable,
)
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import Inference
from humpback_jax.progress import Progress, Say
from humpback_jax.rows import ReadReport, stream_examples
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.shards import Shards, open_shards


def rate_file(
    judge: Inference,
    path: Path,
    out: Path,
    form: str | None,
    curator: str,
    decoding: Decoding,
    seed: int,
    skip_bad: bool,
    say: Say,
) -> tuple[int, ReadReport]:
    """Rates every pair of a file; returns (pairs with a rating, what was found in the file).

    Finished shards survive a kill. `combined` ranks all pairs among each other when all shards are
    there, and holds the two values of each in memory for that.

    Raises:
      HumpbackError: a row that is no pair, or a pair that the model's window or template does not
        take; named, and before anything is computed.
    """
    report = ReadReport()
    bad: set[int] = set()
    digest, total = hashlib.sha256(), 0
    for pair in _usable(judge, path, curator, report, skip_bad, bad):
        digest.update(repr(pair).encode())
        total += 1
    named = [judge.model.hash, judge.compute.sampling_formats, curator, repr(decoding), seed]
    named.append(digest.hexdigest())
    identity = hashlib.sha256(json.dumps(named).encode()).hexdigest()
    with open_shards(out, form, identity, total, judge.share.takes) as shards:
        ours, done = shards.part()
        progress = Progress("score", ours, say, done)
        again = enumerate(_pairs(path, ReadReport(), skip_bad))
        missing = shards.missing(pair for place, pair in again if place not in bad)

        def tell(pairs: int) -> None:
            progress.add(pairs, lambda seconds: judge.replicas.work.speed(seconds))

        for number, rated in rate_shards(curator, judge, missing, decoding, seed, tell):
            if judge.share.leads:
                shards.write(number, itertools.starmap(_row, rated))
        shards.wait()
        count = sum(row["score"] is not None for row in shards.rows())
        shards.join(functools.partial(_ranked, shards) if curator == "combined" else None)
    return count, report


def _usable(
    judge: Inference,
    path: Path,
    curator: str,
    report: ReadReport,
    skip_bad: bool,
    bad: set[int],
) -> Iterator[PairText]:
    """The pairs that can be rated; other rows are counted with `skip_bad`, or else errors.

    Args:
      bad: gets the places of the others among the pairs of the file.
    """
    for place, pair in enumerate(_pairs(path, report, skip_bad)):
        try:
            require_rateable(judge.model, curator, pair)
        except HumpbackError as error:
            if not skip_bad:
                raise HumpbackError(
                    f"record {pair.id} cannot be rated: {error} Fix the row, or pass --skip-bad."
                ) from error
            report.skip("cannot be rated")
            report.rows -= 1
            bad.add(place)
            continue
        yield pair


def _pairs(path: Path, report: ReadReport, skip_bad: bool) -> Iterator[PairText]:
    for example in stream_examples(path, "seed", report, skip_bad, pairs=True):
        yield PairText(example.id, example.instruction, example.response)


def _ranked(shards: Shards) -> Iterator[dict[str, Any]]:
    """The rows of `combined`, ranked among all: each shard has ranked its own alone."""
    parts: dict[str, list[Rating]] = {part: [] for part in COMBINED}
    for row in shards.rows():
        for part, ratings in parts.items():
            ratings.append(Rating(row["id"], part, row["detail"][part], ""))
    for row, rating in zip(shards.rows(), combine(parts), strict=True):
        yield row | {"score": rating.value}


def _row(pair: PairText, rating: Rating) -> dict[str, Any]:
    return {
        "id": pair.id,
        "instruction": pair.instruction,
        "response": pair.response,
        "curator": rating.curator,
        "score": rating.value,
        "detail": json.loads(rating.detail),
    }
