"""Scores of a round: if these fail, a kill loses them, or what was scored once is scored again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from humpback_jax import curators, loop
from humpback_jax.artifacts import Artifact, Row, RunFolder, Stage
from humpback_jax.compute import choose_compute
from humpback_jax.curators import COMBINED, PairText, Rating, combine
from humpback_jax.models import load_model
from humpback_jax.stages import curate
from humpback_jax.stages.context import Context

COUNT, SHARD = 11, 4


def opinion(curator: str, pair: PairText) -> Rating:
    value = float(len(pair.response) * (7 if curator == "pmi" else 5) % 6)
    return Rating(pair.id, curator, value, json.dumps({"of": curator}))


class Judges:
    """Stands in for the models, and counts the pairs that each curator was asked about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, int] = {}
        self.killed_in = ""
        monkeypatch.setattr(curators, "rate", self.rate)

    def rate(self, curator: str, _: Any, pairs: Sequence[PairText], *__: Any) -> list[Rating]:
        if curator == self.killed_in and curator in self.asked:
            raise KeyboardInterrupt
        self.asked[curator] = self.asked.get(curator, 0) + len(pairs)
        return [opinion(curator, pair) for pair in pairs]


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Judges:
    return Judges(monkeypatch)


def context(root: Path, **changes: Any) -> tuple[Context, Artifact]:
    """A run of these settings up to its candidates."""
    from tiny_run import tiny_config

    config = tiny_config()
    config.curate.update({"also": (), "shard_rows": SHARD, **changes})
    folder = RunFolder(root, say=lambda text: None)
    log: Any = None  # scoring logs nothing
    base, compute = load_model("tiny-random"), choose_compute("float32", 4)
    made = Context(config, folder, compute, base, [], [], log, lambda text: None)

    def rows(_: int) -> list[Row]:
        texts = {"raw": "", "model_hash": "m", "template_hash": "t", "decoding": "{}"}
        return [
            {"id": f"c{i}", "segment_id": f"s{i}", "instruction": f"Why {i}, and how?"}
            | {"response": "y" * (i + 1), "draw": 0, "finish_reason": "stop"}
            | {"logprob": -1.0, "tokens": 5, **texts}
            for i in range(COUNT)
        ]

    candidates = folder.rows("candidates", "candidates", Stage("augment", 1, {}), [], 1, rows)
    return made, candidates


def score(root: Path, **changes: Any) -> tuple[list[Row], RunFolder]:
    """The scores that select, and the folder."""
    made, candidates = context(root, **changes)
    scores = loop._score(made, 1, made.base_artifact, candidates)
    return made.folder.read(scores), made.folder


def entries(root: Path) -> dict[str, Row]:
    manifest = json.loads((root / "manifest.json").read_text())
    return {entry["name"]: entry for entry in manifest["artifacts"]}


def test_a_kill_while_the_second_part_of_combined_is_scored_loses_one_shard(tmp_path, judges):
    expected, _ = score(tmp_path / "whole", curator="combined")
    assert judges.asked == {"pmi": COUNT, "rubric_likelihood": COUNT}
    judges.asked, judges.killed_in = {}, "rubric_likelihood"
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "run", curator="combined")
    assert judges.asked == {"pmi": COUNT, "rubric_likelihood": SHARD}
    judges.asked, judges.killed_in = {}, ""
    assert score(tmp_path / "run", curator="combined")[0] == expected
    assert judges.asked == {"rubric_likelihood": COUNT - SHARD}


def test_combined_ranks_all_pairs_of_all_shards_and_keeps_who_judged(tmp_path, judges):
    rows, _ = score(tmp_path, curator="combined")
    made, candidates = context(tmp_path)
    pairs = curate._gated(made, candidates)
    expected = combine({part: [opinion(part, pair) for pair in pairs] for part in COMBINED})
    assert [(r["candidate_id"], r["value"], r["detail"]) for r in rows] == [
        (rating.id, rating.value, rating.detail) for rating in expected
    ]
    assert {row["curator"] for row in rows} == {"combined"}
    assert {row["model_hash"] for row in rows} == {made.base.hash}


def test_a_sweep_over_curators_scores_each_pair_once_by_each(tmp_path, judges):
    score(tmp_path, curator="combined")
    before = dict(judges.asked)
    for curator, also in (("pmi", ("rubric_likelihood",)), ("rubric_likelihood", ("combined",))):
        _, folder = score(tmp_path, curator=curator, also=also)
        assert folder.redone == 0
    assert judges.asked == before


@pytest.mark.parametrize("limit", [0, 5])
@pytest.mark.parametrize(
    ("curator", "also"),
    [
        ("combined", ("pmi",)),
        ("pmi", ("combined", "rubric_likelihood")),
        ("rubric", ("rubric_likelihood", "combined")),
    ],
)
def test_every_parent_of_scores_stands_in_the_manifest(tmp_path, judges, limit, curator, also):
    score(tmp_path, curator=curator, also=also, also_limit=limit)
    found = entries(tmp_path)
    known = {entry["hash"] for entry in found.values()} | {load_model("tiny-random").hash}
    assert all(set(entry["parents"]) <= known for entry in found.values())
    assert found["round_1/scores"]["rows"] == COUNT
    assert found["round_1/scores"]["fields"]["curator"] == curator
