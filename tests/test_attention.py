"""Attention over packed rows reads what it must and nothing else, in blocks or at once.

If these fail, users train on, or score with, text of a neighbour in the row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from humpback_jax.model import attention
from humpback_jax.model.attention import packed_attention
from humpback_jax.model.linear import Precision

HEADS, GROUPS, HEAD_WIDTH = 4, 2, 8
FLOAT32 = Precision()


def packed_rows(lengths: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions [rows, width] of rows that hold examples of these lengths."""
    segments = np.zeros((len(lengths), width), np.int32)
    positions = np.zeros_like(segments)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for segment, length in enumerate(row_lengths, start=1):
            segments[row, start : start + length] = segment
            positions[row, start : start + length] = np.arange(length)
            start += length
    return segments, positions


def random_heads(shape: tuple[int, int], seed: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    counts = (HEADS, GROUPS, GROUPS)
    return [
        jax.random.normal(key, (*shape, count, HEAD_WIDTH))
        for key, count in zip(keys, counts, strict=True)
    ]


def one_example_at_a_time(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: list[list[int]]
) -> jax.Array:
    """The same by the definition: each example cut out, its softmax written down plainly."""
    context = jnp.zeros_like(q)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            place = slice(start, start + length)
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = q[row, place, head] @ k[row, place, group].T / np.sqrt(HEAD_WIDTH)
                scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
                out = jax.nn.softmax(scores, axis=-1) @ v[row, place, group]
                context = context.at[row, place, head].set(out)
            start += length
    return context


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=3), min_size=2, max_size=2)
    | st.lists(st.lists(st.integers(1, 230), min_size=1, max_size=3), min_size=2, max_size=2),
    st.sampled_from([210, 256, 700]),
    st.booleans(),
)
def test_blocks_of_packed_rows_attend_exactly_within_their_examples(
    lengths: list[list[int]], width: int, tell_longest: bool
) -> None:
    width = max(width, *map(sum, lengths))
    segments, positions = packed_rows(lengths, width)
    q, k, v = random_heads(segments.shape, seed=width)
    longest = max(max(row) for row in lengths) if tell_longest else None

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        packed = packed_attention(segments, positions, FLOAT32, longest)(q, k, v, None)[0]
        return packed * (segments > 0)[..., None, None]

    expected = one_example_at_a_time(q, k, v, lengths)
    np.testing.assert_allclose(attend(q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize("longest", [None, 300])
def test_gradients_through_blocks_are_those_of_one_product(
    longest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [[300, 60, 90, 50], [30, 280, 185]]
    segments, positions = packed_rows(lengths, 510)
    heads = random_heads(segments.shape, seed=3)

    def squares(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        packed = packed_attention(segments, positions, FLOAT32, longest)(q, k, v, None)[0]
        return jnp.sum(jnp.square(packed) * (segments > 0)[..., None, None])

    in_blocks = jax.grad(squares, argnums=(0, 1, 2))(*heads)
    monkeypatch.setattr(attention, "BLOCK", 510)
    at_once = jax.grad(squares, argnums=(0, 1, 2))(*heads)
    for mine, reference in zip(in_blocks, at_once, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-5)
