"""What a training run leaves on disk while it lasts, and what goes on from there.

If these fail, a state on disk is of no step at all, a full disk ends in a traceback, or a run goes
on from another run's state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from test_trainer import LORA, SPEC, Stop, base, run, step_spec, stop_after
from tiny_llama import random_examples, trees_equal

from humpback_jax.adapters import Adapter
from humpback_jax.checkpoint import ResumeFolder, save_params
from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import init_params
from humpback_jax.model.lora import lora_spec, split_adapter
from humpback_jax.models import holds_checkpoint, load_model, save_checkpoint
from humpback_jax.sampling.likelihood import sequence_nll
from humpback_jax.training.optimizer import OPTIMIZERS, OptimizerSpec, make_optimizer
from humpback_jax.training.state import (
    TrainState,
    initial_state,
    laid_out_like,
    stacked_state,
)

TESTS = Path(__file__).parent
VALIDATION = random_examples(4, seed=9)


def fresh(spec=SPEC, optimizer: optax.GradientTransformation | None = None) -> TrainState:
    optimizer = optimizer or make_optimizer(spec.optimizer, spec.steps)
    return initial_state(step_spec(spec), base()[1], optimizer, spec.seed)


def same(left: TrainState, right: TrainState) -> bool:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_a_state_written_while_training_goes_on_is_of_a_later_step(layout, tmp_path) -> None:
    """The step's buffers are donated: what is being written must be a copy of them."""
    resume = ResumeFolder(tmp_path)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for _ in range(3):
        state = fresh(dataclasses.replace(SPEC, layout=layout))
        expected = jax.tree.map(np.array, state)
        resume.save(state)
        for _ in range(10):
            state = step(state)
        resume.wait()
        assert same(resume.restore(state), expected)
        assert not same(state, expected)


LAYOUTS = [("scan", "unrolled"), ("unrolled", "scan")]


@pytest.mark.parametrize(
    ("lora", "optimizer"),
    [(None, "adamw"), (LORA, "adamw"), (None, "adafactor"), (LORA, "adafactor")],
)
@pytest.mark.parametrize(("before", "after"), LAYOUTS)
def test_a_run_on_an_accelerator_is_lost_to_a_cpu_or_the_other_way_round(
    before, after, lora, optimizer, tmp_path
) -> None:
    """Accelerators scan over stacked layers; a CPU keeps them apart."""
    spec = dataclasses.replace(SPEC, resume_every=3, lora=lora)
    spec = dataclasses.replace(spec, optimizer=dataclasses.replace(SPEC.optimizer, name=optimizer))
    unbroken = run(dataclasses.replace(spec, layout=after))
    with pytest.raises(Stop):
        run(
            dataclasses.replace(spec, layout=before),
            resume=ResumeFolder(tmp_path),
            on_metrics=stop_after(4),
        )
    rows: list[dict] = []
    resumed = run(
        dataclasses.replace(spec, layout=after),
        resume=ResumeFolder(tmp_path),
        on_metrics=rows.append,
    )
    assert [row["step"] for row in rows] == [4, 5, 6]
    for ours, theirs in zip(
        jax.tree.leaves(resumed.params), jax.tree.leaves(unbroken.params), strict=True
    ):
        assert np.allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_layers_come_back_in_another_order_from_the_other_layout(optimizer) -> None:
    """Eleven layers: as text, the tenth sorts before the second."""
    layers = {i: {"q": {"kernel": jax.numpy.full((2, 3), float(i))}} for i in range(11)}
    params = {"layers": layers, "norm": {"scale": jax.numpy.ones(3)}}
    made = make_optimizer(dataclasses.replace(SPEC.optimizer, name=optimizer), 4)
    apart = TrainState(jax.numpy.int32(4), params, {}, made.init(params))
    stacked = stacked_state(apart)
    kernel = stacked.trainable["layers"]["q"]["kernel"]
    assert kernel.shape == (11, 2, 3)
    assert kernel[:, 0, 0].tolist() == list(range(11))
    assert same(stacked_state(stacked), stacked)
    scanned = made.init(stacked.trainable)
    assert jax.tree.map(np.shape, stacked.optimizer) == jax.tree.map(np.shape, scanned)
    assert same(laid_out_like(apart, stacked), apart)


