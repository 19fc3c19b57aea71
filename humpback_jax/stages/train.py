"""Stage: tune the base model on pairs, forwards (M_0, M_t) or backwards (M_yx)."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from humpback_jax.adapters import Adapter
from humpback_jax.artifacts import Artifact, Stage, json_hash, rows_hash, write_json, write_parquet
from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.compute import Compute
from humpback_jax.config import effective_fields
from humpback_jax.errors import HumpbackError
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.lora import lora_spec
from humpback_jax.models import LanguageModel, holds_checkpoint, save_checkpoint
from humpback_jax.parallel.mesh import training_mesh
from humpback_jax.parallel.preemption import StopSignal
from humpback_jax.records import Example
from humpback_jax.stages.context import Context
from humpback_jax.text.template import Rendered, Tags, Template
from humpback_jax.text.tokenize import tokenize_batch
from humpback_jax.training.examples import TrainingExample, index_of
from humpback_jax.training.goodput import goodput_line
from humpback_jax.training.loss import Objective
from humpback_jax.training.mixture import parse_mixture, pools_of, shares_of, source_counts
from humpback_jax.training.optimizer import OptimizerSpec
from humpback_jax.training.order import draws_of
from humpback_jax.training.trainer import Trained, TrainSpec, train
from humpback_jax.weights.hashing import corner_hash

VERSION = 2
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
    if section.select == "best":
        fields["heldout"] = rows_hash(_identity(example) for example in context.heldout)
    stage = Stage("train", VERSION, json.loads(json.dumps(fields)))

    def make(folder: Path) -> tuple[str, dict[str, Any]]:
        resume = ResumeFolder(
            context.resume_root / folder.name,
            section.keep_resume,
            run_identity(
                name, context.base, section, direction, config.seed, fields["data"], context.heldout
            ),
        )
        context.release()
        tokenized, dropped = tokenized_examples(context.base, examples, section, direction)
        trained = tune(
            context.base,
            tokenized,
            section,
            direction,
            context.compute,
            config.seed,
            tags=tags,
            validation=context.heldout,
            resume=resume,
            on_metrics=lambda row: _report(context, name, row),
            on_plan=lambda plan: context.say(f"{name}: {plan.summary()}"),
            on_epoch=lambda epoch, model: save_checkpoint(folder / f"epoch_{epoch}", model, {}),
            stops=stop.reached,
            evidence=context.folder.root,
            profile=context.profile and context.profile / name,
        )
        context.say(f"{name}: {goodput_line(trained.goodput)}")
        model = tuned_model(context.base, name, trained, tags)
        steps = [row for row in trained.history if "loss" in row]
        details = {
            "examples": len(tokenized),
            "dropped": dropped,
            "steps": len(steps) and steps[-1]["step"],
            "selected_step": trained.step,
            "goodput_s": {phase: round(took, 3) for phase, took in trained.goodput.items()},
            "packing_efficiency": round(trained.plan.efficiency, 4),
            "sources": source_counts(index_of(tokenized), parse_mixture(section.mixture)),
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
    return artifact


def tokenized_examples(
    base: LanguageModel, examples: Sequence[Example], section: Any, direction: Direction
) -> tuple[list[TrainingExample], dict[str, int]]:
    """(what `tune` takes, the number of rows dropped by reason).

    Raises:
      HumpbackError: no example is left, or one is refused (`on_long="error"`).
    """
    rows = render(base.template, examples, direction)
    batch = tokenize_batch(base.tokenizer, rows, token_limit(base, section), section.on_long)
    if not batch.examples:
        raise none_left(len(examples), batch.drop_counts())
    sources = {example.id: example.source for example in examples}
    tokenized = [TrainingExample(e.id, e.ids, e.mask, sources[e.id]) for e in batch.examples]
    return tokenized, batch.drop_counts()


def token_limit(base: LanguageModel, section: Any) -> int:
    """Tokens of the longest example that fits both a row and the model's window."""
    return int(min(section.row_tokens + 1, base.config.max_position_embeddings))


def none_left(rows: int, dropped: dict[str, int]) -> HumpbackError:
    """What to tell a user all of whose rows were dropped."""
    return HumpbackError(
        f"no training example is left of {rows}: {dropped}. Raise row_tokens or shorten the rows."
    )


