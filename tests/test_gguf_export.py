"""Models as GGUF files: what their users lose if these fail."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from gguf import GGUFReader, GGUFWriter
from text_samples import (
    LINES,
    LLAMA_STYLE,
    digits_split,
    gpt2_split,
    train_sentencepiece,
    trained_bpe,
    varied_texts,
)
from text_styles import STYLES
from tiny_llama import logits_function, whole_rows
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from humpback_jax.cli import main
from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import flatten, init_params
from humpback_jax.models import LanguageModel, export_gguf, load_model, save_checkpoint
from humpback_jax.text.byte_tokenizer import CHAT_TEMPLATE
from humpback_jax.text.chat import render_chat
from humpback_jax.text.template import Tags, Template
from humpback_jax.text.tokenizer import Tokenizer
from humpback_jax.weights.gguf_io import load_gguf

USER = [{"role": "user", "content": "Who jumps over 12345 dogs?"}]
SHAPE = LlamaConfig(
    vocab_size=0,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
FAMILY: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide heads": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_theta": 500000.0, "rope_type": "llama3", "rope_scaling": LLAMA3},
    "linear": {"rope_type": "linear", "rope_scaling": {"factor": 2.5}},
    "yarn": {"rope_type": "yarn", "rope_scaling": YARN},
}


def config_of(tokenizer: Tokenizer, **changes: Any) -> LlamaConfig:
    scaling = tuple(sorted(changes.pop("rope_scaling", {}).items()))
    own = {"bos_token_id": tokenizer.bos_id, "eos_token_ids": tokenizer.eos_ids}
    size = tokenizer.vocab_size + 3  # rows of no token, as in many published models
    return dataclasses.replace(SHAPE, vocab_size=size, rope_scaling=scaling, **own, **changes)


def model_of(tokenizer: Tokenizer, tags: Tags = "none", **changes: Any) -> LanguageModel:
    config = config_of(tokenizer, **changes)
    params = init_params(config, jax.random.key(0), "float32")
    # Zero biases and unit norms would hide that they are lost or mixed up.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    return LanguageModel("m", config, params, tokenizer, Template.for_tokenizer(tokenizer), tags)


def byte_level(
    split: Callable[[], pre_tokenizers.PreTokenizer] = digits_split,
    ignore_merges: bool = False,
    chat_template: str = CHAT_TEMPLATE,
) -> Tokenizer:
    state = json.loads(trained_bpe(split()).to_str())
    state["model"]["ignore_merges"] = ignore_merges
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return Tokenizer(backend, special, add_bos=ignore_merges, chat_template=chat_template)


def sentencepiece(folder: Path, **options: Any) -> Tokenizer:
    train_sentencepiece(folder, **LLAMA_STYLE | options)
    return Tokenizer.load(folder).with_chat_template(STYLES["llama2"][0])


def isolated(expression: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([cut, last])


def words(digits: str) -> pre_tokenizers.PreTokenizer:
    return isolated(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def same_tokens(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        assert theirs(text) == ours.encode(text), text


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in FAMILY), ("biases", "bfloat16"), ("biases", "float16")],
)
def test_weights_change_on_their_way_through_a_gguf_file(tmp_path, name, dtype) -> None:
    model = model_of(byte_level(), **FAMILY[name])
    assert export_gguf(tmp_path / "m.gguf", model, None if dtype == "float32" else dtype) == []
    config, params = load_gguf(tmp_path / "m.gguf")
    assert config == model.config
    ours, theirs = flatten(model.params), flatten(params)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        layer = leaf.ndim - (path[0] == "layers")
        expected = np.asarray(leaf if layer == 1 else leaf.astype(dtype), np.float32)
        np.testing.assert_array_equal(theirs[path], expected, err_msg=str(path))


# Its reader knows no biases of a llama, no position scaling and no heads of another width.
@pytest.mark.parametrize("name", ["plain", "tied"])
def test_transformers_computes_another_model_from_an_exported_gguf_file(tmp_path, name) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = model_of(byte_level(), **FAMILY[name])
    export_gguf(tmp_path / "m.gguf", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 40))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = logits_function(model.config)(model.params, *whole_rows(tokens))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("pre", "split", "ignore_merges"),
    [
        ("gpt-2", gpt2_split, False),
        ("smollm", digits_split, False),
        ("llama-bpe", lambda: words(r"\p{N}{1,3}"), True),
        ("qwen2", lambda: words(r"\p{N}"), False),
    ],
)
def test_text_has_other_tokens_in_the_exported_file(tmp_path, pre, split, ignore_merges) -> None:
    tokenizer = byte_level(split, ignore_merges)
    export_gguf(tmp_path / "m.gguf", model_of(tokenizer))
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    written = Tokenizer.from_gguf(tmp_path / "m.gguf")
    same_tokens(tokenizer, written.encode, [*varied_texts(), "a<|im_end|>\nb<|im_start|> c"])
    assert written.eos_ids == tokenizer.eos_ids and written.special_tokens["bos_token"]
    assert written.add_bos == ignore_merges


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_llama2s_vocabulary_is_joined_in_another_order(tmp_path, file) -> None:
    tokenizer = sentencepiece(tmp_path / "m")
    if file == "tokenizer.json":  # which has merges, and no scores
        tokenizer.save(tmp_path / "json")
        (tmp_path / "json" / "tokenizer.model").unlink()
        tokenizer = Tokenizer.load(tmp_path / "json")
    assert export_gguf(tmp_path / "m.gguf", model_of(tokenizer)) == []
    written = Tokenizer.from_gguf(tmp_path / "m.gguf")
    same_tokens(tokenizer, written.encode, [*varied_texts(), "<s>a</s> b</s>c", "<0x41>"])
    assert written.add_bos and written.eos_texts == ("</s>",)


def test_a_vocabulary_without_a_space_before_texts_gets_one(tmp_path) -> None:
    """Yi's is such a vocabulary."""
    tokenizer = sentencepiece(tmp_path / "m", add_dummy_prefix=False)
    assert export_gguf(tmp_path / "m.gguf", model_of(tokenizer)) == []
    same_tokens(tokenizer, Tokenizer.from_gguf(tmp_path / "m.gguf").encode, varied_texts())


