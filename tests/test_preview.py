"""The preview shows what is trained: users trust their eyes on it before they spend compute."""

from __future__ import annotations

import re

import pytest

from humpback_jax.errors import HumpbackError
from humpback_jax.text.byte_tokenizer import TURN_END, byte_tokenizer
from humpback_jax.text.preview import CLOSE, GREEN, OPEN, PLAIN, preview_lines
from humpback_jax.text.template import Rendered, Template
from humpback_jax.text.tokenize import tokenize_batch

TOKENIZER = byte_tokenizer()
TEMPLATE = Template.for_tokenizer(TOKENIZER)
TALK = [
    {"role": "user", "content": "Two lines,\nplease: ä → 語"},
    {"role": "assistant", "content": "One ä\ntwo 語"},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "No"},
]


def test_the_marks_enclose_exactly_what_the_loss_counts() -> None:
    rendered = TEMPLATE.forward(TALK)
    header, *body = preview_lines(TOKENIZER, [("row", rendered)], colour=False)
    shown = "\n".join(body)
    inside = re.findall(f"{OPEN}(.*?){CLOSE}", shown, re.DOTALL)
    assert inside == [f"One ä\ntwo 語{TURN_END}", f"No{TURN_END}"]
    assert shown.replace(OPEN, "").replace(CLOSE, "") == rendered.text
    mask = tokenize_batch(TOKENIZER, [("row", rendered)], None, "error").examples[0].mask
    assert header == f"--- row: {len(mask)} tokens, {mask.sum()} supervised"


def test_a_wrong_mask_shows_instead_of_the_spans_that_were_meant() -> None:
    # The span begins inside a character of three bytes: its token began before, in the prompt.
    lines = preview_lines(TOKENIZER, [("row", Rendered("ab 語cd", ((4, 6),)))], colour=False)
    assert lines[1] == f"ab 語{OPEN}cd{CLOSE}"


def test_colour_survives_a_pager_that_shows_single_lines() -> None:
    _, *body = preview_lines(TOKENIZER, [("row", TEMPLATE.forward(TALK))], colour=True)
    coloured = [line for line in body if GREEN in line]
    assert len(coloured) == 3
    assert all(line.count(GREEN) == line.count(PLAIN) == 1 for line in coloured)


def test_a_document_cannot_steer_the_terminal() -> None:
    hostile = [
        {"role": "user", "content": "x\x1b[2Jy\x07\r"},
        {"role": "assistant", "content": "a\x1b]0;title\x07b\x7f"},
    ]
    for colour in (False, True):
        text = "\n".join(preview_lines(TOKENIZER, [("row", TEMPLATE.forward(hostile))], colour))
        assert set("\x1b\x07\r\x7f") & set(text.replace(GREEN, "").replace(PLAIN, "")) == set()
        assert "␛[2J" in text


def test_an_empty_answer_is_refused_as_in_training() -> None:
    with pytest.raises(HumpbackError, match="Row bad"):
        preview_lines(TOKENIZER, [("bad", Rendered(f"x{TURN_END}", ((1, 11),)))], colour=False)
