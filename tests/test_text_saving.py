"""Saved tokenizers: the same ids here, in transformers, and in what converters make of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from test_text_tokenizer import hf_folder
from text_samples import LINES, LLAMA_STYLE, train_sentencepiece, varied_texts

from humpback_jax.model.llama import init_params
from humpback_jax.models import LanguageModel, export_hf, load_model, save_checkpoint
from humpback_jax.text.byte_tokenizer import byte_tokenizer
from humpback_jax.text.template import Template
from humpback_jax.text.tokenizer import Tokenizer


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
    settings = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    assert settings["add_bos_token"] == tokenizer.add_bos  # what converters to GGUF go by
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


def test_generate_refuses_what_the_saved_tokenizer_gives_or_reads_padding_for_text(
    tmp_path: Path,
) -> None:
    """Some versions add token_type_ids, which no LLaMA takes; answers come behind the last id."""
    transformers = pytest.importorskip("transformers")
    config = {"eos_token": "<|im_end|>", "model_max_length": 5}
    tokenizer = Tokenizer.load(hf_folder(tmp_path / "m", config)).with_chat_template("x")
    tokenizer.save(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8"))
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs.pad_token = theirs.eos_token
    batch = theirs(["fox", "The quick brown fox jumps over it"], padding=True, truncation=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert [len(mask) for mask in batch["attention_mask"]] == [5, 5]
    assert (batch["attention_mask"][0][0], batch["attention_mask"][0][-1]) == (0, 1)


def test_saving_keeps_sampling_defaults_that_stand_in_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 5}')
    byte_tokenizer().save(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["temperature"] == 0.7 and saved["eos_token_id"] == [258]


@pytest.mark.parametrize("source", ["tokenizer.model", "tokenizer.json"])
def test_exported_llama2_model_becomes_a_gguf_file_with_its_own_merges(
    tmp_path: Path, source: str
) -> None:
    """llama.cpp's converter takes the scores of merges from tokenizer.model, else makes them up."""
    folder, out = tmp_path / "m", tmp_path / "out"
    reference = train_sentencepiece(folder, **LLAMA_STYLE)
    original = (folder / "tokenizer.model").read_bytes()
    if source == "tokenizer.json":  # most folders have both
        Tokenizer.load(folder).save(folder)
        (folder / "tokenizer.model").write_bytes(original)
    tokenizer = Tokenizer.load(folder)
    model = load_model("tiny-random")
    config = dataclasses.replace(model.config, vocab_size=tokenizer.vocab_size)
    params = init_params(config, jax.random.key(0), "float32")
    template = Template.for_tokenizer(tokenizer)
    save_checkpoint(tmp_path / "tuned", LanguageModel("m", config, params, tokenizer, template), {})
    export_hf(out, load_model(str(tmp_path / "tuned")))
    assert (out / "tokenizer.model").read_bytes() == original
    exported = Tokenizer.load(out)
    for text in varied_texts():
        assert exported.encode(text) == reference.encode(text)


def test_exported_tokenizer_model_does_not_lose_marks_that_stand_beside_it(tmp_path: Path) -> None:
    """Yi's <|im_end|> is plain text in tokenizer.model; converters read the config for its mark."""
    transformers = pytest.importorskip("transformers")
    train_sentencepiece(tmp_path / "m", **LLAMA_STYLE, user_defined_symbols=["<|im_end|>"])
    marked = {"added_tokens_decoder": {"3": {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(marked))
    tokenizer = Tokenizer.load(tmp_path / "m")
    tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").exists()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    kept = {i: token["content"] for i, token in config["added_tokens_decoder"].items()}
    assert kept == {"0": "<unk>", "1": "<s>", "2": "</s>", "3": "<|im_end|>"}
    assert all(token["special"] for token in config["added_tokens_decoder"].values())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ["fox<|im_end|> fox</s>fox", *LINES]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert Tokenizer.load(tmp_path / "out").content_hash() == tokenizer.content_hash()


def test_llama_cpps_converter_makes_merges_up_for_a_model_with_added_tokens(
    tmp_path: Path,
) -> None:
    """It takes such tokens from the config, and the scores of all others from tokenizer.model."""
    size = train_sentencepiece(tmp_path / "m", **LLAMA_STYLE).get_piece_size()
    original = (tmp_path / "m" / "tokenizer.model").read_bytes()
    added = {"<|im_start|>": size, "<|im_end|>": size + 1}
    (tmp_path / "m" / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.load(tmp_path / "m")
    tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == original
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    marked = {token["content"]: int(i) for i, token in config["added_tokens_decoder"].items()}
    assert marked == {"<unk>": 0, "<s>": 1, "</s>": 2, **added}
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for again in (Tokenizer.load(tmp_path / "out").encode, theirs.encode):
        assert again("<|im_start|>fox<|im_end|>")[-1] == size + 1
    assert Tokenizer.load(tmp_path / "out").content_hash() == tokenizer.content_hash()


@pytest.mark.parametrize("case", ["more words", "another vocabulary", "unigram", "damaged"])
def test_tokenizer_model_that_says_other_than_tokenizer_json_is_not_exported(
    tmp_path: Path, case: str
) -> None:
    style = {"model_type": "unigram"} if case == "unigram" else LLAMA_STYLE
    reference = train_sentencepiece(tmp_path / "m", **style)
    if case == "more words":
        original = (tmp_path / "m" / "tokenizer.model").read_bytes()
        Tokenizer.load(tmp_path / "m").save(tmp_path / "m")
        (tmp_path / "m" / "tokenizer.model").write_bytes(original)
        raw = json.loads((tmp_path / "m" / "tokenizer.json").read_text("utf-8"))
        raw["model"]["vocab"]["jumping"] = reference.get_piece_size()
        (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(raw))
    elif case == "another vocabulary":
        hf_folder(tmp_path / "m", {"eos_token": "<|im_end|>"})
    elif case == "damaged":
        hf_folder(tmp_path / "m", {"eos_token": "<|im_end|>"})
        (tmp_path / "m" / "tokenizer.model").write_bytes(b"version https://git-lfs")
    Tokenizer.load(tmp_path / "m").save(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "added_tokens_decoder" not in config


def test_files_of_another_tokenizer_do_not_shadow_the_one_exported_over_it(tmp_path: Path) -> None:
    """Clients prefer some files to those that we write: an old template, or old tokens."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "chat_template.jinja").write_text("old")
    (tmp_path / "added_tokens.json").write_text('{"ab": 300}')
    (tmp_path / "tokenizer.model").write_bytes(b"old")
    tokenizer = byte_tokenizer().with_chat_template("new")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == Tokenizer.load(tmp_path).chat_template == "new"
    assert theirs.encode("xaby", add_special_tokens=False) == tokenizer.encode("xaby")
    assert not (tmp_path / "tokenizer.model").exists()
