"""The time of a train step on a slice, estimated from programs that were compiled for it.

What a layer costs is the difference between the same step of a model with two layers and with one,
both unrolled: XLA counts the body of a loop once. Kernels and the loop of the loss, which XLA does
not count, are added from their shapes. Of the costs, a roofline makes seconds (`Roofline`).
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

from humpback_jax.aot.hlo import collectives
from humpback_jax.aot.memory import held_bytes
from humpback_jax.aot.train import TrainPlan, lower_step, state_of
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import count_parameters
from humpback_jax.parallel.mesh import axis_size
from humpback_jax.parallel.topology import Chip
from humpback_jax.training.loss import chunk_size

# Of a chip's links, what an exchange along one side of a slice has: some, and no ring at its ends.
ONE_SIDE = 0.5

# What is counted hardly depends on the compiler's effort, and compiling takes a tenth of the time.
# Products that exchange their inputs piece by piece would be loops, whose bodies count once.
QUICK: Any = {
    "exec_time_optimization_effort": -1.0,
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_enable_async_all_reduce": False,  # else each is written as several
}


class Exchange(NamedTuple):
    """What decides on the time that bytes between devices take.

    all_sides: they go along all sides of a slice at once.
    waited_for: no product runs beside them: partial sums and places that change their device, which
      the next one needs, and several arrays that XLA adds up together.
    """

    kind: str
    all_sides: bool = False
    waited_for: bool = False

    def seconds(self, size: float, chip: Chip) -> float:
        """For so many bytes that a device sends."""
        return size / (chip.links * (1.0 if self.all_sides else ONE_SIDE))


Sent = dict[Exchange, float]  # bytes of a device


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one device: FLOP, bytes of its memory read and written, bytes sent by each `Exchange`."""

    flops: float
    memory: float
    sent: Sent = dataclasses.field(default_factory=dict)

    def __add__(self, other: Costs) -> Costs:
        sent = collections.Counter(self.sent)
        sent.update(other.sent)
        return Costs(self.flops + other.flops, self.memory + other.memory, dict(sent))

    def times(self, factor: float) -> Costs:
        sent = {exchange: factor * size for exchange, size in self.sent.items()}
        return Costs(factor * self.flops, factor * self.memory, sent)


def compiled_costs(compiled: Any, tensor: int = 1) -> Costs:
    """As XLA counts them: loops once, and kernels not at all.

    Args:
      tensor: size of the mesh's last axis.
    """
    analysis = compiled.cost_analysis()
    sent = exchanged(compiled.as_text(), tensor)
    return Costs(analysis["flops"], analysis["bytes accessed"], sent)


def exchanged(program: str, tensor: int) -> Sent:
    """What the text of a compiled program says that a device sends; loops are counted once."""
    sent: Sent = collections.defaultdict(float)
    for each in collectives(program):
        along_tensor = len({device // tensor for device in each.group}) == 1
        waited_for = each.kind == "all-to-all"
        if each.kind == "all-reduce":
            waited_for = along_tensor or len(each.arrays) > 1
        sent[Exchange(each.kind, each.all_sides, waited_for)] += each.bytes
    return dict(sent)


def bytes_by_kind(sent: Sent) -> dict[str, float]:
    """Bytes that a device sends, by kind of collective."""
    sums: dict[str, float] = collections.defaultdict(float)
    for exchange, size in sent.items():
        sums[exchange.kind] += size
    return dict(sums)


def step_costs(plan: TrainPlan) -> Costs:
    """Of a whole step, extrapolated from compiled steps of one and of two layers."""
    options = QUICK if plan.mesh.devices.flat[0].platform == "tpu" else None
    one, two = (
        compiled_costs(
            lower_step(plan.with_layers(count, "unrolled"))[0].compile(options),
            axis_size(plan.mesh, "tensor"),
        )
        for count in (1, 2)
    )
    layers = plan.config.num_hidden_layers
    micro_batch = one + (two + one.times(-1)).times(layers - 1)
    micro_batch += attention_costs(plan).times(layers) + loss_costs(plan)
    # Each micro-batch beyond the first updates nothing, but adds to the sum of the gradients.
    added_up = Costs(0.0, 3 * held_bytes(state_of(plan).trainable))
    again = micro_batch + added_up + update_costs(plan).times(-1)
    return micro_batch + again.times(plan.micro_batches - 1)


def attention_costs(plan: TrainPlan) -> Costs:
    """Of one layer's kernels, where there are any: causal, so that half of all pairs count.

    Forwards there are two products, backwards seven (scores twice more, since the gradients of the
    keys and of the queries are computed apart), and where nothing is kept the forward ones again.
    """
    if plan.run.kernels.kind != "pallas":  # XLA counts its own products
        return Costs(0.0, 0.0)
    config, tokens = plan.config, plan.run.row_tokens
    heads = config.num_attention_heads // axis_size(plan.mesh, "tensor")
    pairs = plan.rows * tokens * tokens / 2
    products = 9 + 2 * (plan.run.remat == "full")
    return Costs(products * 2 * pairs * heads * config.head_dim, 0.0)


def loss_costs(plan: TrainPlan) -> Costs:
    """Of all chunks of the loss but the first, which XLA has counted.

    A chunk is three products with the head, reads it twice, and adds to its float32 gradient.
    """
    config = plan.config
    head = config.hidden_size * config.vocab_size / axis_size(plan.mesh, "tensor")
    places = plan.rows * plan.run.row_tokens
    size = chunk_size(places)
    logits = size * config.vocab_size / axis_size(plan.mesh, "tensor")
    chunks = -(-places // size)
    return Costs(6 * size * head, 12 * head + 12 * logits).times(chunks - 1)


def update_costs(plan: TrainPlan) -> Costs:
    """Of the optimizer: its state is read and written, and so are parameters beside gradients."""
    state = state_of(plan)
    return Costs(0.0, 3 * held_bytes(state.trainable) + 2 * held_bytes(state.optimizer))


def needed_flops(plan: TrainPlan) -> float:
    """What the step's mathematics takes on all devices, without anything computed twice.

    Forwards 2 for each weight in a product and each token; backwards as much for the inputs and,
    in full tuning, for the weights. Attention is counted causally.
    """
    config, tokens = plan.config, plan.run.row_tokens
    passes = 3 if plan.run.lora is None else 2
    pairs = tokens * tokens / 2 * config.num_hidden_layers
    scores = 3 * 2 * 2 * pairs * config.num_attention_heads * config.head_dim
    rows = plan.tokens / tokens
    return passes * 2 * product_weights(config) * plan.tokens + rows * scores


def product_weights(config: LlamaConfig) -> int:
    """Parameters, but for an embedding table that is only looked up."""
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return count_parameters(config) - table


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each part would take alone."""

    products: float
    memory: float
    hidden: float
    waited_for: float

    @classmethod
    def of(cls, costs: Costs, chip: Chip) -> Roofline:
        hidden = waited_for = 0.0
        for exchange, size in costs.sent.items():
            if exchange.waited_for:
                waited_for += exchange.seconds(size, chip)
            else:
                hidden += exchange.seconds(size, chip)
        return cls(
            costs.flops / (chip.share * chip.flops),
            costs.memory / chip.bandwidth,
            hidden,
            waited_for,
        )

    @property
    def seconds(self) -> float:
        """The longest of what runs side by side, and what nothing runs beside."""
        return max(self.products, self.memory, self.hidden) + self.waited_for
