"""Row files: if these fail, data is misread, lost without a count, or refused without a reason."""

from __future__ import annotations

import collections
import datetime
import decimal
import functools
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from humpback_jax.errors import HumpbackError
from humpback_jax.models import load_model
from humpback_jax.rows import ReadReport, read_examples, stream_prompts, unique_name, write_rows
from humpback_jax.text.template import Template

GOOD = {"instruction": "Name a colour.", "output": "Blue."}


def jsonl(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def refused(path: Path, read=lambda path: read_examples(path, "seed")) -> str:
    with pytest.raises(HumpbackError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    return message


def turns_of(row: dict, folder: Path) -> list[tuple[str, str]]:
    (example,), _ = read_examples(jsonl(folder, row), "seed")
    return [(m.role, m.content) for m in example.messages]


SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": None}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": CHAT}, "Hi Hello"),
        ({"messages": CHAT * 2}, "Hi Hello Hi Hello"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
            "Hi Yes",
        ),
        ({"conversations": CHAT}, "Hi Hello"),
        ({"messages": [dict.fromkeys(CHAT[0]) | turn for turn in SHARED]}, "Hi Hello"),
        ({"messages": [], "conversations": CHAT, "id": "a"}, "Hi Hello"),
        ({"messages": [], **GOOD}, "Name a colour. Blue."),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "Hi Hello"),
        ({"system": "Be brief.", "prompt": CHAT[:1], "completion": CHAT[1:]}, "Be brief. Hi Hello"),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n\n1, 2 3"),
        ({"instruction": "Add.", "input": " ", "response": "3"}, "Add. 3"),
        ({"instruction": "Add.", "input": None, "response": "3"}, "Add. 3"),
        ({"prompt": "Add.", "completion": " 3"}, "Add. 3"),
        ({"inputs": "Add.", "targets": "3"}, "Add. 3"),
        ({**GOOD, "history": [["a", "b"]]}, "a b Name a colour. Blue."),
        ({"messages": [*CHAT, {"role": "user", "content": "More?"}]}, "Hi Hello"),
        ({"system": "Be brief.", **GOOD}, "Be brief. Name a colour. Blue."),
        ({"system": "Be brief.", "messages": CHAT}, "Be brief. Hi Hello"),
        ({"system": "x", "messages": [{"role": "system", "content": "y"}, *CHAT]}, "y Hi Hello"),
    ],
)
def test_every_common_form_is_understood(row, turns, tmp_path):
    assert " ".join(text for _, text in turns_of(row, tmp_path)) == turns


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[0], {**CHAT[1], "weight": 1}]},
        {"prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:]},
    ],
)
def test_answers_that_are_context_only_are_not_learnt(row, tmp_path):
    (example,), _ = read_examples(jsonl(tmp_path, row), "seed")
    assert [m.supervised for m in example.messages if m.role == "assistant"] == [False, True]
    template = Template.for_tokenizer(load_model("tiny-random").tokenizer)
    rendered = template.forward(example.chat())
    ((start, end),) = rendered.spans
    assert rendered.text.count("Hello") == 2
    assert rendered.text[start:end].startswith("Hello") and end == len(rendered.text)
    everything = template.forward([{**turn, "supervised": True} for turn in example.chat()])
    assert everything.text == rendered.text and everything.spans[1:] == rendered.spans


def test_white_space_that_would_merge_with_the_prompt_is_removed(tmp_path):
    for row in (
        {"instruction": "Say it. \n", "output": "\n  Yes.\n"},
        {"prompt": "Say it.\n", "completion": "   Yes. "},
        {
            "messages": [
                {"role": "user", "content": "Say it.\t"},
                {"role": "assistant", "content": "\nYes.\n"},
            ]
        },
        {"instruction": "Say", "history": [["Say it. ", " Yes."]], "output": " it"},
    ):
        turns = turns_of(row, tmp_path)
        assert turns[:2] == [("user", "Say it."), ("assistant", "Yes.")]


