"""Ahead-of-time compilation: if these fail, users rent a slice that does not hold their model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from humpback_jax.aot import programs
from humpback_jax.aot.decode import compile_decode, plan_decode
from humpback_jax.aot.programs import training_plan
from humpback_jax.aot.summary import summary_lines
from humpback_jax.aot.train import lower_step, plan_training
from humpback_jax.cli import main
from humpback_jax.compute import Compute, choose_compute
from humpback_jax.config import default_config
from humpback_jax.errors import HumpbackError
from humpback_jax.model.kernels import XLA
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import count_parameters
from humpback_jax.model.shapes import PUBLISHED, SHAPES
from humpback_jax.models import load_config, load_model, save_checkpoint
from humpback_jax.overrides import set_field
from humpback_jax.parallel.mesh import one_copy
from humpback_jax.parallel.topology import CHIPS, tpu_slice
from humpback_jax.training.trainer import TrainSpec
from humpback_jax.weights.gguf_export import save_gguf
from humpback_jax.weights.gguf_file import read_gguf_header
from humpback_jax.weights.gguf_io import load_gguf

ROOT = Path(__file__).parent.parent
CACHED_ROW = 2 * 22 * 4 * 2048 * 64 * 2  # bytes: keys and values, layers, groups, places, bfloat16
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("tinyllama", 1.100),
        ("7b", 6.738),
        ("13b", 13.016),
        ("33b", 32.529),
        ("65b", 65.286),
        ("llama2_70b", 68.977),
        ("llama3_8b", 8.030),
    ],
)
def test_a_named_shape_is_not_the_published_model(name: str, billions: float) -> None:
    """Parameters as counted by the Hugging Face pages of the models."""
    assert count_parameters(SHAPES[name]) == pytest.approx(billions * 1e9, rel=1e-3)


def test_a_config_of_the_paper_cannot_be_planned_without_its_weights() -> None:
    for name, shape in PUBLISHED.items():
        assert load_config(name) == SHAPES[shape]
    assert load_config("random:tiny").num_hidden_layers == 2
    with pytest.raises(HumpbackError, match="known: tiny, tinyllama"):
        load_config("random:gpt")


def test_the_weights_of_a_model_have_to_be_there_to_plan_for_it(tmp_path: Path) -> None:
    model = load_model("tiny-random")
    save_checkpoint(tmp_path / "checkpoint", model, {})
    save_gguf(tmp_path / "m.gguf", model.config, model.params, {}, "m")
    (tmp_path / "peft").mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    settings["base_model_name_or_path"] = str(tmp_path / "checkpoint")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    names = [str(tmp_path / name) for name in ("checkpoint", "m.gguf", "peft")]
    expected = [model.config, load_gguf(tmp_path / "m.gguf")[0], model.config]
    shutil.rmtree(tmp_path / "checkpoint" / "weights")
    first = min(entry.start for entry in read_gguf_header(names[1]).tensors.values())
    os.truncate(names[1], first)
    assert [load_config(name) for name in names] == expected


@pytest.mark.parametrize("text", ["v9:2x2", "v5p", "tpu", ""])
def test_a_slice_of_an_unknown_kind_is_an_error_that_lists_the_known(text: str) -> None:
    with pytest.raises(HumpbackError, match="v4, v5e, v5p, v6e"):
        tpu_slice(text)


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_tpu_support_the_error_does_not_say_how_to_get_it() -> None:
    with pytest.raises(HumpbackError, match=r"-e '\.\[tpu\]'"):
        tpu_slice("v5p:2x2x1")


def for_tpu(**settings: str) -> Compute:
    return choose_compute("auto", 64, platform="tpu", **settings)


def test_int8_weights_or_cache_of_a_config_are_planned_at_their_full_size() -> None:
    """13B fit a chip in int8 alone."""
    chip, alone = CHIPS["v5e"], jax.devices()[:1]
    with pytest.raises(HumpbackError, match="does not hold one row"):
        plan_decode(SHAPES["13b"], alone, chip, for_tpu(kv="int8"), 128)
    assert plan_decode(SHAPES["13b"], alone, chip, for_tpu(weights="int8"), 128).slots >= 1
    wide, narrow = (
        plan_decode(SHAPES["7b"], alone, chip, for_tpu(weights="int8", kv=kv), 2048).slots
        for kv in ("auto", "int8")
    )
    assert narrow > wide


def test_formats_of_a_config_are_compiled_in_others() -> None:
    """What is compiled on the CPU at hand shows the shapes that a slice would get."""
    chip, alone = CHIPS["v5e"], jax.devices()[:1]
    held = {}
    for name, settings in {"auto": {}, "int8": {"weights": "int8", "kv": "int8"}}.items():
        compute = dataclasses.replace(for_tpu(**settings), kernels=XLA)
        plan = plan_decode(SHAPES["tiny"], alone, chip, compute, 128)
        report = compile_decode(SHAPES["tiny"], plan, compute, chip, ["decode"])["decode"]
        held[name] = report["bytes_by_kind"]
    assert held["int8"]["parameters"] < 0.6 * held["auto"]["parameters"]
    assert held["int8"]["cache"] < 0.8 * held["auto"]["cache"]
    config = default_config()
    set_field(config, "compute.precision", ["float32"])
    run = training_plan(config, SHAPES["tiny"], alone, None).run
    assert run.precision == Precision("float32", "float32")


def test_an_adapter_named_by_its_own_flag_has_no_int8_base(capsys, monkeypatch) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    assert main(["aot", "--topology=v9:1", "--lora=16", "--config.train.lora.base=int8"]) == 1
    assert "--topology=v9:1 is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--table=t.json", "--config.train.remat=full"], "--config.train.remat"),
        (["--table=t.json", "--config=configs/humpback.py"], "--config"),
        (["--table=t.json", "--model=random:7b"], "--model"),
        (["--table=t.json", "--topology=v5e:2x2"], "--topology"),
        (["--table=t.json", "--suggest"], "--suggest"),
        (["--topology=v5e:2x2", "--suggest", "--rows=2"], "--rows"),
        (["--topology=v5e:2x2", "--suggest", "--programs=decode"], "--programs"),
        (["--topology=v5e:2x2", "--suggest", "--config.train.remat=full"], "--config.train.remat"),
        (["--topology=v5e:2x2", "--suggest", "--config.compute.mesh=fsdp=4"], "--config.compute.m"),
        (["--topology=v5e:2x2", "--programs=decode", "--rows=2"], "--rows"),
        (["--topology=v5e:2x2", "--programs=prefill,decode", "--lora=4"], "--lora"),
        (["--topology=v5e:2x2", "--config.backward.lora.rank=4"], "--config.backward.lora.rank"),
        (["--topology=v5e:2x2", "--only=7b"], "--only"),
    ],
)
def test_hours_of_compiling_leave_out_what_the_command_line_asked_for(
    flags: list[str], named: str, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    assert main(["aot", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {named}") and "has no effect" in error


def test_a_slice_too_small_is_found_by_the_compiler_alone() -> None:
    with pytest.raises(HumpbackError, match="does not hold one row"):
        plan_decode(SHAPES["llama2_70b"], jax.devices()[:1], CHIPS["v5e"], for_tpu(), 2048)
    plan = plan_decode(SHAPES["tinyllama"], jax.devices()[:1], CHIPS["v5e"], for_tpu(), 1500)
    assert (plan.slots, plan.capacity, plan.mesh.size) == (64, 2048, 1)


def test_a_slice_that_trains_but_holds_no_row_to_decode_loses_what_was_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "tpu_slice", lambda _: (jax.devices()[:1], CHIPS["v5e"]))
    config = default_config()
    set_field(config, "base.model", ["random:llama2_70b"])
    report = programs.compile_for(config, "v5e:1x1", names=("prefill", "decode"))
    for name in ("prefill", "decode"):
        assert not report[name]["fits"] and report[name]["topology"] == "v5e:1x1"
    lines = [*summary_lines(report)]
    assert lines[1].startswith("decode: does not fit: the budget of") and len(lines) == 2


@given(st.integers(1, 512), st.sampled_from([1, 3, 4, 8, 32]))
def test_a_copy_over_many_chips_cuts_heads_or_leaves_chips_idle(chips: int, heads: int) -> None:
    shape = one_copy(chips, heads)
    assert shape.replica == chips
    assert heads % shape.tensor == 0


@pytest.mark.skipif(not HAS_LIBTPU, reason="compiling for TPU needs libtpu: pip install jax[tpu]")
@pytest.mark.parametrize("topology", ["v5e:4x8", "v6e:4x4", "v5p:2x2x4"])
def test_a_copy_on_a_part_of_a_slice_of_several_hosts_does_not_compile(topology: str) -> None:
    config = default_config()
    set_field(config, "compute.mesh", ["tensor=2"])
    set_field(config, "base.model", ["random:tiny"])
    report = programs.compile_for(config, topology, names=("decode",))["decode"]
    assert report["fits"] and report["mesh"]["tensor"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="compiling for TPU needs libtpu: pip install jax[tpu]")
def test_on_a_large_slice_products_wait_for_weights_and_sums_of_gradients() -> None:
    """XLA sends both as sums on all 64 chips; asynchronous ones are pieces of fusions."""
    devices, _ = tpu_slice("v5p:4x4x4")
    compute = choose_compute("bfloat16", 1, platform="tpu")
    config = dataclasses.replace(
        SHAPES["65b"], intermediate_size=8192, vocab_size=512, num_hidden_layers=2
    )
    run = TrainSpec(
        1,
        row_tokens=512,
        precision=compute.precision,
        layout=compute.train_layout,
        kernels=compute.kernels,
        remat="full",
    )
    lowered, *_ = lower_step(plan_training(config, run, devices, None, rows=1))
    waited_for, beside = set(), set()
    fused = False
    for line in lowered.compile().as_text().splitlines():
        if line.endswith("{"):
            fused = line.startswith(("%fused_computation", "%async_collective_fusion"))
        result, is_sum, _ = line.partition(" all-reduce(")
        sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", result)]
        if is_sum and max(sizes, default=0) >= 8192 * 8192:  # a matrix, and no norm
            (channel,) = re.findall(r"channel_id=(\d+)", line)
            (beside if fused else waited_for).add(channel)
    assert len(beside) > 2 * len(waited_for), (beside, waited_for)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="compiling for TPU needs libtpu: pip install jax[tpu]")
@pytest.mark.parametrize("mesh", ["data=4", "tensor=4", "fsdp=2,tensor=2"])
def test_a_model_does_not_compile_for_a_slice_or_copies_its_cache_or_weights(mesh: str) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    config = ["--config=configs/humpback.py:tinyllama", f"--config.compute.mesh={mesh}"]
    command = ["aot", *config, "--topology=v5e:2x2", "--rows=1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "humpback_jax", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    parts = 1 if mesh == "data=4" else 4
    for program in ("prefill", "decode"):
        kinds = result[program]["bytes_by_kind"]
        assert result[program]["fits"]
        assert kinds["parameters"] == pytest.approx(2.2e9 / parts, rel=0.05)
        assert kinds["cache"] == pytest.approx(64 * CACHED_ROW / parts, rel=0.01)
    kinds = result["decode"]["bytes_by_kind"]
    assert kinds["activations"] < 0.1 * kinds["parameters"]
    train = result["train"]
    assert train["fits"] == (mesh != "data=4"), "16 bytes a parameter, of 1.1 billion"
    assert train["bytes_by_kind"]["parameters"] == pytest.approx(4.4e9 / parts, rel=0.05)
    assert train["bytes_by_kind"]["optimizer"] == pytest.approx(8.8e9 / parts, rel=0.05)
    if train["fits"]:
        assert 0.1 < train["est_mfu"] < 0.8
        assert sum(train["collective_bytes"].values()) > 1e9
