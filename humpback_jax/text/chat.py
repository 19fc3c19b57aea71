"""Renders chat templates: the jinja programs by which models declare their dialogue format."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from humpback_jax.errors import HumpbackError

# Some templates write today's date into the prompt. Training and sampling on different days would
# then use different prompts, so the date stands still, at the one Llama 3 falls back on.
FIXED_DATE = datetime.date(2024, 7, 26)


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
) -> str:
    """The text of a conversation under the chat template `source`.

    Equal to `transformers`' `apply_chat_template(..., tokenize=False)` except for dates. It is
    rendered here because jinja2 imports in 0.05 s, `transformers` in 0.5 s.

    Raises:
      HumpbackError: the template does not compile, or refuses these messages.
    """
    import jinja2

    try:
        text: str = _compile(source).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise HumpbackError(
            f"The tokenizer's chat template has a syntax error in line {error.lineno}: {error}."
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise HumpbackError(
            f"The tokenizer's chat template refuses the conversation ({roles}): {error}."
        ) from error
    return text


def frozen_date_prefix(source: str) -> str:
    """Jinja code that makes the `strftime_now` calls of `source` write `FIXED_DATE` elsewhere too.

    Empty for the many templates without a date.
    """
    if "strftime_now" not in source:
        return ""
    # A sandboxed template can format no date, but replace the directives that the source contains.
    parts = dict.fromkeys(re.findall(r"%-?[aAbBcdHIjmMpSUwWxXyY]", source))
    steps = "".join(
        f"|replace({json.dumps(part)}, {json.dumps(FIXED_DATE.strftime(part))})" for part in parts
    )
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{steps} }}}}{{%- endmacro -%}}"


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> Any:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Accepts `{% generation %}`, which marks the assistant's text and renders as its body."""

        tags = {"generation"}  # noqa: RUF012, an attribute that jinja2 defines

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # A template comes with a downloaded model: it is somebody else's program, hence the sandbox.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    return environment.from_string(source)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """jinja2's own filter escapes HTML characters, which a prompt must not contain."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