def test_prompts_have_other_tokens_where_only_the_first_text_has_a_space_before_it(
    tmp_path,
) -> None:
    """No field of a GGUF file says it, so that prompts are kept, and a note tells of the rest."""
    tokenizer = sentencepiece(tmp_path / "m")
    tokenizer.backend.normalizer = normalizers.Replace(" ", "▁")
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.backend.pre_tokenizer = metaspace
    model = model_of(tokenizer)
    (note,) = export_gguf(tmp_path / "m.gguf", model)
    assert "begins without a special token" in note
    prompt = model.template.forward_prompt(USER, "none")
    assert prompt.startswith("<s>")
    same_tokens(tokenizer, Tokenizer.from_gguf(tmp_path / "m.gguf").encode, [prompt])
    tokenizer = tokenizer.with_chat_template(STYLES["zephyr"][0])  # leaves BOS to us
    model = model_of(tokenizer, tags="S_a")
    export_gguf(tmp_path / "m.gguf", model)
    back = load_model(str(tmp_path / "m.gguf"))
    prompt = model.template.forward_prompt(USER, "none")
    assert back.template.forward_prompt(USER, "none") == prompt
    same_tokens(tokenizer, back.tokenizer.encode, [prompt])


def test_a_chat_in_llama_cpp_loses_the_tags_or_ends_late(tmp_path) -> None:
    model = model_of(byte_level(), tags="both")
    config = dataclasses.replace(model.config, eos_token_ids=(2, 0, 40))
    export_gguf(tmp_path / "m.gguf", dataclasses.replace(model, config=config))
    written = Tokenizer.from_gguf(tmp_path / "m.gguf")
    assert written.eos_ids == (2, 0, 40)
    by_itself = Template.for_tokenizer(written).forward_prompt(USER, "none")
    assert by_itself == model.template.forward_prompt(USER, "both")
    (note,) = export_gguf(tmp_path / "m.gguf", model)
    assert "--jinja" in note
    many = dataclasses.replace(config, eos_token_ids=(2, 0, 40, 41, 42))
    with pytest.raises(HumpbackError, match="three ends of answers"):
        export_gguf(tmp_path / "m.gguf", dataclasses.replace(model, config=many))


def test_tags_stay_in_the_chat_template_of_a_gguf_file_that_comes_back(tmp_path) -> None:
    nameless = {"chat_template": "{{ bos_token }}" + CHAT_TEMPLATE}
    without_bos = Tokenizer(byte_level().backend, {"eos_token": "<|im_end|>"}, **nameless)
    for tokenizer in (byte_level(), without_bos):
        model = model_of(tokenizer, tags="both")
        export_gguf(tmp_path / "m.gguf", model)
        back = load_model(str(tmp_path / "m.gguf"))
        assert (back.tags, back.template) == ("both", model.template)


