"""Several devices and processes: the same text and the same scores, in parts.

If these fail, users who move a job to more chips or hosts get another result than on one, or
each chip holds, and computes, what one was to share with the others.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_llama import SMOLLM2

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.shapes import SHAPES
from humpback_jax.models import load_model
from humpback_jax.parallel.mesh import (
    AXES,
    MeshShape,
    Share,
    cut_rows_and_weights,
    our_share,
    parse_mesh,
)
from humpback_jax.parallel.rules import RULES, check_sharded, head_units, partition

ROOT = Path(__file__).parent.parent
ONE = "data=1"
MESHES = (
    *("data=8", "fsdp=8", "tensor=8", "data=4,fsdp=2", "data=2,tensor=4", "data=4,tensor=2"),
    *("fsdp=4,tensor=2", "fsdp=2,tensor=4", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"),
)
ROWS, NEW = 40, 16


def on_meshes(model: str, rows: int, new: int, *meshes: str) -> dict[str, Any]:
    command = [sys.executable, "tests/on_meshes.py", model, str(rows), str(new), *meshes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_same(found: dict[str, Any], meshes: tuple[str, ...], strays: int) -> None:
    """Texts are those of one device, `strays` of each kind aside; scores to float32 rounding."""
    for mesh in meshes:
        for kind in ("greedy", "sampled"):
            pairs = list(zip(found[ONE][kind], found[mesh][kind], strict=True))
            others = [(a, b) for a, b in pairs if a[:2] != b[:2]]
            assert len(others) <= strays, (mesh, kind, others)
            same = np.array([(a[2], b[2]) for a, b in pairs if a[:2] == b[:2]])
            np.testing.assert_allclose(same[:, 1], same[:, 0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[mesh]["scores"], found[ONE]["scores"], atol=1e-4)


def test_chips_that_share_a_job_write_another_text_than_one_alone() -> None:
    found = on_meshes("tiny", ROWS, NEW, ONE, "data=2,fsdp=2,tensor=2")
    check_same(found, ("data=2,fsdp=2,tensor=2",), strays=0)
    assert len({text for text, _, _ in found[ONE]["sampled"]}) > ROWS // 2, "the texts differ"


@pytest.mark.slow
def test_on_some_mesh_shape_the_text_is_another_one() -> None:
    found = on_meshes("tiny", ROWS, NEW, ONE, *MESHES)
    check_same(found, MESHES, strays=0)
    for mesh in MESHES:
        parts = np.prod([int(size.partition("=")[2]) for size in mesh.split(",")])
        parts //= parse_mesh(mesh).data or 1
        # Norms and the odd vocabulary of 259 tokens stay whole along tensor.
        assert found[mesh]["bytes"] < found[ONE]["bytes"] * (1 / parts + 0.35), mesh


@pytest.mark.slow
@pytest.mark.real_model
def test_nine_heads_that_never_divide_evenly_change_the_default_models_text() -> None:
    meshes = ("tensor=2,data=1", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2")
    found = on_meshes("smollm2-135m-instruct", 32, 16, ONE, *meshes)
    check_same(found, meshes, strays=1)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("auto", None),
        ("tensor=4", MeshShape(0, 1, 4)),
        ("data=2,fsdp=4,tensor=8", MeshShape(2, 4, 8)),
    ],
)
def test_a_mesh_is_read_as_written(text: str, shape: MeshShape | None) -> None:
    assert parse_mesh(text) == shape


@pytest.mark.parametrize("text", ["", "model=2", "data", "data=0", "data=x", "data=2,data=4"])
def test_a_mesh_that_makes_no_sense_is_an_error_that_says_how_to_write_one(text: str) -> None:
    with pytest.raises(HumpbackError, match="data=2,tensor=4"):
        parse_mesh(text)


def test_a_mesh_larger_than_the_machine_is_an_error_before_any_work() -> None:
    with pytest.raises(HumpbackError, match="takes 64 devices, here are"):
        our_share(parse_mesh("data=64"))
    with pytest.raises(HumpbackError, match="one copy of the model takes 64 devices"):
        our_share(parse_mesh("tensor=64"))


def test_several_processes_ignore_how_many_copies_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has devices of its own: none of them could be left out."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert our_share(parse_mesh("data=2")).count == our_share(parse_mesh("tensor=1")).count == 2
    with pytest.raises(HumpbackError, match=r"data=1.* takes 1 of 2 devices.* leave data= out"):
        our_share(parse_mesh("data=1"))


@pytest.mark.slow
def test_a_copy_of_the_model_waits_for_another() -> None:
    """Each copy is a mesh of its own: no program spans two of them."""
    assert our_share(None).meshes == (None,)
    assert our_share(parse_mesh("data=1")).meshes == (None,)
    found = on_meshes("tiny", ROWS, NEW, ONE, "data=2,fsdp=2,tensor=2", "data=8")
    assert found["data=2,fsdp=2,tensor=2"]["copies"] == [4, 4]
    assert found["data=8"]["copies"] == [1] * 8


def test_every_shard_of_a_job_belongs_to_exactly_one_part() -> None:
    shares = [Share((None,), number, 5) for number in range(5)]
    for shard in range(23):
        assert sum(share.takes(shard) for share in shares) == 1


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh((data, fsdp, tensor), AXES)


def test_a_head_is_cut_in_two_where_heads_do_not_divide() -> None:
    config = load_model("tiny-random").config
    nine = LlamaConfig(**{**vars(config), "num_attention_heads": 9, "num_key_value_heads": 3})
    mesh, units = mesh_of(1, 2, 2), head_units(nine)
    assert partition(("embed", "heads"), (64, 9 * 16), mesh, units) == P("fsdp", None)
    assert partition(("embed", "heads"), (64, 8 * 16), mesh, head_units(config)) == P(
        "fsdp", "tensor"
    )
    assert partition(("embed", "mlp"), (63, 96), mesh) == P(None, "tensor")


@pytest.mark.parametrize(
    ("config", "mesh", "message"),
    [
        (SHAPES["7b"], (1, 24, 1), r"fsdp=24 .* width of 4096: 100% .* write fsdp=8, .* to data"),
        (SHAPES["7b"], (1, 1, 7), r"tensor=7 .* MLP of 11008: 100% .* write tensor=1"),
        (SMOLLM2, (2, 5, 1), r"fsdp=5 .* 576"),
    ],
)
def test_each_chip_holds_the_whole_model_on_a_mesh_that_was_to_cut_it(
    config: LlamaConfig, mesh: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(HumpbackError, match=message):
        check_sharded(config, mesh_of(*mesh))


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (SMOLLM2, (2, 2, 2)),  # nine heads
        (SMOLLM2, (24, 1, 1)),
        (SHAPES["tiny"], (1, 1, 8)),  # 259 tokens
        (SHAPES["llama2_70b"], (2, 8, 16)),  # eight key/value heads
        (SHAPES["33b"], (1, 512, 1)),
    ],
)
def test_a_mesh_is_refused_for_heads_or_an_odd_vocabulary(
    config: LlamaConfig, mesh: tuple[int, int, int]
) -> None:
    check_sharded(config, mesh_of(*mesh))


@pytest.mark.parametrize(
    ("devices", "width", "shape"), [(24, 4096, (3, 8)), (16, 576, (1, 16)), (5, 64, (5, 1))]
)
def test_auto_leaves_the_model_whole_on_a_number_of_chips_that_does_not_divide_it(
    devices: int, width: int, shape: tuple[int, int]
) -> None:
    assert cut_rows_and_weights(devices, width) == MeshShape(*shape)


def test_two_axes_of_an_array_on_one_axis_of_the_mesh_are_an_error() -> None:
    with pytest.raises(HumpbackError, match="same axis of the mesh"):
        partition(("mlp", "vocab"), (64, 64), mesh_of(1, 1, 2))
    with pytest.raises(HumpbackError, match="'experts' has no rule"):
        partition(("experts",), (64,), mesh_of(1, 1, 2))
    assert set(RULES.values()) <= {*AXES, None}


def by_variables(port: int, count: int, number: int) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }


def by_slurm(port: int, count: int, number: int) -> dict[str, str]:
    """What Slurm sets in each task of a step."""
    return {
        "HUMPBACK_DISTRIBUTED": "1",
        "JAX_COORDINATOR_PORT": f"{port}",
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": f"{count}",
        "SLURM_PROCID": f"{number}",
        "SLURM_LOCALID": f"{number}",
    }


def start_several(
    count: int,
    arguments: list[str],
    devices: int,
    program: Sequence[str] = ("-m", "humpback_jax"),
    numbers: Sequence[int] | None = None,
    told: Callable[[int, int, int], dict[str, str]] = by_variables,
) -> list[subprocess.Popen[str]]:
    """A verb, or another program, in `count` processes of so many devices each.

    Args:
      numbers: of those that are started; None for all.
      told: what tells a process of its job: of a free port, the count and its number.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in range(count) if numbers is None else numbers:
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            **told(port, count, number),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=ROOT,
                env={**environment, "PYTHONPATH": str(ROOT)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return processes


def several(count: int, arguments: list[str], devices: int) -> list[str]:
    """Runs a verb in `count` processes; returns what each printed."""
    printed = []
    for process in start_several(count, arguments, devices):
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        printed.append(output)
    return printed


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "tensor=8"])
def test_two_hosts_write_another_file_than_one(mesh: str, tmp_path: Path) -> None:
    """Two processes with four devices each: two copies of the model a host, or one over both."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"Count to {i} {'x' * (i % 60)}"}) + "\n" for i in range(600))
    )
    common = ["sample", "--model=tiny-random", f"--prompts={prompts}", "--max-tokens=6"]
    common += ["--batch-size=8", "--precision=float32"]
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    several(1, [*common, f"--out={alone}"], 1)
    printed = several(2, [*common, f"--out={together}", f"--mesh={mesh}"], 4)
    one, two = rows_of(alone), rows_of(together)
    assert [row["output"] for row in one] == [row["output"] for row in two]
    np.testing.assert_allclose(
        [row["logprob"] for row in two], [row["logprob"] for row in one], atol=1e-3
    )
    shares = [344, 256] if mesh == "tensor=2" else [600, 600]
    for output, share in zip(printed, shares, strict=True):
        assert f"{share} of {share} rows" in output
    assert not list(tmp_path.glob(".*shards"))


@pytest.mark.slow
def test_two_hosts_rate_a_file_unlike_one(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"instruction": f"Say {i}", "output": f"{i} " * (i % 9 + 1)}) + "\n"
            for i in range(300)
        )
    )
    common = ["score", "--model=tiny-random", f"--data={pairs}", "--precision=float32"]
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    several(1, [*common, f"--out={alone}"], 1)
    several(2, [*common, f"--out={together}"], 1)
    assert rows_of(alone) == rows_of(together)


def test_a_mesh_that_cuts_nothing_samples_with_the_whole_model_on_each_device(
    tmp_path: Path,
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n', encoding="utf-8")
    command = ["sample", "--model=tiny-random", f"--prompts={prompts}", "--mesh=fsdp=3"]
    (process,) = start_several(1, [*command, f"--out={tmp_path / 'out.jsonl'}"], 3)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "fsdp=3 does not divide the model's width" in errors and "write fsdp=1" in errors


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, "JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS"),
        ({"HUMPBACK_DISTRIBUTED": "1"}, "no Cloud TPU slice, Slurm or Open MPI job"),
    ],
)
def test_half_a_description_of_the_processes_starts_jobs_that_write_over_each_other(
    given: dict[str, str], missing: str
) -> None:
    environment = {**os.environ, **given}
    done = subprocess.run(
        [sys.executable, "-m", "humpback_jax", "score", "--data=x", "--out=y"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert missing in done.stderr


JOIN = """
import sys
from humpback_jax.errors import HumpbackError
from humpback_jax.parallel import processes
processes.START_SECONDS = int(sys.argv[1])
try:
    print(processes.join_processes())
