"""Meters: if these fail, a curator that sees no difference is trusted, or a good one is stopped."""

from __future__ import annotations

import dataclasses
import difflib
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from humpback_jax.artifacts import Artifact, RunFolder
from humpback_jax.compute import choose_compute
from humpback_jax.config import apply_tiny, default_config
from humpback_jax.curators import PairText, Rating
from humpback_jax.errors import HumpbackError
from humpback_jax.evaluation import meters
from humpback_jax.evaluation.meters import (
    PROMOTIONS,
    copy_rate,
    corruptions,
    curation_meter,
    echoes,
)
from humpback_jax.inference import Inference
from humpback_jax.models import load_model
from humpback_jax.records import Example, Message
from humpback_jax.stages import measure
from humpback_jax.stages.context import Context
from humpback_jax.stages.heldout import fitting_pairs, meter_pairs


def example(name: str, x: str, y: str) -> Example:
    return Example(name, (Message("user", x), Message("assistant", y)), "seed")


EXAMPLES = [
    example(f"e{i}", f"Question {i}?", f"Answer {i} begins here.\n\nIt goes on and ends.")
    for i in range(8)
]
PAIRS = st.lists(
    st.tuples(st.sampled_from("abc"), st.text("xyz \n", min_size=1, max_size=12)),
    min_size=2,
    max_size=9,
).filter(lambda rows: len({x for x, _ in rows}) > 1)


@given(PAIRS)
def test_a_shuffled_pair_never_keeps_its_own_instruction(rows):
    examples = [example(str(i), x, y) for i, (x, y) in enumerate(rows)]
    kinds = corruptions(examples)
    for true, shuffled in zip(kinds["true"], kinds["shuffled"], strict=True):
        assert shuffled.instruction != true.instruction and shuffled.response == true.response
        assert shuffled.instruction in {e.instruction for e in examples}
    assert len({p.id for pairs in kinds.values() for p in pairs}) == 4 * len(examples)


def test_broken_pairs_are_the_same_every_time_whatever_the_order_of_the_rows():
    def by_id(examples: list[Example]) -> dict[str, PairText]:
        return {p.id: p for pairs in corruptions(examples).values() for p in pairs}

    assert by_id(EXAMPLES) == by_id(EXAMPLES[::-1])


def test_each_corruption_does_what_its_name_says():
    kinds = corruptions(EXAMPLES)
    for i, e in enumerate(EXAMPLES):
        truncated, promo = kinds["truncated"][i], kinds["promo"][i]
        assert e.response.endswith(truncated.response)
        assert 0.3 < len(truncated.response) / len(e.response) < 0.8
        assert sum(text in promo.response for text in PROMOTIONS) == 2
        assert truncated.instruction == promo.instruction == e.instruction
        assert len({truncated.response, promo.response, kinds["true"][i].response}) == 3


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_different_pairs_are_an_error_and_no_figure(count):
    same = [example(str(i), "The same?", f"y{i}") for i in range(count)]
    with pytest.raises(HumpbackError, match=f"has {count} held-out pairs and needs two"):
        corruptions(same)


def rated(score: Any) -> Any:
    return lambda pairs: [Rating(p.id, "x", score(p), "{}") for p in pairs]


def test_the_meter_is_the_share_of_true_pairs_above_broken_ones():
    generator = np.random.default_rng(0)
    values: dict[str, float] = {}

    def score(pair: PairText) -> float:
        return values.setdefault(pair.id, float(generator.integers(1, 6)))

    found = curation_meter(rated(score), EXAMPLES)
    for kind, meter in found.items():
        true = [values[e.id] for e in EXAMPLES]
        broken = [values[f"{e.id}/{kind}"] for e in EXAMPLES]
        wins = [(t > b) + 0.5 * (t == b) for t in true for b in broken]
        assert meter.auc == pytest.approx(np.mean(wins)) and meter.n == 8
    assert set(found) == {"shuffled", "truncated", "promo"}


