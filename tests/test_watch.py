"""What watches a training run: if these fail, a broken run goes on, or a figure is wrong."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import fresh
from test_trainer import EXAMPLES, SPEC, base, run
from tiny_llama import torch_llama

from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.cli import main
from humpback_jax.errors import HumpbackError
from humpback_jax.training.examples import TrainingExample, keys_of
from humpback_jax.training.goodput import Goodput, goodput_line
from humpback_jax.training.optimizer import OptimizerSpec
from humpback_jax.training.order import BatchOrder
from humpback_jax.training.trainer import train
from humpback_jax.training.utilization import PEAK_FLOPS, Utilization, peak_flops
from humpback_jax.training.watch import LEAST, WINDOW, Guard


def test_a_loss_that_is_not_a_number_leaves_no_trace_of_its_batch(tmp_path) -> None:
    config, params = base()
    broken = {**params, "norm": {"scale": np.full_like(params["norm"]["scale"], np.nan)}}
    with pytest.raises(HumpbackError, match=r"step 1: the loss is nan.*bad_step_1\.json") as caught:
        train(config, broken, EXAMPLES, SPEC, evidence=tmp_path)
    found = json.loads((tmp_path / "bad_step_1.json").read_text())
    assert found["step"] == 1
    assert len(found["ids"]) == 4
    assert ", ".join(found["ids"]) in str(caught.value)


def repeated(name: str, token: int) -> TrainingExample:
    return TrainingExample(name, np.full(12, token, np.int32), np.arange(12) > 0)


NAMES = [f"row-{i}" for i in range(16)]
KEYS = keys_of([("seed", name) for name in NAMES])


@functools.cache
def with_an_odd_row() -> list[TrainingExample]:
    """Sixteen rows alike, but for one that is much harder to guess, in batch 13."""
    losses = {
        step: row["loss"]
        for step, row in enumerate(
            run(STILL, [repeated(n, i) for i, n in enumerate(NAMES)]).history
        )
    }
    order = BatchOrder(KEYS, 1, STILL.seed)
    (easy,), (hard,) = (order.indices(pick(losses, key=losses.__getitem__)) for pick in (min, max))
    odd = order.indices(12)[0]
    return [repeated(n, hard if i == odd else easy) for i, n in enumerate(NAMES)]


# Nothing is learnt, so that a row's loss is that of its tokens.
STILL = dataclasses.replace(
    SPEC, steps=16, batch_examples=1, optimizer=OptimizerSpec(0.0, 0.0, "constant")
)


@pytest.mark.parametrize("log_every", [1, 0, 5])
def test_a_run_whose_loss_jumps_goes_on(log_every, tmp_path) -> None:
    rows: list[dict] = []
    assert len(run(STILL, with_an_odd_row()).history) == 16
    spec = dataclasses.replace(STILL, spike_factor=3.0, log_every=log_every)
    with pytest.raises(HumpbackError, match="step 13: the loss jumped to") as caught:
        run(spec, with_an_odd_row(), on_metrics=rows.append, evidence=tmp_path)
    path = tmp_path / "bad_step_13.json"
    (name,) = json.loads(path.read_text())["ids"]
    assert name == f"row-{BatchOrder(KEYS, 1, STILL.seed).indices(12)[0]}"
    assert name in str(caught.value) and str(path) in str(caught.value)
    assert [row["step"] for row in rows] == list(range(1, 13))


@given(st.lists(st.floats(1.9, 2.1), min_size=LEAST, max_size=2 * WINDOW), st.floats(2, 50))
def test_a_spike_is_measured_otherwise_than_said(losses, factor) -> None:
    recent = np.array(losses[-WINDOW:])
    deviation = 1.4826 * np.median(np.abs(recent - np.median(recent)))
    limit = np.median(recent) + factor * max(deviation, 0.01 * np.median(recent))
    for loss, stops in ((limit * 0.999, False), (limit * 1.001, True)):
        for chosen in (0.0, factor):
            guard = Guard(0.0, None)
            for step, each in enumerate(losses):
                guard.check({"step": step, "loss": each, "grad_norm": 1.0}, list)
            guard.factor = chosen
            expected = pytest.raises(HumpbackError) if stops and chosen else nullcontext()
            with expected:
                guard.check({"step": len(losses), "loss": loss, "grad_norm": 1.0}, list)


def test_the_first_steps_are_taken_for_a_spike() -> None:
    """Of a few losses, nothing is known of how they vary."""
    guard = Guard(1.0, None)
    for step, loss in enumerate([2.0] * (LEAST - 1) + [9.0]):
        guard.check({"step": step, "loss": loss, "grad_norm": 1.0}, list)


def test_each_logged_step_stalls_the_device() -> None:
    """A step's figures are read once the next step is dispatched."""
    events: list[str] = []

    def stops(done: int) -> bool:
        events.append(f"{done} dispatched")
        return False

    run(on_metrics=lambda row: events.append(f"{row['step']} read"), stops=stops)
    for step in range(1, 6):
        assert events.index(f"{step} read") > events.index(f"{step} dispatched")
        assert events.index(f"{step} read") < events.index(f"{step + 1} dispatched")
    assert events[-2:] == ["6 dispatched", "6 read"]
    # `stops` is asked after the look: that the next step is under way shows in the order above.
    assert events[0] == "1 dispatched"


