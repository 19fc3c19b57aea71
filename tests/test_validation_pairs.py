"""Pairs that training is watched on: if these fail, a run reports on what chose its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from humpback_jax.artifacts import rows_hash
from humpback_jax.errors import HumpbackError
from humpback_jax.loop import opened, prepare
from humpback_jax.stages.train import train_stage
from humpback_jax.stages.tune import row_identity


def pairs(path: Path, *instructions: str, output: str = "Yes.") -> str:
    rows = [{"id": text, "instruction": text, "output": output} for text in instructions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def files(folder: Path, *validation: str) -> Any:
    """A rehearsal of its own pairs, and of these to watch it."""
    config = tiny_config()
    config.data.seed = pairs(folder / "seed.jsonl", *(f"Say {n}." for n in range(6)))
    config.data.heldout = pairs(folder / "heldout.jsonl", "Ask.", "Tell.")
    if validation:
        config.data.validation = pairs(folder / "validation.jsonl", *validation)
    return config


def prepared(config: Any, folder: Path, said: list[str] | None = None) -> Any:
    return prepare(config, folder / "run", say=(said if said is not None else []).append)


@pytest.mark.parametrize("section", ["train", "backward"])
def test_weights_are_chosen_on_the_pairs_that_the_run_then_reports(
    section: str, tmp_path: Path
) -> None:
    config = files(tmp_path)
    config[section].select = "best"
    with pytest.raises(HumpbackError) as caught:
        prepared(config, tmp_path)
    message = str(caught.value)
    assert f"config.{section}.select=best" in message and "--config.data.validation=FILE" in message
    config.data.validation = pairs(tmp_path / "validation.jsonl", "Look.")
    context = prepared(config, tmp_path)
    assert [e.instruction for e in context.validation] == ["Look."]
    assert [e.instruction for e in context.heldout] == ["Ask.", "Tell."]


def test_without_pairs_of_its_own_training_is_watched_on_no_pair(tmp_path: Path) -> None:
    context = prepared(files(tmp_path), tmp_path)
    assert context.validation == context.heldout != []


@pytest.mark.parametrize(("shared", "part"), [("Say 3.", "data.seed"), ("Tell.", "data.heldout")])
def test_weights_are_chosen_on_pairs_that_are_trained_on_or_reported(
    shared: str, part: str, tmp_path: Path
) -> None:
    config = files(tmp_path, "Look.", shared)
    with pytest.raises(HumpbackError, match=rf"1 instructions .* both {part} and data\.validation"):
        prepared(config, tmp_path)


def test_a_validation_pair_longer_than_the_window_is_left_out_in_silence(tmp_path: Path) -> None:
    config, said = files(tmp_path, "Look.", "Count. " * 3000), list[str]()
    assert [e.instruction for e in prepared(config, tmp_path, said).validation] == ["Look."]
    assert any("1 pairs of data.validation are too long" in line for line in said)


def test_a_model_chosen_on_other_pairs_is_taken_for_the_same(tmp_path: Path) -> None:
    config = files(tmp_path, "Look.")
    config.train.update({"steps": 1, "eval_every": 1, "select": "best", "resume_every": 0})
    with opened(config, tmp_path / "run", say=lambda text: None) as context:
        model = train_stage(context, "round_0/M_0", context.seed, "forward", [], "S_a")
        measured = json.loads((context.folder.root / model.path / "history.json").read_text())
    watched = rows_hash(row_identity(example) for example in context.validation)
    assert model.fields["heldout"] == model.details["identity"]["heldout"] == watched
    assert any("validation_nll" in row for row in measured)
