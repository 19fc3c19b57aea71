"""The verb `humpback evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from humpback_jax.artifacts import write_json
from humpback_jax.compute import choose_compute
from humpback_jax.errors import HumpbackError
from humpback_jax.evaluation.fidelity import fidelity
from humpback_jax.evaluation.nll import response_nll
from humpback_jax.evaluation.statistics import Estimate, token_mean
from humpback_jax.inference import Inference
from humpback_jax.models import load_model
from humpback_jax.records import Example
from humpback_jax.rows import read_examples
from humpback_jax.stages.sources import packaged_pairs
from humpback_jax.verbs.arguments import Result, adapted, chosen_compute, writable_folder


def evaluate(arguments: argparse.Namespace) -> Result:
    """Held-out figures of one model: see `SUITES`."""
    suites = arguments.suite or ["nll"]
    if unknown := sorted(set(suites) - set(SUITES)):
        raise HumpbackError(f"--suite={','.join(unknown)} is unknown; known: {', '.join(SUITES)}.")
    if arguments.data == "builtin":
        examples = packaged_pairs("heldout")
    else:
        examples, _ = read_examples(Path(arguments.data), "seed", arguments.skip_bad)
    model = load_model(arguments.model, arguments.template)
    arms = []
    for adapter in arguments.adapter or [None]:
        arm = adapted(model, adapter)
        tags: Any = arm.tags if arguments.tags == "model" else arguments.tags
        reader = Inference(arm, chosen_compute(arguments, 16))
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
        del reader
        gc.collect()  # its weights make room for the next arm's
    result: Result = arms[0] if len(arms) == 1 else {"arms": arms}
    if arguments.out:
        folder = Path(arguments.out)
        writable_folder(folder)
        write_json(folder / "results.json", result)
    return result


def _nll(reader: Inference, examples: Sequence[Example], tags: Any) -> dict[str, Estimate]:
    """NLL of the responses, in nats a token."""
    return {"nll_per_token": token_mean(*response_nll(reader, examples, tags))}


def _fidelity(reader: Inference, examples: Sequence[Example], tags: Any) -> dict[str, Estimate]:
    """How far the number formats asked for move what the model writes."""
    asked = reader.compute
    exact = choose_compute("float32", 16)
    exact = dataclasses.replace(exact, mesh=asked.mesh, memory=asked.memory)
    return fidelity(reader, Inference(reader.model, exact), examples, tags)


SUITES = {"nll": _nll, "fidelity": _fidelity}
