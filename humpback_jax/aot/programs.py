"""The programs of a config, compiled for a slice: what each needs there, and how long it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from humpback_jax.aot.decode import compile_decode, plan_decode
from humpback_jax.aot.estimate import (
    Costs,
    Roofline,
    bytes_by_kind,
    needed_flops,
    step_costs,
)
from humpback_jax.aot.memory import bytes_report, compile_program
from humpback_jax.aot.train import TrainPlan, lower_step, most_rows, plan_training
from humpback_jax.compute import choose_compute
from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.models import load_config
from humpback_jax.parallel.batches import row_parts
from humpback_jax.parallel.topology import Chip, tpu_slice
from humpback_jax.sampling.memory import NoRoom
from humpback_jax.stages.settings import train_spec

ALL = ("train", "prefill", "decode")
CHARS_PER_TOKEN = 3  # of long documents, at least


def compile_for(
    config: Any,
    topology: str,
    rows: int | None = None,
    names: Sequence[str] = ALL,
) -> dict[str, Any]:
    """The programs that train, write and rate as a run of `config` would, on a slice.

    Args:
      rows: of `train.row_tokens` places that each device trains on at a time; None: the most that
        a batch of the config can take.
      names: of the programs to compile.

    Returns:
      Under each of `names` what `compile_train` or `compile_decode` reports; of generation on a
      slice that holds no row, `fits` (False) and the reason.

    Raises:
      HumpbackError: an unknown slice, program or model, or a mesh that does not fit them.
    """
    for name in names:
        if name not in ALL:
            raise HumpbackError(f"program {name!r} is unknown; choose from {', '.join(ALL)}.")
    architecture = load_config(config.base.model)
    devices, chip = tpu_slice(topology)
    report: dict[str, Any] = {"topology": topology, "chips": len(devices)}
    if "train" in names:
        plan = training_plan(config, architecture, devices, rows)
        report["train"] = compile_train(plan, chip)
    generating = [name for name in names if name != "train"]
    if generating:
        report |= _generation(config, architecture, devices, chip, generating)
    for name in names:
        report[name]["topology"] = topology
    return report


def training_plan(
    config: Any, architecture: LlamaConfig, devices: Sequence[Any], rows: int | None
) -> TrainPlan:
    """The step of the config's section `train` on its mesh; `rows` as in `compile_for`."""
    compute = choose_compute(**config.compute, platform="tpu")
    # Where the step table decides on the batch, it is that of the most examples.
    count = config.train.step_table[-1][0]
    run = train_spec(config.train, compute, config.seed, count)
    plan = plan_training(architecture, run, devices, compute.mesh, rows or 1)
    if rows is not None:
        return plan
    most = most_rows(run.batch_examples, row_parts(plan.mesh), plan.micro_batches)
    return dataclasses.replace(plan, rows=most, at_worst=True)


def compile_train(plan: TrainPlan, chip: Chip) -> dict[str, Any]:
    """Compiles the step, and estimates its time where it fits (`estimate.step_costs`).

    Returns:
      the plan, `bytes_report`, and: flops, memory_bytes and collective_bytes of a device;
      est_parts, the seconds that each part would take alone; est_step_s and est_mfu.
    """
    lowered, state, batch = lower_step(plan)
    compiled = compile_program(lowered)
    arguments = {
        "parameters": (state.trainable, state.frozen),
        "optimizer": state.optimizer,
        "gradients": state.trainable,
        "batch": batch,
    }
    report = {**described(plan), **bytes_report(compiled, arguments, chip)}
    if not report["fits"]:
        return report
    del lowered, compiled
    jax.clear_caches()
    return report | estimated(plan, step_costs(plan), chip)


def described(plan: TrainPlan) -> dict[str, Any]:
    """The plan's choices as plain data."""
    return {
        "mesh": {axis: int(size) for axis, size in plan.mesh.shape.items()},
        "chips": plan.mesh.size,
        "rows": plan.rows,
        "at_worst": plan.at_worst,
        "batch_examples": plan.run.batch_examples,
        "row_tokens": plan.run.row_tokens,
        "micro_batches": plan.micro_batches,
        "tokens": plan.tokens,
        "remat": plan.run.remat,
        "lora": plan.run.lora.rank if plan.run.lora else 0,
    }


def estimated(plan: TrainPlan, costs: Costs, chip: Chip) -> dict[str, Any]:
    """Costs as a report, with the seconds that they come to."""
    roofline = Roofline.of(costs, chip)
    seconds = roofline.seconds
    return {
        "flops": costs.flops,
        "memory_bytes": costs.memory,
        "collective_bytes": bytes_by_kind(costs.sent),
        "est_parts": vars(roofline),
        "est_step_s": seconds,
        "est_tokens_per_s": plan.tokens / seconds,
        "est_mfu": needed_flops(plan) / (seconds * plan.mesh.size * chip.flops),
    }


def _generation(
    config: Any, architecture: LlamaConfig, devices: Sequence[Any], chip: Chip, names: Sequence[str]
) -> dict[str, Any]:
    compute = choose_compute(**config.compute, platform="tpu")
    tokens = config.corpus.max_chars // CHARS_PER_TOKEN + config.augment.max_new_tokens
    longest = min(tokens, architecture.max_position_embeddings)
    try:
        plan = plan_decode(architecture, devices, chip, compute, longest)
    except NoRoom as error:
        # What was found about training is worth minutes, and stays.
        refused = {"fits": False, "reason": str(error), "hbm_bytes": chip.memory}
        return {name: {**refused, "chips": len(devices)} for name in names}
    return compile_decode(architecture, plan, compute, chip, names)
