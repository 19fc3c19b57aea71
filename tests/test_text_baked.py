"""Chat templates with our steps baked in: if these fail, a model that comes back from an export is
prompted with its tags twice, or with none.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from text_styles import ALL, STYLES, template_of

from humpback_jax.errors import HumpbackError
from humpback_jax.models import export_hf, load_model
from humpback_jax.text.baked import baked_chat_template, unbaked
from humpback_jax.text.template import S_A, TAG_TEXT, Tags


@pytest.mark.parametrize("style", ALL)
@pytest.mark.parametrize("tags", TAG_TEXT)
@pytest.mark.parametrize("system", [None, 'A "system" message with {braces} and \\n'])
def test_exported_tags_stay_in_the_chat_template_of_a_model_that_comes_back(
    style: str, tags: Tags, system: str | None
) -> None:
    template = dataclasses.replace(template_of(style), system=system)
    found = unbaked(baked_chat_template(template, tags))
    bos = "<s>" if style in ("zephyr", "vicuna", "plain") else None
    assert found == (template.chat_template, tags, system, bos)


def test_steps_of_another_version_stay_in_a_chat_template_unseen() -> None:
    source = baked_chat_template(template_of("chatml"), "S_a")
    for known, other in ((S_A, "Write as a poet."), ("loop.index0", "loop.index")):
        with pytest.raises(HumpbackError, match="this version"):
            unbaked(source.replace(known, other))


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_model_exported_and_read_back_is_prompted_with_its_tags_twice(
    tmp_path: Path, template: str
) -> None:
    model = dataclasses.replace(load_model("tiny-random", template), tags="both")
    export_hf(tmp_path, model)
    back = load_model(str(tmp_path))
    assert (back.tags, back.template) == ("both", model.template)
    assert load_model(str(tmp_path), "plain").tags == "both"
    again = tmp_path / "again"
    export_hf(again, back)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_export_without_anything_to_add_is_the_models_own_template() -> None:
    assert baked_chat_template(template_of("chatml"), "none") == STYLES["chatml"][0]
