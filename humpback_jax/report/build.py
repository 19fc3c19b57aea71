"""The report of a run: `report/index.html`, self-contained, and `report/report.md`."""

from __future__ import annotations

import os
from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.report import facts, tables
from humpback_jax.report.document import (
    Block,
    Bullets,
    Fold,
    Heading,
    Paragraph,
    Picture,
    Quote,
    Table,
    to_html,
    to_markdown,
)
from humpback_jax.report.plots import draw_overview, draw_scores
from humpback_jax.run_view import RunView

CLIP, SLACK = 700, 100  # characters of a text that the report shows; a short rest is shown too


def build_report(workdir: Path) -> Path:
    """Writes the report of a run, finished or not, from its artifacts and logs alone.

    Returns:
      The path of `report/index.html`.

    Raises:
      HumpbackError: no readable run stands there, or the report cannot be written.
    """
    run = RunView(workdir)
    folder = workdir / "report"
    try:
        folder.mkdir(exist_ok=True)
        draw_overview(run, folder / "overview.png")
        draw_scores(run, folder / "scores.png")
        title = f"Humpback run: {run.config.name}"
        blocks = report_blocks(run)
        _write(folder / "report.md", to_markdown(title, blocks))
        _write(folder / "index.html", to_html(title, blocks, folder))
    except OSError as error:
        raise HumpbackError(f"{folder} cannot be written ({error.strerror}).") from error
    return folder / "index.html"


def report_blocks(run: RunView) -> list[Block]:
    """The whole report; a section whose stage has not run yet is left out."""
    return [
        *_summary(run),
        Heading("The run in one picture"),
        Picture("overview.png", "Rows after each stage, losses, held-out NLL, scores, meters"),
        *_meters(run),
        *_scores(run),
        *_selections(run),
        *_answers(run),
        *_pairs(run),
        *_refusals(run),
        *_training(run),
        *_setting(run),
    ]


def _summary(run: RunView) -> list[Block]:
    blocks: list[Block] = [
        Paragraph(
            f"{run.config.rounds} rounds of instruction backtranslation on "
            f"{run.config.base.model}: M_yx writes an instruction for every segment, M_(t-1) "
            f"scores the pairs ({run.config.curate.curator}), and M_t is tuned from the base on "
            "the seed and the selected pairs."
        )
    ]
    table = tables.results(run)
    if not table.rows:
        return [*blocks, Paragraph("The run is not finished: nothing has been evaluated yet.")]
    tags = tables.by_tags(run)
    return [
        *blocks,
        Heading("Results"),
        Paragraph(f"Held-out response NLL, nats a token, n = {tables.heldout(run)} examples."),
        table,
        *(Paragraph(note) for note in tables.notes(run)),
        Heading("How to read this", 3),
        Bullets(
            [
                "NLL: how surprised a model is by the reference answers, a token; lower is better. "
                "The standard error and the intervals come from a bootstrap over examples.",
                "Differences are paired, example by example, so that they are far more certain "
                "than the figures themselves. An interval on one side of 0 is a difference that "
                "another draw of the same kind of examples would be expected to show again.",
                "Tags are the sentences that tell a model which source's style to answer in. Each "
                "tuned model counts with its own; the base, which has never seen any, counts with "
                "whatever suits it best.",
                "AUC of a curator: how often it rates a true pair above a broken one; 0.5 is "
                "chance. Lift: by how much the written instruction makes its document likelier.",
            ]
        ),
        Heading("Every model under every set of tags", 3),
        tags,
    ]


def _meters(run: RunView) -> list[Block]:
    blocks: list[Block] = []
    if facts.backward(run):
        blocks += [
            Heading("Backward meter: do the written instructions fit?"),
            tables.backward(run),
            Paragraph(
                "Copy rate: longest text in common with the document, as a share of the "
                "instruction. Echo rate: instructions that repeat the prompt's own wording."
            ),
        ]
    if facts.curation(run):
        blocks += [
            Heading("Curation meter: can the curators tell good pairs from broken ones?"),
            tables.curation(run),
            Paragraph(
                "Shuffled: another pair's instruction. Truncated: the answer without its first "
                "half. Promo: navigation and advertising put around the answer."
            ),
        ]
    return blocks


def _scores(run: RunView) -> list[Block]:
    if not run.names("scores"):
        return []
    return [
        Heading("Scores"),
        Picture("scores.png", "Histogram of the scores of every curator in every round"),
        tables.curators(run),
    ]


def _selections(run: RunView) -> list[Block]:
    blocks: list[Block] = []
    if len(run.rounds) > 1:
        blocks += [
            Heading("Do the rounds select the same pairs?"),
            Paragraph("|A^(t) ∩ A^(u)|, and what two draws by lot of the same sizes would share."),
            tables.overlap(run),
        ]
    agreement = tables.agreement(run)
    if agreement.rows:
        blocks += [Heading("Agreement between curators"), agreement]
    return blocks


def _answers(run: RunView) -> list[Block]:
    found = facts.answers(run)
    if not found:
        return []
    blocks: list[Block] = [
        Heading("Before and after: held-out instructions"),
        Paragraph("Greedy answers; [...] marks one that was cut at the limit of tokens."),
    ]
    for row in found:
        blocks += [Heading(row["id"], 3), Quote("instruction", _clip(row["instruction"]))]
        blocks += [Quote(model, _clip(text)) for model, text in row["answers"].items()]
        blocks.append(Quote("reference", _clip(row["reference"])))
    return blocks


def _pairs(run: RunView) -> list[Block]:
    best, worst = facts.extremes(run)
    blocks: list[Block] = []
    last = run.rounds[-1] if run.rounds else 0
    for title, rows in (("Best", best), ("Worst", worst)):
        if rows:
            blocks.append(Heading(f"{title} pairs of round {last}"))
        for row in rows:
            verdict = "selected" if row["selected"] else "not selected"
            rule = row["reason"] if row["selected"] else facts.refusal(row["reason"])
            blocks += [
                Heading(f"{row['score']:.4f}: {verdict} ({rule}), pair {row['id']}", 3),
                Quote("instruction, written by M_yx", _clip(row["instruction"])),
                Quote("response, the document's text", _clip(row["response"])),
            ]
    return blocks


def _refusals(run: RunView) -> list[Block]:
    blocks: list[Block] = []
    refused, rules = tables.refused(run), tables.corpus_rules(run)
    if refused.rows:
        blocks += [Heading("Why pairs were refused"), refused]
    if rules.rows:
        blocks += [Heading("Why segments were refused"), rules]
    return blocks


def _training(run: RunView) -> list[Block]:
    table = tables.training(run)
    return [Heading("Training"), table] if table.rows else []


def _setting(run: RunView) -> list[Block]:
    environment = run.environment
    versions = [[name, version] for name, version in environment["packages"].items()]
    machine = [[key, _text(value)] for key, value in environment.items() if key != "packages"]
    return [
        Heading("Where and how it was made"),
        Table(("environment", ""), [*machine, *versions], left=2),
        Fold("Configuration, as resolved", run.config.to_json(indent=2)),
        Heading("Lineage"),
        Paragraph(
            "Each artifact with the start of its content hash and its parents; `humpback verify` "
            "recomputes them, and `humpback trace ID` follows one pair, document or train step."
        ),
        tables.lineage(run),
    ]


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _clip(text: str) -> str:
    if len(text) <= CLIP + SLACK:
        return text
    return f"{text[:CLIP].rstrip()}\n[... {len(text) - CLIP:,} more characters]"


def _write(path: Path, text: str) -> None:
    """Atomic, so that a reader never meets half a report."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
