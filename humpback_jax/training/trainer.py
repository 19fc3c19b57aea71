"""The training loop: from base parameters and tokenised examples to tuned parameters."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from humpback_jax.errors import HumpbackError, Preempted
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import LoraSpec, Precision
from humpback_jax.model.llama import Layout, Params
from humpback_jax.model.remat import Remat
from humpback_jax.parallel.batches import place_rows, row_parts
from humpback_jax.training.loss import NLL, Batch, Objective
from humpback_jax.training.optimizer import OptimizerSpec, learning_rate, make_optimizer
from humpback_jax.training.packing import (
    BatchOrder,
    PackingPlan,
    TrainingExample,
    batch_at,
    plan_packing,
)
from humpback_jax.training.state import TrainState, finished_params, initial_state
from humpback_jax.training.step import StepMetrics, StepSpec, make_train_step
from humpback_jax.training.validation import make_validation


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """Settings of one SFT run. All sizes are static, so that a run compiles one program.

    Attributes:
      steps: optimizer steps. batch_examples: examples a step.
      row_tokens: places of a packed row, at most (`plan_packing`).
      accumulation: micro-batches a step; None: each has a single row for each device.
      dropout: residual dropout. dropout_ramp: linear in the layer, from 0 at the bottom to
        `dropout` at the top (LIMA).
      remat: see `model/remat.py`. neftune_alpha: see `training/neftune.py`; 0 switches off.
      eval_every, resume_every, log_every: in steps; 0 switches off.
      checkpoint_epochs: also hand out the parameters at the end of every epoch.
      mesh: the devices that share the work; a batch's rows are filled up to a multiple of those
        with rows of their own.
    """

    steps: int
    batch_examples: int = 32
    row_tokens: int = 2048
    accumulation: int | None = 1
    optimizer: OptimizerSpec = OptimizerSpec()
    lora: LoraSpec | None = None
    dropout: float = 0.0
    precision: Precision = Precision()
    layout: Layout = "scan"
    remat: Remat = "none"
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    resume_every: int = 0
    checkpoint_epochs: bool = False
    kernels: Kernels = XLA
    mesh: Mesh | None = None
    objective: Objective = NLL
    dropout_ramp: bool = False
    neftune_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_examples", "row_tokens", "accumulation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HumpbackError(f"train.{name}={value} must be at least 1.")


class Resume(Protocol):
    """Where a run under way is kept (`checkpoint.ResumeFolder`)."""

    def save(self, state: TrainState) -> None: ...

    def restore(self, state: TrainState) -> TrainState | None: ...


@dataclasses.dataclass(frozen=True)
class Trained:
    """Full float32 parameters (adapter merged), stacked by layer, and the adapter if any.

    compile_s: seconds that the step's program took to compile; 0 where no step was left to do.
    """

    params: Params
    adapter: Params | None
    history: list[dict[str, Any]]
    plan: PackingPlan
    compile_s: float


def train(
    config: LlamaConfig,
    base: Params,
    examples: Sequence[TrainingExample],
    spec: TrainSpec,
    *,
    validation: Sequence[TrainingExample] = (),
    resume: Resume | None = None,
    on_metrics: Callable[[dict[str, Any]], None] = lambda row: None,
    on_epoch: Callable[[int, Params], None] = lambda epoch, params: None,
    stops: Callable[[int], bool] = lambda step: False,
) -> Trained:
    """Tunes `base` on `examples`.

    Args:
      base: stacked parameters; not modified. Trained in float32 whatever their dtype.
      on_metrics: receives one row per logged step and per validation.
      on_epoch: receives an epoch's number, from 1, and the parameters as `Trained` would hold them.
        The next step overwrites them in place: they are valid until the callback returns.
      stops: whether to stop after so many steps, having saved the state in `resume`.

    Raises:
      Preempted: `stops` said so.
      HumpbackError: too little data, an example without supervised tokens or longer than the
        model's window, or a loss that is not finite (the message names the step and the ids of its
        examples).
    """
    for kind, given in (("training", examples), ("validation", validation)):
        for example in given:
            if example.supervised == 0:
                raise HumpbackError(f"{kind} example {example.id} has no supervised token.")
            if example.length > config.max_position_embeddings:
                raise HumpbackError(
                    f"{kind} example {example.id} takes {example.length} places, the model's "
                    f"window has {config.max_position_embeddings}. Shorten it, or let on_long drop "
                    "or truncate it."
                )
    order = BatchOrder([example.id for example in examples], spec.batch_examples, spec.seed)
    plan = plan_packing(
        examples, order, spec.steps, spec.row_tokens, spec.accumulation, row_parts(spec.mesh)
    )
    sources = sorted({example.source for example in examples})
    step_spec = StepSpec(
        config,
        spec.layout,
        spec.precision,
        plan.max_targets,
        len(sources),
        spec.lora,
        spec.dropout,
        spec.remat,
        plan.longest,
        spec.kernels,
        spec.mesh,
        spec.objective,
        spec.dropout_ramp,
        spec.neftune_alpha,
    )
    optimizer = make_optimizer(spec.optimizer, spec.steps)
    rate = learning_rate(spec.optimizer, spec.steps)
    jitted, step_fn = make_train_step(step_spec, optimizer), None
    state = initial_state(step_spec, base, optimizer, spec.seed)
    state = (resume.restore(state) if resume else None) or state
    dropout_key = jax.random.key(spec.seed)
    mean_nll = None
    if validation:
        mean_nll = make_validation(step_spec, validation, spec.row_tokens, plan.micro_rows)
    history: list[dict[str, Any]] = []
    pending: list[tuple[int, list[str], StepMetrics]] = []
    compile_s = 0.0
    clock = time.monotonic()

    def flush() -> None:
        if not pending:
            return
        jax.block_until_ready(pending[-1][2])
        now = time.monotonic()
        for step, ids, metrics in pending:
            row = _metrics_row(step, ids, metrics, sources, (now - clock) / len(pending))
            row["learning_rate"] = float(rate(step))
            history.append(row)
            on_metrics(row)
        pending.clear()

    def validate(done: int) -> None:
        flush()
        assert mean_nll is not None
        row = {"step": done, "validation_nll": mean_nll(state)}
        history.append(row)
        on_metrics(row)

    for step in range(int(state.step), spec.steps):
        if not pending:
            clock = time.monotonic()
        batch, ids = batch_at(examples, order, step, plan, sources)
        micro_batches = _micro_batches(batch, plan, spec.mesh)
        if step_fn is None:
            step_fn = jitted.lower(state, micro_batches, dropout_key).compile()
            compile_s, clock = time.monotonic() - clock, time.monotonic()
        state, metrics = step_fn(state, micro_batches, dropout_key)
        pending.append((step, ids, metrics))
        done = step + 1
        if (spec.log_every and done % spec.log_every == 0) or done == spec.steps:
            flush()
        if validation and spec.eval_every and done % spec.eval_every == 0:
            validate(done)
        stopping = stops(done) and done < spec.steps
        regular = spec.resume_every and done % spec.resume_every == 0 and done < spec.steps
        if resume and (regular or stopping):
            flush()
            resume.save(state)
        if spec.checkpoint_epochs and _ends_epoch(done, spec.batch_examples, len(examples)):
            flush()
            epoch = done * spec.batch_examples // len(examples)
            on_epoch(epoch, finished_params(state, step_spec)[0])
        if stopping:
            fate = "saved; run it again to continue" if resume else "lost: nothing saves them"
            raise Preempted(f"{done} of {spec.steps} steps are {fate}.")
    params, adapter = finished_params(state, step_spec)
    return Trained(params, adapter, history, plan, compile_s)


def _micro_batches(batch: Batch, plan: PackingPlan, mesh: Mesh | None) -> Batch:
    """[rows, tokens] -> [micro-batches, micro_rows, tokens], on the mesh."""

    def cut(x: jax.Array) -> jax.Array:
        return place_rows(x.reshape(-1, plan.micro_rows, x.shape[-1]), mesh, 1)

    return Batch._make(map(cut, batch))


def _ends_epoch(done: int, batch_examples: int, count: int) -> bool:
    return done * batch_examples // count > (done - 1) * batch_examples // count


def _metrics_row(
    step: int, ids: list[str], metrics: StepMetrics, sources: list[str], seconds: float
) -> dict[str, Any]:
    nll, supervised = np.asarray(metrics.nll), np.asarray(metrics.supervised)
    loss = float(nll.sum() / supervised.sum())
    if not np.isfinite(loss) or not np.isfinite(float(metrics.grad_norm)):
        raise HumpbackError(
            f"step {step + 1}: the loss is {loss} and the gradient norm "
            f"{float(metrics.grad_norm)}; examples of that batch: {', '.join(ids)}. Lower the "
            "learning rate or inspect them."
        )
    row: dict[str, Any] = {
        "step": step + 1,
        "loss": loss,
        "grad_norm": float(metrics.grad_norm),
        "tokens": int(metrics.tokens),
        "supervised_tokens": int(supervised.sum()),
        "examples": len(ids),
        "seconds": seconds,
        "tokens_per_s": int(metrics.tokens) / seconds,
        "supervised_tokens_per_s": int(supervised.sum()) / seconds,
    }
    for index, source in enumerate(sources):
        if supervised[index]:
            row[f"loss/{source}"] = float(nll[index] / supervised[index])
            row[f"supervised_tokens/{source}"] = int(supervised[index])
    return row
