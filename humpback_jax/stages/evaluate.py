"""Stage: held-out NLL of a model under each set of tags, and its answers to held-out requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from humpback_jax.artifacts import Artifact, Row, Stage, rows_hash
from humpback_jax.evaluation.nll import response_nll
from humpback_jax.evaluation.statistics import paired_difference, token_mean
from humpback_jax.records import Example, stable_id
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.stages.context import Context

VERSION = 2


def evaluate_stage(context: Context, name: str, model: Artifact) -> Artifact:
    """NLL of each held-out example under each set of tags: one row an (example, tags)."""
    config = context.config
    fields = {"tags": list(config.evaluate.tags), **_subject(context.heldout)}
    fields["precision"] = context.compute.scoring_formats
    stage = Stage("evaluate", VERSION, fields)

    def make(_: int) -> list[Row]:
        reader = context.inference(model)
        rows = []
        for tags in config.evaluate.tags:
            nll, tokens = response_nll(reader, context.heldout, tags)
            for example, value, count in zip(context.heldout, nll, tokens, strict=True):
                rows.append(
                    {"id": example.id, "tags": tags, "nll": float(value), "tokens": int(count)}
                )
        return rows

    return context.folder.rows(f"evaluation/{name}", "evaluation", stage, [model], 1, make)


def answers_stage(context: Context, name: str, model: Artifact, tags: Any) -> Artifact:
    """Greedy answers to a few held-out instructions, for the report's before and after."""
    config = context.config
    chosen = sorted(context.heldout, key=lambda e: stable_id("answers", e.id))
    chosen = chosen[: config.evaluate.answers]
    decoding = Decoding(0.0, 1.0, 0, config.evaluate.answer_tokens)
    fields = {"tags": tags, "tokens": decoding.max_new_tokens, **_subject(chosen)}
    fields["precision"] = context.compute.sampling_formats
    stage = Stage("answers", VERSION, fields)

    def make(_: int) -> list[Row]:
        reader = context.inference(model)
        template = reader.model.template
        prompts = [(e.id, template.forward_prompt(e.chat()[:-1], tags)) for e in chosen]
        drawn = reader.generate(prompts, decoding, seed=config.seed, stage="answers")
        return [
            {
                "id": e.id,
                "instruction": e.instruction,
                "reference": e.response,
                "answer": g.text,
                "finish_reason": g.finish_reason,
            }
            for e, g in zip(chosen, drawn, strict=True)
        ]

    return context.folder.rows(f"answers/{name}", "answers", stage, [model], 1, make)


def _subject(examples: Sequence[Example]) -> Row:
    """What is read: for the key."""
    return {"data": rows_hash(dataclasses.asdict(example) for example in examples)}


def results_table(evaluations: dict[str, list[Row]], default_tags: dict[str, str]) -> Row:
    """Held-out NLL by model and tags, and paired differences with 95 % intervals.

    Every model counts with its own default tags, except the base, which has none: of its figures
    the best one counts, so that the tuned models gain nothing from tags that it has never seen.

    Returns:
      {model: {"nll", "tags", "by_tags", "versus_base", "versus_M_0"}}.
    """
    arrays = {
        model: {
            tags: _arrays([row for row in rows if row["tags"] == tags])
            for tags in dict.fromkeys(row["tags"] for row in rows)
        }
        for model, rows in evaluations.items()
    }
    table: Row = {}
    used: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for model, by_tags in arrays.items():
        estimates = {tags: token_mean(*pair) for tags, pair in by_tags.items()}
        tags = default_tags.get(model, "")
        if tags not in estimates:
            tags = min(estimates, key=lambda name: estimates[name].value)
        used[model] = by_tags[tags]
        row: Row = {
            "nll": estimates[tags].record(),
            "tags": tags,
            "by_tags": {name: estimate.record() for name, estimate in estimates.items()},
        }
        for reference in ("base", "M_0"):
            if reference in used and reference != model:
                nll, tokens = used[model]
                difference = paired_difference(nll, used[reference][0], tokens)
                row[f"versus_{reference}"] = difference.record()
        table[model] = row
    return table


def _arrays(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    ordered = sorted(rows, key=lambda row: row["id"])
    return (
        np.array([row["nll"] for row in ordered]),
        np.array([row["tokens"] for row in ordered], np.int64),
    )
