"""The packaged seed pairs: what a user's first run is trained on and measured with."""

from __future__ import annotations

import collections
import hashlib
import json
import re
import warnings
from functools import cache
from importlib import resources

import pytest

from humpback_jax.stages.sources import packaged_pairs

TASKS = {
    *("explain", "define", "knowledge", "compare", "list", "howto", "advise", "plan"),
    *("write", "rewrite", "summarise", "extract", "answer_from_text", "reason", "code", "fixcode"),
}
HELDOUT_PER_TASK = 2
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@cache
def seed_rows() -> list[dict[str, str]]:
    text = (resources.files("humpback_jax") / "data" / "seed.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_field_is_missing_or_an_id_or_instruction_stands_twice():
    rows = seed_rows()
    for row in rows:
        assert list(row) == ["id", "task", "instruction", "response", "split"], row["id"]
        assert all(value and value == value.strip() for value in row.values()), row["id"]
        assert row["id"].startswith(f"{row['task']}-"), row["id"]
    for field in ("id", "instruction", "response"):
        values = collections.Counter(row[field].casefold() for row in rows)
        assert [value for value, count in values.items() if count > 1] == []


def test_a_task_is_too_small_or_split_otherwise_than_by_its_ids():
    by_task = collections.defaultdict(list)
    for row in seed_rows():
        by_task[row["task"]].append(row)
    assert set(by_task) == TASKS
    for task, rows in by_task.items():
        order = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
        splits = [row["split"] for row in order]
        assert splits[:HELDOUT_PER_TASK] == ["heldout"] * HELDOUT_PER_TASK, task
        assert set(splits[HELDOUT_PER_TASK:]) == {"train"}, task
        assert len(splits) >= 10 + HELDOUT_PER_TASK, task


def test_the_program_reads_other_pairs_than_the_file_holds():
    train, heldout = packaged_pairs("train"), packaged_pairs("heldout")
    assert len(heldout) == HELDOUT_PER_TASK * len(TASKS) == 32
    assert len(train) >= 160
    written = {(row["id"], row["instruction"], row["response"]) for row in seed_rows()}
    assert {(e.id, e.instruction, e.response) for e in train + heldout} == written


def test_a_pair_is_too_short_to_teach_or_too_long_for_a_packed_row():
    """Words, so that no tokenizer has to be fetched; the next test counts tokens."""
    for row in seed_rows():
        words = len(f"{row['instruction']} {row['response']}".split())
        assert 25 <= words <= 200, (row["id"], words)
        assert len(row["response"].split()) >= 9, row["id"]


@pytest.mark.real_model
def test_a_pair_has_fewer_than_40_or_more_than_300_tokens_of_the_default_model():
    from humpback_jax.text.tokenizer import Tokenizer
    from humpback_jax.weights.named import resolve

    tokenizer = Tokenizer.from_gguf(resolve("smollm2-135m-instruct").path)
    for row in seed_rows():
        tokens = sum(len(tokenizer.encode(row[field])) for field in ("instruction", "response"))
        assert 40 <= tokens <= 300, (row["id"], tokens)


def test_code_in_a_pair_does_not_parse():
    """Python and JSON blocks; broken code is given to be fixed, but it is valid Python too."""
    seen: collections.Counter[str] = collections.Counter()
    for row in seed_rows():
        for text in (row["instruction"], row["response"]):
            assert text.count("```") % 2 == 0, row["id"]
            for language, block in FENCE.findall(text):
                seen[language] += 1
                if language == "python":
                    with warnings.catch_warnings():  # `is` with a literal is one of the faults
                        warnings.simplefilter("ignore", SyntaxWarning)
                        compile(block, row["id"], "exec")
                elif language == "json":
                    json.loads(block)
    assert seen["python"] >= 20 and seen["json"] >= 2
