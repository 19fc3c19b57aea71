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
    spec: StepSpec, examples: Sequence[TrainingExample], rows: int
) -> Callable[[TrainState], float]:
    """Mean nll of the examples' supervised tokens, in nats, computed as a step computes it.

    Without dropout. `rows` rows of packed examples are computed at a time.
    """
    lengths = [example.length for example in examples]
    width = static_bound(max(lengths), spec.config.max_position_embeddings)
    packed = best_fit(lengths, width)
    spec = dataclasses.replace(
        spec,
        longest=width,
        num_sources=1,
        weights=(),
        dropout=0.0,
        objective=NLL,
    )
    supervised = sum(example.supervised for example in examples)

    def placed(filled: list[list[int]]) -> Batch:
        def read(chosen: slice) -> Batch:
            return lay_out(examples, filled[chosen], chosen.stop - chosen.start, width)

        return place_rows(read, rows, spec.mesh, 0)

    @jax.jit
    def total(state: TrainState, batch: Batch) -> jax.Array:
        return batch_nll(spec, join(state.frozen, state.trainable), batch)[0]

    def mean(state: TrainState) -> float:
        batches = (placed(packed[start : start + rows]) for start in range(0, len(packed), rows))
        return sum(float(total(state, batch)) for batch in batches) / supervised

    return mean
