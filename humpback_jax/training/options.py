"""What the settings of a run and each of its steps have in common."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import LoraSpec, Precision
from humpback_jax.model.llama import Layout
from humpback_jax.model.remat import Remat
from humpback_jax.training.loss import NLL, Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step computes, whatever the model and the rows.

    Attributes:
      layout, remat, kernels: see `model/llama.py`, `model/remat.py`, `model/kernels.py`.
      mesh: the devices that share the step: rows lie over data and fsdp, parameters and the
        optimizer's state over fsdp and tensor (`parallel/rules.py`). A batch's rows are filled up
        to a multiple of the devices with rows of their own.
      lora: None for full tuning.
      dropout: residual dropout. dropout_ramp: linear in the layer, from 0 at the bottom to
        `dropout` at the top (LIMA).
      neftune_alpha: see `training/neftune.py`; 0 switches off.
    """

    precision: Precision = Precision()
    layout: Layout = "scan"
    remat: Remat = "none"
    kernels: Kernels = XLA
    mesh: Mesh | None = None
    lora: LoraSpec | None = None
    objective: Objective = NLL
    dropout: float = 0.0
    dropout_ramp: bool = False
    neftune_alpha: float = 0.0
