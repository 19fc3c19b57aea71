"""The one tokenizer class, always backed by `tokenizers`, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, processors

from humpback_jax.errors import HumpbackError

Offsets = NDArray[np.int32]  # [n, 2], character positions (start, end) in the encoded text
_PREFERRED_ELSEWHERE = ("chat_template.jinja", "added_tokens.json", "tokenizer.model")


class Tokenizer:
    """Text to ids and back, plus everything about a model's text format that its files declare.

    Nothing is ever added to a text: special tokens written *in* the text are recognised, and that
    is the only way they come about, so a BOS cannot appear twice by accident.

    Attributes:
      backend: the underlying `tokenizers.Tokenizer`. Its post-processor is removed: it would add
        BOS behind our back, and byte-level ones trim the offsets that the loss mask relies on.
      special_tokens: names to texts (`bos_token`, `eos_token`, ...), as chat templates expect them.
      bos_id: id of BOS, or None.
      eos_ids: every id that ends a turn, the tokenizer's own EOS first.
      pad_id: the padding id; an EOS id where the model has none (masks never depend on it).
      add_bos: whether a text for this model starts with BOS.
      chat_template: jinja source, or None for a base model.
      max_length: tokens to which other programs cut a text when told to cut, None for unknown.
      model_file: the source's sentencepiece `tokenizer.model`, for programs that read no other.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        *,
        extra_eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        max_length: int | float | None = None,
        model_file: bytes | None = None,
        where: str = "tokenizer",
    ) -> None:
        eos_token = special_tokens.get("eos_token")
        if not eos_token:
            raise HumpbackError(
                f"{where}: no end-of-sequence token is declared, so a model could never learn to "
                "stop. Add eos_token to tokenizer_config.json."
            )
        backend.no_padding()
        backend.no_truncation()
        # The stub of tokenizers leaves out that None is allowed.
        backend.post_processor = None  # type: ignore[assignment]
        _declare_special(backend, special_tokens.values())
        self.backend = backend
        self.special_tokens: dict[str, str] = dict(sorted(special_tokens.items()))
        self.chat_template = chat_template
        self.max_length = max_length
        self.model_file = model_file
        self.bos_id = self._special_id("bos_token")
        self.add_bos = add_bos and self.bos_id is not None
        eos_id = _require_id(backend, eos_token)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([eos_id, *extra_eos_ids]))
        unknown = [i for i in self.eos_ids if i < 0 or backend.id_to_token(i) is None]
        if unknown:
            raise HumpbackError(
                f"{where}: the end-of-sequence ids {unknown} are not in the vocabulary of "
                f"{self.vocab_size} tokens; correct eos_token_id in generation_config.json."
            )
        pad_id = self._special_id("pad_token")
        self.pad_id: int = eos_id if pad_id is None else pad_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads a Hugging Face model folder, or a folder written by `save`."""
        from humpback_jax.text.hf_tokenizer import tokenizer_from_folder

        return tokenizer_from_folder(folder)

    @classmethod
    def from_gguf(cls, path: str | Path) -> Tokenizer:
        """Reads the tokenizer out of a GGUF file's metadata."""
        from humpback_jax.text.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(path)

    load = from_folder

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_texts(self) -> tuple[str, ...]:
        return tuple(str(self.backend.id_to_token(i)) for i in self.eos_ids)

    @property
    def bos_text(self) -> str:
        """What a text for this model starts with, "" where that is nothing.

        Some sentencepiece vocabularies put a space before a text that begins without BOS alone, and
        their models know BOS with that space behind it: programs encode first, then add the id.
        """
        if not self.add_bos:
            return ""
        bos = self.special_tokens["bos_token"]
        known = [self.bos_id, *self.encode("a")]
        return f"{bos} " if self.encode(f"{bos}a") != known == self.encode(f"{bos} a") else bos

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that stand for structure and must never arise from somebody's document."""
        flagged = [t.content for t in self.backend.get_added_tokens_decoder().values() if t.special]
        return tuple(sorted({*flagged, *self.special_tokens.values(), *self.eos_texts}))

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens in the text are recognised, none are added."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[NDArray[np.int32], Offsets]:
        """Ids [n] int32 and their character offsets [n, 2] int32 into `text`."""
        return self.encode_batch_with_offsets([text])[0]

    def encode_batch_with_offsets(
        self, texts: Sequence[str]
    ) -> list[tuple[NDArray[np.int32], Offsets]]:
        """`encode_with_offsets` for many texts, on all cores."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            (
                np.asarray(encoding.ids, np.int32),
                np.asarray(encoding.offsets, np.int32).reshape(-1, 2),
            )
            for encoding in encodings
        ]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids, spaces exactly as the tokens spell them."""
        text: str = self.backend.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )
        return text

    def id_of(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found

    def with_chat_template(self, chat_template: str) -> Tokenizer:
        """The same tokenizer under another chat template, as written at export."""
        return self._changed(self.backend.to_str(), self.special_tokens, chat_template)

    def without(self, tokens: Iterable[str]) -> Tokenizer:
        """The same tokenizer, for which these added tokens are ordinary text."""
        dropped, state = set(tokens), json.loads(self.backend.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in dropped]
        named = {name: text for name, text in self.special_tokens.items() if text not in dropped}
        return self._changed(json.dumps(state), named, self.chat_template)

    def _changed(
        self, backend: str, special_tokens: Mapping[str, str], chat_template: str | None
    ) -> Tokenizer:
        return Tokenizer(
            tokenizers.Tokenizer.from_str(backend),
            special_tokens,
            extra_eos_ids=self.eos_ids,
            add_bos=self.add_bos,
            chat_template=chat_template,
            max_length=self.max_length,
            model_file=self.model_file,
        )

    def to_files(self) -> dict[str, bytes]:
        """File names and contents that `transformers.AutoTokenizer` and `from_folder` read.

        With `tokenizer.model`, where the source's is of this vocabulary: llama.cpp's converter
        takes the scores of sentencepiece's merges from it, else it makes them up.
        """
        from humpback_jax.text.sentencepiece_tokenizer import holds_vocabulary

        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.add_bos:
            bos = self.special_tokens["bos_token"]
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, self.bos_id)],
            )
        config: dict[str, Any] = {
            # The generic class takes tokenizer.json as it is; the named ones rebuild parts of it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            # By itself that class adds token_type_ids in some versions, which generate() refuses,
            # and pads behind a prompt, where the answer comes.
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            **self.special_tokens,
        }
        if self.max_length is not None:
            config["model_max_length"] = self.max_length
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        generation: dict[str, Any] = {
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids),
            "pad_token_id": self.pad_id,
        }
        files = {}
        if self.model_file is not None and holds_vocabulary(self.model_file, backend):
            files["tokenizer.model"] = self.model_file
            config["added_tokens_decoder"] = _marks(backend)  # which the other file may lack
        return {
            **files,
            "tokenizer.json": backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": _dumps(config),
            "special_tokens_map.json": _dumps(self.special_tokens),
            "generation_config.json": _dumps(generation),
        }

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files; other keys of a `generation_config.json` there are kept.

        Those of another tokenizer that programs would prefer to them are removed.
        """
        target = Path(folder) if isinstance(folder, str) else folder  # keeps paths into buckets
        target.mkdir(parents=True, exist_ok=True)
        for name in _PREFERRED_ELSEWHERE:
            (target / name).unlink(missing_ok=True)
        files = self.to_files()
        generation = target / "generation_config.json"
        if generation.exists():
            merged = {
                **json.loads(generation.read_text("utf-8")),
                **json.loads(files[generation.name]),
            }
            files[generation.name] = _dumps(merged)
        for name, content in files.items():
            (target / name).write_bytes(content)

    def content_hash(self) -> str:
        """SHA-256 over all that changes ids, stopping or rendered text."""
        rest = [self.special_tokens, self.eos_ids, self.pad_id, self.add_bos, self.chat_template]
        return hashlib.sha256((self.backend.to_str() + json.dumps(rest)).encode()).hexdigest()

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else _require_id(self.backend, token)


def within_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model that has embeddings for so many ids.

    Special tokens beyond them that nothing writes, mostly a <pad> that was added for batches,
    become ordinary text: we pad with EOS, and the tokenizer is exported without them.

    Raises:
      HumpbackError: the tokenizer can produce an id that the model has no row for. It would not
        fail by itself: an accelerator's gather clamps it and reads a neighbour's embedding.
    """
    unused = [text for text in _beyond(tokenizer, vocab_size) if _is_unused(tokenizer, text)]
    kept = tokenizer.without(unused) if unused else tokenizer
    if beyond := _beyond(kept, vocab_size):
        token, largest = max(beyond.items(), key=lambda item: item[1])
        raise HumpbackError(
            f"The tokenizer has {len(beyond)} token(s) beyond the model's vocabulary of "
            f"{vocab_size}, up to {token!r} with id {largest}, which texts or the chat template "
            "can have. Tokenizer and weights do not belong together, or tokens were added without "
            "resizing the embedding."
        )
    return kept