def test_mfu_counts_other_operations_than_the_convention_s() -> None:
    """6 for each weight of a matrix and token (PaLM, appendix B), by torch's count of weights."""
    tiny = torch_llama(num_hidden_layers=3)
    config = dataclasses.replace(base()[0], num_hidden_layers=3)
    matrices = sum(
        module.weight.numel() for name, module in tiny.named_modules() if name.endswith("_proj")
    )
    head = tiny.lm_head.weight.numel()
    heads = tiny.config.num_attention_heads * tiny.config.head_dim
    lengths = [5, 17, 30]
    tokens, supervised = sum(lengths), 11
    pairs = sum(k + 1 for length in lengths for k in range(length))
    attention = 3 * 4 * 3 * heads * pairs
    full = 6 * matrices * tokens + 6 * head * supervised + attention
    peak = 1e9
    found = Utilization(config, False, "none", peak).of(tokens, supervised, pairs, 2.0)
    assert found["mfu"] == pytest.approx(full / 2.0 / peak)
    assert found["hfu"] == found["mfu"]
    again = Utilization(config, False, "full", peak).of(tokens, supervised, pairs, 2.0)
    assert again["mfu"] == found["mfu"]
    assert again["hfu"] == pytest.approx((full + 2 * matrices * tokens + attention / 3) / 2 / peak)
    adapted = Utilization(config, True, "none", peak).of(tokens, supervised, pairs, 2.0)
    kept = full - 2 * matrices * tokens - 2 * head * supervised
    assert adapted["mfu"] == pytest.approx(kept / 2.0 / peak)


def test_a_device_of_unknown_speed_gets_a_utilization() -> None:
    assert jax.local_devices()[0].device_kind not in PEAK_FLOPS
    assert peak_flops(None) is None
    row = run().history[0]
    assert "mfu" not in row and "hfu" not in row
    assert row["model_tflops_per_s"] > 0


def test_the_time_of_a_run_is_counted_twice_or_lost() -> None:
    goodput = Goodput()
    begun = goodput.clock()
    with goodput.phase("validation"):
        until = goodput.clock() + 0.01
        while sum(goodput.seconds().values()) < 0.02:
            pass
    assert goodput.clock() - begun < until - begun
    goodput.stepped(goodput.clock() - begun)
    found = goodput.seconds()
    assert found["validation"] >= 0.01
    assert min(found.values()) >= -1e-9
    line = goodput_line({"steps": 3.0, "compile": 6.0, "data": 1.0, "other": 0.0})
    assert line == "10.0 s: steps 30.0%, compile 60.0%, data 10.0%"


def test_profile_writes_no_trace_of_the_steps(tmp_path) -> None:
    run(profile=tmp_path)
    (trace,) = tmp_path.glob("plugins/profile/*/*.trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert len(events) > 100


ROWS = [{"instruction": f"Say {i}", "output": f"{i} " * (i % 9 + 1)} for i in range(12)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_command_line_lets_go_of_what_watches_a_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    out = tmp_path / "model"
    command = ["train", "--model=tiny-random", f"--data={write_rows(tmp_path / 'a.jsonl', ROWS)}"]
    command += [f"--out={out}", f"--heldout={write_rows(tmp_path / 'b.jsonl', ROWS[:3])}"]
    command += ["--config.train.steps=4", "--config.train.batch_examples=4"]
    command += ["--config.train.eval_every=2", "--config.train.select=best"]
    command += ["--config.train.row_tokens=128", f"--profile={tmp_path / 'trace'}"]
    other = ResumeFolder(out / "resume", belongs_to={"data": "of another file"})
    other.save(fresh())
    other.wait()
    assert main(command) == 1
    assert "another model, config, data, template, heldout" in capsys.readouterr().err
    other.delete()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "train: step 2, validation NLL" in said
    assert "s: steps " in said
    details = json.loads((out / "humpback.json").read_text())["details"]
    assert details["selected_step"] in (2, 4)
    assert sum(details["goodput_s"].values()) > 0
    assert list(tmp_path.glob("trace/plugins/profile/*/*.xplane.pb"))
    assert not (out / "resume").exists()
