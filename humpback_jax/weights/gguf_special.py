"""The special tokens of a GGUF file, by its fields, and ends of turns by their text too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from humpback_jax.errors import HumpbackError

# Types of tokens that are found in a text as a whole: control, and user-defined as old conversions
# of ChatML models have it.
_WHOLE = (3, 4)
# Files name one EOS, and mostly no other token that ends an answer: llama.cpp, too, knows these by
# their text. <|endoftext|> is not among them: it separates documents (and is the default model's
# unknown token); models that end answers with it name it as EOS.
_TURN_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),  # Llama 3
        *("<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>"),
    }
)
# llama.cpp does not know this one by its text.
_TO_BE_NAMED = frozenset({"<|end_of_turn|>"})


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens, None where a file has none.

    Attributes:
      ends: every id that ends an answer; that of EOS, if there is one, comes first.
    """

    bos: int | None
    eos: int | None
    ends: tuple[int, ...]
    pad: int | None
    unknown: int | None


def special_ids(path: str | Path, metadata: Mapping[str, Any], vocab_size: int) -> SpecialIds:
    """The special tokens of a file whose ids are 0 to `vocab_size` - 1.

    Raises:
      HumpbackError: a token that begins or ends texts is none of the vocabulary.
    """

    def found(name: str, needed: bool = True) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.get(key)
        if value is None or (isinstance(value, int) and 0 <= value < vocab_size):
            return value
        if needed:
            raise HumpbackError(
                f"{path}: {key}={value} is none of the {vocab_size} tokens; use another GGUF file "
                "or the model's Hugging Face folder."
            )
        return None  # some converters write -1 where a model has no such token

    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    by_text = _ends_by_text(tokens, metadata.get("tokenizer.ggml.token_type") or ())
    eos = found("eos")
    ends = [eos, found("eot"), found("eom"), *by_text]
    return SpecialIds(
        bos=found("bos"),
        eos=eos,
        ends=tuple(dict.fromkeys(i for i in ends if i is not None)),
        pad=found("padding", needed=False),
        unknown=found("unknown", needed=False),
    )


def special_fields(
    special: SpecialIds, tokens: Sequence[str], kinds: Sequence[int]
) -> dict[str, int]:
    """The metadata that `special_ids` reads as `special`.

    Args:
      tokens, kinds: text and type of every id.

    Raises:
      HumpbackError: more tokens end answers than a file can say.
    """
    by_text = {i for i in _ends_by_text(tokens, kinds) if tokens[i] not in _TO_BE_NAMED}
    further = [i for i in special.ends if i != special.eos and i not in by_text]
    if len(further) > 2:
        raise HumpbackError(
            f"A GGUF file has room for three ends of answers, this model has {len(further) + 1}: "
            f"{', '.join(tokens[i] for i in special.ends)}. Remove some from eos_token_id."
        )
    eot, eom = [*further, None, None][:2]
    named = {
        "bos": special.bos,
        "eos": special.eos,
        "eot": eot,
        "eom": eom,
        "padding": special.pad,
        "unknown": special.unknown,
    }
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in named.items() if i is not None}


def _ends_by_text(tokens: Sequence[str], kinds: Sequence[int]) -> list[int]:
    told = zip(tokens, kinds, strict=False)
    return [i for i, (t, kind) in enumerate(told) if kind in _WHOLE and t in _TURN_ENDS]
