"""What a run was made with: versions, machine, devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
)


def describe_environment() -> dict[str, Any]:
    """Versions and devices, for `environment.json`."""
    import jax

    import humpback_jax

    return {
        "humpback_jax": humpback_jax.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
    }
