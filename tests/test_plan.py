"""`run --dry-run`: users decide on it whether to spend the compute."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from humpback_jax.errors import HumpbackError
from humpback_jax.plan import dry_run
from humpback_jax.run_view import RunView


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """The plan of the shared rehearsal, its printed lines; temporary files must be gone."""
    lines: list[str] = []
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.chdir(folder)
        plan = dry_run(tiny_config(), lines.append)
    assert not list(folder.iterdir()), "a plan must leave nothing behind"
    return plan, lines


def test_the_plan_names_every_stage_that_the_run_then_makes(
    planned: tuple[dict[str, Any], list[str]], tiny_run: Path
) -> None:
    stages = [stage["name"] for stage in planned[0]["stages"]]
    quick = ("corpus_rejects", "round_1/pairs", "round_2/pairs")  # no model runs for these
    made = [name for name in RunView(tiny_run).entries if name not in quick]
    assert stages == made


def test_what_can_be_counted_beforehand_is_exact(
    planned: tuple[dict[str, Any], list[str]], tiny_run: Path
) -> None:
    run = RunView(tiny_run)
    plan = {stage["name"]: stage for stage in planned[0]["stages"]}
    for name in ("round_0/M_yx", "round_0/M_0"):
        log = [row for row in run.history(name) if "loss" in row]
        assert plan[name]["tokens"] == sum(row["tokens"] for row in log)
        assert plan[name]["steps"] == len(log)
        assert plan[name]["rows"] == run.details(name)["examples"]
        assert not plan[name]["expected"]
    for name in ("corpus", "candidates", "evaluation/base", "answers/M_2"):
        assert plan[name]["rows"] == run.entries[name]["rows"]
    assert planned[0]["documents"] == run.details("corpus")["documents"]
    assert plan["round_2/M_2"]["steps"] == run.details("round_2/M_2")["steps"]
    assert plan["round_2/M_2"]["expected"]


def test_the_table_shows_every_stage_and_the_sum(
    planned: tuple[dict[str, Any], list[str]],
) -> None:
    plan, lines = planned
    assert [line.split()[0] for line in lines[1:-2]] == [s["name"] for s in plan["stages"]]
    assert plan["seconds"] == pytest.approx(sum(s["seconds"] for s in plan["stages"]), abs=0.1)
    assert plan["seconds"] > 0
    assert max(map(len, lines[:-1])) <= 80


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("curator", "magic", "curator='magic' is unknown"),
        ("select", "best", "'best' is unknown"),
        ("temperature", -1.0, "temperature=-1.0 must be at least 0"),
    ],
)
def test_a_config_that_would_fail_after_hours_fails_in_the_plan(
    key: str, value: Any, message: str
) -> None:
    config = tiny_config()
    with config.unlocked():
        config.curate[key] = value
        config.curate.also = ("rubric",)
    with pytest.raises(HumpbackError, match=message):
        dry_run(config, lambda text: None)


def test_too_little_data_fails_in_the_plan() -> None:
    config = tiny_config()
    config.train.batch_examples = 500
    with pytest.raises(HumpbackError, match="fewer than one batch"):
        dry_run(config, lambda text: None)


@pytest.mark.parametrize("curator", ["combined", "pmi"])
def test_the_plan_counts_what_combined_reads_once_and_where_it_is_read(curator: str) -> None:
    config = tiny_config()
    with config.unlocked():
        others = sorted({"combined", "pmi", "rubric_likelihood"} - {curator})
        config.curate.update({"curator": curator, "also": tuple(others)})
        config.rounds = 1
    stages = dry_run(config, lambda text: None)["stages"]
    costs = {s["name"]: s["cost"] for s in stages if "/scores" in s["name"]}
    assert len(costs) == len([s for s in stages if "/scores" in s["name"]]) == 3
    name = {other: f"round_1/scores_{other}" for other in others} | {curator: "round_1/scores"}
    assert costs[name["combined"]] == 0
    assert costs[name["pmi"]] > 0 and costs[name["rubric_likelihood"]] > 0
