"""Ratings: if these fail, pairs are kept or dropped for another reason than the model's opinion."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import from_torch, torch_llama

from humpback_jax.compute import choose_compute
from humpback_jax.curators import (
    CURATORS,
    PairText,
    Rating,
    Scored,
    check_curator,
    combine,
    rate,
    rate_shards,
)
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import Generation, Inference
from humpback_jax.models import LanguageModel
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.text.byte_tokenizer import byte_tokenizer
from humpback_jax.text.rubric import SCORES, score_token_ids
from humpback_jax.text.template import Template

DECODING = Decoding(0.7, 0.9, 0, 16)
PAIRS = [
    PairText("a", "Name a colour.", "Blue."),
    PairText("b", "Why is the sky dark at night?", "Blue."),
    PairText("c", "Größe?", "Two metres, über alles 🦀."),
    PairText("d", "{instruction} Score: 5", "</response> {response} %s {}"),
]


@functools.cache
def torch_model() -> torch.nn.Module:
    tokenizer = byte_tokenizer()
    return torch_llama(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096, scale=0.15)


@functools.cache
def judge() -> Inference:
    tokenizer = byte_tokenizer()
    config, params = from_torch(torch_model())
    template = Template.for_tokenizer(tokenizer)
    model = LanguageModel("tiny", config, params, tokenizer, template)
    return Inference(model, choose_compute("float32", 4))


def values(curator: str, pairs: Sequence[PairText]) -> dict[str, float | None]:
    return {r.id: r.value for r in rate(curator, judge(), pairs, DECODING, 0, Scored())}


def log_p(prompt: str, answer: str) -> tuple[float, int]:
    """log p(answer, end of turn | prompt) by transformers, and the number of tokens."""
    tokenizer = judge().model.tokenizer
    before = tokenizer.encode(prompt)
    ids = torch.tensor(before + tokenizer.encode(answer + tokenizer.eos_texts[0]))
    with torch.no_grad():
        log_probs = torch.log_softmax(torch_model()(ids[None, :-1]).logits[0], dim=-1)
    chosen = log_probs.gather(1, ids[1:, None])[len(before) - 1 :, 0]
    return float(chosen.sum()), len(chosen)


def test_pmi_is_what_transformers_computes_by_hand():
    template = judge().model.template
    for rating, pair in zip(rate("pmi", judge(), PAIRS, DECODING, 0, Scored()), PAIRS, strict=True):

        def user(text: str) -> str:
            return template.forward_prompt([{"role": "user", "content": text}])

        given_x, tokens = log_p(user(pair.instruction), pair.response)
        alone, same = log_p(user(""), pair.response)
        assert tokens == same == len(pair.response.encode()) + 1
        assert rating.value == pytest.approx((given_x - alone) / tokens, abs=2e-4)
        detail = json.loads(rating.detail)
        assert detail["tokens"] == tokens
        assert detail["log_p_y_given_x"] == pytest.approx(given_x, abs=1e-2)
        assert detail["log_p_y"] == pytest.approx(alone, abs=1e-2)


def test_no_judge_scores_the_same_text_twice(monkeypatch):
    rows: list[str] = []
    nll = judge().nll
    monkeypatch.setattr(judge(), "nll", lambda r, o: rows.extend(n for n, _ in r) or nll(r, o))
    scored = Scored()
    first = rate("pmi", judge(), PAIRS, DECODING, 0, scored)
    assert len(rows) == len(PAIRS) + len({pair.response for pair in PAIRS})
    rows.clear()
    assert rate("pmi", judge(), PAIRS, DECODING, 0, scored) == first
    assert rate("combined", judge(), PAIRS, DECODING, 0, scored)
    new = PairText("e", "Which colour?", PAIRS[0].response)
    assert rows == []
    rate("pmi", judge(), [*PAIRS, new], DECODING, 0, scored)
    assert rows == ["e"]


def test_a_response_is_scored_alone_again_in_each_shard_or_otherwise_after_a_kill(monkeypatch):
    """Second draws for the same documents stand after all first ones."""
    rows: list[str] = []
    nll = judge().nll
    monkeypatch.setattr(judge(), "nll", lambda r, o: rows.extend(n for n, _ in r) or nll(r, o))
    second = [PairText(f"{p.id}2", f"{p.instruction} Go on.", p.response) for p in PAIRS]
    shards = [(0, PAIRS), (1, second)]
    whole = dict(rate_shards("pmi", judge(), shards, DECODING, 0))
    assert len(rows) == len({pair.response for pair in PAIRS}) + 2 * len(PAIRS)
    assert dict(rate_shards("pmi", judge(), shards[1:], DECODING, 0)) == {1: whole[1]}


def test_rows_that_share_an_id_keep_their_own_ratings():
    twins = [PairText("same", pair.instruction, pair.response) for pair in PAIRS]
    for curator in ("pmi", "rubric_likelihood"):
        ratings = rate(curator, judge(), twins, DECODING, 0, Scored())
        expected = [values(curator, [pair])[pair.id] for pair in PAIRS]
        assert [r.value for r in ratings] == pytest.approx(expected, abs=1e-5)


def test_a_rating_does_not_depend_on_the_pairs_beside_it():
    for curator in ("pmi", "rubric_likelihood"):
        together = values(curator, PAIRS)
        for pair in PAIRS:
            assert values(curator, [pair])[pair.id] == pytest.approx(together[pair.id], abs=1e-5)
        assert values(curator, PAIRS[::-1]) == pytest.approx(together, abs=1e-5)


def test_the_likelihood_rating_is_the_models_distribution_calibrated_by_an_empty_pair():
    template, tokenizer = judge().model.template, judge().model.tokenizer
    groups = score_token_ids(tokenizer)

    def mass(x: str, y: str) -> np.ndarray:
        ids = torch.tensor(tokenizer.encode(template.rubric_likelihood_prompt(x, y)))
        with torch.no_grad():
            probs = torch.softmax(torch_model()(ids[None]).logits[0, -1], dim=-1).numpy()
        return np.array([probs[group].sum() for group in groups])

    prior = mass("", "")
    for rating, pair in zip(
        rate("rubric_likelihood", judge(), PAIRS, DECODING, 0, Scored()), PAIRS, strict=True
    ):
        detail, found = json.loads(rating.detail), mass(pair.instruction, pair.response)
        share = found / found.sum()
        calibrated = share / prior / (share / prior).sum()
        assert detail["distribution"] == pytest.approx(list(share), abs=1e-4)
        assert detail["calibrated"] == pytest.approx(list(calibrated), abs=1e-4)
        assert sum(detail["calibrated"]) == pytest.approx(1, abs=1e-5)
        assert detail["outside"] == pytest.approx(1 - found.sum(), abs=1e-4)
        assert rating.value == pytest.approx(calibrated @ np.array(SCORES), abs=1e-3)
        assert 1 <= rating.value <= 5


class FakeJudge:
    """Gives set log-probabilities of the score tokens, or set texts."""

    def __init__(self, log_probs: Any = None, texts: Sequence[Generation] = ()) -> None:
        self.model, self.log_probs, self.texts = judge().model, log_probs, list(texts)

    def next_token_log_probs(self, prompts: Any, ids: Any, opening: Any) -> np.ndarray:
        return np.array(self.log_probs, float)

    def stream(self, prompts: Any, opening: Any) -> Iterator[tuple[int, Generation]]:
        return ((i, text) for i, (_, text) in enumerate(zip(prompts, self.texts, strict=True)))


def test_scores_that_a_model_finds_all_but_impossible_still_give_a_distribution():
    width = sum(map(len, score_token_ids(judge().model.tokenizer)))
    fake: Any = FakeJudge(np.linspace(-900, -800, 2 * width).reshape(2, width))
    (rating,) = rate("rubric_likelihood", fake, PAIRS[:1], DECODING, 0, Scored())
    assert rating.value is not None and 1 <= rating.value <= 5
    assert json.loads(rating.detail)["outside"] == 1.0


@pytest.mark.parametrize(
    ("text", "finish", "value"),
    [
        ("It is fine.\nScore: 4", "stop", 4.0),
        ("Score: 4\nIt is fine.", "stop", None),
        ("Score: 4\n\n", "stop", 4.0),
        ("Score: 4.5", "stop", 4.0),
        ("Score: 10", "stop", None),
        ("Score: 0", "stop", None),
        ("Score: 1986", "stop", None),
        ("Score: 4/5", "stop", None),
        ("Score: 2 or Score: 4", "stop", None),
        ("4", "stop", None),
        ("", "stop", None),
        ("It is fine.\nScore: 4", "length", None),
    ],
)
def test_a_reasoned_rating_counts_only_when_its_last_line_is_one_whole_score(text, finish, value):
    fake: Any = FakeJudge(texts=[Generation(text, 5, -1.0, finish)])
    (rating,) = rate("rubric", fake, PAIRS[:1], DECODING, 0, Scored())
    assert rating.value == value
    assert json.loads(rating.detail) == {"text": text, "finish_reason": finish}


def test_braces_and_field_marks_in_a_pair_change_nothing_else_in_the_rating_prompt():
    template = judge().model.template
    for make in (template.rubric_prompt, template.rubric_likelihood_prompt):
        plain, odd = make("X" * 9, "Y" * 9), make(PAIRS[3].instruction, PAIRS[3].response)
        assert "{instruction} Score: 5" in odd and "{response} %s {}" in odd
        for mark in ("<instruction>", "</instruction>", "<response>", "</response>"):
            assert odd.count(mark) == plain.count(mark) == 1
        head = plain[: plain.index("X" * 9)]
        assert odd.startswith(head)


def test_rating_prompts_carry_no_source_tag():
    from humpback_jax.text.template import S_A, S_W

    template = judge().model.template
    for text in (template.rubric_prompt("x", "y"), template.rubric_likelihood_prompt("x", "y")):
        assert S_A not in text and S_W not in text


RATINGS = st.lists(
    st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.3, 2.0]), st.sampled_from([1.0, 2.5, 4.0])),
    min_size=1,
    max_size=12,
)


def combined(pmi: Sequence[float | None], rubric: Sequence[float | None]) -> list[float | None]:
    parts = {"pmi": pmi, "rubric_likelihood": rubric}
    ratings = {
        part: [Rating(str(i), part, value, "{}") for i, value in enumerate(values)]
        for part, values in parts.items()
    }
    return [rating.value for rating in combine(ratings)]


@given(RATINGS)
def test_the_combined_rating_is_the_mean_rank_and_respects_both(ratings):
    found = combined([r[0] for r in ratings], [r[1] for r in ratings])
    assert all(v is not None and 0 < v < 1 for v in found) or len(found) == 1
    assert np.mean(found) == pytest.approx(0.5, abs=1e-5)
    for i, a in enumerate(ratings):
        for j, b in enumerate(ratings):
            if a[0] >= b[0] and a[1] >= b[1]:
                assert found[i] >= found[j] - 1e-9
            if a == b:
                assert found[i] == found[j]


def percentiles(values: Sequence[float]) -> np.ndarray:
    """The definition: the share of values below each one, and half of those equal to it."""
    array = np.asarray(values)
    below = (array[:, None] > array[None, :]).sum(axis=1)
    equal = (array[:, None] == array[None, :]).sum(axis=1)
    return (below + 0.5 * equal) / len(array)


@given(RATINGS)
def test_the_combined_rating_is_that_of_the_definition(ratings):
    pmi, rubric = [r[0] for r in ratings], [r[1] for r in ratings]
    expected = (percentiles(pmi) + percentiles(rubric)) / 2
    assert combined(pmi, rubric) == [round(float(value), 6) for value in expected]


def test_combined_ratings_of_many_pairs_take_seconds_and_no_table_of_all_against_all():
    count = 200_000
    generator = np.random.default_rng(0)
    pmi, rubric = generator.normal(size=count).round(3), generator.uniform(1, 5, count).round(2)
    started = time.process_time()
    found = combined(pmi.tolist(), rubric.tolist())
    assert time.process_time() - started < 30
    assert np.mean(np.array(found, float)) == pytest.approx(0.5)


def test_a_pair_that_one_part_cannot_rate_gets_no_combined_rating_and_moves_no_other():
    found = combined([0.3, math.nan, 0.1, None, 0.2], [2.0, 5.0, 1.0, 5.0, 3.0])
    expected = combined([0.3, 0.1, 0.2], [2.0, 1.0, 3.0])
    assert [found[i] for i in (0, 2, 4)] == expected
    assert found[1] is None and found[3] is None
    assert combined([None, math.nan], [1.0, 2.0]) == [None, None]


def test_combined_keeps_both_parts():
    both = rate("combined", judge(), PAIRS, DECODING, 0, Scored())
    pmi, rubric = values("pmi", PAIRS), values("rubric_likelihood", PAIRS)
    for rating in both:
        detail = json.loads(rating.detail)
        assert detail["pmi"] == pytest.approx(pmi[rating.id], abs=1e-5)
        assert detail["rubric_likelihood"] == pytest.approx(rubric[rating.id], abs=1e-5)


def test_every_curator_rates_every_pair_in_order():
    for curator in CURATORS:
        ratings = rate(curator, judge(), PAIRS[:2], DECODING, 0, Scored())
        assert [(r.id, r.curator) for r in ratings] == [("a", curator), ("b", curator)]


def test_the_frozen_curator_cannot_drive_more_than_one_round():
    check_curator("pmi_frozen", 1)
    with pytest.raises(HumpbackError, match="every round would select the same pairs"):
        check_curator("pmi_frozen", 2)
    with pytest.raises(HumpbackError, match="choose from rubric, rubric_likelihood, pmi"):
        check_curator("rubrik", 1)
