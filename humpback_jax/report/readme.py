"""The results table of a README, between two marks, written from a run."""

from __future__ import annotations

from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.report import facts, tables
from humpback_jax.report.document import block_markdown
from humpback_jax.run_view import RunView

BEGIN, END = "<!-- results:", "<!-- end of results -->"


def write_results(readme: Path, workdir: Path) -> None:
    """Replaces what stands between the marks; the line of the first mark stays.

    Raises:
      HumpbackError: the file has no such marks.
    """
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise HumpbackError(f"{readme}: the marks {BEGIN!r} and {END!r} are missing.")
    before, rest = text.split(BEGIN, 1)
    mark, rest = rest.split("\n", 1)
    after = rest.split(END, 1)[1]
    run = RunView(workdir)
    shown = [f"{title}:\n\n{block_markdown(table)}" for title, table in tables.titled(run)]
    flow = " → ".join(f"{c.value} {c.label}" for c in facts.counts(run) if not c.round)
    made = {entry["path"]: name for name, entry in run.entries.items()}
    seconds = sum(facts.seconds(run, name) or 0.0 for name in made.values())
    machine = f"{run.environment['machine']}, {run.environment['cores']} cores"
    body = "\n\n".join([*shown, f"{flow}; {seconds:.0f} s on {machine}.", *tables.notes(run)])
    readme.write_text(f"{before}{BEGIN}{mark}\n{body}\n{END}{after}", encoding="utf-8")
