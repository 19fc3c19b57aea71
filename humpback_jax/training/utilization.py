"""How much of what the devices can do a run makes use of: MFU, HFU, and memory.

Both utilizations follow PaLM (Chowdhery et al., 2022, appendix B): operations a second, divided by
the devices' published rate of dense bfloat16 products, in whatever format the run computes.

- MFU counts what the model asks for (`model/flops.py`): 6 operations for each parameter of a
  matrix and each token, the head's at supervised tokens alone, and attention over the pairs of an
  example's own tokens. Nothing is counted for padding, nor for what is computed twice.
- HFU adds what `remat` computes again of the layers' forward pass. What attention kernels
  compute again in their backward pass is not known here, and not counted.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.flops import recomputed_flops, training_flops
from humpback_jax.model.remat import Remat
from humpback_jax.parallel.topology import CHIPS

# Dense bfloat16 FLOP/s by `device_kind`: Google's pages on each TPU version, and NVIDIA's data
# sheets of each GPU (whose figures with sparsity are halved).
PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


@dataclasses.dataclass(frozen=True)
class Utilization:
    """What a step's time says about the devices.

    Attributes:
      frozen: an adapter alone is trained. remat: what of layers is computed again.
      peak: FLOP/s of all devices together; None where it is not known, as on CPU.
    """

    config: LlamaConfig
    frozen: bool
    remat: Remat
    peak: float | None

    def of(self, tokens: int, supervised: int, pairs: float, seconds: float) -> dict[str, float]:
        """Figures of a step's row; without a known peak, only the rate of operations.

        Args:
          pairs: of a query and a key that it sees.
        """
        model = training_flops(self.config, tokens, supervised, pairs, self.frozen)
        found = {"model_tflops_per_s": model / seconds / 1e12}
        if self.peak is not None:
            again = recomputed_flops(self.config, tokens, pairs, self.remat)
            found["mfu"] = model / seconds / self.peak
            found["hfu"] = (model + again) / seconds / self.peak
        return found


def peak_flops(mesh: Mesh | None) -> float | None:
    """FLOP/s of the devices that train together; None for a kind that is not in the table."""
    devices = list(mesh.devices.flat) if mesh is not None else jax.local_devices()[:1]
    rate = PEAK_FLOPS.get(devices[0].device_kind)
    return None if rate is None else rate * len(devices)


def memory_in_use() -> dict[str, int]:
    """Bytes in use now, and at most so far, of the fullest device here; {} where none tells."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"memory_bytes": "bytes_in_use", "peak_memory_bytes": "peak_bytes_in_use"}
    return {
        name: max(each[source] for each in stats)
        for name, source in names.items()
        if all(source in each for each in stats)
    }
