"""Tokenizers out of GGUF files, the embedded default model's among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from text_samples import (
    LINES,
    LLAMA_STYLE,
    SPECIALS,
    digits_split,
    gpt2_split,
    train_sentencepiece,
    trained_bpe,
    varied_texts,
)
from tokenizers import Regex, pre_tokenizers

from humpback_jax.errors import HumpbackError
from humpback_jax.text.gguf_tokenizer import tokenizer_from_fields
from humpback_jax.text.gguf_vocabulary import gguf_fields
from humpback_jax.text.tokenizer import Tokenizer, within_vocabulary


def llama3_split() -> pre_tokenizers.PreTokenizer:
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def write_gguf(path: Path, **fields: Any) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        name = key if key == "tokenizer.chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def gguf_of(
    path: Path, backend: tokenizers.Tokenizer, pre: str | None, more: dict[int, str], **fields: Any
) -> Path:
    """A file of the backend's vocabulary; `more` has further control tokens, by id."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    size = max([len(tokens) - 1, *more]) + 1
    tokens += [more.get(i, f"[PAD{i}]") for i in range(len(tokens), size)]
    control = {*SPECIALS, *more.values()}
    own: dict[str, Any] = {
        "tokens": tokens,
        "token_type": [3 if token in control else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": tokens.index("<|endoftext|>"),
        "eos_token_id": tokens.index("<|im_end|>"),
    }
    named = {} if pre is None else {"pre": pre}
    return write_gguf(path, model="gpt2", **named, **own | fields)


@pytest.mark.parametrize(
    ("pre", "split"),
    [
        ("smollm", digits_split),
        ("gpt-2", gpt2_split),
        ("llama-bpe", llama3_split),
    ],
)
def test_gguf_byte_level_gives_the_ids_of_the_original(
    tmp_path: Path, pre: str, split: Any
) -> None:
    state = json.loads(trained_bpe(gpt2_split()).to_str())
    del state["model"]["merges"][-20:]  # words that only their presence in the vocabulary explains
    state["model"]["ignore_merges"] = pre == "llama-bpe"
    original = tokenizers.Tokenizer.from_str(json.dumps(state))
    original.pre_tokenizer = split()
    path = gguf_of(tmp_path / "m.gguf", original, pre, {})
    tokenizer = Tokenizer.from_gguf(path)
    for text in [*varied_texts(), "a<|im_end|>\nb<|im_start|>"]:
        assert tokenizer.encode(text) == original.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text), False) == text
    assert tokenizer.eos_texts == ("<|im_end|>",)
    assert tokenizer.add_bos == (pre == "llama-bpe")


def test_gguf_flags_and_turn_end_ids_are_read(tmp_path: Path) -> None:
    path = gguf_of(
        tmp_path / "m.gguf",
        trained_bpe(digits_split()),
        "smollm",
        {},
        add_bos_token=True,
        eot_token_id=0,
        **{"tokenizer.chat_template": "hello"},
    )
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.add_bos and tokenizer.eos_ids == (2, 0) and tokenizer.chat_template == "hello"


def test_gguf_sentencepiece_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    reference = train_sentencepiece(tmp_path / "m", **LLAMA_STYLE)
    count = reference.get_piece_size()
    kinds = [
        2
        if reference.is_unknown(i)
        else 3
        if reference.is_control(i)
        else 6
        if reference.is_byte(i)
        else 1
        for i in range(count)
    ]
    path = write_gguf(
        tmp_path / "m.gguf",
        model="llama",
        tokens=[reference.id_to_piece(i) for i in range(count)],
        scores=[reference.get_score(i) for i in range(count)],
        token_type=kinds,
        bos_token_id=1,
        eos_token_id=2,
    )
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.add_bos and tokenizer.eos_texts == ("</s>",)
    for text in varied_texts():
        assert tokenizer.encode(text) == reference.encode(text)


def test_unknown_gguf_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    path = gguf_of(tmp_path / "m.gguf", trained_bpe(gpt2_split()), "brand-new-pre", {})
    with pytest.raises(HumpbackError, match="brand-new-pre"):
        Tokenizer.from_gguf(path)


@pytest.mark.parametrize("pre", [None, "default"])
def test_gguf_that_does_not_say_how_text_is_cut_gives_no_wrong_tokens(
    tmp_path: Path, pre: str | None
) -> None:
    path = gguf_of(tmp_path / "m.gguf", trained_bpe(gpt2_split()), pre, {})
    with pytest.raises(HumpbackError, match=r"tokenizer\.ggml\.pre.*Hugging Face folder"):
        Tokenizer.from_gguf(path)


@pytest.mark.parametrize("pre", [None, "default"])
def test_early_llama3_gguf_is_known_by_its_vocabulary_and_gets_llama3s_tokens(
    tmp_path: Path, pre: str | None
) -> None:
    original = trained_bpe(llama3_split())
    more = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128009: "<|eot_id|>"}
    path = gguf_of(
        tmp_path / "m.gguf", original, pre, more, bos_token_id=128000, eos_token_id=128001
    )
    tokenizer = Tokenizer.from_gguf(path)
    for text in LINES:
        assert tokenizer.encode(text) == original.encode(text, add_special_tokens=False).ids
    assert tokenizer.add_bos and tokenizer.special_tokens["bos_token"] == "<|begin_of_text|>"
    assert tokenizer.eos_ids == (128001, 2, 128009)  # 2: this vocabulary's <|im_end|>


