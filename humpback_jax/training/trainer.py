"""The training loop: from base parameters and tokenised examples to tuned parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np

from humpback_jax.allocator import return_free_memory
from humpback_jax.device_memory import room_for
from humpback_jax.errors import HumpbackError, Preempted
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.llama import Params
from humpback_jax.parallel.batches import row_parts
from humpback_jax.parallel.processes import connect
from humpback_jax.parallel.rules import check_sharded
from humpback_jax.training.examples import ExampleIndex, TrainingExample, index_of
from humpback_jax.training.goodput import Goodput
from humpback_jax.training.loss import Batch
from humpback_jax.training.mixture import Share, loss_weights, pools_of, shares_of
from humpback_jax.training.optimizer import OptimizerSpec, learning_rate, make_optimizer
from humpback_jax.training.options import StepOptions
from humpback_jax.training.order import BatchOrder
from humpback_jax.training.packing import PackingPlan, packed_rows, place_batch, plan_packing
from humpback_jax.training.state import TrainState, abstract_state, finished_params, initial_state
from humpback_jax.training.step import StepSpec, make_train_step
from humpback_jax.training.trace import StepTrace
from humpback_jax.training.utilization import Utilization, peak_flops
from humpback_jax.training.validation import make_validation
from humpback_jax.training.watch import Guard, Watch


@dataclasses.dataclass(frozen=True)
class TrainSpec(StepOptions):
    """Settings of one SFT run. All sizes are static, so that a run compiles one program.

    Attributes:
      steps: optimizer steps. batch_examples: examples a step.
      row_tokens: places of a packed row, at most (`plan_packing`).
      accumulation: micro-batches a step; None: each has a single row for each device.
      eval_every, resume_every, log_every: in steps; 0 switches off.
      select: hand out the parameters after the last step, or those with the lowest loss on the
        validation rows, which are then also looked at after the last step.
      spike_factor: stops at a loss that jumps up (`watch.Guard`); 0 never does.
      checkpoint_epochs: also hand out the parameters at the end of every epoch.
      mixture: how much of each source is used, and how much it counts; a source that it does not
        name is used whole, with weight 1.
    """

    steps: int
    batch_examples: int = 32
    row_tokens: int = 2048
    accumulation: int | None = 1
    optimizer: OptimizerSpec = OptimizerSpec()
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    resume_every: int = 0
    select: Literal["last", "best"] = "last"
    spike_factor: float = 0.0
    checkpoint_epochs: bool = False
    mixture: tuple[Share, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_examples", "row_tokens", "accumulation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HumpbackError(f"train.{name}={value} must be at least 1.")

    def of_step(
        self,
        config: LlamaConfig,
        num_sources: int,
        longest: int | None,
        widths: tuple[int, ...] = (),
        weights: tuple[float, ...] = (),
    ) -> StepSpec:
        """What is static about a step of the run on this model and these rows: see `StepSpec`."""
        options = {field.name: getattr(self, field.name) for field in fields(StepOptions)}
        return StepSpec(config, num_sources, longest, widths, weights, **options)


class Resume(Protocol):
    """Where a run under way is kept (`checkpoint.ResumeFolder`)."""

    def save(self, state: TrainState) -> None: ...

    def restore(self, like: TrainState) -> TrainState | None: ...

    def save_best(self, state: TrainState, nll: float) -> None: ...

    def best_nll(self) -> float: ...

    def restore_best(self, like: TrainState) -> TrainState: ...

    def wait(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Trained:
    """Full float32 parameters (adapter merged), stacked by layer, and the adapter if any.

    history: rows of the steps that this process did, and of validation.
    steps: of the whole run. step: after which the parameters were so.
    compile_s: seconds that the step's program took to compile; 0 where no step was left to do.
    goodput: seconds by what they went to (`goodput.PHASES`).
    lora: what the adapter is; None without one.
    """

    params: Params
    adapter: Params | None
    history: list[dict[str, Any]]
    plan: PackingPlan
    steps: int
    step: int
    compile_s: float
    goodput: dict[str, float]
    lora: LoraSpec | None


class Batches:
    """Which examples each step of a run takes, and how they are packed.

    Attributes:
      order: of the examples. plan: the shapes that fit all batches.
      weights: in the loss, of the tokens of each source; () where all count alike.
    """

    def __init__(
        self, spec: TrainSpec, examples: Sequence[TrainingExample], index: ExampleIndex
    ) -> None:
        self._examples, self._index, self._mesh = examples, index, spec.mesh
        shares = shares_of(index.names, spec.mixture)
        self.weights = loss_weights(shares)
        pools = pools_of(index.keys, index.sources, shares)
        self.order = BatchOrder(index.keys, spec.batch_examples, spec.seed, pools)
        parts = row_parts(spec.mesh)
        self.plan = plan_packing(
            index, self.order, spec.steps, spec.row_tokens, spec.accumulation, parts
        )

    def of(self, step: int) -> tuple[np.ndarray, Batch]:
        """Indices [batch_examples] of a step's examples, and these on the mesh (`place_batch`)."""
        indices = self.order.indices(step)
        rows = packed_rows(self._index, indices, self.plan)
        names = self._index.names
        return indices, place_batch(self._examples, rows, self.plan, names, self._mesh)


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
    evidence: Path | None = None,
    profile: Path | None = None,
) -> Trained:
    """Tunes `base` on `examples`.

    Args:
      base: stacked parameters; not modified. Trained in float32 whatever their dtype.
      examples: in memory, or a `TokenStore`; a process reads the tokens of its own devices' rows.
      on_metrics: receives one row per logged step, once the next is under way, and per validation.
      on_epoch: receives an epoch's number, from 1, and the parameters as `Trained` would hold them.
        The next step overwrites them in place: they are valid until the callback returns.
      on_plan: receives how batches are packed, before anything is compiled.
      stops: whether to stop after so many steps, having saved the state in `resume`.
      evidence: folder where the batch is described at which a run stops (`watch.Guard`).
      profile: folder for a trace of some steps (`trace.StepTrace`).

    Raises:
      Preempted: `stops` said so.
      HumpbackError: too little data, an example without supervised tokens or longer than the
        model's window, a mesh that does not cut the weights, a lack of memory, a loss that is not
        finite or jumps (the message names the step and the ids of its examples), or a state that
        cannot be saved.
    """
    goodput = Goodput()
    with goodput.phase("setup"):
        if spec.mesh is not None:
            check_sharded(config, spec.mesh)
            connect(spec.mesh)
        window = "the model's window", config.max_position_embeddings
        index = index_of(examples)
        _check("training", examples, index, window, ("a row", spec.row_tokens))
        _check("validation", validation, index_of(validation), window)
        _check_selection(spec, validation, resume)
        batches = Batches(spec, examples, index)
        plan = batches.plan
        on_plan(plan)
        step_spec = spec.of_step(
            config, len(index.names), plan.longest, plan.widths, batches.weights
        )
        optimizer = make_optimizer(spec.optimizer, spec.steps)
        jitted, step_fn = make_train_step(step_spec, optimizer), None
        like = abstract_state(step_spec, optimizer)
        dropout_key = jax.random.key(spec.seed)
        if validation:
            validate = make_validation(step_spec, validation, plan.micro_rows)
    best, saved = math.inf, None
    if resume is not None:
        with goodput.phase("checkpoint"):
            saved = resume.restore(like)
            best = resume.best_nll() if spec.select == "best" else best
    room = functools.partial(room_for, *_needs(spec, plan))
    with goodput.phase("setup"), room():
        state = initial_state(step_spec, base, optimizer, spec.seed, saved)
    history: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        history.append(row)
        on_metrics(row)

    watch = Watch(
        examples,
        index,
        learning_rate(spec.optimizer, spec.steps),
        Utilization(config, spec.lora is not None, spec.remat, peak_flops(spec.mesh)),
        Guard(spec.spike_factor, evidence),
        goodput,
        report,
    )
    first = int(state.step)
    trace = StepTrace(profile, first, spec.steps)
    try:
        with room():
            for step in range(first, spec.steps):
                with goodput.phase("data") if watch.idle() else contextlib.nullcontext():
                    indices, micro_batches = batches.of(step)
                if step_fn is None:
                    with goodput.phase("compile"):
                        step_fn = jitted.lower(state, micro_batches, dropout_key).compile()
                        return_free_memory()
                trace.before(step, state)
                state, metrics = step_fn(state, micro_batches, dropout_key)
                trace.after(step, metrics)
                watch.add(step, indices, metrics)
                done = step + 1
                if spec.log_every and step % spec.log_every == 0:
                    watch.look(behind=1)
                if validation and _validates(spec, done):
                    watch.look()
                    with goodput.phase("validation"):
                        measured = validate(state)
                        nll = measured["validation_nll"]
                    report({"step": done, **measured})
                    if resume is not None and spec.select == "best" and nll < best:
                        with goodput.phase("checkpoint"):
                            resume.save_best(state, nll)
                        best = nll
                # Before the state: a run that goes on from it does not hand out this epoch again.
                epoch = batches.order.epochs(done)
                if spec.checkpoint_epochs and epoch > batches.order.epochs(step):
                    watch.look()
                    with goodput.phase("checkpoint"):
                        on_epoch(epoch, finished_params(state, step_spec, base)[0])
                stopping = stops(done) and done < spec.steps
                regular = spec.resume_every and done % spec.resume_every == 0 and done < spec.steps
                if resume is not None and (regular or stopping):
                    watch.look()
                    with goodput.phase("checkpoint"):
                        resume.save(state)
                if stopping:
                    fate = (
                        "saved; run it again to continue" if resume else "lost: nothing saves them"
                    )
                    raise Preempted(f"{done} of {spec.steps} steps are {fate}.")
            watch.look()
    finally:
        trace.stop()
        if resume is not None:
            with goodput.phase("checkpoint"):
                resume.wait()
    fate = "Run the same command again with more of it."
    if resume is not None and spec.lora is not None:
        fate = f"What was trained is kept. {fate}"
        if first < spec.steps:
            with goodput.phase("checkpoint"):  # merging takes memory: it may fail
                resume.save(state)
                resume.wait()
    if resume is not None and spec.select == "best":
        with goodput.phase("checkpoint"):
            del state  # makes room
            state = resume.restore_best(like)
    state = state._replace(frozen={}, optimizer=())  # makes room
    with room_for("the tuned weights", fate):
        params, adapter = finished_params(state, step_spec, base)
    took = goodput.seconds()
    selected = int(state.step)
    return Trained(
        params, adapter, history, plan, spec.steps, selected, took["compile"], took, spec.lora
    )


