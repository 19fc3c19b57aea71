"""Stage: tune the base model on pairs, forwards (M_0, M_t) or backwards (M_yx)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from humpback_jax.artifacts import Artifact, Stage, rows_hash, write_json, write_parquet
from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.compute import Compute
from humpback_jax.config import effective_fields
from humpback_jax.errors import HumpbackError
from humpback_jax.model.lora import lora_spec
from humpback_jax.models import LanguageModel, save_checkpoint
from humpback_jax.parallel.mesh import training_mesh
from humpback_jax.parallel.preemption import StopSignal
from humpback_jax.records import Example
from humpback_jax.stages.context import Context
from humpback_jax.text.template import Rendered, Tags, Template
from humpback_jax.text.tokenize import tokenize_batch
from humpback_jax.training.loss import Objective
from humpback_jax.training.optimizer import OptimizerSpec
from humpback_jax.training.packing import TrainingExample
from humpback_jax.training.trainer import Trained, TrainSpec, train

VERSION = 1
Direction = Literal["forward", "backward"]
# Source tags of the paper (section 2.3): what a row carries in training.
TAGS_BY_SOURCE: dict[str, Tags] = {"seed": "S_a", "web": "S_w"}


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
        "data": rows_hash(_identity(example) for example in examples),
    }
    stage = Stage("train", VERSION, json.loads(json.dumps(fields)))

    def make(folder: Path) -> tuple[str, dict[str, Any]]:
        resume = ResumeFolder(context.resume_root / stage.key(all_parents))
        trained, tokenized, dropped = tune(
            context.base,
            examples,
            section,
            direction,
            context.compute,
            config.seed,
            validation=context.heldout,
            resume=resume,
            on_metrics=lambda row: _report(context, name, row),
            on_epoch=lambda epoch, model: save_checkpoint(folder / f"epoch_{epoch}", model, {}),
            stops=stop.reached,
        )
        model = tuned_model(context.base, name, trained, tags)
        steps = [row for row in trained.history if "loss" in row]
        details = {
            "examples": len(tokenized),
            "dropped": dropped,
            "steps": len(steps) and steps[-1]["step"],
            "packing_efficiency": round(trained.plan.efficiency, 4),
            "tokens": sum(example.length for example in tokenized),
            "supervised_tokens": sum(example.supervised for example in tokenized),
            "by_source": _count(example.source for example in tokenized),
        }
        write_parquet(
            folder / "data.parquet",
            [{"id": e.id, "source": e.source, "tokens": e.length} for e in tokenized],
        )
        save_checkpoint(folder, model, details)
        write_json(folder / "history.json", trained.history)
        resume.delete()
        return model.hash, details

    all_parents = [context.base_artifact, *parents]
    with StopSignal() as stop:
        artifact = context.folder.model(name, stage, all_parents, make)
    stop.obey(f"{name} is done")
    return artifact


def tune(
    base: LanguageModel,
    examples: Sequence[Example],
    section: Any,
    direction: Direction,
    compute: Compute,
    seed: int,
    *,
    validation: Sequence[Example] = (),
    resume: Any = None,
    on_metrics: Any = lambda row: None,
    on_epoch: Any = lambda epoch, model: None,
    stops: Any = lambda step: False,
) -> tuple[Trained, list[TrainingExample], dict[str, int]]:
    """Tokenises and trains; returns the result, the examples used and the rows dropped by reason.

    Raises:
      HumpbackError: no example is left, or one is refused (`on_long="error"`).
      Preempted: `stops` said so; see `trainer.train`.
    """
    rows = render(base.template, examples, direction)
    limit = min(section.row_tokens + 1, base.config.max_position_embeddings)
    batch = tokenize_batch(base.tokenizer, rows, limit, section.on_long)
    sources = {example.id: example.source for example in examples}
    tokenized = [TrainingExample(e.id, e.ids, e.mask, sources[e.id]) for e in batch.examples]
    if not tokenized:
        raise HumpbackError(
            f"no training example is left of {len(examples)}: {batch.drop_counts()}. Raise "
            "row_tokens or shorten the rows."
        )
    check = tokenize_batch(
        base.tokenizer, render(base.template, validation, direction), limit, "drop"
    )
    spec = train_spec(section, compute, seed, len(tokenized))
    spec = dataclasses.replace(spec, mesh=training_mesh(compute.mesh))
    trained = train(
        base.config,
        base.params,
        tokenized,
        spec,
        validation=[TrainingExample(e.id, e.ids, e.mask) for e in check.examples],
        resume=resume,
        on_metrics=on_metrics,
        on_epoch=lambda epoch, params: on_epoch(
            epoch, LanguageModel("epoch", base.config, params, base.tokenizer, base.template)
        ),
        stops=stops,
    )
    return trained, tokenized, batch.drop_counts()


def tuned_model(base: LanguageModel, name: str, trained: Trained, tags: Tags) -> LanguageModel:
    """The trained weights with the base's tokenizer and template."""
    return LanguageModel(name, base.config, trained.params, base.tokenizer, base.template, tags)


