"""The template: what is trained, what is asked and what is exported must be the same text."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_styles import (
    ALL,
    MULTI,
    NASTY,
    SINGLE,
    STYLES,
    assistant,
    styled,
    supervised,
    template_of,
    user,
    with_source,
)

from humpback_jax.cli import main
from humpback_jax.errors import HumpbackError
from humpback_jax.models import export_hf, load_model, save_checkpoint
from humpback_jax.text.baked import baked_chat_template
from humpback_jax.text.byte_tokenizer import CHAT_TEMPLATE
from humpback_jax.text.chat import render_chat
from humpback_jax.text.template import (
    JOINER,
    S_A,
    S_W,
    TAG_TEXT,
    Tags,
    Template,
    neutralise,
    require_same_template,
)
from humpback_jax.text.tokenizer import Tokenizer

# --- training text = prompt + what the model writes ---


@pytest.mark.parametrize("style", ALL)
@pytest.mark.parametrize("tags", TAG_TEXT)
@pytest.mark.parametrize("messages", [SINGLE, MULTI], ids=["single", "multi"])
def test_T01_sampling_asks_with_exactly_the_text_that_training_showed(
    style: str, tags: Tags, messages: list[dict[str, str]]
) -> None:
    template = template_of(style)
    rendered = template.forward(messages, tags)
    prompt = template.forward_prompt(messages[:-1], tags)
    assert rendered.text[: rendered.spans[-1][0]] == prompt
    pair = template.backward("A long text.", "Write a long text.")
    assert pair.text[: pair.spans[0][0]] == template.backward_prompt("A long text.")


@pytest.mark.parametrize("style", ALL)
def test_T20_every_complete_answer_ends_with_its_eos_and_nothing_follows(style: str) -> None:
    template = template_of(style)
    eos = template.eos_texts[0]
    [only] = supervised(template, SINGLE)
    assert only.strip() in (f"Four.{eos}", f"Four. {eos}")
    last = supervised(template, MULTI)[-1]
    assert last.endswith(eos) and template.forward(MULTI).text.endswith(last)


@pytest.mark.parametrize("style", [s for s in ALL if s != "alpaca"])
def test_T20_earlier_answers_of_a_conversation_end_with_eos_too(style: str) -> None:
    template = template_of(style)
    first, second = supervised(template, MULTI)
    eos = template.eos_texts[0]
    assert first.strip().startswith("Hello!") and first.endswith(eos)
    assert second.strip().startswith("4, of course.") and second.endswith(eos)


def test_T20_template_that_writes_no_eos_gets_one_where_the_answer_ends() -> None:
    template = template_of("alpaca")
    assert supervised(template, MULTI) == ["Hello!", "4, of course.</s>"]
    assert template.forward(MULTI).text.endswith("### Response:\n4, of course.</s>")


def test_T20_template_that_writes_eos_after_the_last_turn_alone() -> None:
    template = with_source(
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{{ eos_token if loop.last and m.role == 'assistant' else '|' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert supervised(template, MULTI) == ["Hello!", "4, of course.<|im_end|>"]


@pytest.mark.parametrize("style", ALL)
def test_T28_no_prompt_text_is_ever_supervised(style: str) -> None:
    template = template_of(style)
    joined = "".join(supervised(template, MULTI, "both"))
    for foreign in ("Hi", "2 + 2?", S_A, S_W, "im_start", "INST", "###", "|user|", "USER"):
        assert foreign not in joined


@pytest.mark.parametrize("style", ALL)
def test_answer_that_was_cut_off_has_no_eos(style: str) -> None:
    rendered = template_of(style).forward(SINGLE, complete=False)
    [(start, end)] = rendered.spans
    assert rendered.text[start:end].strip() == "Four." and end == len(rendered.text)


@pytest.mark.parametrize("style", ALL)
@pytest.mark.parametrize(("asked", "answered"), list(itertools.product(NASTY, NASTY)))
def test_T11_separators_inside_a_text_never_move_the_mask(
    style: str, asked: str, answered: str
) -> None:
    template = template_of(style)
    first, second = supervised(
        template, [user(asked), assistant(answered), user(asked), assistant(answered)]
    )
    safe = neutralise(answered, template.control_tokens)
    eos = template.eos_texts[0]
    for span in (first, second):
        assert span.removesuffix(eos).strip() == safe.strip()
    assert second.endswith(eos)


def test_white_space_around_an_answer_is_kept_or_lost_exactly_as_the_template_does() -> None:
    messages = [user("q"), assistant("\n  indented answer \n")]
    assert supervised(template_of("chatml"), messages) == ["\n  indented answer \n<|im_end|>"]
    assert supervised(template_of("llama2"), messages) == [" indented answer </s>"]
    assert supervised(template_of("llama3"), messages) == ["indented answer<|eot_id|>"]


def test_space_that_the_template_writes_before_an_answer_is_the_models_to_write() -> None:
    # A prompt ends with "ASSISTANT:"; tokenizers join the space to the first word of the answer.
    assert supervised(template_of("vicuna"), SINGLE) == [" Four.</s>"]


# --- special tokens ---


@pytest.mark.parametrize("style", ALL)
@pytest.mark.parametrize("messages", [SINGLE, MULTI], ids=["single", "multi"])
def test_bos_stands_at_the_start_exactly_once(style: str, messages: list[dict[str, str]]) -> None:
    tokenizer = styled("llama2" if style == "plain" else style)
    template = template_of(style)
    for text in (template.forward(messages).text, template.backward_prompt("Some text.")):
        ids = tokenizer.encode(text)
        if tokenizer.add_bos:
            assert ids[0] == tokenizer.bos_id
            assert ids[1] != tokenizer.bos_id
            turns = len(messages) // 2 if style == "llama2" else 1  # Llama 2 repeats it per turn
            assert ids.count(tokenizer.bos_id or 0) <= turns
        else:
            assert template.bos_text == ""


@pytest.mark.parametrize("style", ALL)
@pytest.mark.parametrize("content", NASTY)
def test_document_that_spells_control_tokens_cannot_forge_a_turn(style: str, content: str) -> None:
    tokenizer = styled("llama2" if style == "plain" else style)
    template = template_of(style)
    control = {tokenizer.id_of(token) for token in template.control_tokens}

    def structure(text: str) -> list[int]:
        return [i for i in tokenizer.encode(text) if i in control]

    nasty = template.forward([user(content), assistant(content)]).text
    harmless = template.forward([user("x"), assistant("y")]).text
    assert structure(nasty) == structure(harmless)
    assert structure(template.backward_prompt(content)) == structure(template.backward_prompt("x"))
    assert structure(template.rubric_prompt(content, content)) == structure(
        template.rubric_prompt("x", "y")
    )


@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", "s", ">", "</s>", "a", "é"])))
def test_no_control_token_survives_neutralising_and_the_text_looks_the_same(
    parts: list[str],
) -> None:
    marks = ("<|im_end|>", "</s>", "<s>", "<<s>")
    text = "".join(parts)
    safe = neutralise(text, marks)
    assert not any(mark in safe for mark in marks)
    assert safe.replace(JOINER, "") == text
    if not any(mark in text for mark in marks):
        assert safe == text


def test_breaking_one_control_token_cannot_leave_another() -> None:
    marks = ("<s>", "<<s>")
    assert not any(mark in neutralise("<<s>", marks) for mark in marks)


def test_control_token_of_one_character_is_refused_not_ignored() -> None:
    with pytest.raises(HumpbackError, match="one character"):
        neutralise("a\x00b", ("\x00",))


# --- agreement with transformers ---


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    loaded = {}
    for style in STYLES:
        folder: Path = tmp_path_factory.mktemp(style)
        styled(style).save(folder)
        loaded[style] = transformers.AutoTokenizer.from_pretrained(folder)
    return loaded


def reference_text(tokenizer: Any, messages: Any, prompt: bool, **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, **options
    )
    return text


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("messages", [SINGLE, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("system", [None, "Speak like a pirate."])
def test_prompts_are_those_of_apply_chat_template(
    references: dict[str, Any], style: str, messages: list[dict[str, str]], system: str | None
) -> None:
    date = {"date_string": "26 Jul 2024"} if style == "llama3" else {}
    template = template_of(style)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    theirs = reference_text(references[style], messages[:-1], True, **date)
    whole = reference_text(references[style], messages, False, **date)
    if style == "zephyr" or style == "vicuna":  # templates that leave BOS to the tokenizer
        theirs, whole = f"<s>{theirs}", f"<s>{whole}"
    assert template.forward_prompt(messages[:-1]) == theirs
    ours = template.forward(messages).text
    assert whole.startswith(ours.removesuffix("</s>") if style == "alpaca" else ours)


@pytest.mark.parametrize("style", ALL)
@pytest.mark.parametrize("tags", TAG_TEXT)
@pytest.mark.parametrize("system", [None, 'A "system" message with {braces} and \\n'])
def test_exported_chat_template_prompts_other_clients_as_we_do(
    tmp_path: Path, style: str, tags: Tags, system: str | None
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = styled("llama2" if style == "plain" else style)
    name = "plain" if style == "plain" else "chat"
    template = Template.for_tokenizer(tokenizer, name=name, system=system)  # type: ignore[arg-type]
    tokenizer.with_chat_template(baked_chat_template(template, tags)).save(tmp_path)
    client = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in (SINGLE[:-1], MULTI[:-1], [user("")]):
        assert reference_text(client, messages, True) == template.forward_prompt(messages, tags)
    whole = reference_text(client, MULTI, False)
    assert whole.startswith(template.forward(MULTI, tags).text.removesuffix("</s>"))
    spoken = [{"role": "system", "content": "Own."}, *MULTI[:-1]]
    assert reference_text(client, spoken, True) == template.forward_prompt(spoken, tags)


def test_prompt_does_not_change_at_midnight(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = template_of("llama3").forward_prompt(SINGLE[:-1])
    assert "Today: 26 Jul 2024" in prompt
    assert datetime.date.today().strftime("%d %b %Y") not in prompt


@pytest.mark.parametrize(
    "date",
    [
        "strftime_now('%d %b %Y')",
        'strftime_now( "%A, %-d.%m." ) | upper',
        "strftime_now(format='%Y-%m-%d')",
        "strftime_now(shape) ~ strftime_now('%H:%M')",
    ],
)
def test_exported_template_writes_the_date_of_training_however_it_asks_for_it(
    tmp_path: Path, date: str
) -> None:
    transformers = pytest.importorskip("transformers")
    source = "{% set shape = '%j' %}{{ " + date + " }}{{ messages[-1]['content'] }}"
    tokenizer = styled("chatml").with_chat_template(source)
    template = Template.for_tokenizer(tokenizer)
    tokenizer.with_chat_template(baked_chat_template(template, "none")).save(tmp_path)
    client = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reference_text(client, SINGLE[:-1], True) == template.forward_prompt(SINGLE[:-1])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}"
        "{% endfor %}",
        "{{ messages[0].content.split('e') | join('-') }}{{ tools is none }}",
        "  {% if true %}\n  x\n  {% endif %}\n",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ ns.n }}{{ missing_name }}{{ add_generation_prompt }}",
    ],
)
def test_jinja_dialect_is_that_of_transformers(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [user("<b>é & 'quotes'</b>"), assistant("two")]
    theirs = utils.render_jinja_template([messages], chat_template=source)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert [render_chat(source, messages, {}, False)] == list(theirs)


# --- refusals ---


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "end with an assistant"),
        ([user("x")], "end with an assistant"),
        ([assistant("x")], "user message"),
        ([user("x"), {"role": "tool", "content": "y"}, assistant("z")], "'tool'"),
        ([user("x"), {"role": "assistant", "content": None}], "NoneType"),
        ([user("x"), {"role": "assistant"}], "NoneType"),
    ],
)
def test_malformed_conversations_are_named(messages: Any, problem: str) -> None:
    with pytest.raises(HumpbackError, match=problem):
        template_of("chatml").forward(messages)


def test_prompt_that_ends_with_an_answer_is_refused() -> None:
    with pytest.raises(HumpbackError, match="end with a user"):
        template_of("chatml").forward_prompt(SINGLE)


@pytest.mark.parametrize(
    ("source", "messages", "problem"),
    [
        ("{{ messages[-1].content }}", MULTI, "different text in training"),
        (
            "{% for m in messages %}{{ m.role + ':' + (m.content if loop.last else '') }}"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
            MULTI,
            "chat template",
        ),
        (
            "{% for m in messages %}{{ '<' + m.role + '>' + m.content | upper }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            SINGLE,
            "Four",
        ),
        (  # no header for the generation prompt
            "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
            SINGLE,
            "assistant: Four",
        ),
        ("{{ raise_exception('only system here') }}", SINGLE, "only system here"),
        ("{% for %}", SINGLE, "syntax"),
        ("{{ messages.nothing.at.all }}", SINGLE, "refuses"),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused_with_the_reason(
    source: str, messages: list[dict[str, str]], problem: str
) -> None:
    with pytest.raises(HumpbackError, match=problem):
        with_source(source).forward(messages)


# Like DeepSeek-R1-Distill-Llama's: a prompt opens the model's thoughts, which finished turns lack.
THINKING = CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thinking")
    model = load_model("tiny-random")
    tokenizer = model.tokenizer.with_chat_template(THINKING)
    export_hf(folder, dataclasses.replace(model, template=Template.for_tokenizer(tokenizer)))
    (folder / "pairs.jsonl").write_text('{"instruction": "Name a colour.", "output": "Blue."}\n')
    return folder


@pytest.mark.parametrize(
    "verb",
    [
        ["score", "--curator=pmi", "--data=DIR/pairs.jsonl", "--out=OUT/rated.jsonl"],
        ["evaluate", "--data=DIR/pairs.jsonl"],
    ],
    ids=["score", "evaluate"],
)
def test_model_whose_prompts_open_with_thoughts_is_measured_by_the_advice_of_the_refusal(
    thinking_model: Path,
    tmp_path: Path,
    verb: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    paths = {"DIR": str(thinking_model), "OUT": str(tmp_path)}
    verb = [re.sub("DIR|OUT", lambda found: paths[found[0]], part) for part in verb]
    command = [*verb, f"--model={thinking_model}"]
    assert main(command) == 1
    [advice] = re.findall(r"--template=\w+", capsys.readouterr().err)
    assert main([*command, advice]) == 0


def test_sample_asks_in_the_wording_that_it_is_told_to(
    thinking_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    asked: list[str] = []

    def answer(reader: Any, prompts: Any, job: Any) -> list[dict[str, str]]:
        asked.append(reader.model.template.name)
        return []

    monkeypatch.setattr("humpback_jax.verbs.sample.answer_prompts", answer)
    command = ["sample", "--prompt=Hi", f"--model={thinking_model}"]
    for extra in ([], ["--template=auto"], ["--template=chat"], ["--template=plain"]):
        assert main([*command, *extra]) == 0
    assert asked == ["chat", "chat", "chat", "plain"]


def test_checkpoint_is_not_prompted_in_another_wording_than_it_was_trained_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    save_checkpoint(tmp_path / "model", load_model("tiny-random"), {})
    assert main(["sample", "--prompt=Hi", f"--model={tmp_path}/model", "--template=plain"]) == 1
    assert "prompted as it was trained" in capsys.readouterr().err


def test_downloaded_template_cannot_reach_outside_its_sandbox() -> None:
    with pytest.raises(HumpbackError, match="refuses"):
        with_source("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}").forward(SINGLE)


# --- identity ---


def test_saved_template_renders_the_same_and_has_the_same_hash() -> None:
    for style in ALL:
        template = template_of(style)
        again = Template.from_json(template.to_json())
        assert again == template and again.content_hash() == template.content_hash()
        assert again.forward(MULTI, "both") == template.forward(MULTI, "both")


def test_mixing_templates_is_an_error_that_names_what_differs() -> None:
    a = template_of("chatml")
    require_same_template(a, template_of("chatml"), "round_1")
    b = Template.for_tokenizer(styled("chatml"), system="Other")
    with pytest.raises(HumpbackError, match=r"round_1.*system"):
        require_same_template(a, b, "round_1")
    assert a.content_hash() != b.content_hash()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "x": 2}'])
def test_unreadable_saved_template_is_named(text: str) -> None:
    with pytest.raises(HumpbackError, match=r"ckpt/template\.json"):
        Template.from_json(text, "ckpt/template.json")


def test_chat_is_chosen_where_the_tokenizer_has_a_template_and_plain_otherwise() -> None:
    chat = styled("chatml")
    base = Tokenizer(chat.backend, chat.special_tokens)
    assert Template.for_tokenizer(chat).name == "chat"
    plain = Template.for_tokenizer(base)
    assert plain.name == "plain"
    assert plain.forward(SINGLE).text == (
        "### Request\nWhat is two plus two?\n\n### Answer\nFour.<|im_end|>"
    )
    with pytest.raises(HumpbackError, match="plain"):
        Template.for_tokenizer(base, name="chat")