def test_a_first_line_of_a_request_keeps_its_indentation(tmp_path):
    assert turns_of({"prompt": "  x = 1\n", "completion": "ok"}, tmp_path)[0][1] == "  x = 1"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "output": ""}, "empty response: field 'output'"),
        ({"instruction": "a", "output": " \n"}, "empty response: field 'output'"),
        ({"instruction": "", "output": "a"}, "empty request: field 'instruction'"),
        ({"instruction": 3, "output": "a"}, "wrong type: field 'instruction'"),
        ({"instruction": "a", "output": ["b"]}, "wrong type: field 'output'"),
        ({"instruction": "a", "input": 7, "output": "b"}, "wrong type: field 'input'"),
        ({"instruction": "a", "output": None}, "unknown form"),
        ({"question": "a", "answer": "b"}, "unknown form: the fields are ['answer', 'question']"),
        (
            {"message_id": "a", "parent_id": "b", "text": "c", "role": "assistant"},
            "'role', 'parent",
        ),
        ({"prompt": "a", "response": "b", "text": "ab"}, "text of a dialogue"),
        ({"question": "a", "answer": "b", "text": "ab"}, "text of a dialogue"),
        ({"instruction": "a", "output": None, "text": "a"}, "text of a dialogue"),
        ({"messages": []}, "wrong type: field 'messages'"),
        ({"messages": [], "id": "a"}, "wrong type: field 'messages'"),
        ({"messages": "hello"}, "wrong type: field 'messages'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "turn 1"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "turn 1"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, "turn 2"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, "turn 2 has a 'weight'"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, "no answer"),
        ({"messages": ["Hi", "Hello"]}, "turn 1 must be an object"),
        ({"prompt": CHAT[:1], "completion": "Hello"}, "wrong type: field 'completion'"),
        ({"prompt": CHAT, "completion": CHAT[:1]}, "no answer: field 'completion'"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "empty response"),
        ({"messages": [CHAT[0]]}, "no answer"),
        ({"messages": [CHAT[1], *CHAT]}, "no request"),
        ({"messages": [CHAT[1]]}, "no request"),
        ({**GOOD, "history": 5}, "wrong type: field 'history'"),
        ({**GOOD, "history": [["a"]]}, "wrong type: field 'history'"),
        ({**GOOD, "history": [["a", ""]]}, "empty response: field 'history', turn 1"),
        ({"instruction": "a", "output": "\ud800"}, "not valid Unicode"),
        ([1, 2], "not an object: found list"),
        ("text", "not an object: found str"),
    ],
)
def test_a_bad_row_is_named_or_with_skip_bad_counted_by_reason(row, reason, tmp_path):
    path = jsonl(tmp_path, GOOD, row)
    message = refused(path)
    assert "line 2: " in message and reason in message
    examples, report = read_examples(path, "seed", skip_bad=True)
    assert len(examples) == 1 and sum(report.bad.values()) == 1
    (label,) = report.bad
    assert message.split("line 2: ")[1].startswith(label) and ":" not in label


def test_plain_text_is_refused_for_what_a_corpus_says_of_it(tmp_path):
    said = {"id": "a", "url": "b", "source": "c", "meta": {"role": "d"}, "title": "e", "label": 1}
    (example,), report = read_examples(jsonl(tmp_path, {"text": "Ice.", **said}), "plain")
    assert example.text == "Ice." and report.forms == {"text": 1}


def test_malformed_lines_are_named_and_with_skip_bad_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b'\n{"instruction": \n\n' + good + b"\n\xff\xfe\n" + good + b"\n")
    assert "line 2: not valid JSON" in refused(path)
    examples, report = read_examples(path, "seed", skip_bad=True)
    assert len(examples) == 3
    assert report.bad == {"not valid JSON": 1, "not UTF-8 text": 1}


