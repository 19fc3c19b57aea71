"""Which mesh, rows and remat train fastest on a slice: ranked by formulas, settled by compiling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from humpback_jax.aot.estimate import (
    Costs,
    Exchange,
    Roofline,
    attention_costs,
    loss_costs,
    product_weights,
    update_costs,
)
from humpback_jax.aot.memory import held_bytes
from humpback_jax.aot.programs import compile_train, training_plan
from humpback_jax.aot.train import TrainPlan, most_rows, plan_training, state_of
from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import count_parameters
from humpback_jax.model.remat import Remat
from humpback_jax.models import load_config
from humpback_jax.parallel.mesh import MeshShape, axis_size
from humpback_jax.parallel.topology import GIB, Chip, tpu_slice
from humpback_jax.training.loss import CHUNK
from humpback_jax.training.trainer import TrainSpec

ROWS = (1, 2, 4, 8, 16)
# Of a forward pass, what is computed again: all of a layer, or two of the MLP's three products.
AGAIN = {"none": 0.0, "named": 0.45, "offload": 0.45, "full": 1.0}
SEARCHED: tuple[Remat, ...] = ("none", "named", "full")  # no rate is published for the host's side
COMPILED = 3  # candidates that fit, compiled for real
REFUSED = 6  # candidates in a row that do not, until the search gives up
KEPT_FREE = 0.05  # of a chip's memory


def suggest_for(config: Any, topology: str, say: Callable[[str], None]) -> dict[str, Any]:
    """`suggest` for the config's section `train`, as `programs.compile_for` reports it.

    Raises:
      HumpbackError: an unknown slice or model, or no plan fits.
    """
    architecture = load_config(config.base.model)
    devices, chip = tpu_slice(topology)
    run = training_plan(config, architecture, devices, rows=1).run
    best = suggest(architecture, run, devices, chip, COMPILED, say, limited=True)
    say(f"best: rows={best['rows']} {flags(best)}")
    if line := unfilled_line(best, run.batch_examples):
        say(line)
    return {
        "topology": topology,
        "chips": len(devices),
        "train": {"topology": topology, **best},
    }


def suggest(
    config: LlamaConfig,
    run: TrainSpec,
    devices: Sequence[Any],
    chip: Chip,
    compiled: int = COMPILED,
    say: Callable[[str], None] = lambda line: None,
    limited: bool = False,
) -> dict[str, Any]:
    """The plan with the most estimated tokens a second among the compiled ones that fit.

    Args:
      run: everything but mesh, remat and, where `limited`, accumulation is taken from it.
      compiled: stops after so many plans that fit.
      limited: see `candidates`.

    Returns:
      what `compile_train` reports of the best plan, with "tried", the plans compiled.

    Raises:
      HumpbackError: no plan fits.
    """
    ranked = sorted(
        candidates(config, run, devices, chip, limited), key=lambda p: -promised_rate(p, chip)
    )
    best: dict[str, Any] | None = None
    tried: list[dict[str, Any]] = []
    fitting = refused = 0
    for plan in ranked:
        report = compile_train(plan, chip)
        tried.append(report)
        say(outcome(report))
        if not report["fits"]:
            refused += 1
        else:
            refused, fitting = 0, fitting + 1
            if best is None or report["est_tokens_per_s"] > best["est_tokens_per_s"]:
                best = report
        if fitting == compiled or refused == REFUSED:
            break
    if best is None:
        raise HumpbackError(
            f"no plan that was tried fits {len(devices)} chips with {chip.memory / GIB:.0f} GiB "
            f"each ({len(tried)} of {len(ranked)} looked as if it would); take a larger slice, "
            "shorter rows (--config.train.row_tokens) or an adapter (--config.train.lora.rank)."
        )
    return {**best, "tried": tried}


def candidates(
    config: LlamaConfig,
    run: TrainSpec,
    devices: Sequence[Any],
    chip: Chip,
    limited: bool = False,
) -> Iterator[TrainPlan]:
    """Plans that should fit: all divisions of the chips that cut neither heads nor a width.

    Args:
      limited: a device has no more rows at a time than a batch of `run.batch_examples` can take
        with the plan's accumulation; else as many as it holds, whatever the batch is.
    """
    budget = chip.memory * (1 - KEPT_FREE)
    for shape in shapes(len(devices), config):
        ways = [(rows, run.accumulation) for rows in ROWS]
        if limited:
            ways = _packings(run.batch_examples, shape.data * shape.fsdp)
        for remat in SEARCHED:
            for rows, accumulation in ways:
                spec = dataclasses.replace(run, remat=remat, accumulation=accumulation)
                plan = plan_training(config, spec, devices, shape, rows)
                if predicted_bytes(plan) <= budget:
                    yield plan


def _packings(examples: int, parts: int) -> list[tuple[int, int | None]]:
    """(rows, accumulation), such that a run with that accumulation computes so many rows at most,
    for as many rows as `ROWS` says, or fewer.
    """
    counts = sorted({most_rows(examples, parts, rows) for rows in ROWS}, reverse=True)
    return [(most_rows(examples, parts, count), count) for count in counts]


def shapes(chips: int, config: LlamaConfig) -> Iterator[MeshShape]:
    """Meshes of so many chips along whose axes the model divides evenly."""
    for tensor in _divisors(chips):
        if config.num_key_value_heads % tensor or config.intermediate_size % tensor:
            continue
        for fsdp in _divisors(chips // tensor):
            if config.hidden_size % fsdp == 0:
                yield MeshShape(chips // tensor // fsdp, fsdp, tensor)


def predicted_bytes(plan: TrainPlan) -> float:
    """Of a device: state and gradients, activations, weights put together for use, and the loss.

    A formula; the compiler has the last word.
    """
    config, run = plan.config, plan.run
    tensor = axis_size(plan.mesh, "tensor")
    state = state_of(plan)
    sums = 1 if plan.micro_batches == 1 else 2  # of the step, and of a micro-batch
    held = held_bytes(state) + sums * held_bytes(state.trainable)
    tokens = plan.rows * run.row_tokens
    width, inner = config.hidden_size, config.intermediate_size / tensor
    heads = config.num_attention_heads * config.head_dim / tensor
    groups = config.num_key_value_heads * config.head_dim / tensor
    attention = 2 * (2 * heads + 2 * groups)
    layer = tokens * (16 * width + 12 * inner + 3 * attention)  # its backward pass goes by them
    inputs = tokens * 2 * width
    kept = {
        "none": layer,
        "full": inputs,
        "named": 2 * inputs + tokens * attention,
        "offload": inputs,
    }
    activations = config.num_hidden_layers * kept[run.remat] + 2 * layer
    gathered = axis_size(plan.mesh, "fsdp") > 1
    weights = 2 * 2 * layer_weights(config) / tensor * gathered  # of this layer, and the next
    head = config.hidden_size * config.vocab_size / tensor
    loss = 6 * head + 10 * CHUNK * config.vocab_size / tensor
    return held + activations + weights + loss


def promised_rate(plan: TrainPlan, chip: Chip) -> float:
    """Tokens a second by formulas, if nothing ran side by side: whether XLA hides an exchange is
    seen in the compiled program alone, and what exchanges little for a token is safe.
    """
    parts = vars(Roofline.of(predicted_costs(plan), chip))
    return plan.tokens / sum(parts.values())


def predicted_costs(plan: TrainPlan) -> Costs:
    """As `estimate.step_costs`, without a compiler."""
    config, run = plan.config, plan.run
    tensor, fsdp = axis_size(plan.mesh, "tensor"), axis_size(plan.mesh, "fsdp")
    data = axis_size(plan.mesh, "data")
    tokens = plan.rows * run.row_tokens
    passes = (3 if run.lora is None else 2) + AGAIN[run.remat]
    flops = 2 * passes * product_weights(config) / tensor * tokens
    read = 3 * 4 * count_parameters(config) / tensor
    activations = config.num_hidden_layers * tokens * 40 * (config.hidden_size + config.head_dim)
    layers = config.num_hidden_layers
    whole = 2 * layer_weights(config) * layers / tensor
    gathered = 2 * whole * (fsdp - 1) / fsdp
    scattered = 2 * whole * (fsdp - 1) / fsdp if run.lora is None else 0.0
    # Partial sums of the two products of a layer that end along the cut axis, both ways.
    sums = (4 + 2 * (run.remat == "full")) * layers * tokens * config.hidden_size * 4
    sent = {
        Exchange("all-gather"): gathered,
        Exchange("reduce-scatter"): scattered,
        Exchange("all-reduce", waited_for=True): 2 * sums * (tensor - 1) / tensor,
    }
    if run.lora is None:
        copied = 4 * count_parameters(config) / (fsdp * tensor)
        sent[Exchange("all-reduce")] = 2 * copied * (data - 1) / data
    micro_batch = Costs(flops, read + activations, sent) + loss_costs(plan)
    micro_batch += attention_costs(plan).times(layers)
    return micro_batch.times(plan.micro_batches) + update_costs(plan)


def layer_weights(config: LlamaConfig) -> float:
    """Parameters of one layer."""
    outside = (2 - bool(config.tie_word_embeddings)) * config.vocab_size * config.hidden_size
    return (count_parameters(config) - outside) / config.num_hidden_layers


def flags(report: dict[str, Any]) -> str:
    """What to write on the command line for a plan."""
    mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    return (
        f"--config.compute.mesh={mesh} --config.train.remat={report['remat']} "
        f"--config.train.accumulation={report['micro_batches']}"
    )


def unfilled_line(report: dict[str, Any], examples: int) -> str:
    """What to say where a batch of so many examples cannot fill the rows of a step; else ""."""
    parts = report["mesh"]["data"] * report["mesh"]["fsdp"]
    rows = report["micro_batches"] * report["rows"] * parts
    if rows <= examples:
        return ""
    return (
        f"A batch of {examples} examples fills at most {examples} of the {rows} rows of a step, "
        "which tokens/s and MFU count as full."
    )


def outcome(report: dict[str, Any]) -> str:
    """One line on a plan that was compiled."""
    gib = report["bytes_per_device"] / GIB
    line = f"rows={report['rows']} {flags(report)}: {gib:.1f} GiB a device"
    if not report["fits"]:
        return f"{line}, does not fit"
    return f"{line}, {report['est_tokens_per_s']:,.0f} tokens/s"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
