"""One finished run of the rehearsal config, shared by the tests that read run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from humpback_jax.config import apply_tiny, default_config
from humpback_jax.loop import run


def tiny_config() -> Any:
    """The rehearsal config."""
    config = default_config()
    with config.unlocked():
        config.name = "shared-rehearsal"
    apply_tiny(config)
    return config


def make_tiny_run(folder: Path) -> Path:
    """Runs it in `folder`, which must be new."""
    run(tiny_config(), folder, say=lambda text: None)
    return folder
