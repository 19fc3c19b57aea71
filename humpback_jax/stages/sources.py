"""Stage: where the human pairs and the unlabelled segments come from."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from humpback_jax.artifacts import Artifact, Row, Stage, rows_hash
from humpback_jax.corpus.documents import Document, DocumentReport, read_documents
from humpback_jax.corpus.filters import extract_segments
from humpback_jax.corpus.segments import RULES, choose
from humpback_jax.errors import HumpbackError
from humpback_jax.records import Example, Segment, stable_id
from humpback_jax.rows import read_examples
from humpback_jax.stages.context import Context

VERSION = 1


def seed_pairs(config: Any) -> tuple[list[Example], list[Example]]:
    """(training pairs, held-out pairs): the packaged set, or the files that the config names.

    Raises:
      HumpbackError: an unreadable file, or an instruction that stands in both parts.
    """
    seed = _pairs(config.data.seed, "train", config.data.skip_bad)
    heldout = _pairs(config.data.heldout, "heldout", config.data.skip_bad)
    _refuse_shared("data.seed", seed, "data.heldout", heldout)
    if config.data.seed_limit:
        seed = sorted(seed, key=lambda e: stable_id("seed", e.id))[: config.data.seed_limit]
    return seed, heldout


def validation_pairs(
    config: Any, seed: Sequence[Example], heldout: Sequence[Example]
) -> list[Example]:
    """The pairs of `data.validation`, [] where it is empty.

    Raises:
      HumpbackError: an unreadable file, or an instruction that stands in another part, too.
    """
    if not config.data.validation:
        return []
    found = _pairs_of(config.data.validation, config.data.skip_bad)
    _refuse_shared("data.seed", seed, "data.validation", found)
    _refuse_shared("data.heldout", heldout, "data.validation", found)
    return found


def _refuse_shared(
    first: str, pairs: Sequence[Example], second: str, others: Sequence[Example]
) -> None:
    shared = {e.instruction for e in pairs} & {e.instruction for e in others}
    if shared:
        raise HumpbackError(
            f"{len(shared)} instructions appear in both {first} and {second}, for example "
            f"{min(shared)[:80]!r}. Remove them from one of the two."
        )


def packaged_pairs(split: str) -> list[Example]:
    """The pairs written for this project: split "train" or "heldout"."""
    with resources.as_file(resources.files("humpback_jax") / "data" / "seed.jsonl") as path:
        examples, _ = read_examples(path, "seed")
        lines = path.read_text(encoding="utf-8").splitlines()
    splits = {row["id"]: row["split"] for row in map(json.loads, lines)}
    return [example for example in examples if splits[example.id] == split]


def _pairs(where: str, split: str, skip_bad: bool) -> list[Example]:
    return packaged_pairs(split) if where == "builtin" else _pairs_of(where, skip_bad)


def _pairs_of(where: str, skip_bad: bool) -> list[Example]:
    examples, _ = read_examples(Path(where), "seed", skip_bad=skip_bad)
    for example in examples:
        if not example.messages:
            raise HumpbackError(
                f"{where}: row {example.id} is plain text; human pairs need an instruction and a "
                "response."
            )
    return examples


def corpus_stage(context: Context) -> Artifact:
    """The unlabelled segments U, with counts per rule in the artifact's details.

    Raises:
      HumpbackError: no segment is left.
    """
    section, seed = context.config.corpus, context.config.seed
    report = DocumentReport(section.skip_bad)
    documents = _documents(section, report)
    if line := report.passed_over_line():
        context.say(f"corpus: {line}")
    identity = rows_hash({"id": d.id, "text": d.text} for d in documents)
    fields = {**section.to_dict(), "documents": identity, "rules": RULES}
    if section.segments:
        fields["seed"] = seed

    stage = Stage("corpus", VERSION, json.loads(json.dumps(fields)))

    @functools.cache  # the counts too, where a killed run has left the rows
    def extracted() -> tuple[list[Segment], list[tuple[Segment, str]], Row]:
        return extract_segments(documents, min_chars=section.min_chars, max_chars=section.max_chars)

    def chosen(_: int) -> list[Row]:
        kept = extracted()[0]
        return [dataclasses.asdict(s) for s in choose(kept, section.segments or len(kept), seed)]

    def rejected(_: int) -> list[Row]:
        return [{**dataclasses.asdict(s), "rule": rule} for s, rule in extracted()[1]]

    documents_read = {"documents": len(documents), "rejected_documents": dict(report.rejected)}
    artifact = context.folder.rows(
        "corpus",
        "corpus",
        stage,
        [],
        1,
        chosen,
        lambda rows: {**documents_read, **extracted()[2]},
    )
    rejects = dataclasses.replace(stage, name="corpus_rejects")
    context.folder.rows("corpus_rejects", "rejects", rejects, [], 1, rejected)
    if not artifact.rows:
        raise HumpbackError(
            f"no segment is left of {len(documents)} documents ({artifact.details}). Check "
            "corpus.documents and the length window corpus.min_chars and max_chars."
        )
    return artifact


def _documents(section: Any, report: DocumentReport) -> list[Document]:
    documents = sorted(read_documents(list(section.documents), report), key=lambda d: d.id)
    if section.limit:
        documents = sorted(documents, key=lambda d: stable_id("limit", d.id))[: section.limit]
    return documents
