"""Training steps that others have measured on TPU, to hold the estimates against.

MaxText publishes the settings and step times of its recipes: the two for v6e stand in
AI-Hypercomputer/tpu-recipes (training/trillium/Llama3.1-{8B,70B}-MaxText/v6e-256/README.md), the
one for v5p in its table of optimized models (docs/reference/models/tiering.md, "v5p-512": 256
chips; the step's time follows from its 692 tokens a second and chip) with the settings of
MaxText/configs/v5p/llama2_70b.sh. Their MFU counts attention in full, ours the causal half: only
seconds compare. What their remat policies compute again is, as for our "named", above all two of
the three products of the MLP.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from humpback_jax.aot.estimate import step_costs
from humpback_jax.aot.programs import described, estimated
from humpback_jax.aot.train import plan_training
from humpback_jax.compute import choose_compute
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.shapes import SHAPES
from humpback_jax.parallel.topology import tpu_slice
from humpback_jax.training.trainer import TrainSpec


@dataclasses.dataclass(frozen=True)
class Published:
    """A measured step: rows of a device, tokens of a row, and seconds."""

    model: str
    config: LlamaConfig
    topology: str
    rows: int
    row_tokens: int
    step_s: float
    mfu: float


def _window(config: LlamaConfig, tokens: int) -> LlamaConfig:
    return dataclasses.replace(config, max_position_embeddings=tokens)


LLAMA3_70B = dataclasses.replace(SHAPES["llama2_70b"], vocab_size=128256, rope_theta=500000.0)
PUBLISHED = (
    Published("Llama-2-70B", SHAPES["llama2_70b"], "v5p:4x8x8", 4, 4096, 4 * 4096 / 692, 0.654),
    Published(
        "Llama-3.1-8B", _window(SHAPES["llama3_8b"], 8192), "v6e:16x16", 4, 8192, 4.546, 0.4546
    ),
    Published("Llama-3.1-70B", _window(LLAMA3_70B, 8192), "v6e:16x16", 5, 8192, 42.656, 0.5033),
)


def check(case: Published) -> dict[str, Any]:
    """The estimate for the published setting, with "off": how much longer it is, as a share."""
    devices, chip = tpu_slice(case.topology)
    compute = choose_compute("bfloat16", 1, platform="tpu")
    run = TrainSpec(
        1,
        row_tokens=case.row_tokens,
        precision=compute.precision,
        layout=compute.train_layout,
        kernels=compute.kernels,
        remat="named",
    )
    plan = plan_training(case.config, run, devices, None, case.rows)
    report = {**described(plan), **estimated(plan, step_costs(plan), chip)}
    return {
        "topology": case.topology,
        "published_step_s": case.step_s,
        "published_mfu": case.mfu,
        **report,
        "off": report["est_step_s"] / case.step_s - 1,
    }