def _beyond(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {text: i for text, i in vocabulary.items() if i >= vocab_size}


def _is_unused(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a token only stands for structure, and neither begins nor ends anything."""
    names = [name for name, named in tokenizer.special_tokens.items() if named == text]
    written = any(word in (tokenizer.chat_template or "") for word in (text, *names))
    return (
        text in tokenizer.control_tokens
        and text not in tokenizer.eos_texts
        and not {"bos_token", "eos_token"} & set(names)
        and not written
    )


def _declare_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Makes `tokens`, and those that the backend calls special, known as they are written.

    A file may want them normalised first: that puts sentencepiece's prefix space before them, and
    without one in the text, as after an answer, EOS is cut into letters.
    """
    declared = backend.get_added_tokens_decoder().values()
    special = {*tokens, *(token.content for token in declared if token.special)}
    missing = sorted(special - {token.content for token in declared})
    altered = [token for token in declared if token.normalized and token.content in special]
    altered += [AddedToken(text) for text in missing]
    backend.add_special_tokens([_as_written(token) for token in altered])


def _as_written(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        special=True,
        normalized=False,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
    )


def _marks(backend: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    """How added tokens are recognised, by their ids, as `tokenizer_config.json` has it."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = sorted(backend.get_added_tokens_decoder().items())
    return {str(i): {name: getattr(token, name) for name in names} for i, token in added}


def _require_id(backend: tokenizers.Tokenizer, declared: str) -> int:
    token_id: int | None = backend.token_to_id(declared)
    assert token_id is not None, declared  # _declare_special has added it
    return token_id


def _dumps(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
