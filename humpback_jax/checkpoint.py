"""Orbax behind one file: trained models, and the optimizer state of a training run under way.

The v1 interface lives under `experimental` in the pinned Orbax; only this file knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import Params, flatten, unflatten
from humpback_jax.parallel.processes import all_or_none, as_first_sees
from humpback_jax.training.state import (
    TrainState,
    abstract_stacked,
    laid_out_like,
    stacked_state,
)

SEPARATOR = "."
FREEING_TRIES = 100  # of 0.1 s


def save_params(folder: Path, params: Params) -> None:
    """Writes parameters as one Orbax checkpoint; an unfinished earlier attempt is replaced.

    Raises:
      HumpbackError: they cannot be written.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    with _writable(f"{folder}: the weights", "Fix that, and run the same command again."):
        ocp.save(folder.absolute(), _named(params), overwrite=True)


@contextlib.contextmanager
def _writable(what: str, advice: str) -> Iterator[None]:
    """Turns whatever goes wrong while Orbax writes into a message that says what was written."""
    import orbax.checkpoint.experimental.v1 as ocp

    # Created in the background, a folder that cannot be would keep Orbax's threads waiting for it,
    # and the program from ending.
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    try:
        with context:
            yield
    except Exception as error:  # Orbax and TensorStore raise many unrelated types
        cause = str(error).strip().splitlines()
        raise HumpbackError(
            f"{what} could not be written ({type(error).__name__}: {cause[0] if cause else ''}). "
            f"Is the disk full, or the folder read-only? {advice}"
        ) from error


def holds_params(folder: Path) -> bool:
    """Whether a complete checkpoint stands there."""
    import orbax.checkpoint.experimental.v1 as ocp

    return bool(ocp.is_orbax_checkpoint(folder.absolute()))


def load_params(folder: Path, shapes: Mapping[tuple[str, ...], Any] | None = None) -> Params:
    """Reads parameters as saved, into the host's memory: no device has to hold all of them.

    Args:
      shapes: what they have to be, by their path; None takes whatever is there.

    Raises:
      HumpbackError: the folder holds no complete checkpoint, or one of another architecture.
    """

    def on_host(stored: dict[str, Any]) -> Any:
        found = {name: _shape(leaf) for name, leaf in stored.items()}
        expected = {SEPARATOR.join(path): tuple(shape) for path, shape in (shapes or {}).items()}
        differ = sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        )
        if shapes is not None and differ:
            name = differ[0]
            raise HumpbackError(
                f"{folder}: these weights are of another architecture than the description beside "
                f"them: {name} is {found.get(name, 'absent')} instead of "
                f"{expected.get(name, 'absent')}, and {len(differ) - 1} others differ, too. Copy "
                "the whole checkpoint again."
            )
        # Orbax makes numpy arrays where it is given some; these take no room.
        return {
            name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
            for name, leaf in stored.items()
        }

    return _unnamed(_load(folder, on_host))


def _load(folder: Path, like: Callable[[Any], Any]) -> Any:
    """The tree that was saved; `like` makes of its shapes and dtypes what it is to be read as."""
    return _arrays(folder, like(_shapes(folder)))


def _shapes(folder: Path) -> Any:
    """Shapes and dtypes of the tree that was saved."""
    import orbax.checkpoint.experimental.v1 as ocp

    with _readable(folder):
        if holds_params(folder):
            stored = ocp.metadata(folder.absolute()).metadata
            if stored is not None:
                return stored
            # Orbax has only logged why. Its handler raises it, in a thread without an event loop.
            (inner,) = [file.parent for file in folder.absolute().glob("*/_METADATA")]
            with ThreadPoolExecutor(1) as thread:
                reading = ocp.handlers.PyTreeHandler().metadata(inner)
                return thread.submit(asyncio.run, reading).result()
    raise Damaged(f"{folder}: no complete Orbax checkpoint stands there.")


