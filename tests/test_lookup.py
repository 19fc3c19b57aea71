"""Embeddings in training: if these fail, a slice spends its links on tables and not on rows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MESHES = ("data=2,fsdp=4", "data=2,fsdp=2,tensor=2")
TABLE = 512 * 64  # the vocabulary and the width in tests/collectives_of_training.py


def test_xla_puts_the_whole_embedding_table_together_on_every_device_and_warns_of_it() -> None:
    done = subprocess.run(
        [sys.executable, "collectives_of_training.py", *MESHES],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rematerialization" not in done.stderr
    found = json.loads(done.stdout)
    for mesh in MESHES:
        kinds = {each["kind"] for each in found[mesh]}
        assert "all-to-all" in kinds, "rows and columns have to change places"
        # The head is put together, and its gradient added up; the table has its shape turned.
        rows = [sizes for each in found[mesh] for _, sizes in each["arrays"] if sizes[-1:] == [64]]
        assert max(map(math.prod, rows)) < TABLE // 2, mesh