def test_T30_a_folder_of_another_run_is_refused_and_says_what_differs(tmp_path) -> None:
    spec = dataclasses.replace(SPEC, resume_every=2)
    ours = {"model": "a", "config": "1", "data": "2", "template": "3"}
    with pytest.raises(Stop):
        run(spec, resume=ResumeFolder(tmp_path, belongs_to=ours), on_metrics=stop_after(3))
    before = sorted(tmp_path.rglob("*"))
    for name in ours:
        other = ResumeFolder(tmp_path, belongs_to={**ours, name: "x"})
        with pytest.raises(HumpbackError, match=rf"of step 2.*another {name}\. .*delete"):
            run(spec, resume=other)
    assert sorted(tmp_path.rglob("*")) == before
    rows: list[dict] = []
    run(spec, resume=ResumeFolder(tmp_path, belongs_to=ours), on_metrics=rows.append)
    assert rows[0]["step"] == 3


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from test_checkpoint import fresh
from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.errors import HumpbackError
resume = ResumeFolder(Path(sys.argv[1]))
state = fresh()
resume.save(state)
resume.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
later = state._replace(step=state.step + 1)
try:
    resume.save(later)
    resume.wait()
    raise SystemExit("nothing went wrong")
except HumpbackError as error:
    print(json.dumps([str(error), int(resume.restore(state).step)]))
"""


def test_a_full_disk_is_a_traceback_or_costs_the_state_before(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "resume")],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    message, step = json.loads(done.stdout.splitlines()[-1])
    assert "after step 1 could not be written" in message
    assert "Is the disk full" in message and "\n" not in message
    assert step == 0


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the given change of the disk on, nothing happens; of a folder, half is removed."""
    changes = iter(range(moment))

    def or_killed(change: Callable[..., Any], half: Callable[[Path], None]) -> Callable[..., Any]:
        def changed(path: Path, *arguments: Any, **options: Any) -> Any:
            if next(changes, None) is None:
                half(path)
                raise Stop
            return change(path, *arguments, **options)

        return changed

    def nothing(path: Path) -> None:
        pass

    def without_files(path: Path) -> None:
        for file in path.rglob("*"):
            if file.is_file():
                file.unlink()

    monkeypatch.setattr(Path, "rename", or_killed(Path.rename, nothing))
    monkeypatch.setattr(Path, "rmdir", or_killed(Path.rmdir, nothing))
    monkeypatch.setattr(os, "replace", or_killed(os.replace, nothing))
    monkeypatch.setattr(shutil, "rmtree", or_killed(shutil.rmtree, without_files))


def test_a_kill_while_a_model_replaces_another_loses_both_or_mixes_them(
    tmp_path, monkeypatch
) -> None:
    """Whatever the moment, one of the two is there, and the same command writes the new one."""
    model, spec = load_model("tiny-random"), lora_spec(2, 4, 0.0, ("q",))
    adapter = split_adapter(init_params(model.config, jax.random.key(1), lora=spec))[1]
    old = dataclasses.replace(model, tags="S_a", adapter=Adapter(spec, adapter, "base"))
    params = init_params(model.config, jax.random.key(2))
    new = dataclasses.replace(model, params=params, tags="S_w")
    assert old.hash != new.hash
    found = []
    for moment in range(30):
        folder = tmp_path / f"{moment}"
        save_checkpoint(folder, old, {})
        with monkeypatch.context() as patch:
            killed_at(moment, patch)
            with contextlib.suppress(Stop, HumpbackError):
                save_checkpoint(folder, new, {})
                break
        assert holds_checkpoint(folder)
        left = load_model(str(folder))
        described = (left.hash, left.tags, left.adapter is None)
        assert described in ((old.hash, "S_a", False), (new.hash, "S_w", True)), moment
        found.append(left.tags)
        save_checkpoint(folder, new, {})
        assert load_model(str(folder)).hash == new.hash
        assert not (folder / ".whole").exists() and not (folder / ".new").exists()
    assert {*found} == {"S_a", "S_w"} and found == sorted(found)


