"""What the programs that measure torch share: its device, the weights, and the memory that it took.

None of this asks jax for its devices: jax would take most of a GPU's memory, which is torch's here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from humpback_jax.bench.process import resident_peak


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_model(folder: str) -> Any:
    """The model of a folder in Hugging Face's format, in float32 on torch's device.

    Where the folder has no weights, they are random: how fast a model is does not depend on them.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if any(Path(folder).glob("*.safetensors")):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.to(torch_device())
    with torch.device(torch_device()):
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def torch_peak_bytes() -> int:
    """The most memory in use at one time so far: torch's of a GPU, else the process's."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resident_peak()
