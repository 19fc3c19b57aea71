"""`humpback sample` on files: if these fail, a long job loses work, mixes up rows or grows."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from humpback_jax import rate_file, shards
from humpback_jax.answer import Job, answer_file, answer_prompts
from humpback_jax.cli import main
from humpback_jax.compute import choose_compute
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import Generation, Inference
from humpback_jax.models import load_model
from humpback_jax.row_files import raw_rows
from humpback_jax.rows import ReadReport, single_prompt, stream_prompts, write_rows
from humpback_jax.sampling.engine import Request
from humpback_jax.sampling.likelihood import every_token
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.shards import Shards
from humpback_jax.streaming import Asked, draw_shards
from humpback_jax.text.template import Template

JOB = Job(Decoding(0.9, 0.95, max_new_tokens=5), seed=3)


@functools.cache
def reader() -> Inference:
    return Inference(load_model("tiny-random"), choose_compute("float32", 8))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(count: int) -> list[dict]:
    return [{"prompt": f"Say {'very ' * (i % 7)}{i}.", "kept": i} for i in range(count)]


def run(path: Path, out: Path, job: Job = JOB) -> list[dict]:
    answer_file(reader(), path, out, None, job, lambda line: None)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows_come_out_in_order_with_their_fields_whatever_ends_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    path = write(tmp_path / "in.jsonl", prompts(23))
    rows = run(path, tmp_path / "out.jsonl")
    assert [row["kept"] for row in rows] == list(range(23))
    listed = list(stream_prompts(path, ReadReport()))
    assert rows == answer_prompts(reader(), listed, JOB)
    assert not (tmp_path / ".out.jsonl.shards").exists()


def test_a_prompts_log_probabilities_are_another_models_than_the_answers(tmp_path, monkeypatch):
    """The same tokens, once drawn and once read, have the same log-probabilities."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    path = write(tmp_path / "in.jsonl", prompts(6))
    job = Job(Decoding(0.0, max_new_tokens=6), logprobs=True, prompt_logprobs=True, draws=2)
    rows = run(path, tmp_path / "out.jsonl", job)
    template, tokenizer = reader().model.template, reader().model.tokenizer
    for row in rows[::2]:
        text = template.forward_prompt([{"role": "user", "content": row["prompt"]}])
        length = len(tokenizer.encode(text))
        assert len(row["prompt_logprobs"]) == length - 1
        tokens = np.array(tokenizer.encode(text), np.int32)
        drawn = reader().replicas.generate([Request("r", tokens, np.zeros(2, "u4"), job.decoding)])[
            0
        ]
        whole = np.concatenate([tokens, drawn.tokens])
        found = reader().log_probs([every_token("r", whole)])[0]
        np.testing.assert_allclose(found[: length - 1], row["prompt_logprobs"], atol=1e-4)
        np.testing.assert_allclose(
            found[length - 1 :], drawn.logprobs[: len(drawn.tokens)], atol=1e-4
        )
        np.testing.assert_allclose(drawn.logprobs, row["logprobs"], atol=1e-4)


def test_several_draws_of_a_prompt_stand_together_and_differ(tmp_path):
    path = write(tmp_path / "in.jsonl", prompts(3))
    job = Job(JOB.decoding, draws=3)
    rows = run(path, tmp_path / "out.jsonl", job)
    assert [(row["kept"], row["draw"]) for row in rows] == [
        (i, d) for i in range(3) for d in range(3)
    ]
    assert all(len({row["output"] for row in rows[i : i + 3]}) > 1 for i in (0, 3, 6))
    assert run(path, tmp_path / "one.jsonl") != rows[::3], "another seed"
    assert rows[::3] == run(path, tmp_path / "one.jsonl", Job(JOB.decoding))


def test_a_job_that_was_killed_goes_on_and_ends_with_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    path = write(tmp_path / "in.jsonl", prompts(30))
    expected = run(path, tmp_path / "whole.jsonl")
    written = Shards.write

    def killed(self, number, rows):
        written(self, number, rows)
        if len(self.done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Shards, "write", killed)
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, out)
    assert not out.exists()
    monkeypatch.setattr(Shards, "write", written)
    before = reader().replicas.work.rows
    assert run(path, out) == expected
    assert reader().replicas.work.rows - before == 30 - 3 * 4


