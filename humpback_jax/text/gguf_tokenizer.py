"""Tokenizer of a GGUF file, from its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from humpback_jax.errors import HumpbackError
from humpback_jax.text.sentencepiece_tokenizer import (
    CONTROL,
    USER_DEFINED,
    SentencePieceModel,
    sentencepiece_backend,
)
from humpback_jax.text.tokenizer import Tokenizer
from humpback_jax.weights.gguf_file import read_gguf_header
from humpback_jax.weights.gguf_special import special_ids

# How a byte-level vocabulary cuts text before merging, by `tokenizer.ggml.pre`. The expressions
# are facts of the models: GPT-2 cuts at words, numbers and punctuation; StarCoder's relatives cut
# each digit off first; Llama 3 and Qwen 2 have expressions of their own.
_GPT2 = ("gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion")
_DIGITS_GPT2 = (
    *("smollm", "starcoder", "refact", "command-r"),
    *("codeshell", "exaone", "minerva-7b"),
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "pixtral")
_QWEN2 = ("qwen2", "deepseek-r1-qwen", "stablelm2")
PRE_TOKENIZERS = tuple(names[0] for names in (_GPT2, _DIGITS_GPT2, _LLAMA3, _QWEN2))
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL

# What an export writes before a chat template that names BOS, of a model that has none: llama.cpp
# would hand it some other token's text. Clients drop the newline after a block.
EMPTY_BOS = "{%- set bos_token = '' %}\n"

# Two tokens of Llama 3 by their ids, which no other vocabulary has there.
_LLAMA3_TOKENS = {128000: "<|begin_of_text|>", 128009: "<|eot_id|>"}


def tokenizer_from_gguf(path: str | Path) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Raises:
      HumpbackError: not a GGUF file, no tokenizer in it, or a kind that is not known here.
    """
    return tokenizer_from_fields(read_gguf_header(path).metadata, str(path))


def tokenizer_from_fields(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """As `tokenizer_from_gguf`, of a file's metadata; `where` names them in errors."""
    kind = _need(fields, "tokenizer.ggml.model", where)
    tokens = _need(fields, "tokenizer.ggml.tokens", where)
    if kind == "llama":
        backend = _sentencepiece(fields, tokens, where)
        adds_bos = True
    elif kind == "gpt2":
        pre = _pre(fields, tokens, where)
        backend = _byte_level(fields, tokens, pre, where)
        adds_bos = pre in _LLAMA3
    else:
        raise HumpbackError(
            f"{where}: tokenizer.ggml.model={kind!r} is not supported (known: 'gpt2', 'llama'); "
            "use the model's Hugging Face folder."
        )
    special = special_ids(where, fields, len(tokens))
    named = {
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
        "unk_token": special.unknown,
    }
    return Tokenizer(
        backend,
        {name: tokens[i] for name, i in named.items() if i is not None},
        extra_eos_ids=special.ends,
        add_bos=fields.get("tokenizer.ggml.add_bos_token", adds_bos),
        chat_template=_chat_template(fields, special.bos),
        where=where,
    )


def _chat_template(fields: Mapping[str, Any], bos: int | None) -> str | None:
    source: str | None = fields.get("tokenizer.chat_template")
    return source.removeprefix(EMPTY_BOS) if source and bos is None else source


def _need(fields: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in fields:
        raise HumpbackError(
            f"{where}: the field {key!r} is missing, so the file holds no complete tokenizer; use "
            "another GGUF file or the model's Hugging Face folder."
        )
    return fields[key]


def _pre(fields: Mapping[str, Any], tokens: list[str], where: str) -> str:
    """How the file says that text is cut, or how a vocabulary is cut that is known for sure."""
    pre: str = fields.get("tokenizer.ggml.pre") or "missing"
    if pre not in ("missing", "default"):
        return pre
    if all(tokens[i : i + 1] == [token] for i, token in _LLAMA3_TOKENS.items()):
        return "llama-bpe"
    raise HumpbackError(
        f"{where}: tokenizer.ggml.pre is {pre}, as in files older than May 2024, so "
        "the file does not say how its model cuts text, and a guess would give wrong tokens "
        "without a sign of it. Convert the model again with llama.cpp of today, or use its "
        "Hugging Face folder."
    )


def _sentencepiece(
    fields: Mapping[str, Any], tokens: list[str], where: str
) -> tokenizers.Tokenizer:
    return sentencepiece_backend(
        SentencePieceModel(
            pieces=tokens,
            scores=_need(fields, "tokenizer.ggml.scores", where),
            types=_need(fields, "tokenizer.ggml.token_type", where),
            prefix_space=fields.get("tokenizer.ggml.add_space_prefix", True),
            collapse_spaces=fields.get("tokenizer.ggml.remove_extra_whitespaces", False),
        )
    )


def _byte_level(
    fields: Mapping[str, Any], tokens: list[str], pre: str, where: str
) -> tokenizers.Tokenizer:
    merges = _need(fields, "tokenizer.ggml.merges", where)
    core = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
        ignore_merges=pre in _LLAMA3,
    )
    backend = tokenizers.Tokenizer(core)
    backend.pre_tokenizer = pre_tokenizer(pre, where)
    backend.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", [])
    control = [t for t, kind in zip(tokens, kinds, strict=False) if kind == CONTROL]
    added = [t for t, kind in zip(tokens, kinds, strict=False) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    return backend


def pre_tokenizer(pre: str, where: str) -> pre_tokenizers.PreTokenizer:
    """How the vocabularies are cut for which `tokenizer.ggml.pre` is `pre`.

    Raises:
      HumpbackError: that is not known; names the file `where`.
    """

    def split(expression: str) -> list[pre_tokenizers.PreTokenizer]:
        return [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _GPT2:
        return gpt2
    if pre in _DIGITS_GPT2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre in _LLAMA3:
        return pre_tokenizers.Sequence(split(_LLAMA3_SPLIT))
    if pre in _QWEN2:
        return pre_tokenizers.Sequence(split(_QWEN2_SPLIT))
    known = ", ".join(sorted((*_GPT2, *_DIGITS_GPT2, *_LLAMA3, *_QWEN2)))
    raise HumpbackError(
        f"{where}: the pre-tokenizer tokenizer.ggml.pre={pre!r} is unknown, and a guess would give "
        f"wrong tokens without a sign of it. Known: {known}. Use the model's Hugging Face folder."
    )
