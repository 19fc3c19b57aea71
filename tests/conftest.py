"""What all tests share: one cache of compiled programs, and data beside the tree."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from humpback_jax.allocator import return_free_memory

REPO_ROOT = Path(__file__).resolve().parent.parent

# JAX reads these when it is imported, which happens after this file; processes that tests start
# inherit them. Most programs are small: even those that compile in 0.1 s are worth keeping.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO_ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# A test may wait for the processor or for a compilation: slowness of one example is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="module", autouse=True)
def no_program_outlives_its_module() -> Iterator[None]:
    """Compiled programs keep scratch memory: those of all slow tests took more than 12 GB."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
        return_free_memory()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `shared/data` beside the working tree; the test is skipped where there is none."""
    folder = REPO_ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which does not come with the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished rehearsal; tests that change something work on a copy."""
    from tiny_run import make_tiny_run

    return make_tiny_run(tmp_path_factory.mktemp("shared") / "run")
