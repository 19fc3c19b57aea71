"""How a model that comes from files is prompted: its tokenizer, its template and its tags."""

from __future__ import annotations

from typing import NamedTuple

from humpback_jax.errors import HumpbackError
from humpback_jax.text.baked import unbaked
from humpback_jax.text.template import Tags, Template
from humpback_jax.text.tokenizer import Tokenizer


class Prompting(NamedTuple):
    """A tokenizer whose chat template is the model's own, a template on it, and the tags."""

    tokenizer: Tokenizer
    template: Template
    tags: Tags


def prompting(tokenizer: Tokenizer, template: str) -> Prompting:
    """What an export had added to the chat template is taken off: its tags are the model's again.

    Args:
      template: see `choose_template`.

    Raises:
      HumpbackError: no such template, or one exported by another version.
    """
    if not tokenizer.chat_template:
        return Prompting(tokenizer, choose_template(tokenizer, template), "none")
    found = unbaked(tokenizer.chat_template)
    if found.chat_template != tokenizer.chat_template:
        tokenizer = tokenizer.with_chat_template(found.chat_template)
    chosen = choose_template(tokenizer, template, found.system, found.bos_text)
    return Prompting(tokenizer, chosen, found.tags)


def choose_template(
    tokenizer: Tokenizer, template: str, system: str | None = None, bos_text: str | None = None
) -> Template:
    """The template "auto" (the tokenizer's own chat template, else plain), "chat" or "plain".

    `system` and `bos_text` are as `Template.for_tokenizer` takes them.

    Raises:
      HumpbackError: no such template, or "chat" for a tokenizer that has none.
    """
    if template == "auto":
        return Template.for_tokenizer(tokenizer, system=system, bos_text=bos_text)
    if template not in ("chat", "plain"):
        raise HumpbackError(f"template={template!r} is unknown; choose auto, chat or plain.")
    return Template.for_tokenizer(
        tokenizer,
        name=template,  # type: ignore[arg-type]  # mypy does not narrow a str by its membership
        system=system,
        bos_text=bos_text,
    )