def test_text_in_another_encoding_is_named_with_its_place(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(json.dumps([GOOD]).encode() + " é".encode("latin-1"))
    assert "not UTF-8" in refused(path) and "iconv" in refused(path)


def test_files_that_windows_wrote_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(read_examples(path, "seed")[0]) == 1


def test_missing_files_folders_and_unknown_kinds_are_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.jsonl")
    for name in ("folder.jsonl", "folder.parquet", "folder.json"):
        (tmp_path / name).mkdir()
        assert "is not a file" in refused(tmp_path / name)
    (tmp_path / "rows.csv").write_text("a,b")
    assert "unknown kind of file" in refused(tmp_path / "rows.csv")
    (tmp_path / "empty.jsonl").touch()
    assert "The file is empty" in refused(tmp_path / "empty.jsonl")
    (tmp_path / "object.json").write_text('{"a": 1}')
    assert "expected a JSON list" in refused(tmp_path / "object.json")
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}')
    assert ".jsonl" in refused(tmp_path / "lines.json")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no PAR1")
    assert "parquet" in refused(tmp_path / "rows.parquet")


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_cut_off_in_transfer_loses_no_rows_in_silence(kind, tmp_path):
    text = "\n".join(json.dumps({**GOOD, "id": str(n), "x": hash(str(n))}) for n in range(5000))
    path = tmp_path / f"rows.jsonl.{kind}"
    if kind == "gz":
        whole = gzip.compress(text.encode())
    else:
        import pyarrow as pa

        whole = pa.compress(text.encode(), codec="zstd", asbytes=True)
    path.write_bytes(whole)
    assert len(read_examples(path, "seed")[0]) == 5000
    path.write_bytes(whole[: len(whole) // 2])
    refused(path)
    if kind == "gz":  # zstd need not hold a checksum
        path.write_bytes(whole[:100] + b"\xff" * 200 + whole[300:])
        refused(path)
    path.write_bytes(b"plain text")
    refused(path)


def test_ids_are_kept_made_from_content_and_never_twice(tmp_path):
    rows = [{**GOOD, "id": name} for name in ("a", "a", "a#2", 7, True, "")]
    examples, report = read_examples(jsonl(tmp_path, *rows), "seed")
    names = [example.id for example in examples]
    assert names[:2] == ["a", "a#2"] and names[3] == "7" and len(set(names)) == 6
    assert report.renamed >= 2
    again, _ = read_examples(jsonl(tmp_path, GOOD, name="b.jsonl"), "seed")
    assert again[0].id == read_examples(jsonl(tmp_path, GOOD), "seed")[0][0].id


@given(st.lists(st.sampled_from(["a", "a#2", "a#3", "b", "a#2#2"]), max_size=30))
def test_names_given_twice_become_different(names):
    seen: collections.Counter[str] = collections.Counter()
    found = [unique_name(name, seen) for name in names]
    assert len(set(found)) == len(names)
    assert all(new.startswith(old) for old, new in zip(names, found, strict=True))


def test_prompts_keep_their_row_and_end_with_the_user(tmp_path):
    path = jsonl(
        tmp_path,
        {"messages": CHAT, "meta": [1]},
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"prompt": CHAT[:1]},
        {**GOOD, "history": [["a", "b"]]},
        {"inputs": "Hi"},
        {"text": "Hi"},
    )
    prompts = list(stream_prompts(path, ReadReport()))
    assert [p.messages[-1]["content"] for p in prompts] == ["Hi"] * 3 + [GOOD["instruction"]] + [
        "Hi"
    ] * 2
    assert prompts[0].row["meta"] == [1]
    assert [m["role"] for m in prompts[3].messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("row", "response"),
    [
        (GOOD, "Blue."),
        ({"instruction": "a", "response": " b\n"}, "b"),
        ({"prompt": "a", "completion": "b"}, "b"),
        ({"inputs": "a", "targets": "b"}, "b"),
        ({"output": "b"}, "b"),
        ({"messages": CHAT}, "Hello"),
        ({"messages": [], **GOOD}, "Blue."),
        ({"messages": [*CHAT, {"role": "user", "content": "More?"}]}, "Hello"),
        ({"conversations": [{"from": "gpt", "value": "Hello"}]}, "Hello"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "Hello"),
        ({"text": "b"}, "b"),
        ({"prompt": "b"}, "b"),
        ({"instruction": "b"}, "b"),
        ({"messages": CHAT[:1]}, "Hi"),
    ],
)
def test_the_backward_model_is_asked_about_the_response_and_not_the_instruction(
    row, response, tmp_path
):
    (prompt,) = stream_prompts(jsonl(tmp_path, row), ReadReport(), reverse=True)
    assert prompt.messages == [{"role": "user", "content": response}]


@pytest.mark.parametrize("row", [{**GOOD, "output": ""}, {**GOOD, "output": 3}, {"completion": []}])
def test_a_response_that_is_none_is_not_replaced_by_the_instruction(row, tmp_path):
    path = jsonl(tmp_path, GOOD, row)
    read = functools.partial(stream_prompts, report=ReadReport(), reverse=True)
    assert "line 2" in refused(path, lambda path: list(read(path)))


@pytest.mark.parametrize(
    "row", [{"prompt": " "}, {"prompt": CHAT}, {"messages": [CHAT[1]]}, {"x": 1}, {"messages": 3}]
)
def test_a_bad_prompt_is_named(row, tmp_path):
    path = jsonl(tmp_path, {"prompt": "Hi"}, row)
    assert "line 2" in refused(path, lambda path: list(stream_prompts(path, ReadReport())))
    report = ReadReport()
    prompts = list(stream_prompts(path, report, skip_bad=True))
    assert len(prompts) == 1 and sum(report.bad.values()) == 1


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_written_rows_come_back_whole_whatever_their_fields(form, tmp_path):
    rows = [{"a": 1, "prompt": "x"}, {"a": None, "output": "é\u2028", "b": [1.5]}]
    path = tmp_path / "deep" / f"rows.{form}"
    write_rows(path, rows)
    write_rows(path, rows)
    from humpback_jax.rows import raw_rows

    found = [row for _, row in raw_rows(path)]
    assert [{k: v for k, v in row.items() if v is not None} for row in found] == [
        {"a": 1, "prompt": "x"},
        {"output": "é\u2028", "b": [1.5]},
    ]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_rows_that_cannot_be_written_say_why_and_leave_the_old_file(tmp_path):
    with pytest.raises(HumpbackError, match=r"\.jsonl or \.parquet"):
        write_rows(tmp_path / "rows.csv", [GOOD])
    (tmp_path / "file").touch()
    with pytest.raises(HumpbackError, match="cannot be written"):
        write_rows(tmp_path / "file" / "rows.jsonl", [GOOD])
    path = tmp_path / "rows.parquet"
    write_rows(path, [GOOD])
    before = path.read_bytes()
    with pytest.raises(HumpbackError, match="different types"):
        write_rows(path, [{"a": 1}, {"a": "text"}])
    assert path.read_bytes() == before


ODD = {
    "day": datetime.date(2024, 1, 2),
    "at": datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
    "price": decimal.Decimal("1.50"),
    "name": "é".encode(),
    "image": b"\xff\x00",
    "deep": [{"day": datetime.date(2024, 1, 2), "raw": [b"a"]}],
}
SAME_IN_JSON = {
    "day": "2024-01-02",
    "at": "2024-01-02T03:04:05+00:00",
    "price": "1.50",
    "name": "é",
    "image": "/wA=",
    "deep": [{"day": "2024-01-02", "raw": ["a"]}],
}


def test_prompts_of_parquet_rows_with_dates_and_bytes_can_be_written_as_json(tmp_path):
    path = tmp_path / "rows.parquet"
    write_rows(path, [{"prompt": "Hi", **ODD}])
    (prompt,) = stream_prompts(path, ReadReport())
    assert prompt.row == {"prompt": "Hi", **SAME_IN_JSON}
    json.dumps(prompt.row)


@pytest.mark.parametrize("given", [datetime.date(2024, 1, 2), decimal.Decimal("7"), b"x", b"\xff"])
def test_a_row_has_the_id_that_its_written_row_shows(given, tmp_path):
    path = tmp_path / "rows.parquet"
    write_rows(path, [{**GOOD, "id": given}])
    (example,), _ = read_examples(path, "seed")
    (prompt,) = stream_prompts(path, ReadReport())
    assert example.id == prompt.id == prompt.row["id"] and example.id in "2024-01-02 7 x /w=="


def test_bytes_in_the_place_of_a_text_are_not_learnt_as_base64(tmp_path):
    path = tmp_path / "rows.parquet"
    write_rows(path, [{**GOOD, "output": b"\xff"}])
    assert "field 'output' must be text, found bytes" in refused(path)


def test_parquet_values_that_python_cannot_hold_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["Hi"], "at": pa.array([10**16], pa.timestamp("ms"))}), path)
    refused(path)


def test_public_seed_sets_are_read_completely(shared_data):
    seeds = shared_data / "seeds"
    for name, rows, forms in (
        ("dolly_3k.json", 2406, {"instruction+output"}),
        ("lima.json", 837, {"instruction+output"}),
        ("alpaca_random.json", 2922, {"instruction+output"}),
    ):
        examples, report = read_examples(seeds / name, "seed", skip_bad=True)
        assert len(examples) + sum(report.bad.values()) == rows and set(report.forms) == forms
        assert len(examples) > 0.99 * rows
        assert all(e.response == e.response.strip() for e in examples)
        assert len({e.id for e in examples}) == len(examples)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_parquet_file_is_accepted_by_its_name_and_not_read(kind, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([GOOD] * 3), tmp_path / "rows.parquet")
    whole = (tmp_path / "rows.parquet").read_bytes()
    path = tmp_path / f"rows.parquet.{kind}"
    packed = pa.compress(whole, codec="gzip" if kind == "gz" else "zstd", asbytes=True)
    path.write_bytes(packed)
    assert len(read_examples(path, "seed")[0]) == 3
    path.write_bytes(packed[: len(packed) // 2])
    refused(path)
