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
from humpback_jax.parallel.batches import row_parts
from humpback_jax.training.examples import ExampleIndex, TrainingExample, index_of
from humpback_jax.training.loss import NLL, Objective
from humpback_jax.training.mixture import Share, loss_weights, pools_of, shares_of
from humpback_jax.training.optimizer import OptimizerSpec, learning_rate, make_optimizer
from humpback_jax.training.order import BatchOrder
from humpback_jax.training.packing import PackingPlan, packed_rows, place_batch, plan_packing
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
      dropout: residual dropout.
      eval_every, resume_every, log_every: in steps; 0 switches off.
      checkpoint_epochs: also hand out the parameters at the end of every epoch.
      mesh: the devices that share the work; a batch's rows are filled up to a multiple of those
        with rows of their own.
      mixture: how much of each source is used, and how much it counts; a source that it does not
        name is used whole, with weight 1.
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
    remat: bool = False
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    resume_every: int = 0
    checkpoint_epochs: bool = False
    kernels: Kernels = XLA
    mesh: Mesh | None = None
    objective: Objective = NLL
    mixture: tuple[Share, ...] = ()

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
    on_plan: Callable[[PackingPlan], None] = lambda plan: None,
    stops: Callable[[int], bool] = lambda step: False,
) -> Trained:
    """Tunes `base` on `examples`.

    Args:
      base: stacked parameters; not modified. Trained in float32 whatever their dtype.
      examples: in memory, or a `TokenStore`; a process reads the tokens of its own devices' rows.
      on_metrics: receives one row per logged step and per validation.
      on_epoch: receives an epoch's number, from 1, and the parameters as `Trained` would hold them.
        The next step overwrites them in place: they are valid until the callback returns.
      on_plan: receives how batches are packed, before anything is compiled.
      stops: whether to stop after so many steps, having saved the state in `resume`.

    Raises:
      Preempted: `stops` said so.
      HumpbackError: too little data, an example without supervised tokens or longer than the
        model's window, or a loss that is not finite (the message names the step and the ids of its
        examples).
    """
    index = index_of(examples)
    window = "the model's window", config.max_position_embeddings
    _check("training", examples, index, window, ("a row", spec.row_tokens))
    _check("validation", validation, index_of(validation), window)
    shares = shares_of(index.names, spec.mixture)
    pools = pools_of(index.keys, index.sources, shares)
    order = BatchOrder(index.keys, spec.batch_examples, spec.seed, pools)
    plan = plan_packing(
        index, order, spec.steps, spec.row_tokens, spec.accumulation, row_parts(spec.mesh)
    )
    on_plan(plan)
    sources = index.names
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
        loss_weights(shares),
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
    pending: list[tuple[int, np.ndarray, StepMetrics]] = []
    compile_s = 0.0
    clock = time.monotonic()

    def flush() -> None:
        if not pending:
            return
        jax.block_until_ready(pending[-1][2])
        now = time.monotonic()
        for step, indices, metrics in pending:
            _check_finite(step, metrics, examples, indices)
            row = _metrics_row(step, metrics, sources, (now - clock) / len(pending))
            row["examples"] = len(indices)
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
        indices = order.indices(step)
        rows = packed_rows(index, indices, plan.row_tokens)
        micro_batches = place_batch(examples, rows, plan, sources, spec.mesh)
        if step_fn is None:
            step_fn = jitted.lower(state, micro_batches, dropout_key).compile()
            compile_s, clock = time.monotonic() - clock, time.monotonic()
        state, metrics = step_fn(state, micro_batches, dropout_key)
        pending.append((step, indices, metrics))
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
        if spec.checkpoint_epochs and _ends_epoch(done, spec.batch_examples, order.epoch_examples):
            flush()
            epoch = done * spec.batch_examples // order.epoch_examples
            on_epoch(epoch, finished_params(state, step_spec)[0])
        if stopping:
            fate = "saved; run it again to continue" if resume else "lost: nothing saves them"
            raise Preempted(f"{done} of {spec.steps} steps are {fate}.")
    params, adapter = finished_params(state, step_spec)
    return Trained(params, adapter, history, plan, compile_s)


def _check(
    kind: str,
    examples: Sequence[TrainingExample],
    index: ExampleIndex,
    *limits: tuple[str, int],
) -> None:
    for number in np.flatnonzero(index.supervised == 0)[:1]:
        raise HumpbackError(f"{kind} example {examples[number].id} has no supervised token.")
    for what, places in limits:
        for number in np.flatnonzero(index.lengths > places)[:1]:
            raise HumpbackError(
                f"{kind} example {examples[number].id} takes {index.lengths[number]} places, "
                f"{what} has {places}. Shorten it, raise row_tokens, or let on_long drop or "
                "truncate it."
            )


def _ends_epoch(done: int, batch_examples: int, count: int) -> bool:
    return done * batch_examples // count > (done - 1) * batch_examples // count


def _check_finite(
    step: int, metrics: StepMetrics, examples: Sequence[TrainingExample], indices: np.ndarray
) -> None:
    loss, norm = float(np.asarray(metrics.nll).sum()), float(metrics.grad_norm)
    if not np.isfinite(loss) or not np.isfinite(norm):
        names = ", ".join(examples[index].id for index in indices)
        raise HumpbackError(
            f"step {step + 1}: the loss is {loss} and the gradient norm {norm}; examples of that "
            f"batch: {names}. Lower the learning rate or inspect them."
        )


def _metrics_row(
    step: int, metrics: StepMetrics, sources: Sequence[str], seconds: float
) -> dict[str, Any]:
    nll, supervised = np.asarray(metrics.nll), np.asarray(metrics.supervised)
    row: dict[str, Any] = {
        "step": step + 1,
        "loss": float(nll.sum() / supervised.sum()),
        "grad_norm": float(metrics.grad_norm),
        "tokens": int(metrics.tokens),
        "supervised_tokens": int(supervised.sum()),
        "seconds": seconds,
        "tokens_per_s": int(metrics.tokens) / seconds,
        "supervised_tokens_per_s": int(supervised.sum()) / seconds,
    }
    for index, source in enumerate(sources):
        if supervised[index]:
            row[f"loss/{source}"] = float(nll[index] / supervised[index])
            row[f"supervised_tokens/{source}"] = int(supervised[index])
    return row
