"""A section of a config as the settings of a training."""

from __future__ import annotations

import math
from typing import Any

from humpback_jax.compute import Compute
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.lora import lora_spec
from humpback_jax.training.loss import Objective
from humpback_jax.training.mixture import parse_mixture
from humpback_jax.training.optimizer import OptimizerSpec
from humpback_jax.training.trainer import TrainSpec


def train_spec(section: Any, compute: Compute, seed: int, draws: int) -> TrainSpec:
    """The section's settings for so many draws an epoch (`order.draws_of`).

    They decide the steps, where the section names epochs, and batch and steps, where its step table
    gives both.
    """
    steps, batch = section.steps, section.batch_examples
    if not steps and section.epochs:
        # Enough for every draw to be seen; less a bit, for 0.1 * 30 is more than 3.
        steps = max(math.ceil(section.epochs * draws / batch - 1e-9), 1)
    if not steps:
        rows = [row for row in section.step_table if row[0] >= draws] or [section.step_table[-1]]
        _, batch, steps = rows[0]
    return TrainSpec(
        steps=steps,
        batch_examples=batch,
        row_tokens=section.row_tokens,
        accumulation=section.accumulation or compute.accumulation,
        optimizer=OptimizerSpec(
            learning_rate=section.learning_rate,
            end_learning_rate=section.end_learning_rate,
            schedule=section.schedule,
            warmup_steps=section.warmup_steps,
            beta1=section.beta1,
            beta2=section.beta2,
            epsilon=section.epsilon,
            weight_decay=section.weight_decay,
            clip_norm=section.clip_norm,
            lora_plus_ratio=section.lora.plus_ratio,
            decay_share=section.decay_share,
            name=section.optimizer,
        ),
        lora=_lora(section.lora),
        dropout=section.dropout,
        dropout_ramp=section.dropout_ramp,
        neftune_alpha=section.neftune_alpha,
        objective=Objective(section.label_smoothing, section.z_loss),
        precision=compute.precision,
        layout=compute.train_layout,
        kernels=compute.kernels,
        remat=section.remat,
        seed=seed,
        log_every=section.log_every,
        eval_every=section.eval_every,
        resume_every=section.resume_every,
        select=section.select,
        spike_factor=section.spike_factor,
        checkpoint_epochs=section.checkpoint_epochs,
        mixture=parse_mixture(section.mixture),
    )


def _lora(section: Any) -> LoraSpec | None:
    if not section.rank:
        return None
    return lora_spec(
        section.rank,
        section.alpha,
        section.dropout,
        section.targets,
        section.scaling,
        section.dora,
        section.base,
    )
