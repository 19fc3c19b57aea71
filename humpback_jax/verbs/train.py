"""The verb `humpback train`."""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from humpback_jax.artifacts import json_hash, rows_hash
from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.compute import choose_compute
from humpback_jax.errors import HumpbackError
from humpback_jax.metrics import MetricsLog, logged_rows
from humpback_jax.models import load_model, save_checkpoint
from humpback_jax.parallel.mesh import training_mesh
from humpback_jax.parallel.preemption import StopSignal
from humpback_jax.parallel.processes import require_same
from humpback_jax.progress import timed_lines
from humpback_jax.records import Example
from humpback_jax.rows import ReadReport, read_examples, stream_examples
from humpback_jax.stages.texts import TAGS_BY_SOURCE, Direction, validation_examples
from humpback_jax.stages.tokens import RowFile, Tokenization, parse_files, token_store
from humpback_jax.stages.tune import progress_line, row_identity, run_identity, tune, tuned_model
from humpback_jax.text.preview import preview_lines
from humpback_jax.text.template import Tags
from humpback_jax.training.goodput import goodput_line
from humpback_jax.training.mixture import check_sources, parse_mixture, source_counts
from humpback_jax.training.packing import PackingPlan
from humpback_jax.training.trainer import Trained
from humpback_jax.verbs.arguments import Result, chosen_config, flag_as_field, own_folder

READS = ("base", "seed", "backward", "train", "compute.precision", "compute.mesh")
# One epoch of small batches. A file of one's own shall not lose rows unseen, and today's base
# models were trained without dropout: the paper's 0.1 takes SmolLM2-135M's loss on a page of text
# from 3.8 to 6.0.
WITHOUT_CONFIG = {"epochs": 1.0, "batch_examples": 8, "on_long": "error", "dropout": 0.0}


def train(arguments: argparse.Namespace) -> Result:
    """SFT on files of rows; writes one of our checkpoints."""
    arguments.overrides = _of_direction(arguments.overrides, arguments.reverse)
    flag_as_field(arguments, "mix", "backward.mixture" if arguments.reverse else "train.mixture")
    config = chosen_config(arguments, READS, WITHOUT_CONFIG)
    for name in ("limit", "preview"):
        if getattr(arguments, name) < 0:
            raise HumpbackError(f"--{name}={getattr(arguments, name)} has to be 0 or more.")
    out = Path(arguments.out)
    # Of resolved paths, `new/../model` is `model` before there is any folder `new`.
    if out.resolve() == Path(config.base.model).resolve() and out.resolve().exists():
        # A run that is killed while the model is replaced could not go on.
        raise HumpbackError(f"--out={out} is the model to be trained; choose another folder.")
    with own_folder(out):
        return _trained_into(out, arguments, config)


def _trained_into(out: Path, arguments: argparse.Namespace, config: Any) -> Result:
    started = time.monotonic()
    direction: Direction = "backward" if arguments.reverse else "forward"
    files = parse_files(arguments.data, arguments.source)
    heldout, left_out = _heldout(arguments)
    section = _section(config, arguments, files, heldout)
    compute = choose_compute(**config.compute)
    on_mesh = training_mesh(compute.mesh, width=1) is not None  # whatever the width
    base = load_model(config.base.model, config.base.template, config.seed, stored=on_mesh)
    say = timed_lines() if _leads() else _nothing
    metrics = MetricsLog(out)
    say(f"train: {config.base.model} is tuned into {out}")

    way = Tokenization(base, section, direction, arguments.skip_bad, arguments.limit)
    for line in preview_lines(
        base.tokenizer, way.first_rows(files[0], arguments.preview), sys.stdout.isatty()
    ):
        print(line)
    watched, unwatched = validation_examples(base, heldout, section, direction, arguments.skip_bad)
    left_out.update(unwatched)
    if heldout:
        say(f"held-out rows: {len(watched)} are measured, left out: {dict(left_out) or 'none'}")
    for file in files:
        say(f"{file.path}: its first row has the form {_first_form(file, arguments.skip_bad)}")
    tokens = Path(arguments.tokens) if arguments.tokens else out / "resume" / "tokens"
    examples, bad = token_store(files, way, tokens, say)
    sources = source_counts(examples.columns, parse_mixture(section.mixture))
    told = any(key.endswith(".batch_examples") for key in arguments.overrides)
    if not (arguments.config or told):
        draws = sum(counts["draws"] for counts in sources.values())
        section.batch_examples = min(section.batch_examples, draws)
    identity = run_identity(
        config.base.model, base, section, direction, config.seed, examples.hash, heldout
    )
    # Processes that trained on other rows would learn something else, or wait for each other.
    require_same({**identity, "settings": _shared_settings(config, section, heldout)})
    resume = ResumeFolder(out / "resume", section.keep_resume, identity)
    tags = _learnt_tags(sources, direction)

    def report(row: Result) -> None:
        if _leads():
            metrics.write("train", row)
        say(progress_line("train", row))

    def planned(plan: PackingPlan) -> None:
        require_same({"packing of its batches": repr(plan)})
        say(f"train: {plan.summary()}")

    with StopSignal() as stop:
        trained = tune(
            base,
            examples,
            section,
            compute,
            config.seed,
            tags=tags,
            validation=watched,
            resume=resume,
            on_metrics=report,
            on_epoch=lambda epoch, model: save_checkpoint(
                out / f"epoch_{epoch}", model, {"identity": identity, "epoch": epoch}
            ),
            on_plan=planned,
            stops=stop.reached,
            evidence=out,
            profile=Path(arguments.profile) if arguments.profile else None,
        )
        say(f"train: {goodput_line(trained.goodput)}")
        details = {"identity": identity, "bad_rows": bad, "dropped": dict(examples.dropped)}
        if heldout:
            details["heldout"] = {"examples": len(watched), "left_out": dict(left_out)}
        details["sources"] = sources
        details |= _outcome(trained, sources, out)
        save_checkpoint(out, tuned_model(base, out.name, trained, tags), details)
        resume.delete()
    if not arguments.tokens:
        shutil.rmtree(tokens, ignore_errors=True)
    say(f"saved {out}: {details}")
    return {"out": str(out), "seconds": round(time.monotonic() - started, 1), **details}


