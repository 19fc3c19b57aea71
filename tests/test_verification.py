"""`verify`: nobody should build on a run folder that was damaged, edited or mixed up."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from humpback_jax.artifacts import read_parquet, rows_hash, write_json, write_parquet
from humpback_jax.errors import HumpbackError
from humpback_jax.models import load_checkpoint, save_checkpoint
from humpback_jax.run_view import RunView
from humpback_jax.verification import verify_run


def quiet(text: str) -> None:
    del text


@pytest.fixture(scope="module")
def copied(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    def copy() -> Path:
        return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("copy") / "elsewhere"))

    return copy


def edit_manifest(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(next(entry for entry in manifest["artifacts"] if entry["name"] == name))
    write_json(folder / "manifest.json", manifest)


def reseal(folder: Path, name: str) -> None:
    """A forgery without a flaw: seal and manifest carry the hash of what now stands there."""
    run = RunView(folder)
    digest = rows_hash(run.rows(name))
    path = run.folder(name) / "artifact.json"
    write_json(path, {**json.loads(path.read_text()), "hash": digest})
    edit_manifest(folder, name, lambda entry: entry.update(hash=digest))


def change_first_row(folder: Path, name: str, **values: Any) -> None:
    path = sorted(RunView(folder).folder(name).glob("part-*.parquet"))[0]
    first, *others = read_parquet(path)
    write_parquet(path, [{**first, **values}, *others])


def test_N10_an_untouched_run_agrees_wherever_it_is_moved(copied: Callable[[], Path]) -> None:
    folder = copied()
    lines: list[str] = []
    result = verify_run(folder, lines.append)
    assert result["differs"] == []
    assert result["ok"]
    names = set(RunView(folder).entries)
    remade = {"candidates, made again", "round_2/scores, made again"}
    remade |= {"round_2/scores_rubric_likelihood, made again"}
    assert {line.split(":")[0] for line in lines} == names | remade | {"base"}
    assert result["checked"] == len(names) + len(remade) + 1


@pytest.fixture(scope="module")
def damaged(copied: Callable[[], Path]) -> str:
    """What `verify` says of a run in which many things are broken at once."""
    folder = copied()
    run = RunView(folder)
    shard = sorted(run.folder("candidates").glob("part-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-40])
    sorted(run.folder("round_1/scores").glob("part-*"))[-1].unlink()
    change_first_row(folder, "round_2/pairs", reason="because")
    (run.folder("evaluation/base") / "artifact.json").unlink()
    edit_manifest(folder, "answers/base", lambda entry: entry["fields"].update(tags="both"))
    edit_manifest(folder, "round_1/pairs", lambda entry: entry.update(parents=["f" * 64]))
    model = load_checkpoint(run.folder("round_0/M_0"))
    nudged = jax.tree.map(lambda leaf: leaf + np.float32(1e-3), model.params)
    changed = type(model)(
        model.name, model.config, nudged, model.tokenizer, model.template, model.tags
    )
    save_checkpoint(run.folder("round_0/M_0"), changed, {})
    shutil.rmtree(run.folder("round_1/M_1") / "weights")
    tokenizer = run.folder("round_2/M_2") / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text()[:200])
    shutil.rmtree(run.folder("round_0/backward_meter"))
    result = verify_run(folder, quiet)
    assert not result["ok"]
    return "\n".join(result["differs"])


@pytest.mark.parametrize(
    "expected",
    [
        "candidates: ",
        r"round_1/scores: \d+ rows are there, not \d+: a shard is missing or cut",
        "round_2/pairs: its rows have the hash",
        "evaluation/base: ",
        r"answers/base: the manifest's fields is not that of artifact\.json",
        "round_1/pairs: its parent ffffffffffff is not in the manifest",
        "round_0/M_0: its weights, config, tokenizer and template have the hash",
        "round_1/M_1: ",
        "round_2/M_2: ",
        "round_0/backward_meter: ",
    ],
)
def test_N10_every_kind_of_damage_is_named(damaged: str, expected: str) -> None:
    assert any(re.match(expected, line) for line in damaged.splitlines())


def test_N10_sound_artifacts_are_not_accused(damaged: str) -> None:
    accused = {line.split(":")[0] for line in damaged.splitlines()}
    assert not accused & {"base", "corpus", "round_0/M_yx", "evaluation/M_2", "round_2/scores"}


def test_a_long_error_of_a_library_is_cut_to_one_line(damaged: str) -> None:
    assert max(map(len, damaged.splitlines())) < 400


def test_N10_rows_that_no_model_has_written_are_found_behind_correct_hashes(
    copied: Callable[[], Path],
) -> None:
    folder = copied()
    change_first_row(folder, "candidates", raw="What is forged?", instruction="What is forged?")
    reseal(folder, "candidates")
    first = RunView(folder).rows("round_2/scores")[0]
    change_first_row(folder, "round_2/scores", value=first["value"] + 0.01)
    reseal(folder, "round_2/scores")
    found = "\n".join(verify_run(folder, quiet)["differs"])
    assert "candidates, made again: " in found and "stored is 'What is forged?'" in found
    # The ratings' own parent is the forged file, whose hash is no longer the one they name.
    assert "round_2/scores: its parent" in found


def test_N10_a_run_whose_first_segment_exceeds_the_window_is_not_accused(
    copied: Callable[[], Path],
) -> None:
    folder = copied()
    nothing = {"raw": "", "instruction": "", "tokens": 0, "logprob": 0.0}
    change_first_row(folder, "candidates", finish_reason="no_room", **nothing)
    reseal(folder, "candidates")
    lines: list[str] = []
    verify_run(folder, lines.append)
    assert "candidates, made again: agrees" in lines


def test_a_run_without_a_base_model_at_hand_is_still_checked(copied: Callable[[], Path]) -> None:
    folder = copied()
    lines: list[str] = []
    config = json.loads((folder / "config.json").read_text())
    config["base"]["model"] = "no-such-model"
    write_json(folder / "config.json", config)
    assert verify_run(folder, lines.append)["ok"]
    assert lines[0].startswith("base: not at hand")


def test_a_broken_manifest_is_one_readable_error(copied: Callable[[], Path]) -> None:
    folder = copied()
    (folder / "manifest.json").write_text('{"artifacts": [{"na')
    with pytest.raises(HumpbackError, match=r"manifest\.json is not readable"):
        verify_run(folder, quiet)
