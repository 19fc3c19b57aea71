"""The train step of a run, as it would be compiled on a slice: its inputs are shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Layout
from humpback_jax.model.shares import ROWS
from humpback_jax.parallel.batches import row_parts
from humpback_jax.parallel.mesh import MeshShape, cut_rows_and_weights, make_mesh
from humpback_jax.parallel.rules import check_sharded
from humpback_jax.training.loss import Batch
from humpback_jax.training.optimizer import make_optimizer
from humpback_jax.training.state import StepSpec, TrainState, abstract_state
from humpback_jax.training.step import make_train_step
from humpback_jax.training.trainer import TrainSpec


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """How a train step is spread over a slice.

    Attributes:
      run: the run's settings, with the mesh of all chips.
      rows: of `run.row_tokens` places that a device computes at a time, all of them supervised.
      at_worst: whether these are the most that a batch of the run can take (`most_rows`), and not
        a number that was asked for.
    """

    config: LlamaConfig
    run: TrainSpec
    rows: int
    at_worst: bool = False

    @property
    def mesh(self) -> Mesh:
        assert self.run.mesh is not None
        return self.run.mesh

    @property
    def micro_batches(self) -> int:
        return self.run.accumulation or 1

    @property
    def tokens(self) -> int:
        """Of a step, on all devices."""
        return self.micro_batches * self.rows * row_parts(self.mesh) * self.run.row_tokens

    def with_layers(self, count: int, layout: Layout) -> TrainPlan:
        """The same step of a model with so many layers, and one micro-batch."""
        config = dataclasses.replace(self.config, num_hidden_layers=count)
        run = dataclasses.replace(self.run, layout=layout, accumulation=1)
        return TrainPlan(config, run, self.rows)


def plan_training(
    config: LlamaConfig, run: TrainSpec, devices: Sequence[Any], shape: MeshShape | None, rows: int
) -> TrainPlan:
    """Args:
      shape: None cuts rows and weights over all devices, as `parallel.mesh.training_mesh`.

    Raises:
      HumpbackError: the devices do not divide into the shape, or it does not cut the weights.
    """
    mesh = make_mesh(shape or cut_rows_and_weights(len(devices), config.hidden_size), devices)
    check_sharded(config, mesh)
    return TrainPlan(config, dataclasses.replace(run, mesh=mesh), rows)


def most_rows(examples: int, parts: int, accumulation: int) -> int:
    """Rows that a device computes at a time, at most: those of a batch in which no two examples
    share a row.

    Of accumulation and rows each is what this function makes of the other.

    Args:
      parts: devices with rows of their own (`row_parts`).
    """
    return -(-examples // (parts * accumulation))


def lower_step(plan: TrainPlan) -> tuple[jax.stages.Lowered, TrainState, Batch]:
    """The step's program, and the shapes of what it takes."""
    mesh, run = plan.mesh, plan.run
    state = state_of(plan)
    batch = _abstract_batch(plan.micro_batches, plan.rows * row_parts(mesh), run.row_tokens, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(_step_spec(plan), _optimizer(plan))
    return step.lower(state, batch, key), state, batch


def state_of(plan: TrainPlan) -> TrainState:
    """Shapes of what the step carries, and where they lie."""
    return abstract_state(_step_spec(plan), _optimizer(plan))


def _optimizer(plan: TrainPlan) -> optax.GradientTransformation:
    return make_optimizer(plan.run.optimizer, plan.run.steps)


def _step_spec(plan: TrainPlan) -> StepSpec:
    longest = min(plan.run.row_tokens, plan.config.max_position_embeddings)
    return plan.run.of_step(plan.config, 2, longest)  # sources: seed and augmented pairs


def _abstract_batch(micro_batches: int, rows: int, tokens: int, mesh: Mesh) -> Batch:
    where = NamedSharding(mesh, P(None, ROWS))
    dtypes = {"mask": jnp.bool_, "keys": jnp.uint32}
    fields: Any = [
        jax.ShapeDtypeStruct(
            (micro_batches, rows, tokens), dtypes.get(name, jnp.int32), sharding=where
        )
        for name in Batch._fields
    ]
    return Batch._make(fields)
