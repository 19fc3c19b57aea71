"""Tokenizers: the ids, offsets and special tokens must be those the model was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from text_samples import (
    LINES,
    LLAMA_STYLE,
    digits_split,
    train_sentencepiece,
    trained_bpe,
    varied_texts,
)
from tokenizers import AddedToken, processors

from humpback_jax.errors import HumpbackError
from humpback_jax.text.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from humpback_jax.text.template import Template
from humpback_jax.text.tokenize import TokenizedExample, tokenize_example
from humpback_jax.text.tokenizer import Tokenizer, within_vocabulary


def hf_folder(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    trained_bpe(digits_split()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


# --- the packaged byte tokenizer ---


@given(st.text())
def test_byte_tokenizer_ids_are_the_utf8_bytes_and_decode_back(text: str) -> None:
    tokenizer = byte_tokenizer()
    for token in tokenizer.control_tokens:
        text = text.replace(token, "")
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_tokenizer_special_ids_are_fixed_so_old_checkpoints_keep_their_meaning() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("a<|im_end|>") == [97, 258]
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.bos_id) == (256, (258,), None)
    assert tokenizer.vocab_size == 259


def test_offsets_count_characters_so_masks_stay_right_after_an_emoji() -> None:
    ids, offsets = byte_tokenizer().encode_with_offsets("é😀a")
    assert ids.dtype == np.int32 and offsets.dtype == np.int32
    assert offsets.tolist() == [[0, 1]] * 2 + [[1, 2]] * 4 + [[2, 3]]


def test_empty_text_has_offsets_of_the_right_shape() -> None:
    ids, offsets = byte_tokenizer().encode_with_offsets("")
    assert ids.shape == (0,) and offsets.shape == (0, 2)


def test_batch_encoding_equals_one_by_one() -> None:
    tokenizer = byte_tokenizer()
    for text, (ids, _) in zip(LINES, tokenizer.encode_batch_with_offsets(LINES), strict=True):
        assert ids.tolist() == tokenizer.encode(text)


# --- Hugging Face folders ---


def test_hf_folder_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = hf_folder(
        tmp_path / "m",
        {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in varied_texts():
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_every_eos_id_of_generation_config_stops_generation(tmp_path: Path) -> None:
    folder = hf_folder(
        tmp_path / "m",
        {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}},
        generation_config={"eos_token_id": [0, 2]},
    )
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_ids == (2, 0)
    assert tokenizer.eos_texts == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.pad_id == 2


def test_a_template_that_writes_sep_or_cls_tokens_prompts_without_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    chat = "{{ cls_token }}{% for m in messages %}{{ m['content'] + sep_token }}{% endfor %}"
    sep = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    named = {"cls_token": "<|im_start|>", "sep_token": sep}
    config = {"eos_token": "<|endoftext|>", "chat_template": chat, **named}
    folder = hf_folder(tmp_path / "m", config)
    messages = [{"role": "user", "content": "fox"}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Template.for_tokenizer(Tokenizer.load(folder)).forward_prompt(messages) == prompt
    assert prompt == "<|im_start|>fox<|im_end|>"


def test_eos_ids_that_are_no_ids_give_no_traceback(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", {"eos_token": "<|im_end|>"})
    (folder / "config.json").write_text('{"eos_token_id": -1}')
    with pytest.raises(HumpbackError, match=r"-1.*eos_token_id"):
        Tokenizer.load(folder)
    (folder / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(HumpbackError, match=r"config\.json: eos_token_id"):
        Tokenizer.load(folder)


def test_chat_template_file_wins_over_the_config_and_named_lists_are_read(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    folder = hf_folder(tmp_path / "m", {"eos_token": "<|im_end|>", "chat_template": named})
    assert Tokenizer.load(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("FILE", "utf-8")
    assert Tokenizer.load(folder).chat_template == "FILE"


def test_bos_of_the_post_processor_is_noticed_but_never_added_twice(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"})
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.add_bos
    assert 0 not in tokenizer.encode("hello") and 0 not in tokenizer.backend.encode("hello").ids


def test_byte_level_offsets_keep_the_space_so_the_first_answer_token_is_trained(
    tmp_path: Path,
) -> None:
    folder = hf_folder(tmp_path / "m", {"eos_token": "<|im_end|>"})
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.save(str(folder / "tokenizer.json"))
    _, offsets = Tokenizer.load(folder).encode_with_offsets("so fox")
    starts = offsets[:, 0].tolist()
    assert 2 in starts and 3 not in starts  # " f..." begins at its space


def test_padding_and_truncation_left_in_a_file_are_switched_off(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", {"eos_token": "<|im_end|>"})
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert len(tokenizer.encode("The quick brown fox jumps")) > 3
    assert len(tokenizer.encode("a")) == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"{ not json"])
def test_damaged_tokenizer_file_is_named_in_the_error(
    tmp_path: Path, name: str, content: bytes
) -> None:
    folder = hf_folder(tmp_path / "m", {"eos_token": "<|im_end|>"})
    (folder / name).write_bytes(content)
    with pytest.raises(HumpbackError, match=name.replace(".", r"\.")):
        Tokenizer.load(folder)


def test_folder_without_tokenizer_or_without_eos_says_so(tmp_path: Path) -> None:
    with pytest.raises(HumpbackError, match=r"tokenizer\.json and tokenizer\.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(HumpbackError, match="never learn to stop"):
        Tokenizer.load(hf_folder(tmp_path / "m", {}))


def test_eos_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = hf_folder(
        tmp_path / "m", {"eos_token": "<|im_end|>"}, generation_config={"eos_token_id": 99999}
    )
    with pytest.raises(HumpbackError, match="99999"):
        Tokenizer.load(folder)


def added(kind: str, tokens: dict[str, int]) -> dict[str, Any]:
    """Settings of `hf_folder` by which a folder adds special tokens beside `tokenizer.json`."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    if kind == "added_tokens.json":
        special = {"additional_special_tokens": list(tokens)}
        return {"config": config | special, "added_tokens": tokens}
    entries = {str(i): {"content": text, "special": True} for text, i in tokens.items()}
    return {"config": config | {"added_tokens_decoder": entries}}


