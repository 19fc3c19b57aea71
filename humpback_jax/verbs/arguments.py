"""What several verbs make of their arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from humpback_jax.compute import Compute, choose_compute
from humpback_jax.config import check_config, default_config, load_config, set_field
from humpback_jax.errors import HumpbackError

if TYPE_CHECKING:
    from humpback_jax.models import LanguageModel

Result = dict[str, Any]


def chosen_config(arguments: argparse.Namespace) -> Any:
    """The config of `train` and `aot`: a file's, or the defaults; overrides apply to both.

    Its base is the model that `--model` names, where that is given.

    Raises:
      HumpbackError: see `load_config` and `flag_as_field`.
    """
    flag_as_field(arguments, "model", "base.model")
    if arguments.config:
        return load_config(arguments.config, arguments.overrides)
    config = default_config()
    for key, values in arguments.overrides.items():
        set_field(config, key, values)
    check_config(config)
    return config


def flag_as_field(arguments: argparse.Namespace, flag: str, key: str) -> None:
    """Takes `--FLAG=V`, where it is given, for `--config.KEY=V`.

    Raises:
      HumpbackError: both are given.
    """
    value = getattr(arguments, flag)
    if value is None or value == []:
        return
    if key in arguments.overrides:
        raise HumpbackError(f"--{flag} and --config.{key} mean the same; leave one of them out.")
    values = value if isinstance(value, list) else [value]
    arguments.overrides[key] = [str(each) for each in values]


def adapted(model: LanguageModel, adapter: str | None) -> LanguageModel:
    """The model as it is, with the named adapter in place of its own, or ("none") without any."""
    from humpback_jax.adapters import load_adapter, with_adapter

    if adapter is None:
        return model
    return with_adapter(model, None if adapter == "none" else load_adapter(adapter, model))


def chosen_compute(arguments: argparse.Namespace, rows: int) -> Compute:
    """The number formats asked for, and engine shapes for so many rows decoded together."""
    names = ("precision", "weights", "kv", "mesh", "memory_gb", "drafts")
    return choose_compute(batch_size=rows, **{name: getattr(arguments, name) for name in names})


def run_folder(arguments: argparse.Namespace) -> Path:
    folder = Path(arguments.workdir)
    if not (folder / "manifest.json").is_file():
        raise HumpbackError(
            f"--workdir={folder}: there is no run in this folder (manifest.json is missing)."
        )
    return folder


def writable_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").touch()
        (folder / ".probe").unlink(missing_ok=True)  # several processes try at once
    except OSError as error:
        raise HumpbackError(f"{folder} cannot be written ({error.strerror}).") from error
