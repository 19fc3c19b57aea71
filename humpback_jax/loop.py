"""The loop, in order, on one page: augment once; then curate and train, round by round.

    M_yx <- SFT(base, seed turned round)          M_0 <- SFT(base, seed)
    A    <- {(x̂ ~ M_yx(. | y), y) for y in U}
    for t = 1..T:
        a     <- scores of A under M_{t-1}
        A_k   <- the best of A by a
        M_t   <- SFT(base, seed with tag S_a  +  A_k with tag S_w)

(Li et al., 2023, section 2.) Each line below is a stage: it reads artifacts, writes one, and is
skipped when that one is done.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from humpback_jax.artifacts import Artifact, Row, RunFolder, write_json
from humpback_jax.compute import choose_compute
from humpback_jax.config import check_config, check_data
from humpback_jax.curators import check_curator
from humpback_jax.environment import describe_environment
from humpback_jax.lock import sole_user
from humpback_jax.metrics import MetricsLog
from humpback_jax.models import LanguageModel, load_model
from humpback_jax.records import Example
from humpback_jax.stages.augment import augment_stage
from humpback_jax.stages.context import Context
from humpback_jax.stages.curate import score_stage, select_stage, selected_examples
from humpback_jax.stages.evaluate import answers_stage, evaluate_stage, results_table
from humpback_jax.stages.heldout import fitting_pairs
from humpback_jax.stages.measure import backward_meter_stage, check_meters, curation_meter_stage
from humpback_jax.stages.sources import corpus_stage, seed_pairs, validation_pairs
from humpback_jax.stages.texts import TAGS_BY_SOURCE
from humpback_jax.stages.train import train_stage
from humpback_jax.training.mixture import check_sources, parse_mixture


def run(
    config: Any,
    workdir: Path,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = print,
    profile: Path | None = None,
) -> Row:
    """Runs, or continues, the whole loop; returns the summary that `--json` prints.

    Args:
      profile: folder for a trace of some steps of each training.

    Raises:
      HumpbackError: bad input, a meter that stops the run, nothing selected. What is done stays.
    """
    started = time.monotonic()
    with opened(config, workdir, fresh=fresh, say=say, profile=profile) as context:
        summary = {
            "status": "done",
            "workdir": str(workdir),
            **rounds(context),
            "redone": context.folder.redone,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(workdir / "summary.json", summary)
    return summary


def rounds(context: Context) -> Row:
    """The loop itself; returns the results of all models and the meters."""
    config, seed = context.config, context.seed
    corpus = corpus_stage(context)

    m_yx = train_stage(context, "round_0/M_yx", seed, "backward", [], "none")
    m_0 = train_stage(context, "round_0/M_0", seed, "forward", [], "S_a")
    backward_meter = backward_meter_stage(context, m_yx, m_0)
    # Ahead of augmentation, the longest stage: its pairs are worth what the first judge can tell.
    meters = [curation_meter_stage(context, 1, m_0)] if config.rounds else []
    candidates = augment_stage(context, m_yx, corpus)

    models, judge = {"base": context.base_artifact, "M_0": m_0}, m_0
    for t in range(1, config.rounds + 1):
        if t > 1:
            meters.append(curation_meter_stage(context, t, judge))
        scores = _score(context, t, judge, candidates)
        pairs = select_stage(context, f"round_{t}/pairs", candidates, scores)
        chosen = selected_examples(context.folder.read(pairs))
        judge = train_stage(context, f"round_{t}/M_{t}", seed + chosen, "forward", [pairs], "both")
        models[f"M_{t}"] = judge

    return {
        "models": _evaluate(context, models),
        "meters": {
            "curation": meters[-1].details if meters else {},
            "backward": backward_meter.details,
        },
    }


@contextlib.contextmanager
def opened(config: Any, workdir: Path, **settings: Any) -> Iterator[Context]:
    """A run in its folder, which no other run enters meanwhile; see `prepare` for `settings`."""
    context = prepare(config, workdir, **settings)
    with sole_user(workdir):
        # Until their turn comes, the names of an earlier run may stand for another config.
        for earlier in ("summary.json", "manifest.json"):
            (workdir / earlier).unlink(missing_ok=True)
        write_json(workdir / "config.json", json.loads(config.to_json()))
        write_json(workdir / "environment.json", describe_environment())
        yield context


def prepare(
    config: Any,
    workdir: Path,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = print,
    profile: Path | None = None,
) -> Context:
    """Checks the config, opens the run folder and loads base model and human pairs."""
    check_config(config)
    check_data(config)
    check_curator(config.curate.curator, config.rounds)
    for curator in (*config.curate.also, *config.meters.curators):
        check_curator(curator, 1)
    for section in (config.backward, config.train):
        check_sources(parse_mixture(section.mixture), tuple(TAGS_BY_SOURCE))
    folder = RunFolder(workdir, fresh=fresh, say=say)
    seed, heldout = seed_pairs(config)
    validation = validation_pairs(config, seed, heldout)
    compute = choose_compute(**config.compute)
    base = load_model(config.base.model, config.base.template, config.seed)
    heldout = _fitting("data.heldout", heldout, base, config, say)
    watched = _fitting("data.validation", validation, base, config, say) or heldout
    metrics = MetricsLog(workdir)
    context = Context(config, folder, compute, base, seed, heldout, metrics, say, profile, watched)
    check_meters(context)
    return context


def _fitting(
    name: str, pairs: list[Example], base: LanguageModel, config: Any, say: Callable[[str], None]
) -> list[Example]:
    """The pairs that the model's window holds; says how many it does not."""
    fitting, too_long = fitting_pairs(base, config, pairs, name)
    if too_long:
        say(
            f"warning: {len(too_long)} pairs of {name} are too long for the window of {base.name} "
            f"and left out, the first is row {too_long[0]}"
        )
    return fitting


def _score(context: Context, t: int, judge: Artifact, candidates: Artifact) -> Artifact:
    """Scores of the loop's curator, which select, and of the further ones, for the report."""
    section = context.config.curate

    def score(curator: str, limit: int) -> Artifact:
        reader = context.base_artifact if curator == "pmi_frozen" else judge
        return score_stage(context, t, reader, candidates, curator, limit)

    for curator in section.also:
        if curator != section.curator:
            score(curator, section.also_limit)
    return score(section.curator, 0)


def _evaluate(context: Context, models: dict[str, Artifact]) -> Row:
    evaluations, tags = {}, {"M_0": "S_a"}
    for name, model in models.items():
        evaluations[name] = context.folder.read(evaluate_stage(context, name, model))
        if name not in ("base", "M_0"):
            tags[name] = "both"
        answers_stage(context, name, model, tags.get(name, "none"))
    return results_table(evaluations, tags)
