"""Artifacts: if these fail, a killed run repeats work, mixes old rows with new, or loses some."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from humpback_jax.artifacts import (
    Artifact,
    RunFolder,
    Stage,
    artifact_rows,
    read_manifest,
    read_parquet,
    rows_hash,
    write_json,
    write_parquet,
)
from humpback_jax.errors import HumpbackError
from humpback_jax.lock import sole_user


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def folder_at(root: Path, **settings: Any) -> RunFolder:
    return RunFolder(root / "run", say=lambda text: None, **settings)


class Maker:
    """Makes `total` numbered rows in shards of `size`; may die before a shard."""

    def __init__(self, total: int = 10, size: int = 4, die_at: int | None = None) -> None:
        self.total, self.size, self.die_at, self.made = total, size, die_at, []

    def __call__(self, index: int) -> list[dict[str, Any]]:
        if index == self.die_at:
            raise Killed
        self.made.append(index)
        first = index * self.size
        return [{"id": str(n), "value": n / 7} for n in range(self.total)[first:][: self.size]]

    def run(self, folder: RunFolder, name: str = "rows", version: int = 1) -> Artifact:
        stage = Stage("numbers", version, {"total": self.total})
        shards = -(-self.total // self.size)
        return folder.rows(name, "rows", stage, [], shards, self, shard_rows=self.size)


WHOLE = [{"id": str(n), "value": n / 7} for n in range(10)]


def test_a_finished_artifact_is_not_made_again(tmp_path):
    first = Maker()
    artifact = first.run(folder_at(tmp_path))
    again = Maker()
    folder = folder_at(tmp_path)
    assert again.run(folder) == artifact and again.made == [] and folder.redone == 0
    assert folder.read(artifact) == WHOLE and artifact.rows == 10


@pytest.mark.parametrize("die_at", [0, 1, 2])
def test_a_run_killed_between_shards_makes_only_the_missing_ones(die_at, tmp_path):
    unbroken = Maker().run(folder_at(tmp_path / "a"))
    with pytest.raises(Killed):
        Maker(die_at=die_at).run(folder_at(tmp_path / "b"))
    assert read_manifest(tmp_path / "b" / "run") == []
    maker, folder = Maker(), folder_at(tmp_path / "b")
    artifact = maker.run(folder)
    assert maker.made == list(range(die_at, 3))
    assert artifact.hash == unbroken.hash and folder.read(artifact) == WHOLE


@pytest.mark.parametrize(("old", "new"), [(4, 3), (3, 4), (6, 7), (2, 10)])
def test_shards_cut_another_way_before_the_kill_are_not_mixed_in(old, new, tmp_path):
    with pytest.raises(Killed):
        Maker(size=old, die_at=1).run(folder_at(tmp_path))
    folder = folder_at(tmp_path)
    artifact = Maker(size=new).run(folder)
    assert folder.read(artifact) == WHOLE
    assert artifact.hash == Maker().run(folder_at(tmp_path / "other")).hash


def test_another_shard_size_alone_redoes_nothing(tmp_path):
    Maker(size=4).run(folder_at(tmp_path))
    maker = Maker(size=3)
    maker.run(folder_at(tmp_path))
    assert maker.made == []


def test_a_deleted_shard_of_a_finished_artifact_is_made_again_and_not_missed(tmp_path):
    artifact = Maker().run(folder_at(tmp_path))
    part = tmp_path / "run" / artifact.path / "part-00001.parquet"
    part.unlink()
    with pytest.raises(HumpbackError, match="holds 6 rows, not 10"):
        folder_at(tmp_path).read(artifact)
    maker, folder = Maker(), folder_at(tmp_path)
    assert maker.run(folder) == artifact
    assert maker.made == [1] and folder.read(artifact) == WHOLE


def test_a_damaged_shard_is_named_with_a_remedy_that_works(tmp_path):
    artifact = Maker().run(folder_at(tmp_path))
    part = tmp_path / "run" / artifact.path / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(
        HumpbackError, match=r"part-00001\.parquet cannot be read.*Delete that file"
    ):
        folder_at(tmp_path).read(artifact)
    part.unlink()
    maker = Maker()
    maker.run(folder_at(tmp_path))
    assert maker.made == [1]


@pytest.mark.parametrize(
    ("name", "text"),
    [("artifact.json", '{"ha'), ("artifact.json", "{}"), ("layout.json", '{"ha')],
)
def test_damaged_notes_are_named_with_a_remedy_that_works(name, text, tmp_path):
    artifact = Maker().run(folder_at(tmp_path))
    note = tmp_path / "run" / artifact.path / name
    note.write_text(text)
    with pytest.raises(HumpbackError, match=f"{name} cannot be read"):
        Maker().run(folder_at(tmp_path))
    note.unlink()
    folder = folder_at(tmp_path)
    assert folder.read(Maker().run(folder)) == WHOLE


def test_a_damaged_manifest_comes_back(tmp_path):
    artifact = Maker().run(folder_at(tmp_path))
    (tmp_path / "run" / "manifest.json").write_text("[")
    Maker().run(folder_at(tmp_path))
    assert [entry["hash"] for entry in read_manifest(tmp_path / "run")] == [artifact.hash]


def test_a_fresh_run_makes_all_again_deletes_nothing_and_can_be_continued(tmp_path):
    first = Maker().run(folder_at(tmp_path))
    with pytest.raises(Killed):
        Maker(die_at=1).run(folder_at(tmp_path, fresh=True))
    maker = Maker()
    second = maker.run(folder_at(tmp_path))  # continues the newest attempt
    assert maker.made == [1, 2] and second.hash == first.hash and second.path != first.path
    assert artifact_rows(tmp_path / "run" / first.path) == WHOLE
    third = Maker().run(folder_at(tmp_path, fresh=True))
    assert len({first.path, second.path, third.path}) == 3
    for index in range(9):
        latest = Maker().run(folder_at(tmp_path, fresh=True))
        assert latest.path.endswith(f"-{index + 3}")
    assert Maker().run(folder_at(tmp_path)).path == latest.path


def test_a_fresh_attempt_never_lands_in_an_old_one_where_a_folder_was_deleted(tmp_path):
    import shutil

    for _ in range(3):
        latest = Maker().run(folder_at(tmp_path, fresh=True))
    shutil.rmtree(tmp_path / "run" / "store" / latest.key)
    maker = Maker()
    assert maker.run(folder_at(tmp_path, fresh=True)).path != latest.path and maker.made


def test_a_key_depends_on_version_fields_and_parents_content_alone():
    def parent(name: str, digest: str, path: str) -> Artifact:
        return Artifact(name, "rows", "key", digest, (), 1, path, "stage", {}, {})

    base = Stage("score", 1, {"a": 1, "b": [2]})
    key = base.key([parent("x", "hash", "store/1")])
    assert key == Stage("score", 1, {"b": [2], "a": 1}).key([parent("y", "hash", "store/2")])
    assert key == base.key(["hash"])
    others = [
        Stage("score", 2, base.fields).key(["hash"]),
        Stage("other", 1, base.fields).key(["hash"]),
        Stage("score", 1, {"a": 1, "b": [3]}).key(["hash"]),
        base.key(["other"]),
        base.key(["hash", "hash"]),
        base.key([]),
    ]
    assert len({key, *others}) == 7


def test_a_new_version_of_a_stage_makes_its_rows_again(tmp_path):
    Maker().run(folder_at(tmp_path))
    maker = Maker()
    maker.run(folder_at(tmp_path), version=2)
    assert maker.made == [0, 1, 2]


def test_names_of_an_earlier_run_under_another_config_never_stand_beside_this_ones(tmp_path):
    folder = folder_at(tmp_path)
    Maker(total=3).run(folder, "kept")
    Maker().run(folder, "old")
    folder = folder_at(tmp_path)
    Maker(total=3).run(folder, "kept")
    entries = read_manifest(tmp_path / "run")
    assert [(e["name"], e["status"], e["rows"]) for e in entries] == [("kept", "done", 3)]
    assert {"name", "kind", "hash", "parents", "rows", "status", "path"} <= set(entries[0])


def test_a_run_folder_can_be_moved(tmp_path):
    artifact = Maker().run(folder_at(tmp_path))
    (tmp_path / "run").rename(tmp_path / "moved")
    maker = Maker()
    folder = RunFolder(tmp_path / "moved", say=lambda text: None)
    assert maker.run(folder) == artifact and maker.made == [] and folder.read(artifact) == WHOLE


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HumpbackError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run")
    with pytest.raises(HumpbackError, match="cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


def test_a_full_disk_is_one_message_and_leaves_no_half_file(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    def full(table: Any, where: Path, **_: Any) -> None:
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(HumpbackError, match="No space left on device"):
        write_parquet(tmp_path / "part.parquet", [{"a": 1}])
    assert list(tmp_path.iterdir()) == []


COLUMNS = st.sampled_from(
    [st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(), st.text("aé🦀\n")]
)
TABLES = st.lists(COLUMNS, min_size=1, max_size=4).flatmap(
    lambda columns: st.lists(
        st.fixed_dictionaries({f"c{i}": st.none() | c for i, c in enumerate(columns)}), max_size=6
    )
)


@given(TABLES)
def test_rows_come_back_from_a_shard_as_they_went_in(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("shard") / "part.parquet"
    write_parquet(path, rows)
    found = read_parquet(path)
    assert rows_hash(found) == rows_hash(rows)
    assert [{k: type(v) for k, v in row.items()} for row in found] == [
        {k: type(v) for k, v in row.items()} for row in rows
    ]


def test_an_artifact_without_rows_and_a_column_without_values_are_fine(tmp_path):
    folder = folder_at(tmp_path)
    empty = folder.rows("empty", "rows", Stage("e", 1, {}), [], 2, lambda index: [])
    assert empty.rows == 0 and folder.read(empty) == []
    assert folder.rows("none", "rows", Stage("n", 1, {}), [], 0, lambda index: []).rows == 0

    def rated(index: int) -> list[dict[str, Any]]:
        return [{"id": "a", "value": None if index == 0 else 3.5}]

    scores = folder.rows("scores", "rows", Stage("s", 1, {}), [], 2, rated)
    assert [row["value"] for row in folder.read(scores)] == [None, 3.5]


def test_the_hash_of_rows_is_over_content_in_order():
    a, b = {"x": 1, "y": math.nan}, {"y": math.inf, "x": -0.0}
    digest = rows_hash([a, b])
    assert digest == rows_hash([dict(reversed(a.items())), dict(b)])
    assert digest == rows_hash(iter([a, b]))
    assert len({digest, rows_hash([b, a]), rows_hash([a]), rows_hash([a, {**b, "x": 0.0}])}) == 4
    assert rows_hash([{"x": 1}]) != rows_hash([{"x": 1.5}]) != rows_hash([{"x": "1.5"}])


def test_details_are_the_same_after_a_kill_before_the_seal(tmp_path):
    def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"sum": sum(row["n"] for row in rows)}

    def run(root: Path) -> Artifact:
        return folder_at(root).rows(
            "a", "rows", Stage("s", 1, {}), [], 2, lambda index: [{"n": index}], summary
        )

    whole = run(tmp_path / "a")
    killed = run(tmp_path / "b")
    (tmp_path / "b" / "run" / killed.path / "artifact.json").unlink()
    assert run(tmp_path / "b") == whole
    sealed = json.loads((tmp_path / "b" / "run" / whole.path / "artifact.json").read_text())
    assert sealed["details"] == {"sum": 1}


def test_a_sealed_model_that_lost_its_weights_is_trained_again(tmp_path):
    made: list[Path] = []

    def train(folder: Path) -> tuple[str, dict[str, Any]]:
        made.append(folder / "weights")
        made[-1].touch()
        return "hash", {}

    def run() -> Artifact:
        return folder_at(tmp_path).model(
            "M_0", Stage("train", 1, {}), [], train, lambda folder: (folder / "weights").exists()
        )

    assert run() == run() and len(made) == 1
    made[0].unlink()
    run()
    assert len(made) == 2


def test_two_runs_in_one_folder_never_overwrite_each_other(tmp_path):
    program = (
        "import pathlib, sys; from humpback_jax.lock import sole_user\n"
        "with sole_user(pathlib.Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdout is not None and first.stdout.readline() == b"in\n"
    with pytest.raises(HumpbackError, match="another humpback is at work"), sole_user(tmp_path):
        pass
    first.kill()
    first.communicate()
    with sole_user(tmp_path):
        pass
