"""What several verbs make of their arguments."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from humpback_jax.compute import Compute, choose_compute
from humpback_jax.config import default_config, load_config
from humpback_jax.errors import HumpbackError
from humpback_jax.lock import sole_user
from humpback_jax.overrides import apply_overrides

if TYPE_CHECKING:
    from humpback_jax.models import LanguageModel

Result = dict[str, Any]


def chosen_config(
    arguments: argparse.Namespace,
    reads: Sequence[str],
    of_training: Mapping[str, Any] | None = None,
) -> Any:
    """The config of `train` and `aot`: a file's, or the defaults; overrides apply to both.

    Its base is the model that `--model` names, where that is given.

    Args:
      reads: sections and fields of the config that the verb reads.
      of_training: what stands in both training sections where no file is named.

    Raises:
      HumpbackError: see `load_config`, `flag_as_field` and `apply_overrides`; an override of what
        the verb does not read.
    """
    flag_as_field(arguments, "model", "base.model")
    config = load_config(arguments.config) if arguments.config else default_config()
    if not arguments.config:
        for section in (config.backward, config.train):
            section.update(of_training or {})
    apply_overrides(config, arguments.overrides)
    for key in arguments.overrides:
        if not any(key == part or key.startswith(f"{part}.") for part in reads):
            raise HumpbackError(
                f"--config.{key} has no effect on `humpback {arguments.verb}`; leave it out."
            )
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


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other jobs out of it until the block ends.

    Raises:
      HumpbackError: in all processes of the job, where it cannot be written, or is taken.
    """
    import jax

    from humpback_jax.parallel.processes import all_or_none

    with contextlib.ExitStack() as held:

        def take() -> None:
            writable_folder(folder)
            if jax.process_index() == 0:
                held.enter_context(sole_user(folder))

        all_or_none(f"taking {folder}", take)
        yield


def writable_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").touch()
        (folder / ".probe").unlink(missing_ok=True)  # several processes try at once
    except OSError as error:
        raise HumpbackError(f"{folder} cannot be written ({error.strerror}).") from error