def _shared_settings(config: Any, section: Any, heldout: list[Example]) -> str:
    """What decides which programs run, and when, besides the run's identity."""
    settings = [section.to_dict(), config.compute.to_dict()]
    return json_hash([*settings, rows_hash(row_identity(example) for example in heldout)])


def _leads() -> bool:
    return jax.process_index() == 0


def _nothing(text: str) -> None:
    """What processes other than the first say."""


def _first_form(file: RowFile, skip_bad: bool) -> str:
    """What `text` or an unusual field turns a row into should be seen before it is trained on."""
    report = ReadReport()
    next(stream_examples(file.path, file.source, report, skip_bad))
    return next(iter(report.forms))


def _heldout(arguments: argparse.Namespace) -> tuple[list[Example], collections.Counter[str]]:
    """(held-out examples, unusable rows by reason)."""
    found: list[Example] = []
    bad: collections.Counter[str] = collections.Counter()
    for file in parse_files(arguments.heldout, arguments.source):
        examples, report = read_examples(file.path, file.source, arguments.skip_bad)
        found += examples
        bad.update(report.bad)
    return found, bad


def _section(
    config: Any, arguments: argparse.Namespace, files: list[RowFile], heldout: list[Example]
) -> Any:
    """The config's section of this direction.

    Raises:
      HumpbackError: a mixture of unknown sources, or nothing to measure every `eval_every` steps,
        or never a time to measure.
    """
    section = config.backward if arguments.reverse else config.train
    if section.eval_every and not heldout:
        raise HumpbackError(f"eval_every={section.eval_every} measures the rows of --heldout=FILE.")
    if heldout and not section.eval_every:
        raise HumpbackError(
            "--heldout=FILE is measured every so many steps: add --config.train.eval_every=N, or "
            "leave it out."
        )
    check_sources(parse_mixture(section.mixture), [file.source for file in files])
    return section


def _learnt_tags(sources: Iterable[str], direction: Direction) -> Tags:
    """What the model is to be prompted with: the tags of all that it was trained on."""
    learnt = [TAGS_BY_SOURCE[name] for name in sources if name in TAGS_BY_SOURCE]
    if direction == "backward" or not learnt:
        return "none"
    return "both" if len(learnt) == 2 else learnt[0]


def _outcome(trained: Trained, sources: dict[str, dict[str, Any]], out: Path) -> Result:
    # A run that was stopped and went on knows its first step from its log alone.
    logged = [row for row in logged_rows(out) if row["stage"] == "train"]
    losses = {row["step"]: row["loss"] for row in (*logged, *trained.history) if "loss" in row}
    return {
        "examples": sum(counts["examples"] for counts in sources.values()),
        "supervised_tokens": sum(counts["supervised_tokens"] for counts in sources.values()),
        "seen": trained.plan.seen,
        "packing_efficiency": round(trained.plan.efficiency, 4),
        "first_loss": losses.get(1),
        "last_loss": losses.get(trained.steps),
        "selected_step": trained.step,
        "goodput_s": {phase: round(took, 3) for phase, took in trained.goodput.items()},
    }


def _of_direction(overrides: dict[str, list[str]], reverse: bool) -> dict[str, list[str]]:
    """`--config.train.X` is this run's X in either direction, where X may stand under `backward`.

    Raises:
      HumpbackError: a setting of the backward direction, and no --reverse; or X in both sections.
    """
    found: dict[str, list[str]] = {}
    for key, values in overrides.items():
        section, _, field = key.partition(".")
        if section == "backward" and not reverse:
            raise HumpbackError(f"--config.{key} has no effect without --reverse.")
        own = f"backward.{field}" if reverse and section == "train" else key
        if own in found:
            raise HumpbackError(
                f"--config.train.{field} and --config.backward.{field} mean the same with "
                "--reverse; leave one of them out."
            )
        found[own] = values
    return found
