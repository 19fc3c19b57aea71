"""What a config's programs need on a TPU slice, found by compiling them for it, on any machine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from humpback_jax.compute import choose_compute
from humpback_jax.errors import HumpbackError
from humpback_jax.model.cache import capacity_for
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import count_parameters
from humpback_jax.models import load_config
from humpback_jax.parallel.mesh import MeshShape, axis_size, make_mesh, one_copy, parse_mesh
from humpback_jax.parallel.rules import abstract_params
from humpback_jax.parallel.topology import Chip, tpu_slice
from humpback_jax.sampling.engine import Shape
from humpback_jax.sampling.memory import KEPT_FREE, rows_that_fit
from humpback_jax.sampling.prefix import abstract_prefix
from humpback_jax.sampling.programs import (
    abstract_slots,
    decode_program,
    empty_chunks,
    prefill_program,
)

PRECISION = Precision("bfloat16", "bfloat16")
CHARS_PER_TOKEN = 3  # of long documents, at least


def compile_for(config: Any, model: str | None, topology: str) -> dict[str, Any]:
    """The programs that write and rate instructions as a run of `config` would, on a slice.

    Args:
      model: instead of the config's base.

    Returns:
      Under "prefill" and "decode" what `compile_decode` reports.

    Raises:
      HumpbackError: an unknown slice or model, or one that the slice does not hold.
    """
    architecture = load_config(model or config.base.model)
    devices, chip = tpu_slice(topology)
    compute = choose_compute("bfloat16", config.compute.batch_size, platform="tpu")
    engine = compute.engine_shape
    tokens = config.corpus.max_chars // CHARS_PER_TOKEN + config.augment.max_new_tokens
    tokens = min(tokens, architecture.max_position_embeddings)
    plan = plan_decode(
        architecture,
        devices,
        chip,
        parse_mesh(config.compute.mesh),
        engine.slots,
        tokens,
        engine.chunks * engine.chunk_tokens,
        compute.kernels,
    )
    return {
        "topology": topology,
        **compile_decode(architecture, plan, engine, chip, compute.kernels),
    }


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """How generation is spread over a slice.

    Attributes:
      mesh: of one copy of the model. copies: that the slice holds.
      slots, capacity: rows of a copy, and tokens of a row.
    """

    mesh: Mesh
    copies: int
    slots: int
    capacity: int


def plan_decode(
    config: LlamaConfig,
    devices: Sequence[Any],
    chip: Chip,
    shape: MeshShape | None,
    rows: int,
    tokens: int,
    prefill_tokens: int,
    kernels: Kernels = XLA,
) -> DecodePlan:
    """A copy of the model on each device, if that holds it and `rows` rows, or one over all.

    Args:
      shape: taken as it is where given. tokens: of a row, prompt and answer together.

    Raises:
      HumpbackError: not even all devices hold the weights and one row.
    """
    capacity = capacity_for(tokens)
    budget = int(chip.memory * (1 - KEPT_FREE))
    whole = one_copy(len(devices), config.num_key_value_heads)
    choices = [shape] if shape else [MeshShape(), whole]
    best: tuple[int, MeshShape] | None = None
    reason: HumpbackError | None = None
    for choice in choices:
        if len(devices) % choice.replica:
            break
        weights = 2 * count_parameters(config) // choice.replica
        try:
            fitting = rows_that_fit(
                config,
                PRECISION.activations,
                capacity,
                rows,
                budget,
                weights,
                prefill_tokens,
                choice.tensor,
                choice.fsdp if kernels.cuts_the_cache(PRECISION) else 1,
            )
        except HumpbackError as error:
            reason = error
            continue
        if best is None or fitting > best[0]:
            best = fitting, choice
        if fitting == rows:
            break
    if best is None:
        raise reason or HumpbackError(f"{shape} does not fit {len(devices)} devices.")
    fitting, choice = best
    copies = choice.data or len(devices) // choice.replica
    if copies * choice.replica != len(devices):
        make_mesh(choice, devices)  # raises
    alone = dataclasses.replace(choice, data=1)
    return DecodePlan(make_mesh(alone, devices[: choice.replica]), copies, fitting, capacity)


def compile_decode(
    config: LlamaConfig, plan: DecodePlan, engine: Shape, chip: Chip, kernels: Kernels = XLA
) -> dict[str, Any]:
    """Compiles prefill and decode for the plan's devices; reports bytes of a device and times.

    The decode step's time is estimated as the longer of reading weights and half-full caches once
    at the published bandwidth, and of its products at the published rate: what XLA adds is unknown.
    """
    mesh = plan.mesh
    params = abstract_params(config, PRECISION.compute, "unrolled", mesh=mesh)
    slots = abstract_slots(config, PRECISION, plan.slots, plan.capacity, mesh, kernels)
    prefix = abstract_prefix(config, PRECISION, mesh)
    ended = jax.ShapeDtypeStruct((plan.slots,), bool)
    programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "prefill": (
            prefill_program(config, PRECISION, mesh, kernels),
            (empty_chunks(engine.chunks, engine.chunk_tokens),),
        ),
        "decode": (
            decode_program(config, PRECISION, engine.steps, engine.drafts, mesh, kernels),
            (ended, np.int32(1)),
        ),
    }
    report: dict[str, Any] = {}
    for name, (program, inputs) in programs.items():
        started = time.monotonic()
        compiled = program.lower(params, slots, prefix, *inputs).compile()
        report[name] = {
            **_bytes(compiled.memory_analysis(), params, slots, chip),
            "compile_s": round(time.monotonic() - started, 1),
        }
    weights = report["decode"]["bytes_by_kind"]["parameters"]
    cache = report["decode"]["bytes_by_kind"]["cache"]
    flops = 2 * count_parameters(config) * plan.slots / mesh.size
    step = max((weights + cache / 2) / chip.bandwidth, flops / chip.flops)
    report["decode"] |= {"est_step_s": step, "est_mfu": flops / chip.flops / step}
    sizes = {axis: axis_size(mesh, axis) for axis in mesh.axis_names} | {"data": plan.copies}
    chips = plan.copies * mesh.size
    shared = {"mesh": sizes, "slots": plan.slots, "capacity": plan.capacity, "chips": chips}
    return {name: {**shared, **entry} for name, entry in report.items()}


def _bytes(analysis: Any, params: Any, slots: Any, chip: Chip) -> dict[str, Any]:
    """Of the fullest device; donated arguments are counted once."""
    kinds = {"parameters": _held(params), "cache": _held(slots)}
    arguments = analysis.argument_size_in_bytes
    kinds["other_arguments"] = arguments - sum(kinds.values())
    kinds["temporary"] = analysis.temp_size_in_bytes
    kinds["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    kinds["code"] = analysis.generated_code_size_in_bytes
    total = sum(kinds.values())
    return {
        "bytes_per_device": total,
        "bytes_by_kind": kinds,
        "hbm_bytes": chip.memory,
        "fits": total <= chip.memory,
    }


def _held(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
