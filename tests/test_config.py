"""Configs: if these fail, a setting is ignored, mistyped in silence, or refused hours too late."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_reads import fields_read

from humpback_jax.compute import choose_compute
from humpback_jax.config import (
    WITHOUT_EFFECT,
    apply_tiny,
    check_config,
    check_data,
    default_config,
    effective_fields,
    load_config,
    train_section,
)
from humpback_jax.curators import SCALES
from humpback_jax.errors import HumpbackError
from humpback_jax.overrides import apply_overrides, set_field
from humpback_jax.stages.settings import train_spec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
TINY = str(ROOT / "configs" / "tiny.py")


def leaves(section, prefix=""):
    for name, value in section.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def refused(key: str, *values: str) -> str:
    with pytest.raises(HumpbackError) as caught:
        apply_overrides(load_config(TINY), {key: list(values)})
    return str(caught.value)


def test_a_field_is_accepted_and_never_read():
    read = fields_read()
    for key, _ in leaves(default_config()):
        assert key.replace("backward.", "train.") in read, key
    for never in ("train.count", "curate.steps", "corpus.seed", "data.name", "evaluate.pairs"):
        assert never not in read, "a field counts as read where another section's is"


def test_fields_without_effect_exist():
    names = {key.rpartition(".")[2] for key, _ in leaves(default_config())}
    assert set(WITHOUT_EFFECT) <= names


def test_the_defaults_are_the_papers_settings():
    config = default_config()
    train = config.train
    assert (train.learning_rate, train.end_learning_rate, train.weight_decay) == (1e-5, 9e-6, 0.1)
    assert (train.dropout, train.batch_examples, train.schedule) == (0.1, 32, "linear")
    assert (3200, 32, 500) in train.step_table and (100, 8, 30) in train.step_table
    assert (config.augment.temperature, config.augment.top_p) == (0.7, 0.9)
    assert (config.curate.curator, config.curate.threshold, config.rounds) == ("rubric", 5.0, 2)
    assert (config.corpus.min_chars, config.corpus.max_chars) == (600, 3000)
    check_config(config)


def test_a_data_set_below_3000_examples_is_trained_in_batches_of_32_for_too_many_epochs():
    compute, section = choose_compute("float32", 1), default_config().train
    for count in (1600, 1601, 2999, 3000):
        spec = train_spec(section, compute, 0, count)
        assert spec.batch_examples == (8 if count < 3000 else 32)  # Humpback, section 3.1
    epochs = [batch * steps / count for count, batch, steps in section.step_table]
    place = [count for count, _, _ in section.step_table].index(2999)
    assert epochs[place - 1] <= epochs[place] <= epochs[place + 1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_rehearsed(path):
    whole = load_config(str(path))
    tiny = load_config(f"{path}:tiny")
    assert tiny.base.model == "tiny-random" and tiny.meters.action == "warn"
    assert tiny.curate.curator == "pmi" and tiny.curate.select == "top_fraction"
    assert tiny.corpus.segments <= 16
    assert 0 < tiny.train.steps <= 20 and 0 < tiny.backward.steps <= 20
    assert {key for key, _ in leaves(whole)} == {key for key, _ in leaves(tiny)}
    types = {key: type(value) for key, value in leaves(default_config())}
    for config in (whole, tiny):
        assert {key: type(value) for key, value in leaves(config)} == types


def test_arguments_combine_and_unknown_ones_are_refused():
    path = str(ROOT / "configs" / "humpback.py")
    config = load_config(f"{path}:llama2_70b,tiny")
    assert "llama2_70b" in config.name and config.base.model == "tiny-random"
    for size in ("7b", "13b", "33b", "65b", "llama2_7b", "llama2_70b", "llama3_8b", "tinyllama"):
        assert size in load_config(f"{path}:{size}").name
    with pytest.raises(HumpbackError, match="did you mean 'llama2_7b'"):
        load_config(f"{path}:lama2_7b")
    with pytest.raises(HumpbackError, match="choose one base"):
        load_config(f"{path}:7b,13b")


def test_the_paper_s_experiment_runs_for_hours_on_the_demo_s_data() -> None:
    path = str(ROOT / "configs" / "humpback.py")
    wanted = "--config.data.seed=FILE --config.data.heldout=FILE --config.corpus.documents=FILE"
    with pytest.raises(HumpbackError, match=wanted):
        check_data(load_config(path))
    own = {"data.seed": ["a.jsonl"], "data.heldout": ["b.jsonl"], "corpus.documents": ["c.jsonl"]}
    config, tiny = load_config(path), load_config(f"{path}:tiny")
    apply_overrides(config, own)
    check_data(config)
    apply_overrides(tiny, {"data.seed": ["a.jsonl"]})
    assert (tiny.data.seed, tiny.data.heldout) == ("a.jsonl", "builtin")
    check_data(tiny)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("meters.action", "abort", "known: stop, warn"),
        ("curate.select", "best", "known: absolute, top_fraction, count"),
        ("curate.curator", "pmy", "did you mean 'pmi'"),
        ("curate.also", "pmi,rubrik", "did you mean 'rubric'"),
        ("meters.curators", "x", "config.meters.curators='x'"),
        ("evaluate.tags", "S_b", "config.evaluate.tags='S_b'"),
        ("train.on_long", "cut", "known: error, drop, truncate"),
        ("train.optimizer", "adam", "known: adamw, adamw_bf16, adafactor, lion"),
        ("train.remat", "true", "known: none, full, named, offload"),
        ("train.decay_share", "0", "above 0 and at most 1"),
        ("backward.schedule", "linaer", "did you mean 'linear'"),
        ("compute.precision", "float16", "known: auto, float32, bfloat16"),
        ("compute.weights", "int4", "known: auto, int8"),
        ("compute.kv", "int4", "known: auto, int8"),
        ("base.template", "chatml", "known: auto, chat, plain"),
        ("rounds", "-1", "must be at least 0"),
        ("augment.temperature", "-0.1", "must be at least 0"),
        ("augment.top_p", "0", "above 0 and at most 1"),
        ("curate.fraction", "1.5", "above 0 and at most 1"),
        ("augment.shard_rows", "0", "must be at least 1"),
        ("train.batch_examples", "0", "must be at least 1"),
        ("train.dropout", "1.0", "must be at least 0 and below 1"),
        ("train.label_smoothing", "1.5", "must be at least 0 and below 1"),
        ("train.log_every", "0", "must be at least 1"),
        ("corpus.min_chars", "9000", "is above config.corpus.max_chars"),
        ("curate.select", "count", "needs config.curate.count"),
        ("evaluate.tags", "", "config.evaluate.tags is empty"),
        ("meters.pairs", "1", "must be at least 2"),
    ],
)
def test_a_value_that_a_late_stage_would_refuse_or_misread_is_refused_at_once(key, value, message):
    assert message in refused(key, value)


@pytest.mark.parametrize(
    ("curator", "threshold"),
    [
        ("rubric", 5.5),
        ("rubric", 0.9),
        ("rubric_likelihood", 5.0),
        ("pmi", 5.0),
        ("pmi_frozen", 5.0),
        ("combined", 1.0),
        ("combined", -0.1),
    ],
)
def test_a_cut_that_takes_no_pair_or_every_pair_is_refused_before_the_hours_that_it_costs(
    curator, threshold
):
    config = default_config()
    config.curate.update({"curator": curator, "select": "absolute", "threshold": threshold})
    with pytest.raises(HumpbackError) as caught:
        check_config(config)
    message = str(caught.value)
    assert f"config.curate.threshold={threshold}" in message and repr(curator) in message
    assert SCALES[curator].text in message and "top_fraction" in message
    config.curate.select = "top_fraction"
    check_config(config)


@pytest.mark.parametrize(
    ("curator", "thresholds"),
    [
        ("rubric", (1.0, 4.0, 5.0)),
        ("rubric_likelihood", (1.0, 4.9)),
        ("pmi", (-0.2, 0.0, 1.5)),
        ("pmi_frozen", (0.3,)),
        ("combined", (0.0, 0.9)),
    ],
)
def test_every_cut_within_the_range_of_its_curator_is_taken(curator, thresholds):
    config = default_config()
    for threshold in thresholds:
        config.curate.update({"curator": curator, "select": "absolute", "threshold": threshold})
        check_config(config)


def test_a_setting_that_an_unlocked_config_file_misspells_is_refused_and_not_ignored(tmp_path):
    path = tmp_path / "own.py"
    for line, message in (
        (
            'config.train.update({"learning_rat": 1e-3})',
            r"config\.train\.learning_rat is unknown \(did you mean 'train\.learning_rate'\?\)",
        ),
        ('config.trian = {"steps": 3}', r"config\.trian\.steps is unknown.*'train\.steps'"),
        ("del config.backward.steps", r"config\.backward\.steps is missing"),
        ("del config.curate", r"config\.curate\.also is missing"),
        ("config.train.steps = None", r"config\.train\.steps is missing"),
    ):
        path.write_text(
            "from humpback_jax.config import default_config\n\n\n"
            "def get_config():\n    config = default_config()\n"
            f"    with config.unlocked():\n        {line}\n    return config\n"
        )
        with pytest.raises(HumpbackError, match=message):
            apply_overrides(load_config(str(path)), {})


def test_missing_and_failing_config_files_are_named(tmp_path):
    with pytest.raises(HumpbackError, match=r"none\.py does not exist"):
        load_config(str(tmp_path / "none.py"))
    for body, message in (("1 / 0", "ZeroDivisionError"), ("x = 1", "get_config"), ("(", "Syntax")):
        path = tmp_path / "broken.py"
        path.write_text(body)
        with pytest.raises(HumpbackError, match=message):
            load_config(str(path))


def test_a_config_file_cannot_add_or_retype_fields(tmp_path):
    path = tmp_path / "own.py"
    for line in ("config.train.stepz = 3", "config.train.steps = 'many'"):
        path.write_text(
            "from humpback_jax.config import default_config\n\n\n"
            f"def get_config():\n    config = default_config()\n    {line}\n    return config\n"
        )
        with pytest.raises(HumpbackError, match=r"own\.py failed"):
            load_config(str(path))


def test_settings_that_change_only_what_is_shown_leave_keys_alone():
    before = effective_fields(default_config().train)
    config = default_config()
    set_field(config, "train.log_every", ["5"])
    set_field(config, "train.eval_every", ["5"])
    assert effective_fields(config.train) == before
    set_field(config, "train.dropout", ["0.2"])
    assert effective_fields(config.train) != before
    assert set(before) == set(train_section()) - set(WITHOUT_EFFECT)


def test_a_rehearsal_of_changed_settings_is_as_small():
    config = default_config()
    with config.unlocked():
        config.train.steps, config.corpus.limit, config.compute.batch_size = 10**6, 0, 512
    apply_tiny(config)
    assert 0 < config.train.steps <= 20 and 0 < config.corpus.limit <= 20
    assert config.compute.batch_size <= 8


def test_how_often_validation_looks_decides_nothing_unless_it_selects() -> None:
    section = default_config().train
    section.eval_every = 5
    before = effective_fields(section)
    section.eval_every = 7
    assert effective_fields(section) == before
    section.select = "best"
    selected = effective_fields(section)
    section.eval_every = 5
    assert effective_fields(section) != selected


def test_the_best_of_no_measurement_is_asked_for() -> None:
    config = default_config()
    config.train.select = "best"
    with pytest.raises(HumpbackError, match=r"config\.train\.eval_every, at least 1"):
        check_config(config)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_a_lower_rate_than_the_last_one_makes_the_rate_rise_in_silence(schedule):
    """A sweep over `learning_rate` alone: the last rate is absolute."""
    told = refused("train.learning_rate", "2e-6")
    assert "train.end_learning_rate=0.01 is above config.train.learning_rate=2e-06" in told
    config = load_config(TINY)
    both = {"train.learning_rate": ["2e-6"], "train.end_learning_rate": ["1e-6"]}
    apply_overrides(config, {**both, "train.schedule": [schedule]})
    config = load_config(TINY)
    apply_overrides(config, {"train.learning_rate": ["2e-6"], "train.schedule": ["constant"]})
