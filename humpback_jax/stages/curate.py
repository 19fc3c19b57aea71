"""Stage: M_{t-1} scores every candidate, and A_k^(t) is selected (section 2.3)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from humpback_jax.artifacts import Artifact, Row, Stage
from humpback_jax.config import CUTS
from humpback_jax.curators import (
    COMBINED,
    PairText,
    Rating,
    combine,
    rate_shards,
    require_rateable,
)
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import Inference
from humpback_jax.progress import Progress
from humpback_jax.records import Candidate, Pair, Score
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.stages.augment import gate
from humpback_jax.stages.context import Context
from humpback_jax.text.template import Template

VERSION = 2


def rubric_decoding(section: Any) -> Decoding:
    """How the reasoned rubric writes; the likelihood curators generate nothing."""
    return Decoding(section.temperature, section.top_p, 0, section.max_new_tokens)


def scores_name(section: Any, t: int, curator: str, limit: int) -> str:
    """The name of a curator's scores in round t: those of all pairs by the loop's own select."""
    if limit:
        return f"round_{t}/scores_{curator}_of_{limit}"
    return f"round_{t}/scores" if curator == section.curator else f"round_{t}/scores_{curator}"


def score_stage(
    context: Context,
    t: int,
    judge: Artifact,
    candidates: Artifact,
    curator: str,
    limit: int = 0,
) -> Artifact:
    """Scores of one curator under one model, one row per candidate that passes the gates.

    Those of `combined` are computed from its parts' scores, which are artifacts of their own.

    Args:
      t: the round. judge: M_{t-1}, or the base for `pmi_frozen`.
      limit: only the first candidates by hash of their id; 0 means all.
    """
    config = context.config
    section = config.curate
    name = scores_name(section, t, curator, limit)
    if curator == "combined":
        parts = {p: score_stage(context, t, judge, candidates, p, limit) for p in COMBINED}
        return _combined_scores(context, name, parts)
    pairs = _gated(context, candidates)
    if not pairs:
        raise HumpbackError(
            f"{name}: the gates refuse every candidate, so nothing is left to score. Look at the "
            "candidates' instructions; augment.min_chars, max_chars and max_new_tokens decide."
        )
    pairs = sorted(pairs, key=lambda pair: pair.id)[:limit] if limit else pairs
    decoding = rubric_decoding(section)
    fields: Row = {"curator": curator, "limit": limit, "gate": gate_fields(config)}
    fields["precision"] = context.compute.scoring_formats
    if curator == "rubric":
        fields |= {"decoding": dataclasses.asdict(decoding), "seed": config.seed}
        fields["precision"] = context.compute.sampling_formats
    size = section.shard_rows
    shards = [pairs[i : i + size] for i in range(0, len(pairs), size)]

    def make(missing: Sequence[int]) -> Iterator[tuple[int, list[Row]]]:
        reader = context.inference(judge)
        template_hash = reader.model.template.content_hash()
        refused: dict[str, Rating] = {}
        left = sum(len(shards[index]) for index in missing)
        progress = Progress(name, len(pairs), context.say, len(pairs) - left)

        def asked() -> Iterator[tuple[int, list[PairText]]]:
            for index in missing:
                for pair in shards[index]:
                    if rating := _refusal(reader, curator, pair):
                        refused[pair.id] = rating
                yield index, [pair for pair in shards[index] if pair.id not in refused]

        for index, rated in rate_shards(
            curator, reader, asked(), decoding, config.seed, progress.add
        ):
            progress.add(len(shards[index]) - len(rated))
            found = {pair.id: rating for pair, rating in rated}
            ratings = [found.get(pair.id) or refused[pair.id] for pair in shards[index]]
            rows = [
                Score(r.id, curator, r.value, r.detail, judge.hash, template_hash) for r in ratings
            ]
            yield index, [dataclasses.asdict(row) for row in rows]

    stage = Stage("score", VERSION, json.loads(json.dumps(fields)))
    return context.folder.streamed(
        name, "scores", stage, [judge, candidates], len(shards), make, _histogram, shard_rows=size
    )


def _refusal(reader: Inference, curator: str, pair: PairText) -> Rating | None:
    """The rating without a value of a pair that cannot be asked about, None for others."""
    try:
        require_rateable(reader.model, curator, pair)
    except HumpbackError as error:
        return Rating(pair.id, curator, None, json.dumps({"unrated": str(error)}))
    return None


def _combined_scores(context: Context, name: str, parts: dict[str, Artifact]) -> Artifact:
    def make(_: int) -> list[Row]:
        tables = {part: context.folder.read(scores) for part, scores in parts.items()}
        ratings = {
            part: [Rating(row["candidate_id"], part, row["value"], row["detail"]) for row in rows]
            for part, rows in tables.items()
        }
        return [
            {**row, "curator": r.curator, "value": r.value, "detail": r.detail}
            for row, r in zip(tables[COMBINED[0]], combine(ratings), strict=True)
        ]

    stage = Stage("score", VERSION, {"curator": "combined"})
    return context.folder.rows(name, "scores", stage, list(parts.values()), 1, make, _histogram)


def select_stage(context: Context, name: str, candidates: Artifact, scores: Artifact) -> Artifact:
    """Decides on every candidate and writes down why.

    Raises:
      HumpbackError: nothing is selected.
    """
    config = context.config
    section = config.curate
    names = ("curator", "select", CUTS[section.select])
    fields = {key: section[key] for key in names} | {"gate": gate_fields(config)}
    stage = Stage("select", VERSION, json.loads(json.dumps(fields)))

    def make(_: int) -> list[Row]:
        rows = [Candidate(**row) for row in context.folder.read(candidates)]
        values = {row["candidate_id"]: row["value"] for row in context.folder.read(scores)}
        template = context.base.template
        refused = {c.id: _gate(c, template, config) for c in rows}
        rated = {c.id: v for c in rows if (v := values.get(c.id)) is not None and math.isfinite(v)}
        chosen, rule = choose(rated, section)
        pairs = []
        for c in rows:
            value = values.get(c.id)
            selected = c.id in chosen
            unrated = rule if c.id in rated else "no_rating"
            reason = refused[c.id] or (rule if selected else unrated)
            pairs.append(
                Pair(c.id, c.id, c.instruction, c.response, "web", value, selected, reason)
            )
        return [dataclasses.asdict(pair) for pair in pairs]

    artifact = context.folder.rows(name, "pairs", stage, [candidates, scores], 1, make, _decisions)
    if not artifact.details["selected"]:
        raise HumpbackError(
            f"{name}: none of {artifact.rows} candidates is selected "
            f"({artifact.details['reasons']}). Lower curate.threshold, or set "
            "curate.select=top_fraction; the scores are kept."
        )
    return artifact


def choose(rated: dict[str, float], section: Any) -> tuple[set[str], str]:
    """Ids of A_k among the rated candidates, and the rule as text. Ties are broken by id.

    A fraction is one of the rated candidates, and at least one of them is taken.

    Raises:
      HumpbackError: `curate.select` is unknown.
    """
    order = sorted(rated, key=lambda name: (-rated[name], name))
    match section.select:
        case "absolute":
            rule = f"score >= {section.threshold:g}"
            return {name for name in order if rated[name] >= section.threshold}, rule
        case "top_fraction":
            count = round(section.fraction * len(order)) or min(1, len(order))
            return set(order[:count]), f"top {section.fraction:.1%} by score"
        case "count":
            return set(order[: section.count]), f"top {section.count} by score"
        case unknown:
            raise HumpbackError(
                f"curate.select={unknown!r} is unknown; choose absolute, top_fraction or count."
            )


def _gated(context: Context, candidates: Artifact) -> list[PairText]:
    rows = [Candidate(**row) for row in context.folder.read(candidates)]
    template = context.base.template
    return [
        PairText(c.id, c.instruction, c.response)
        for c in rows
        if _gate(c, template, context.config) is None
    ]


def _gate(candidate: Candidate, template: Template, config: Any) -> str | None:
    written = candidate.instruction, candidate.response, candidate.finish_reason
    return gate(*written, template, config.augment)


def gate_fields(config: Any) -> Row:
    return {"min_chars": config.augment.min_chars, "max_chars": config.augment.max_chars}


def _histogram(rows: list[Row]) -> Row:
    """Parse rate and score histogram, logged every time."""
    values = [row["value"] for row in rows if row["value"] is not None]
    bins: dict[str, int] = {}
    for value in values:
        label = f"{round(value, 1) + 0.0:.1f}"  # the sum turns -0.0 into 0.0
        bins[label] = bins.get(label, 0) + 1
    rate = len(values) / len(rows) if rows else 0.0
    ordered = dict(sorted(bins.items(), key=lambda item: float(item[0])))
    return {"rated": len(values), "parse_rate": round(rate, 4), "histogram": ordered}


def _decisions(rows: list[Row]) -> Row:
    reasons: dict[str, int] = {}
    for row in rows:
        label = ("selected: " if row["selected"] else "rejected: ") + row["reason"]
        reasons[label] = reasons.get(label, 0) + 1
    return {"selected": sum(row["selected"] for row in rows), "reasons": reasons}


def selected_examples(rows: Sequence[Row]) -> list[Any]:
    """The selected pairs of a `pairs` artifact as training examples."""
    return [Pair(**row).example() for row in rows if row["selected"]]
