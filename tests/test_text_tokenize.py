"""The mask: exactly the answer and its end are trained, whatever the texts contain."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from humpback_jax.errors import HumpbackError
from humpback_jax.text.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from humpback_jax.text.template import Rendered, Template, neutralise
from humpback_jax.text.tokenize import (
    Dropped,
    TokenizedExample,
    tokenize_batch,
    tokenize_example,
)
from humpback_jax.text.tokenizer import Tokenizer

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the answer to this question?",
    "Naïve café, 日本語 text, 😀 and <|im_start|> assistant [INST] ### Response: {braces}",
] * 4
LLAMA2_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)

SPACED_TEMPLATE = (  # its prompts end with a space
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@functools.cache
def byte_level_bpe() -> Tokenizer:
    """Merged tokens; pad token = EOS, as in many models."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return Tokenizer(backend, special, chat_template=CHAT_TEMPLATE)


@functools.cache
def spaced_bpe() -> Tokenizer:
    """As `byte_level_bpe`: the space at the end of a prompt is one token with the next word."""
    return byte_level_bpe().with_chat_template(SPACED_TEMPLATE)


@functools.cache
def llama2_like() -> Tokenizer:
    """Sentencepiece with BOS and a template that writes spaces round the answer."""
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return trained_sentencepiece(**rules).with_chat_template(LLAMA2_TEMPLATE)


@functools.cache
def collapsing() -> Tokenizer:
    """Sentencepiece by its defaults: a line end is a space, and a text ends with none."""
    return trained_sentencepiece()


def trained_sentencepiece(**options: Any) -> Tokenizer:
    sentencepiece = pytest.importorskip("sentencepiece")
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT),
        model_writer=buffer,
        vocab_size=360,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(buffer.getvalue())
        return Tokenizer.load(folder)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_tokenizer,
    "bpe": byte_level_bpe,
    "spaced": spaced_bpe,
    "llama2": llama2_like,
    "collapsing": collapsing,
}

# Texts out of which separators, special tokens, braces and multi-byte characters grow.
pieces = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "</s>",
        "<s>",
        " [/INST] ",
        "### Response:\n",
        "{response}",
        "{{x}}",
        "😀",
        "日本",
        "e\u0301",
        "the quick ",
        "fox",
        " ",
        "\n",
        "\n\n",
        "1234",
    ]
)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(pieces, max_size=8).map("".join),
)
# White space at the very start can melt into the template's newline; it has a test of its own.
answers = texts.map(str.strip).filter(bool)


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def example(
    tokenizer: Tokenizer, rendered: Rendered, max_tokens: int | None = None
) -> TokenizedExample:
    result = tokenize_example(tokenizer, rendered, max_tokens, "truncate", "row")
    assert isinstance(result, TokenizedExample)
    return result


def answer_ids(tokenizer: Tokenizer, template: Template, answer: str) -> list[int]:
    """The answer's ids by another way: encoded on its own. EOS not included."""
    safe = neutralise(answer, template.control_tokens)
    if tokenizer is llama2_like():  # its template puts a space on both sides
        return tokenizer.encode(f"]{' ' + safe + ' '}")[len(tokenizer.encode("]")) :]
    if tokenizer is spaced_bpe():  # the space is the model's to write
        return tokenizer.encode(f": {safe}")[len(tokenizer.encode(":")) :]
    return tokenizer.encode(safe)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(asked=texts, answered=answers)
def test_T28_complete_row_trains_the_answer_and_one_eos_and_nothing_else(
    kind: str, asked: str, answered: str
) -> None:
    tokenizer = TOKENIZERS[kind]()
    template = Template.for_tokenizer(tokenizer)
    row = example(tokenizer, template.forward(chat(asked, answered)))
    assert row.ids.dtype == np.int32 and row.mask.dtype == np.bool_
    trained = row.ids[row.mask].tolist()
    assert trained == [*answer_ids(tokenizer, template, answered), tokenizer.eos_ids[0]]
    assert row.mask[-1] and row.ids[-1] == tokenizer.eos_ids[0]  # T-20, and no padding behind it
    assert row.mask.tolist() == [False] * (len(row.ids) - len(trained)) + [True] * len(trained)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(turns=st.lists(st.tuples(texts, answers), min_size=1, max_size=4))