def render(
    template: Template, examples: Sequence[Example], direction: Direction
) -> list[tuple[str, Rendered]]:
    """Examples as training texts: tagged by source forwards, pairs turned round backwards."""
    texts = [e.id for e in examples if e.text is not None]
    if texts and direction == "backward":
        raise HumpbackError(f"row {texts[0]}: plain text has no instruction to learn; remove it.")
    if direction == "backward":
        return [(e.id, template.backward(e.response, e.instruction)) for e in examples]
    return [(e.id, _forward(template, e)) for e in examples]


def _forward(template: Template, example: Example) -> Rendered:
    if example.text is not None:
        return template.plain_text(example.text)
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    return template.forward(messages, TAGS_BY_SOURCE.get(example.source, "none"))


def train_spec(section: Any, compute: Compute, seed: int, count: int) -> TrainSpec:
    """The section's settings for `count` examples; the step table gives batch and steps."""
    steps, batch = section.steps, section.batch_examples
    if not steps and section.epochs:
        steps = max(round(section.epochs * count / batch), 1)
    if not steps:
        rows = [row for row in section.step_table if row[0] >= count] or [section.step_table[-1]]
        _, batch, steps = rows[0]
    lora = section.lora
    return TrainSpec(
        steps=steps,
        batch_examples=batch,
        row_tokens=section.row_tokens,
        accumulation=section.accumulation or compute.accumulation,
        optimizer=OptimizerSpec(
            section.learning_rate,
            section.end_learning_rate,
            section.schedule,
            section.warmup_steps,
            section.beta1,
            section.beta2,
            section.epsilon,
            section.weight_decay,
            section.clip_norm,
            section.decay_share,
            section.optimizer,
        ),
        lora=lora_spec(lora.rank, lora.alpha, lora.dropout, lora.targets) if lora.rank else None,
        dropout=section.dropout,
        dropout_ramp=section.dropout_ramp,
        neftune_alpha=section.neftune_alpha,
        objective=Objective(section.label_smoothing, section.z_loss),
        precision=compute.precision,
        layout=compute.train_layout,
        kernels=compute.kernels,
        remat=section.remat,
        seed=seed,
        log_every=section.log_every,
        eval_every=section.eval_every,
        resume_every=section.resume_every,
        checkpoint_epochs=section.checkpoint_epochs,
    )


def _identity(example: Example) -> dict[str, Any]:
    turns = [[m.role, m.content] for m in example.messages]
    return {"id": example.id, "source": example.source, "messages": turns, "text": example.text}


def _count(values: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _report(context: Context, name: str, row: dict[str, Any]) -> None:
    context.metrics.write(name, row)
    if "validation_nll" in row:
        context.say(f"{name}: step {row['step']}, validation NLL {row['validation_nll']:.4f}")
    else:
        context.say(
            f"{name}: step {row['step']}, loss {row['loss']:.4f}, "
            f"{row['tokens_per_s']:.0f} tokens/s"
        )
