"""The tables of a run, for the report and for the end of `humpback run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from humpback_jax.artifacts import Row
from humpback_jax.report import facts
from humpback_jax.report.document import Table
from humpback_jax.run_view import RunView

KINDS = ("shuffled", "truncated", "promo")


def result_lines(workdir: Path) -> list[str]:
    """The results of a run as text: likelihood, meters, counts, and what they do not say.

    Raises:
      HumpbackError: no readable run stands there.
    """
    run = RunView(workdir)
    lines: list[str] = []
    for title, table in titled(run):
        lines += [title, *text_lines(table), ""]
    flow = " > ".join(f"{c.value} {c.label}" for c in facts.counts(run) if not c.round)
    return [*lines, flow, "", *notes(run)]


def titled(run: RunView) -> list[tuple[str, Table]]:
    """The tables that sum up a run, with what they show; those without rows are left out."""
    named = (
        (f"Held-out response NLL, nats a token (n = {heldout(run)} examples)", results(run)),
        ("Backward meter (M_yx on held-out pairs)", backward(run)),
        ("Curation meter: AUC of true against broken pairs", curation(run)),
        ("Pairs by round", rounds(run)),
    )
    return [(title, table) for title, table in named if table.rows]


def notes(run: RunView) -> list[str]:
    """What the figures do not say, in plain sentences."""
    base = run.config.base.model
    kinds = {
        "random": (
            f"The base model {base} has random weights: this run rehearses the loop, and none of "
            "its figures means anything."
        ),
        "instruct": (
            f"The base model {base} was already tuned on instructions, so that gains here are "
            "adaptation to the style of the seed set, not instruction following learnt from "
            "nothing."
        ),
        "plain": (
            f"The base model {base} was not tuned on instructions as far as its name and template "
            "tell, so that its figure without tags is that of plain text prediction."
        ),
    }
    n = heldout(run)
    if not n:
        return [kinds[facts.base_kind(run)], "Nothing has been evaluated yet."]
    return [
        kinds[facts.base_kind(run)],
        f"n = {n} held-out examples is {'small' if n < 500 else 'what the intervals rest on'}: the "
        "intervals say nothing about another seed set or another run, and a lower NLL alone is no "
        "measure of quality (LIMA saw perplexity rise while answers got better).",
    ]


def heldout(run: RunView) -> int:
    """How many held-out examples the results rest on."""
    return len({row["id"] for name in run.names("evaluation")[:1] for row in run.rows(name)})


def results(run: RunView) -> Table:
    """One line a model: NLL, the tags it was asked with, differences to base and M_0."""
    rows = [
        [
            model,
            figures["tags"],
            f"{figures['nll']['value']:.4f} ± {figures['nll']['stderr']:.4f}",
            _difference(figures.get("versus_base")),
            _difference(figures.get("versus_M_0")),
        ]
        for model, figures in facts.results(run).items()
    ]
    headers = ("model", "tags", "NLL ± stderr", "minus base [95 %]", "minus M_0 [95 %]")
    return Table(headers, rows, left=2)


def by_tags(run: RunView) -> Table:
    """Every model under every set of tags."""
    table = facts.results(run)
    tags = list(dict.fromkeys(name for figures in table.values() for name in figures["by_tags"]))
    rows = [
        [model, *(f"{figures['by_tags'][name]['value']:.4f}" for name in tags)]
        for model, figures in table.items()
    ]
    return Table(("model", *tags), rows)


def _difference(estimate: Row | None) -> str:
    if not estimate:
        return ""
    return f"{estimate['value']:+.4f} [{estimate['low']:+.4f}, {estimate['high']:+.4f}]"


def backward(run: RunView) -> Table:
    """The backward meter."""
    meter = facts.backward(run)
    if not meter:
        return Table((), [])
    rows = [
        ["NLL of true instructions, nats a token", _estimate(meter["nll"])],
        ["lift of the response's log-likelihood, nats a token", _estimate(meter["lift"])],
        ["copy rate", f"{meter['copy_rate']:.3f}"],
        ["echo rate", f"{meter['echo_rate']:.3f}"],
        ["pass rate", f"{meter['pass_rate']:.3f}"],
    ]
    return Table(("figure", f"value (n = {meter['nll']['n']})"), rows)


def _estimate(estimate: Row) -> str:
    return f"{estimate['value']:.4f} ± {estimate['stderr']:.4f}"


def curation(run: RunView) -> Table:
    """One line a round and curator."""
    rows = [
        [
            str(t),
            curator,
            *(_auc(by_kind, kind) for kind in KINDS),
            str(max(figures["n"] for figures in by_kind.values())),
        ]
        for t, by_curator in facts.curation(run).items()
        for curator, by_kind in by_curator.items()
    ]
    return Table(("round", "curator", *KINDS, "n"), rows, left=2)


def _auc(by_kind: Row, kind: str) -> str:
    return f"{by_kind[kind]['auc']:.3f}" if kind in by_kind else ""


def rounds(run: RunView) -> Table:
    """Scored, rated, parse rate, selected, trained on."""
    rows = []
    for t in run.rounds:
        scored = run.entries.get(f"round_{t}/scores", {})
        details = scored.get("details", {})
        trained = facts.trained_on(run, t)
        rows.append(
            [
                str(t),
                str(run.config.curate.curator),
                str(scored.get("rows", "")),
                str(details.get("rated", "")),
                percent(details.get("parse_rate")),
                str(run.details(f"round_{t}/pairs").get("selected", "")),
                "" if trained is None else str(trained),
            ]
        )
    headers = ("round", "curator", "scored", "rated", "parse rate", "selected", "trained on")
    return Table(headers, rows, left=2)


def curators(run: RunView) -> Table:
    """Every curator of every round: ratings, parse rate, spread of the values, time."""
    import numpy as np

    rows = []
    for name in run.names("scores"):
        table = run.rows(name)
        values = [row["value"] for row in table if row["value"] is not None]
        spread = np.quantile(values, [0.1, 0.5, 0.9]) if values else []
        seconds = facts.seconds(run, name)
        rows.append(
            [
                name.split("/")[0].removeprefix("round_"),
                table[0]["curator"] if table else "",
                str(len(table)),
                percent(run.details(name).get("parse_rate")),
                *([f"{value:.3f}" for value in spread] or ["", "", ""]),
                "" if seconds is None else f"{seconds:.1f}",
                "" if seconds is None or not table else f"{seconds / len(table):.2f}",
            ]
        )
    headers = ["round", "curator", "pairs", "parse rate", "10 %", "median", "90 %"]
    headers += ["seconds", "seconds a pair"]
    if all(not row[-2] for row in rows):  # the run did not record times
        headers, rows = headers[:-2], [row[:-2] for row in rows]
    return Table(headers, rows, left=2)


def agreement(run: RunView) -> Table:
    """Spearman's rank correlation between curators."""
    rows = [
        [str(a.round), " and ".join(a.curators), f"{a.rho:+.3f}", str(a.n)]
        for a in facts.agreements(run)
    ]
    return Table(("round", "curators", "Spearman", "pairs in common"), rows, left=2)