def tune(
    base: LanguageModel,
    examples: Sequence[TrainingExample],
    section: Any,
    direction: Direction,
    compute: Compute,
    seed: int,
    *,
    tags: Tags = "none",
    validation: Sequence[Example] = (),
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
    spec = dataclasses.replace(spec, mesh=training_mesh(compute.mesh))
    return train(
        base.config,
        base.params,
        examples,
        spec,
        validation=_validation(base, validation, section, direction),
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


def _validation(
    base: LanguageModel, examples: Sequence[Example], section: Any, direction: Direction
) -> list[TrainingExample]:
    """Tokenised source by source: their ids may be the same. What is too long is left out.

    Raises:
      HumpbackError: nothing is left that `eval_every` could measure.
    """
    found, dropped = [], collections.Counter[str]()
    for source in sorted({example.source for example in examples}):
        chosen = [example for example in examples if example.source == source]
        rows = render(base.template, chosen, direction)
        batch = tokenize_batch(base.tokenizer, rows, token_limit(base, section), "drop")
        found += [TrainingExample(e.id, e.ids, e.mask, source) for e in batch.examples]
        dropped.update(batch.drop_counts())
    if examples and section.eval_every and not found:
        raise HumpbackError(f"held-out rows: {none_left(len(examples), dict(dropped))}")
    return found


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
    for the rounding of other devices and number formats.

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
        found["heldout"] = rows_hash(_identity(example) for example in heldout)
    return found


def tuned_model(base: LanguageModel, name: str, trained: Trained, tags: Tags) -> LanguageModel:
    """The trained weights with the base's tokenizer and template, and their adapter."""
    adapter = None
    if trained.lora is not None and trained.adapter is not None:
        adapter = Adapter(trained.lora, trained.adapter, base.name, tags)
    return LanguageModel(
        name, base.config, trained.params, base.tokenizer, base.template, tags, adapter
    )


def render(
    template: Template, examples: Sequence[Example], direction: Direction
) -> list[tuple[str, Rendered]]:
    """Examples as training texts: tagged by source forwards, pairs turned round backwards.

    Raises:
      HumpbackError: a row that has no such text; names it.
    """
    return [(example.id, _rendered(template, example, direction)) for example in examples]


def _rendered(template: Template, example: Example, direction: Direction) -> Rendered:
    try:
        if direction == "forward":
            return _forward(template, example)
        if example.text is None:
            return template.backward(example.response, example.instruction)
        raise HumpbackError("plain text has no instruction to learn; remove it.")
    except HumpbackError as error:
        raise HumpbackError(f"row {example.id}: {error}") from error


def _forward(template: Template, example: Example) -> Rendered:
    if example.text is not None:
        return template.plain_text(example.text)
    return template.forward(example.chat(), TAGS_BY_SOURCE.get(example.source, "none"))


def train_spec(section: Any, compute: Compute, seed: int, draws: int) -> TrainSpec:
    """The section's settings for so many draws an epoch (`order.draws_of`).

    They decide the steps, where the section names epochs, and batch and steps, where its step table
    gives both.
    """
    steps, batch = section.steps, section.batch_examples
    if not steps and section.epochs:
        # Enough for every draw to be seen; less a bit, for 0.1 * 30 is more than 3.
        steps = max(math.ceil(section.epochs * draws / batch - 1e-9), 1)
    if not steps:
        rows = [row for row in section.step_table if row[0] >= draws] or [section.step_table[-1]]
        _, batch, steps = rows[0]
    return TrainSpec(
        steps=steps,
        batch_examples=batch,
        row_tokens=section.row_tokens,
        accumulation=section.accumulation or compute.accumulation,
        optimizer=OptimizerSpec(
            learning_rate=section.learning_rate,
            end_learning_rate=section.end_learning_rate,
            schedule=section.schedule,
            warmup_steps=section.warmup_steps,
            beta1=section.beta1,
            beta2=section.beta2,
            epsilon=section.epsilon,
            weight_decay=section.weight_decay,
            clip_norm=section.clip_norm,
            lora_plus_ratio=section.lora.plus_ratio,
            decay_share=section.decay_share,
            name=section.optimizer,
        ),
        lora=_lora(section.lora),
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
        select=section.select,
        spike_factor=section.spike_factor,
        checkpoint_epochs=section.checkpoint_epochs,
        mixture=parse_mixture(section.mixture),
    )


def _lora(section: Any) -> LoraSpec | None:
    if not section.rank:
        return None
    return lora_spec(
        section.rank,
        section.alpha,
        section.dropout,
        section.targets,
        section.scaling,
        section.dora,
        section.base,
    )


def _identity(example: Example) -> dict[str, Any]:
    own = {"id": example.id, "source": example.source, "text": example.text}
    return {**own, "messages": example.chat()}


def _report(context: Context, name: str, row: dict[str, Any]) -> None:
    context.metrics.write(name, row)
    context.say(progress_line(name, row))


def progress_line(name: str, row: dict[str, Any]) -> str:
    """A row of training's metrics for people."""
    if "validation_nll" in row:
        return f"{name}: step {row['step']}, validation NLL {row['validation_nll']:.4f}"
    mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
    speed = f"{row['supervised_tokens_per_s']:.0f} supervised tokens/s{mfu}"
    return f"{name}: step {row['step']}, loss {row['loss']:.4f}, {speed}"
