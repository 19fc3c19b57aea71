"""The verb `humpback bench`: measures, prints a table, writes the results file."""

from __future__ import annotations

import argparse
from pathlib import Path

from humpback_jax.artifacts import write_json
from humpback_jax.bench import table
from humpback_jax.bench.comparison import Comparison
from humpback_jax.bench.pairs import PairsJob, read_pairs
from humpback_jax.bench.sample import bench_sample
from humpback_jax.bench.score import bench_score
from humpback_jax.bench.train import bench_train
from humpback_jax.bench.training_job import TrainingWorkload
from humpback_jax.bench.workload import Case, choose_cases
from humpback_jax.errors import HumpbackError
from humpback_jax.model.lora import PROJECTIONS
from humpback_jax.progress import timed_lines
from humpback_jax.verbs.arguments import Result


def bench(arguments: argparse.Namespace) -> Result:
    """Measures generation, scoring or training; prints a table and writes the results file."""
    for name in ("rows", "max_tokens", "rounds", "batch_size", "steps", "row_tokens"):
        count = getattr(arguments, name, 1)
        if count < 1:
            raise HumpbackError(f"--{name.replace('_', '-')}={count} has to be 1 or more.")
    measure, lines = {
        "sample": (_bench_sample, table.sample_lines),
        "score": (_bench_score, table.score_lines),
        "train": (_bench_train, table.train_lines),
    }[arguments.what]
    result = measure(arguments)
    print("\n".join(lines(result)))
    if arguments.out:
        write_json(Path(arguments.out), result)
    return result


def _bench_sample(arguments: argparse.Namespace) -> Result:
    mixed = Case(
        "mixed",
        arguments.rows,
        arguments.shortest,
        arguments.longest,
        arguments.batch_size,
        arguments.drafts,
        arguments.mesh,
    )
    return bench_sample(
        arguments.model,
        arguments.data,
        choose_cases(arguments.case, mixed),
        arguments.max_tokens,
        _comparison(arguments),
        timed_lines(),
    )


def _bench_score(arguments: argparse.Namespace) -> Result:
    job = PairsJob(
        arguments.model,
        Path(arguments.data).name,
        arguments.precision,
        arguments.batch_size,
        arguments.max_tokens,
        read_pairs(arguments.data, arguments.rows),
    )
    return bench_score(job, arguments.rounds, timed_lines())


def _bench_train(arguments: argparse.Namespace) -> Result:
    workload = TrainingWorkload(
        arguments.model,
        arguments.data,
        arguments.rows,
        arguments.steps,
        arguments.batch_size,
        arguments.row_tokens,
        arguments.lora,
        arguments.remat,
        lora_targets=tuple(arguments.lora_targets) or PROJECTIONS,
        optimizer=arguments.optimizer,
    )
    return bench_train(workload, _comparison(arguments), timed_lines())


def _comparison(arguments: argparse.Namespace) -> Comparison:
    return Comparison(arguments.precision, tuple(arguments.vs), arguments.rounds)