def overlap(run: RunView) -> Table:
    """How much of one round's selection the other one keeps."""
    rows = [
        [
            f"A^({o.rounds[0]}) and A^({o.rounds[1]})",
            *map(str, o.sizes),
            str(o.common),
            f"{o.expected:.1f}",
        ]
        for o in facts.overlaps(run)
    ]
    return Table(("selections", "first", "second", "in both", "in both by lot"), rows)


def refused(run: RunView) -> Table:
    """Rejected pairs by reason and round."""
    rows = [
        [reason, *(str(by_round.get(t, 0)) for t in run.rounds)]
        for reason, by_round in facts.decisions(run).items()
    ]
    return Table(("reason", *(f"round {t}" for t in run.rounds)), rows)


def corpus_rules(run: RunView) -> Table:
    """Segments that a rule of the corpus refused."""
    rejected = run.details("corpus").get("rejected", {})
    return Table(("rule", "segments refused"), [[rule, str(n)] for rule, n in rejected.items()])


def training(run: RunView) -> Table:
    """What the steps of each model took, each example and its tokens counted once."""
    rows = []
    for name in run.names("model"):
        details = run.details(name)
        seen = details["seen"]
        losses = [row["loss"] for row in run.history(name) if "loss" in row]
        checks = [row["validation_nll"] for row in run.history(name) if "validation_nll" in row]
        rows.append(
            [
                name,
                ", ".join(_seen(details, source) for source in seen),
                ", ".join(f"{n} {why}" for why, n in details["dropped"].items()) or "0",
                str(details["steps"]),
                str(sum(counts["supervised_tokens"] for counts in seen.values())),
                percent(details["packing_efficiency"]),
                f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "",
                f"{checks[-1]:.3f}" if checks else "",
            ]
        )
    headers = ("model", "examples", "dropped", "steps", "supervised tokens", "packing")
    return Table((*headers, "loss first → last", "validation NLL"), rows, left=2)


def _seen(details: Row, source: str) -> str:
    """`40 web`, or `31 of 40 web` where there were more than the steps took."""
    seen, all_of_them = (details[key][source]["examples"] for key in ("seen", "sources"))
    return f"{seen} {source}" if seen == all_of_them else f"{seen} of {all_of_them} {source}"


def lineage(run: RunView) -> Table:
    """Every artifact with its hash, those of its parents, and the seconds it took."""
    rows = []
    for name, entry in run.entries.items():
        parents = [f"{run.name_of(p) or '?'} {p[:8]}" for p in entry["parents"]]
        seconds = facts.seconds(run, name)
        rows.append(
            [
                name,
                entry["kind"],
                entry["hash"][:16],
                ", ".join(parents),
                entry["path"],
                "" if seconds is None else f"{seconds:.1f}",
            ]
        )
    return Table(("artifact", "kind", "hash", "parents", "folder", "seconds"), rows, left=5)


def percent(share: Any) -> str:
    return "" if share is None else f"{share:.1%}"


def text_lines(table: Table) -> list[str]:
    """A table in columns of text."""
    lines: list[Sequence[str]] = [table.headers, *table.rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.headers))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if place < table.left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
