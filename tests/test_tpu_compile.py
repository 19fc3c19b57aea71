"""The kernels compile for TPU. If this fails, users find out on a machine they pay for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_tpu.py")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPU needs libtpu: pip install jax[tpu]",
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_kernels_compile_for_tpu_and_tokens_enter_the_cache_without_a_copy_of_it(topology) -> None:
    # A lock keeps processes from sharing a TPU, of which there is none.
    without_tpu = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(SCRIPT.parent.parent),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), topology],
        env={**os.environ, **without_tpu},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    sampling = [row for row in compiled if row["program"] == "sampling"]
    assert len(sampling) == 3
    for row in sampling:
        assert row["scratch_bytes"] < row["cache_bytes"] / 4, row["model"]
    (offload,) = (row for row in compiled if row["program"] == "offload")
    assert offload["host_bytes"] == pytest.approx(offload["kept_bytes"], rel=0.05)
