"""Orbax behind one file: trained models, and the optimizer state of a training run under way.

The v1 interface lives under `experimental` in the pinned Orbax; only this file knows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import Params, flatten, unflatten
from humpback_jax.training.state import TrainState

SEPARATOR = "."


def save_params(folder: Path, params: Params) -> None:
    """Writes parameters as one Orbax checkpoint; an unfinished earlier attempt is replaced."""
    import orbax.checkpoint.experimental.v1 as ocp

    ocp.save(folder.absolute(), _named(params), overwrite=True)


def load_params(folder: Path) -> Params:
    """Reads parameters as saved, on the default device.

    Raises:
      HumpbackError: the folder holds no complete checkpoint.
    """
    import jax

    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return _unnamed(_load(folder, lambda stored: jax.tree.map(lambda _: place, stored)))


def _load(folder: Path, where: Callable[[Any], Any]) -> Any:
    """The tree that was saved; `where` gives a sharding for each of its arrays."""
    import jax
    import orbax.checkpoint.experimental.v1 as ocp

    if not ocp.is_orbax_checkpoint(folder.absolute()):
        raise HumpbackError(f"{folder}: no complete Orbax checkpoint stands there.")
    try:
        stored = ocp.metadata(folder.absolute()).metadata
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            stored,
            where(stored),
        )
        return ocp.load(folder.absolute(), abstract)
    except HumpbackError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many unrelated types
        raise HumpbackError(f"{folder}: the checkpoint cannot be read ({error}).") from error


class ResumeFolder:
    """The state of one training run, kept while it lasts so that a killed run can go on.

    Several processes that train together save and restore together.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: TrainState) -> None:
        """Saves everything that changes (`frozen` does not), named by the number of steps done."""
        import jax
        import orbax.checkpoint.experimental.v1 as ocp

        step = int(state.step)
        ocp.save((self.folder / f"{step:08d}").absolute(), _changing(state), overwrite=True)
        if jax.process_index() == 0:
            for old in self._steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"{old:08d}", ignore_errors=True)

    def restore(self, state: TrainState) -> TrainState | None:
        """The newest readable state of the form of `state`, where `state` lies, whatever lay where
        when it was saved; None where there is none.
        """
        import jax

        expected = _changing(state)

        def where(stored: Any) -> Any:
            if jax.tree.map(_shape, stored) != jax.tree.map(_shape, expected):
                raise HumpbackError(f"{self.folder}: this state belongs to another kind of run.")
            return jax.tree.map(lambda leaf: leaf.sharding, expected)

        for step in reversed(self._steps()):
            try:
                tree = _load(self.folder / f"{step:08d}", where)
            except HumpbackError as error:
                print(f"warning: {error} Falling back to the one before.")
                continue
            leaves = [tree["optimizer"][name] for name in sorted(tree["optimizer"])]
            return TrainState(
                tree["step"],
                _unnamed(tree["trainable"]),
                state.frozen,
                jax.tree.unflatten(jax.tree.structure(state.optimizer), leaves),
            )
        return None

    def delete(self) -> None:
        """Removes the state; called once the trained model is safe."""
        import jax

        if jax.process_index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())


def _changing(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "trainable": _named(state.trainable),
        "optimizer": _numbered(state.optimizer),
    }


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape)


def _named(params: Params) -> dict[str, Any]:
    return {SEPARATOR.join(map(str, path)): leaf for path, leaf in flatten(params).items()}


def _unnamed(flat: dict[str, Any]) -> Params:
    def key(name: str) -> str | int:
        return int(name) if name.isdigit() else name

    return unflatten({tuple(map(key, name.split(SEPARATOR))): leaf for name, leaf in flat.items()})


def _numbered(tree: Any) -> dict[str, Any]:
    import jax

    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
