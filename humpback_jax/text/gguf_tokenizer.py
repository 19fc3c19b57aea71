"""Tokenizer of a GGUF file, from its metadata."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
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

# How a byte-level vocabulary cuts text before merging, by `tokenizer.ggml.pre`. The expressions
# are facts of the models: GPT-2 cuts at words, numbers and punctuation; StarCoder's relatives cut
# each digit off first; Llama 3 and Qwen 2 have expressions of their own.
_GPT2 = frozenset({"default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion"})
_DIGITS_GPT2 = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
_LLAMA3 = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "pixtral"})
_QWEN2 = frozenset({"qwen2", "deepseek-r1-qwen", "stablelm2"})
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL

_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
_TURN_END_KEYS = ("eot_token_id", "eom_token_id")
_SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
_STRING, _ARRAY = 8, 9


def tokenizer_from_gguf(path: str | Path) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Raises:
      HumpbackError: not a GGUF file, no tokenizer in it, or a kind that is not known here.
    """
    where = str(path)
    fields = read_metadata(path, "tokenizer.")
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if kind is None or tokens is None:
        raise HumpbackError(f"{where}: the GGUF file holds no tokenizer.")
    pre = fields.get("tokenizer.ggml.pre", "default")
    if kind == "llama":
        backend = _sentencepiece(fields, tokens)
    elif kind == "gpt2":
        backend = _byte_level(fields, tokens, pre, where)
    else:
        raise HumpbackError(
            f"{where}: tokenizer.ggml.model={kind!r} is not supported (known: 'gpt2', 'llama'); "
            "use the model's Hugging Face folder."
        )
    special = {
        name: tokens[fields[f"tokenizer.ggml.{key}"]]
        for name, key in _SPECIAL_KEYS.items()
        if f"tokenizer.ggml.{key}" in fields
    }
    turn_ends = (fields.get(f"tokenizer.ggml.{key}") for key in _TURN_END_KEYS)
    return Tokenizer(
        backend,
        special,
        extra_eos_ids=[i for i in turn_ends if i is not None],
        # Without the flag, these two kinds of model expect a BOS.
        add_bos=fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _LLAMA3),
        chat_template=fields.get("tokenizer.chat_template"),
        where=where,
    )


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    return sentencepiece_backend(
        SentencePieceModel(
            pieces=tokens,
            scores=fields["tokenizer.ggml.scores"],
            types=fields["tokenizer.ggml.token_type"],
            prefix_space=fields.get("tokenizer.ggml.add_space_prefix", True),
            collapse_spaces=fields.get("tokenizer.ggml.remove_extra_whitespaces", False),
        )
    )


def _byte_level(
    fields: Mapping[str, Any], tokens: list[str], pre: str, where: str
) -> tokenizers.Tokenizer:
    core = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]],
        ignore_merges=pre in _LLAMA3,
    )
    backend = tokenizers.Tokenizer(core)
    backend.pre_tokenizer = _pre_tokenizer(pre, where)
    backend.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", [])
    control = [t for t, kind in zip(tokens, kinds, strict=False) if kind == CONTROL]
    added = [t for t, kind in zip(tokens, kinds, strict=False) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    return backend


def _pre_tokenizer(pre: str, where: str) -> pre_tokenizers.PreTokenizer:
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
    known = ", ".join(sorted(_GPT2 | _DIGITS_GPT2 | _LLAMA3 | _QWEN2))
    raise HumpbackError(
        f"{where}: the pre-tokenizer tokenizer.ggml.pre={pre!r} is unknown, and a guess would give "
        f"wrong tokens without a sign of it. Known: {known}. Use the model's Hugging Face folder."
    )


def read_metadata(path: str | Path, prefix: str) -> dict[str, Any]:
    """The key-value pairs of a GGUF file (version 2 or 3) whose key starts with `prefix`.

    `gguf.GGUFReader` makes an array object of each string: 2 s for a vocabulary of 49,152. This
    takes a tenth of a second, and every command that names a GGUF model waits for it.
    """
    try:
        with (
            Path(path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _MetadataReader(data).read(prefix)
    except (OSError, ValueError, struct.error, IndexError) as error:
        raise HumpbackError(f"{path}: not a readable GGUF file ({error}).") from error


class _MetadataReader:
    """A cursor over the little-endian header of a GGUF file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def read(self, prefix: str) -> dict[str, Any]:
        magic, version = self.data[:4], struct.unpack_from("<I", self.data, 4)[0]
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}; expected b'GGUF', 2 or 3")
        self.position = 8
        self._scalar("Q")  # number of tensors
        fields = {}
        for _ in range(self._scalar("Q")):
            key, kind = self._string(), self._scalar("I")
            value = self._value(kind)
            if key.startswith(prefix):
                fields[key] = value
        return fields

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind] or "")
        item, count = self._scalar("I"), self._scalar("Q")
        if item in (_STRING, _ARRAY):
            return [self._value(item) for _ in range(count)]
        dtype = np.dtype(_SCALARS[item] or "").newbyteorder("<")
        start = self.position
        self.position += dtype.itemsize * count
        return np.frombuffer(self.data[start : self.position], dtype).tolist()

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.position)[0]
        self.position += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._scalar("Q")
        start = self.position
        self.position += size
        if self.position > len(self.data):
            raise ValueError(f"cut off at byte {len(self.data)}")
        return self.data[start : self.position].decode("utf-8")
