"""M_yx writes an instruction for every document: if these fail, it idles, or a kill costs rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from humpback_jax import artifacts
from humpback_jax.artifacts import Artifact, Row, RunFolder, Stage
from humpback_jax.compute import choose_compute
from humpback_jax.models import load_model
from humpback_jax.records import NO_ROOM, Segment
from humpback_jax.sampling.engine import Work
from humpback_jax.stages.augment import augment_stage
from humpback_jax.stages.context import Context
from humpback_jax.stages.curate import score_stage

COUNT = 40


def segment(number: int) -> Row:
    text = f"Segment {number}. " * (1000 if number == 5 else number % 7 + 1)
    return dataclasses.asdict(
        Segment(f"s{number}", f"d{number}", 0, len(text), "", text, "here", "rules")
    )


def context(root: Path, shard_rows: int) -> tuple[Context, Artifact]:
    """A run up to its corpus, in which one document leaves no room in the window."""
    config = tiny_config()
    config.augment.update({"shard_rows": shard_rows, "max_new_tokens": 12})
    config.curate.update({"shard_rows": shard_rows, "max_new_tokens": 12})
    folder, log = RunFolder(root, say=lambda text: None), None
    base, compute = load_model("tiny-random"), choose_compute("float32", 8)
    made: Any = Context(config, folder, compute, base, [], [], log, lambda text: None)  # type: ignore[arg-type]
    corpus = folder.rows(
        "corpus", "corpus", Stage("corpus", 1, {}), [], 1, lambda _: map(segment, range(COUNT))
    )
    return made, corpus


def candidates(root: Path, shard_rows: int) -> tuple[list[Row], Work]:
    made, corpus = context(root, shard_rows)
    rows = made.folder.read(augment_stage(made, made.base_artifact, corpus))
    return rows, made.inference(made.base_artifact).replicas.work


def test_no_slot_waits_for_the_end_of_a_shard_of_documents(tmp_path):
    """Emptied at the end of every shard, an engine with many slots would idle half of the time."""
    expected, work = candidates(tmp_path / "one", COUNT)
    found, same = candidates(tmp_path / "many", 3)
    assert found == expected
    assert same == work and work.row_steps > 0
    assert [row["segment_id"] for row in found] == [f"s{n}" for n in range(COUNT)]
    assert [row["finish_reason"] == NO_ROOM for row in found] == [n == 5 for n in range(COUNT)]


def test_a_kill_between_shards_costs_no_finished_one_and_changes_nothing(tmp_path, monkeypatch):
    expected, _ = candidates(tmp_path / "whole", 4)
    write, written = artifacts.write_parquet, []

    def killed(path: Path, rows: Iterable[Row]) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, rows)

    made, corpus = context(tmp_path / "run", 4)
    monkeypatch.setattr(artifacts, "write_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        augment_stage(made, made.base_artifact, corpus)
    before, again = set(written), []
    monkeypatch.setattr(
        artifacts, "write_parquet", lambda path, rows: (again.append(path.name), write(path, rows))
    )
    assert candidates(tmp_path / "run", 4)[0] == expected
    assert not before & set(again) and len(before | set(again) - {"corpus"}) >= COUNT // 4


def test_another_gate_has_every_instruction_written_again(tmp_path):
    made, corpus = context(tmp_path, 4)
    first = augment_stage(made, made.base_artifact, corpus)
    made.config.augment.update({"min_chars": 30, "max_chars": 1600, "shard_rows": 7})
    assert augment_stage(made, made.base_artifact, corpus).hash == first.hash
    assert made.folder.redone == 2, "the corpus and the candidates, once"
    made.config.augment.temperature = 0.1
    assert augment_stage(made, made.base_artifact, corpus).hash != first.hash


def test_a_kill_before_the_seal_loads_the_model_again_for_nothing(tmp_path, monkeypatch):
    expected, _ = candidates(tmp_path, 4)
    made, corpus = context(tmp_path, 4)
    (seal,) = [
        path
        for path in (tmp_path / "store").glob("*/artifact.json")
        if json.loads(path.read_text())["stage"] == "augment"
    ]
    seal.unlink()
    monkeypatch.setattr(made, "inference", None)
    assert made.folder.read(augment_stage(made, made.base_artifact, corpus)) == expected


def test_no_slot_waits_for_the_end_of_a_shard_of_reasoned_ratings(tmp_path):
    def scores(name: str, shard_rows: int) -> tuple[list[Row], Work]:
        made, _ = context(tmp_path / name, shard_rows)
        made.config.augment.update({"min_chars": 0, "max_chars": 10_000})
        found = made.folder.rows("candidates", "candidates", Stage("c", 1, {}), [], 1, pairs)
        rows = made.folder.read(score_stage(made, 1, made.base_artifact, found, "rubric"))
        return rows, made.inference(made.base_artifact).replicas.work

    def pairs(_: int) -> list[Row]:
        texts = {"raw": "", "model_hash": "m", "template_hash": "t", "decoding": "{}"}
        return [
            {"id": f"c{n}", "segment_id": f"s{n}", "instruction": f"Why {n}, and how?"}
            | {"response": segment(n)["text"], "draw": 0, "finish_reason": "stop"}
            | {"logprob": -1.0, "tokens": 5, **texts}
            for n in range(COUNT)
        ]

    expected, work = scores("one", COUNT)
    found, same = scores("many", 3)
    assert found == expected and same == work and work.row_steps > 0
    assert sum("unrated" in row["detail"] for row in found) == 1, "c5 does not fit"