def test_a_full_disk_costs_the_model_that_was_to_be_replaced(tmp_path, monkeypatch) -> None:
    model = load_model("tiny-random")
    save_checkpoint(tmp_path, model, {})
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(ocp, "save", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(HumpbackError, match="could not be written"):
        save_checkpoint(tmp_path, load_model("tiny-random", seed=1), {})
    assert load_model(str(tmp_path)).hash == model.hash
    assert not (tmp_path / ".new").exists(), "it would take up room"


@pytest.mark.parametrize("keep", [1, 2])
def test_after_damage_each_new_state_is_deleted_for_the_sake_of_damaged_ones(
    keep, tmp_path
) -> None:
    """A run that falls back goes on below their numbers."""
    resume, state = ResumeFolder(tmp_path, keep=3), fresh()

    def save(step: int) -> None:
        resume.save(state._replace(step=state.step + step))
        resume.wait()

    for step in (5, 20, 30):
        save(step)
    for number in ("00000020", "00000030"):
        for file in (tmp_path / number).rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    resume = ResumeFolder(tmp_path, keep=keep)
    assert int(resume.restore(state).step) == 5
    save(10)
    assert int(ResumeFolder(tmp_path).restore(state).step) == 10
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000005", "00000010"][-keep:]


def test_a_state_that_nothing_says_is_damaged_is_deleted_for_its_number(tmp_path) -> None:
    resume, state = ResumeFolder(tmp_path, keep=1), fresh()
    for step in (20, 10):
        resume.save(state._replace(step=state.step + step))
        resume.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000020"]


def test_the_best_of_an_abandoned_way_is_taken_for_the_best_of_this_one(tmp_path) -> None:
    """A run that fell back finds better parameters earlier than it did before."""
    resume, state = ResumeFolder(tmp_path), fresh()
    for step, nll in ((8, 1.5), (6, 1.25)):
        resume.save_best(state._replace(step=state.step + step), nll)
    assert ResumeFolder(tmp_path).best_nll() == 1.5, "the second one is not complete yet"
    resume.wait()
    assert ResumeFolder(tmp_path).best_nll() == 1.25


def test_a_trained_model_for_which_there_is_no_room_is_called_a_defect(tmp_path) -> None:
    (tmp_path / "model").write_text("a file where a folder should be")
    with pytest.raises(HumpbackError, match=r"could not be written.*Is the disk full.*again"):
        save_params(tmp_path / "model" / "weights", base()[1])


def test_the_end_of_a_run_hides_that_a_state_was_not_written(tmp_path) -> None:
    (tmp_path / "resume").write_text("a file where a folder should be")
    with pytest.raises(HumpbackError, match="could not be written"):
        run(dataclasses.replace(SPEC, resume_every=5), resume=ResumeFolder(tmp_path / "resume"))


RATES = {"full": (3e-3, None), "adapter": (1e-1, LORA)}


@pytest.mark.parametrize("variant", RATES)
@pytest.mark.parametrize("killed", [False, True])
def test_the_best_parameters_are_not_those_with_the_lowest_loss(variant, killed, tmp_path) -> None:
    """With these rates the validation loss falls, and by step 6 has risen by more than 1 %."""
    rate, lora = RATES[variant]
    optimizer = OptimizerSpec(rate, rate, schedule="constant")
    spec = dataclasses.replace(SPEC, steps=7, eval_every=2, optimizer=optimizer, lora=lora)
    spec = dataclasses.replace(spec, resume_every=5, select="best")
    if killed:
        with pytest.raises(Stop):
            run(
                spec, validation=VALIDATION, resume=ResumeFolder(tmp_path), on_metrics=stop_after(6)
            )
    resume = ResumeFolder(tmp_path)
    chosen = run(spec, validation=VALIDATION, resume=resume)
    losses = {r["step"]: r["validation_nll"] for r in chosen.history if "validation_nll" in r}
    assert list(losses) == ([6, 7] if killed else [2, 4, 6, 7])
    assert chosen.step < 6, "it was the best before the loss rose, and before the kill"
    nll, counts = sequence_nll(base()[0], chosen.params, VALIDATION, spec.precision, layout="scan")
    found = nll.sum() / counts.sum()
    assert found < min(losses[6], losses[7])
    assert found == pytest.approx(resume.best_nll(), rel=1e-6)
    if not killed:
        assert found == pytest.approx(min(losses.values()), rel=1e-6)
        last = run(dataclasses.replace(spec, select="last"), validation=VALIDATION)
        assert last.step == 7
        assert not trees_equal(last.params, chosen.params)


class SlowDisk:
    """Writes when it is waited for."""

    def __init__(self, write: Callable[[], Any]) -> None:
        self.result = write


def test_a_kill_between_a_state_and_its_best_parameters_loses_the_best(
    tmp_path, monkeypatch
) -> None:
    """A run that goes on from the state does not measure its step again."""
    save = ocp.save_async

    def best_is_slow(path: Path, tree: Any, **arguments: Any) -> Any:
        if path.parent.name != "best":
            return save(path, tree, **arguments)
        tree = jax.tree.map(np.array, tree)
        return SlowDisk(lambda: save(path, tree, **arguments).result())

    monkeypatch.setattr(ocp, "save_async", best_is_slow)
    resume, state = ResumeFolder(tmp_path), fresh()
    resume.save_best(state, 1.5)
    resume.save(state)
    while not (tmp_path / "00000000").exists():
        time.sleep(0.01)
    assert ResumeFolder(tmp_path).best_nll() == 1.5


def test_a_kill_while_states_are_deleted_leaves_one_without_its_best_parameters(
    tmp_path, monkeypatch
) -> None:
    def killed(folder: Path, ignore_errors: bool = False) -> None:
        for path in folder.glob("best"):  # folders are emptied in any order
            remove(path)
            raise Stop

    resume, state, remove = ResumeFolder(tmp_path / "resume"), fresh(), shutil.rmtree
    resume.save_best(state, 1.5)
    resume.save(state)
    resume.wait()
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Stop):
        resume.delete()
    left = ResumeFolder(tmp_path / "resume")
    assert left.restore(fresh()) is None or left.best_nll() == 1.5
    monkeypatch.undo()
    resume.save(state)
    resume.wait()
    resume.delete()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lacking", ["validation", "eval_every", "resume"])
