"""The `humpback` program: one verb a task. Heavy imports happen inside the verbs."""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from humpback_jax.allocator import use_huge_pages
from humpback_jax.errors import HumpbackError, Preempted

# What shells make of a word that begins so, and not of --FLAG=~/FILE or --data=SOURCE=~/FILE.
HOME = re.compile(r"^(--(?!prompt=)[\w.-]+=(?:\w+=)?)~(?=/|$)")
Verb = Callable[[argparse.Namespace], dict[str, Any]]
# What the machine refuses, whatever the program does.
OF_THE_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code. Errors are one readable message on standard error."""
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    arguments, rest = parser.parse_known_args([HOME.sub(_at_home, word) for word in words])
    if argv is None:  # called as a program
        use_huge_pages()
    try:
        arguments.overrides = config_overrides(rest, arguments)
        _refuse_buckets(arguments)
        from humpback_jax.verbs import perform

        result = perform(arguments)
        if arguments.json:
            print(json.dumps(result, ensure_ascii=False))
        sys.stdout.flush()
    except HumpbackError as error:
        return _fail(f"error: {error}", arguments)
    except Preempted as stop:
        return _fail(f"stopped by SIGTERM: {stop}", arguments, 128 + signal.SIGTERM)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print
        cause = "stopped: nobody reads the standard output any more."
        return _fail(cause, arguments, 128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            return _defect(error, arguments)
        where = f"{error.filename}: " if error.filename else ""
        advice = "Make room or fix the permissions, then run the same command again."
        return _fail(f"error: {where}{error.strerror}. {advice}", arguments)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to continue.", arguments, 130)
    except Exception as error:
        return _defect(error, arguments)
    return int(result.get("ok", True) is False)


def _at_home(start: re.Match[str]) -> str:
    return f"{start[1]}{Path.home()}"


def _defect(error: Exception, arguments: argparse.Namespace) -> int:
    if "jax" in sys.modules:
        from humpback_jax.device_memory import lacks_memory

        if lacks_memory(error):
            cause = (str(error).strip() or "MemoryError").splitlines()[0]
            advice = "Compute less at a time, or take more devices, or such with more memory."
            return _fail(f"error: memory is exhausted ({cause}). {advice}", arguments)
    hint = "--debug shows where; this is a defect of humpback_jax, please report it."
    return _fail(f"unexpected error: {error!r} ({hint})", arguments)


def _fail(message: str, arguments: argparse.Namespace, code: int = 1) -> int:
    if arguments.debug:
        traceback.print_exc()
    sys.stdout.flush()
    print(message, file=sys.stderr)
    # Compilation threads may still run after an error; they must not delay or break the exit.
    sys.stderr.flush()
    if os.environ.get("HUMPBACK_IN_PROCESS") != "1" and "jax" in sys.modules:
        from humpback_jax.parallel.processes import leave_processes

        leave_processes()
        os._exit(code)
    return code


def _refuse_buckets(arguments: argparse.Namespace) -> None:
    """The name of a bucket would become a folder `gs:` on a machine that may soon be gone."""
    for name in ("out", "workdir", "tokens", "profile"):
        path = getattr(arguments, name, None)
        if path and "://" in path:
            raise HumpbackError(
                f"--{name}={path} is not on this machine. Results are written to its disks and to "
                "what is mounted there: mount the bucket, or copy the folder to it afterwards."
            )


def config_overrides(rest: Sequence[str], arguments: argparse.Namespace) -> dict[str, list[str]]:
    """`--config.a.b=v` and `--config.a.b v` -> {"a.b": ["v"]}; anything else is an error."""
    overrides: dict[str, list[str]] = {}
    items = list(rest)
    while items:
        item = items.pop(0)
        if not item.startswith("--config.") or not hasattr(arguments, "config"):
            raise HumpbackError(
                f"unknown argument {item!r}; `humpback {arguments.verb} --help` lists those that "
                "are known."
            )
        name, equals, value = item.removeprefix("--config.").partition("=")
        if not equals:
            if not items:
                raise HumpbackError(f"--config.{name} needs a value.")
            value = items.pop(0)
        overrides.setdefault(name, []).append(value)
    return overrides


def build_parser() -> argparse.ArgumentParser:
    """The verbs and their flags; `--config.KEY=VALUE` overrides are read apart."""
    parser = argparse.ArgumentParser(
        prog="humpback",
        description="Self-alignment with instruction backtranslation, in JAX.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, help_text: str, config: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        sub.set_defaults(function=name.replace("import", "import_model"))
        _common_flags(sub)
        if config:
            sub.add_argument(
                "--config",
                default=None,
                help="configs/FILE.py[:arg,...]; override with --config.a.b=value",
            )
        return sub

    run = verb("run", "the whole loop: augment, curate, train, evaluate, report", config=True)
    run.add_argument("--workdir", required=True, help="run folder; a finished part is not redone")
    run.add_argument("--fresh", action="store_true", help="ignore earlier artifacts; delete none")
    run.add_argument("--dry-run", action="store_true", help="plan and estimate only")
    run.add_argument("--limit", type=int, help="use at most N documents")
    run.add_argument("--profile", metavar="DIR", help="trace a few steps of each training")

    train = verb("train", "one SFT run on a file of pairs", config=True)
    train.add_argument(
        "--model", help="instead of the config's, which is smollm2-135m-instruct without --config"
    )
    train.add_argument(
        "--data", action="append", required=True, help="FILE or SOURCE=FILE; may be repeated"
    )
    train.add_argument("--out", required=True)
    train.add_argument(
        "--mix",
        action="append",
        default=[],
        help="SOURCE:FIELD=VALUE[:...]; fields: weight (in the loss), cap, repeat, count (draws)",
    )
    train.add_argument("--tokens", help="folder that keeps the tokenised rows for other runs")
    train.add_argument("--limit", type=int, default=0, help="use at most N rows of each file")
    train.add_argument("--source", default="seed", help="source of the rows; decides their tags")
    train.add_argument("--reverse", action="store_true", help="train M_yx: response to instruction")
    train.add_argument("--skip-bad", action="store_true", help="count unreadable rows, go on")
    train.add_argument(
        "--heldout",
        action="append",
        default=[],
        help="FILE or SOURCE=FILE of pairs whose loss is measured every train.eval_every steps; "
        "may be repeated",
    )
    train.add_argument("--profile", metavar="DIR", help="trace a few steps for xprof, perfetto")
    train.add_argument("--preview", type=int, default=2, help="show the first N training rows")

    sample = verb("sample", "batched generation")
    sample.add_argument("--model", default="smollm2-135m-instruct")
    _add_adapter(sample)
    _add_template(sample)
    sample.add_argument("--prompts", help="rows with prompt, instruction or messages")
    sample.add_argument("--prompt", help="one prompt")
    sample.add_argument("--out", help="where to write the rows; without it they are printed")
    sample.add_argument("--format", choices=("jsonl", "parquet"), default=None)
    sample.add_argument("--temperature", type=float, default=0.7)
    sample.add_argument("--top-p", type=float, default=0.9)
    sample.add_argument("--top-k", type=int, default=0)
    sample.add_argument("--min-p", type=float, default=0.0)
    sample.add_argument("--repetition-penalty", type=float, default=1.0)
    sample.add_argument("--stop", action="append", default=[], help="a text that ends the answer")
    _add_list(sample, "--stop-id", "a token that ends the answer", int)
    sample.add_argument("--logprobs", action="store_true", help="write each new token's")
    sample.add_argument("--prompt-logprobs", action="store_true", help="write the prompt tokens'")
    sample.add_argument("--max-tokens", type=int, default=256)
    sample.add_argument("--n", type=_count, default=1, help="draws per prompt")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--tags", choices=("none", "S_a", "S_w", "both", "model"), default="model")
    sample.add_argument("--reverse", action="store_true", help="prompts are responses, for M_yx")
    sample.add_argument("--skip-bad", action="store_true")
    sample.add_argument("--batch-size", type=_count, default=32, help="rows decoded together")
    _add_compute(sample)

    score = verb("score", "rate a file of pairs")
    score.add_argument("--model", default="smollm2-135m-instruct")
    _add_adapter(score)
    _add_template(score)
    score.add_argument("--data", required=True)
    score.add_argument(
        "--curator",
        default="rubric_likelihood",
        help="rubric, rubric_likelihood, pmi, pmi_frozen or combined: docs/by_hand.md",
    )
    score.add_argument("--out", required=True)
    score.add_argument("--format", choices=("jsonl", "parquet"), default=None)
    score.add_argument("--max-tokens", type=int, default=256, help="of the reasoned rubric")
    score.add_argument("--seed", type=int, default=0)
    score.add_argument("--skip-bad", action="store_true")
    score.add_argument("--batch-size", type=_count, default=16)
    _add_compute(score)

    evaluate = verb("evaluate", "score a model on held-out data")
    evaluate.add_argument("--model", default="smollm2-135m-instruct")
    _add_list(evaluate, "--adapter", "as for sample; several: each in turn on the one base")
    _add_template(evaluate)
    _add_list(evaluate, "--suite", "nll (the default), fidelity (to float32)")
    evaluate.add_argument("--data", default="builtin", help="pairs; builtin: the packaged ones")
    evaluate.add_argument(
        "--tags", choices=("none", "S_a", "S_w", "both", "model"), default="model"
    )
    evaluate.add_argument("--out", help="folder for results.json")
    evaluate.add_argument("--skip-bad", action="store_true")
    _add_compute(evaluate)

    _bench_verbs(verb("bench", "measure speed: ours, and others' on the same work"))

    ahead = verb("aot", "compile for a TPU slice, without having one", config=True)
    ahead.add_argument("--topology", help="KIND:SHAPE, e.g. v5e:2x4 or v5p:2x2x1")
    ahead.add_argument("--model", default=None, help="instead of a config's; random:SHAPE is known")
    _add_list(ahead, "--programs", "some of train, prefill, decode; all by default")
    ahead.add_argument(
        "--rows",
        type=int,
        help="of a device and micro-batch; else the most that a batch of the config can need",
    )
    ahead.add_argument("--lora", type=int, help="rank of an adapter; 0: full tuning")
    ahead.add_argument(
        "--suggest",
        action="store_true",
        help="search mesh, rows and remat to train fastest",
    )
    ahead.add_argument("--table", help="JSON file of the docs' table: compute the rows it lacks")
    ahead.add_argument("--only", default="", help="of --table: rows whose name holds this text")
    ahead.add_argument("--out", help="where to write the results as JSON")

    export = verb("export", "write a model for other programs")
    export.add_argument("--model", required=True)
    _add_adapter(export)
    export.add_argument(
        "--format",
        choices=("hf", "peft", "gguf"),
        default="hf",
        help="peft: the adapter alone; gguf: one file, as llama.cpp loads",
    )
    export.add_argument("--base", help="what a PEFT folder is to call its base model")
    export.add_argument("--out", required=True, help="a folder, or a file NAME.gguf")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None)

    bring = verb("import", "turn a model into one of our checkpoints")
    bring.add_argument("--from", dest="source", required=True)
    bring.add_argument("--base", help="the model under a PEFT adapter; else what its config names")
    bring.add_argument("--out", required=True)

    fetch = verb("fetch", "bring a named model into the cache, checksum verified")
    fetch.add_argument("name")

    for name, help_text in (
        ("report", "write the HTML and Markdown report of a run"),
        ("verify", "recompute the hashes of a run and a slice of its work"),
    ):
        sub = verb(name, help_text)
        sub.add_argument("--workdir", required=True)
        if name == "report":
            sub.add_argument("--readme", help="also write the results between a README's marks")
    trace = verb("trace", "lineage of a row, model or train step, both ways")
    trace.add_argument(
        "id",
        help="of a pair, segment, document, seed or held-out example, alone or as KIND:ID "
        "(heldout:7); a model; or MODEL:STEP",
    )
    trace.add_argument("--workdir", required=True)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _add_list(
    verb: argparse.ArgumentParser, flag: str, help_text: str, of: Callable[[str], Any] = str
) -> None:
    """A flag whose values are separated by commas, or given by repeating it."""

    def values(text: str) -> list[Any]:
        return [of(part) for part in text.split(",") if part]

    verb.add_argument(flag, action="extend", type=values, default=[], help=help_text)


def _add_adapter(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--adapter",
        help="a PEFT folder or a checkpoint with one, in place of the model's own; none: without",
    )


def _add_template(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--template",
        choices=("auto", "chat", "plain"),
        default="auto",
        help="of prompts: chat is the model's own, plain ours; auto: chat where it has one",
    )


def _add_compute(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--precision", default="auto", help="auto, float32 or bfloat16 products")
    verb.add_argument("--weights", default="auto", help="int8: one byte a weight")
    verb.add_argument(
        "--kv",
        default="auto",
        help="int8: cached keys and values of one byte; for generation alone",
    )
    verb.add_argument("--mesh", default="auto", help="auto, or e.g. data=2,tensor=4")
    verb.add_argument("--drafts", default="auto", help="tokens guessed in each step: auto, or N")
    verb.add_argument("--memory-gb", type=float, default=0.0, help="of each device; 0: what it has")


def _common_flags(parser: argparse.ArgumentParser, default: Any = False) -> None:
    flag = functools.partial(parser.add_argument, action="store_true", default=default)
    flag("--json", help="print the result as a last line")
    flag("--debug", help="show tracebacks")


def _bench_verbs(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(dest="what", required=True, metavar="WHAT")

    def kind(name: str, help_text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        _common_flags(sub, argparse.SUPPRESS)  # the verb itself has a default
        sub.add_argument("--model", default="smollm2-135m-instruct")
        sub.add_argument("--rounds", type=int, default=1, help="measurements; the best one counts")
        sub.add_argument("--out", help="where to write the results as JSON")
        return sub

    sample = kind("sample", "greedy instructions for real segments")
    sample.add_argument("--data", default="pydoc_topics", help="documents to take segments from")
    sample.add_argument("--case", default="mixed", help="mixed, single (row), short, long, or all")
    sample.add_argument("--rows", type=int, default=64)
    sample.add_argument("--shortest", type=int, default=60, help="tokens of a segment, at least")
    sample.add_argument("--longest", type=int, default=500, help="tokens of a segment, at most")
    sample.add_argument("--max-tokens", type=int, default=64)
    sample.add_argument("--precision", choices=("float32", "bfloat16", "best"), default="float32")
    sample.add_argument("--batch-size", type=int, default=32)
    sample.add_argument("--drafts", default="auto", help="tokens guessed in each step: auto, or N")
    sample.add_argument(
        "--mesh", default="auto", help="auto, or e.g. data=1: one copy of the model"
    )
    _add_list(sample, "--vs", "hf (transformers), llamacpp")

    score = kind("score", "what each curator costs on real pairs")
    score.add_argument("--data", default="builtin", help="pairs; builtin: the packaged ones")
    score.add_argument("--rows", type=int, default=64)
    score.add_argument("--max-tokens", type=int, default=256, help="of the reasoned rubric")
    score.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    score.add_argument("--batch-size", type=int, default=32)

    train = kind("train", "SFT on real rows, the responses supervised")
    train.add_argument("--data", default="builtin", help="rows; builtin: the packaged pairs")
    train.add_argument("--rows", type=int, default=64, help="of the data, to draw batches from")
    train.add_argument("--steps", type=int, default=6, help="batches; the first is not timed")
    train.add_argument("--batch-size", type=int, default=8, help="rows of a batch")
    train.add_argument("--row-tokens", type=int, default=2048, help="of the longest row")
    train.add_argument("--lora", type=int, default=0, help="rank of an adapter; 0: full tuning")
    train.add_argument(
        "--optimizer", default="adamw", choices=("adamw", "adamw_bf16", "adafactor", "lion")
    )
    _add_list(train, "--lora-targets", "of --lora: projections, e.g. q,v; all by default")
    train.add_argument(
        "--remat", choices=("none", "named", "full"), default="none", help="what we keep of a layer"
    )
    train.add_argument("--precision", choices=("float32", "bfloat16", "best"), default="float32")
    _add_list(train, "--vs", "trl, trl_default, torch")
