"""Log-likelihoods of given texts: what curators score with and what evaluations report.

If these fail, a pair's score changes with the pairs beside it, or is not the model's.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
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
from humpback_jax.model.llama import init_params, unstack_layers
from humpback_jax.sampling import likelihood
from humpback_jax.sampling.likelihood import (
    WIDTH,
    continuations,
    log_probs,
    next_token,
    sequence_nll,
    supervised_tokens,
)
from humpback_jax.sampling.prefix import compute_prefix
from humpback_jax.training.examples import TrainingExample

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@functools.cache
def model_of(dynamic: bool = False):
    changes = {"rope_scaling": dict(DYNAMIC)} if dynamic else {"max_position_embeddings": 512}
    model = torch_llama(tie_word_embeddings=True, **changes)
    return model, *from_torch(model)


def score(examples, dynamic: bool = False):
    _, config, params = model_of(dynamic)
    return sequence_nll(config, params, examples, FLOAT32, layout="scan")


def ask(queries, head=()):
    _, config, params = model_of()
    prefix = compute_prefix(config, params, head, FLOAT32, "scan")
    return log_probs(config, params, queries, FLOAT32, layout="scan", prefix=prefix)


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
@given(order=st.permutations(range(17)), count=st.integers(1, 17))
def test_a_score_does_not_depend_on_the_order_or_on_the_examples_beside_it(order, count) -> None:
    """To the last bit, wherever a text comes to stand in a row, among few or beside a long one."""
    chosen = order[:count]
    nll, _ = score([_mixed()[i] for i in chosen])
    assert nll.tolist() == [_scores_together()[i] for i in chosen]


@functools.cache
def _mixed() -> list[TrainingExample]:
    return [*random_examples(16, longest=100), *random_examples(1, WIDTH + 60, WIDTH + 2, seed=1)]


@functools.cache
def _scores_together() -> tuple[float, ...]:
    return tuple(score(_mixed())[0])


def test_a_text_is_scored_by_another_program_beside_others() -> None:
    """Programs of other widths may round otherwise."""
    queries = [supervised_tokens(example) for example in _mixed()]
    nothing = [0] * len(queries)
    together = {i: width for width, found in likelihood._packed(queries, nothing) for i in found}
    assert len(together) == len(queries) and len({*together.values()}) == 2
    for index, query in enumerate(queries):
        assert [*likelihood._packed([query], [0])] == [(together[index], [0])]


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
    other, _ = sequence_nll(config, unstack_layers(params), examples, FLOAT32)
    assert other == pytest.approx(score(examples)[0], rel=1e-6)


@settings(max_examples=8)
@given(st.permutations(range(11)), st.integers(1, 11))
def test_next_token_log_probs_equal_torch_beside_any_neighbours(order, count) -> None:
    lengths = [1, 2, 9, 9, 30, 64, 100, 150, WIDTH, WIDTH + 1, 17]
    tokens = (3, 77, 3, 127)
    queries = [next_token("p", random_tokens(lengths[i], seed=lengths[i]), tokens) for i in order]
    ours = np.array(ask(queries[:count]))
    assert ours.shape == (count, 4)
    expected = _expected_next(tuple(lengths), tokens)
    assert np.abs(ours - expected[list(order[:count])]).max() < 1e-4


@functools.cache
def _expected_next(lengths, tokens) -> np.ndarray:
    model = model_of()[0]
    rows = []
    for length in lengths:
        logits = torch.tensor(torch_logits(model, random_tokens(length, seed=length)[None])[0, -1])
        rows.append(torch.log_softmax(logits, dim=-1)[list(tokens)].numpy())
    return np.stack(rows)


@settings(max_examples=10)
@given(st.integers(1, 120), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.booleans())
def test_continuations_of_one_prompt_are_scored_as_if_each_stood_alone(start, sizes, head) -> None:
    """Multiple choice: the prompt is computed once, and no choice sees another one."""
    prompt = random_tokens(start, seed=start)
    texts = [random_tokens(n, seed=100 + i) for i, n in enumerate(sizes)]
    query = continuations("q", prompt, texts)
    assert len(query.tokens) == start + sum(n - 1 for n in sizes)
    others = [supervised_tokens(e) for e in random_examples(3, longest=60)]
    [found] = ask([query], prompt[: start // 2].tolist() if head else ())
    assert found == pytest.approx(ask([*others, query])[-1], abs=1e-5)
    split = np.split(found, np.cumsum(sizes)[:-1])
    for text, mine in zip(texts, split, strict=True):
        whole = np.concatenate([prompt, text])
        alone = TrainingExample("a", whole, np.arange(len(whole)) >= start)
        with torch.no_grad():
            assert -mine.sum() == pytest.approx(float(torch_nll(model_of()[0], [alone])[0]), 1e-4)


def test_a_prefix_changes_no_score_and_is_shared_by_the_texts_that_begin_with_it() -> None:
    head = random_tokens(70, seed=5)
    examples = random_examples(12, longest=90)
    longer = [
        TrainingExample(e.id, np.concatenate([head, e.ids]), np.concatenate([head < 0, e.mask]))
        for e in examples
    ]
    queries = [supervised_tokens(e) for e in [*longer[:8], *examples[8:]]]
    for one, other in zip(ask(queries), ask(queries, head.tolist()), strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_a_target_inside_the_prefix_is_scored_too() -> None:
    """A text that asks about its first tokens must not have them skipped."""
    ids = random_tokens(40)
    query = supervised_tokens(TrainingExample("a", ids, np.arange(40) >= 3))
    assert ask([query], ids[:20].tolist())[0] == pytest.approx(ask([query])[0], abs=1e-5)


def test_more_targets_than_places_are_all_answered() -> None:
    """128 tokens after each of a few short prompts."""
    prompts = [random_tokens(3, seed=seed) for seed in range(5)]
    found = np.array(ask([next_token("p", prompt, range(128)) for prompt in prompts]))
    assert np.abs(np.exp(found.astype(np.float64)).sum(axis=1) - 1).max() < 1e-5


def test_no_array_of_tokens_times_vocabulary_is_held() -> None:
    """At 128k tokens of vocabulary, 2,048 places would take a gigabyte."""
    vocab = likelihood.VOCABULARY * 2 + 77
    config = dataclasses.replace(model_of()[1], vocab_size=vocab)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), layout="unrolled"))
    prefix = jax.eval_shape(lambda: compute_prefix(config, params, (), FLOAT32).arrays)
    query = next_token("p", random_tokens(5), [1])
    batch = likelihood._lay_out([query], [0], [0], WIDTH)
    program = likelihood._program(config, FLOAT32, "unrolled", None, None)
    text = program.lower(params, prefix, batch, np.int32(1))
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text.as_text())
    largest = max(np.prod([int(n) for n in shape.rstrip("x").split("x")]) for shape in shapes)
    assert largest < WIDTH * vocab // 2
    assert largest >= vocab * config.hidden_size, "the regular expression finds the embedding"


def test_an_empty_continuation_is_an_error_that_names_no_query() -> None:
    texts = [random_tokens(3), random_tokens(0)]
    with pytest.raises(HumpbackError, match="choices: continuation 2 is empty"):
        continuations("choices", random_tokens(5), texts)


def test_an_empty_prompt_is_an_error_not_the_neighbour_s_answer() -> None:
    queries = [next_token("full", random_tokens(5), [1]), next_token("void", random_tokens(0), [1])]
    with pytest.raises(HumpbackError, match="void is empty"):
        ask(queries)


def test_a_broken_model_is_an_error_that_names_the_example_not_a_score() -> None:
    _, config, params = model_of()
    broken = {**params, "norm": {"scale": np.full_like(params["norm"]["scale"], np.nan)}}
    with pytest.raises(HumpbackError, match="row-0"):
        sequence_nll(config, broken, random_examples(1), FLOAT32, layout="scan")
