"""How near two texts' first different tokens are to a tie that rounding may flip."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from humpback_jax.sampling.engine import Completion, Request
from humpback_jax.sampling.sampler import controls_of, truncated_probabilities


def tie_gap(
    each: Request,
    one: Completion,
    other: Completion,
    stop: int,
    logits_after: Callable[[np.ndarray], np.ndarray],
) -> float:
    """How far the two texts' first different tokens are from tying.

    Greedy: the difference of their logits. Sampled: how far the uniform number lies from the
    nearer end of each token's share of the cumulative distribution; the larger of both distances.

    Args:
      stop: the token at which texts end.
      logits_after: the model's float32 [V] after tokens [n].
    """
    pair = [[*c.tokens.tolist(), stop, -1] for c in (one, other)]
    place = next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b)
    logits = logits_after(np.concatenate([each.prompt, one.tokens[:place]]))
    tokens = [pair[0][place], pair[1][place]]
    if each.decoding.temperature == 0:
        return float(abs(logits[tokens[0]] - logits[tokens[1]]))
    controls = controls_of([each.decoding], [each.key], [])
    weights = np.asarray(truncated_probabilities(logits[None], controls), np.float64)[0]
    upper = np.cumsum(weights) / weights.sum()
    lower = upper - weights / weights.sum()
    key = jax.random.fold_in(jax.random.wrap_key_data(each.key), place)
    uniform = float(jax.random.uniform(key))
    return float(max(max(lower[t] - uniform, uniform - upper[t], 0.0) for t in tokens))
