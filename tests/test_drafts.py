"""Guessed tokens: if these fail, users who ask for speed get another text, or no speed."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import from_torch, torch_llama

from humpback_jax.model.llama import unstack_layers
from humpback_jax.sampling.drafts import accepted, look_up, with_drafts
from humpback_jax.sampling.engine import Engine, Request, Shape
from humpback_jax.sampling.sampler import Decoding, record_key

SHAPE = Shape(4, chunks=2, chunk_tokens=16, steps=5, refill=2)
DECODINGS = {
    "greedy": Decoding(0.0, max_new_tokens=40),
    "sampled": Decoding(0.7, 0.9, max_new_tokens=40),
    "penalised": Decoding(0.5, max_new_tokens=40, repetition_penalty=1.3),
    "to the last place": Decoding(0.0, max_new_tokens=500),
}


def plainly(text: list[int], count: int) -> list[int]:
    """The definition, by search: the last earlier three tokens, else two, that end the text."""
    for size in (3, 2):
        if len(text) < size:
            continue
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                found = text[end : end + count]
                return found + [-1] * (count - len(found))
    return [-1] * count


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 5))
@settings(deadline=None)
def test_a_guess_is_what_followed_the_same_words_before(text: list[int], count: int) -> None:
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(text)] = text
    found = look_up(jnp.asarray(padded), jnp.array([len(text) - 1]), count)
    assert found[0].tolist() == plainly(text, count)


def test_a_wrong_guess_is_kept_or_a_right_one_after_it() -> None:
    drafts = jnp.array([[7, 8, 9], [7, 0, 9], [-1, 8, 9], [7, 8, 9]])
    drawn = jnp.array([[7, 8, 9, 1], [7, 8, 9, 1], [7, 8, 9, 1], [7, 8, 9, 1]])
    goes_on = jnp.array([[True] * 4, [True] * 4, [True] * 4, [True, False, True, True]])
    assert accepted(drawn, drafts, goes_on).tolist() == [4, 2, 1, 2]


def test_a_penalty_does_not_know_the_guesses_before_it() -> None:
    seen = jnp.zeros((1, 6), bool).at[0, 0].set(True)
    every = with_drafts(seen, jnp.array([[3, -1, 5]]))
    assert [np.flatnonzero(row).tolist() for row in every[0]] == [[0], [0, 3], [0, 3], [0, 3, 5]]


@pytest.mark.parametrize("name", DECODINGS)
def test_guessing_changes_the_text(name: str) -> None:
    model = torch_llama(max_position_embeddings=160)
    config, params = from_torch(model)
    generator = np.random.default_rng(1)
    requests = []
    for index in range(9):
        phrase = generator.integers(6, 128, 5)
        prompt = np.tile(phrase, int(generator.integers(2, 12))).astype(np.int32)
        key = record_key(0, "drafts", str(index), 0)
        requests.append(Request(str(index), prompt, key, DECODINGS[name]))
    found, steps = [], []
    for drafts in (0, 3):
        shape = dataclasses.replace(SHAPE, drafts=drafts)
        engine = Engine(config, unstack_layers(params), (5,), shape=shape)
        found.append([(c.tokens.tolist(), c.finish_reason) for c in engine.generate(requests)])
        steps.append(engine.work.live_row_steps)
    assert found[0] == found[1]
    assert 0 < steps[1] < steps[0], "no guess was right"
    lengths = [len(tokens) for tokens, _ in found[0]]
    assert max(lengths) >= 20, "there is something to guess"
