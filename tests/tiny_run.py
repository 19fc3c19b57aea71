"""One finished run of the rehearsal config, shared by the tests that read run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from humpback_jax.artifacts import read_manifest, write_json
from humpback_jax.config import apply_tiny, default_config
from humpback_jax.loop import opened, run
from humpback_jax.run_view import RunView
from humpback_jax.stages.curate import selected_examples
from humpback_jax.stages.train import train_stage


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


def train_again(folder: Path, **settings: Any) -> RunView:
    """Replaces M_2 of a finished rehearsal by one that is trained under other settings."""
    config = tiny_config()
    config.train.update({"eval_every": 0, **settings})
    chosen = selected_examples(RunView(folder).rows("round_2/pairs"))
    others = [entry for entry in read_manifest(folder) if entry["name"] != "round_2/M_2"]
    with opened(config, folder, say=lambda text: None) as context:
        train_stage(context, "round_2/M_2", context.seed + chosen, "forward", [], "both")
    write_json(folder / "manifest.json", {"artifacts": others + read_manifest(folder)})
    return RunView(folder)