def test_a_killed_job_loses_all_draws_of_its_prompts(tmp_path, monkeypatch):
    """Shards are cut from the output's rows: a prompt with many draws fills several."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    path, sizes = write(tmp_path / "in.jsonl", prompts(3)), []
    written = Shards.write

    def counted(self, number, rows):
        rows = list(rows)
        sizes.append(len(rows))
        written(self, number, rows)

    monkeypatch.setattr(Shards, "write", counted)
    rows = run(path, tmp_path / "out.jsonl", Job(JOB.decoding, draws=6))
    assert [(row["kept"], row["draw"]) for row in rows] == [
        (i, d) for i in range(3) for d in range(6)
    ]
    assert sorted(sizes) == [2, 4, 4, 4, 4]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_rows_are_rendered_again_though_surveyed_or_finished(tmp_path, monkeypatch, skip_bad):
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    rows = prompts(12)
    if skip_bad:
        rows.insert(2, {"prompt": "word" * 2000})
        rows.insert(7, {"prompt": "word" * 2000})
    path = write(tmp_path / "in.jsonl", rows)
    asked = {row["prompt"] for row in rows}
    job, out = dataclasses.replace(JOB, skip_bad=skip_bad), tmp_path / "out.jsonl"
    expected = run(path, tmp_path / "whole.jsonl", job)
    assert [row["kept"] for row in expected] == list(range(12))
    written, rendered = Shards.write, []

    def killed(self, number, rows):
        written(self, number, rows)
        raise KeyboardInterrupt

    render = Template.forward_prompt

    def watched(template, messages, *rest):
        rendered.extend({messages[-1]["content"]} & asked)
        return render(template, messages, *rest)

    monkeypatch.setattr(Shards, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(path, out, job)
    monkeypatch.setattr(Shards, "write", written)
    monkeypatch.setattr(Template, "forward_prompt", watched)
    assert run(path, out, job) == expected
    assert len(rendered) == len(rows) + 12 - 4, "the survey, and the shards that are left"


@pytest.mark.parametrize("change", ["input", "seed"])
def test_shards_of_another_job_are_not_taken_over(tmp_path, monkeypatch, change):
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    path, out = write(tmp_path / "in.jsonl", prompts(9)), tmp_path / "out.jsonl"
    joined = Shards.join
    monkeypatch.setattr(Shards, "join", lambda self: None)
    with pytest.raises(FileNotFoundError):
        run(path, out)
    monkeypatch.setattr(Shards, "join", joined)
    job = JOB
    if change == "input":
        write(path, [*prompts(8), {"prompt": "Something else."}])
    else:
        job = Job(JOB.decoding, seed=4)
    assert run(path, out, job) == run(path, tmp_path / "fresh.jsonl", job)


def test_a_row_s_own_decoding_counts_and_a_wrong_one_is_found_before_any_work(tmp_path):
    rows = prompts(4)
    rows[1]["decoding"] = {"max_new_tokens": 2, "temperature": 0}
    found = run(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert found[1]["tokens"] <= 2 and max(row["tokens"] for row in found) > 2
    many = {"stop_ids": list(range(100, 117))}
    tokens = reader().model.tokenizer.control_tokens
    mixed = {"stop_ids": list(range(100, 115)), "stop_strings": list(tokens)}
    for wrong in ({"temprature": 1}, {"top_p": 7}, "hot", {"top_k": "many"}, "", [], many, mixed):
        rows[3]["decoding"] = wrong
        rows[3]["id"] = "the-row"
        before = reader().replicas.work.rows
        with pytest.raises(HumpbackError, match="the-row"):
            run(write(tmp_path / "in.jsonl", rows), tmp_path / "other.jsonl")
        assert reader().replicas.work.rows == before


def test_a_decoding_from_parquet_counts_where_its_fields_are_floats_or_missing(tmp_path):
    rows = prompts(3)
    rows[0]["decoding"] = {"max_new_tokens": 2.0, "temperature": None}
    rows[1]["decoding"] = {"max_new_tokens": None, "temperature": 0.0}
    write_rows(tmp_path / "in.parquet", rows)
    found = run(tmp_path / "in.parquet", tmp_path / "parquet.jsonl")
    rows[0]["decoding"], rows[1]["decoding"] = {"max_new_tokens": 2}, {"temperature": 0}
    expected = run(write(tmp_path / "in.jsonl", rows), tmp_path / "jsonl.jsonl")
    assert [row["output"] for row in found] == [row["output"] for row in expected]


def test_a_prompt_that_fills_the_window_is_found_before_any_work_or_skipped(tmp_path):
    rows = [*prompts(5), {"id": "the-long-one", "prompt": "word " * 2000}]
    path = write(tmp_path / "in.jsonl", rows)
    before = reader().replicas.work.rows
    with pytest.raises(HumpbackError, match="the-long-one"):
        run(path, tmp_path / "out.jsonl")
    assert reader().replicas.work.rows == before
    job = Job(JOB.decoding, seed=3, skip_bad=True)
    assert len(run(path, tmp_path / "out.jsonl", job)) == 5
    count, report = answer_file(
        reader(), path, tmp_path / "again.jsonl", None, job, lambda line: None
    )
    assert (count, report.rows, report.bad) == (5, 5, {"cannot be answered": 1})


def test_a_prompt_that_the_chat_template_refuses_is_named_or_skipped(tmp_path):
    model = load_model("tiny-random")
    tokenizer = model.tokenizer.with_chat_template(
        "{% if 'forbidden' in messages[-1]['content'] %}{{ raise_exception('no!') }}{% endif %}"
        "{{ messages[-1]['content'] }}"
    )
    template = Template.for_tokenizer(tokenizer)
    strict = Inference(
        dataclasses.replace(model, tokenizer=tokenizer, template=template),
        choose_compute("float32", 8),
    )
    path = write(tmp_path / "in.jsonl", [*prompts(1), {"id": "odd", "prompt": "forbidden"}])
    out = tmp_path / "out.jsonl"
    with pytest.raises(HumpbackError, match=r"record odd: .*no!"):
        answer_file(strict, path, out, None, JOB, lambda line: None)
    job = dataclasses.replace(JOB, skip_bad=True)
    assert answer_file(strict, path, out, None, job, lambda line: None)[0] == 1


def test_rows_that_are_printed_are_read_and_skipped_as_those_of_a_file(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    path = write(tmp_path / "in.jsonl", [*prompts(1), {"id": "x", "prompt": "word " * 2000}])
    arguments = ["sample", "--model=tiny-random", f"--prompts={path}", "--max-tokens=4"]
    assert main(arguments) == 1
    assert "record x" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["rows"], result["bad_rows"]) == (1, {"cannot be answered": 1})


def test_a_stop_text_ends_the_answer_and_is_left_out(tmp_path):
    path = write(tmp_path / "in.jsonl", prompts(12))
    job = Job(Decoding(0.9, 1.0, max_new_tokens=30))
    free = run(path, tmp_path / "free.jsonl", job)
    stop = free[0]["output"][3:5]
    job = Job(Decoding(0.9, 1.0, max_new_tokens=30, stop_strings=(stop,)), logprobs=True)
    for before, after in zip(free, run(path, tmp_path / "cut.jsonl", job), strict=True):
        assert stop not in after["output"]
        if stop in before["output"]:
            assert after["output"] == before["output"].partition(stop)[0].strip()
            assert after["finish_reason"] == "stop"
            assert after["tokens"] == len(after["logprobs"])
        else:
            assert after["output"] == before["output"]
        assert after["logprob"] == pytest.approx(sum(after["logprobs"]), abs=0.01)


def test_a_control_token_named_as_stop_text_ends_the_answer(tmp_path):
    """It never shows in the text, where stop texts are looked for."""
    path, token = write(tmp_path / "in.jsonl", prompts(12)), "<|im_start|>"
    free = Decoding(1.5, 1.0, max_new_tokens=120)
    by_id = dataclasses.replace(free, stop_ids=(reader().model.tokenizer.id_of(token),))
    expected = run(path, tmp_path / "by_id.jsonl", Job(by_id))
    assert expected != run(path, tmp_path / "free.jsonl", Job(free))
    by_text = dataclasses.replace(free, stop_strings=(token,))
    assert run(path, tmp_path / "by_text.jsonl", Job(by_text)) == expected


def test_a_prompt_of_one_token_has_no_log_probabilities_and_is_no_error():
    """Nothing precedes its only token."""
    model = load_model("tiny-random")
    tokenizer = model.tokenizer.with_chat_template("{{ messages[-1]['content'] }}")
    template = Template.for_tokenizer(tokenizer)
    bare = dataclasses.replace(model, tokenizer=tokenizer, template=template)
    job = dataclasses.replace(JOB, prompt_logprobs=True)
    pair = [single_prompt("a"), single_prompt("ab")]
    rows = answer_prompts(Inference(bare, choose_compute("float32", 8)), pair, job)
    assert [len(row["prompt_logprobs"]) for row in rows] == [0, 1]


class Shuffling:
    """A reader whose texts end in any order, a few prompts after they were read."""

    def __init__(self, shuffle: random.Random) -> None:
        self.shuffle, self.read = shuffle, 0

    def stream(self, prompts: Iterator[Asked], _: Any) -> Iterator[tuple[int, Generation]]:
        waiting = []
        for index, (name, *_rest) in enumerate(prompts):
            self.read += 1
            waiting.append((index, Generation(name, 1, 0.0, "stop")))
            self.shuffle.shuffle(waiting)
            while len(waiting) > 5:
                yield waiting.pop()
        yield from waiting


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=9), st.randoms(use_true_random=False))
def test_each_text_comes_back_with_its_item_and_each_shard_once_complete(sizes, shuffle):
    shards = [(3 * n, [f"{n}-{i}" for i in range(size)]) for n, size in enumerate(sizes)]
    reader: Any = Shuffling(shuffle)
    ended: list[None] = []
    found = []
    for number, drawn in draw_shards(
        reader, iter(shards), lambda item: (item, "", np.zeros(2), JOB.decoding), None,
        lambda: ended.append(None),
    ):  # fmt: skip
        found.append((number, [item for item, _ in drawn]))
        assert [text.text for _, text in drawn] == [item for item, _ in drawn]
        assert reader.read <= len(ended) + 6, "prompts are read before there is room for them"
    assert sorted(found) == shards
    assert len(ended) == sum(sizes)


def test_a_kill_loses_most_of_the_texts_drawn():
    """Rows are sorted by length a few at a time, so that shards end one after another."""
    shards = [(n, range(16 * n, 16 * n + 16)) for n in range(12)]

    def ask(item: int) -> Asked:
        prompt = "word " * (1 + item * 37 % 60)
        return str(item), prompt, np.zeros(2, "u4"), Decoding(0.0, max_new_tokens=2)

    ended: list[None] = []
    kept, lost = 0, []
    for _, drawn in draw_shards(reader(), iter(shards), ask, None, lambda: ended.append(None)):
        kept += len(drawn)
        lost.append(len(ended) - kept)
    assert kept == 12 * 16
    assert max(lost) < 64


def test_no_slot_waits_for_the_end_of_a_shard(tmp_path, monkeypatch):
    """Shards of as many rows as there are slots would leave most of them empty most of the time."""
    path = write(tmp_path / "in.jsonl", prompts(120))
    reader().replicas.forget_work()
    whole = run(path, tmp_path / "whole.jsonl")
    expected = reader().replicas.work
    monkeypatch.setattr(shards, "SHARD_ROWS", 8)
    reader().replicas.forget_work()
    assert run(path, tmp_path / "shards.jsonl") == whole
    assert reader().replicas.work == expected


def test_parquet_in_and_out(tmp_path):
    import pyarrow.parquet as pq

    path = write(tmp_path / "in.jsonl", prompts(5))
    arguments = ["sample", "--model=tiny-random", f"--prompts={path}", "--max-tokens=4"]
    assert main([*arguments, f"--out={tmp_path / 'out.parquet'}"]) == 0
    assert main([*arguments, f"--out={tmp_path / 'out.jsonl'}"]) == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [json.loads(x) for x in lines]


def test_the_answer_of_a_row_does_not_take_the_place_of_what_it_held(tmp_path):
    """A pair's own output beside the model's, and after a second pass the answer of the first."""
    gold = {"instruction": "Say yes.", "output": "Yes.", "given_output": "A field of the user's."}
    path = write(tmp_path / "in.jsonl", [gold])
    job = dataclasses.replace(JOB, logprobs=True)
    (once,) = run(path, tmp_path / "once.jsonl", job)
    assert [once[name] for name in ("instruction", "given_output")] == [
        gold[name] for name in ("instruction", "given_output")
    ]
    assert once["given_given_output"] == "Yes." != once["output"]
    (twice,) = run(tmp_path / "once.jsonl", tmp_path / "twice.jsonl")
    assert twice["given_given_given_output"] == once["output"]
    for name in ("logprob", "tokens", "draw", "finish_reason", "logprobs"):
        assert twice[f"given_{name}"] == once[name]
    assert "logprobs" not in twice, "they are not of this answer"


def test_the_backward_model_reads_a_pair_s_response(tmp_path):
    job = dataclasses.replace(JOB, reverse=True)
    pair = {"id": "a", "instruction": "Name a colour.", "output": "Blue."}
    (found,) = run(write(tmp_path / "pair.jsonl", [pair]), tmp_path / "a.jsonl", job)
    text = {"id": "a", "text": "Blue."}
    (expected,) = run(write(tmp_path / "text.jsonl", [text]), tmp_path / "b.jsonl", job)
    assert found["output"] == expected["output"] and found["logprob"] == expected["logprob"]
    assert found["given_output"] == "Blue."


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_parquet_rows_with_dates_decimals_and_bytes_are_answered(form, tmp_path):
    odd = {"day": datetime.date(2024, 1, 2), "price": Decimal("1.5"), "raw": b"\xff"}
    write_rows(tmp_path / "in.parquet", [{"prompt": "Hi", **odd}])
    out = tmp_path / f"out.{form}"
    answer_file(reader(), tmp_path / "in.parquet", out, None, JOB, lambda line: None)
    ((_, found),) = raw_rows(out)
    assert (found["day"], found["price"], found["raw"]) == ("2024-01-02", "1.5", "/w==")
    assert found["output"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_field_that_is_no_number_makes_no_file_that_other_readers_refuse(form, tmp_path):
    path = tmp_path / "in.parquet"
    rows = [{"prompt": "Hi", "score": math.nan, "all": [1.5, math.inf]}, {"prompt": "Ho"}]
    write_rows(path, rows)
    out = tmp_path / f"out.{form}"
    answer_file(reader(), path, out, None, JOB, lambda line: None)
    if form == "jsonl":
        assert not re.search("NaN|Infinity", out.read_text())
    first = next(raw_rows(out))[1]
    assert (first.get("score"), first["all"]) == (None, [1.5, None])


MEASURE = """
import sys
from humpback_jax.bench.process import peak_bytes
from humpback_jax.cli import main
assert main(["sample", "--model=tiny-random", "--max-tokens=1", *sys.argv[1:]]) == 0
print(peak_bytes())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    peaks, sizes = [], []
    # The first job compiles, which takes most; in some thousand rows the heap gets its size, ten
    # megabytes more or less from one run to the next.
    for count in (500, 4_000, 40_000):
        rows = [{**row, "page": f"{row['kept']} " * 1_000} for row in prompts(count)]
        path = write(tmp_path / f"{count}.jsonl", rows)
        arguments = [f"--prompts={path}", f"--out={tmp_path / 'out.jsonl'}"]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.splitlines()[-1]))
        sizes.append(path.stat().st_size)
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == count
    print(f"files of {sizes} bytes, peaks of {peaks}")
    assert peaks[2] - peaks[1] < (sizes[2] - sizes[1]) / 5, "rows stay in memory"