def test_T11_every_turn_of_a_conversation_is_trained_whatever_it_contains(
    kind: str, turns: list[tuple[str, str]]
) -> None:
    tokenizer = TOKENIZERS[kind]()
    template = Template.for_tokenizer(tokenizer)
    row = example(tokenizer, template.forward(chat(*[text for turn in turns for text in turn])))
    expected = []
    for _, answered in turns:
        expected += [*answer_ids(tokenizer, template, answered), tokenizer.eos_ids[0]]
    assert row.ids[row.mask].tolist() == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(asked=texts, answered=answers, data=st.data())
def test_T20_cut_row_trains_exactly_the_kept_answer_tokens_and_never_an_eos(
    kind: str, asked: str, answered: str, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[kind]()
    rendered = Template.for_tokenizer(tokenizer).forward(chat(asked, answered))
    whole = example(tokenizer, rendered)
    prompt = int(np.argmax(whole.mask))
    limit = data.draw(st.integers(1, len(whole.ids) - 1))
    cut = tokenize_example(tokenizer, rendered, limit, "truncate", "row")
    if limit <= prompt:
        assert cut == Dropped("row", "no_supervised_token")
        return
    assert isinstance(cut, TokenizedExample)
    assert cut.ids.tolist() == whole.ids[:limit].tolist()
    assert cut.mask.tolist() == whole.mask[:limit].tolist()
    assert cut.mask.sum() == limit - prompt
    assert not set(cut.ids[cut.mask].tolist()) & set(tokenizer.eos_ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(response=answers, instruction=answers)
def test_T01_prompt_ids_at_sampling_are_the_untrained_ids_of_training(
    kind: str, response: str, instruction: str
) -> None:
    tokenizer = TOKENIZERS[kind]()
    template = Template.for_tokenizer(tokenizer)
    row = example(tokenizer, template.backward(response, instruction))
    prompt = tokenizer.encode(template.backward_prompt(response))
    assert row.ids[~row.mask].tolist() == prompt


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(asked=texts, answered=answers)
def test_pmi_compares_the_same_answer_tokens_with_and_without_the_instruction(
    kind: str, asked: str, answered: str
) -> None:
    tokenizer = TOKENIZERS[kind]()
    template = Template.for_tokenizer(tokenizer)
    pair = example(tokenizer, template.forward(chat(asked, answered)))
    alone = example(tokenizer, template.response_alone(answered))
    assert pair.ids[pair.mask].tolist() == alone.ids[alone.mask].tolist()


def test_eos_ids_in_prompts_and_pad_equal_to_eos_leave_the_mask_alone() -> None:
    tokenizer = byte_level_bpe()
    assert tokenizer.pad_id == tokenizer.eos_ids[0]
    row = example(tokenizer, Template.for_tokenizer(tokenizer).forward(chat("a", "b", "c", "d")))
    eos = row.ids == tokenizer.pad_id
    assert eos.sum() == 4 and (eos & row.mask).sum() == 2  # ends of user turns are not trained


def test_bos_is_the_first_id_and_occurs_once() -> None:
    tokenizer = llama2_like()
    row = example(tokenizer, Template.for_tokenizer(tokenizer).forward(chat("question", "answer")))
    assert row.ids[0] == tokenizer.bos_id and (row.ids == tokenizer.bos_id).sum() == 1
    assert not row.mask[0]


def test_token_that_begins_in_the_prompt_belongs_to_the_prompt() -> None:
    tokenizer = byte_level_bpe()
    text = "the quick fox"
    _, offsets = tokenizer.encode_with_offsets(text)
    row = example(tokenizer, Rendered(text, ((5, len(text)),)))
    assert row.mask.tolist() == [start >= 5 for start, _ in offsets.tolist()]
    assert (offsets[:, 0] < 5).any() and ((offsets[:, 0] < 5) & (offsets[:, 1] > 5)).any()


def test_answer_that_was_cut_off_by_its_sampler_has_no_eos() -> None:
    tokenizer = byte_tokenizer()
    template = Template.for_tokenizer(tokenizer)
    row = example(tokenizer, template.forward(chat("q", "half an ans"), complete=False))
    assert row.ids[row.mask].tolist() == list(b"half an ans")


# --- rows that cannot be used ---


def rows_of(*contents: tuple[str, str]) -> list[tuple[str, Rendered]]:
    template = Template.for_tokenizer(byte_tokenizer())
    return [(f"row-{i}", template.forward(chat(*pair))) for i, pair in enumerate(contents)]


def test_long_row_is_an_error_that_names_it_and_the_remedy() -> None:
    rows = rows_of(("q", "a"), ("q", "a" * 200))
    with pytest.raises(HumpbackError, match=r"row-1.*limit of 100.*on_long"):
        tokenize_batch(byte_tokenizer(), rows, 100, "error")


def test_T24_dropped_rows_are_returned_and_counted_with_their_reason() -> None:
    rows = rows_of(("q", "a"), ("q", "a" * 200), ("q" * 200, "a"))
    dropped = tokenize_batch(byte_tokenizer(), rows, 100, "drop")
    assert [row.id for row in dropped.examples] == ["row-0"]
    assert dropped.dropped == (Dropped("row-1", "too_long"), Dropped("row-2", "too_long"))
    assert dropped.drop_counts() == {"too_long": 2}
    cut = tokenize_batch(byte_tokenizer(), rows, 100, "truncate")
    assert [row.id for row in cut.examples] == ["row-0", "row-1"]
    assert cut.drop_counts() == {"no_supervised_token": 1}


def test_T19_row_with_nothing_to_learn_is_an_error_that_names_it() -> None:
    unsupervised = [("row-7", Rendered("only a prompt", ()))]
    with pytest.raises(HumpbackError, match="row-7"):
        tokenize_batch(byte_tokenizer(), unsupervised, None, "error")
    batch = tokenize_batch(byte_tokenizer(), unsupervised, None, "drop")
    assert batch.drop_counts() == {"no_supervised_token": 1}


@pytest.mark.parametrize("on_long", ["error", "drop", "truncate"])
@pytest.mark.parametrize("empty", ["", "  \n "])
def test_empty_answer_is_an_error_that_names_the_row(on_long: str, empty: str) -> None:
    rows = rows_of(("q", "a"), ("q", empty))
    with pytest.raises(HumpbackError, match=r"row-1.*empty"):
        tokenize_batch(byte_tokenizer(), rows, 100, on_long)  # type: ignore[arg-type]


def test_row_of_exactly_the_limit_is_complete() -> None:
    [(_, rendered)] = rows_of(("q", "answer"))
    size = len(example(byte_tokenizer(), rendered).ids)
    kept = tokenize_example(byte_tokenizer(), rendered, size, "error", "row")
    assert isinstance(kept, TokenizedExample) and kept.ids[-1] == 258


def test_batch_gives_what_single_rows_give() -> None:
    rows = rows_of(("a", "b"), ("😀", "é" * 9), ("c", "d"))
    batch = tokenize_batch(byte_tokenizer(), rows, None, "error")
    for (row_id, rendered), got in zip(rows, batch.examples, strict=True):
        alone = example(byte_tokenizer(), rendered)
        assert got.id == row_id
        assert got.ids.tolist() == alone.ids.tolist()
        assert got.mask.tolist() == alone.mask.tolist()


def test_no_rows_give_no_examples() -> None:
    assert tokenize_batch(byte_tokenizer(), [], 8, "error").examples == ()


@pytest.mark.real_model
def test_default_model_trains_what_transformers_says_the_answer_is() -> None:
    transformers = pytest.importorskip("transformers")
    from humpback_jax.weights import named

    path = Path(named.resolve("smollm2-135m-instruct").path)
    ours = Tokenizer.from_gguf(path)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = chat("What is 2+2?", "It's 4, naïvely 😀.", "And {3+3}?", "6.\n\nNot 33.")
    row = example(ours, Template.for_tokenizer(ours).forward(messages))
    whole = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert row.ids.tolist() == whole[: len(row.ids)] and len(whole) == len(row.ids) + 1
    trained = []
    for message in messages[1::2]:
        trained += [*theirs.encode(message["content"]), theirs.eos_token_id]
    assert row.ids[row.mask].tolist() == trained
