"""The loss of rows that are not trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from humpback_jax.model.lora import join
from humpback_jax.parallel.batches import place_rows
from humpback_jax.training.examples import TrainingExample
from humpback_jax.training.loss import NLL, Batch
from humpback_jax.training.packing import best_fit, lay_out, static_bound
from humpback_jax.training.state import StepSpec, TrainState
from humpback_jax.training.step import batch_nll


def make_validation(
    spec: StepSpec, examples: Sequence[TrainingExample], rows: int
) -> Callable[[TrainState], dict[str, float]]:
    """Mean nll of the examples' supervised tokens, in nats, computed as a step computes it.

    "validation_nll" is that of all of them, "validation_nll/SOURCE" that of one source. Without
    dropout and weights. `rows` rows of packed examples are computed at a time.
    """
    lengths = [example.length for example in examples]
    width = static_bound(max(lengths), spec.config.max_position_embeddings)
    packed = best_fit(lengths, width)
    names = sorted({example.source for example in examples})
    spec = dataclasses.replace(
        spec,
        longest=width,
        num_sources=len(names),
        weights=(),
        dropout=0.0,
        objective=NLL,
    )
    supervised = dict.fromkeys(names, 0)
    for example in examples:
        supervised[example.source] += example.supervised

    def placed(filled: list[list[int]]) -> Batch:
        def read(chosen: slice) -> Batch:
            return lay_out(examples, filled[chosen], chosen.stop - chosen.start, width, names)

        return place_rows(read, rows, spec.mesh, 0)

    whole = spec.mesh and NamedSharding(spec.mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=whole)
    def nll_of(state: TrainState, batch: Batch) -> jax.Array:
        return batch_nll(spec, join(state.frozen, state.trainable), batch)[1]

    def means(state: TrainState) -> dict[str, float]:
        batches = (placed(packed[start : start + rows]) for start in range(0, len(packed), rows))
        nll = sum(np.asarray(nll_of(state, batch), np.float64) for batch in batches)
        by_source = {
            f"validation_nll/{name}": float(total) / supervised[name]
            for name, total in zip(names, np.asarray(nll), strict=True)
        }
        return {"validation_nll": float(np.sum(nll)) / sum(supervised.values()), **by_source}

    return means