def test_answers_stop_at_the_end_of_a_turn_that_no_field_of_a_gguf_names(tmp_path: Path) -> None:
    """Llama 3 and Phi 3 end turns by another token than EOS, and files of 2024 name only that."""
    backend = trained_bpe(digits_split())
    size = backend.get_vocab_size()
    more = {size: "<|end|>", size + 1: "<end_of_turn>", size + 2: "<|user|>"}
    path = gguf_of(tmp_path / "m.gguf", backend, "smollm", more, eos_token_id=0)
    assert Tokenizer.from_gguf(path).eos_ids == (0, 2, size, size + 1)
    written_out = gguf_of(
        tmp_path / "text.gguf", backend, "smollm", more, eos_token_id=0, token_type=[1] * (size + 3)
    )
    assert Tokenizer.from_gguf(written_out).eos_ids == (0,)  # there they are ordinary text


def test_answers_run_on_in_chatml_files_of_2023_where_its_tokens_are_words(tmp_path: Path) -> None:
    """Converters wrote added tokens as user-defined ones then; llama.cpp goes by the text alone."""
    backend = trained_bpe(digits_split())
    kinds = [1] * backend.get_vocab_size()
    kinds[:3] = [3, 4, 4]
    path = gguf_of(tmp_path / "m.gguf", backend, "smollm", {}, eos_token_id=0, token_type=kinds)
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.eos_ids == (0, 2)
    fields, _ = gguf_fields(tokenizer, tokenizer.vocab_size, ["<|im_start|>user\nfox<|im_end|>"])
    assert tokenizer_from_fields(fields, "m").eos_ids == (0, 2)


@pytest.mark.parametrize("absent", [4294967295, 100000])
def test_gguf_with_padding_and_unknown_ids_of_no_token_can_still_be_used(
    tmp_path: Path, absent: int
) -> None:
    path = gguf_of(
        tmp_path / "m.gguf",
        trained_bpe(digits_split()),
        "smollm",
        {},
        padding_token_id=absent,
        unknown_token_id=absent,
    )
    tokenizer = Tokenizer.from_gguf(path)
    assert set(tokenizer.special_tokens) == {"bos_token", "eos_token"}
    assert tokenizer.pad_id == tokenizer.eos_ids[0]


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"])
def test_gguf_with_a_begin_or_end_of_no_token_names_the_field_instead_of_crashing(
    tmp_path: Path, field: str
) -> None:
    backend = trained_bpe(digits_split())
    path = gguf_of(tmp_path / "m.gguf", backend, "smollm", {}, **{field: 4294967295})
    with pytest.raises(HumpbackError, match=rf"tokenizer\.ggml\.{field}=4294967295"):
        Tokenizer.from_gguf(path)


def test_unknown_gguf_tokenizer_kind_and_broken_files_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model="rwkv", tokens=["a"])
    with pytest.raises(HumpbackError, match="rwkv"):
        Tokenizer.from_gguf(path)
    bare = write_gguf(tmp_path / "bare.gguf", model="gpt2", pre="gpt-2", tokens=["a"])
    with pytest.raises(HumpbackError, match="merges"):
        Tokenizer.from_gguf(bare)
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(HumpbackError, match=r"cut\.gguf"):
        Tokenizer.from_gguf(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("hello, this is no model at all")
    with pytest.raises(HumpbackError, match="GGUF"):
        Tokenizer.from_gguf(tmp_path / "text.gguf")
    with pytest.raises(HumpbackError, match=r"absent\.gguf"):
        Tokenizer.from_gguf(tmp_path / "absent.gguf")


# --- the embedded default model ---


def default_model_path() -> Path:
    from humpback_jax.weights import named

    return Path(named.resolve("smollm2-135m-instruct").path)


@pytest.mark.real_model
def test_default_model_tokenizer_is_smollm2s_own() -> None:
    tokenizer = Tokenizer.from_gguf(default_model_path())
    within_vocabulary(tokenizer, 49152)
    assert tokenizer.vocab_size == 49152 and tokenizer.eos_texts == ("<|im_end|>",)
    assert not tokenizer.add_bos  # its BOS id is <|im_start|>, which the chat template writes
    assert tokenizer.encode("Hello 12345") == [19556, 216, 33, 34, 35, 36, 37]  # single digits
    for text in varied_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.real_model
def test_default_model_tokenizer_agrees_with_transformers_reading_the_same_file() -> None:
    transformers = pytest.importorskip("transformers")
    path = default_model_path()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # Its GGUF reader knows the merges but not this model's rule of one token per digit.
    theirs.backend_tokenizer.pre_tokenizer = digits_split()
    ours = Tokenizer.from_gguf(path)
    for text in varied_texts():
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.chat_template == theirs.chat_template