def test_unparsed_ratings_count_lowest_and_all_unparsed_means_no_information():
    perfect = curation_meter(rated(lambda p: None if "/" in p.id else 1.0), EXAMPLES)
    assert {m.auc for m in perfect.values()} == {1.0}
    worst = curation_meter(rated(lambda p: -9.0 if "/" in p.id else None), EXAMPLES)
    assert {m.auc for m in worst.values()} == {0.0}
    blind = curation_meter(rated(lambda p: None), EXAMPLES)
    assert {m.auc for m in blind.values()} == {0.5}


@given(st.text("ab 🦀", max_size=30), st.text("ab 🦀", max_size=60))
def test_the_copy_rate_is_the_longest_common_run(instruction, response):
    match = difflib.SequenceMatcher(None, instruction, response, autojunk=False)
    longest = match.find_longest_match().size
    expected = longest / len(instruction) if instruction else 0.0
    assert copy_rate(instruction, response) == pytest.approx(expected)


def test_the_copy_rate_of_a_long_pair_takes_milliseconds():
    import time

    x, y = ("why " * 200)[:800], ("The water boils. " * 180)[:3000]
    started = time.process_time()
    for _ in range(10):
        copy_rate(x, y)
    assert time.process_time() - started < 1.0


def test_an_instruction_that_repeats_the_prompt_is_an_echo_and_a_question_is_not():
    template = load_model("tiny-random").template
    words = template.backward_text.replace("{response}", "").split()
    assert echoes(" ".join(words[3:9]).upper() + "!", template)
    assert not echoes(" ".join(words[3:6]), template)
    assert not echoes("Which instruction do I follow to boil water on a mountain?", template)
    assert not echoes("", template)


def context(tmp_path: Any, action: str, **limits: float) -> tuple[Context, list[str]]:
    config = default_config()
    apply_tiny(config)
    config.meters.update({"action": action, "pairs": 4, "curators": (), **limits})
    said: list[str] = []
    folder = RunFolder(tmp_path / "run", say=lambda text: None)
    log: Any = None  # meters log nothing
    compute = choose_compute("float32", 4)
    base = load_model("tiny-random")
    return Context(config, folder, compute, base, [], EXAMPLES, log, said.append), said


def base_of(context: Context) -> Artifact:
    return context.base_artifact


def test_a_blind_curator_stops_the_run_or_warns_as_asked_and_is_measured_once(
    tmp_path, monkeypatch
):
    asked: list[int] = []

    def blind(curator: str, reader: Inference, pairs: Any, *_: Any) -> list[Rating]:
        asked.append(len(pairs))
        return [Rating(p.id, curator, 1.0, "{}") for p in pairs]

    monkeypatch.setattr(measure, "rate", blind)
    stopping, _ = context(tmp_path, "stop", min_auc=0.6)
    with pytest.raises(HumpbackError, match=r"AUC 0\.50 is below 0\.6.*meters\.action=warn"):
        measure.curation_meter_stage(stopping, 1, base_of(stopping))
    warning, said = context(tmp_path, "warn", min_auc=0.6)
    artifact = measure.curation_meter_stage(warning, 1, base_of(warning))
    assert said[-1].startswith("warning: the curator 'pmi'") and asked == [16]
    assert artifact.details["pmi"]["shuffled"] == {"auc": 0.5, "n": 4}


def test_held_out_pairs_that_change_under_the_same_id_are_measured_again(tmp_path, monkeypatch):
    asked: list[int] = []

    def blind(curator: str, reader: Inference, pairs: Any, *_: Any) -> list[Rating]:
        asked.append(len(pairs))
        return [Rating(p.id, curator, 1.0, "{}") for p in pairs]

    monkeypatch.setattr(measure, "rate", blind)
    first, _ = context(tmp_path, "warn")
    measure.curation_meter_stage(first, 1, base_of(first))
    second, _ = context(tmp_path, "warn")
    second.heldout = [example(e.id, e.instruction + "!", e.response) for e in EXAMPLES]
    measure.curation_meter_stage(second, 1, base_of(second))
    assert len(asked) == 2