def test_the_best_of_nothing_is_an_error_before_anything_is_computed(lacking, tmp_path) -> None:
    spec = dataclasses.replace(SPEC, select="best", eval_every=int(lacking != "eval_every"))
    with pytest.raises(HumpbackError, match="select=best needs validation rows"):
        run(
            spec,
            validation=() if lacking == "validation" else VALIDATION,
            resume=None if lacking == "resume" else ResumeFolder(tmp_path),
        )


@pytest.mark.parametrize(
    "change", [{"rope_theta": 5e5}, {"rms_norm_eps": 1e-3}, {"max_position_embeddings": 64}]
)
def test_results_of_a_mistaken_config_json_are_kept_once_it_is_mended(change, tmp_path) -> None:
    """Stages and half-done jobs know a model by its hash; weights alone are not a model."""
    model = load_model("tiny-random")
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
    assert other.hash != model.hash
    save_checkpoint(tmp_path, other, {})
    assert load_model(str(tmp_path)).hash == other.hash


def test_weights_of_another_architecture_are_taken_for_the_model_described(tmp_path) -> None:
    model = load_model("tiny-random")
    save_checkpoint(tmp_path / "a", model, {})
    wider = dataclasses.replace(model.config, intermediate_size=96)
    params = init_params(wider, jax.random.key(0))
    save_checkpoint(tmp_path / "b", dataclasses.replace(model, config=wider, params=params), {})
    shutil.rmtree(tmp_path / "a" / "weights")
    shutil.copytree(tmp_path / "b" / "weights", tmp_path / "a" / "weights")
    with pytest.raises(HumpbackError, match=r"another architecture.*layers\.mlp\.\w+\.kernel is"):
        load_model(str(tmp_path / "a"))
