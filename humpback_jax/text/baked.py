"""Exported chat templates, which add a model's tags by themselves; and the model's own out of them.

Clients that know nothing of tags then prompt a model as we do. Where such a model comes back, what
was added has to come off: tags are ours to place, and rating and backward prompts have none.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from humpback_jax.errors import HumpbackError
from humpback_jax.text.chat import frozen_date_prefix, render_chat
from humpback_jax.text.template import TAG_TEXT, Tags, Template

# The comment keeps the steps' white-space control off the template; clients drop the newline after
# a comment, so that the template's first line begins a line.
_MARK = "{#- the model's own template: #}\n"
_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}"
    '{%- set messages = [{"role": "system", "content": TEXT}] + messages -%}'
    "{%- endif -%}"
)
_TAGS = (
    "{%- set tagged = namespace(last=-1, messages=[]) -%}"
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
    "{%- set tagged.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- for message in messages -%}{%- if loop.index0 == tagged.last -%}"
    "{%- set content = (message['content'] + '\\n' if message['content'] else '') + TEXT -%}"
    "{%- set tagged.messages = tagged.messages + [{'role': 'user', 'content': content}] -%}"
    "{%- else -%}{%- set tagged.messages = tagged.messages + [message] -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- set messages = tagged.messages -%}"
)
_BOS = "{{- TEXT -}}"


class Unbaked(NamedTuple):
    """A model's own chat template, and what its export had added, None where that was nothing."""

    chat_template: str
    tags: Tags = "none"
    system: str | None = None
    bos_text: str | None = None


def baked_chat_template(template: Template, tags: Tags) -> str:
    """A jinja chat template that does by itself what `forward_prompt(messages, tags)` does.

    (It does not neutralise control tokens in contents.)
    """
    steps = [frozen_date_prefix(template.chat_template)]
    if template.system is not None:
        steps.append(_with_text(_SYSTEM, template.system))
    if TAG_TEXT[tags]:
        steps.append(_with_text(_TAGS, TAG_TEXT[tags]))
    probe = [{"role": "user", "content": "x"}]
    text = render_chat(template.chat_template, probe, template.special_tokens, True)
    if not template.writes_bos(text):
        steps.append(_with_text(_BOS, template.bos_text))
    return (
        "".join([*steps, _MARK, template.chat_template]) if any(steps) else template.chat_template
    )


def unbaked(source: str) -> Unbaked:
    """What `baked_chat_template` was given; of any other chat template, that itself.

    The step for the date is dropped: `Template` does the same by itself.

    Raises:
      HumpbackError: its steps are not those that this version writes.
    """
    steps, mark, own = source.partition(_MARK)
    if not mark:
        return Unbaked(source)
    parts = (_pattern("system", _SYSTEM), _pattern("tags", _TAGS), _pattern("bos", _BOS))
    found = re.fullmatch(re.escape(frozen_date_prefix(own)) + "".join(parts), steps, re.DOTALL)
    texts = found.groupdict() if found else {}
    told = {json.dumps(text): tags for tags, text in TAG_TEXT.items() if text}
    if not texts or texts["tags"] not in (None, *told):
        raise HumpbackError(
            "The tokenizer's chat template was exported with steps that this version of "
            f"humpback_jax does not know, before {_MARK.strip()!r}. Export the model again from "
            "its checkpoint, or remove these steps from the chat template and pass --tags."
        )
    system, bos_text = (texts[name] and json.loads(texts[name]) for name in ("system", "bos"))
    return Unbaked(own, told[texts["tags"]] if texts["tags"] else "none", system, bos_text)


def _with_text(step: str, text: str) -> str:
    # llama.cpp's Jinja knows no \\u escapes.
    return step.replace("TEXT", json.dumps(text, ensure_ascii=False))


def _pattern(name: str, step: str) -> str:
    text = rf'(?P<{name}>"(?:[^"\\]|\\.)*")'
    return f"(?:{re.escape(step).replace('TEXT', text)})?"
