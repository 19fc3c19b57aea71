"""`humpback score` on files: if these fail, ratings are of something else than the file's pairs."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from humpback_jax import progress, rate_file
from humpback_jax.cli import main
from humpback_jax.compute import choose_compute
from humpback_jax.curators import CURATORS
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import Inference, holds
from humpback_jax.models import load_model
from humpback_jax.rows import ReadReport
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.text.template import Template

GOOD = {"id": "good", "instruction": "Name a colour.", "output": "Blue."}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Answer in French."}
REFUSING = (  # a request that says "forbidden"
    "{% for m in messages %}{% if 'forbidden' in m['content'] %}{{ raise_exception('no!') }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def judge(window: int = 2048, chat_template: str = "") -> Inference:
    model = load_model("tiny-random")
    config = dataclasses.replace(model.config, max_position_embeddings=window)
    model = dataclasses.replace(model, config=config)
    if chat_template:
        tokenizer = model.tokenizer.with_chat_template(chat_template)
        template = Template.for_tokenizer(tokenizer)
        model = dataclasses.replace(model, tokenizer=tokenizer, template=template)
    return Inference(model, choose_compute("float32", 4))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def score(
    path: Path, curator: str = "pmi", skip_bad: bool = False, by: Inference | None = None
) -> tuple[list[dict[str, Any]], ReadReport]:
    out = path.with_name("out.jsonl")
    decoding = Decoding(max_new_tokens=4)
    rated, report = rate_file.rate_file(
        by or judge(), path, out, None, curator, decoding, 0, skip_bad, lambda line: None
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rated == sum(row["score"] is not None for row in rows)
    return rows, report


@pytest.fixture
def nothing_is_rated(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(*arguments: Any) -> None:
        raise AssertionError("a pair was rated before the file was surveyed")

    monkeypatch.setattr(rate_file, "rate_shards", rate)


NO_PAIRS = [
    {"text": "A page of text."},
    {"messages": [*CHAT, *CHAT]},
    {"messages": [SYSTEM, *CHAT]},
    {"messages": [CHAT[0], *CHAT]},
    {"prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:]},
    {**GOOD, "system": "Answer in French."},
    {**GOOD, "history": [["a", "b"]]},
]


@pytest.mark.parametrize("row", NO_PAIRS, ids=str)
def test_a_row_that_is_no_pair_is_not_rated_as_if_it_were_one(row, tmp_path, nothing_is_rated):
    path = write(tmp_path / "pairs.jsonl", GOOD, row)
    with pytest.raises(HumpbackError, match="not a pair") as caught:
        score(path)
    assert f"{path}, line 2: " in str(caught.value)


def test_rows_that_are_no_pairs_are_counted_with_skip_bad(tmp_path):
    path = write(tmp_path / "pairs.jsonl", GOOD, *NO_PAIRS, {"messages": CHAT})
    rows, report = score(path, skip_bad=True)
    assert [(row["instruction"], row["response"]) for row in rows] == [
        ("Name a colour.", "Blue."),
        ("Hi", "Hello"),
    ]
    assert (report.rows, report.bad) == (2, {"not a pair": len(NO_PAIRS)})


def longest_that_fits(curator: str) -> int:
    """Letters of the response of the longest pair that the curator's texts have room for."""
    template, tokenizer = judge().model.template, judge().model.tokenizer
    texts = {
        "rubric": template.rubric_prompt("Go on.", "a") + "a",  # a token is written, too
        "rubric_likelihood": template.rubric_likelihood_prompt("Go on.", "a"),
        "pmi": template.question("Go on.") + "a" + tokenizer.eos_texts[0],
    }
    parts = {"combined": ["rubric_likelihood", "pmi"], "pmi_frozen": ["pmi"]}
    used = [len(tokenizer.encode(texts[part])) for part in parts.get(curator, [curator])]
    return 2048 - max(used) + 1


