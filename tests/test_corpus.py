"""Documents to segments: if these fail, texts are cut in the wrong place, lost, or untraceable."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from humpback_jax.artifacts import Artifact, RunFolder
from humpback_jax.config import apply_tiny, default_config
from humpback_jax.corpus.documents import Document, DocumentReport, read_documents
from humpback_jax.corpus.filters import extract_segments, failed_rule, repeats_sentences
from humpback_jax.corpus.segments import choose, pieces, segments
from humpback_jax.corpus.structure import after_front_matter, headings, read_lines
from humpback_jax.errors import HumpbackError
from humpback_jax.records import Segment
from humpback_jax.rows import write_rows
from humpback_jax.stages.context import Context
from humpback_jax.stages.sources import corpus_stage

WORDS = st.lists(
    st.sampled_from(["water", "Größe", "数据", "🦀", "naïve", "the", "a:", "x"]),
    min_size=1,
    max_size=9,
).map(" ".join)
PARAGRAPH = st.lists(WORDS, min_size=1, max_size=4).map("\n".join)
LIST = st.lists(WORDS.map(lambda w: f"* {w}"), min_size=1, max_size=4).map("\n\n".join)
CODE = st.lists(WORDS, max_size=4).map(lambda ls: "\n".join(["```python", *ls, "", "# x", "```"]))
TILDES = st.lists(WORDS, max_size=3).map(lambda ls: "\n".join(["~~~", *ls, "", "```", "y", "~~~"]))
INDENTED = st.lists(WORDS, min_size=1, max_size=3).map(lambda ls: "\n".join("   " + w for w in ls))
MARKDOWN_TITLE = st.tuples(st.integers(1, 4), WORDS).map(lambda t: "#" * t[0] + " " + t[1])
RST_TITLE = st.tuples(st.sampled_from("=-~*^"), WORDS).map(lambda t: f"{t[1]}\n{t[0] * len(t[1])}")
OVERLINED = st.tuples(st.sampled_from("=*"), WORDS).map(
    lambda t: f"{t[0] * (len(t[1]) + 4)}\n{t[1]}\n{t[0] * (len(t[1]) + 4)}"
)
BLOCKS = st.one_of(
    PARAGRAPH,
    LIST,
    CODE,
    TILDES,
    INDENTED,
    MARKDOWN_TITLE,
    RST_TITLE,
    OVERLINED,
    st.text(max_size=40),
)
DOCUMENTS = st.lists(
    st.tuples(BLOCKS, st.sampled_from(["\n\n", "\n", "\n \n\n"])), max_size=14
).map(lambda blocks: "".join(block + gap for block, gap in blocks))


@given(DOCUMENTS, st.integers(20, 120))
@settings(max_examples=300)
def test_every_character_outside_headers_is_in_exactly_one_segment(text, max_chars):
    lines = read_lines(text)
    found, begin = headings(lines), after_front_matter(lines)
    covered = [0] * len(text)
    for piece in pieces(text, max_chars):
        assert text[piece.start : piece.end].strip()
        for place in range(piece.start, piece.end):
            covered[place] += 1
    in_header = [any(h.start <= p < h.body for h in found) for p in range(len(text))]
    for place, character in enumerate(text):
        assert covered[place] <= 1
        if not covered[place]:
            assert character.isspace() or in_header[place] or place < begin


@given(DOCUMENTS, st.integers(20, 120))
@settings(max_examples=200)
def test_byte_spans_point_at_exactly_the_segment_in_the_document(text, max_chars):
    if any("\ud800" <= c <= "\udfff" for c in text):
        return
    data, last = text.encode(), 0
    ids = set()
    for segment, _ in segments(Document("d", text, "s"), max_chars):
        assert data[segment.start : segment.end].decode() == segment.text
        assert segment.start >= last
        last = segment.end
        ids.add(segment.id)
    assert len(ids) == len(list(segments(Document("d", text, "s"), max_chars)))


@given(DOCUMENTS, st.integers(20, 120))
@settings(max_examples=200)
def test_a_segments_indentation_melts_into_the_line_end_of_its_prompt(text, max_chars):
    """Its first token then begins in the prompt and is not learnt; rows from files are stripped."""
    for piece in pieces(text, max_chars):
        body = text[piece.start : piece.end]
        assert body == body.strip()


CLEAN = st.lists(
    st.one_of(
        PARAGRAPH.map(lambda p: p.replace(":", "")), LIST, CODE, TILDES, INDENTED,
        st.tuples(WORDS, CODE).map(lambda t: f"See {t[0]}:\n\n{t[1]}"),
    ),
    min_size=1,
    max_size=12,
)  # fmt: skip


@given(CLEAN, st.integers(1, 80))
@settings(max_examples=200)
def test_lists_code_and_what_a_colon_announces_are_never_cut(blocks, max_chars):
    text = "\n\n".join(blocks)
    for piece in list(pieces(text, max_chars))[1:]:
        before, after = text[: piece.start].rstrip(), text[piece.start : piece.end]
        assert not before.endswith(":") and not after.startswith(("* ", " "))
        fences = re.findall(r"^(```|~~~)", text[: piece.start], re.MULTILINE)
        opened = ""
        for mark in fences:
            opened = mark if not opened else "" if mark == opened else opened
        assert not opened


def titles(text: str) -> list[tuple[int, str]]:
    return [(h.level, h.title) for h in headings(read_lines(text))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# One\nx\n\n## Two ##\n", [(1, "One"), (2, "Two")]),
        ("# C#\n", [(1, "C#")]),
        ("#hashtag\n##\n", []),
        ("One\n===\n\nTwo\n---\n\nThree\n=====\n", [(1, "One"), (2, "Two"), (1, "Three")]),
        ("====\nOne\n====\n\nTwo\n====\n", [(1, "One"), (2, "Two")]),
        ("=======\n  One\n=======\n", [(1, "One")]),
        ("API\n~~~\n\ntext\n", [(1, "API")]),
        ("A sentence that\nends here\n---------\n", []),
        ("Long enough title\n---\n", []),
        ("Do this:\n```\n# no title\n```\n\n# Title\n", [(1, "Title")]),
        ("Do:\n```\n# no title\n```\n\n# Title\n", [(1, "Title")]),
        ("text\n```python\n# no\n```\n# Title\n", [(1, "Title")]),
        ("~~~\n```\n# no\n~~~\n# Title\n", [(1, "Title")]),
        ("````\n```\n# no\n````\n# Title\n", [(1, "Title")]),
        ("text\n```python\n# Title\n", [(1, "Title")]),
        ("~~~\n\n# Title\n", [(1, "Title")]),
        ("````\n# One\n```\n# Two\n", [(1, "One"), (1, "Two")]),
        ("```\n~~~\n# no\n~~~\n# Title\n", [(1, "Title")]),
        ("```\n# no\n```\n\n```\n# Title\n", [(1, "Title")]),
        ("a ``` b\n# Title\n", [(1, "Title")]),
        ("```x``` y\n# Title\n", [(1, "Title")]),
        ("  # indented\n", []),
    ],
)
def test_headers_are_told_from_code_tables_and_text(text, expected):
    assert titles(text) == expected


def test_code_after_a_text_line_does_not_hide_the_headers_below():
    text = "# A\n\nRun this:\n```\nx\n```\nand that:\n```\ny\n```\n\n# B\n\nbody\n"
    assert [p.heading for p in pieces(text, 1000)] == ["A", "B"]


@pytest.mark.parametrize(
    "fields",
    [
        "---\ntitle: Größe\n# a comment\ntags:\n- a\n  b: c\n---\n",
        "--- \ndate: 2024-01-02\n...\n",
        '+++\ntitle = "x"\n[extra]\na = 1\n+++\n',
    ],
)
def test_the_fields_above_a_page_are_no_text_to_write_an_instruction_for(fields):
    body = "\nAn introduction.\n\n# A\n\nSome words.\n"
    ((intro, _), (section, _)) = segments(Document("d", fields + body, "s"), 100)
    assert [intro.text, section.text] == ["An introduction.", "Some words."]
    assert (fields + body).encode()[intro.start : intro.end].decode() == intro.text


@pytest.mark.parametrize(
    "text",
    ["---\nA sentence.\n---\n", "---\n- x\n- y\n---\n", "---\na: b\n\nText.\n---\n", "---\na: b"],
)
def test_text_between_rules_is_not_taken_for_a_page_s_fields(text):
    assert [text[p.start : p.end] for p in pieces(text, 100)] == [text.rstrip()]


def test_text_below_a_code_mark_that_nothing_closes_is_neither_cut_nor_headed():
    paragraph = "Some words of a paragraph.\n\n"
    text = "Run:\n\n```sh\nls\n\n" + paragraph * 9 + "# Title\n\n" + paragraph * 9
    found = list(pieces(text, 120))
    assert found[-1].heading == "Title" and max(p.end - p.start for p in found) <= 120


def test_a_section_that_fits_stays_whole_and_a_long_one_is_cut_at_its_children():
    text = "# A\n\nintro\n\n## B\n\n" + "b " * 20 + "\n\n## C\n\n" + "c " * 20 + "\n\n# D\n\nd\n"
    assert [p.heading for p in pieces(text, 1000)] == ["A", "D"]
    assert [p.heading for p in pieces(text, 60)] == ["A", "B", "C", "D"]


@given(st.lists(st.integers(5, 60), min_size=1, max_size=40), st.integers(60, 300))
def test_long_texts_are_cut_into_even_runs_that_fit(lengths, max_chars):
    text = "\n\n".join("x" * length for length in lengths)
    runs = [p.end - p.start for p in pieces(text, max_chars)]
    assert max(runs) <= max_chars
    assert len(runs) <= 2 * (len(text) // max_chars + 1)


@pytest.mark.parametrize(
    "text",
    [
        "## Title\n\nA paragraph of some words that goes on for a while here.\n\n" * 14_000,
        "A paragraph of some words without any header, one after the other.\n\n" * 14_000,
        "x" * 1_000_000,
        "# a" + " " * 1_000_000 + "b",
        "# " * 500_000,
        ("# a\n## b\n### c\n#### d\n##### e\n###### f\nSome words.\n" * 20_000),
        "A line.\n\n```\ncode\n```\n\n" * 40_000,
        "```python\n" * 100_000,
    ],
    ids=["sections", "paragraphs", "line", "spaces", "hashes", "deep", "code", "unclosed"],
)
def test_a_document_of_a_megabyte_takes_no_time(text):
    times = []
    for _ in range(2):
        started = time.process_time()
        list(segments(Document("d", text, "s"), 3000))
        times.append(time.process_time() - started)
    assert min(times) < 2.0  # half a second is usual; a quadratic step takes minutes


def test_windows_line_ends_and_marks_change_neither_text_nor_spans(tmp_path):
    body = "Title\n=====\n\nOne.\n\nTwo.\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + body.replace("\n", "\r\n").encode())
    text = "\ufeff" + body.replace("\n", "\r\n")
    write_rows(tmp_path / "b.jsonl", [{"id": "b", "text": text}])
    found = list(read_documents([str(tmp_path)]))
    assert [d.text for d in found] == [body, body]


def test_documents_of_all_kinds_are_found_once_each_with_their_own_id(tmp_path):
    for name in ("x", "y"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.md").write_text("one")
        write_rows(folder / "rows.jsonl", [{"id": 1, "text": "two"}, {"text": "three"}])
        write_rows(folder / "rows.parquet", [{"text": "four"}])
        (folder / "b.txt.gz").write_bytes(gzip.compress(b"five"))
        (folder / "picture.png").write_bytes(b"\x89PNG")
    found = list(read_documents([str(tmp_path / "x"), str(tmp_path / "y")]))
    assert len(found) == 10 and len({d.id for d in found}) == 10
    assert sorted({d.text for d in found}) == ["five", "four", "one", "three", "two"]


def test_unreadable_documents_are_named(tmp_path):
    def refused(path) -> str:
        with pytest.raises(HumpbackError) as caught:
            list(read_documents([str(path)]))
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such document" in refused(tmp_path / "none")
    assert "holds no" in refused(tmp_path)
    cases = {
        "latin.txt": ("é".encode("latin-1"), "not UTF-8"),
        "cut.md.gz": (gzip.compress(b"text" * 100)[:15], "damaged"),
        "rows.jsonl": (b'{"text": "a"}\n{"text"', "line 2: not valid JSON"),
        "bytes.jsonl": (b'{"text": "a"}\n\xff', "line 2: not UTF-8"),
        "types.jsonl": (b'{"text": "a"}\n{"text": 3}', "line 2: text missing or not text"),
        "half.jsonl": (b'{"text": "\\ud800"}', "line 1: contains an unpaired surrogate"),
        "page.html": (b"<p>", "unknown kind of document"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        assert reason in refused(tmp_path / name)


def test_one_bad_document_stops_a_run_and_nothing_can_skip_it(tmp_path):
    good = json.dumps({"text": "good"})
    bad = ['{"text": 3}', "[1]", '{"text": "\\ud800"}', '{"text"', '{"url": "x"}']
    (tmp_path / "rows.jsonl").write_text("\n".join([good, *bad, good]))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name in ("latin.txt", "rows.jsonl"):
        with pytest.raises(HumpbackError, match=r"config\.corpus\.skip_bad=true"):
            list(read_documents([str(tmp_path / name)]))
    report = DocumentReport(skip_bad=True)
    assert [d.text for d in read_documents([str(tmp_path)], report)] == ["good", "good"]
    assert report.rejected == {
        "text missing or not text": 3,
        "contains an unpaired surrogate": 1,
        "not valid JSON": 1,
        "unreadable file": 1,
    }


def test_one_damaged_file_of_rows_loses_the_whole_corpus(tmp_path):
    rows = "".join(json.dumps({"text": f"good {i}"}) + "\n" for i in range(9000))
    files = {
        "cut.jsonl.gz": (gzip.compress(rows.encode())[:-900], "damaged"),
        "package.json": (b'{"name": "a stray file"}', "expected a JSON list"),
        "page.json": (b"[1, ", "not valid JSON"),
        "table.parquet": (b"PAR1 and no more", "not a readable parquet"),
    }
    for name, (data, reason) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(HumpbackError, match=rf"{reason}.*config\.corpus\.skip_bad=true"):
            list(read_documents([str(tmp_path / name)]))
    (tmp_path / "z.txt").write_text("last")
    report = DocumentReport(skip_bad=True)
    texts = [d.text for d in read_documents([str(tmp_path)], report)]
    assert texts[:2] == ["good 0", "good 1"] and texts[-1] == "last"
    assert report.rejected == {"unreadable file": 4}


def test_a_folder_s_documents_are_dropped_for_their_suffix_without_a_word(tmp_path):
    for name in ("A.TXT", "b.Markdown", "c.MD"):
        (tmp_path / name).write_text("one")
    (tmp_path / "d.TXT.GZ").write_bytes(gzip.compress(b"one"))
    (tmp_path / "E.JSONL").write_text('{"text": "one"}')
    for name in ("page.html", "page.HTML", "LICENSE", ".hidden.html"):
        (tmp_path / name).write_text("other")
    report = DocumentReport()
    assert [d.text for d in read_documents([str(tmp_path)], report)] == ["one"] * 5
    assert report.passed_over_line().startswith(
        "3 files are not read, for their suffixes: 2 .html, 1 without one; read are .jsonl"
    )
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "page.html").write_text("other")
    with pytest.raises(HumpbackError, match=r"1 files are not read.*1 \.html"):
        list(read_documents([str(folder)]))


def segment(text: str, heading: str = "Some title") -> Segment:
    return Segment("id", "d", 0, len(text), heading, text, "s", "r")


SENTENCES = (
    "Water boils at a lower temperature on a mountain because the air presses less on it. "
    "Cooks there wait longer for their eggs. Pressure cookers undo the effect of height. "
)


@pytest.mark.parametrize(
    ("text", "heading", "rule"),
    [
        (SENTENCES, "Boiling", None),
        (SENTENCES[:20], "Boiling", "length"),
        (SENTENCES * 9, "Boiling", "length"),
        (SENTENCES, "3.2", "heading_quality"),
        (SENTENCES, "ALL CAPITALS", "heading_quality"),
        (SENTENCES, "HTTP", "heading_quality"),
        (SENTENCES, "GPU", None),
        (SENTENCES, "Free newsletter", "heading_navigation"),
        (SENTENCES, "Forums", "heading_navigation"),
        (SENTENCES, "Please log in", "heading_navigation"),
        (SENTENCES, "Dialog interfaces", None),
        (SENTENCES, "Cookie policy", "heading_navigation"),
        (SENTENCES, "Your cookies settings", "heading_navigation"),
        (SENTENCES, "Chocolate chip cookies", None),
        (SENTENCES, "Prolog in ten minutes", None),
        ("1 2 3 4 5 | 6 7 8 9 + " * 10, "Table", "alphabetic"),
        ("one two\nthree\nfour five\n" * 6, "Poem", "line_length"),
        (SENTENCES + SENTENCES, "Boiling", "repetition"),
    ],
)
def test_each_rule_refuses_what_it_names_and_nothing_else(text, heading, rule):
    assert failed_rule(segment(text, heading), True, set(), 100, 600) == rule


@pytest.mark.parametrize(
    "text",
    [
        "भारत एक विशाल देश है और यहाँ अनेक भाषाएँ बोली जाती हैं। हिन्दी सबसे अधिक बोली जाती है।",
        "বাংলা ভাষা দক্ষিণ এশিয়ার একটি প্রধান ভাষা, যা বাংলাদেশে ও ভারতে প্রচলিত।",
        "தமிழ் மொழி மிகவும் பழமையான மொழிகளில் ஒன்றாகும், இது இன்றும் பேசப்படுகிறது.",
        "తెలుగు భాష ఆంధ్ర ప్రదేశ్ మరియు తెలంగాణ రాష్ట్రాల అధికార భాష.",
        "မြန်မာဘာသာစကားသည် မြန်မာနိုင်ငံ၏ ရုံးသုံးဘာသာစကား ဖြစ်သည်။",
        "اللُّغَةُ العَرَبِيَّةُ هِيَ أَكْثَرُ اللُّغَاتِ السَّامِيَّةِ تَحَدُّثًا.",
    ],
    ids=["hindi", "bengali", "tamil", "telugu", "burmese", "arabic"],
)
def test_texts_in_scripts_with_vowel_signs_are_thrown_out_as_tables(text):
    assert failed_rule(segment(text), True, set(), 20, 600) is None


def test_words_that_differ_in_vowel_signs_alone_are_taken_for_a_repetition():
    told = "कल मैं बाज़ार गया और मैंने वहाँ से फल लिए"
    other = re.sub("[\u093e-\u094c]", "\u093f", told)
    assert other != told and not repeats_sentences(f"{told}. {other}.")
    assert repeats_sentences(f"{told}. {told}.")


def test_a_text_met_before_is_a_duplicate_whatever_its_case_and_spacing():
    documents = [
        Document("a", SENTENCES, "s"),
        Document("b", SENTENCES.upper().replace(" ", "\n", 3), "s"),
    ]
    kept, rejected, counts = extract_segments(documents, min_chars=100, max_chars=600)
    assert [s.document_id for s in kept] == ["a"] and rejected[0][1] == "duplicate"
    assert counts == {"segments": 2, "kept": 1, "rejected": {"duplicate": 1}}


def test_every_segment_is_counted_once():
    documents = list(read_documents(["pydoc_topics"]))
    kept, rejected, counts = extract_segments(documents)
    assert counts["segments"] == counts["kept"] + sum(counts["rejected"].values())
    assert (counts["kept"], sum(counts["rejected"].values())) == (len(kept), len(rejected))
    assert len(kept) > 100 and all(600 <= len(s.text) <= 3000 for s in kept)
    texts = {d.id: d.text.encode() for d in documents}
    for s in [*kept, *(s for s, _ in rejected)]:
        assert texts[s.document_id][s.start : s.end].decode() == s.text
        assert s.heading not in s.text.splitlines()[:1]


def test_repetition_is_about_sentences_not_words():
    assert not repeats_sentences(SENTENCES)
    assert repeats_sentences("We sell good shoes here. " * 2)
    assert not repeats_sentences("Yes. Yes. Yes. No. No.")


@given(st.integers(0, 5), st.integers(0, 12))
def test_a_larger_corpus_replaces_few_chosen_segments(seed, count):
    found = [Segment(str(i), "d", 0, 1, "", "", "s", "r") for i in range(10)]
    few = {s.id for s in choose(found, count, seed)}
    assert len(few) == min(count, 10)
    more = [*found, Segment("new", "d", 0, 1, "", "", "s", "r")]
    assert len(few - {s.id for s in choose(more, count, seed)}) <= 1
    assert choose(found, count, seed) == [s for s in found if s.id in few]


def corpus(root: Path, seed: int = 0, segments: int = 5) -> tuple[RunFolder, Artifact]:
    config = default_config()
    apply_tiny(config)
    config.seed, config.corpus.segments = seed, segments
    folder: Any = RunFolder(root / "run", say=lambda text: None)
    nothing: Any = None  # segments need neither model nor pairs
    context = Context(config, folder, nothing, nothing, [], [], nothing, lambda text: None)
    return folder, corpus_stage(context)


def test_another_seed_chooses_other_segments_in_the_same_folder(tmp_path):
    folder, first = corpus(tmp_path, seed=0)
    _, second = corpus(tmp_path, seed=1)
    chosen = [{row["id"] for row in folder.read(artifact)} for artifact in (first, second)]
    assert len(chosen[0]) == len(chosen[1]) == 5 and chosen[0] != chosen[1]
    assert corpus(tmp_path, 0, segments=0)[1].key == corpus(tmp_path, 1, segments=0)[1].key


def test_the_counts_of_a_corpus_survive_a_kill_before_its_seal(tmp_path):
    folder, whole = corpus(tmp_path)
    (folder.root / whole.path / "artifact.json").unlink()
    _, again = corpus(tmp_path)
    assert again == whole and again.details["segments"] > again.details["kept"] > 0


def test_documents_left_out_of_a_run_are_counted_nowhere(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": SENTENCES}) + '\n{"url": 1}\n')
    (tmp_path / "page.html").write_text("other")
    config = default_config()
    config.corpus.update({"documents": (str(tmp_path),), "skip_bad": True, "min_chars": 100})
    folder: Any = RunFolder(tmp_path / "run", say=lambda text: None)
    said: list[str] = []
    nothing: Any = None
    context = Context(config, folder, nothing, nothing, [], [], nothing, said.append)
    details = corpus_stage(context).details
    assert details["documents"] == 1
    assert details["rejected_documents"] == {"text missing or not text": 1}
    assert any("1 .html" in line for line in said)


def test_a_document_set_without_a_usable_segment_is_an_error_that_counts(tmp_path):
    config = default_config()
    (tmp_path / "short.txt").write_text("Too short.")
    config.corpus.documents = (str(tmp_path),)
    folder: Any = RunFolder(tmp_path / "run", say=lambda text: None)
    nothing: Any = None
    context = Context(config, folder, nothing, nothing, [], [], nothing, lambda text: None)
    with pytest.raises(HumpbackError, match=r"no segment is left of 1 documents.*'length': 1"):
        corpus_stage(context)


def test_web_documents_are_segmented_with_exact_spans(shared_data):
    path = shared_data / "web" / "c4_demo.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    documents = list(read_documents([str(path)]))
    assert len(documents) == len(rows)
    kept, _, counts = extract_segments(documents)
    assert kept and counts["segments"] >= len(kept)
    texts = {d.id: d.text.encode() for d in documents}
    assert all(texts[s.document_id][s.start : s.end].decode() == s.text for s in kept)
