"""A tokenizer as fields of a GGUF file: the inverse of `gguf_tokenizer`.

A file names the rules by which its program cuts text, it does not hold them. So the names are found
by trial: what would be written is read back, and has to give the tokens of the original.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from humpback_jax.errors import HumpbackError
from humpback_jax.text.gguf_tokenizer import (
    EMPTY_BOS,
    PRE_TOKENIZERS,
    pre_tokenizer,
    tokenizer_from_fields,
)
from humpback_jax.text.sentencepiece_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from humpback_jax.text.tokenizer import Tokenizer
from humpback_jax.weights.gguf_special import SpecialIds, special_fields

# Where rules for cutting text are known to differ: contractions, runs of digits, spaces and line
# ends, marks and numbers beyond ASCII, texts that begin or end with a space.
_PROBES = (
    "It's DON'T we'll I'Ve they'd isn\u2019t x's 's",
    "1 12 123 1234 12345 3.14159 v2 x86_64 1,000,000 ½ ² ٣٤٥ Ⅷ",
    "a  b   c    d\te\t\tf\n\n\ng \n h\r\nx\r\n\r\n  y  ",
    " leading, trailing \n",
    "a  1 b   22\t333\n 4444  x1y22z",
    "(foo)[bar]{baz}... !!! ?! --- ==> == :=\n;;;\n\n# $x @y %z & ~ ` ^ | \\ /",
    "def f(x):\n    return x['k']  # été\n\n\tif y: pass\n",
    "naïve Ångström ﬁ ß İ straße",
    "नमस्ते दुनिया こんにちは、世界。 안녕하세요 你好 مرحبا שלום ไทย",
    "😀👩‍👩‍👧‍👦🇩🇪 “quoted” — dash… \u00a0nbsp\u200bzero\u3000wide",
    "CamelCaseWord snake_case_word UPPER lowerUPPER https://example.org/a?b=c&d=e#f",
    "",
    "x",
)
_SHOWN = 60  # characters of a text with other tokens, in a message


def gguf_fields(
    tokenizer: Tokenizer, vocab_size: int, prompts: Sequence[str], ends: Sequence[int] = ()
) -> tuple[dict[str, Any], list[str]]:
    """What a GGUF file says of a tokenizer.

    Args:
      vocab_size: rows of the model's embedding, which may have more than there are tokens.
      prompts: as the model gets them.
      ends: ids that end answers, beside the tokenizer's own.

    Returns:
      (metadata by key, what is different in llama.cpp nevertheless, as sentences).

    Raises:
      HumpbackError: no rules known here give these tokens in llama.cpp.
    """
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise _not_in_gguf(
            f"its kind is {model['type']} with {len(model.get('merges', ()))} merges"
        )
    common = _fields_of_any_rules(tokenizer, model, vocab_size, ends)
    rules = _rules(tokenizer, model, common["tokenizer.ggml.tokens"])
    candidates = [
        common | {f"tokenizer.ggml.{key}": x for key, x in rule.items()} for rule in rules
    ]
    fields, difference = _best_of(tokenizer, candidates, prompts)
    if difference is None:
        return fields, _normalised(state, model)
    if not model["byte_fallback"]:
        raise _other_tokens(difference)
    return fields, [
        "in llama.cpp, text that begins without a special token has other tokens than here: "
        f"{difference}. Prompts in the model's chat template do not."
    ]


def _fields_of_any_rules(
    tokenizer: Tokenizer, model: dict[str, Any], vocab_size: int, ends: Sequence[int]
) -> dict[str, Any]:
    tokens, kinds = _tokens(tokenizer, model, vocab_size)
    fields = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_eos_token": False,
        **special_fields(_special_ids(tokenizer, ends), tokens, kinds),
    }
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = _chat_template(tokenizer, tokenizer.chat_template)
    return fields


def _best_of(
    tokenizer: Tokenizer, candidates: Iterable[dict[str, Any]], prompts: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """The first fields that give the tokens of all texts, or else of prompts and of text behind
    special tokens; and, in that case, which other text they misread.

    A vocabulary that has a space before the beginning of texts alone is of the second kind.

    Raises:
      HumpbackError: none gives the tokens of the prompts.
    """
    inside = [*prompts, *_around_added_tokens(tokenizer)]
    plain = [*_PROBES, *_texts_of_tokens(tokenizer)]
    fits, misread = [], None
    for fields in candidates:
        written = tokenizer_from_fields(fields, "the tokenizer")
        if (difference := _difference(tokenizer, written, inside)) is None:
            fits.append((fields, _difference(tokenizer, written, plain)))
        misread = misread or difference
    if not fits:
        raise _other_tokens(misread)
    return min(fits, key=lambda fit: fit[1] is not None)


def _other_tokens(misread: str | None) -> HumpbackError:
    example = f", for example to {misread}" if misread else ""
    return _not_in_gguf(f"no rules known here give the same tokens in llama.cpp{example}")


def _not_in_gguf(why: str) -> HumpbackError:
    return HumpbackError(
        f"This model's tokenizer cannot be written to a GGUF file: {why}. Export with --format=hf; "
        "llama.cpp's own converter may know the model."
    )


def _normalised(state: dict[str, Any], model: dict[str, Any]) -> list[str]:
    if model["byte_fallback"] or state["normalizer"] is None:
        return []
    kind = state["normalizer"]["type"]
    return [f"llama.cpp does not normalise text, which this tokenizer does ({kind})."]


def _chat_template(tokenizer: Tokenizer, source: str) -> str:
    return EMPTY_BOS + source if tokenizer.bos_id is None and "bos_token" in source else source


def _tokens(
    tokenizer: Tokenizer, model: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """(text of every id, its kind); ids that are no token are filled up."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    tokens = [_filler(i, vocabulary) for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, i in vocabulary.items():
        tokens[i] = text
        byte = model["byte_fallback"] and len(text) == 6 and text.startswith("<0x")
        kinds[i] = BYTE if byte else NORMAL
    for i, added in tokenizer.backend.get_added_tokens_decoder().items():
        kinds[i] = CONTROL if added.special else USER_DEFINED
    if model["byte_fallback"] and model["unk_token"] is not None:
        kinds[tokens.index(model["unk_token"])] = UNKNOWN
    return tokens, kinds


