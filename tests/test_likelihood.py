"""Log-likelihoods of given texts: what curators score with and what evaluations report.

If these fail, a pair's score changes with the pairs beside it, or is not the model's.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import (
    FLOAT32,
    from_torch,
    random_examples,
    random_tokens,
    torch_llama,
    torch_logits,
    torch_nll,
)

from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import unstack_layers
from humpback_jax.sampling import likelihood
from humpback_jax.sampling.likelihood import next_token_log_probs, sequence_nll
from humpback_jax.training.packing import TrainingExample
from humpback_jax.training.step import StepSpec

WIDTH = likelihood.LENGTH_CLASSES[0]
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@functools.cache
def model_of(dynamic: bool = False):
    changes = {"rope_scaling": dict(DYNAMIC)} if dynamic else {"max_position_embeddings": 512}
    model = torch_llama(tie_word_embeddings=True, **changes)
    return model, *from_torch(model)


def spec_of(config) -> StepSpec:
    return StepSpec(config, "scan", FLOAT32, max_targets=0, num_sources=1)


def score(examples, dynamic: bool = False):
    _, config, params = model_of(dynamic)
    return sequence_nll(spec_of(config), params, examples)


def reset_rope(model) -> None:
    """transformers' dynamic rope remembers the longest sequence it has seen."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def test_each_example_s_nll_equals_torch_and_comes_in_the_order_given() -> None:
    """Several widths of rows, several rows, several examples a row."""
    short, long = random_examples(14, longest=90), random_examples(3, WIDTH + 60, WIDTH + 2, seed=1)
    examples = [*short[:7], *long, *short[7:]]
    nll, counts = score(examples)
    with torch.no_grad():
        expected = torch_nll(model_of()[0], examples).numpy()
    assert nll.dtype == np.float64
    assert counts.tolist() == [example.supervised for example in examples]
    assert nll == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_the_nll_covers_the_supervised_tokens_alone() -> None:
    ids = random_tokens(20)
    masks = [np.arange(20) == 7, np.arange(20) == 12, np.isin(np.arange(20), [7, 12])]
    one, two, both = score([TrainingExample(str(i), ids, mask) for i, mask in enumerate(masks)])[0]
    log_probs = torch.log_softmax(torch.tensor(torch_logits(model_of()[0], ids[None])[0]), dim=-1)
    assert one == pytest.approx(-float(log_probs[6, ids[7]]), abs=1e-5)
    assert both == pytest.approx(one + two, rel=1e-6)


def test_nothing_supervised_is_zero_of_zero_not_an_average() -> None:
    nothing = TrainingExample("x", random_tokens(9), np.zeros(9, bool))
    nll, counts = score([nothing, *random_examples(2)])
    assert (nll[0], counts[0]) == (0.0, 0)
    assert score([])[0].shape == (0,)


@settings(max_examples=15)
@given(order=st.permutations(range(16)), count=st.integers(1, 16))
def test_a_score_does_not_depend_on_the_order_or_on_the_examples_beside_it(order, count) -> None:
    examples = random_examples(16, longest=100)
    together = _scores_together()
    chosen = order[:count]
    nll, _ = score([examples[i] for i in chosen])
    assert nll == pytest.approx([together[i] for i in chosen], rel=1e-5)


@functools.cache
def _scores_together() -> tuple[float, ...]:
    return tuple(score(random_examples(16, longest=100))[0])


def test_the_same_packing_gives_the_same_bits() -> None:
    """Lengths that pack in one way only, whatever the order: nothing is left to rounding."""
    examples = [e for n in (100, 80, 60, 40) for e in random_examples(1, n, n, seed=n)]
    first, _ = score(examples)
    assert np.array_equal(score(examples)[0], first)
    assert np.array_equal(score(examples[::-1])[0][::-1], first)


def test_sequences_beyond_the_trained_length_are_scored_as_if_alone() -> None:
    """Dynamic scaling stretches the long one; the short one in its row must not be stretched."""
    model = model_of(dynamic=True)[0]
    lengths = (100, 30, 20, 70)
    examples = [e for n in lengths for e in random_examples(1, n, n, seed=n)]
    nll, _ = score(examples, dynamic=True)
    for value, example in zip(nll, examples, strict=True):
        reset_rope(model)
        with torch.no_grad():
            assert value == pytest.approx(float(torch_nll(model, [example])[0]), rel=1e-5)


def test_layouts_agree() -> None:
    _, config, params = model_of()
    examples = random_examples(5)
    unrolled = dataclasses.replace(spec_of(config), layout="unrolled")
    other, _ = sequence_nll(unrolled, unstack_layers(params), examples)
    assert other == pytest.approx(score(examples)[0], rel=1e-6)


@settings(max_examples=8)
@given(st.permutations(range(11)), st.integers(1, 11))
def test_next_token_log_probs_equal_torch_beside_any_neighbours(order, count) -> None:
    _, config, params = model_of()
    lengths = [1, 2, 9, 9, 30, 64, 100, 150, WIDTH, WIDTH + 1, 17]
    prompts = [random_tokens(n, seed=n) for n in lengths]
    tokens = np.array([3, 77, 3, 127], np.int32)
    chosen = [prompts[i] for i in order[:count]]
    ours = next_token_log_probs(spec_of(config), params, chosen, tokens)
    assert ours.shape == (count, 4)
    expected = _expected_next(tuple(lengths), tuple(tokens))
    assert np.abs(ours - expected[list(order[:count])]).max() < 1e-4


@functools.cache
def _expected_next(lengths, tokens) -> np.ndarray:
    model = model_of()[0]
    rows = []
    for length in lengths:
        logits = torch.tensor(torch_logits(model, random_tokens(length, seed=length)[None])[0, -1])
        rows.append(torch.log_softmax(logits, dim=-1)[list(tokens)].numpy())
    return np.stack(rows)


def test_many_short_prompts_in_one_row_keep_their_own_results() -> None:
    """More prompts than `PROMPTS_PER_ROW` fit one row."""
    _, config, params = model_of()
    count = 3 * likelihood.PROMPTS_PER_ROW
    prompts = [random_tokens(2, seed=seed) for seed in range(count)]
    tokens = np.array([1, 2], np.int32)
    together = next_token_log_probs(spec_of(config), params, prompts, tokens)
    for index in (0, 7, 8, count - 1):
        alone = next_token_log_probs(spec_of(config), params, [prompts[index]], tokens)
        assert together[index] == pytest.approx(alone[0], rel=1e-5)


def test_an_empty_prompt_is_an_error_not_the_neighbour_s_answer() -> None:
    _, config, params = model_of()
    prompts = [random_tokens(5), np.zeros(0, np.int32)]
    with pytest.raises(HumpbackError, match="prompt 1"):
        next_token_log_probs(spec_of(config), params, prompts, np.array([1], np.int32))


def test_a_broken_model_is_an_error_that_names_the_example_not_a_score() -> None:
    _, config, params = model_of()
    broken = {**params, "norm": {"scale": np.full_like(params["norm"]["scale"], np.nan)}}
    with pytest.raises(HumpbackError, match="row-0"):
        sequence_nll(spec_of(config), broken, random_examples(1))
    with pytest.raises(HumpbackError, match="prompt 0"):
        next_token_log_probs(
            spec_of(config), broken, [random_tokens(4)], np.array([1, 2], np.int32)
        )
