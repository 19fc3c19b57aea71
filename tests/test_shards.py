"""Shards of a job's output: kept over a restart, joined when all are there.

If these fail, users lose rows that were computed, or take a part of the output for the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pyarrow.parquet as pq
import pytest

from humpback_jax import rows, shards
from humpback_jax.errors import HumpbackError
from humpback_jax.shards import Shards, open_shards

TOTAL = 10


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)


def opened(out: Path, identity: str = "job") -> Any:
    return open_shards(out, None, identity, TOTAL, lambda number: True)


def row(number: int) -> dict[str, Any]:
    return {"row": number}


def fill(job: Shards) -> list[int]:
    """Writes what is missing, and says what that was."""
    found = []
    for number, items in job.missing(range(TOTAL)):
        job.write(number, map(row, items))
        found.append(number)
    return found


def test_the_same_job_started_twice_puts_a_part_in_place_of_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with opened(out) as job:
        for identity in ("job", "another"):
            with pytest.raises(HumpbackError, match="another humpback"), opened(out, identity):
                pass
        assert fill(job) == [0, 1, 2]
        job.join()
    assert [json.loads(line) for line in out.open()] == [row(n) for n in range(TOTAL)]
    assert not job.folder.exists()


def test_a_shard_that_was_lost_is_missing_from_the_output_without_a_word(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("an earlier output\n")
    with opened(out) as job:
        fill(job)
        (job.folder / "000001.jsonl").unlink()
        (job.folder / "000002.jsonl").write_text("")
        with pytest.raises(HumpbackError, match="2 of 3 shards are lost or incomplete"):
            job.join()
    assert out.read_text() == "an earlier output\n"
    with opened(out) as job:
        assert fill(job) == [1, 2], "only what was lost is computed again"
        job.join()
    assert len(out.read_text().splitlines()) == TOTAL


def test_a_host_with_other_files_deletes_the_shards_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    with opened(out) as job:
        fill(job)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(HumpbackError, match="process 1 has other rows"), opened(out, "stale"):
        pass
    with opened(out) as job:
        assert job.done == {0, 1, 2}


def test_a_folder_as_output_is_found_when_all_is_computed(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").mkdir()
    with pytest.raises(HumpbackError, match="is a folder; --out names a file"):
        opened(tmp_path / "out.jsonl").__enter__()


def test_columns_that_parquet_cannot_hold_cost_the_rows_that_are_computed(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with opened(out) as job:
        for number, items in job.missing(range(TOTAL)):
            job.write(number, ({"row": str(n) if n == 7 else n} for n in items))
        with pytest.raises(HumpbackError, match=r"--format=jsonl and keep --out"):
            job.join()
    with open_shards(out, "jsonl", "job", TOTAL, lambda number: True) as job:
        assert fill(job) == []
        job.join()
    assert len(out.read_text().splitlines()) == TOTAL


def test_a_column_that_begins_late_is_left_out_of_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BATCH_ROWS", 3)

    def read() -> Iterator[dict[str, Any]]:
        for n in range(TOTAL):
            late = {"late": {"a": n}} if n == 8 else {"late": {"b": "x"}} if n == 9 else {}
            yield {"n": n if n < 5 else n + 0.5, "none": None, **late}

    with opened(tmp_path / "out.parquet") as job:
        fill(job)
        job.join(read)
    written = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [each["n"] for each in written] == [row["n"] for row in read()]
    assert [each["late"] for each in written[7:]] == [
        None,
        {"a": 8, "b": None},
        {"a": None, "b": "x"},
    ]
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups > 1