def _filler(i: int, vocabulary: Mapping[str, int]) -> str:
    text = f"[PAD{i}]"
    while text in vocabulary:  # llama.cpp refuses to have a text twice
        text = f"[{text}]"
    return text


def _special_ids(tokenizer: Tokenizer, ends: Sequence[int]) -> SpecialIds:
    def declared(name: str) -> int | None:
        text = tokenizer.special_tokens.get(name)
        return None if text is None else tokenizer.id_of(text)

    return SpecialIds(
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_ids[0],
        ends=tuple(dict.fromkeys([*tokenizer.eos_ids, *ends])),
        pad=declared("pad_token"),
        unknown=declared("unk_token"),
    )


def _rules(
    tokenizer: Tokenizer, model: dict[str, Any], tokens: Sequence[str]
) -> Iterable[dict[str, Any]]:
    """Fields by which a program may cut text as the tokenizer does."""
    return (
        _sentencepiece(model, tokens) if model["byte_fallback"] else _byte_level(tokenizer, model)
    )


def _byte_level(tokenizer: Tokenizer, model: dict[str, Any]) -> Iterable[dict[str, Any]]:
    own = tokenizer.backend.pre_tokenizer
    merges = [" ".join(pair) for pair in model["merges"]]
    for name in PRE_TOKENIZERS:
        theirs = pre_tokenizer(name, "the tokenizer")
        if own and all(own.pre_tokenize_str(t) == theirs.pre_tokenize_str(t) for t in _PROBES):
            yield {"model": "gpt2", "pre": name, "merges": merges}


def _sentencepiece(model: dict[str, Any], tokens: Sequence[str]) -> Iterable[dict[str, Any]]:
    """A merge's rank serves as the score of what it makes: only the order of scores matters."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(token, len(model["merges"]))) for token in tokens]
    for prefix in (True, False):
        yield {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _around_added_tokens(tokenizer: Tokenizer) -> Iterable[str]:
    """Every added token with text on both sides."""
    added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    for token in sorted(added):
        yield from (f"{token}{text}{token}{text}" for text in _PROBES)


def _texts_of_tokens(tokenizer: Tokenizer) -> Iterable[str]:
    return (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))


def _difference(ours: Tokenizer, theirs: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first text with other tokens, if there is one."""
    pairs = zip(
        *(t.backend.encode_batch_fast(texts, add_special_tokens=False) for t in (ours, theirs)),
        strict=True,
    )
    for text, (mine, other) in zip(texts, pairs, strict=True):
        if mine.ids != other.ids:
            return repr(text[:_SHOWN])
    return None
