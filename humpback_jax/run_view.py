"""A run folder read only: artifacts by name, their rows, and how the models were trained."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from humpback_jax.artifacts import Row, artifact_rows, read_manifest, read_parquet
from humpback_jax.errors import HumpbackError
from humpback_jax.metrics import logged_rows

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class RunView:
    """What stands in a run folder, finished or not; rows are read when first asked for.

    Attributes:
      entries: the manifest's artifacts by name, in the order in which they were made.
    """

    def __init__(self, root: Path) -> None:
        """Raises HumpbackError where no readable manifest stands."""
        self.root = root
        if not (root / "manifest.json").is_file():
            raise HumpbackError(
                f"{root}: there is no run in this folder (manifest.json is missing)."
            )
        try:
            self.entries: dict[str, Row] = {e["name"]: e for e in read_manifest(root)}
        except (ValueError, KeyError, TypeError) as error:
            raise HumpbackError(
                f"{root / 'manifest.json'} is not readable ({error!r}). Restore it, or run the "
                "same `humpback run` into a new --workdir."
            ) from error
        self._rows: dict[str, list[Row]] = {}

    def names(self, kind: str) -> list[str]:
        """Names of all artifacts of a kind: corpus, candidates, scores, pairs, model, ..."""
        return [name for name, entry in self.entries.items() if entry["kind"] == kind]

    def folder(self, name: str) -> Path:
        return self.root / str(self.entries[name]["path"])

    def rows(self, name: str) -> list[Row]:
        """The rows of an artifact; [] where the run has no artifact of that name (yet)."""
        if name not in self.entries:
            return []
        if name not in self._rows:
            self._rows[name] = artifact_rows(self.folder(name))
        return self._rows[name]

    def details(self, name: str) -> Row:
        return self.entries[name]["details"] if name in self.entries else {}

    @functools.cached_property
    def rounds(self) -> list[int]:
        """The rounds that have made a selection: 1, 2, ..."""
        return sorted(round_of(name) for name in self.names("pairs"))

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The resolved configuration, `config.json`."""
        from ml_collections import ConfigDict

        return ConfigDict(self._json("config.json"))

    @functools.cached_property
    def environment(self) -> Row:
        return self._json("environment.json")

    @functools.cached_property
    def base_hash(self) -> str:
        """Hash of the base model: every model is tuned from it, so it is their first parent."""
        parents = [self.entries[name]["parents"] for name in self.names("model")]
        return parents[0][0] if parents and parents[0] else ""

    def name_of(self, digest: str) -> str:
        """The first artifact with this hash; "base" for the base model, "" where unknown."""
        if digest == self.base_hash:
            return "base"
        return next((n for n, entry in self.entries.items() if entry["hash"] == digest), "")

    def training_data(self, name: str) -> list[Row]:
        """id, source and tokens of the examples that a model was trained on, in file order."""
        return read_parquet(self.folder(name) / "data.parquet")

    def history(self, name: str) -> list[Row]:
        """Training and validation rows of a model, by step.

        `history.json` of the model counts; a training run that was killed and went on knows only
        the steps since then, so that earlier ones are taken from the newest lines of the log.
        """
        path = self.folder(name) / "history.json"
        own: list[Row] = json.loads(path.read_text("utf-8")) if path.is_file() else []
        known = {_moment(row) for row in own}
        logged = {_moment(row): row for row in self._metrics if row.get("stage") == name}
        steps = [step for step, _ in known]
        first = min(steps, default=0)
        earlier = [row for (step, _), row in logged.items() if not own or step < first]
        return sorted([*earlier, *own], key=_moment)

    @functools.cached_property
    def _metrics(self) -> list[Row]:
        return logged_rows(self.root)

    def _json(self, name: str) -> Row:
        path = self.root / name
        try:
            found: Row = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise HumpbackError(f"{path} is missing or not readable ({error}).") from error
        return found


def round_of(name: str) -> int:
    """The round in an artifact's name (`round_2/scores` -> 2), 0 where it names none."""
    match = re.match(r"round_(\d+)/", name)
    return int(match[1]) if match else 0


def short_name(name: str) -> str:
    """`round_1/M_1` -> `M_1`."""
    return name.rsplit("/", 1)[-1]


def _moment(row: Row) -> tuple[int, bool]:
    """Orders a step before the validation that follows it."""
    return int(row["step"]), "validation_nll" in row


def steps_of(history: list[Row], field: str) -> tuple[list[int], list[Any]]:
    """(steps, values) of the rows of a history that have this field."""
    rows = [row for row in history if field in row]
    return [row["step"] for row in rows], [row[field] for row in rows]