@pytest.mark.parametrize("curator", ["rubric", "pmi", "rubric_likelihood", "combined"])
def test_ratings_are_kept_over_a_kill_and_do_not_depend_on_it(tmp_path, monkeypatch, curator):
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    pairs = [{"instruction": f"Count to {i}.", "response": "1 " * (i + 1)} for i in range(11)]
    path = write(tmp_path / "in.jsonl", pairs)

    def run_to(name: str) -> list[dict]:
        out = tmp_path / name
        rate_file.rate_file(
            reader(), path, out, None, curator, JOB.decoding, 0, False, lambda line: None
        )
        return [json.loads(line) for line in out.read_text().splitlines()]

    expected = run_to("whole.jsonl")
    assert [row["response"] for row in expected] == [pair["response"].strip() for pair in pairs]
    asked, real = [], rate_file.rate_shards

    def spied(curator, judge, missing, *rest):
        def read():
            for number, pairs in missing:
                asked.extend(pair.id for pair in pairs)
                yield number, pairs

        return real(curator, judge, read(), *rest)

    monkeypatch.setattr(rate_file, "rate_shards", spied)
    keep, kept = Shards.write, []

    def killed(shards, number, rows):
        if len(kept) == 1:
            raise KeyboardInterrupt
        kept.append(number)
        keep(shards, number, rows)

    monkeypatch.setattr(Shards, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run_to("out.jsonl")
    asked.clear()
    monkeypatch.setattr(Shards, "write", keep)
    assert run_to("out.jsonl") == expected
    rest = [row["id"] for n, row in enumerate(expected) if n // 4 != kept[0]]
    assert asked == rest, "a finished shard is rated again, or one is left out"
    monkeypatch.setattr(shards, "SHARD_ROWS", 100)
    at_once = [row["score"] for row in run_to("at_once.jsonl")]
    assert at_once == pytest.approx([row["score"] for row in expected], abs=1e-5)
