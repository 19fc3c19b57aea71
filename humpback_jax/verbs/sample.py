"""The verb `humpback sample`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from humpback_jax.answer import Job, answer_file, answer_prompts, usable_prompts
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import Inference
from humpback_jax.models import load_model
from humpback_jax.progress import timed_lines
from humpback_jax.rows import ReadReport, check_form, single_prompt, write_rows
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.verbs.arguments import Result, adapted, chosen_compute


def sample(arguments: argparse.Namespace) -> Result:
    """Answers each prompt; the rows come out with output, finish reason, log-probability."""
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
    model = adapted(load_model(arguments.model, arguments.template), arguments.adapter)
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
    reader = Inference(model, chosen_compute(arguments, slots))
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
            else list(usable_prompts(reader, Path(arguments.prompts), job, report, set()))
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
