"""Varied texts, and small vocabularies trained on them, for tests."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

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
