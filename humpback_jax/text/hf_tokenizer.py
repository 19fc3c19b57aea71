"""Tokenizer of a Hugging Face model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from humpback_jax.errors import HumpbackError
from humpback_jax.text.tokenizer import Tokenizer

SPECIAL_NAMES = (  # those that transformers, too, lets a chat template write by name
    *("bos_token", "eos_token", "pad_token", "unk_token"),
    *("sep_token", "cls_token", "mask_token"),
)
_MARKS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def tokenizer_from_folder(folder: str | Path) -> Tokenizer:
    """Reads `tokenizer.json`, else a sentencepiece `tokenizer.model`, with their settings.

    Raises:
      HumpbackError: nothing there, a file that cannot be read, no end-of-sequence token.
    """
    root = Path(folder) if isinstance(folder, str) else folder  # keeps paths into buckets
    config = _read_json(root / "tokenizer_config.json")
    special_tokens = _special_tokens(config, _read_json(root / "special_tokens_map.json"))
    model_file = _read_bytes(root / "tokenizer.model")
    if (root / "tokenizer.json").exists():
        path = root / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_str(_read_text(path))
        except Exception as error:  # the Rust library raises the bare Exception
            raise HumpbackError(
                f"{path}: not a readable tokenizer ({error}); fetch the file again."
            ) from error
        _add_tokens(backend, _added_tokens(root, config, backend), path)
        add_bos = config.get("add_bos_token")
        if add_bos is None:
            add_bos = _adds_bos(backend, special_tokens.get("bos_token"))
    elif model_file is not None:
        from humpback_jax.text.sentencepiece_tokenizer import backend_from_model_file

        path = root / "tokenizer.model"
        # `legacy` is the name that transformers gave to "a prefix space after each special token".
        legacy = config.get("legacy") is not False
        backend, declared = backend_from_model_file(model_file, legacy, str(path))
        special_tokens = {**declared, **special_tokens}
        # Whatever the files say: sentencepiece never sees added tokens.
        _add_tokens(backend, _added_tokens(root, config, backend, normalized=False), path)
        add_bos = config.get("add_bos_token", True)
    else:
        raise HumpbackError(
            f"{root}: no tokenizer found; looked for tokenizer.json and tokenizer.model."
        )
    max_length = config.get("model_max_length")
    return Tokenizer(
        backend,
        special_tokens,
        extra_eos_ids=_eos_ids(root),
        add_bos=bool(add_bos),
        chat_template=_chat_template(root, config),
        max_length=max_length if isinstance(max_length, int | float) else None,
        model_file=model_file,
        where=str(path),
    )


def _read_bytes(path: Path) -> bytes | None:
    """The file's content, or None when there is no such file."""
    try:
        return path.read_bytes() if path.exists() else None
    except OSError as error:
        raise HumpbackError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise HumpbackError(
            f"{path}: not UTF-8 text (byte {error.start}); the file is damaged or compressed, "
            "fetch it again."
        ) from error
    except OSError as error:
        raise HumpbackError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The file's mapping, or {} when there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise HumpbackError(
            f"{path}: not valid JSON (line {error.lineno}: {error.msg}); fetch the file again."
        ) from error
    if not isinstance(value, dict):
        raise HumpbackError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _token_text(value: Any) -> str | None:
    """A special token is written as its text or as an object with the text in `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_NAMES:
            text = _token_text(source.get(name))
            if text is not None:
                found.setdefault(name, text)
    return found


def _special_texts(*sources: Mapping[str, Any]) -> set[str]:
    """Every token that settings declare special, with a name known here or without."""
    found = set(_special_tokens(*sources).values())
    for source in sources:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = source.get(key) or ()
            values = listed.values() if isinstance(listed, dict) else listed
            found |= {text for text in map(_token_text, values) if text is not None}
    return found


def _adds_bos(backend: tokenizers.Tokenizer, bos_token: str | None) -> bool:
    """Whether the file's own post-processor puts BOS in front of a text."""
    tokens = backend.encode("a", add_special_tokens=True).tokens
    return bos_token is not None and tokens[:1] == [bos_token]


def _added_tokens(
    root: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer, **marks: bool
) -> dict[int, AddedToken]:
    """Tokens that a folder adds to those of its main file, by id, with these marks."""
    name, entries = "tokenizer_config.json", config.get("added_tokens_decoder")
    if entries is None:  # transformers, too, reads the older file in that case alone
        name = "added_tokens.json"
        held = {token.content for token in backend.get_added_tokens_decoder().values()}
        added = {text: i for text, i in _read_json(root / name).items() if text not in held}
        special = _special_texts(config, _read_json(root / "special_tokens_map.json"))
        entries = {
            i: {"content": text, "special": text in special, "normalized": False}
            for text, i in added.items()
        }
    try:
        return {
            int(i): AddedToken(raw["content"], **{k: raw[k] for k in _MARKS if k in raw} | marks)
            for i, raw in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HumpbackError(
            f"{root / name}: the added tokens cannot be read ({error!r})."
        ) from error


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: Mapping[int, AddedToken], path: Path
) -> None:
    """Adds tokens, or their marks where the file has them: those keep their ids, as elsewhere."""
    new = {i: t for i, t in tokens.items() if backend.token_to_id(t.content) is None}
    backend.add_tokens([token for _, token in sorted(tokens.items())])
    for i, token in new.items():
        if backend.token_to_id(token.content) != i:
            raise HumpbackError(
                f"The added token {token.content!r} should have id {i} but gets "
                f"{backend.token_to_id(token.content)}; {path} and the settings beside it do not "
                "belong together."
            )


def _eos_ids(root: Path) -> tuple[int, ...]:
    """The ids that stop generation: `generation_config.json`, else `config.json`."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(root / name).get("eos_token_id")
        if value is None:
            continue
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(i, int) for i in ids):
            raise HumpbackError(
                f"{root / name}: eos_token_id is {value!r}; expected an id or a list of ids."
            )
        return ids
    return ()


def _chat_template(root: Path, config: Mapping[str, Any]) -> str | None:
    path = root / "chat_template.jinja"
    if path.exists():
        return _read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template