def test_a_backward_model_that_finishes_nothing_is_found_after_all_documents_are_answered(tmp_path):
    stopping, _ = context(tmp_path, "stop", min_lift=-100.0, max_echo_rate=1.0, min_pass_rate=0.1)
    stopping.config.augment.max_new_tokens = 2
    with pytest.raises(HumpbackError, match=r"pass rate 0\.00 is below 0\.1"):
        measure.backward_meter_stage(stopping, base_of(stopping), base_of(stopping))


@pytest.mark.parametrize("stage", ["backward", "curation"])
def test_a_meter_holds_two_models_each_planned_for_all_memory(tmp_path, monkeypatch, stage):
    held: list[weakref.ref[Inference]] = []
    make = Inference.__init__

    def watched(inference: Inference, *given: Any) -> None:
        assert not any(reference() for reference in held), "the last model is still there"
        held.append(weakref.ref(inference))
        make(inference, *given)

    monkeypatch.setattr(Inference, "__init__", watched)
    made, _ = context(tmp_path, "warn")
    monkeypatch.setattr(Context, "model", lambda context, artifact: context.base)
    other = dataclasses.replace(base_of(made), name="round_0/M_yx", hash="another")
    if stage == "backward":
        measure.backward_meter_stage(made, other, base_of(made))
    else:
        made.config.meters.curators = ("pmi_frozen",)
        measure.curation_meter_stage(made, 1, other)
    assert len(held) == 2


def test_a_run_without_two_instructions_to_confuse_stops_after_its_first_models(tmp_path):
    poor, _ = context(tmp_path, "stop")
    poor.heldout = [example(f"p{n}", "The same.", f"{n}") for n in range(3)]
    with pytest.raises(HumpbackError, match="needs two with different instructions"):
        measure.check_meters(poor)
    poor.config.rounds = 0
    measure.check_meters(poor)


def test_arms_with_other_curators_are_evaluated_on_other_pairs(tmp_path):
    """What only the meters ask is longer with some curators; evaluation leaves out none for it."""
    made, _ = context(tmp_path, "stop")
    window = made.base.config.max_position_embeddings
    long = example("long", "Say it.", "a" * (window - 200))
    for curator in ("rubric", "pmi"):
        made.config.curate.curator = curator
        pairs, left_out = fitting_pairs(made.base, made.config, [*EXAMPLES, long])
        assert long in pairs and not left_out
    made.config.curate.curator = "rubric"
    assert long not in meter_pairs(made.base, made.config, pairs)
    with pytest.raises(HumpbackError, match="what the meters ask"):
        meter_pairs(made.base, made.config, [long])


def test_a_backward_model_below_a_limit_stops_the_run_and_every_broken_limit_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(meters, "copy_rate", lambda x, y: 1.0)
    stopping, _ = context(tmp_path, "stop", min_lift=100.0, max_copy_rate=0.8, max_echo_rate=1.0)
    with pytest.raises(HumpbackError) as caught:
        measure.backward_meter_stage(stopping, base_of(stopping), base_of(stopping))
    message = str(caught.value)
    assert "is below 100.0" in message and "copy rate 1.00 is above 0.8" in message
    assert "echo rate" not in message
    fine, said = context(tmp_path, "stop", min_lift=-100.0, max_copy_rate=1.0, max_echo_rate=1.0)
    meter = measure.backward_meter_stage(fine, base_of(fine), base_of(fine)).details
    assert not said
    assert set(meter) == {"nll", "lift", "copy_rate", "echo_rate", "pass_rate"}
    assert meter["nll"]["n"] == meter["lift"]["n"] == 4 and meter["nll"]["value"] > 0
