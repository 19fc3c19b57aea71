"""Going on from what a stopped run left: it has to fit, and a bad moment must not cost it.

If these fail, a run that just fits into memory cannot be resumed, or starts over although its
states are whole.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from test_mesh import start_several
from test_trainer import EXAMPLES, LORA, SPEC, VARIANTS, Stop, base, run, step_spec, stop_after
from tiny_llama import assert_trees_close, from_torch, torch_llama, trees_equal

import humpback_jax
from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.config import default_config
from humpback_jax.errors import HumpbackError
from humpback_jax.model.lora import lora_spec, unmerge_adapter
from humpback_jax.models import load_model
from humpback_jax.parallel.mesh import make_mesh, parse_mesh
from humpback_jax.stages.tune import run_identity
from humpback_jax.training import trainer
from humpback_jax.training.optimizer import make_optimizer
from humpback_jax.training.state import (
    StepSpec,
    TrainState,
    abstract_state,
    finished_params,
    initial_state,
)
from humpback_jax.training.trainer import train

PACKAGE = str(Path(humpback_jax.__file__).parent)


class Peak:
    """The most that live arrays have held, over what they held at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._before, self.bytes = self._held(), 0
        load = ocp.load

        def measured(*arguments: Any) -> Any:
            self.measure()
            return load(*arguments)

        monkeypatch.setattr(ocp, "load", measured)
        sys.setprofile(self._returns)

    def _returns(self, frame: Any, event: str, value: Any) -> None:
        if event == "return" and frame.f_code.co_filename.startswith(PACKAGE):
            self.measure()

    def measure(self) -> None:
        self.bytes = max(self.bytes, self._held() - self._before)

    @staticmethod
    def _held() -> int:
        # One buffer may have several arrays.
        return sum({a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays()}.values())


@pytest.mark.parametrize(
    ("layout", "select", "most"),
    # Unrolled layers are stacked when they are saved, here the best parameters of step 3.
    [
        ("scan", "last", 1.2),
        ("scan", "best", 1.2),
        ("unrolled", "last", 1.2),
        ("unrolled", "best", 1.4),
    ],
)
def test_a_run_that_just_fits_cannot_be_resumed(
    layout, select, most, tmp_path, monkeypatch
) -> None:
    """Two states at once, the fresh one and the one that is read, would not fit."""
    config, params = from_torch(torch_llama(num_hidden_layers=4))
    spec = dataclasses.replace(SPEC, steps=3, resume_every=2, eval_every=2)
    spec = dataclasses.replace(spec, layout=layout, select=select)
    arguments: dict[str, Any] = {"validation": EXAMPLES[:2], "resume": ResumeFolder(tmp_path)}
    with pytest.raises(Stop):
        train(config, params, EXAMPLES, spec, **arguments, on_metrics=stop_after(3))
    state_bytes = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    peak = Peak(monkeypatch)
    try:
        done = train(config, params, EXAMPLES, spec, **arguments)
    finally:
        sys.setprofile(None)
    assert [row["step"] for row in done.history if "loss" in row] == [3]
    assert 0.95 * state_bytes < peak.bytes < most * state_bytes


@pytest.mark.parametrize("base_format", ["auto", "int8"])
@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_an_adapter_on_a_base_that_just_fits_is_lost_when_it_is_merged(
    layout, base_format, monkeypatch
) -> None:
    """Device memory is full of the frozen weights: there is no room for merged ones."""
    config, params = from_torch(torch_llama(num_hidden_layers=4))
    params = jax.tree.map(np.asarray, params)
    lora = lora_spec(2, 4, 0.0, ("q", "down"), dora=True, base=base_format)
    step = StepSpec(config, 1, layout=layout, lora=lora)
    state = initial_state(step, params, optax.sgd(1.0), 0)
    state = state._replace(trainable=jax.tree.map(lambda leaf: leaf + 0.1, state.trainable))
    peak = Peak(monkeypatch)
    try:
        merged, adapter = finished_params(state, step, params)
    finally:
        sys.setprofile(None)
    assert peak.bytes < 0.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert_trees_close(unmerge_adapter(merged, adapter, lora), params, 1e-5)


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_merge_that_fails_loses_the_adapter(select, tmp_path, monkeypatch) -> None:
    spec = dataclasses.replace(SPEC, lora=LORA, select=select, eval_every=4)
    validation = EXAMPLES[:2]
    unbroken = run(spec, validation=validation, resume=ResumeFolder(tmp_path / "unbroken"))

    def full(*arguments: Any) -> Any:
        raise MemoryError("Unable to allocate 13 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finished_params", full)
        with pytest.raises(HumpbackError, match=r"tuned weights.*13 GiB.*kept. Run the same"):
            run(spec, validation=validation, resume=ResumeFolder(tmp_path / "resume"))
    again = run(spec, validation=validation, resume=ResumeFolder(tmp_path / "resume"))
    assert [row for row in again.history if "loss" in row] == [], "all steps are done"
    assert again.steps == unbroken.steps == spec.steps, "though this process did none of them"
    assert trees_equal(again.params, unbroken.params)
    assert trees_equal(again.adapter, unbroken.adapter)


