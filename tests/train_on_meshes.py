"""One model tuned on several meshes, as JSON.

    python train_on_meshes.py MODEL STEPS VARIANT,... MESH ...

The first variant is also stopped on each mesh, and continued on the next, if there are enough
steps for it.

A program of its own, because a process has as many CPU devices as it started with.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

DEVICES = 8
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from on_meshes import model_of  # noqa: E402

from humpback_jax.checkpoint import ResumeFolder  # noqa: E402
from humpback_jax.compute import use_compilation_cache  # noqa: E402
from humpback_jax.errors import Preempted  # noqa: E402
from humpback_jax.model.llama import Params, flatten  # noqa: E402
from humpback_jax.model.lora import lora_spec  # noqa: E402
from humpback_jax.models import LanguageModel  # noqa: E402
from humpback_jax.parallel.mesh import make_mesh, parse_mesh  # noqa: E402
from humpback_jax.stages.sources import packaged_pairs  # noqa: E402
from humpback_jax.stages.texts import render  # noqa: E402
from humpback_jax.text.tokenize import tokenize_batch  # noqa: E402
from humpback_jax.training.examples import TrainingExample  # noqa: E402
from humpback_jax.training.optimizer import OptimizerSpec  # noqa: E402
from humpback_jax.training.trainer import TrainSpec, train  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulated": {"accumulation": 2},
    "scan_and_options": {
        "layout": "scan",
        "remat": "named",
        "name": "adafactor",
        "dropout": 0.1,
        "dropout_ramp": True,
        "neftune_alpha": 5.0,
    },
    "dropout": {"dropout": 0.1},
    "default_model": {"layout": "scan", "rate": 1e-5},
    "dora_on_int8": {"lora": lora_spec(4, 8, 0.1, ("q", "v", "down"), dora=True, base="int8")},
}
STOPPED = 2  # steps after which a run is stopped, to be continued on another mesh


def examples_of(model: LanguageModel, count: int, longest: int) -> list[TrainingExample]:
    rows = render(model.template, packaged_pairs("train")[:count], "forward")
    batch = tokenize_batch(model.tokenizer, rows, longest, "truncate")
    sources = itertools.cycle(("seed", "web"))
    return [TrainingExample(e.id, e.ids, e.mask, next(sources)) for e in batch.examples]


def spec_of(mesh: str, steps: int, **changes: Any) -> TrainSpec:
    shape = parse_mesh(mesh)
    assert shape is not None
    devices = jax.devices()[: (shape.data or 1) * shape.replica]
    return TrainSpec(
        steps=steps,
        batch_examples=8,
        row_tokens=256,
        layout=changes.pop("layout", "unrolled"),
        optimizer=OptimizerSpec(changes.pop("rate", 1e-3), 1e-4, name=changes.pop("name", "adamw")),
        mesh=make_mesh(shape, devices) if len(devices) > 1 else None,
        eval_every=steps,
        **changes,
    )


def results(model: LanguageModel, examples: list[TrainingExample], spec: TrainSpec) -> Any:
    params = jax.tree.map(np.asarray, model.params)
    done = train(model.config, params, examples[8:], spec, validation=examples[:8])
    losses = [row["loss"] for row in done.history if "loss" in row]
    norms = [row["grad_norm"] for row in done.history if "loss" in row]
    by_source = ("validation_nll", "validation_nll/seed", "validation_nll/web")
    rows = [row for row in done.history if "validation_nll" in row]
    validation = [row[name] for row in rows for name in by_source]
    # A mesh's programs keep memory that the next one's need.
    jax.clear_caches()
    return {"loss": losses, "grad_norm": norms, "validation": validation}, done.params


def continued(
    model: LanguageModel, examples: list[TrainingExample], before: TrainSpec, after: TrainSpec
) -> tuple[Params, list[float]]:
    """A run stopped under `before` and continued under `after`: weights, and losses since then."""
    params = jax.tree.map(np.asarray, model.params)
    with tempfile.TemporaryDirectory() as folder:
        resume = ResumeFolder(Path(folder))
        with contextlib.suppress(Preempted):
            train(
                model.config,
                params,
                examples[8:],
                before,
                resume=resume,
                stops=lambda done: done == STOPPED,
            )
        jax.clear_caches()
        rest = train(model.config, params, examples[8:], after, resume=resume)
        jax.clear_caches()
    steps = [row for row in rest.history if "loss" in row]
    assert steps[0]["step"] == STOPPED + 1
    return rest.params, [row["loss"] for row in steps]


def apart(left: Params, right: Params, start: Params) -> float:
    """How far two tuned models are from each other, by how far `right` is from where it began."""

    def squared(a: Params, b: Params) -> float:
        one, other = flatten(a), flatten(b)
        return float(
            sum(((np.asarray(one[k], np.float64) - np.asarray(other[k])) ** 2).sum() for k in one)
        )

    return (squared(left, right) / squared(right, start)) ** 0.5


if __name__ == "__main__":
    use_compilation_cache()
    assert jax.device_count() == DEVICES
    chosen, steps = model_of(sys.argv[1]), int(sys.argv[2])
    rows = examples_of(chosen, 40, 200)
    variants, meshes = sys.argv[3].split(","), sys.argv[4:]
    found: dict[str, Any] = {}
    unbroken: dict[str, Params] = {}
    for name in variants:
        found[name], changes = {}, VARIANTS[name]
        for mesh in meshes:
            figures, params = results(chosen, rows, spec_of(mesh, steps, **changes))
            params = jax.tree.map(np.asarray, params)
            if mesh == meshes[0]:
                alone = params
            figures["apart"] = apart(params, alone, chosen.params)
            found[name][mesh] = figures
            if name == variants[0]:
                unbroken[mesh] = params
    found["continued"] = {}
    changes_of_mesh = [*zip(meshes, [*meshes[1:], meshes[0]], strict=True), (meshes[-1],) * 2]
    for before, after in changes_of_mesh if steps > STOPPED else []:
        specs = [spec_of(mesh, steps, **VARIANTS[variants[0]]) for mesh in (before, after)]
        other, losses = continued(chosen, rows, *specs)
        found["continued"][f"{before} then {after}"] = {
            "apart": apart(other, unbroken[before], chosen.params),
            "loss": losses,
            "unbroken": found[variants[0]][before]["loss"][STOPPED:],
        }
    print(json.dumps(found))
