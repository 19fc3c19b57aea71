"""Sentencepiece vocabularies (BPE or unigram) on the `tokenizers` backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from humpback_jax.errors import HumpbackError

SPACE = "▁"
# Types of pieces; GGUF uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2  # the file format's model types


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """What sentencepiece stores about a vocabulary.

    Attributes:
      pieces, scores, types: one entry per id.
      prefix_space: a space is put in front of a text.
      prefix_after_special: ... and also in front of what follows a special token. Meta's code for
        Llama 2, llama.cpp and most published tokenizer.json files do that.
      charsmap: compiled character normalisation, empty for none.
      collapse_spaces: strip a text and join runs of spaces.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unigram: bool = False
    byte_fallback: bool = True
    prefix_space: bool = True
    prefix_after_special: bool = True
    charsmap: bytes = b""
    collapse_spaces: bool = False


def sentencepiece_backend(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """A `tokenizers` object with the ids that sentencepiece itself gives."""
    unknown = model.types.index(UNKNOWN) if UNKNOWN in model.types else None
    if model.unigram:
        # Nine digits hold a float32; the backend's JSON reader misreads longer numbers by a bit.
        scores = [float(f"{score:.9g}") for score in model.scores]
        core: models.Model = models.Unigram(
            list(zip(model.pieces, scores, strict=True)), unknown, model.byte_fallback
        )
    else:
        core = models.BPE(
            vocab={piece: i for i, piece in enumerate(model.pieces)},
            merges=_merges(model),
            unk_token=None if unknown is None else model.pieces[unknown],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    backend = tokenizers.Tokenizer(core)
    backend.normalizer = normalizers.Sequence(_normalizers(model))
    if model.prefix_space and not model.prefix_after_special:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    for piece, kind in zip(model.pieces, model.types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            backend.add_special_tokens([AddedToken(piece, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(piece, special=False, normalized=False)])
    return backend


def backend_from_model_file(
    content: bytes, prefix_after_special: bool, where: str
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Backend and special tokens of a sentencepiece `tokenizer.model`."""
    proto = _parsed(content, where)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if not proto.pieces or trainer.model_type not in (_UNIGRAM, _BPE):
        raise HumpbackError(
            f"{where}: not a sentencepiece model of type BPE or unigram; if it is a tiktoken file, "
            "use a folder that has tokenizer.json."
        )
    model = SentencePieceModel(
        pieces=[piece.piece for piece in proto.pieces],
        scores=[piece.score for piece in proto.pieces],
        types=[piece.type for piece in proto.pieces],
        unigram=trainer.model_type == _UNIGRAM,
        byte_fallback=trainer.byte_fallback,
        prefix_space=rules.add_dummy_prefix,
        prefix_after_special=prefix_after_special,
        charsmap=rules.precompiled_charsmap,
        collapse_spaces=rules.remove_extra_whitespaces,
    )
    ids = {
        "bos_token": trainer.bos_id,
        "eos_token": trainer.eos_id,
        "pad_token": trainer.pad_id,
        "unk_token": trainer.unk_id,
    }
    special = {name: model.pieces[i] for name, i in ids.items() if 0 <= i < len(model.pieces)}
    return sentencepiece_backend(model), special


def holds_vocabulary(content: bytes, backend: tokenizers.Tokenizer) -> bool:
    """Whether a `tokenizer.model` has the backend's tokens, id by id, and joins pairs as BPE does.

    Added tokens behind its last id do not count: programs take them from other files. Converters
    to GGUF take it for BPE in any case.
    """
    try:
        proto = _parsed(content, "")
    except HumpbackError:
        return False
    pieces = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    behind = {
        token.content: i
        for i, token in backend.get_added_tokens_decoder().items()
        if i >= len(pieces)
    }
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return proto.trainer_spec.model_type == _BPE and {**pieces, **behind} == vocabulary


def _parsed(content: bytes, where: str) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    # protobuf makes the class when the module is loaded; no stub tells of it.
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise HumpbackError(f"{where}: not a sentencepiece model ({error}).") from error
    return proto


def _normalizers(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.collapse_spaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.prefix_space and model.prefix_after_special:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Ranked pair merges that make the same choices as sentencepiece's scores.

    Sentencepiece joins the neighbours whose union has the best score; a merge list ranks the
    pairs. Every way to cut a piece into two pieces is a merge with the score of the whole.
    """
    usable = {
        piece: i for i, piece in enumerate(model.pieces) if model.types[i] in (NORMAL, USER_DEFINED)
    }
    ranked = []
    for whole, i in usable.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in usable and right in usable:
                ranked.append((-model.scores[i], i, usable[left], usable[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
