"""The report: what a reader believes about a run must be what its artifacts say."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import train_again

from humpback_jax.errors import HumpbackError
from humpback_jax.lineage import batches
from humpback_jax.report import facts
from humpback_jax.report.build import build_report
from humpback_jax.report.document import (
    Block,
    Fold,
    Heading,
    Paragraph,
    Quote,
    Table,
    to_html,
    to_markdown,
)
from humpback_jax.report.tables import result_lines, rounds, training
from humpback_jax.run_view import RunView

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shared run, with its report."""
    copy = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("report") / "run"))
    assert build_report(copy) == copy / "report" / "index.html"
    return copy


class Page(html.parser.HTMLParser):
    """Collects tags and attributes, and fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_can_be_mailed_it_needs_nothing_from_outside(folder: Path) -> None:
    page = Page((folder / "report" / "index.html").read_text("utf-8"))
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2
    for picture in pictures:
        kind, data = picture.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(PNG)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not any("href" in attributes for _, attributes in page.tags)


def test_the_markdown_stands_beside_the_pictures_it_shows(folder: Path) -> None:
    text = (folder / "report" / "report.md").read_text("utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures == ["overview.png", "scores.png"]
    for picture in pictures:
        assert (folder / "report" / picture).read_bytes().startswith(PNG)


@pytest.mark.parametrize("file", ["index.html", "report.md"])
def test_nothing_that_was_promised_is_missing(folder: Path, file: str) -> None:
    text = (folder / "report" / file).read_text("utf-8")
    for title in (
        "Results",
        "How to read this",
        "The run in one picture",
        "Backward meter",
        "Curation meter",
        "Scores",
        "Do the rounds select the same pairs?",
        "Agreement between curators",
        "Before and after",
        "Best pairs of round 2",
        "Worst pairs of round 2",
        "Why pairs were refused",
        "Why segments were refused",
        "Training",
        "Configuration, as resolved",
        "Lineage",
    ):
        assert title in text
    run = RunView(folder)
    assert all(entry["hash"][:16] in text for entry in run.entries.values())


def test_the_figures_are_those_of_the_summary_that_scripts_read(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    run = RunView(folder)
    assert json.loads(json.dumps(facts.results(run))) == summary["models"]
    assert facts.curation(run)[2] == summary["meters"]["curation"]
    assert facts.backward(run) == summary["meters"]["backward"]


def test_the_counts_add_up(folder: Path) -> None:
    run = RunView(folder)
    found = {(count.round, count.label): count.value for count in facts.counts(run)}
    assert found[0, "candidates"] == found[0, "in the corpus"] == len(run.rows("candidates"))
    refused = facts.decisions(run)
    for t in run.rounds:
        out = sum(by_round.get(t, 0) for by_round in refused.values())
        assert out + found[t, "selected"] == found[0, "candidates"]
        assert found[t, f"train M_{t}"] <= found[t, "selected"] <= found[t, "rated"]


def test_pairs_that_a_mixture_leaves_out_are_not_counted_as_trained_on(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    run = train_again(folder, steps=7, mixture=("web:cap=4",))  # one epoch of 24 + 4 in fours
    found = {(count.round, count.label): count.value for count in facts.counts(run)}
    assert found[2, "selected"] > found[2, "train M_2"] == 4
    assert dict(zip(rounds(run).headers, rounds(run).rows[-1], strict=True))["trained on"] == "4"
    seen = dict(zip(training(run).headers, training(run).rows[-1], strict=True))
    assert seen["examples"] == "24 seed, 4 web"
    supervised = sum(row["supervised_tokens"] for row in run.history("round_2/M_2"))
    assert seen["supervised tokens"] == str(supervised)


def test_pairs_that_no_step_saw_are_counted_as_trained_on(tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    run = train_again(folder, steps=3)
    drawn = {example for batch in batches(run, "round_2/M_2") for example in batch}
    web = sum(source == "web" for source, _ in drawn)
    assert 0 < web < len(drawn) == 12
    found = {(count.round, count.label): count.value for count in facts.counts(run)}
    assert found[2, "selected"] > found[2, "train M_2"] == web
    seen = dict(zip(training(run).headers, training(run).rows[-1], strict=True))
    assert seen["examples"] == f"{12 - web} of 24 seed, {web} of {found[2, 'selected']} web"
    supervised = sum(row["supervised_tokens"] for row in run.history("round_2/M_2"))
    assert seen["supervised tokens"] == str(supervised)


def test_the_end_of_a_run_says_what_its_figures_do_not_mean(folder: Path, tmp_path: Path) -> None:
    lines = result_lines(folder)
    text = "\n".join(lines)
    n = len({row["id"] for row in RunView(folder).rows("evaluation/base")})
    for model in ("base", "M_0", "M_1", "M_2"):
        assert any(line.split()[:1] == [model] for line in lines)
    assert f"n = {n} held-out examples is small" in text and "no measure of quality" in text
    assert "random weights" in text
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["base"]["model"] = "smollm2-135m-instruct"
    (copy / "config.json").write_text(json.dumps(config))
    assert "was already tuned on instructions" in "\n".join(result_lines(copy))


def test_a_run_that_stopped_early_still_has_a_report(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "summary.json").unlink()
    artifacts = json.loads((copy / "manifest.json").read_text())["artifacts"]
    names = [entry["name"] for entry in artifacts]
    for last in ("corpus", "round_0/M_0", "candidates", "round_1/scores", "evaluation/base"):
        kept = artifacts[: names.index(last)]
        (copy / "manifest.json").write_text(json.dumps({"artifacts": kept}))
        text = build_report(copy).read_text("utf-8")
        assert "The run is not finished" in text
        assert result_lines(copy)


HOSTILE = '</pre></details><script>alert(1)</script> & "quoted" \x00\x1b | a\n```\n# no heading'


def test_model_output_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    blocks: list[Block] = [
        Heading(HOSTILE),
        Paragraph(HOSTILE),
        Table(["a", HOSTILE], [[HOSTILE, "1"]]),
        Quote(HOSTILE, HOSTILE),
        Fold(HOSTILE, HOSTILE),
    ]
    text = to_html(HOSTILE, blocks, tmp_path)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "\x00" not in text and "\x1b" not in text
    assert "".join(page.text).count("alert(1)") == 10


def test_model_output_cannot_break_out_of_the_markdown() -> None:
    table = to_markdown("t", [Table(["a", "b"], [[HOSTILE, "1"]])]).split("\n\n")[1]
    assert len(table.splitlines()) == 3
    assert len(re.findall(r"(?<!\\)\|", table.splitlines()[2])) == 3
    assert "<script>" not in table
    quote = to_markdown("t", [Quote("label", HOSTILE)])
    fence = re.findall(r"^`+", quote, re.MULTILINE)
    assert fence[0] == fence[-1] == "````"
    assert to_markdown("t", [Paragraph("1. not a list")]).endswith("1\\. not a list\n")


def test_spearman_agrees_with_scipy_ties_included() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 6, 30), generator.normal(size=30).round(1)
        assert facts.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(facts.spearman([1, 1, 1], [1, 2, 3]))


def test_a_report_that_cannot_be_written_is_one_readable_error(
    tiny_run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_run, tmp_path / "copy"))
    shutil.rmtree(copy / "report", ignore_errors=True)
    (copy / "report").write_text("a file in the way")
    with pytest.raises(HumpbackError, match="cannot be written"):
        build_report(copy)
