"""What has to be installed: no torch, no TensorFlow, and a core that needs little.

If these fail, `pip install humpback_jax` pulls in gigabytes, or a TPU VM without torch cannot run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import humpback_jax

PACKAGE = Path(humpback_jax.__file__).parent
FOREIGN = ("torch", "tensorflow", "transformers", "peft")
CORE_MAY_IMPORT = {"jax", "flax", "optax", "orbax", "numpy", "humpback_jax"}

PATHS = """
import numpy as np
from pathlib import Path
from humpback_jax.checkpoint import ResumeFolder, load_params, save_params
from humpback_jax.model.lora import lora_spec
from humpback_jax.models import load_checkpoint, load_model, save_checkpoint
from humpback_jax.model.llama import unstack_layers
from humpback_jax.sampling.engine import Engine, Request, Shape
from humpback_jax.sampling.likelihood import sequence_nll
from humpback_jax.sampling.sampler import Decoding, record_key
from humpback_jax.model.linear import Precision
from humpback_jax.training.examples import TrainingExample
from humpback_jax.training.trainer import TrainSpec, train
from humpback_jax.weights.safetensors_io import load_hf, save_hf

folder = Path(sys.argv[1])
model = load_model("tiny-random")
prompt = model.template.forward_prompt([{"role": "user", "content": "Why?"}])
ids = np.array(model.tokenizer.encode(prompt), np.int32)
example = TrainingExample("a", ids, np.arange(len(ids)) > 3)
spec = TrainSpec(1, 1, 128, lora=lora_spec(2, 4, 0.0, ("q",)), layout="unrolled", resume_every=1)
trained = train(model.config, model.params, [example], spec, resume=ResumeFolder(folder / "r"))
params = unstack_layers(trained.params)
sequence_nll(model.config, params, [example], Precision())
engine = Engine(model.config, params, model.stop_ids, shape=Shape(2))
key = record_key(0, "s", "a", 0)
engine.generate([Request("a", ids, key, Decoding(max_new_tokens=2))])
save_checkpoint(folder / "ours", model, {})
load_checkpoint(folder / "ours")
save_hf(folder / "hf", model.config, trained.params)
model.tokenizer.save(folder / "hf")
load_hf(folder / "hf")
"""
EVERY_MODULE = """
import importlib
import pkgutil
import humpback_jax
for module in pkgutil.walk_packages(humpback_jax.__path__, "humpback_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("script", [PATHS, EVERY_MODULE], ids=["paths", "every_module"])
def test_loading_training_sampling_and_exporting_import_no_other_framework(
    script, tmp_path
) -> None:
    check = f"loaded = sorted(set({FOREIGN!r}) & set(sys.modules))\nassert not loaded, loaded\n"
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + textwrap.dedent(script) + check, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("folder", ["model", "parallel", "sampling", "training"])
def test_the_core_needs_jax_and_its_kin_alone(folder) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    for file in files:
        foreign = imported_packages(file) - CORE_MAY_IMPORT - set(sys.stdlib_module_names)
        assert not foreign, (file.name, foreign)


def test_nothing_in_the_package_imports_torch_even_inside_a_function() -> None:
    # processes of their own, that measure other systems
    peers = {
        PACKAGE / "bench" / name for name in ("hf.py", "trl.py", "torch_model.py", "torch_sft.py")
    }
    for file in sorted(set(PACKAGE.rglob("*.py")) - peers):
        assert not {"torch", "tensorflow", "peft"} & imported_packages(file), file
