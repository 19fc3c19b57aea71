"""Tokens guessed by looking them up in the row itself (prompt-lookup decoding, Saxena, 2023).

A guess costs one more place in a step that reads all weights anyway. It is kept only if it is the
token that would have been drawn at its position, with that position's key: guessing changes speed,
and never the text.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def look_up(text: jax.Array, ends: jax.Array, count: int) -> jax.Array:
    """What followed the last time that a row's last three tokens, or two, stood together.

    Args:
      text: int32 [B, S]. ends: int32 [B], the place of each row's last token in it.

    Returns:
      int32 [B, count]; -1 where nothing is found.
    """
    places = jnp.arange(text.shape[1])

    def matches(back: int) -> jax.Array:
        """Whether the token `back` places earlier is the row's own, so many places from its end."""
        own = jnp.take_along_axis(text, jnp.maximum(ends - back, 0)[:, None], axis=1)
        return (jnp.roll(text, back, axis=1) == own) & (places >= back) & (ends >= back)[:, None]

    two = matches(0) & matches(1) & (places < ends[:, None])
    # The latest match counts, one of three tokens before any of two.
    rank = jnp.where(two, places + 1 + jnp.where(matches(2), text.shape[1], 0), 0)
    following = jnp.argmax(rank, axis=1)[:, None] + 1 + jnp.arange(count)
    found = jnp.take_along_axis(text, jnp.minimum(following, text.shape[1] - 1), axis=1)
    return jnp.where(two.any(axis=1)[:, None] & (following <= ends[:, None]), found, -1)


def with_drafts(seen: jax.Array, drafts: jax.Array) -> jax.Array:
    """bool [B, 1 + D, V]: the tokens a row contains before each of its next places.

    Args:
      seen: bool [B, V]. drafts: int32 [B, D], those that stand between the places.
    """
    rows, every = jnp.arange(seen.shape[0]), [seen]
    for column in drafts.T:
        seen = seen.at[rows, jnp.where(column < 0, seen.shape[1], column)].set(True, mode="drop")
        every.append(seen)
    return jnp.stack(every, axis=1)


def accepted(drawn: jax.Array, drafts: jax.Array, goes_on: jax.Array) -> jax.Array:
    """int32 [B], how many of the tokens drawn at 1 + D places are the row's next ones: at least 1.

    Args:
      drawn, goes_on: [B, 1 + D], each token, and whether the row goes on after it.
      drafts: int32 [B, D], the tokens that the second place and those after it were given.
    """
    right = (drawn[:, :-1] == drafts) & goes_on[:, :-1]
    return 1 + jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1)
