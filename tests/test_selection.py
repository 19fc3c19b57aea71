"""Selection: if these fail, rejected pairs train the next model, or good ones silently do not."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from humpback_jax.artifacts import Artifact, RunFolder, Stage
from humpback_jax.compute import choose_compute
from humpback_jax.config import apply_tiny, default_config
from humpback_jax.errors import HumpbackError
from humpback_jax.models import load_model
from humpback_jax.records import Candidate, Score, Segment
from humpback_jax.stages.augment import augment_stage, gate
from humpback_jax.stages.context import Context
from humpback_jax.stages.curate import choose, score_stage, select_stage, selected_examples
from humpback_jax.text.template import Template

GOOD = "What makes water boil at a lower temperature?"


def section(**changes: Any) -> Any:
    curate = default_config().curate
    curate.update(changes)
    return curate


def candidate(name: str, instruction: str = GOOD, finish: str = "stop", y: str = "y") -> Candidate:
    return Candidate(name, name, instruction, y, instruction, 0, finish, -1.0, 5, "m", "t", "{}")


RATED = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.sampled_from([1.0, 2.0, 4.0, 4.5, 5.0]),
    max_size=20,
)


@given(RATED, st.sampled_from([1.0, 4.0, 4.5, 5.0]))
def test_an_absolute_cut_takes_exactly_the_scores_at_or_above_it(rated, threshold):
    chosen, rule = choose(rated, section(select="absolute", threshold=threshold))
    assert chosen == {name for name, score in rated.items() if score >= threshold}
    assert rule == f"score >= {threshold:g}"


@given(RATED, st.floats(0.01, 1.0))
def test_a_fraction_takes_the_best_and_at_least_one(rated, fraction):
    chosen, _ = choose(rated, section(select="top_fraction", fraction=fraction))
    assert len(chosen) == min(max(round(fraction * len(rated)), 1), len(rated))
    rest = [score for name, score in rated.items() if name not in chosen]
    assert not chosen or not rest or min(rated[name] for name in chosen) >= max(rest)


@given(RATED, st.integers(1, 30), st.randoms())
def test_ties_are_broken_by_id_whatever_the_order_of_the_rows(rated, count, random):
    shuffled = list(rated.items())
    random.shuffle(shuffled)
    chosen, _ = choose(rated, section(select="count", count=count))
    assert chosen == choose(dict(shuffled), section(select="count", count=count))[0]
    assert len(chosen) == min(count, len(rated))
    for name in chosen:
        assert all(o in chosen for o in rated if rated[o] == rated[name] and o < name)


def test_an_unknown_rule_is_refused():
    with pytest.raises(HumpbackError, match=r"curate\.select"):
        choose({"a": 1.0}, section(select="best"))


def test_gates_refuse_each_kind_of_broken_instruction():
    template = load_model("tiny-random").template
    document = "Pressure falls with height, and with it the point at which water boils. " * 3
    echo = "Which instruction or question would somebody have given?"
    cases = {
        None: candidate("a", GOOD, y=document),
        "instruction_unfinished": candidate("a", GOOD, "length"),
        "instruction_too_short": candidate("a", "Why?"),
        "instruction_too_long": candidate("a", "why " * 300),
        "instruction_echoes_prompt": candidate("a", echo),
        "instruction_copies_document": candidate("a", document[:60], y=document),
    }
    for reason, broken in cases.items():
        assert gated(broken, template, 10) == reason
    assert gated(candidate("a", ""), template, 0) == "instruction_too_short"
    assert gated(candidate("a", document[:39], y=document), template, 10) is None


def gated(c: Candidate, template: Template, min_chars: int) -> str | None:
    section = default_config().augment
    section.update({"min_chars": min_chars, "max_chars": 800})
    return gate(c.instruction, c.response, c.finish_reason, template, section)


def context_at(root: Path, **changes: Any) -> Context:
    config = default_config()
    apply_tiny(config)
    config.curate.update(changes)
    folder = RunFolder(root / "run", say=lambda text: None)
    compute = choose_compute("float32", 4)
    log: Any = None  # selection logs nothing
    base = load_model("tiny-random")
    return Context(config, folder, compute, base, [], [], log, lambda text: None)


def stored(context: Context, name: str, values: list[Any]) -> Artifact:
    made = [dataclasses.asdict(value) for value in values]
    stage = Stage(name, 1, {"id": str(made)})
    return context.folder.rows(name, name, stage, [], 1, lambda _: made)


def selected(root: Path, rows: list[tuple[Candidate, float | None]], **changes: Any) -> Artifact:
    context = context_at(root, **changes)
    candidates = stored(context, "candidates", [c for c, _ in rows])
    passing = [(c, v) for c, v in rows if gated(c, context.base.template, 0) is None]
    scores = stored(context, "scores", [Score(c.id, "x", v, "{}", "m", "t") for c, v in passing])
    artifact = select_stage(context, "round_1/pairs", candidates, scores)
    artifact.details["all"] = context.folder.read(artifact)
    return artifact


@pytest.mark.parametrize("curator", ["pmi", "rubric_likelihood", "combined"])
def test_a_pair_longer_than_the_window_stops_no_scoring_and_is_never_trained_on(curator, tmp_path):
    context = context_at(tmp_path, curator=curator, select="top_fraction", fraction=1.0)
    rows = [candidate("short"), candidate("long", y="y" * 4090), candidate("other", GOOD + "?")]
    candidates = stored(context, "candidates", rows)
    scores = score_stage(context, 1, context.base_artifact, candidates, curator)
    values = {row["candidate_id"]: row["value"] for row in context.folder.read(scores)}
    assert values["long"] is None and None not in (values["short"], values["other"])
    pairs = context.folder.read(select_stage(context, "round_1/pairs", candidates, scores))
    assert {row["id"]: row["selected"] for row in pairs} == {
        "short": True,
        "long": False,
        "other": True,
    }


def test_candidates_depend_on_no_setting_of_the_rating_that_their_key_leaves_out(tmp_path):
    segment = Segment("s", "d", 0, 3000, "", "y" * 3000, "web", "1")
    shorts: dict[int, str] = {}
    for room in (16, 1000):
        context = context_at(tmp_path / str(room), max_new_tokens=room)
        corpus = stored(context, "corpus", [segment])
        made = augment_stage(context, context.base_artifact, corpus)
        shorts[room] = context.folder.read(made)[0]["finish_reason"]
    assert shorts[16] == shorts[1000] != "no_room"


def test_every_candidate_gets_a_decision_with_its_reason_and_unrated_ones_never_train(tmp_path):
    rows = [
        (candidate("good"), 5.0),
        (candidate("best", GOOD + "?"), 6.0),
        (candidate("poor"), 1.0),
        (candidate("unparsed"), None),
        (candidate("broken"), math.nan),
        (candidate("cut", GOOD, "length"), 9.0),
    ]
    pairs = selected(tmp_path, rows, select="top_fraction", fraction=1.0)
    decisions = {row["id"]: (row["selected"], row["reason"]) for row in pairs.details["all"]}
    assert [name for name, (chosen, _) in decisions.items() if chosen] == ["good", "best", "poor"]
    assert decisions["unparsed"] == decisions["broken"] == (False, "no_rating")
    assert decisions["cut"] == (False, "instruction_unfinished")
    assert pairs.rows == len(rows) and pairs.details["selected"] == 3
    assert sum(pairs.details["reasons"].values()) == len(rows)
    pairs = selected(tmp_path, rows, select="absolute", threshold=4.0)
    examples = selected_examples(pairs.details["all"])
    assert Counter(e.source for e in examples) == {"web": 2}
    assert [(e.instruction, e.response) for e in examples] == [(GOOD, "y"), (GOOD + "?", "y")]


def test_a_limit_that_the_selection_does_not_read_makes_pairs_and_models_anew(tmp_path):
    rows = [(candidate("good"), 5.0), (candidate("poor"), 1.0)]
    told = {"select": "top_fraction", "fraction": 0.5}
    first = selected(tmp_path, rows, **told)
    for field, value in (("threshold", 2.0), ("count", 7)):
        assert selected(tmp_path, rows, **told, **{field: value}).path == first.path
    assert selected(tmp_path, rows, **{**told, "fraction": 1.0}).path != first.path


def test_nothing_selected_is_an_error_that_says_what_to_do_and_keeps_the_scores(tmp_path):
    with pytest.raises(HumpbackError, match=r"none of 1 candidates.*Lower curate\.threshold"):
        selected(tmp_path, [(candidate("a"), 3.0)], select="absolute", threshold=5.0)
    assert "scores" in (tmp_path / "run" / "manifest.json").read_text()
    with pytest.raises(HumpbackError, match="no_rating"):
        selected(tmp_path / "b", [(candidate("a"), None)], select="top_fraction")
