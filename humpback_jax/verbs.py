"""What each verb of the command line does; every function returns what `--json` prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from humpback_jax.bench.verb import bench as bench
from humpback_jax.compute import Compute, choose_compute, use_compilation_cache, use_cores
from humpback_jax.config import check_config, default_config, load_config, set_field
from humpback_jax.errors import HumpbackError
from humpback_jax.models import load_model, save_checkpoint
from humpback_jax.progress import timed_lines

if TYPE_CHECKING:
    from humpback_jax.evaluation.statistics import Estimate
    from humpback_jax.inference import Inference
    from humpback_jax.models import LanguageModel
    from humpback_jax.records import Example

Result = dict[str, Any]


def start(arguments: argparse.Namespace) -> None:
    """Common to all verbs that compute.

    Raises:
      HumpbackError: the processes of a job do not find each other, or the verb takes only one.
    """
    if arguments.verb in ("fetch", "trace", "report"):
        return
    from humpback_jax.parallel.processes import join_processes

    use_cores()
    use_compilation_cache()
    in_many = arguments.verb in ("score", "train")
    in_many |= arguments.verb == "sample" and bool(arguments.out)
    if join_processes() > 1 and not in_many:
        raise HumpbackError(
            f"{arguments.verb} runs in one process; train, score, and sample with --prompts and "
            "--out, run in several."
        )


def run(arguments: argparse.Namespace) -> Result:
    """The whole loop for a config, then its report."""
    if not arguments.config:
        raise HumpbackError("run needs --config=configs/FILE.py; configs/ holds the experiments.")
    config = load_config(arguments.config, arguments.overrides)
    from humpback_jax import loop
    from humpback_jax.plan import dry_run
    from humpback_jax.report.build import build_report
    from humpback_jax.report.tables import result_lines

    if arguments.limit:
        with config.unlocked():
            config.corpus.limit = arguments.limit
    workdir = Path(arguments.workdir)
    say = timed_lines()
    if arguments.dry_run:
        return dry_run(config, say)
    profile = Path(arguments.profile) if arguments.profile else None
    summary = loop.run(config, workdir, fresh=arguments.fresh, say=say, profile=profile)
    build_report(workdir)
    print()
    for line in result_lines(workdir):
        print(line)
    print(f"\nreport: {workdir / 'report' / 'index.html'}")
    return summary


def train(arguments: argparse.Namespace) -> Result:
    """SFT on files of rows; writes one of our checkpoints."""
    import jax

    from humpback_jax.checkpoint import ResumeFolder
    from humpback_jax.metrics import MetricsLog
    from humpback_jax.parallel.mesh import training_mesh
    from humpback_jax.parallel.preemption import StopSignal
    from humpback_jax.rows import read_examples
    from humpback_jax.stages.tokens import Tokenization, parse_files, token_store
    from humpback_jax.stages.train import (
        TAGS_BY_SOURCE,
        Direction,
        run_identity,
        tune,
        tuned_model,
    )
    from humpback_jax.text.preview import preview_lines
    from humpback_jax.text.template import Tags
    from humpback_jax.training.goodput import goodput_line
    from humpback_jax.training.mixture import check_sources, parse_mixture, source_counts

    config = _config(arguments)
    out = Path(arguments.out)
    _writable_folder(out)
    files = parse_files(arguments.data, arguments.source)
    heldout: list[Example] = []
    if arguments.heldout:
        heldout, _ = read_examples(Path(arguments.heldout), "seed", arguments.skip_bad)
    section = config.backward if arguments.reverse else config.train
    if arguments.mix:
        section.mixture = tuple(part for text in arguments.mix for part in text.split(","))
    mixture = parse_mixture(section.mixture)
    check_sources(mixture, [file.source for file in files])
    if not arguments.config and not any(k.endswith(".on_long") for k in arguments.overrides):
        section.on_long = "error"
    compute = choose_compute(**config.compute)
    on_mesh = training_mesh(compute.mesh) is not None
    base = load_model(arguments.model, config.base.template, config.seed, stored=on_mesh)
    direction: Direction = "backward" if arguments.reverse else "forward"
    leads = jax.process_index() == 0
    started, clocked, metrics = time.monotonic(), timed_lines(), MetricsLog(out)

    def say(text: str) -> None:
        if leads:
            clocked(text)

    way = Tokenization(base, section, direction, arguments.skip_bad, arguments.limit)
    first = way.first_rows(files[0], arguments.preview)
    for line in preview_lines(base.tokenizer, first, sys.stdout.isatty()):
        print(line)
    tokens = Path(arguments.tokens) if arguments.tokens else out / "resume" / "tokens"
    examples, bad = token_store(files, way, tokens, say)
    sources = source_counts(examples.columns, mixture)
    if not arguments.config:
        draws = sum(counts["draws"] for counts in sources.values())
        _fit_to_file(section, draws, arguments.overrides)
    resume = ResumeFolder(
        out / "resume",
        section.keep_resume,
        run_identity(
            arguments.model, base, section, direction, config.seed, examples.hash, heldout
        ),
    )

    def report_row(row: Result) -> None:
        if not leads:
            return
        metrics.write("train", row)
        if "validation_nll" in row:
            say(f"train: step {row['step']}, validation NLL {row['validation_nll']:.4f}")
        else:
            mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
            say(
                f"train: step {row['step']}, loss {row['loss']:.4f}, "
                f"{row['supervised_tokens_per_s']:.0f} supervised tokens/s{mfu}"
            )

    with StopSignal() as stop:
        trained = tune(
            base,
            examples,
            section,
            direction,
            compute,
            config.seed,
            validation=heldout,
            resume=resume,
            on_metrics=report_row,
            on_epoch=lambda epoch, model: save_checkpoint(out / f"epoch_{epoch}", model, {}),
            on_plan=lambda plan: say(f"train: {plan.summary()}"),
            stops=stop.reached,
            evidence=out,
            profile=Path(arguments.profile) if arguments.profile else None,
        )
        say(f"train: {goodput_line(trained.goodput)}")
        learnt = [TAGS_BY_SOURCE[name] for name in sources if name in TAGS_BY_SOURCE]
        tags: Tags = "both" if len(learnt) == 2 else learnt[0] if learnt else "none"
        tags = "none" if arguments.reverse else tags
        model = tuned_model(base, out.name, trained, tags)
        losses = [row["loss"] for row in trained.history if "loss" in row]
        details = {
            "examples": sum(counts["examples"] for counts in sources.values()),
            "dropped": dict(examples.dropped),
            "bad_rows": bad,
            "supervised_tokens": sum(counts["supervised_tokens"] for counts in sources.values()),
            "sources": sources,
            "packing_efficiency": round(trained.plan.efficiency, 4),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "selected_step": trained.step,
            "goodput_s": {phase: round(took, 3) for phase, took in trained.goodput.items()},
        }
        save_checkpoint(out, model, details)
        resume.delete()
    if not arguments.tokens:
        shutil.rmtree(tokens, ignore_errors=True)
    say(f"saved {out}: {details}")
    return {"out": str(out), "seconds": round(time.monotonic() - started, 1), **details}


def sample(arguments: argparse.Namespace) -> Result:
    """Answers each prompt; the rows come out with output, finish reason, log-probability."""
    from humpback_jax.answer import Job, answer_file, answer_prompts
    from humpback_jax.inference import Inference
    from humpback_jax.rows import ReadReport, check_form, single_prompt, stream_prompts, write_rows
    from humpback_jax.sampling.sampler import Decoding

    if (arguments.prompts is None) == (arguments.prompt is None):
        raise HumpbackError("sample needs either --prompts FILE or --prompt TEXT.")
    out = Path(arguments.out) if arguments.out else None
    if out:
        check_form(out, arguments.format)
    decoding = Decoding(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_new_tokens=arguments.max_tokens,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        stop_ids=tuple(arguments.stop_id),
        stop_strings=tuple(arguments.stop),
    )
    started = time.monotonic()
    model = _adapted(load_model(arguments.model), arguments.adapter)
    job = Job(
        decoding,
        arguments.seed,
        model.tags if arguments.tags == "model" else arguments.tags,
        arguments.reverse,
        arguments.n,
        arguments.logprobs,
        arguments.prompt_logprobs,
        arguments.skip_bad,
    )
    one = arguments.prompt is not None and arguments.n == 1
    slots = 1 if one else arguments.batch_size
    reader = Inference(model, _compute(arguments, slots))
    report = ReadReport()
    if arguments.prompts and out:
        say = timed_lines()
        count, report = answer_file(
            reader, Path(arguments.prompts), out, arguments.format, job, say
        )
    else:
        prompts = (
            [single_prompt(arguments.prompt)]
            if arguments.prompt is not None
            else list(stream_prompts(Path(arguments.prompts), report, arguments.skip_bad))
        )
        rows = answer_prompts(reader, prompts, job)
        count = len(rows)
        if out:
            write_rows(out, rows, arguments.format)
        else:
            for row in rows:
                print(row["output"])
    if report.bad:
        print(f"skipped rows: {report.bad}", file=sys.stderr)
    return {
        "rows": count,
        "bad_rows": report.bad,
        "seconds": round(time.monotonic() - started, 2),
        "occupancy": round(reader.replicas.work.occupancy, 4),
        "out": arguments.out,
    }


def score(arguments: argparse.Namespace) -> Result:
    """Rates each pair of a file."""
    from humpback_jax.curators import check_curator
    from humpback_jax.inference import Inference
    from humpback_jax.rate_file import rate_file
    from humpback_jax.rows import check_form
    from humpback_jax.sampling.sampler import Decoding

    check_curator(arguments.curator, 1)
    out = Path(arguments.out)
    check_form(out, arguments.format)
    model = _adapted(load_model(arguments.model), arguments.adapter)
    reader = Inference(model, _compute(arguments, arguments.batch_size))
    started = time.monotonic()
    rated, report = rate_file(
        reader,
        Path(arguments.data),
        out,
        arguments.format,
        arguments.curator,
        Decoding(0.7, 0.9, 0, arguments.max_tokens),
        arguments.seed,
        arguments.skip_bad,
        timed_lines(),
    )
    return {
        "rows": report.rows,
        "rated": rated,
        "bad_rows": report.bad,
        "seconds": round(time.monotonic() - started, 2),
        "out": arguments.out,
    }


def evaluate(arguments: argparse.Namespace) -> Result:
    """Held-out figures of one model: see `SUITES`."""
    from humpback_jax.artifacts import write_json
    from humpback_jax.inference import Inference
    from humpback_jax.rows import read_examples
    from humpback_jax.stages.sources import packaged_pairs

    suites = [name for name in arguments.suite.split(",") if name]
    unknown = sorted(set(suites) - set(SUITES))
    if unknown or not suites:
        raise HumpbackError(
            f"--suite={arguments.suite}: {unknown} is unknown; known: {', '.join(SUITES)}."
        )
    if arguments.data == "builtin":
        examples = packaged_pairs("heldout")
    else:
        examples, _ = read_examples(Path(arguments.data), "seed", arguments.skip_bad)
    model = load_model(arguments.model)
    arms = []
    for adapter in arguments.adapter or [None]:
        arm = _adapted(model, adapter)
        tags: Any = arm.tags if arguments.tags == "model" else arguments.tags
        reader = Inference(arm, _compute(arguments, 16))
        found = {suite: SUITES[suite](reader, examples, tags) for suite in suites}
        print(f"{'suite':<10}{'metric':<16}{'value':>10}{'stderr':>10}{'n':>7}  {adapter or ''}")
        for suite, metrics in found.items():
            for metric, e in metrics.items():
                print(f"{suite:<10}{metric:<16}{e.value:>10.5f}{e.stderr:>10.5f}{e.n:>7}")
        results = {
            suite: {metric: estimate.record() for metric, estimate in metrics.items()}
            for suite, metrics in found.items()
        }
        arms.append(
            {
                "results": results,
                "model": arguments.model,
                "adapter": adapter,
                "tags": tags,
                "formats": reader.compute.sampling_formats,
            }
        )
    result: Result = arms[0] if len(arms) == 1 else {"arms": arms}
    if arguments.out:
        folder = Path(arguments.out)
        _writable_folder(folder)
        write_json(folder / "results.json", result)
    return result


def _nll(reader: Inference, examples: Sequence[Example], tags: Any) -> dict[str, Estimate]:
    """NLL of the responses, in nats a token."""
    from humpback_jax.evaluation.nll import response_nll
    from humpback_jax.evaluation.statistics import token_mean

    return {"nll_per_token": token_mean(*response_nll(reader, examples, tags))}


def _fidelity(reader: Inference, examples: Sequence[Example], tags: Any) -> dict[str, Estimate]:
    """How far the number formats asked for move what the model writes."""
    from humpback_jax.evaluation.fidelity import fidelity
    from humpback_jax.inference import Inference

    exact = Inference(reader.model, choose_compute("float32", 16))
    return fidelity(reader, exact, examples, tags)


SUITES = {"nll": _nll, "fidelity": _fidelity}


def aot(arguments: argparse.Namespace) -> Result:
    """Compiles a config's programs for a TPU slice; prints what they need there."""
    from humpback_jax.aot.programs import compile_for
    from humpback_jax.aot.suggest import suggest_for
    from humpback_jax.aot.summary import summary_lines
    from humpback_jax.aot.table import fill_table
    from humpback_jax.artifacts import write_json

    if arguments.table:
        return fill_table(Path(arguments.table), arguments.only, timed_lines())
    if not arguments.topology:
        raise HumpbackError("aot needs --topology=KIND:SHAPE, e.g. v5p:2x2x1, or --table=FILE.")
    config = _config(arguments)
    if arguments.lora is not None:
        set_field(config, "train.lora.rank", [str(arguments.lora)])
    if arguments.suggest:
        result = suggest_for(config, arguments.model, arguments.topology, timed_lines())
    else:
        names = arguments.programs.split(",")
        result = compile_for(config, arguments.model, arguments.topology, arguments.rows, names)
    for line in summary_lines(result):
        print(line)
    if arguments.out:
        write_json(Path(arguments.out), result)
    return result


