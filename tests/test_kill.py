"""A run may be killed at any moment and started again: the result is the unbroken run's."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from humpback_jax import loop
from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.metrics import MetricsLog

ROOT = Path(__file__).parent.parent
PARTS = 6  # of a run; it is killed at a moment of each
COMMAND = [sys.executable, "-m", "humpback_jax", "run", "--config=configs/tiny.py", "--json"]


def start(workdir: Path, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}", *extra],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ,
    )


def finish(workdir: Path, *extra: str) -> dict:
    process = start(workdir, *extra)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def hashes(workdir: Path) -> dict[str, str]:
    manifest = json.loads((workdir / "manifest.json").read_text())
    return {entry["name"]: entry["hash"] for entry in manifest["artifacts"]}


def kill_after(process: subprocess.Popen[str], moment: float) -> None:
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float, Path]:
    """Hashes of a run that nothing disturbed, its duration with warm caches, and its folder."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(folder / "cold")
    started = time.monotonic()
    finish(folder / "run")
    duration = time.monotonic() - started
    assert hashes(folder / "cold") == hashes(folder / "run"), "two runs differ without any kill"
    return hashes(folder / "run"), duration, folder / "run"


def kill_and_check(unbroken: tuple[dict[str, str], float, Path], moment: float, to: Path) -> None:
    expected, duration, _ = unbroken
    kill_after(start(to), moment * duration)
    finish(to)
    assert hashes(to) == expected


def test_killed_run_continues_to_the_same_artifacts(
    unbroken: tuple[dict[str, str], float, Path], tmp_path: Path
) -> None:
    kill_and_check(unbroken, random.random(), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_run_continues_to_the_same_artifacts_at_many_moments(
    unbroken: tuple[dict[str, str], float, Path], part: int, tmp_path: Path
) -> None:
    moment = (part + random.Random(100 + part).random()) / PARTS
    kill_and_check(unbroken, moment, tmp_path / "run")


def test_training_killed_after_a_saved_state_goes_on_from_there(
    unbroken: tuple[dict[str, str], float, Path], tmp_path: Path
) -> None:
    expected, duration, _ = unbroken
    workdir = tmp_path / "run"
    process = start(workdir)
    deadline = time.monotonic() + 10 * duration
    # Orbax writes under another name first.
    while not list(workdir.glob(f"resume/*/{'[0-9]' * 8}/commit_success.txt")):
        assert process.poll() is None and time.monotonic() < deadline, "no state was ever saved"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["stage"] == "round_0/M_yx" and "loss" in row]
    assert steps.count(1) == 1, "training started over"
    assert hashes(workdir) == expected


def test_a_finished_run_redoes_nothing(unbroken: tuple[dict[str, str], float, Path]) -> None:
    _, _, workdir = unbroken
    assert finish(workdir)["redone"] == 0


def test_a_log_setting_redoes_nothing(unbroken: tuple[dict[str, str], float, Path]) -> None:
    _, _, workdir = unbroken
    assert finish(workdir, "--config.train.log_every=2")["redone"] == 0


def test_another_selection_keeps_what_does_not_depend_on_it(
    unbroken: tuple[dict[str, str], float, Path], tmp_path: Path
) -> None:
    expected, _, workdir = unbroken
    shutil.copytree(workdir, tmp_path / "run")
    finish(tmp_path / "run", "--config.curate.fraction=0.9")
    found = hashes(tmp_path / "run")
    kept = ("corpus", "round_0/M_yx", "round_0/M_0", "candidates", "round_1/scores")
    assert all(found[name] == expected[name] for name in kept)
    assert found["round_1/pairs"] != expected["round_1/pairs"]
    assert found["round_1/M_1"] != expected["round_1/M_1"]


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.slow
def test_training_killed_while_its_state_is_removed_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []

    def delete_and_die(folder: ResumeFolder) -> None:
        shutil.rmtree(folder.folder)
        removed.append(folder.folder)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ResumeFolder, "delete", delete_and_die)
        with pytest.raises(Killed):
            loop.run(tiny_config(), tmp_path / "run", say=lambda text: None)
    steps = (tmp_path / "run" / "metrics.jsonl").read_text()
    said: list[str] = []
    loop.run(tiny_config(), tmp_path / "run", say=said.append)
    assert removed and any(line.startswith("round_0/M_yx: already done") for line in said)
    again = (tmp_path / "run" / "metrics.jsonl").read_text().removeprefix(steps)
    assert '"round_0/M_yx"' not in again


@pytest.mark.slow
def test_fresh_never_goes_on_from_an_earlier_attempts_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(MetricsLog):
        def write(self, stage: str, row: dict[str, Any]) -> None:
            super().write(stage, row)
            if row["step"] == 5:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "MetricsLog", Dying)
        with pytest.raises(Killed):
            loop.run(tiny_config(), tmp_path / "run", say=lambda text: None)
    earlier = sorted((tmp_path / "run" / "resume").glob(f"*/{'[0-9]' * 8}/commit_success.txt"))
    assert earlier, "no state was saved"
    (tmp_path / "run" / "metrics.jsonl").unlink()
    loop.run(tiny_config(), tmp_path / "run", fresh=True, say=lambda text: None)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").open()]
    assert next(row["step"] for row in rows if row["stage"] == "round_0/M_yx") == 1
    assert all(path.exists() for path in earlier)


@pytest.mark.slow
def test_fresh_deletes_nothing_and_gives_the_same(
    unbroken: tuple[dict[str, str], float, Path], tmp_path: Path
) -> None:
    expected, _, workdir = unbroken
    shutil.copytree(workdir, tmp_path / "run")
    before = {path.name for path in (tmp_path / "run" / "store").iterdir()}
    summary = finish(tmp_path / "run", "--fresh")
    after = {path.name for path in (tmp_path / "run" / "store").iterdir()}
    assert summary["redone"] > 0
    assert before < after
    assert hashes(tmp_path / "run") == expected