except HumpbackError as error:
    sys.exit(f"error: {error}")
"""


def joined(
    count: int,
    numbers: Sequence[int],
    seconds: int,
    told: Callable[[int, int, int], dict[str, str]] = by_variables,
) -> list[tuple[int, str]]:
    """(exit code, all that it printed) of those processes of a job that were started."""
    program = ("-c", JOIN)
    started = start_several(count, [f"{seconds}"], 1, program, numbers, told)
    printed = [process.communicate(timeout=120) for process in started]
    return [
        (process.returncode, output + errors)
        for process, (output, errors) in zip(started, printed, strict=True)
    ]


@pytest.mark.parametrize("told", [by_variables, by_slurm])
@pytest.mark.parametrize(
    ("count", "came", "missing"),
    [(4, (0, 2), "processes 1, 3 are missing"), (3, (1, 2), "process 0 is missing")],
)
def test_a_missing_host_aborts_the_others_and_nobody_says_which_one_it_is(
    count: int,
    came: tuple[int, ...],
    missing: str,
    told: Callable[[int, int, int], dict[str, str]],
) -> None:
    for code, printed in joined(count, came, 5, told):
        assert code == 1, printed
        (line,) = printed.splitlines()
        assert line.startswith(f"error: {missing} of the {count} of this job"), printed


def test_two_hosts_with_the_same_number_wait_for_a_third() -> None:
    for code, printed in joined(3, (0, 1, 1), 60):
        assert code == 1 and "process 1 of 3 came twice" in printed


@pytest.mark.parametrize("told", [by_variables, by_slurm])
def test_hosts_that_have_met_are_not_connected(
    told: Callable[[int, int, int], dict[str, str]],
) -> None:
    for code, printed in joined(2, (1, 0), 60, told):
        assert (code, printed.splitlines()[-1]) == (0, "2"), printed


LATE = """
import os
import time
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_timeout_seconds=1"  # otherwise half an hour
import jax
from humpback_jax.parallel import processes
processes.join_processes()
processes.wait_for_all("all are here")
time.sleep(4 * jax.process_index())
processes.wait_for_all("all shards are written")
print("met")
"""


def test_a_host_that_is_done_long_before_another_gives_up() -> None:
    for process in start_several(2, [], 1, ("-c", LATE)):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and output.endswith("met\n"), errors[-2000:]
