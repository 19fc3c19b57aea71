"""Generation on a slice: how it is spread, and what its programs need once compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from humpback_jax.aot.estimate import Sent, bytes_by_kind, exchanged
from humpback_jax.aot.memory import bytes_report, compile_program
from humpback_jax.compute import Compute
from humpback_jax.errors import HumpbackError
from humpback_jax.model.cache import capacity_for
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import Layout, Params, count_parameters
from humpback_jax.parallel.mesh import MeshShape, axis_size, make_mesh, one_copy
from humpback_jax.parallel.rules import abstract_params
from humpback_jax.parallel.topology import Chip
from humpback_jax.sampling.memory import KEPT_FREE, NoRoom, rows_that_fit
from humpback_jax.sampling.prefix import abstract_prefix
from humpback_jax.sampling.programs import (
    abstract_slots,
    decode_program,
    empty_chunks,
    prefill_program,
)


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
    compute: Compute,
    tokens: int,
) -> DecodePlan:
    """A copy of the model on each device, if that holds it and all slots, or one over all.

    Args:
      compute: for TPU; its mesh is taken as it is where given.
      tokens: of a row, prompt and answer together.

    Raises:
      NoRoom: not even all devices hold the weights and one row.
      HumpbackError: the mesh does not fit the devices.
    """
    capacity, engine, precision = capacity_for(tokens), compute.engine_shape, compute.precision
    budget = compute.memory or int(chip.memory * (1 - KEPT_FREE))
    leaves = jax.tree.leaves(_weights(config, compute, "scan"))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    whole = one_copy(len(devices), config.num_key_value_heads)
    choices = [compute.mesh] if compute.mesh else [MeshShape(), whole]
    best: tuple[int, MeshShape] | None = None
    reason: NoRoom | None = None
    for choice in choices:
        if len(devices) % choice.replica:
            break
        try:
            fitting = rows_that_fit(
                config,
                precision.kv or precision.activations,
                capacity,
                engine.slots,
                budget,
                held // choice.replica,
                engine.chunks * engine.chunk_tokens,
                choice.tensor,
                choice.fsdp if compute.kernels.cuts_the_cache(precision) else 1,
                engine.drafts,
            )
        except NoRoom as error:
            reason = error
            continue
        if best is None or fitting > best[0]:
            best = fitting, choice
        if fitting == engine.slots:
            break
    if best is None:
        raise reason or HumpbackError(f"{compute.mesh} does not fit {len(devices)} devices.")
    fitting, choice = best
    copies = choice.data or len(devices) // choice.replica
    if copies * choice.replica != len(devices):
        make_mesh(choice, devices)  # raises
    alone = dataclasses.replace(choice, data=1)
    # Of a slice with several hosts, the compiler for v5e and v6e takes no part that begins on the
    # first one, but takes any other.
    one = devices[-choice.replica :]
    return DecodePlan(make_mesh(alone, one), copies, fitting, capacity)


def compile_decode(
    config: LlamaConfig,
    plan: DecodePlan,
    compute: Compute,
    chip: Chip,
    names: Sequence[str] = ("prefill", "decode"),
) -> dict[str, Any]:
    """Compiles prefill and decode for the plan's devices; reports bytes of a device and times.

    The decode step's time is estimated as the longer of reading weights and half-full caches once
    at the published bandwidth, and of its products at the published rate, and of what is sent
    between the devices of a copy: what XLA adds is unknown.
    """
    mesh, engine = plan.mesh, compute.engine_shape
    precision, kernels = compute.precision, compute.kernels
    params = _weights(config, compute, "unrolled", mesh)
    slots = abstract_slots(config, precision, plan.slots, plan.capacity, mesh, kernels)
    prefix = abstract_prefix(config, precision, mesh)
    ended = jax.ShapeDtypeStruct((plan.slots,), bool)
    programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "prefill": (
            prefill_program(config, precision, mesh, kernels),
            (empty_chunks(engine.chunks, engine.chunk_tokens),),
        ),
        "decode": (
            decode_program(config, precision, engine.steps, engine.drafts, mesh, kernels),
            (ended, np.int32(1)),
        ),
    }
    report: dict[str, Any] = {}
    for name in names:
        program, inputs = programs[name]
        compiled = compile_program(program.lower(params, slots, prefix, *inputs))
        entry = bytes_report(compiled, {"parameters": params, "cache": slots}, chip)
        sent: Sent = {}
        if compiled.program is not None:
            sent = exchanged(compiled.program.as_text(), axis_size(mesh, "tensor"))
            entry["collective_bytes"] = bytes_by_kind(sent)
        if name == "decode":
            entry |= _estimate(entry, sent, config, plan, chip)
        report[name] = entry
    sizes = {axis: axis_size(mesh, axis) for axis in mesh.axis_names} | {"data": plan.copies}
    chips = plan.copies * mesh.size
    shared = {"mesh": sizes, "slots": plan.slots, "capacity": plan.capacity, "chips": chips}
    return {name: {**shared, **entry} for name, entry in report.items()}


def _weights(
    config: LlamaConfig, compute: Compute, layout: Layout, mesh: Mesh | None = None
) -> Params:
    """Shapes of the weights in the format of sampling, and where they lie."""
    dtype = compute.precision.compute
    return abstract_params(config, dtype, layout, mesh=mesh, quantize=compute.weights == "int8")


def _estimate(
    entry: dict[str, Any], sent: Sent, config: LlamaConfig, plan: DecodePlan, chip: Chip
) -> dict[str, float]:
    held = entry["bytes_by_kind"]
    flops = 2 * count_parameters(config) * plan.slots / plan.mesh.size
    read = (held["parameters"] + held["cache"] / 2) / chip.bandwidth
    exchange = sum(each.seconds(size, chip) for each, size in sent.items())
    step = max(read, flops / chip.flops) + exchange
    return {"est_step_s": step, "est_mfu": flops / chip.flops / step}