@pytest.mark.parametrize("curator", CURATORS)
def test_a_pair_that_just_fits_is_rated_and_a_longer_one_named_or_counted(curator, tmp_path):
    room = longest_that_fits(curator)
    fits = {"id": "fits", "instruction": "Go on.", "output": "a" * room}
    long = {"id": "the-long-one", "instruction": "Go on.", "output": "a" * (room + 1)}
    path = write(tmp_path / "pairs.jsonl", fits, long, GOOD)
    rows, report = score(path, curator, skip_bad=True)
    assert [row["id"] for row in rows] == ["fits", "good"]
    assert (report.rows, report.bad) == (2, {"cannot be rated": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_file, "rate_shards", None)
        with pytest.raises(HumpbackError, match="the-long-one") as caught:
            score(path, curator)
    assert "2049 tokens" in str(caught.value) and "2048" in str(caught.value)
    assert "--skip-bad" in str(caught.value) and "on_long" not in str(caught.value)


def test_a_pair_that_the_chat_template_refuses_is_named_or_counted(tmp_path):
    odd = {"id": "the-odd-one", "instruction": "A forbidden word.", "output": "Yes."}
    path = write(tmp_path / "pairs.jsonl", GOOD, odd)
    by = judge(chat_template=REFUSING)
    rows, report = score(path, skip_bad=True, by=by)
    assert [row["id"] for row in rows] == ["good"] and report.bad == {"cannot be rated": 1}
    with pytest.raises(HumpbackError, match=r"the-odd-one.*no!.*--skip-bad"):
        score(path, by=by)


def test_pairs_are_checked_again_though_the_survey_has_done_so(tmp_path, monkeypatch):
    long = {"id": "long", "instruction": "Go on.", "output": "a" * 3000}
    pairs = [GOOD, long, GOOD, {"text": "no pair"}, long, GOOD]
    path = write(tmp_path / "pairs.jsonl", *pairs)
    check, checked = rate_file.require_rateable, []

    def watched(model, curator, pair):
        checked.append(pair.id)
        check(model, curator, pair)

    monkeypatch.setattr(rate_file, "require_rateable", watched)
    rows, report = score(path, skip_bad=True)
    assert [row["id"] for row in rows] == ["good", "good#2", "good#3"]
    assert checked == ["good", "long", "good#2", "long#2", "good#3"]
    assert (report.rows, report.bad) == (3, {"cannot be rated": 2, "not a pair": 1})


@pytest.mark.parametrize("curator", ["rubric", "pmi"])
def test_nobody_sees_how_fast_pairs_are_rated(curator, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    path, said = write(tmp_path / "pairs.jsonl", GOOD, GOOD), []
    by, decoding = judge(), Decoding(max_new_tokens=4)
    by.replicas.forget_work()
    out = tmp_path / "out.jsonl"
    rate_file.rate_file(by, path, out, None, curator, decoding, 0, False, said.append)
    speeds = re.findall(r"rows/s, ([\d,]+) tokens/s, ", said[-1])
    assert int(speeds[0].replace(",", "")) > 0
    assert ("slots" in said[-1] and "full" in said[-1]) == (curator == "rubric")


def test_a_file_of_which_nothing_can_be_rated_is_an_error(tmp_path, nothing_is_rated):
    long = {"instruction": "Go on.", "output": "a" * 3000}
    path = write(tmp_path / "pairs.jsonl", long)
    with pytest.raises(HumpbackError, match=r"no usable row.*cannot be rated"):
        score(path, skip_bad=True)


def test_the_rows_that_score_left_out_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    path = write(tmp_path / "pairs.jsonl", GOOD, {"text": "A page of text."})
    arguments = ["score", "--model=tiny-random", f"--data={path}", "--skip-bad"]
    assert main([*arguments, f"--out={tmp_path / 'out.jsonl'}", "--curator=pmi"]) == 0
    assert "skipped rows: {'not a pair': 1}" in capsys.readouterr().err


def test_a_text_that_its_tokenizer_writes_out_longer_is_found_too_long_before_its_turn():
    model = load_model("tiny-random")
    ligature = "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}"  # 3 bytes, in NFKC 33
    assert holds(model, ligature * 200, 0)
    model.tokenizer.backend.normalizer = normalizers.NFKC()
    assert len(model.tokenizer.encode(ligature * 200)) > model.config.max_position_embeddings
    assert not holds(model, ligature * 200, 0)
