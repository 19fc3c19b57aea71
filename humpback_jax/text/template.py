"""The one object that turns conversations into text, for training, sampling, rating and export."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal

from humpback_jax.errors import HumpbackError
from humpback_jax.text.chat import render_chat
from humpback_jax.text.rubric import score_prefix
from humpback_jax.text.tokenizer import Tokenizer

S_A = "Answer in the style of an AI Assistant."
S_W = "Answer with knowledge from web search."
Tags = Literal["none", "S_a", "S_w", "both"]
TAG_TEXT: dict[Tags, str] = {"none": "", "S_a": S_A, "S_w": S_W, "both": f"{S_A} {S_W}"}

# {"role": "system" | "user" | "assistant", "content": text}, and for an assistant's turn
# "supervised": False where it is only context.
Messages = Sequence[Mapping[str, Any]]
JOINER = "\u200d"  # zero-width joiner
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A text for training or scoring.

    Attributes:
      text: the whole row. It ends with its last supervised character.
      spans: character ranges [start, end) that the model has to write: each supervised turn of
        the assistant from where the prompt ends, through its EOS.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation becomes text.

    Documents and answers may spell out control tokens (`<|im_end|>`) or the rubric's own field
    marks. Inside contents these get a zero-width joiner after their first character, so that they
    look the same and are ordinary text for every tokenizer. The alternative, telling the tokenizer
    which characters are trusted, needs a second channel beside the text through every sampler,
    file and exported client, and tokenisation in pieces.

    Attributes:
      name: "chat" uses the model's own template, "plain" our wording for base models.
      chat_template: jinja source, in both cases.
      special_tokens: what the jinja source may insert, by name.
      bos_text: what a rendering starts with unless the chat template writes BOS: that, with a space
        behind it for some vocabularies; "" for models without BOS.
      eos_texts: texts that end a turn; the first is appended where a template writes none.
      control_tokens: texts that contents must not be able to produce.
      system: system message put first where a conversation has none; None leaves it to the model.
      score_prefix: the start of a rating that the likelihood rubric's prompt ends with.
      backward_text, rubric_text, rubric_likelihood_text: task wordings with {slots}.
    """

    name: Literal["chat", "plain"]
    chat_template: str
    special_tokens: dict[str, str]
    bos_text: str
    eos_texts: tuple[str, ...]
    control_tokens: tuple[str, ...]
    system: str | None
    score_prefix: str
    backward_text: str
    rubric_text: str
    rubric_likelihood_text: str

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: Tokenizer,
        *,
        name: Literal["chat", "plain"] | None = None,
        system: str | None = None,
        bos_text: str | None = None,
    ) -> Template:
        """The template of a model; by default "chat" where its tokenizer has a template of its own.

        That of a model exported under "plain" is our wording, and so is "plain" again.

        Args:
          bos_text: None for the tokenizer's.
        """
        wording = prompt_text("plain_template")
        name = name or ("plain" if tokenizer.chat_template in (None, "", wording) else "chat")
        source = tokenizer.chat_template if name == "chat" else wording
        if not source:
            raise HumpbackError(
                "The template 'chat' needs a tokenizer with a chat template, and this one has none;"
                " use 'plain'."
            )
        return cls(
            name=name,
            chat_template=source,
            special_tokens=tokenizer.special_tokens,
            bos_text=tokenizer.bos_text if bos_text is None else bos_text,
            eos_texts=tokenizer.eos_texts,
            control_tokens=tokenizer.control_tokens,
            system=system,
            score_prefix=score_prefix(tokenizer),
            backward_text=prompt_text("backward"),
            rubric_text=prompt_text("rubric"),
            rubric_likelihood_text=prompt_text("rubric_likelihood"),
        )

    def forward(self, messages: Messages, tags: Tags = "none", complete: bool = True) -> Rendered:
        """A conversation that ends with a supervised turn of the assistant.

        Args:
          tags: the sentence(s) appended to the last user turn.
          complete: False for an answer that was cut off: it gets no EOS.

        Raises:
          HumpbackError: malformed messages, or a chat template in which the assistant's turns do
            not stand where the model would write them.
        """
        if not messages or not _is_supervised(messages[-1]):
            raise HumpbackError("A training conversation must end with an assistant message.")
        prepared = self._prepare(messages, tags)
        full = self._render(prepared)
        spans = []
        first = len(prepared) - len(messages)  # 1 behind a system message put first
        supervised = [k for k, given in enumerate(messages, first) if _is_supervised(given)]
        for k in supervised:
            start = self._prompt_end(full, prepared[:k])
            end = content_end = _find_content(full, start, prepared[k]["content"])
            if k < len(prepared) - 1:
                so_far = self._render(prepared[: k + 1])
                eos_end = self._eos_end(so_far, content_end)
                # Some templates write EOS after the last turn alone.
                if eos_end is not None and full.startswith(so_far[:eos_end]):
                    end = eos_end
            else:
                eos_end = self._eos_end(full, content_end)
                if not complete:
                    full = full[:content_end]
                elif eos_end is None:
                    full = full[:content_end] + self.eos_texts[0]
                else:
                    full = full[:eos_end]
                end = len(full)
            spans.append((start, end))
        return Rendered(full, tuple(spans))

    def forward_prompt(self, messages: Messages, tags: Tags = "none") -> str:
        """A conversation up to where the assistant starts to write."""
        if not messages or messages[-1].get("role") == "assistant":
            raise HumpbackError("A prompt must end with a user message.")
        return self._render_prompt(self._prepare(messages, tags))

    def question(self, instruction: str, tags: Tags = "none") -> str:
        """A conversation of one user turn, up to where the assistant starts to write."""
        return self.forward_prompt([_user(instruction)], tags)

    def backward(self, response: str, instruction: str) -> Rendered:
        """The pair turned round: the instruction supervised, given its response."""
        return self.forward([*self._backward_task(response), _assistant(instruction)])

    def backward_prompt(self, response: str) -> str:
        """Asks for the instruction that `response` answers."""
        return self.forward_prompt(self._backward_task(response))

    def response_alone(self, response: str, tags: Tags = "none") -> Rendered:
        """The response after an empty request, for log p(y): the same supervised tokens."""
        return self.forward([_user(""), _assistant(response)], tags)

    def plain_text(self, text: str) -> Rendered:
        """A document for plain language modelling: all of it supervised, and its EOS."""
        body = neutralise(text, self.control_tokens) + self.eos_texts[0]
        text = self.bos_text + body
        # The space behind BOS is part of the first word.
        start = len(self.special_tokens["bos_token"]) if self.bos_text else 0
        return Rendered(text, ((start, len(text)),))

    def rubric_prompt(self, instruction: str, response: str) -> str:
        """Asks for reasons and a last line `Score: N`."""
        return self.forward_prompt(self._rubric_task(self.rubric_text, instruction, response))

    def rubric_likelihood_prompt(self, instruction: str, response: str) -> str:
        """Asks for the rating at once and ends right before its digit."""
        task = self._rubric_task(self.rubric_likelihood_text, instruction, response)
        answer = f"{self.score_prefix}1"
        rendered = self.forward([*task, _assistant(answer)], complete=False)
        return rendered.text[:-1]

    def writes_bos(self, text: str) -> bool:
        """Whether nothing has to go before a text of the chat template: many write BOS."""
        return not self.bos_text or text.startswith(self.special_tokens["bos_token"])

    def content_hash(self) -> str:
        """SHA-256 over everything that changes a rendering."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        fields = {"format": _FORMAT, **dataclasses.asdict(self)}
        return json.dumps(fields, ensure_ascii=False, sort_keys=True, indent=2)

    @classmethod
    def from_json(cls, text: str, where: str = "template") -> Template:
        """Reads `to_json`'s text.

        Raises:
          HumpbackError: not such a text, or written by another version of the format.
        """
        try:
            fields = json.loads(text)
            found = fields.pop("format")
            if found != _FORMAT:
                raise HumpbackError(
                    f"{where}: template format {found!r}, this version reads {_FORMAT}; use the "
                    "version of humpback_jax that wrote it."
                )
            fields["eos_texts"] = tuple(fields["eos_texts"])
            fields["control_tokens"] = tuple(fields["control_tokens"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HumpbackError(f"{where}: not a saved template ({error}).") from error

    def _backward_task(self, response: str) -> list[dict[str, str]]:
        return [_user(fill(self.backward_text, response=response))]

    def _rubric_task(self, wording: str, instruction: str, response: str) -> list[dict[str, str]]:
        marks = tuple(re.findall(r"</?\w+>", wording))
        instruction, response = neutralise(instruction, marks), neutralise(response, marks)
        return [_user(fill(wording, instruction=instruction, response=response))]

    def _prepare(self, messages: Messages, tags: Tags) -> list[dict[str, str]]:
        """Checked copies with safe contents, the system message and the tags."""
        prepared = []
        for number, message in enumerate(messages, start=1):
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise HumpbackError(
                    f"Message {number} has role {role!r} and content of type "
                    f"{type(content).__name__}; expected system, user or assistant, and text."
                )
            prepared.append({"role": role, "content": neutralise(content, self.control_tokens)})
        users = [message for message in prepared if message["role"] == "user"]
        if not users:
            raise HumpbackError("A conversation needs at least one user message.")
        users[-1]["content"] = _append_tags(users[-1]["content"], tags)
        if self.system is not None and prepared[0]["role"] != "system":
            prepared.insert(0, {"role": "system", "content": self.system})
        return prepared

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        text = render_chat(self.chat_template, messages, self.special_tokens, add_generation_prompt)
        return text if self.writes_bos(text) else self.bos_text + text

    def _render_prompt(self, messages: Messages) -> str:
        # Vocabularies join a space to the word behind it: at the end of a prompt it would be a
        # token that no training text has there, so the model writes it.
        return self._render(messages, add_generation_prompt=True).rstrip(" ")

    def _prompt_end(self, full: str, before: Messages) -> int:
        prompt = self._render_prompt(before)
        if not full.startswith(prompt):
            raise HumpbackError(_ALTERED)
        return len(prompt)

    def _eos_end(self, text: str, start: int) -> int | None:
        """End of the first EOS text at or after `start`."""
        match = _any_of(self.eos_texts).search(text, start)
        return match.end() if match else None


_USE_PLAIN = (
    "use the template 'plain' (--template=plain; for train and run --config.base.template=plain)"
)
_ALTERED = (
    "The chat template shows the model a different text in training than when it answers: the "
    "prompt of a turn is not the beginning of the finished conversation (some templates drop or "
    "rewrite earlier turns, or open an answer with <think>). Split conversations into single "
    f"turns, or {_USE_PLAIN}."
)


def require_same_template(a: Template, b: Template, where: str) -> None:
    """Raises HumpbackError, naming the fields, when two templates render differently."""
    fields = [f.name for f in dataclasses.fields(Template)]
    differing = [name for name in fields if getattr(a, name) != getattr(b, name)]
    if differing:
        raise HumpbackError(
            f"{where}: two different templates meet ({a.content_hash()[:12]} and "
            f"{b.content_hash()[:12]}; they differ in {', '.join(differing)}). A model must be "
            "prompted as it was trained: use the template stored in its checkpoint."
        )


def neutralise(text: str, marks: Sequence[str]) -> str:
    """`text` with a zero-width joiner inside every occurrence of one of `marks`."""
    pattern = _any_of(tuple(marks))
    while match := pattern.search(text):  # again, since breaking one mark can leave another
        if len(match.group()) < 2:
            raise HumpbackError(
                f"A text contains the control token {match.group()!r}, which has one character and "
                "cannot be told from text; remove the row, or the token from the tokenizer."
            )
        text = pattern.sub(lambda found: found.group()[0] + JOINER + found.group()[1:], text)
    return text


def fill(wording: str, **slots: str) -> str:
    """Puts texts into `{slots}` in a single pass, so braces in the texts mean nothing."""
    return re.sub(r"\{(\w+)\}", lambda found: slots[found.group(1)], wording)


@functools.cache
def prompt_text(name: str) -> str:
    """A wording of `text/prompts/`, without the newline at the end of the file."""
    path = resources.files("humpback_jax.text").joinpath("prompts", f"{name}.txt")
    return path.read_text("utf-8").removesuffix("\n")


@functools.lru_cache(maxsize=64)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _append_tags(content: str, tags: Any) -> str:
    if tags not in TAG_TEXT:
        raise HumpbackError(f"tags={tags!r} is unknown; use one of {', '.join(TAG_TEXT)}.")
    return "\n".join(part for part in (content, TAG_TEXT[tags]) if part)


def _find_content(full: str, start: int, content: str) -> int:
    """End of `content` in `full`, where white space may stand before it or be lost around it."""
    for wanted in (content, content.rstrip(), content.lstrip(), content.strip()):
        position = start
        while True:
            if full.startswith(wanted, position):
                return position + len(wanted)
            if position >= len(full) or not full[position].isspace():
                break
            position += 1
    shown = full[start : start + 40]
    raise HumpbackError(
        f"The chat template does not put an assistant's text where the model writes it: expected "
        f"{content[:40]!r}, found {shown!r}. For this model, {_USE_PLAIN}."
    )


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _is_supervised(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant" and bool(message.get("supervised", True))


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
