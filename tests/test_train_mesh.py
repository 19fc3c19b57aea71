"""Training on meshes: if these fail, the number of chips decides what a model learns."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from eight_heads import eight_headed
from jax.experimental import multihost_utils
from test_mesh import several, start_several

from humpback_jax.checkpoint import load_params
from humpback_jax.errors import HumpbackError, Preempted
from humpback_jax.metrics import logged_rows
from humpback_jax.model.llama import flatten
from humpback_jax.models import load_checkpoint, save_checkpoint
from humpback_jax.parallel import preemption
from humpback_jax.parallel.mesh import parse_mesh, training_mesh
from humpback_jax.parallel.preemption import StopSignal

ROOT = Path(__file__).parent.parent
VARIANTS = "accumulated,scan_and_options,dropout,dora_on_int8"
ONE = "data=1"
SOME = ("fsdp=8", "data=2,fsdp=2,tensor=2")
ALL = (
    *("data=8", "fsdp=8", "tensor=8,data=1", "data=2,fsdp=4", "fsdp=4,tensor=2,data=1"),
    *("data=4,tensor=2", "fsdp=2,tensor=4,data=1", "data=2,fsdp=2,tensor=2", "fsdp=2,data=1"),
    *("data=4,fsdp=2", "data=2,tensor=4"),
)


@functools.cache
def on_meshes(model: str, steps: int, variants: str, *meshes: str) -> dict[str, Any]:
    """What `tests/train_on_meshes.py` prints."""
    done = subprocess.run(
        [sys.executable, "train_on_meshes.py", model, str(steps), variants, *meshes],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_alike(found: dict[str, Any], tolerance: float) -> None:
    continued = found.pop("continued")
    for variant, meshes in found.items():
        expected = meshes[ONE]
        assert expected["loss"][-1] < expected["loss"][0], "nothing was learnt"
        for mesh, figures in meshes.items():
            # The first step is a function of the rows alone; later ones carry rounding along.
            name = f"{variant} on {mesh}"
            assert figures["loss"][0] == pytest.approx(expected["loss"][0], rel=tolerance), name
            assert figures["loss"] == pytest.approx(expected["loss"], rel=10 * tolerance), name
            assert figures["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=1e-4)
            assert figures["validation"] == pytest.approx(expected["validation"], rel=1e-5), name
            assert figures["apart"] <= 1e-2, name
    for change, figures in continued.items():
        before, _, after = change.partition(" then ")
        assert figures["apart"] == 0 if before == after else figures["apart"] <= 1e-2, change
        assert figures["loss"] == pytest.approx(figures["unbroken"], rel=1e-5), change


def test_chips_that_train_together_learn_something_else_than_one() -> None:
    check_alike(dict(on_meshes("tiny", 4, "full", ONE, *SOME)), 1e-6)


@pytest.mark.slow
def test_on_some_mesh_shape_training_learns_something_else() -> None:
    check_alike(dict(on_meshes("tiny", 4, "full", ONE, *ALL)), 1e-6)


@pytest.mark.slow
def test_noise_accumulation_or_an_adapter_is_another_one_on_some_mesh() -> None:
    check_alike(dict(on_meshes("tiny", 4, VARIANTS, ONE, *SOME, "data=4,tensor=2")), 1e-6)


@pytest.mark.slow
@pytest.mark.real_model
def test_the_default_model_s_loss_depends_on_the_number_of_chips() -> None:
    """Its 9 heads and 3 key-value heads divide by no mesh here."""
    meshes = (ONE, "fsdp=4,data=1", "data=2,fsdp=2,tensor=2")
    found = on_meshes("smollm2-135m-instruct", 1, "default_model", *meshes)["default_model"]
    for mesh in meshes[1:]:
        assert found[mesh]["loss"] == pytest.approx(found[ONE]["loss"], rel=1e-5), mesh
        assert found[mesh]["grad_norm"] == pytest.approx(found[ONE]["grad_norm"], rel=1e-4), mesh


def test_a_mesh_for_training_larger_than_the_machine_is_an_error() -> None:
    with pytest.raises(HumpbackError, match="does not fit"):
        training_mesh(parse_mesh("data=64"), 64)
    assert training_mesh(None, 64) is None, "one CPU trains alone"


DATA = [{"instruction": f"Say {i}", "output": f"{i} " * (i % 9 + 1)} for i in range(64)]
TRAIN = ["train", "--model=tiny-random", "--config.train.batch_examples=8"]
TRAIN += ["--config.train.row_tokens=256", "--config.compute.precision=float32"]
TRAIN += ["--config.train.learning_rate=1e-3", "--config.train.dropout=0.1"]
NO_RATE = ["--config.train.learning_rate=0", "--config.train.end_learning_rate=0"]


def data_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DATA), encoding="utf-8")
    return path


def eight_heads(folder: Path) -> str:
    """The argument that names a model whose heads every mesh divides."""
    save_checkpoint(folder / "eight_heads", eight_headed(), {})
    return f"--model={folder / 'eight_heads'}"


def weights(folder: Path) -> dict[Any, np.ndarray]:
    return {
        path: np.asarray(leaf) for path, leaf in flatten(load_params(folder / "weights")).items()
    }


def apart(left: Path, right: Path) -> float:
    a, b, start = weights(left), weights(right), weights(left.parent / "start")
    change = sum(((a[k] - start[k]).astype(np.float64) ** 2).sum() for k in a)
    return float(sum(((a[k] - b[k]).astype(np.float64) ** 2).sum() for k in a) / change) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=8,data=1"])
def test_two_hosts_train_another_model_than_one(mesh: str, tmp_path: Path) -> None:
    """Two processes with four devices each. `start` has learnt nothing."""
    rows = data_file(tmp_path)
    common = [*TRAIN, eight_heads(tmp_path), f"--data={rows}", "--config.train.steps=6"]
    common += [f"--heldout={rows}", "--config.train.eval_every=3"]
    several(1, [*common, *NO_RATE, f"--out={tmp_path / 'start'}"], 1)
    several(1, [*common, f"--out={tmp_path / 'alone'}"], 1)
    both = [*common, f"--out={tmp_path / 'both'}", f"--config.compute.mesh={mesh}"]
    several(2, [*both, "--config.train.resume_every=1"], 4)
    assert apart(tmp_path / "alone", tmp_path / "both") <= 1e-2
    alone, together = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("alone", "both")
    )
    for name, count in (("loss", 6), ("validation_nll", 2), ("validation_nll/seed", 2)):
        expected = [row[name] for row in alone if name in row]
        assert len(expected) == count
        found = [row[name] for row in together if name in row]
        assert found == pytest.approx(expected, rel=1e-5)
        assert name != "loss" or found[0] == pytest.approx(expected[0], rel=1e-6)
    saved = load_checkpoint(tmp_path / "both")
    described = json.loads((tmp_path / "both" / "humpback.json").read_text())["hash"]
    assert described == saved.hash, "hashed in parts, the weights are others"


OWN = """
import os, sys
from humpback_jax.cli import main
sys.exit(main([word.replace("OWN", os.environ["JAX_PROCESS_ID"]) for word in sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("other", "named"),
    [("--data={folder}/OWN/rows.jsonl", "data"), ("--config.train.accumulation=1OWN", "settings")],
)
def test_hosts_train_together_on_other_rows(other: str, named: str, tmp_path: Path) -> None:
    """A file that was not copied to a host: its gradients would be of other batches."""
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
        rows = data_file(tmp_path / f"{number}")
    rows.write_text("\n".join(rows.read_text().splitlines()[:60]))  # the last host's
    command = [*TRAIN, f"--data={tmp_path}/0/rows.jsonl", f"--out={tmp_path}/OWN/model"]
    command += ["--config.train.steps=2", "--config.compute.mesh=data=3"]
    command = [word for word in command if not other.startswith(word.partition("=")[0] + "=")]
    command += [other.format(folder=tmp_path)]
    for process in start_several(3, command, 1, ["-c", OWN]):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 1
        line = errors.splitlines()[-1]
        assert f"another {named} than process 0" in line and "same command" in line, errors
        assert ("process 2 has" if named == "data" else "processes 1, 2 have") in line


SLOW = """
import os, sys, time
from humpback_jax.cli import main
from humpback_jax.training import trainer
if os.environ["JAX_PROCESS_ID"] == "1":
    trainer.return_free_memory = lambda: time.sleep(40)  # what follows the compilation of a step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_host_that_compiles_for_long_ends_the_others(tmp_path: Path) -> None:
    command = [*TRAIN, f"--data={data_file(tmp_path)}", f"--out={tmp_path / 'model'}"]
    command += ["--config.train.steps=2", "--config.compute.mesh=data=2,fsdp=2"]
    for process in start_several(2, command, 2, ["-c", SLOW]):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


def steps_in(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def preempt(processes: list[subprocess.Popen[str]], told: subprocess.Popen[str], log: Path) -> None:
    """SIGTERM to one process between two steps; all of them end with exit code 143."""
    while told.poll() is None and not (log.exists() and len(steps_in(log)) > 2):
        time.sleep(0.02)
    told.send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, errors[-3000:]
        assert "run it again to continue" in errors


@pytest.mark.parametrize(
    ("hosts", "devices", "mesh", "steps"),
    [
        (1, 1, "auto", 200),
        pytest.param(2, 4, "data=2,fsdp=2,tensor=2", 60, marks=pytest.mark.slow),
    ],
)
def test_a_preempted_run_loses_a_step(
    hosts: int, devices: int, mesh: str, steps: int, tmp_path: Path
) -> None:
    """The last host alone hears SIGTERM, and the same command goes on where all of them stopped."""
    common = [*TRAIN, f"--data={data_file(tmp_path)}", f"--config.train.steps={steps}"]
    common += [f"--config.compute.mesh={mesh}"]
    command = [*common, f"--out={tmp_path / 'model'}"]
    log = tmp_path / "model" / "metrics.jsonl"
    processes = start_several(hosts, command, devices)
    preempt(processes, processes[-1], log)
    assert steps_in(log)[-1] < steps
    several(hosts, command, devices)
    assert steps_in(log) == list(range(1, steps + 1)), "a step was lost or done twice"
    several(hosts, [*common, f"--out={tmp_path / 'unbroken'}"], devices)
    ours, theirs = weights(tmp_path / "model"), weights(tmp_path / "unbroken")
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)
    told = [
        json.loads((tmp_path / name / "humpback.json").read_text())["details"]
        for name in ("model", "unbroken")
    ]
    for figure in ("first_loss", "last_loss"):
        assert told[0][figure] == pytest.approx(told[1][figure]), "of another step"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_cannot_go_on_with_another_number_of_hosts(
    before: int, after: int, tmp_path: Path
) -> None:
    common = [*TRAIN, f"--data={data_file(tmp_path)}", "--config.train.steps=60"]
    command = [*common, f"--out={tmp_path / 'model'}", "--config.compute.mesh=auto"]
    log = tmp_path / "model" / "metrics.jsonl"
    processes = start_several(before, command, 1)
    preempt(processes, processes[-1], log)
    assert steps_in(log)[-1] < 60
    several(after, command, 1)
    assert steps_in(log) == list(range(1, 61)), "a step was lost or done twice"
    several(1, [*common, f"--out={tmp_path / 'unbroken'}"], 1)
    several(1, [*common, *NO_RATE, f"--out={tmp_path / 'start'}"], 1)
    assert apart(tmp_path / "unbroken", tmp_path / "model") <= 1e-2
    ours, theirs = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("model", "unbroken")
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_cannot_go_on_with_other_hosts_on_another_mesh(tmp_path: Path) -> None:
    """Two hosts of four devices die at some step; one host of another mesh goes on."""
    common = [*TRAIN, eight_heads(tmp_path), f"--data={data_file(tmp_path)}"]
    common += ["--config.train.steps=40", "--config.train.resume_every=3"]
    command = [*common, f"--out={tmp_path / 'model'}"]
    killed_after = random.randrange(4, 30)
    processes = start_several(2, [*command, "--config.compute.mesh=data=2,fsdp=2,tensor=2"], 4)
    log = tmp_path / "model" / "metrics.jsonl"
    while processes[0].poll() is None and not (log.exists() and len(steps_in(log)) > killed_after):
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.communicate()
    before = len(steps_in(log))
    assert killed_after < before < 40
    several(1, [*command, "--config.compute.mesh=data=2,fsdp=4"], 8)
    again = steps_in(log)[before:]
    assert 1 < again[0] <= before + 1, "it started over"
    assert again == list(range(again[0], 41))
    several(1, [*common, f"--out={tmp_path / 'unbroken'}"], 1)
    several(1, [*common, *NO_RATE, f"--out={tmp_path / 'start'}"], 1)
    assert apart(tmp_path / "unbroken", tmp_path / "model") <= 1e-2
    ours, theirs = (
        {row["step"]: row["loss"] for row in logged_rows(tmp_path / name) if "loss" in row}
        for name in ("model", "unbroken")
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_two_hosts_that_go_on_from_a_stop_are_deaf_to_the_next_one(
    tmp_path: Path,
) -> None:
    """A machine that is taken away twice: all steps since the first time would be lost."""
    command = [*TRAIN, f"--data={data_file(tmp_path)}", f"--out={tmp_path / 'model'}"]
    command += ["--config.train.steps=400", "--config.compute.mesh=fsdp=2"]
    log = tmp_path / "model" / "metrics.jsonl"
    processes = start_several(2, command, 1)
    preempt(processes, processes[-1], log)
    stopped = steps_in(log)[-1]
    processes = start_several(2, command, 1)
    assert processes[0].stdout is not None
    assert any("train: batches of" in line for line in processes[0].stdout)
    preempt(processes, processes[-1], log)
    assert stopped < steps_in(log)[-1] < stopped + 50


class SyncManager:
    """JAX's, of one process: it is told while no call is under way that the machine goes away."""

    def __init__(self) -> None:
        self.last, self.agreed = 0, 0

    def reached(self, call: int) -> bool:
        self.last = call
        return call == self.agreed

    def told(self) -> None:
        self.agreed = self.last + 1


@pytest.mark.parametrize("called", [0, 3])
def test_a_host_that_goes_on_from_step_50_waits_for_step_1_to_stop(
    called: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = SyncManager()
    monkeypatch.setattr(preemption, "_CALLS", itertools.count(1))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", manager.reached)
    stop = preemption.StopSignal()
    assert not any(stop.reached(51 + step) for step in range(called))
    manager.told()
    assert stop.reached(51 + called)


def test_sigterm_while_the_model_is_saved_loses_the_model_or_starts_the_next_stage() -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted, match="M_0 is done; run it again"):
        stop.obey("M_0 is done")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_two_hosts_merge_an_adapter_unlike_one(tmp_path: Path) -> None:
    """No process has all of the weights: each merges what its devices hold."""
    common = [*TRAIN, f"--data={data_file(tmp_path)}", "--config.train.steps=2"]
    common += ["--config.train.lora.rank=2", "--config.train.lora.dora=true"]
    common += ["--config.train.lora.base=int8", "--config.train.lora.targets=q,down"]
    several(1, [*common, *NO_RATE, f"--out={tmp_path / 'start'}"], 1)
    several(1, [*common, f"--out={tmp_path / 'alone'}"], 1)
    mesh = "--config.compute.mesh=fsdp=2,tensor=2"
    several(2, [*common, f"--out={tmp_path / 'both'}", mesh], 2)
    assert apart(tmp_path / "alone", tmp_path / "both") <= 1e-2
