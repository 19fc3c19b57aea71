"""The verb `humpback score`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from humpback_jax.curators import check_curator
from humpback_jax.inference import Inference
from humpback_jax.models import load_model
from humpback_jax.progress import timed_lines
from humpback_jax.rate_file import rate_file
from humpback_jax.rows import check_form
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.verbs.arguments import Result, adapted, chosen_compute


def score(arguments: argparse.Namespace) -> Result:
    """Rates each pair of a file."""
    check_curator(arguments.curator, 1)
    out = Path(arguments.out)
    check_form(out, arguments.format)
    model = adapted(load_model(arguments.model, arguments.template), arguments.adapter)
    reader = Inference(model, chosen_compute(arguments, arguments.batch_size))
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
    if report.bad:
        print(f"skipped rows: {report.bad}", file=sys.stderr)
    return {
        "rows": report.rows,
        "rated": rated,
        "bad_rows": report.bad,
        "seconds": round(time.monotonic() - started, 2),
        "out": arguments.out,
    }
