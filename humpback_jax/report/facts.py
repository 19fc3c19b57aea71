"""The figures of a run, computed from its artifacts; every part of the report reads these."""

from __future__ import annotations

import dataclasses
import functools
import json
from itertools import combinations
from typing import Any, Literal

import numpy as np

from humpback_jax.artifacts import Row
from humpback_jax.evaluation.statistics import mid_ranks
from humpback_jax.run_view import RunView, round_of, short_name

BaseKind = Literal["random", "instruct", "plain"]


@dataclasses.dataclass(frozen=True)
class Count:
    """Rows after one stage; `round` is 0 before the rounds begin."""

    label: str
    value: int
    round: int = 0


def counts(run: RunView) -> list[Count]:
    """Documents to training rows, in the order in which they flow; unknown ones are left out."""
    corpus = run.details("corpus")
    found = [
        Count(label, corpus[key])
        for label, key in (
            ("documents", "documents"),
            ("segments found", "segments"),
            ("pass the rules", "kept"),
        )
        if key in corpus
    ]
    if "corpus" in run.entries:
        found.append(Count("in the corpus", run.entries["corpus"]["rows"]))
    if "candidates" in run.entries:
        found.append(Count("candidates", run.entries["candidates"]["rows"]))
    if "round_1/scores" in run.entries:
        found.append(Count("pass the gates", run.entries["round_1/scores"]["rows"]))
    for t in run.rounds:
        rated = run.details(f"round_{t}/scores").get("rated")
        values = {
            "rated": rated,
            "selected": run.details(f"round_{t}/pairs").get("selected"),
            f"train M_{t}": trained_on(run, t),
        }
        found += [Count(label, n, t) for label, n in values.items() if n is not None]
    return found


def trained_on(run: RunView, t: int) -> int | None:
    """Pairs that at least one step of M_t took; None without M_t."""
    seen = run.details(f"round_{t}/M_{t}").get("seen")
    return None if seen is None else seen.get("web", {"examples": 0})["examples"]


def evaluated(run: RunView) -> list[str]:
    """Names of the evaluated models: base, M_0, ..."""
    return [short_name(name) for name in run.names("evaluation")]


@functools.lru_cache(maxsize=1)
def results(run: RunView) -> Row:
    """`stages.evaluate.results_table` of what has been evaluated so far."""
    from humpback_jax.stages.evaluate import results_table

    evaluations = {short_name(name): run.rows(name) for name in run.names("evaluation")}
    tags = {short_name(name): _default_tags(run, name) for name in run.names("model")}
    return results_table(evaluations, tags) if evaluations else {}


def _default_tags(run: RunView, name: str) -> str:
    from humpback_jax.models import DESCRIPTION

    return str(json.loads((run.folder(name) / DESCRIPTION).read_text("utf-8"))["tags"])


def base_kind(run: RunView) -> BaseKind:
    """Whether the base was tuned on instructions before: its name says so, or its template does."""
    name = str(run.config.base.model).lower()
    if name == "tiny-random":
        return "random"
    from humpback_jax.models import DESCRIPTION

    described = [run.folder(model) / DESCRIPTION for model in run.names("model")]
    templates = [json.loads(path.read_text("utf-8"))["template"]["name"] for path in described]
    tuned = "instruct" in name or "chat" in name or "chat" in templates
    return "instruct" if tuned else "plain"


def curation(run: RunView) -> dict[int, Row]:
    """round -> curator -> corruption -> {"auc", "n"}."""
    names = [name for name in run.names("meter") if name.endswith("/curation_meter")]
    return {round_of(name): run.details(name) for name in sorted(names, key=round_of)}


def backward(run: RunView) -> Row:
    """The backward meter's figures; {} before it ran."""
    return run.details("round_0/backward_meter")


def scores(run: RunView) -> dict[tuple[int, str], dict[str, float | None]]:
    """(round, curator) -> candidate id -> value."""
    found: dict[tuple[int, str], dict[str, float | None]] = {}
    for name in run.names("scores"):
        for row in run.rows(name):
            values = found.setdefault((round_of(name), row["curator"]), {})
            values[row["candidate_id"]] = row["value"]
    return found


