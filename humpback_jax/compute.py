"""How a program is run on the machine at hand: number formats and layer layouts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Layout
from humpback_jax.parallel.mesh import Share, our_share, parse_mesh
from humpback_jax.sampling.engine import Shape


@dataclasses.dataclass(frozen=True)
class Compute:
    """Attributes:
    precision: number formats of training, scoring and generation.
    train_layout: a scanned gradient loses a quarter of the speed on CPU and compiles in a
      fraction of the time on accelerators, so the platform decides.
    engine_shape: of generation.
    share: the devices of scoring and generation, and our part of jobs that several hosts share.
    """

    precision: Precision
    train_layout: Layout
    engine_shape: Shape
    share: Share = dataclasses.field(default_factory=Share)


def choose_compute(precision: str, batch_size: int, mesh: str = "auto") -> Compute:
    """Resolves "auto": bfloat16 products on accelerators, float32 on CPU.

    On CPU the activations stay float32 in any case: only the products gain from bfloat16 there.

    Args:
      batch_size: rows decoded together, by each copy of the model.
      mesh: as `parse_mesh` reads it; see `our_share`.

    Raises:
      HumpbackError: an unknown precision, or a mesh that does not fit the devices.
    """
    import jax

    on_cpu = jax.default_backend() == "cpu"
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
    share = our_share(parse_mesh(mesh))
    return Compute(Precision(precision, kept), "unrolled" if on_cpu else "scan", shape, share)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, by default beside the fetched models."""
    import jax

    from humpback_jax.weights.named import default_cache_dir

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder: Path = default_cache_dir() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