def _arrays(folder: Path, wanted: Any) -> Any:
    """The tree that was saved. Of several processes, each reads its own part by itself: where one
    of them fails, Orbax would let the others wait for it.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    context, own = ocp.Context(), ocp.multihost.process_index()
    context.multiprocessing.active_processes = {own}
    context.multiprocessing.primary_host = own
    with _readable(folder), context:
        return ocp.load(folder.absolute(), wanted)


class Damaged(HumpbackError):
    """Part of a checkpoint is missing or garbled, whoever reads it, and whenever."""


# TensorStore's, of which the rest speak of the machine; and Python's.
DAMAGE = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE")
ABSENCE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many unrelated types
        causes = list(_causes(error))
        root = f"{type(causes[-1]).__name__}: {causes[-1]}".splitlines()[0]
        why = root.split(" [tensorstore_spec=")[0]
        what = f"{folder}: the checkpoint cannot be read ({why})."
        if all(map(_may_be_damage, causes)):
            raise Damaged(what) from error
        advice = "That is no damage: fix it, and run the same command again."
        raise HumpbackError(f"{what} {advice}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _may_be_damage(error: BaseException) -> bool:
    """Not a lack of memory or rights, or a disk or an accelerator that does not answer."""
    if isinstance(error, OSError):
        return isinstance(error, ABSENCE)
    code = re.match(r"[A-Z_]+(?=: )", str(error))
    return not isinstance(error, MemoryError | RuntimeError) and (code is None or code[0] in DAMAGE)


class Numbered:
    """Checkpoints of one folder, named by the number of steps done, written in the background.

    One is written at a time, and all but the newest `keep` are removed once it is complete. Several
    processes that hold the arrays together call everything together.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._writing: tuple[int, Any] | None = None
        self._given_up: set[int] = set()

    def write(self, step: int, tree: Any, about: dict[str, Any]) -> None:
        """Returns once the arrays are copied to the host: they may then be donated.

        Args:
          about: stored with them, as JSON.

        Raises:
          HumpbackError: this one, or the one before, cannot be written.
        """
        import orbax.checkpoint.experimental.v1 as ocp

        self.wait()
        self._given_up.discard(step)
        path = self._path(step).absolute()
        with self._writable(step):
            written = ocp.save_async(path, tree, overwrite=True, custom_metadata=about)
        self._writing = step, written

    def wait(self) -> None:
        """Returns once what was given to `write` is complete.

        Raises:
          HumpbackError: it cannot be written; those before it are there still.
        """
        import jax

        if self._writing is None:
            return
        (step, written), self._writing = self._writing, None
        with self._writable(step):
            written.result()
        if jax.process_index() == 0:
            whole = [other for other in self.steps() if other not in self._given_up]
            older = [other for other in whole if other <= step][: -self.keep]
            for other in {*older, *self._given_up} - {step}:
                shutil.rmtree(self._path(other), ignore_errors=True)
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def _writable(self, step: int) -> contextlib.AbstractContextManager[None]:
        what = f"{self.folder}: the state after step {step}"
        return _writable(what, "The state before it is kept: the same command goes on from it.")

    def steps(self) -> list[int]:
        """Of the checkpoints there are, the oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def give_up(self, steps: Iterable[int]) -> None:
        """Removes these once another one is complete, unless they are written again."""
        self._given_up.update(steps)

    def about(self, step: int) -> dict[str, Any]:
        """What was stored with a checkpoint.

        Raises:
          HumpbackError: it cannot be read; `Damaged` if it never can.
        """
        with _readable(self._path(step)):
            # Orbax would call a file empty that it may not read.
            text = (self._path(step) / "_CHECKPOINT_METADATA").read_text("utf-8")
            return dict(json.loads(text)["custom_metadata"])

    def read(self, step: int, like: Callable[[Any], Any]) -> Any:
        """The arrays; see `_load`. All processes raise what one of them has to raise.

        Raises:
          HumpbackError: see `about`.
        """
        path = self._path(step)
        wanted = all_or_none(f"{path}: reading it", lambda: like(_shapes(path)), Damaged)
        return all_or_none(f"{path}: reading it", lambda: _arrays(path, wanted), Damaged)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"


class ResumeFolder:
    """The state of one training run, kept while it lasts so that a killed run can go on.

    Layers are stored stacked, however they are trained, so that any device goes on from any other.
    Several processes that train together save and restore together.
    """

    def __init__(
        self, folder: Path, keep: int = 2, belongs_to: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
          keep: how many of the newest states.
          belongs_to: what the run is, e.g. hashes of its config and data. Stored with each state;
            one of another run is refused, since to start over would in time remove it.
        """
        self.folder, self.belongs_to = folder, dict(belongs_to or {})
        self._states = Numbered(folder, keep)
        self._best = Numbered(folder / "best", 1)

    def save(self, state: TrainState) -> None:
        """Saves everything that changes (`frozen` does not), while training goes on.

        Raises:
          HumpbackError: the state before this one could not be written, or this one cannot.
        """
        # A run that goes on from this state relies on what was the best until then.
        self._best.wait()
        step = int(state.step)
        changing = stacked_state(state._replace(frozen={}))
        self._states.write(step, _flat(changing), {"step": step, **self.belongs_to})

    def wait(self) -> None:
        """Returns once everything saved is complete.

        Raises:
          HumpbackError: it cannot be written.
        """
        self._states.wait()
        self._best.wait()

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest readable state in the form of `like`, whatever lay where and in which layout
        when it was saved; None where there is none.

        Args:
          like: a state, or shapes and where they lie (`state.abstract_state`). Of two states, one
            may not fit: no array should be there yet.

        Raises:
          HumpbackError: the folder belongs to another run, all of its states are damaged, or one
            that is not cannot be read now.
        """
        import jax

        steps, before = as_first_sees(self._states.steps()), len(jax.live_arrays())
        for step in reversed(steps):
            try:
                return self._read(self._states, step, like)
            except Damaged as error:
                print(f"warning: {error} Falling back to the one before.")
            self._states.give_up([step])
            _free_what_was_read(before)
        if steps:
            raise HumpbackError(
                f"{self.folder}: all states there, of steps {', '.join(map(str, steps))}, are "
                "damaged. Delete that folder to start over."
            )
        return None

    def save_best(self, state: TrainState, nll: float) -> None:
        """Keeps the parameters as the best so far, by their loss on validation rows.

        Raises:
          HumpbackError: they cannot be written.
        """
        step = int(state.step)
        about = {"step": step, "validation_nll": nll, **self.belongs_to}
        best = stacked_state(state._replace(frozen={}, optimizer=()))
        self._best.wait()
        self._best.give_up(self._best.steps())
        self._best.write(step, _flat(best), about)

    def best_nll(self) -> float:
        """Loss of the newest that `save_best` was given; infinite where there is none.

        Raises:
          HumpbackError: the folder belongs to another run.
        """
        self._best.wait()
        steps = as_first_sees(self._best.steps())
        if not steps:
            return math.inf
        return all_or_none(
            f"{self.folder}: reading the best loss",
            lambda: float(self._own_about(self._best, steps[-1])["validation_nll"]),
        )

    def restore_best(self, like: TrainState) -> TrainState:
        """The step and the parameters that `save_best` was given last; nothing of the optimizer's.

        Args:
          like: see `restore`.

        Raises:
          HumpbackError: they cannot be read.
        """
        self._best.wait()
        steps = as_first_sees(self._best.steps())
        if not steps:
            raise HumpbackError("no loss on the validation rows was a finite number.")
        return self._read(self._best, steps[-1], like._replace(optimizer=()))

    def delete(self) -> None:
        """Removes the state; called once the trained model is safe."""
        import jax

        if jax.process_index() > 0 or not self.folder.exists():
            return
        # First renamed: half of a folder could hold a state without its best parameters.
        deleted = self.folder.with_name(f".{self.folder.name}.deleted")
        shutil.rmtree(deleted, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)

    def _own_about(self, states: Numbered, step: int) -> dict[str, Any]:
        about = states.about(step)
        other = [name for name, value in self.belongs_to.items() if about.get(name) != value]
        if other:
            raise HumpbackError(
                f"{self.folder}: the state there, of step {about.get('step')}, is of a run with "
                f"another {', '.join(other)}. Run that command again to finish it, choose another "
                "folder, or delete this one to start over."
            )
        return about

    def _read(self, states: Numbered, step: int, like: TrainState) -> TrainState:
        import jax

        expected = abstract_stacked(like._replace(frozen={}))
        flat = _flat(expected)

        def where_ours_lies(stored: Any) -> Any:
            self._own_about(states, step)
            if jax.tree.map(_shape, stored) != jax.tree.map(_shape, flat):
                raise HumpbackError(
                    f"{self.folder}: the state there, of step {step}, is of another kind of run. "
                    "Choose another folder, or delete this one to start over."
                )
            return jax.tree.map(
                lambda leaf, ours: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=ours.sharding
                ),
                stored,
                flat,
            )

        tree = states.read(step, where_ours_lies)
        leaves = [tree["optimizer"][name] for name in sorted(tree["optimizer"])]
        optimizer = jax.tree.unflatten(jax.tree.structure(expected.optimizer), leaves)
        found = TrainState(tree["step"], _unnamed(tree["trainable"]), {}, optimizer)
        return laid_out_like(like, found)._replace(frozen=like.frozen)


def _free_what_was_read(before: int) -> None:
    """Waits a little until there are as few arrays as before a read that failed.

    Reads under way end after it; what they have read and their errors hold each other. That nobody
    asked for these errors is not said, page after page.
    """
    import jax

    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        for _ in range(FREEING_TRIES):
            gc.collect()
            if len(jax.live_arrays()) <= before:
                break
            time.sleep(0.1)
    finally:
        logger.disabled, sys.unraisablehook = False, hook


def _flat(state: TrainState) -> dict[str, Any]:
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
