"""Tokenizers: the ids, offsets and special tokens must be those the model was trained with."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from humpback_jax.errors import HumpbackError
from humpback_jax.text.byte_tokenizer import byte_tokenizer
from humpback_jax.text.tokenizer import Tokenizer, check_vocab

LINES = [
    "The quick brown fox doesn't jump over 12345 lazy dogs, does it?",
    "def add(a, b):\n    return a + b  # sums 10 numbers",
    "Zürich, naïve café: l'été 2024 — 日本語のテキスト 😀👩‍👩‍👧",
    "   leading and trailing   ",
    "tabs\tand\r\nnew lines\n\n\nand {braces} <tags/> [INST] | pipes",
    "I'LL SHOUT, they've said 3.14159 or 1,000,000",
    "",
    " ",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def varied_texts() -> list[str]:
    draw = random.Random(0)
    alphabet = " aab\né😀ct1.,'"
    noise = ["".join(draw.choice(alphabet) for _ in range(draw.randint(1, 50))) for _ in range(800)]
    spaces = ["".join(draw.choice("ab ") for _ in range(draw.randint(1, 30))) for _ in range(400)]
    return LINES + noise + spaces


def trained_bpe(pre: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES * 3, trainer)
    return backend


def gpt2_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def digits_split() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, gpt2_split()])


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


def gguf_of(path: Path, backend: tokenizers.Tokenizer, pre: str, **fields: Any) -> Path:
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return write_gguf(
        path,
        model="gpt2",
        pre=pre,
        tokens=tokens,
        token_type=[3 if token in SPECIALS else 1 for token in tokens],
        merges=[" ".join(merge) for merge in model["merges"]],
        bos_token_id=tokens.index("<|endoftext|>"),
        eos_token_id=tokens.index("<|im_end|>"),
        **fields,
    )


def train_sentencepiece(folder: Path, **options: Any) -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in LINES if line.strip()] * 4 + ["aa  ab   aaaa"]),
        model_writer=buffer,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


LLAMA_STYLE = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}


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


def test_unreadable_tokenizer_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # the tiktoken form
    with pytest.raises(HumpbackError, match=r"tokenizer\.model"):
        Tokenizer.load(tmp_path)


# --- GGUF ---


@pytest.mark.parametrize(
    ("pre", "split"),
    [
        ("smollm", digits_split),
        ("gpt-2", gpt2_split),
        ("default", gpt2_split),
        ("llama-bpe", llama3_split),
    ],
)
def test_gguf_byte_level_gives_the_ids_of_the_original(
    tmp_path: Path, pre: str, split: Any
) -> None:
    original = trained_bpe(split())
    original.model.ignore_merges = pre == "llama-bpe"
    path = gguf_of(tmp_path / "m.gguf", original, pre)
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
    path = gguf_of(tmp_path / "m.gguf", trained_bpe(gpt2_split()), "brand-new-pre")
    with pytest.raises(HumpbackError, match="brand-new-pre"):
        Tokenizer.from_gguf(path)


def test_unknown_gguf_tokenizer_kind_and_broken_files_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model="rwkv", tokens=["a"])
    with pytest.raises(HumpbackError, match="rwkv"):
        Tokenizer.from_gguf(path)
    bare = write_gguf(tmp_path / "bare.gguf", model="gpt2", tokens=["a"])
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


# --- saving ---


def saved_sources(tmp_path: Path) -> dict[str, Tokenizer]:
    train_sentencepiece(tmp_path / "llama", **LLAMA_STYLE)
    train_sentencepiece(tmp_path / "unigram", model_type="unigram")
    chat = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    config = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": chat}
    hf = hf_folder(tmp_path / "hf", config, generation_config={"eos_token_id": [2, 0]})
    return {
        "byte": byte_tokenizer(),
        "llama": Tokenizer.load(tmp_path / "llama"),
        "unigram": Tokenizer.load(tmp_path / "unigram"),
        "hf": Tokenizer.load(hf),
    }


@pytest.mark.parametrize("with_model_config", [False, True])
@pytest.mark.parametrize("source", ["byte", "llama", "unigram", "hf"])
def test_saved_tokenizer_loads_here_and_in_transformers_with_the_same_ids(
    tmp_path: Path, source: str, with_model_config: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = saved_sources(tmp_path)[source]
    out = tmp_path / "out"
    tokenizer.save(out)
    again = Tokenizer.load(out)
    assert again.content_hash() == tokenizer.content_hash()
    assert (again.eos_ids, again.pad_id) == (tokenizer.eos_ids, tokenizer.pad_id)
    if (
        with_model_config
    ):  # transformers then knows the model class and may prefer its own tokenizer
        (out / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in varied_texts():
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.encode("fox")[0] == (
        tokenizer.bos_id if tokenizer.add_bos else again.encode("fox")[0]
    )
    assert theirs.chat_template == tokenizer.chat_template
    assert theirs.eos_token_id == tokenizer.eos_ids[0]


def test_saving_keeps_sampling_defaults_that_stand_in_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 5}')
    byte_tokenizer().save(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["temperature"] == 0.7 and saved["eos_token_id"] == [258]


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


def test_token_beyond_the_models_vocabulary_is_refused_before_training() -> None:
    tokenizer = byte_tokenizer()
    check_vocab(tokenizer, 259)
    check_vocab(tokenizer, 512)
    with pytest.raises(HumpbackError, match="258"):
        check_vocab(tokenizer, 258)


# --- the embedded default model ---


def default_model_path() -> Path:
    from humpback_jax.weights import named

    return Path(named.resolve("smollm2-135m-instruct").path)


@pytest.mark.real_model
def test_default_model_tokenizer_is_smollm2s_own() -> None:
    tokenizer = Tokenizer.from_gguf(default_model_path())
    check_vocab(tokenizer, 49152)
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
