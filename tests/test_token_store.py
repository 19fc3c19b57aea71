"""Rows that do not fit into memory: tokenised once, stored, and read by index.

If these fail, large data train another model than small ones, are tokenised again after every stop,
or fill the memory.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_mesh import start_several
from test_trainer import EXAMPLES, run
from tiny_llama import trees_equal

from humpback_jax.config import default_config
from humpback_jax.errors import HumpbackError
from humpback_jax.models import LanguageModel, load_model
from humpback_jax.rows import read_examples, write_rows
from humpback_jax.stages import tokens
from humpback_jax.stages.texts import tokenized_examples
from humpback_jax.stages.tokens import RowFile, Tokenization, parse_files, token_store
from humpback_jax.text.tokenize import TokenizedBatch, TokenizedExample
from humpback_jax.token_store import TokenStore, write_shard
from humpback_jax.training.examples import ExampleIndex, index_of
from humpback_jax.training.order import BatchOrder
from humpback_jax.training.packing import plan_packing

ROOT = Path(__file__).parent.parent
ROWS = [
    {"id": f"r{i}", "instruction": f"Say {i} ✓", "output": f"{i} " * (i % 9 + 1)} for i in range(20)
]
ROWS[7]["output"] = "too long " * 100
ROWS.append({"id": "chat", "messages": [
    {"role": role, "content": text}
    for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
]})  # fmt: skip
ROWS.append({"id": "r3", "text": "Plain text under an id that another row has."})
WIDTH = 256


@functools.cache
def base() -> LanguageModel:
    return load_model("tiny-random")


def base_batch() -> TokenizedBatch:
    mask = np.arange(9) > 3
    return TokenizedBatch((TokenizedExample("one", np.arange(9, dtype=np.int32), mask),), ())


def settings(**changes: Any) -> Any:
    section = default_config().train
    section.update({"row_tokens": WIDTH, **changes})
    return section


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of six rows, tokenised three at a time."""
    monkeypatch.setattr(tokens, "CHUNK", 3)
    monkeypatch.setattr(tokens, "SHARD_CHUNKS", 2)


def written(folder: Path, name: str) -> RowFile:
    path = folder / name.removesuffix(".gz")
    if name == "rows.parquet":
        turns = [("instruction", "output"), ("messages",)]
        write_rows(path, [row for row in ROWS if turns[0][0] in row])
    else:
        write_rows(path, ROWS)
    if name.endswith(".gz"):
        path = folder / name
        path.write_bytes(gzip.compress((folder / name.removesuffix(".gz")).read_bytes()))
    return RowFile("seed", path)


def stored(file: RowFile, folder: Path, section: Any = None, **changes: Any) -> TokenStore:
    way = Tokenization(base(), section or settings(), "forward", **changes)
    return token_store([file], way, folder, lambda text: None)[0]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.jsonl.gz"])
def test_a_file_trains_other_tokens_from_disk_than_from_memory(
    name: str, tmp_path: Path, small_shards: None
) -> None:
    file = written(tmp_path, name)
    store = stored(file, tmp_path / "tokens")
    rows, _ = read_examples(file.path, file.source)
    expected, dropped = tokenized_examples(base(), rows, settings(), "forward")
    assert len(list((tmp_path / "tokens").glob("*/0*"))) == -(-len(rows) // 6) > 2
    assert len(store) == len(expected) == len(rows) - 1
    assert store.dropped == dropped == {"too_long": 1}
    for place, (ours, theirs) in enumerate(zip(store, expected, strict=True)):
        assert ours.id == theirs.id.partition("#")[0]
        assert ours.source == theirs.source
        assert ours.ids.dtype == np.int32 and ours.mask.dtype == bool
        assert np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.mask, theirs.mask)
        assert store.columns.lengths[place] == theirs.length
        assert store.columns.supervised[place] == theirs.supervised
    assert store[-1].id == store[len(store) - 1].id
    assert [each.id for each in store[1:3]] == [store[1].id, store[2].id]