def export(arguments: argparse.Namespace) -> Result:
    """A model, or its adapter alone, as a folder that `transformers` or `peft` loads."""
    from humpback_jax.models import export_hf, export_peft

    if arguments.base and arguments.format != "peft":
        raise HumpbackError("--base names the base model of --format=peft.")
    model = _adapted(load_model(arguments.model), arguments.adapter)
    out = Path(arguments.out)
    _writable_folder(out)
    if arguments.format == "peft":
        export_peft(out, model, arguments.base, arguments.dtype)
    else:
        export_hf(out, model, arguments.dtype)
    print(f"exported {arguments.model} to {out}")
    return {"out": str(out), "format": arguments.format, "hash": model.hash}


def import_model(arguments: argparse.Namespace) -> Result:
    """Any model that we can name, or a PEFT adapter on its base, as one of our checkpoints."""
    if arguments.base:
        model = _adapted(load_model(arguments.base), arguments.source)
    else:
        model = load_model(arguments.source)
    out = Path(arguments.out)
    _writable_folder(out)
    save_checkpoint(out, dataclasses.replace(model, name=out.name), {"source": arguments.source})
    print(f"imported {arguments.source} to {out}")
    return {"out": str(out), "hash": model.hash}


def fetch(arguments: argparse.Namespace) -> Result:
    """Brings a model into the cache."""
    from humpback_jax.weights.named import resolve

    found = resolve(arguments.name)
    print(f"{arguments.name}: {found.kind} at {found.path}")
    return {"name": arguments.name, "kind": found.kind, "path": str(found.path)}