def _needs(spec: TrainSpec, plan: PackingPlan) -> tuple[str, str]:
    """What a device has to hold, and what to do where it cannot."""
    rows = plan.micro_rows // row_parts(spec.mesh)
    ways = []
    if rows > 1:
        count = 2 * plan.num_rows // plan.micro_rows
        ways.append(f"more micro-batches (train.accumulation={count})")
    if spec.remat != "full":
        ways.append("activations computed again (train.remat=full)")
    if spec.lora is None:
        ways.append("an adapter (train.lora.rank=16)")
    elif spec.lora.base != "int8":
        ways.append("an int8 base (train.lora.base=int8)")
    ways.append("shorter rows (train.row_tokens)")
    return (
        f"the training state and a micro-batch of {rows} x {plan.row_tokens:,} tokens a device",
        f"Take {', '.join(ways)}, or a larger mesh: more devices along fsdp or tensor.",
    )


def _check_selection(
    spec: TrainSpec, validation: Sequence[TrainingExample], resume: Resume | None
) -> None:
    if spec.select == "best" and not (validation and spec.eval_every and resume is not None):
        raise HumpbackError(
            "train.select=best needs validation rows, train.eval_every of at least 1, and a folder "
            "to keep the best parameters in."
        )


def _validates(spec: TrainSpec, done: int) -> bool:
    last = spec.select == "best" and done == spec.steps
    return spec.eval_every > 0 and (done % spec.eval_every == 0 or last)


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