MESHES = {"alone": None, "mesh": "data=1,fsdp=1,tensor=1"}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("variant", ["full", "full_scan", "adapter", "adapter_scan"])
def test_what_is_read_has_another_form_than_what_is_trained(variant, mesh, optimizer) -> None:
    """Shapes tell where a state goes, before there is one."""
    changes = dict(VARIANTS[variant])
    changes["optimizer"] = dataclasses.replace(
        changes.get("optimizer", SPEC.optimizer), name=optimizer
    )
    spec = dataclasses.replace(SPEC, **changes)
    shape = MESHES[mesh] and parse_mesh(MESHES[mesh])
    step = dataclasses.replace(step_spec(spec), mesh=shape and make_mesh(shape, jax.devices()[:1]))
    made = make_optimizer(spec.optimizer, spec.steps)
    expected = initial_state(step, base()[1], made, spec.seed)
    found = abstract_state(step, made)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim)


def identity(**changes: Any) -> dict[str, str]:
    model, section = load_model("tiny-random"), default_config().train
    section.update(changes)
    return run_identity("tiny-random", model, section, "forward", 0, "data", [])


def test_a_run_cannot_go_on_with_less_memory_on_fewer_chips(tmp_path) -> None:
    """More micro-batches, or activations that are computed again, change rounding alone."""
    spec = dataclasses.replace(SPEC, resume_every=3, dropout=0.1)
    smaller = {"accumulation": 4, "remat": "full"}
    resume = ResumeFolder(tmp_path, belongs_to=identity())
    with pytest.raises(Stop):
        run(spec, resume=resume, on_metrics=stop_after(4))
    rows: list[dict] = []
    resumed = run(
        dataclasses.replace(spec, **smaller),
        resume=ResumeFolder(tmp_path, belongs_to=identity(**smaller)),
        on_metrics=rows.append,
    )
    assert rows[0]["step"] == 4
    assert identity(learning_rate=1.0) != identity() != identity(row_tokens=64)
    for ours, theirs in zip(
        jax.tree.leaves(resumed.params), jax.tree.leaves(run(spec).params), strict=True
    ):
        assert jax.numpy.allclose(ours, theirs, rtol=0, atol=2e-5)


OURS = {"model": "a"}


def two_states(folder: Path) -> ResumeFolder:
    """Those after steps 2 and 4."""
    resume = ResumeFolder(folder, belongs_to=OURS)
    with pytest.raises(Stop):
        run(dataclasses.replace(SPEC, resume_every=2), resume=resume, on_metrics=stop_after(5))
    return resume


def like() -> TrainState:
    return abstract_state(step_spec(SPEC), make_optimizer(SPEC.optimizer, SPEC.steps))


