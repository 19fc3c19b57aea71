"""Log-likelihoods of given texts: log p(y | x) for many (x, y), packed into rows of fixed shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.model.attention import packed_attention
from humpback_jax.model.llama import Params, bind
from humpback_jax.training.loss import Batch, supervised_targets, token_nll
from humpback_jax.training.packing import TrainingExample, best_fit, lay_out
from humpback_jax.training.step import StepSpec

BROKEN = "is not a number; the model's weights are broken, or overflow in this precision."
ROWS = 2  # rows of one program call
ROW_TOKENS = (256, 1024)  # row lengths: for little work and for much; a longer text has its own
LENGTH_CLASSES = tuple(2**k for k in range(7, 18))


def sequence_nll(
    spec: StepSpec, params: Params, examples: Sequence[TrainingExample]
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each example's supervised tokens, given all before them.

    Args:
      spec: model, layout and precision; `max_targets` and the training fields are not used.
      params: in the spec's layout.

    Returns:
      (nll float64 [n] in nats, supervised tokens int64 [n]), in the order of `examples`.

    Raises:
      HumpbackError: a result is not a number.
    """
    nll = np.zeros(len(examples))
    counts = np.array([example.supervised for example in examples], np.int64)
    for longest, width, rows in _packed([example.length for example in examples]):
        batch = lay_out(examples, rows, ROWS, width)
        sums = _compiled(dataclasses.replace(spec, longest=longest), width)(params, batch)
        for r, row in enumerate(rows):
            for segment, index in enumerate(row, start=1):
                nll[index] = float(sums[r, segment])
    broken = np.flatnonzero(~np.isfinite(nll))
    if broken.size:
        raise HumpbackError(f"example {examples[broken[0]].id}: the log-likelihood {BROKEN}")
    return nll, counts


def _packed(lengths: Sequence[int]) -> Iterator[tuple[int, int, list[list[int]]]]:
    """(bound of the lengths, width, at most `ROWS` rows of indices) of each program call.

    Texts of like length share rows, so that short ones do not pay for the attention of long ones.
    """
    classes: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        bound = next((each for each in LENGTH_CLASSES if length <= each), length)
        classes.setdefault(bound, []).append(index)
    for longest, members in sorted(classes.items()):
        chosen = [lengths[index] for index in members]
        little, much = ROW_TOKENS
        width = max(little if sum(chosen) <= ROWS * little else much, longest)
        rows = [[members[place] for place in row] for row in best_fit(chosen, width)]
        for start in range(0, len(rows), ROWS):
            yield longest, width, rows[start : start + ROWS]


@functools.lru_cache(maxsize=64)
def _compiled(spec: StepSpec, width: int) -> Callable[[Params, Batch], np.ndarray]:
    def run(params: Params, batch: Batch) -> jax.Array:
        model = bind(spec.config, params, spec.layout, spec.lora)
        hidden, _ = model.hidden_states(
            batch.tokens,
            batch.positions,
            packed_attention(batch.segment_ids, batch.positions, spec.precision, spec.longest),
            precision=spec.precision,
        )
        chosen = supervised_targets(batch, width)
        _, nll = token_nll(model, hidden, chosen, spec.precision)
        segments = jnp.take_along_axis(batch.segment_ids, chosen.columns, axis=1)
        rows = jnp.arange(nll.shape[0])[:, None]
        return jnp.zeros((nll.shape[0], width + 1), jnp.float32).at[rows, segments].add(nll)

    program = jax.jit(run)
    return lambda params, batch: np.asarray(program(params, batch))


def next_token_log_probs(
    spec: StepSpec, params: Params, prompts: Sequence[np.ndarray], token_ids: np.ndarray
) -> np.ndarray:
    """log p(token | prompt) for a fixed set of tokens after each prompt, from one prefill each.

    Args:
      prompts: int32 [length] each.
      token_ids: int32 [k], the tokens to read.

    Returns:
      float64 [len(prompts), k], in nats, normalised over the whole vocabulary.

    Raises:
      HumpbackError: a prompt is empty, or a result is not a number.
    """
    result = np.zeros((len(prompts), len(token_ids)))
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise HumpbackError(f"prompt {lengths.index(0)} (from 0) is empty: nothing comes next.")
    for longest, width, rows in _packed(lengths):
        batch, ends = _lay_out_prompts(prompts, rows, width)
        run = _compiled_next(dataclasses.replace(spec, longest=longest), width)
        log_probs = run(params, batch, ends, token_ids)
        for r, row in enumerate(rows):
            for segment, index in enumerate(row):
                result[index] = log_probs[r, segment]
    broken = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if broken.size:
        raise HumpbackError(f"prompt {broken[0]} (from 0): the next token's distribution {BROKEN}")
    return result


PROMPTS_PER_ROW = 8


def _lay_out_prompts(
    prompts: Sequence[np.ndarray], rows: Sequence[Sequence[int]], width: int
) -> tuple[Batch, np.ndarray]:
    """Prompts as rows without targets, and the column of each prompt's last token [ROWS, 8]."""
    examples: list[TrainingExample] = []
    places: list[list[int]] = []
    ends = np.zeros((ROWS, max(PROMPTS_PER_ROW, max(len(row) for row in rows))), np.int32)
    for r, row in enumerate(rows):
        places.append(list(range(len(examples), len(examples) + len(row))))
        ends[r, : len(row)] = np.cumsum([len(prompts[index]) for index in row]) - 1
        for index in row:  # `lay_out` takes the last id as a target only
            ids = np.append(prompts[index], 0).astype(np.int32)
            examples.append(TrainingExample("", ids, np.zeros(len(ids), bool)))
    return lay_out(examples, places, ROWS, width), ends


@functools.lru_cache(maxsize=64)
def _compiled_next(
    spec: StepSpec, width: int
) -> Callable[[Params, Batch, np.ndarray, np.ndarray], np.ndarray]:
    def run(params: Params, batch: Batch, ends: jax.Array, token_ids: jax.Array) -> jax.Array:
        model = bind(spec.config, params, spec.layout, spec.lora)
        hidden, _ = model.hidden_states(
            batch.tokens,
            batch.positions,
            packed_attention(batch.segment_ids, batch.positions, spec.precision, spec.longest),
            precision=spec.precision,
        )
        last = jnp.take_along_axis(hidden, ends[..., None], axis=1)
        log_probs = jax.nn.log_softmax(model.logits(last, spec.precision), axis=-1)
        return log_probs[..., token_ids]

    program = jax.jit(run)
    return lambda *arguments: np.asarray(program(*arguments))