def test_rows_with_one_id_are_taken_for_one(tmp_path: Path, small_shards: None) -> None:
    file = written(tmp_path, "rows.jsonl")
    store = stored(file, tmp_path / "tokens")
    keys = store.columns.keys
    same = [place for place in range(len(store)) if store[place].id == "r3"]
    assert len(same) == 2 and len(set(keys)) == len(store)
    known = index_of([each for place, each in enumerate(store) if place != same[1]])
    assert np.array_equal(np.delete(keys, same[1]), known.keys)


def test_training_from_disk_and_from_memory_end_with_the_same_weights(tmp_path: Path) -> None:
    for source in ("seed", "web"):
        mine = [TokenizedExample(e.id, e.ids, e.mask) for e in EXAMPLES if e.source == source]
        write_shard(tmp_path / source, source, [TokenizedBatch(tuple(mine), ())])
    store = TokenStore([tmp_path / "web", tmp_path / "seed"])
    assert trees_equal(run(examples=store).params, run().params)


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    done: list[int] = []
    original = Tokenization.batch

    def batch(self: Tokenization, examples: Any) -> TokenizedBatch:
        done.append(len(examples))
        return original(self, examples)

    monkeypatch.setattr(Tokenization, "batch", batch)
    return done


def test_a_killed_conversion_begins_again_or_keeps_half_a_shard(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, "rows.jsonl")
    whole = stored(file, tmp_path / "whole")
    original = Tokenization.batch
    calls: list[int] = []

    def killed(self: Tokenization, examples: Any) -> TokenizedBatch:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, examples)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tokenization, "batch", killed)
        stored(file, tmp_path / "tokens")
    (folder,) = (tmp_path / "tokens").iterdir()
    assert [each.name for each in folder.iterdir()] == ["00000"]
    done = count_rows(monkeypatch)
    again = stored(file, tmp_path / "tokens")
    assert sum(done) == len(ROWS) - 6
    assert again.hash == whole.hash
    done.clear()
    assert stored(file, tmp_path / "tokens").hash == whole.hash
    assert done == [], "a finished store is read, not made"