def test_answers_run_on_behind_an_end_of_turn_that_llama_cpp_does_not_know(tmp_path) -> None:
    """<|im_end|> it knows by its text, OpenChat's <|end_of_turn|> only by a field."""
    tokenizer = byte_level()
    tokenizer.backend.add_special_tokens(["<|end_of_turn|>"])
    end = tokenizer.id_of("<|end_of_turn|>")
    tokenizer = Tokenizer(
        tokenizer.backend, {"eos_token": "<|endoftext|>"}, extra_eos_ids=[2, end]
    ).with_chat_template(CHAT_TEMPLATE)
    export_gguf(tmp_path / "m.gguf", model_of(tokenizer))
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end
    assert "tokenizer.ggml.eom_token_id" not in fields
    assert set(Tokenizer.from_gguf(tmp_path / "m.gguf").eos_ids) == {0, 2, end}


def test_a_chat_without_bos_begins_with_some_other_token(tmp_path) -> None:
    """llama.cpp takes token 11 for BOS where a file of this kind names none."""
    tokenizer = Tokenizer(
        byte_level().backend,
        {"eos_token": "<|im_end|>"},
        chat_template="{{ bos_token }}" + CHAT_TEMPLATE,
    )
    export_gguf(tmp_path / "m.gguf", model_of(tokenizer))
    template = GGUFReader(tmp_path / "m.gguf").fields["tokenizer.chat_template"].contents()
    rendered = render_chat(template, USER, {"bos_token": "<wrong>"}, True)
    assert rendered == model_of(tokenizer).template.forward_prompt(USER, "none")


def test_a_models_name_or_a_filler_token_keeps_it_from_loading(tmp_path) -> None:
    """llama.cpp takes names with phi-3 for Phi 3, whose tokens it then misses; no text is twice."""
    tokenizer = byte_level()
    tokenizer.backend.add_special_tokens([f"[PAD{tokenizer.vocab_size + 2}]"])
    model = dataclasses.replace(model_of(tokenizer), name="runs/my-Phi-3-data")
    export_gguf(tmp_path / "m.gguf", model)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.name"].contents() == "my-Phi_3-data"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == len(tokens) == model.config.vocab_size


def test_text_that_only_we_normalise_is_exported_without_a_word(tmp_path) -> None:
    tokenizer = byte_level()
    tokenizer.backend.normalizer = normalizers.NFC()
    (note,) = export_gguf(tmp_path / "m.gguf", model_of(tokenizer))
    assert "NFC" in note


def test_a_tokenizer_that_llama_cpp_cannot_follow_is_written_all_the_same(tmp_path) -> None:
    odd = byte_level(lambda: isolated(r"\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]+"))
    unigram = sentencepiece(tmp_path / "u", model_type="unigram")
    folding = sentencepiece(tmp_path / "n", normalization_rule_name="nmt_nfkc")
    stripping, added = byte_level(), sentencepiece(tmp_path / "a")
    stripping.backend.add_special_tokens([AddedToken("<|user|>", rstrip=True, special=True)])
    added.backend.add_tokens([AddedToken("<|im_start|>", special=False, normalized=True)])
    cases = [
        ("no rules known here", odd),
        ("Unigram", unigram),
        ("no rules known here.*example", folding),
        (r"no rules known here.*example to .<\|user\|>", stripping),
        (r"no rules known here.*example to .<\|im_start\|>", added),
    ]
    for message, tokenizer in cases:
        with pytest.raises(HumpbackError, match=f"(?s){message}") as caught:
            export_gguf(tmp_path / "m.gguf", model_of(tokenizer))
        assert "--format=hf" in str(caught.value)
    with pytest.raises(HumpbackError, match="BPE with 0 merges"):
        export_gguf(tmp_path / "m.gguf", load_model("tiny-random"))
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    "scaling",
    [
        ("dynamic", {"factor": 2.0}),
        ("yarn", YARN | {"attention_factor": 0.7}),
        ("yarn", YARN | {"mscale": 0.8, "mscale_all_dim": 1.2}),
        ("yarn", YARN | {"beta_fast": 16.0}),
        ("yarn", YARN | {"beta_slow": 2.0}),
        ("yarn", YARN | {"truncate": False}),
    ],
)
def test_position_scaling_that_llama_cpp_lacks_is_dropped(tmp_path, scaling) -> None:
    kind, parameters = scaling
    model = model_of(byte_level(), rope_type=kind, rope_scaling=parameters)
    with pytest.raises(HumpbackError, match=f"'{kind}'.*--format=hf"):
        export_gguf(tmp_path / "m.gguf", model)


