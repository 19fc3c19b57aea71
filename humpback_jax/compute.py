"""How a program is run on the machine at hand: number formats and layer layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Layout
from humpback_jax.parallel.mesh import MeshShape, parse_mesh
from humpback_jax.parallel.topology import GIB
from humpback_jax.sampling.engine import Shape


@dataclasses.dataclass(frozen=True)
class Compute:
    """Attributes:
    precision: number formats of training, scoring and generation.
    train_layout: a scanned gradient loses a quarter of the speed on CPU and compiles in a
      fraction of the time on accelerators, so the platform decides.
    accumulation: micro-batches of a step where a config leaves it open. On CPU one row at a time
      is as fast as several, and rows that a batch leaves empty are not computed.
    engine_shape: of generation.
    weights: dtype of kernels and embeddings in sampling and scoring; never in training.
    mesh: of all that computes; None for what each kind of work needs on the devices at hand.
    memory: bytes of each device for weights and rows; None for what it has.
    kernels: how training and generation attend.
    """

    precision: Precision
    train_layout: Layout
    engine_shape: Shape
    weights: str = "float32"
    mesh: MeshShape | None = None
    memory: int | None = None
    kernels: Kernels = XLA
    accumulation: int | None = None

    @property
    def scoring_formats(self) -> str:
        """The number formats that log-likelihoods depend on, for keys."""
        weights = ", int8 weights" if self.weights == "int8" else ""
        return self.precision.compute + weights

    @property
    def sampling_formats(self) -> str:
        """The number formats that drawn texts depend on, for keys."""
        kv = f", {self.precision.kv} kv" if self.precision.kv else ""
        return self.scoring_formats + kv


FORMATS = ("auto", "int8")  # of weights, and of cached keys and values


def choose_compute(
    precision: str,
    batch_size: int,
    weights: str = "auto",
    kv: str = "auto",
    mesh: str = "auto",
    memory_gb: float = 0.0,
    drafts: str = "auto",
    platform: str | None = None,
) -> Compute:
    """Resolves "auto": bfloat16 products on accelerators, float32 on CPU.

    On CPU the activations stay float32 in any case: only the products gain from bfloat16 there.

    Args:
      batch_size: rows decoded together, by each copy of the model, if its memory holds them.
      weights, kv: "int8", or "auto": weights as products, cached keys and values as activations.
      mesh: as `parse_mesh` reads it.
      memory_gb: GiB of each device for weights and rows; 0 for what it has.
      drafts: tokens guessed in each step of drawing, a number; "auto": where it was measured to
        pay.
      platform: that will run the programs: "cpu", "tpu" or "gpu"; JAX's own where not given.

    Raises:
      HumpbackError: an unknown format, or a mesh that makes no sense.
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
    for name, value in (("weights", weights), ("kv", kv)):
        if value not in FORMATS:
            raise HumpbackError(f"compute.{name}={value!r} is unknown; choose auto or int8.")
    kept = "float32" if on_cpu else precision
    alone = batch_size == 1
    if on_cpu:
        # One row alone has few pieces to compute at a time, and a step of eight tokens takes it
        # twice as long as a step of one (measured), for three tokens drawn on the mean.
        shape = Shape(slots=batch_size, chunks=4 if alone else 16, drafts=7 if alone else 0)
    else:
        # A look by the host costs as much as a step.
        refill = max(batch_size // 16, 1)
        shape = Shape(slots=batch_size, chunks=8, chunk_tokens=128, refill=refill)
    if on_cpu and alone and mesh == "auto":
        mesh = "data=1"
    if drafts != "auto":
        if not drafts.isdecimal():
            raise HumpbackError(f"compute.drafts={drafts!r} is neither auto nor a whole number.")
        shape = dataclasses.replace(shape, drafts=int(drafts))
    return Compute(
        Precision(precision, kept, None if kv == "auto" else kv),
        "unrolled" if on_cpu else "scan",
        shape,
        precision if weights == "auto" else weights,
        parse_mesh(mesh),
        int(memory_gb * GIB) or None,
        Kernels.of_platform(platform),
        None if on_cpu else 1,
    )


COPIES = 2  # of the model on a CPU


def use_cores() -> None:
    """Makes two devices of a CPU with several cores; has to run before devices are used.

    A program of small operations leaves cores idle in between, which a second copy of the model
    beside it fills.
    """
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with contextlib.suppress(RuntimeError):  # devices are in use already
            jax.config.update("jax_num_cpu_devices", min(cores or 1, COPIES))


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, by default beside the fetched models."""
    import jax

    from humpback_jax.weights.named import default_cache_dir

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder: Path = default_cache_dir() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
