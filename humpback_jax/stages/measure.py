"""Stage: the meters that run before money is spent, and may stop the run."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence

from humpback_jax.artifacts import Artifact, Row, Stage, rows_hash
from humpback_jax.curators import PairText, Rating, Scored, rate
from humpback_jax.errors import HumpbackError
from humpback_jax.evaluation.meters import (
    CurationMeter,
    backward_meter,
    corruptions,
    curation_meter,
)
from humpback_jax.evaluation.nll import instruction_nll
from humpback_jax.evaluation.statistics import Estimate, token_mean
from humpback_jax.inference import Generation, Inference
from humpback_jax.records import Example, stable_id
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.stages.augment import gate
from humpback_jax.stages.context import Context
from humpback_jax.stages.curate import gate_fields, rubric_decoding
from humpback_jax.stages.heldout import meter_pairs
from humpback_jax.text.template import Template

CURATION_VERSION, BACKWARD_VERSION = 2, 3


def backward_meter_stage(context: Context, backward: Artifact, judge: Artifact) -> Artifact:
    """Measures M_yx on held-out pairs: NLL, lift under M_0, copy, echo and pass rates.

    Raises:
      HumpbackError: a limit of `config.meters` is broken and its action is "stop".
    """
    config = context.config
    examples = _examples(context)
    section = config.augment
    decoding = Decoding(section.temperature, section.top_p, section.top_k, section.max_new_tokens)
    fields: Row = {"decoding": dataclasses.asdict(decoding), "seed": config.seed}
    fields |= {"examples": _content(examples), "precision": context.compute.sampling_formats}
    fields["gate"] = gate_fields(config)
    stage = Stage("backward_meter", BACKWARD_VERSION, fields)

    def passes(drawn: Generation, example: Example) -> bool:
        text, response = drawn.text, example.response
        return gate(text, response, drawn.finish_reason, context.base.template, section) is None

    def write() -> tuple[list[Generation], Estimate, Template]:
        writer = context.inference(backward)
        template = writer.model.template
        prompts = [(e.id, template.backward_prompt(e.response)) for e in examples]
        drawn = writer.generate(
            prompts,
            decoding,
            seed=config.seed,
            stage="backward_meter",
            opening=template.backward_prompt,
        )
        return drawn, token_mean(*instruction_nll(writer, examples)), template

    def make(_: int) -> list[Row]:
        drawn, nll, template = write()
        reader = context.inference(judge)
        measured = backward_meter(
            examples,
            drawn,
            nll,
            template,
            functools.partial(_rate, "pmi", reader, decoding, config.seed, Scored()),
            passes,
        )
        pairs = [[e.instruction, g.text] for e, g in zip(examples, drawn, strict=True)]
        return [{"meter": json.dumps(measured.record()), "examples": json.dumps(pairs)}]

    artifact = context.folder.rows(
        "round_0/backward_meter",
        "meter",
        stage,
        [backward, judge],
        1,
        make,
        lambda rows: json.loads(rows[0]["meter"]),
    )
    meter, limits = artifact.details, config.meters
    _judge(
        context,
        {
            f"lift {meter['lift']['value']:.3f} is below {limits.min_lift}": (
                meter["lift"]["value"] < limits.min_lift
            ),
            f"copy rate {meter['copy_rate']:.2f} is above {limits.max_copy_rate}": (
                meter["copy_rate"] > limits.max_copy_rate
            ),
            f"echo rate {meter['echo_rate']:.2f} is above {limits.max_echo_rate}": (
                meter["echo_rate"] > limits.max_echo_rate
            ),
            f"pass rate {meter['pass_rate']:.2f} is below {limits.min_pass_rate}": (
                meter["pass_rate"] < limits.min_pass_rate
            ),
        },
        "the backward model's instructions do not fit their responses",
    )
    return artifact


def curation_meter_stage(context: Context, t: int, judge: Artifact) -> Artifact:
    """AUC of every curator of interest on true against shuffled, truncated and promo pairs.

    Args:
      t: the round. judge: M_{t-1}.

    Raises:
      HumpbackError: the loop's curator cannot tell true from shuffled pairs, and the action is
        "stop".
    """
    config = context.config
    examples = _examples(context)
    decoding = rubric_decoding(config.curate)
    curators = list(dict.fromkeys([config.curate.curator, *config.meters.curators]))
    fields: Row = {"curators": curators, "examples": _content(examples)}
    fields["precision"] = context.compute.scoring_formats
    if "rubric" in curators:
        fields |= {"decoding": dataclasses.asdict(decoding), "seed": config.seed}
        fields["precision"] = context.compute.sampling_formats
    stage = Stage("curation_meter", CURATION_VERSION, json.loads(json.dumps(fields)))

    def measured(curator: str, scored: Scored) -> dict[str, CurationMeter]:
        frozen = curator == "pmi_frozen"
        reader = context.inference(context.base_artifact if frozen else judge)
        seen = Scored() if frozen else scored
        return curation_meter(
            functools.partial(_rate, curator, reader, decoding, config.seed, seen), examples
        )

    def make(_: int) -> list[Row]:
        scored = Scored()
        return [
            {"curator": curator, "kind": kind, "auc": meter.auc, "n": meter.n}
            for curator in curators
            for kind, meter in measured(curator, scored).items()
        ]

    def nested(rows: list[Row]) -> Row:
        table: dict[str, dict[str, Row]] = {}
        for row in rows:
            table.setdefault(row["curator"], {})[row["kind"]] = {"auc": row["auc"], "n": row["n"]}
        return table

    name = f"round_{t}/curation_meter"
    artifact = context.folder.rows(name, "meter", stage, [judge], 1, make, nested)
    auc = artifact.details[config.curate.curator]["shuffled"]["auc"]
    _judge(
        context,
        {f"AUC {auc:.2f} is below {config.meters.min_auc}": auc < config.meters.min_auc},
        f"the curator {config.curate.curator!r} under {judge.name} cannot tell true pairs from "
        "shuffled ones",
    )
    return artifact


def _rate(
    curator: str,
    reader: Inference,
    decoding: Decoding,
    seed: int,
    scored: Scored,
    pairs: Sequence[PairText],
) -> list[Rating]:
    return rate(curator, reader, pairs, decoding, seed, scored)


def check_meters(context: Context) -> None:
    """Refuses a run whose meters would have nothing to measure.

    Raises:
      HumpbackError: too few held-out pairs with different instructions.
    """
    if context.config.rounds:
        corruptions(_examples(context))


def _examples(context: Context) -> list[Example]:
    """The held-out pairs that the meters use, chosen by a hash of their ids."""
    order = sorted(context.heldout, key=lambda e: stable_id("meter", e.id))
    return meter_pairs(context.base, context.config, [example.opening() for example in order])


def _content(examples: list[Example]) -> str:
    """What a meter measures on: for its key."""
    return rows_hash(dataclasses.asdict(example) for example in examples)


def _judge(context: Context, broken: dict[str, bool], meaning: str) -> None:
    failures = [text for text, is_broken in broken.items() if is_broken]
    if not failures:
        return
    message = f"{meaning}: {'; '.join(failures)}."
    if context.config.meters.action == "stop":
        raise HumpbackError(
            f"{message} Stopped before compute is spent on it; everything so far is kept. Improve "
            "the model or the data, choose another curator, or set meters.action=warn."
        )
    context.say(f"warning: {message}")
