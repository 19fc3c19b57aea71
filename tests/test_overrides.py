"""Overrides: if these fail, a setting of the command line is mistyped or ignored in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from humpback_jax.config import default_config, load_config
from humpback_jax.errors import HumpbackError
from humpback_jax.overrides import apply_overrides

ROOT = Path(__file__).resolve().parent.parent
PAPER = str(ROOT / "configs" / "humpback.py")
TINY = str(ROOT / "configs" / "tiny.py")


def overridden(overrides: dict[str, list[str]], path: str = TINY) -> Any:
    config = load_config(path)
    apply_overrides(config, overrides)
    return config


def refused(overrides: dict[str, list[str]], path: str = TINY) -> str:
    with pytest.raises(HumpbackError) as caught:
        overridden(overrides, path)
    return str(caught.value)


def test_overrides_take_the_type_of_the_field():
    config = overridden(
        {
            "train.steps": ["7"],
            "train.learning_rate": ["2"],
            "train.checkpoint_epochs": ["TRUE"],
            "data.skip_bad": ["0"],
            "name": ["12"],
            "corpus.documents": ["a.txt,b.txt", "c.txt"],
            "curate.also": ["pmi"],
            "train.lora.rank": ["4"],
            "train.lora.targets": ["q,k"],
            "meters.min_lift": ["-0.5"],
        },
    )
    assert config.train.steps == 7
    assert config.train.learning_rate == 2.0 and isinstance(config.train.learning_rate, float)
    assert (
        config.train.checkpoint_epochs is True
        and config.data.skip_bad is False
        and config.name == "12"
    )
    assert config.corpus.documents == ("a.txt", "b.txt", "c.txt")
    assert config.curate.also == ("pmi",) and config.train.lora.targets == ("q", "k")
    assert config.meters.min_lift == -0.5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.steps", "many", "--config.train.steps=many: the value must be of type int"),
        ("train.steps", "1.5", "must be of type int"),
        ("train.dropout", "x", "must be of type float"),
        ("train.dropout", "nan", "must be of type float"),
        ("train.learning_rate", "inf", "must be of type float"),
        ("train.checkpoint_epochs", "maybe", "must be of type bool"),
        ("train.stepz", "1", "unknown key 'stepz' in config.train (did you mean 'steps'?)"),
        ("trian.steps", "1", "unknown key 'trian' in config (did you mean 'train'?)"),
        ("train.steps.more", "1", "unknown key 'more' in config.train.steps"),
        ("train", "1", "is a section"),
        ("train.lora", "1", "is a section"),
        ("train.step_table", "1,2", "is a table"),
    ],
)
def test_a_mistyped_override_is_refused_with_its_key(key, value, message):
    assert message in refused({key: [value]})


@pytest.mark.parametrize(
    ("path", "told", "reason"),
    [
        (PAPER, "train.batch_examples=4", "the step table gives batch and steps"),
        (PAPER, "backward.batch_examples=4", "add --config.backward.epochs"),
        (TINY, "train.epochs=2", "beside config.train.steps=8; set that to 0"),
        (PAPER, "backward.epochs=2 backward.steps=5", "beside config.backward.steps=5"),
        (PAPER, "curate.fraction=0.1", "add --config.curate.select=top_fraction"),
        (PAPER, "curate.count=100", "add --config.curate.select=count"),
        (TINY, "curate.threshold=0.5", "with config.curate.select=top_fraction"),
        (TINY, "train.decay_share=0.2", "add --config.train.schedule=wsd"),
        (
            TINY,
            "train.schedule=constant train.end_learning_rate=1e-6",
            "with config.train.schedule=constant; add --config.train.schedule=linear|cosine|wsd",
        ),
        (TINY, "train.optimizer=adafactor train.beta1=0.8", "config.train.optimizer=adafactor"),
        (TINY, "train.optimizer=lion train.epsilon=0.1", "config.train.optimizer=adamw|adamw_bf16"),
        (TINY, "train.dropout=0 train.dropout_ramp=true", "add --config.train.dropout"),
        (TINY, "curate.temperature=1", "add --config.curate.also=rubric"),
        (TINY, "curate.top_p=0.5", "no curator writes"),
        (TINY, "curate.max_new_tokens=64", "no curator writes"),
        (TINY, "curate.also= curate.also_limit=5", "add --config.curate.also"),
        (TINY, "curate.also=pmi curate.also_limit=5", "without further curators"),
        (
            TINY,
            "train.eval_every=0 backward.eval_every=0 data.validation=x",
            "add --config.train.eval_every",
        ),
    ],
)
def test_an_override_that_another_setting_wins_over_is_silently_ignored(
    path: str, told: str, reason: str
) -> None:
    overrides = {key: [value] for key, _, value in (part.partition("=") for part in told.split())}
    message = refused(overrides, path)
    assert f"--config.{list(overrides)[-1 if 'steps' not in told else 0]} has no effect" in message
    assert reason in message and message.endswith("leave it out.")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (PAPER, "train.batch_examples=4 train.epochs=1 backward.batch_examples=4 backward.steps=9"),
        (PAPER, "curate.threshold=4 curate.temperature=1 train.dropout_ramp=true"),
        (PAPER, "curate.select=count curate.count=100 curate.also_limit=5"),
        (TINY, "train.epochs=2 train.steps=0 curate.fraction=0.1"),
        (TINY, "train.schedule=wsd train.decay_share=0.2 train.end_learning_rate=0"),
        (TINY, "train.schedule=cosine train.end_learning_rate=0 train.beta1=0.8"),
        (TINY, "meters.curators=rubric curate.max_new_tokens=64"),
        (TINY, "train.steps=3 train.epochs=0 train.dropout=0 train.dropout_ramp=false"),
    ],
)
def test_an_override_that_counts_is_refused(path: str, told: str) -> None:
    pairs = [part.partition("=") for part in told.split()]
    assert overridden({key: [value] for key, _, value in pairs}, path)


def test_a_config_file_is_refused_for_a_default_that_it_does_not_use() -> None:
    config = default_config()
    config.curate.select = "top_fraction"
    config.train.steps = 5
    apply_overrides(config, {"curate.fraction": ["0.5"]})
    assert (config.train.epochs, config.curate.threshold) == (0.0, 5.0)
