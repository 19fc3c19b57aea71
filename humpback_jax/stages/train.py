"""Stage: tune the base model on pairs, forwards (M_0, M_t) or backwards (M_yx)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from humpback_jax.artifacts import Artifact, Stage, rows_hash, write_json, write_parquet
from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.config import effective_fields
from humpback_jax.models import holds_checkpoint, save_checkpoint
from humpback_jax.parallel.preemption import StopSignal
from humpback_jax.records import Example
from humpback_jax.stages.context import Context
from humpback_jax.stages.texts import Direction, tokenized_examples, validation_examples
from humpback_jax.stages.tune import progress_line, row_identity, run_identity, tune, tuned_model
from humpback_jax.text.template import Tags
from humpback_jax.training.examples import index_of
from humpback_jax.training.goodput import goodput_line
from humpback_jax.training.mixture import parse_mixture, source_counts

VERSION = 3


def train_stage(
    context: Context,
    name: str,
    examples: Sequence[Example],
    direction: Direction,
    parents: Sequence[Artifact],
    tags: Tags,
) -> Artifact:
    """Tunes the base on `examples` and stores the model under `name`.

    Args:
      tags: what the model is prompted with by default, written into its checkpoint.
    """
    config = context.config
    section = config.backward if direction == "backward" else config.train
    fields = {
        "train": effective_fields(section),
        "direction": direction,
        "tags": tags,
        "seed": config.seed,
        "precision": context.compute.precision.compute,
        "data": rows_hash(row_identity(example) for example in examples),
    }
    if section.select == "best":
        fields["heldout"] = rows_hash(row_identity(example) for example in context.validation)
    stage = Stage("train", VERSION, json.loads(json.dumps(fields)))

    def make(folder: Path) -> tuple[str, dict[str, Any]]:
        identity = run_identity(
            name, context.base, section, direction, config.seed, fields["data"], context.validation
        )
        resume = ResumeFolder(context.resume_root / folder.name, section.keep_resume, identity)
        context.release()
        tokenized, dropped = tokenized_examples(context.base, examples, section, direction)
        watched, unwatched = validation_examples(
            context.base, context.validation, section, direction
        )
        if unwatched and section.eval_every:
            count = sum(unwatched.values())
            context.say(f"{name}: {count} validation pairs are left out: {unwatched}")
        trained = tune(
            context.base,
            tokenized,
            section,
            context.compute,
            config.seed,
            tags=tags,
            validation=watched,
            resume=resume,
            on_metrics=lambda row: _report(context, name, row),
            on_plan=lambda plan: context.say(f"{name}: {plan.summary()}"),
            on_epoch=lambda epoch, model: save_checkpoint(
                folder / f"epoch_{epoch}", model, {"identity": identity, "epoch": epoch}
            ),
            stops=stop.reached,
            evidence=context.folder.root,
            profile=context.profile and context.profile / name,
        )
        context.say(f"{name}: {goodput_line(trained.goodput)}")
        model = tuned_model(context.base, name, trained, tags)
        details = {
            "identity": identity,
            "examples": len(tokenized),
            "dropped": dropped,
            "steps": trained.steps,
            "selected_step": trained.step,
            "goodput_s": {phase: round(took, 3) for phase, took in trained.goodput.items()},
            "packing_efficiency": round(trained.plan.efficiency, 4),
            "sources": source_counts(index_of(tokenized), parse_mixture(section.mixture)),
            "seen": trained.plan.seen,
            "epochs": trained.plan.epochs,
        }
        write_parquet(
            folder / "data.parquet",
            [{"id": e.id, "source": e.source, "tokens": e.length} for e in tokenized],
        )
        save_checkpoint(folder, model, details)
        write_json(folder / "history.json", trained.history)
        return model.hash, details

    all_parents = [context.base_artifact, *parents]
    with StopSignal() as stop:
        artifact = context.folder.model(name, stage, all_parents, make, holds_checkpoint)
        # Not before the model is sealed: until then a killed run needs it.
        ResumeFolder(context.resume_root / Path(artifact.path).name).delete()
    stop.obey(f"{name} is done")
    if section.checkpoint_epochs:
        _tell_of_missing_epochs(context, artifact)
    return artifact


def _tell_of_missing_epochs(context: Context, model: Artifact) -> None:
    """A model's key does not know whether the ends of its epochs are kept: it may lack them."""
    folder = context.folder.root / model.path
    epochs = range(1, model.details["epochs"] + 1)
    missing = [str(epoch) for epoch in epochs if not holds_checkpoint(folder / f"epoch_{epoch}")]
    if missing:
        context.say(
            f"{model.name}: epochs {', '.join(missing)} have no checkpoint: the model was trained "
            "without checkpoint_epochs, and is not trained again for them. --fresh does so."
        )


def _report(context: Context, name: str, row: dict[str, Any]) -> None:
    context.metrics.write(name, row)
    context.say(progress_line(name, row))
