"""How a program is run on the machine at hand: number formats and layer layouts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Layout
from humpback_jax.sampling.engine import Shape


@dataclasses.dataclass(frozen=True)
class Compute:
    """Attributes:
    precision: number formats of training, scoring and generation.
    train_layout: a scanned gradient loses a quarter of the speed on CPU and compiles in a
      fraction of the time on accelerators, so the platform decides.
    engine_shape: of generation.
    kernels: how training and generation attend.
    """

    precision: Precision
    train_layout: Layout
    engine_shape: Shape
    kernels: Kernels = XLA


def choose_compute(precision: str, batch_size: int, platform: str | None = None) -> Compute:
    """Resolves "auto": bfloat16 products on accelerators, float32 on CPU.

    On CPU the activations stay float32 in any case: only the products gain from bfloat16 there.

    Args:
      batch_size: rows decoded together.
      platform: that will run the programs: "cpu", "tpu" or "gpu"; JAX's own where not given.
    """
    import jax

    platform = platform or jax.default_backend()
    on_cpu = platform == "cpu"
    if precision == "auto":
        precision = "float32" if on_cpu else "bfloat16"
    if precision not in ("float32", "bfloat16"):
        raise HumpbackError(
            f"compute.precision={precision!r} is unknown; choose auto, float32 or bfloat16."
        )
    kept = "float32" if on_cpu else precision
    if on_cpu:
        # One row alone has few pieces to compute at a time.
        shape = Shape(slots=batch_size, chunks=16 if batch_size > 1 else 4)
    else:
        # A look by the host costs as much as a step.
        refill = max(batch_size // 16, 1)
        shape = Shape(slots=batch_size, chunks=8, chunk_tokens=128, refill=refill)
    kernels = Kernels.of_platform(platform)
    return Compute(Precision(precision, kept), "unrolled" if on_cpu else "scan", shape, kernels)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, by default beside the fetched models."""
    import jax

    from humpback_jax.weights.named import default_cache_dir

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder: Path = default_cache_dir() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