@pytest.mark.parametrize("kind", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("first", ["<|end|>", "<|start|>"])
def test_tokens_added_beside_tokenizer_json_have_the_ids_that_transformers_gives_them(
    tmp_path: Path, kind: str, first: str
) -> None:
    transformers = pytest.importorskip("transformers")
    size = trained_bpe(digits_split()).get_vocab_size()
    second = "<|start|>" if first == "<|end|>" else "<|end|>"
    settings = added(kind, {second: size + 1, first: size, "<|im_end|>": 2})
    folder = hf_folder(tmp_path / "m", **settings)
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode(first + second) == [size, size + 1]
    assert ours.eos_ids == (theirs.eos_token_id,) == (ours.id_of("<|end|>"),)
    for text in [*varied_texts(), "<|start|>user\nfox <|end|>\n<|im_end|> <|end|>"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert set(ours.control_tokens) >= {"<|start|>", "<|end|>"}


def test_how_the_config_marks_a_token_of_tokenizer_json_counts_as_in_transformers(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    marked = {"content": "<|im_start|>", "lstrip": True, "special": True}
    plain = {"content": "fox", "special": False, "normalized": True}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"1": marked, "600": plain},
    }
    folder = hf_folder(tmp_path / "m", config)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["fox"] = len(raw["model"]["vocab"])  # not 600: tokenizer.json counts
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ["a  <|im_start|> fox<|im_end|>", "quick foxes"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert "<|im_start|>" in ours.control_tokens and "fox" not in ours.control_tokens


def test_a_token_that_added_tokens_json_lists_too_is_still_written_into_answers(
    tmp_path: Path,
) -> None:
    """The older file has no marks: a plain token such as <think> would vanish from answers."""
    folder = hf_folder(tmp_path / "m", {"eos_token": "<|im_end|>"})
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "added_tokens.json").write_text(json.dumps({"<think>": backend.get_vocab_size() - 1}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("<think>fox")) == "<think>fox"


@pytest.mark.parametrize("named_in", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("main_file", ["tokenizer.json", "tokenizer.model"])
def test_words_that_added_tokens_json_alone_lists_vanish_from_answers(
    tmp_path: Path, named_in: str, main_file: str
) -> None:
    """The file does not say which tokens are structure: others name those, as for transformers."""
    if main_file == "tokenizer.model":
        size = train_sentencepiece(tmp_path / "m", **LLAMA_STYLE).get_piece_size()
    else:
        size = trained_bpe(digits_split()).get_vocab_size()
    words = ["<tool>", "<|a|>", "<|b|>", "<|end|>"]
    special = {
        "eos_token": "<|end|>",
        "additional_special_tokens": ["<|a|>"],
        "extra_special_tokens": {"b_token": "<|b|>"},
    }
    files = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    files[named_in] = {**files.get(named_in, {}), **special}
    files["added_tokens"] = {text: i for i, text in enumerate(words, size)}
    if main_file == "tokenizer.json":
        hf_folder(tmp_path / "m", {})
    for name, value in files.items():
        (tmp_path / "m" / f"{name}.json").write_text(json.dumps(value))
    tokenizer = Tokenizer.load(tmp_path / "m")
    ids = tokenizer.encode("<|a|>fox<tool>fox<|b|><|end|>")
    assert tokenizer.decode(ids).replace(" ", "") == "fox<tool>fox"
    assert set(words) - set(tokenizer.control_tokens) == {"<tool>"}


def test_added_tokens_that_do_not_fit_tokenizer_json_are_refused(tmp_path: Path) -> None:
    size = trained_bpe(digits_split()).get_vocab_size()
    folder = hf_folder(tmp_path / "m", **added("tokenizer_config.json", {"<|end|>": size + 7}))
    with pytest.raises(HumpbackError, match=rf"<\|end\|>.*{size + 7}.*do not belong together"):
        Tokenizer.load(folder)
    for wrong in ({"x": {"content": "<|end|>"}}, {"500": 5}, ["<|end|>"], {"500": {"id": 1}}):
        folder = hf_folder(tmp_path / "m", {"eos_token": "a", "added_tokens_decoder": wrong})
        with pytest.raises(HumpbackError, match=r"tokenizer_config\.json: the added tokens"):
            Tokenizer.load(folder)


# --- sentencepiece ---


@pytest.mark.parametrize(
    "options",
    [
        LLAMA_STYLE,
        {"model_type": "bpe"},
        {"model_type": "unigram", "byte_fallback": True},
        {"model_type": "unigram", "normalization_rule_name": "identity", "add_dummy_prefix": False},
    ],
    ids=["llama", "bpe-nfkc", "unigram-nfkc", "unigram-identity"],
)
def test_tokenizer_model_gives_the_ids_of_sentencepiece(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    reference = train_sentencepiece(tmp_path / "m", **options)
    tokenizer = Tokenizer.load(tmp_path / "m")
    for text in varied_texts():
        ours, theirs = tokenizer.encode(text), reference.encode(text)
        if options["model_type"] == "unigram":  # runs of a letter have several best cuts
            scores = [[reference.get_score(i) for i in ids] for ids in (ours, theirs)]
            assert sum(scores[0]) == pytest.approx(sum(scores[1]))
        else:
            assert ours == theirs
    if options.get("byte_fallback"):  # without it, unknown characters are lost in both
        for text in varied_texts():
            assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(
                reference.encode(text)
            )


def test_sentencepiece_specials_and_prefix_space_follow_the_folders_settings(
    tmp_path: Path,
) -> None:
    train_sentencepiece(tmp_path / "m", **LLAMA_STYLE)
    tokenizer = Tokenizer.load(tmp_path / "m")
    assert tokenizer.special_tokens["bos_token"] == "<s>" and tokenizer.eos_ids == (2,)
    assert tokenizer.add_bos
    assert tokenizer.encode("<s>fox") == [1, *tokenizer.encode("fox")]
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"legacy": false}')
    modern = Tokenizer.load(tmp_path / "m")
    assert modern.encode("fox") == tokenizer.encode("fox")
    assert modern.encode("<s>fox") != tokenizer.encode("<s>fox")


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_the_first_word_behind_bos_has_other_tokens_than_in_pretraining(
    tmp_path: Path, kind: str
) -> None:
    """Some vocabularies have a space before the beginning of a text, and none behind BOS."""
    transformers = pytest.importorskip("transformers")
    train_sentencepiece(tmp_path / "sp", **LLAMA_STYLE)
    (tmp_path / "sp" / "tokenizer_config.json").write_text('{"legacy": false}')
    tokenizer = Tokenizer.load(tmp_path / "sp")
    tokenizer.save(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    if kind == "tokenizer.json":
        tokenizer = Tokenizer.load(tmp_path / "hf")
    template = Template.for_tokenizer(tokenizer)
    for text in ["The quick fox", "123", "é"]:
        row = tokenize_example(tokenizer, template.plain_text(text), None, "error", "row")
        assert isinstance(row, TokenizedExample)
        assert row.ids.tolist() == [*theirs.encode(text), tokenizer.eos_ids[0]]
        assert row.mask.tolist() == [False] + [True] * (len(row.ids) - 1)
    messages = [{"role": "user", "content": "fox"}]
    prompt = template.forward_prompt(messages)
    assert tokenizer.encode(prompt) == theirs.encode(prompt.removeprefix("<s>").lstrip(" "))


def test_tokens_added_beside_tokenizer_model_get_their_ids(tmp_path: Path) -> None:
    reference = train_sentencepiece(tmp_path / "m", **LLAMA_STYLE)
    size = reference.get_piece_size()
    config = {"added_tokens_decoder": {str(size): {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path / "m").encode("<|im_end|>") == [size]
    config = {"added_tokens_decoder": {str(size + 7): {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(HumpbackError, match="do not belong together"):
        Tokenizer.load(tmp_path / "m")


@pytest.mark.parametrize("kind", ["tokenizer.json", "named alone", "tokenizer.model"])
def test_special_tokens_marked_as_normalized_are_not_cut_into_letters(
    tmp_path: Path, kind: str
) -> None:
    """Early LLaMA folders mark them so. Behind a text, EOS would not be what ends the answer."""
    folder = tmp_path / "sp"
    train_sentencepiece(folder, **LLAMA_STYLE)
    if kind != "tokenizer.model":
        folder = tmp_path / "hf"
        Tokenizer.load(tmp_path / "sp").save(folder)
        raw = json.loads((folder / "tokenizer.json").read_text())
        for token in raw["added_tokens"]:
            token["normalized"] = True
            token["special"] = kind == "tokenizer.json"  # else tokenizer_config.json names them
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    else:
        added = {
            str(i): {"content": text, "normalized": True, "special": True}
            for i, text in enumerate(["<unk>", "<s>", "</s>"])
        }
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("<s>fox</s><s>fox</s>")
    assert ids[: len(ids) // 2] == ids[len(ids) // 2 :]
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_ids[0])


def test_unreadable_tokenizer_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # the tiktoken form
    with pytest.raises(HumpbackError, match=r"tokenizer\.model"):
        Tokenizer.load(tmp_path)


# --- identity ---


def test_content_hash_changes_with_template_vocabulary_and_stopping(tmp_path: Path) -> None:
    base = hf_folder(tmp_path / "a", {"eos_token": "<|im_end|>"})
    eos = hf_folder(tmp_path / "b", {"eos_token": "<|endoftext|>"})
    more = hf_folder(
        tmp_path / "c", {"eos_token": "<|im_end|>"}, generation_config={"eos_token_id": [2, 0]}
    )
    tokenizers_ = [Tokenizer.load(folder) for folder in (base, eos, more)]
    tokenizers_.append(tokenizers_[0].with_chat_template("x"))
    extended = Tokenizer.load(base)
    extended.backend.add_tokens([AddedToken("<new>")])
    assert len({t.content_hash() for t in [*tokenizers_, extended]}) == 5


def padded(text: str = "<pad>", **changes: Any) -> Tokenizer:
    """The byte tokenizer with a special token that was added for batches; ids end at 258."""
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer().backend.to_str())
    backend.add_special_tokens([text])
    named = {**byte_tokenizer().special_tokens, "pad_token": text, **changes.pop("named", {})}
    return Tokenizer(backend, named, chat_template=CHAT_TEMPLATE, **changes)


def test_a_model_is_refused_for_a_padding_token_that_it_never_sees(tmp_path: Path) -> None:
    tokenizer = within_vocabulary(padded(), 259)
    assert tokenizer.pad_id == tokenizer.eos_ids[0]
    assert max(tokenizer.encode("a<pad>b")) < 256 and "<pad>" not in tokenizer.control_tokens
    assert within_vocabulary(padded(), 260).pad_id == 259
    tokenizer.save(tmp_path)
    assert all(b"<pad>" not in file.read_bytes() for file in tmp_path.iterdir())
    assert Tokenizer.load(tmp_path).content_hash() == tokenizer.content_hash()


def test_a_token_that_prompts_or_answers_need_is_dropped_for_want_of_a_row() -> None:
    for tokenizer in (
        padded("<end>", extra_eos_ids=[259]),
        padded("<begin>", named={"bos_token": "<begin>"}),
        padded("<pad>").with_chat_template("{{ pad_token }}" + CHAT_TEMPLATE),
        padded("<turn>").with_chat_template("<turn>" + CHAT_TEMPLATE),
    ):
        with pytest.raises(HumpbackError, match="id 259, which texts or the chat template"):
            within_vocabulary(tokenizer, 259)
    plain = byte_tokenizer()
    plain.backend.add_tokens([AddedToken("word")])
    with pytest.raises(HumpbackError, match="'word' with id 259"):
        within_vocabulary(plain, 259)


def test_token_beyond_the_models_vocabulary_is_refused_before_training() -> None:
    tokenizer = byte_tokenizer()
    within_vocabulary(tokenizer, 259)
    within_vocabulary(tokenizer, 512)
    with pytest.raises(HumpbackError, match="258"):
        within_vocabulary(tokenizer, 258)