def files_in(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def garble(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for place in range(0, len(data), max(1, len(data) // 7)):
        data[place] ^= 0x55
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "garbled": garble,
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_some_damage_stops_a_run_that_could_go_on_from_the_state_before(damage, tmp_path) -> None:
    two_states(tmp_path / "whole")
    found: dict[str, int] = {}
    for file in files_in(tmp_path / "whole" / "00000004"):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        DAMAGES[damage](copy / "00000004" / file)
        state = ResumeFolder(copy, belongs_to=OURS).restore(like())
        found[file.name] = int(state.step) if state else 0
        shutil.rmtree(copy)
    assert set(found.values()) == {2, 4}, found
    assert found["_METADATA"] == found["_CHECKPOINT_METADATA"] == 2


def test_a_run_all_of_whose_states_are_damaged_starts_over_and_deletes_them(tmp_path) -> None:
    two_states(tmp_path)
    for file in tmp_path.rglob("d/*"):
        os.truncate(file, 0)
    before = files_in(tmp_path)
    spec = dataclasses.replace(SPEC, resume_every=2)
    with pytest.raises(HumpbackError, match=rf"{tmp_path}: all states there, of steps 2, 4.*elete"):
        run(spec, resume=ResumeFolder(tmp_path, belongs_to=OURS))
    assert files_in(tmp_path) == before


def never_ends(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def fails(file: Path) -> None:
    """A read of it ends with EIO."""
    file.unlink()
    file.symlink_to("/proc/self/mem")


@pytest.mark.parametrize(
    ("pattern", "trouble"),
    [
        ("_CHECKPOINT_METADATA", fails),
        ("*/_METADATA", fails),
        ("*/manifest.ocdbt", never_ends),
        ("*/d/*", never_ends),
        ("*/ocdbt.process_0/d/*", never_ends),
    ],
)
def test_a_disk_that_does_not_answer_costs_the_newest_state(pattern, trouble, tmp_path) -> None:
    resume = two_states(tmp_path)
    (file,) = (tmp_path / "00000004").glob(pattern)
    trouble(file)
    with pytest.raises(HumpbackError, match=r"00000004: .* cannot be read.*no damage: fix it"):
        resume.restore(like())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        PermissionError(13, "Permission denied"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes."),
        ValueError("PERMISSION_DENIED: Error reading local file"),
    ],
    ids=repr,
)
def test_a_lack_of_memory_or_of_rights_makes_a_run_start_over(error, tmp_path, monkeypatch) -> None:
    resume = two_states(tmp_path)
    before = files_in(tmp_path)

    def load(*arguments: Any) -> Any:
        raise Exception("while reading an array") from error

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "load", load)
        with pytest.raises(HumpbackError, match=r"00000004: .*no damage: fix it, and run"):
            run(dataclasses.replace(SPEC, resume_every=2), resume=resume)
    assert files_in(tmp_path) == before
    assert int(resume.restore(like()).step) == 4


def test_what_was_read_of_a_damaged_state_takes_the_room_of_the_one_before(
    tmp_path, monkeypatch
) -> None:
    """Its reads go on in the background for a while: the state is large enough for that."""
    config, params = from_torch(torch_llama(hidden_size=512, intermediate_size=2048))
    step, optimizer = StepSpec(config, 1, layout="scan", precision=SPEC.precision), optax.adamw(1.0)
    state, resume = initial_state(step, params, optimizer, 0), ResumeFolder(tmp_path)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for number in (2, 4):
        resume.save(state._replace(step=state.step + number))
        resume.wait()
    del state
    (file,) = (tmp_path / "00000004").glob("*/ocdbt.process_0/d/*")
    os.truncate(file, file.stat().st_size * 97 // 100)
    peak = Peak(monkeypatch)
    gc.disable()
    try:
        found = resume.restore(abstract_state(step, optimizer))
    finally:
        gc.enable()
        sys.setprofile(None)
    assert found is not None and int(found.step) == 2
    assert peak.bytes < 1.1 * state_bytes


TOGETHER = """
import os, sys, time
from pathlib import Path
from humpback_jax.parallel.processes import join_processes, leave_processes, wait_for_all
join_processes()
import jax
import optax
import orbax.checkpoint.experimental.v1 as ocp
from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.errors import HumpbackError
from humpback_jax.model.linear import Precision
from humpback_jax.models import load_model
from humpback_jax.parallel.mesh import make_mesh, parse_mesh
from humpback_jax.training.optimizer import OptimizerSpec, make_optimizer
from humpback_jax.training.state import StepSpec, abstract_state, initial_state

base, folder = load_model("tiny-random"), Path(sys.argv[1])
optimizer = make_optimizer(OptimizerSpec(), 9)
mesh = make_mesh(parse_mesh("fsdp=2"), jax.devices())
spec = StepSpec(base.config, 1, layout="unrolled", precision=Precision(), mesh=mesh)
state, like = initial_state(spec, base.params, optimizer, 0), abstract_state(spec, optimizer)

def save(step):
    resume.save(state._replace(step=state.step + step))
    resume.wait()

def restored():
    start = time.monotonic()
    try:
        found = int(resume.restore(like).step)
    except HumpbackError as error:
        found = str(error)
    print(f"found after {time.monotonic() - start:.1f} s:", found, flush=True)

def fails(*arguments):
    raise MemoryError

resume = ResumeFolder(folder, keep=3)
for step in (2, 4, 6):
    save(step)
if jax.process_index() == 1:
    (file,) = folder.glob("00000006/*/ocdbt.process_1/d/*")
    os.truncate(file, file.stat().st_size // 2)
    (folder / "00000004/_CHECKPOINT_METADATA").write_text("")
wait_for_all("damage")
restored()
save(3)
restored()
load, ocp.load = ocp.load, fails if jax.process_index() == 1 else ocp.load
restored()
ocp.load = load
restored()
leave_processes()
"""


def test_a_host_waits_for_one_that_has_passed_over_a_damaged_state(tmp_path) -> None:
    """Each reads its own part of a state: the parts of the others may be whole."""
    processes = start_several(2, [str(tmp_path)], 1, ["-c", TOGETHER])
    for number, process in enumerate(processes):
        output, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-3000:]
        found = re.findall("^found after (.*) s: (.*)$", output, re.MULTILINE)
        assert [step for _, step in found[:2] + found[3:]] == ["2", "3", "3"]
        own = "cannot be read (MemoryError: ). That is no damage"
        assert (own if number else "failed in process 1; its message says why") in found[2][1]
        assert max(float(seconds) for seconds, _ in found) < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000003"]
