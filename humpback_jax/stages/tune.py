"""The base model tuned under a section of a config: what the loop and `humpback train` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from humpback_jax.adapters import Adapter
from humpback_jax.artifacts import json_hash, rows_hash
from humpback_jax.compute import Compute
from humpback_jax.config import effective_fields
from humpback_jax.models import LanguageModel
from humpback_jax.parallel.mesh import training_mesh
from humpback_jax.records import Example
from humpback_jax.stages.settings import train_spec
from humpback_jax.stages.texts import Direction
from humpback_jax.text.template import Tags
from humpback_jax.training.examples import TrainingExample, index_of
from humpback_jax.training.mixture import parse_mixture, pools_of, shares_of
from humpback_jax.training.order import draws_of
from humpback_jax.training.trainer import Trained, train
from humpback_jax.weights.hashing import corner_hash


def tune(
    base: LanguageModel,
    examples: Sequence[TrainingExample],
    section: Any,
    compute: Compute,
    seed: int,
    *,
    tags: Tags = "none",
    validation: Sequence[TrainingExample] = (),
    resume: Any = None,
    on_metrics: Any = lambda row: None,
    on_epoch: Any = lambda epoch, model: None,
    on_plan: Any = lambda plan: None,
    stops: Any = lambda step: False,
    evidence: Path | None = None,
    profile: Path | None = None,
) -> Trained:
    """Trains the base under a section's settings.

    Args:
      tags: of the models that `on_epoch` receives.
      on_plan: see `trainer.train`, as for errors.
    """
    index = index_of(examples)
    shares = shares_of(index.names, parse_mixture(section.mixture))
    pools = pools_of(index.keys, index.sources, shares)
    spec = train_spec(section, compute, seed, draws_of(pools))
    spec = dataclasses.replace(spec, mesh=training_mesh(compute.mesh, base.config.hidden_size))
    return train(
        base.config,
        base.params,
        examples,
        spec,
        validation=validation,
        resume=resume,
        on_metrics=on_metrics,
        on_epoch=lambda epoch, params: on_epoch(
            epoch, LanguageModel("epoch", base.config, params, base.tokenizer, base.template, tags)
        ),
        on_plan=on_plan,
        stops=stops,
        evidence=evidence,
        profile=profile,
    )


def run_identity(
    name: str,
    base: LanguageModel,
    section: Any,
    direction: Direction,
    seed: int,
    data: str,
    heldout: Sequence[Example],
) -> dict[str, str]:
    """What a training run is, wherever it runs: two with the same end with the same weights, but
    for the rounding of other devices, number formats and micro-batches.

    Args:
      name: of the model that is trained, or that it is trained from.
      data: hash of the rows, or of their tokens.
    """
    content = json_hash([dataclasses.asdict(base.config), corner_hash(base.params)])
    found = {
        "model": f"{name} ({content[:8]})",
        "config": json_hash([effective_fields(section), direction, seed]),
        "data": data,
        "template": base.template.content_hash(),
    }
    if section.select == "best":
        found["heldout"] = rows_hash(row_identity(example) for example in heldout)
    return found


def tuned_model(base: LanguageModel, name: str, trained: Trained, tags: Tags) -> LanguageModel:
    """The trained weights with the base's tokenizer and template, and their adapter."""
    adapter = None
    if trained.lora is not None and trained.adapter is not None:
        adapter = Adapter(trained.lora, trained.adapter, base.name, tags)
    return LanguageModel(
        name, base.config, trained.params, base.tokenizer, base.template, tags, adapter
    )


def row_identity(example: Example) -> dict[str, Any]:
    """What a row is to the artifacts that come of it."""
    own = {"id": example.id, "source": example.source, "text": example.text}
    return {**own, "messages": example.chat()}


def progress_line(name: str, row: dict[str, Any]) -> str:
    """A row of training's metrics for people."""
    if "validation_nll" in row:
        return f"{name}: step {row['step']}, validation NLL {row['validation_nll']:.4f}"
    mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
    speed = f"{row['supervised_tokens_per_s']:.0f} supervised tokens/s{mfu}"
    return f"{name}: step {row['step']}, loss {row['loss']:.4f}, {speed}"