def selected(run: RunView, t: int) -> set[str]:
    """Ids of A_k^(t)."""
    return {row["candidate_id"] for row in run.rows(f"round_{t}/pairs") if row["selected"]}


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Two rounds' selections. `expected`: their common pairs if both had been drawn by lot."""

    rounds: tuple[int, int]
    sizes: tuple[int, int]
    common: int
    expected: float


def overlaps(run: RunView) -> list[Overlap]:
    """|A^(t) ∩ A^(u)| for every two rounds."""
    found = []
    for t, u in combinations(run.rounds, 2):
        a, b = selected(run, t), selected(run, u)
        rated = sum(row["score"] is not None for row in run.rows(f"round_{u}/pairs"))
        by_lot = len(a) * len(b) / rated if rated else 0.0
        found.append(Overlap((t, u), (len(a), len(b)), len(a & b), by_lot))
    return found


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlation of two curators on the n pairs that both have rated."""

    round: int
    curators: tuple[str, str]
    rho: float
    n: int


def agreements(run: RunView) -> list[Agreement]:
    """Every two curators of a round with at least three pairs in common."""
    found = []
    everything = scores(run)
    for (t, first), (u, second) in combinations(everything, 2):
        if t != u:
            continue
        a, b = everything[t, first], everything[u, second]
        both = [n for n, value in a.items() if value is not None and b.get(n) is not None]
        if len(both) >= 3:
            rho = spearman([a[n] for n in both], [b[n] for n in both])
            found.append(Agreement(t, (first, second), rho, len(both)))
    return found


def spearman(a: Any, b: Any) -> float:
    """Correlation of mid-ranks; nan where one side is constant."""
    x, y = mid_ranks(np.asarray(a, float)), mid_ranks(np.asarray(b, float))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else float("nan")


def extremes(run: RunView, number: int = 5) -> tuple[list[Row], list[Row]]:
    """The best and the worst rated pairs of the last round, without one standing in both."""
    if not run.rounds:
        return [], []
    rows = [r for r in run.rows(f"round_{run.rounds[-1]}/pairs") if r["score"] is not None]
    ranked = sorted(rows, key=lambda row: (-row["score"], row["id"]))
    number = min(number, len(ranked) // 2) or min(1, len(ranked))
    return ranked[:number], ranked[::-1][: min(number, len(ranked) - number)]


def decisions(run: RunView) -> dict[str, dict[int, int]]:
    """Reason of refusal -> round -> pairs."""
    found: dict[str, dict[int, int]] = {}
    for t in run.rounds:
        for row in run.rows(f"round_{t}/pairs"):
            if not row["selected"]:
                reason = found.setdefault(refusal(row["reason"]), {})
                reason[t] = reason.get(t, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))


def refusal(reason: str) -> str:
    """A pair's reason as one of refusal: the selection's rule stands beside all rated pairs."""
    if reason.startswith("top "):
        return f"not in the {reason}"
    return f"not {reason}" if reason.startswith("score ") else reason


def answers(run: RunView) -> list[Row]:
    """Held-out instructions with the reference and every model's greedy answer."""
    found: dict[str, Row] = {}
    for name in run.names("answers"):
        for row in run.rows(name):
            entry = found.setdefault(
                row["id"],
                {"id": row["id"], "answers": {}}
                | {key: row[key] for key in ("instruction", "reference")},
            )
            cut = "" if row["finish_reason"] == "stop" else " [...]"
            entry["answers"][short_name(name)] = (
                row["answer"].strip() or "(only white space)"
            ) + cut
    return list(found.values())


def seconds(run: RunView, name: str) -> float | None:
    """How long an artifact took to make, where its seal says so."""
    path = run.folder(name) / "artifact.json"
    sealed: Row = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return sealed.get("seconds")