def report(arguments: argparse.Namespace) -> Result:
    """Rewrites the report of a run from its artifacts."""
    from humpback_jax.report.build import build_report

    path = build_report(_run_folder(arguments))
    print(f"report: {path}")
    if arguments.readme:
        from humpback_jax.report.readme import write_results

        write_results(Path(arguments.readme), Path(arguments.workdir))
    return {"report": str(path)}


def verify(arguments: argparse.Namespace) -> Result:
    """Recomputes hashes and a slice; `ok` is False and the exit code 1 when anything differs."""
    from humpback_jax.verification import verify_run

    result = verify_run(_run_folder(arguments), timed_lines())
    print("everything agrees" if result["ok"] else "differs: " + "; ".join(result["differs"]))
    return result


def trace(arguments: argparse.Namespace) -> Result:
    """Prints the lineage of one id."""
    from humpback_jax.lineage import trace_id

    result = trace_id(_run_folder(arguments), arguments.id)
    if not arguments.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return result


def _config(arguments: argparse.Namespace) -> Any:
    """The config of `train` and `aot`: a file's, or the defaults; overrides apply to both."""
    if arguments.config:
        return load_config(arguments.config, arguments.overrides)
    config = default_config()
    for key, values in arguments.overrides.items():
        set_field(config, key, values)
    check_config(config)
    return config