def test_a_yarn_model_that_states_what_is_so_anyway_is_refused(tmp_path) -> None:
    stated = {"attention_factor": 0.1 * math.log(4) + 1, "beta_fast": 32, "truncate": True}
    model = model_of(byte_level(), rope_type="yarn", rope_scaling=YARN | stated)
    export_gguf(tmp_path / "m.gguf", model)
    assert load_gguf(tmp_path / "m.gguf")[0].rope_parameters == YARN


def test_an_export_that_fails_midway_destroys_the_file_it_replaces(tmp_path, monkeypatch) -> None:
    model = model_of(byte_level())
    export_gguf(tmp_path / "m.gguf", model)
    before = (tmp_path / "m.gguf").read_bytes()
    write = GGUFWriter.write_tensor_data

    def fail(self: Any, tensor: np.ndarray) -> None:
        if tensor.ndim == 1:
            raise OSError("No space left on device")
        write(self, tensor)

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(OSError, match="No space"):
        export_gguf(tmp_path / "m.gguf", model, "float16")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_the_exported_file_answers_otherwise_than_the_model(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    save_checkpoint(tmp_path / "tuned", model_of(byte_level()), {})
    out = tmp_path / "out"
    export = ["export", f"--model={tmp_path / 'tuned'}", "--format=gguf", "--json"]
    assert main([*export, f"--out={out}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == str(out / "model.gguf")
    assert main([*export, f"--out={out / 'named.gguf'}"]) == 0
    (out / "folder.gguf").mkdir()
    assert main([*export, f"--out={out / 'folder.gguf'}"]) == 0
    assert (out / "folder.gguf" / "model.gguf").is_file()
    capsys.readouterr()
    answers = []
    for model in (tmp_path / "tuned", out / "model.gguf", out / "named.gguf"):
        rows = tmp_path / "rows.jsonl"
        arguments = [f"--model={model}", f"--out={rows}", "--prompt=Who?", "--max-tokens=12"]
        assert main(["sample", *arguments, "--temperature=0"]) == 0
        answers.append(json.loads(rows.read_text())["output"])
        rows.unlink()
    assert answers[0] and len(set(answers)) == 1
    wrong = ["export", "--model=tiny-random", f"--out={out / 'm.gguf'}"]
    assert main(wrong) == 1
    assert "--format=gguf" in capsys.readouterr().err


def test_llama_cpp_reads_another_model_than_we_wrote(tmp_path) -> None:
    """The program itself: the same tokens, and the same logits, for every kind of model."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    made = {
        "digits": (byte_level(), {}),
        "llama 3": (byte_level(lambda: words(r"\p{N}{1,3}"), True), FAMILY["llama3"]),
        "llama 2": (sentencepiece(tmp_path / "sp"), {}),
        "yi": (sentencepiece(tmp_path / "yi", add_dummy_prefix=False), FAMILY["tied"]),
        **{name: (byte_level(), FAMILY[name]) for name in ("biases", "linear", "yarn")},
    }
    for name, (tokenizer, changes) in made.items():
        model = model_of(tokenizer, **changes)
        path = tmp_path / f"{name}.gguf"
        export_gguf(path, model)
        theirs = llama_cpp.Llama(
            str(path),
            n_ctx=256,
            n_batch=256,
            n_threads=1,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            logits_all=True,
            verbose=False,
        )

        def tokens_of(text: str, theirs: Any = theirs) -> list[int]:
            return list(theirs.tokenize(text.encode(), add_bos=False, special=True))

        prompt = model.template.forward_prompt(USER, "none")
        same_tokens(tokenizer, tokens_of, [prompt, *LINES, *varied_texts()[::20]])
        tokens = np.array([tokenizer.encode(" ".join(LINES))[:150]])
        theirs.eval(tokens[0].tolist())
        ours = np.asarray(logits_function(model.config)(model.params, *whole_rows(tokens)))[0]
        np.testing.assert_allclose(theirs.scores[: tokens.size], ours, rtol=0, atol=1e-3)
        theirs.close()


@pytest.mark.real_model
def test_the_default_model_is_another_after_export(tmp_path) -> None:
    model = load_model("smollm2-135m-instruct")
    assert export_gguf(tmp_path / "m.gguf", model) == []
    again = load_model(str(tmp_path / "m.gguf"))
    assert again.config == model.config
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], leaf, err_msg=str(path))
    same_tokens(model.tokenizer, again.tokenizer.encode, varied_texts())
    prompt = model.template.forward_prompt(USER, "none")
    assert again.template.forward_prompt(USER, "none") == prompt
