"""The loss of rows that are not trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from humpback_jax.model.lora import join
from humpback_jax.parallel.batches import place_rows
from humpback_jax.training.examples import TrainingExample
from humpback_jax.training.loss import NLL, Batch
from humpback_jax.training.packing import best_fit, lay_out, static_bound
from humpback_jax.training.state import StepSpec, TrainState
from humpback_jax.training.step import batch_nll


def make_validation(
    spec: StepSpec, examples: Sequence[TrainingExample], row_tokens: int, rows: int
) -> Callable[[TrainState], float]:
    """Mean nll of the examples' supervised tokens, in nats, computed as a step computes it.

    Without dropout. Examples are packed into rows of `row_tokens` places, `rows` of them at a time.

    Raises:
      HumpbackError: an example is longer than a row.
    """
    lengths = [example.length for example in examples]
    packed = best_fit(lengths, row_tokens)
    targets = max(sum(examples[index].supervised for index in row) for row in packed)
    spec = dataclasses.replace(
        spec,
        max_targets=static_bound(targets, row_tokens),
        longest=static_bound(max(lengths), row_tokens),
        num_sources=1,
        weights=(),
        dropout=0.0,
        objective=NLL,
    )
    supervised = sum(example.supervised for example in examples)

    def placed(filled: list[list[int]]) -> Batch:
        def read(chosen: slice) -> Batch:
            return lay_out(examples, filled[chosen], chosen.stop - chosen.start, row_tokens)

        return place_rows(read, rows, spec.mesh, 0)

    @jax.jit
    def total(state: TrainState, batch: Batch) -> jax.Array:
        return batch_nll(spec, join(state.frozen, state.trainable), batch)[0]

    def mean(state: TrainState) -> float:
        batches = (placed(packed[start : start + rows]) for start in range(0, len(packed), rows))
        return sum(float(total(state, batch)) for batch in batches) / supervised

    return mean