def _adapted(model: LanguageModel, adapter: str | None) -> LanguageModel:
    """The model as it is, with the named adapter in place of its own, or ("none") without any."""
    from humpback_jax.adapters import load_adapter, with_adapter

    if adapter is None:
        return model
    return with_adapter(model, None if adapter == "none" else load_adapter(adapter, model))


def _compute(arguments: argparse.Namespace, rows: int) -> Compute:
    """The number formats asked for, and engine shapes for so many rows decoded together."""
    names = ("precision", "weights", "kv", "mesh", "memory_gb", "drafts")
    return choose_compute(batch_size=rows, **{name: getattr(arguments, name) for name in names})


def _fit_to_file(section: Any, count: int, overrides: dict[str, list[str]]) -> None:
    """What `train` does unless told otherwise: one epoch, small batches."""
    given = {key.rsplit(".", 1)[-1] for key in overrides}
    if not given & {"steps", "epochs"}:
        section.epochs = 1.0
    if "batch_examples" not in given:
        section.batch_examples = min(8, count)


def _run_folder(arguments: argparse.Namespace) -> Path:
    folder = Path(arguments.workdir)
    if not (folder / "manifest.json").is_file():
        raise HumpbackError(f"--workdir={folder}: no run stands there (manifest.json is missing).")
    return folder


def _writable_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").touch()
        (folder / ".probe").unlink()
    except OSError as error:
        raise HumpbackError(f"{folder} cannot be written ({error.strerror}).") from error
