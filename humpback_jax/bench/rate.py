"""One curator of ours, in a process of its own: `python -m humpback_jax.bench.rate JOB CURATOR`."""

from __future__ import annotations

import collections
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from humpback_jax.bench.limits import matmul_rate, prefill_flops
from humpback_jax.bench.ours import timed_generation
from humpback_jax.bench.pairs import PairsJob
from humpback_jax.bench.process import Compilations, describe_machine, peak_bytes
from humpback_jax.compute import choose_compute, use_compilation_cache, use_cores
from humpback_jax.curators import PairText, Rating, Scored, rate
from humpback_jax.inference import Inference, Opening
from humpback_jax.models import load_model
from humpback_jax.sampling.likelihood import WIDTH, Query, programs, shared_tokens
from humpback_jax.sampling.prefix import Prefix
from humpback_jax.sampling.sampler import Decoding

Asked = list[tuple[Query, Prefix]]


class Witness(Inference):
    """Keeps what it is asked to score; `sharing` False computes every text from its first token."""

    sharing = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: Asked = []

    def log_probs(self, queries: Sequence[Query], opening: Opening | None = None) -> Any:
        opening = opening if self.sharing else None
        prefix = self.replicas.engines[0].prefix(self.shared_by(opening))
        self.asked += [(query, prefix) for query in queries]
        return super().log_probs(queries, opening)


def measure(job: PairsJob, curator: str) -> dict[str, Any]:
    """Seconds and counts of rating all pairs, after everything is compiled."""
    use_cores()
    use_compilation_cache()
    compilations = Compilations()
    before = peak_bytes()
    started = time.perf_counter()
    model = load_model(job.model)
    judge = Witness(model, choose_compute(job.precision, job.slots))
    decoding = Decoding(0.7, 0.9, 0, job.max_new_tokens)
    if curator == "rubric":
        # The longest prompts decide how long the slots are, and with it the programs.
        longest = sorted(job.pairs, key=lambda pair: len(pair.instruction + pair.response))[-2:]
        rate(curator, judge, longest, decoding, 0, Scored())
    else:
        rate(curator, judge, job.pairs, decoding, 0, Scored())
    ready = time.perf_counter() - started
    compiled = compilations.count
    judge.asked, scored = [], Scored()
    judge.replicas.forget_work()
    started = time.perf_counter()
    ratings = rate(curator, judge, job.pairs, decoding, 0, scored)
    seconds = time.perf_counter() - started
    asked, work = judge.asked, judge.replicas.work
    scoring = programs(model.config, judge.precision, judge.replicas.engines[0].mesh)
    figures: dict[str, Any] = {
        "seconds": seconds,
        "rows_per_s": len(job.pairs) / seconds,
        "rated": sum(rating.value is not None for rating in ratings),
        "ready_s": ready,
        "peak_bytes": peak_bytes() - before,
        "programs": judge.replicas.programs() + scoring,
        "compiled_while_timed": compilations.count - compiled,
        "environment": describe_machine(),
    }
    if curator == "rubric":
        figures |= _tokens(work.prompt_tokens, work.shared_tokens, work.new_tokens, 0, seconds)
        return figures
    shared = [shared_tokens(query, prefix) for query, prefix in asked]
    own = [len(query.tokens) - count for (query, _), count in zip(asked, shared, strict=True)]
    targets = [len(query.targets) for query, _ in asked]
    figures |= _tokens(sum(own), sum(shared), 0, sum(targets), seconds)
    # Of a rating prompt all tokens are asked about at one place.
    places = [len(set(query.after.tolist())) for query, _ in asked]
    flops = sum(
        prefill_flops(model.config, *counts) for counts in zip(shared, own, places, strict=True)
    )
    speed = matmul_rate(model.config, WIDTH, judge.precision.compute)
    figures["matmul_share"] = flops / seconds / speed
    figures["bare_prefill_seconds"] = _bare_prefill(judge, asked)
    if curator == "rubric_likelihood":
        figures["seconds_without_sharing"] = _without_sharing(judge, job, decoding)
    if curator == "pmi":
        figures["log_p_y"] = _computed_alone(judge, job, decoding, asked, ratings, scored)
    return figures


def _tokens(own: int, shared: int, new: int, scored: int, seconds: float) -> dict[str, Any]:
    return {
        "tokens_per_s": (own + shared + new) / seconds,
        "prompt_tokens": own + shared,
        "shared_tokens": shared,
        "unshared_tokens": own,
        "new_tokens": new,
        "scored_tokens": scored,
    }


def _bare_prefill(judge: Inference, asked: Asked) -> float:
    """Seconds that generation needs to read the same texts and draw one token after each."""
    prompts: dict[tuple[int, ...], list[list[int]]] = collections.defaultdict(list)
    for query, prefix in asked:
        prompts[prefix.tokens].append(query.tokens.tolist())
    total = 0.0
    for tokens, texts in prompts.items():
        timed_generation(judge.replicas, sorted(texts, key=len)[-2:], 1, tokens)
        total += timed_generation(judge.replicas, texts, 1, tokens)[0]
    return total


def _without_sharing(judge: Witness, job: PairsJob, decoding: Decoding) -> float:
    judge.sharing = False
    rate("rubric_likelihood", judge, job.pairs, decoding, 0, Scored())
    started = time.perf_counter()
    rate("rubric_likelihood", judge, job.pairs, decoding, 0, Scored())
    return time.perf_counter() - started


def _computed_alone(
    judge: Witness,
    job: PairsJob,
    decoding: Decoding,
    asked: Asked,
    ratings: Sequence[Rating],
    scored: Scored,
) -> dict[str, Any]:
    """Whether log p(y) is computed once a response, where two instructions compete for each."""
    judge.asked = []
    texts = [pair.instruction for pair in job.pairs]
    others = [
        PairText(f"{pair.id}/2", text, pair.response)
        for pair, text in zip(job.pairs, texts[1:] + texts[:1], strict=True)
    ]
    again = rate("pmi", judge, others, decoding, 0, scored)
    targets = sum(len(query.targets) for query, _ in asked + judge.asked)
    tokens = [json.loads(rating.detail)["tokens"] for rating in [*ratings, *again]]
    joint = sum(tokens)
    responses = dict(zip((pair.response for pair in [*job.pairs, *others]), tokens, strict=True))
    needed = sum(responses.values())
    return {
        "responses": len(responses),
        "pairs": len(ratings) + len(again),
        "tokens_needed": needed,
        "tokens_computed": targets - joint,
        "once": targets - joint == needed,
    }


if __name__ == "__main__":
    print(json.dumps(measure(PairsJob.load(Path(sys.argv[1])), sys.argv[2])))