@pytest.mark.parametrize("what", ["file", "limit", "row_tokens", "on_long", "direction"])
def test_tokens_of_other_rows_or_settings_are_taken_for_these(what: str, tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl")
    way = Tokenization(base(), settings(), "forward")
    before = way.key(file)
    assert way.key(file) == before
    if what == "file":
        write_rows(file.path, ROWS[1:])
        assert way.key(file) != before
        return
    other = {
        "limit": Tokenization(base(), settings(), "forward", limit=3),
        "row_tokens": Tokenization(base(), settings(row_tokens=99), "forward"),
        "on_long": Tokenization(base(), settings(on_long="truncate"), "forward"),
        "direction": Tokenization(base(), settings(), "backward"),
    }
    assert other[what].key(file) != before


@pytest.mark.parametrize("name", ["tokens.u32", "rows.npy", "ids.txt", "counts.json"])
def test_a_damaged_shard_is_trained_on(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl")
    stored(file, tmp_path / "tokens")
    (path,) = (tmp_path / "tokens").rglob(name)
    for damaged in (path.read_bytes()[:-5], b"{}", b""):
        path.write_bytes(damaged)
        with pytest.raises(HumpbackError, match=r"00000 is damaged.*Delete that folder"):
            stored(file, tmp_path / "tokens")
    path.unlink()
    with pytest.raises(HumpbackError, match="damaged"):
        stored(file, tmp_path / "tokens")


def test_a_deleted_shard_is_made_again(tmp_path: Path, small_shards: None) -> None:
    file = written(tmp_path, "rows.jsonl")
    whole = stored(file, tmp_path / "tokens")
    shard = next((tmp_path / "tokens").glob("*/00002"))
    for path in shard.iterdir():
        path.unlink()
    shard.rmdir()
    assert stored(file, tmp_path / "tokens").hash == whole.hash


def test_a_source_of_which_nothing_is_left_is_named_before_training(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl")
    with pytest.raises(HumpbackError, match=r"rows.jsonl: no training example is left of 22.*long"):
        stored(file, tmp_path / "tokens", settings(row_tokens=4))
    with pytest.raises(HumpbackError, match=r"r7.*on_long"):
        stored(file, tmp_path / "tokens", settings(on_long="error"))
    with pytest.raises(HumpbackError, match=r"nowhere.jsonl: the file does not exist"):
        stored(RowFile("seed", tmp_path / "nowhere.jsonl"), tmp_path / "tokens")


def test_a_limit_counts_rows_of_each_file(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl")
    assert [each.id for each in stored(file, tmp_path / "t", limit=2)] == ["r0", "r1"]


def test_files_with_and_without_the_name_of_a_source(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.jsonl"
    odd.touch()
    files = parse_files(["rows.jsonl", "my-web=w.jsonl", str(odd), "dir/a=b.jsonl"], "seed")
    expected = [("seed", "rows.jsonl"), ("my-web", "w.jsonl"), ("seed", str(odd))]
    assert files == [RowFile(s, Path(p)) for s, p in [*expected, ("seed", "dir/a=b.jsonl")]]


def plan_of(count: int) -> tuple[float, int]:
    """(seconds, longest row in use) of planning an epoch of so many examples."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 900, count).astype(np.int32)
    keys = generator.integers(0, 2**64, count, np.uint64)
    index = ExampleIndex(keys, lengths, lengths // 2, np.zeros(count, np.int32), ("seed",))
    start = time.process_time()
    plan = plan_packing(index, BatchOrder(keys, 32, 0), count // 32, 2048, None)
    assert 0.8 < plan.efficiency <= 1
    return time.process_time() - start, plan.row_tokens


def test_a_hundred_thousand_examples_are_planned_in_a_second_or_two() -> None:
    assert plan_of(100_000)[0] < 4


@pytest.mark.slow
def test_a_million_examples_take_minutes_to_plan() -> None:
    assert plan_of(1_000_000)[0] < 30


CONVERT = """
import json, sys, time
from pathlib import Path
from humpback_jax.bench.process import peak_bytes
from humpback_jax.config import default_config
from humpback_jax.models import load_model
from humpback_jax.stages.tokens import RowFile, Tokenization, token_store
from humpback_jax.training.order import BatchOrder
from humpback_jax.training.packing import plan_packing

def converted(count):
    path = Path(sys.argv[1]) / f"{count}.jsonl"
    with open(path, "w") as file:
        for i in range(count):
            row = {"instruction": f"Say {i}", "output": f"{i} " * (i % 9 + 1)}
            file.write(json.dumps(row) + "\\n")
    store, _ = token_store([RowFile("seed", path)], way, path.parent / "tokens", print)
    assert len(store) == count
    order = BatchOrder(store.columns.keys, 32, 0)
    plan_packing(store.columns, order, count // 32, 2048, None)
    return peak_bytes() / 1e6

way = Tokenization(load_model("tiny-random"), default_config().train, "forward")
before = converted(5000)
start = time.process_time()
after = converted(int(sys.argv[2]))
print(json.dumps([after - before, time.process_time() - start]))
"""


def test_files_of_one_name_size_and_time_are_taken_for_each_other(tmp_path: Path) -> None:
    """As they come out of an archive: the rows of one would be trained on twice."""
    found = []
    for word in ("yes", "nay"):
        path = tmp_path / word / "rows.jsonl"
        path.parent.mkdir()
        write_rows(path, [{"id": "r", "instruction": "Say it.", "output": word}])
        os.utime(path, (1e9, 1e9))
        found.append(RowFile("seed", path))
    way = Tokenization(base(), settings(), "forward")
    store, _ = token_store(found, way, tmp_path / "tokens", print)
    texts = {base().tokenizer.decode(store[number].ids.tolist()) for number in range(2)}
    assert len(texts) == 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [100_000, 500_000])
def test_many_rows_fill_the_memory_while_they_are_tokenised(count: int, tmp_path: Path) -> None:
    """A row is 95 tokens here: a million take 380 MB on disk, and would be gigabytes as lists."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CONVERT), str(tmp_path), str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    megabytes, seconds = json.loads(done.stdout.splitlines()[-1])
    assert megabytes < 40 + 150 * count / 1e6
    assert seconds < 600 * count / 1e6


@pytest.mark.slow
def test_a_host_waits_for_one_that_has_refused_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    command = ["train", "--model=tiny-random", f"--data={path}", f"--out={tmp_path / 'm'}"]
    start = time.monotonic()
    processes = start_several(2, [*command, f"--config.train.row_tokens={WIDTH}"], 1)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "Row r7" in errors[0] and "failed in process 0; its message says why" in errors[1]
    assert time.monotonic() - start < 60


def test_a_process_of_the_same_number_on_another_machine_spoils_the_shard_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In containers, the processes of a job are often all number 1."""
    batch = base_batch()

    def meanwhile() -> Iterator[TokenizedBatch]:
        yield batch
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_index", lambda: 1)
            write_shard(tmp_path / "00000", "seed", [batch, batch])
        yield batch

    monkeypatch.setattr(os, "getpid", lambda: 1)
    write_shard(tmp_path / "00000", "seed", meanwhile())
    assert len(TokenStore([tmp_path / "00000"])) == 2 * len(batch.examples)
    assert [path.name for path in tmp_path.iterdir()] == ["00000"]


SAME_NUMBER = """
import os, sys, time
from pathlib import Path
os.getpid = lambda: 1
replace = Path.replace
def slowly(path, to):
    time.sleep(1)
    return replace(path, to)
Path.replace = slowly
from humpback_jax.parallel.processes import join_processes, leave_processes
join_processes()
from humpback_jax.config import default_config
from humpback_jax.models import load_model
from humpback_jax.stages.tokens import RowFile, Tokenization, token_store
folder, base = Path(sys.argv[1]), load_model("tiny-random")
way = Tokenization(base, default_config().train, "forward")
store, _ = token_store([RowFile("seed", folder / "rows.jsonl")], way, folder / "tokens", print)
print(len(store))
leave_processes()
"""


def test_hosts_whose_processes_have_the_same_number_fall_over_each_others_files(
    tmp_path: Path,
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    for process in start_several(2, [str(tmp_path)], 1, ["-c", SAME_NUMBER]):
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        assert int(output.split()[-1]) == len(ROWS)


def test_a_restart_writes_what_is_written_already(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl")
    stored(file, tmp_path / "tokens")
    (manifest,) = tmp_path.rglob("store.json")
    before = manifest.stat()
    stored(file, tmp_path / "tokens")
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )


SLOW_TO_END = """
import argparse, time
from humpback_jax.cli import _fail
from humpback_jax.errors import HumpbackError
from humpback_jax.parallel.processes import all_or_none, join_processes
join_processes()
import jax
def make():
    if jax.process_index() == 0:
        raise HumpbackError("row 7 is bad")
try:
    all_or_none("tokenising", make)
except HumpbackError as error:
    time.sleep(2 * jax.process_index())
    _fail(str(error), argparse.Namespace(debug=False))
"""


def test_the_first_host_leaves_before_another_has_said_why_it_ends() -> None:
    """jax aborts the others when the first one is gone: a trace of C++ instead of a message."""
    processes = start_several(2, [], 1, ["-c", SLOW_TO_END])
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert errors[0] == "row 7 is bad\n"
    assert errors[1] == "tokenising failed in process 0; its message says why.\n"


def test_every_host_reads_the_tokens_of_all_hosts() -> None:
    """Two processes with four devices each: every example is read by exactly one of them."""
    reports = []
    for process in start_several(2, [], 4, ["tests/read_on_hosts.py"]):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        reports.append(json.loads(output.splitlines()[-1]))
    one, other = (set(report["read"]) for report in reports)
    assert one and other and not one & other
    assert one | other == set(reports[0]["batch"])
    assert all(report["same"] for report in reports), "a device holds other rows than its own"
