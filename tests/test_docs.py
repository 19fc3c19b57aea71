"""Every command that the README and docs/ show runs, on the tiny model where it says so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from humpback_jax.bench.table import sample_lines, score_lines, train_lines
from humpback_jax.cli import build_parser, config_overrides, main
from humpback_jax.compute import choose_compute
from humpback_jax.config import default_config, load_config
from humpback_jax.curators import CURATORS
from humpback_jax.evaluation.meters import BackwardMeter
from humpback_jax.evaluation.statistics import Estimate
from humpback_jax.models import load_checkpoint
from humpback_jax.report import tables
from humpback_jax.report.document import block_markdown
from humpback_jax.report.readme import BEGIN, END
from humpback_jax.run_view import RunView
from humpback_jax.stages.settings import train_spec
from humpback_jax.verbs.arguments import chosen_config
from humpback_jax.verbs.train import READS, WITHOUT_CONFIG

ROOT = Path(__file__).parent.parent


def shown_commands(path: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("humpback ")]


def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("yes", "no", "so")]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = shown_commands(ROOT / "README.md")
    assert len(commands) >= 5
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command


def test_the_readme_claims_of_the_loop_what_its_table_does_not_show() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| M\\_[12] .*\| [-+.\d]+ \\\[([-+.\d]+), ([-+.\d]+)\\\] \|$", text, re.M)
    assert len(found) == 2
    no_better = all(float(low) <= 0 <= float(high) for low, high in found)
    assert no_better == ("M_1 and M_2 did not beat M_0 here" in text)
    words = {4: "four", 5: "five", 6: "six"}
    assert f"the {words[len(CURATORS)]} ways to rate a pair" in text


def test_the_pages_on_training_name_other_defaults_than_those_of_the_verb() -> None:
    arguments = build_parser().parse_args(["train", "--data=x", "--out=y"])
    arguments.overrides = {}
    section = chosen_config(arguments, READS, WITHOUT_CONFIG).train
    assert (section.epochs, section.batch_examples) == (1.0, 8)
    assert (section.on_long, section.dropout) == ("error", 0.0)
    paper = default_config().train
    assert (paper.on_long, paper.dropout) == ("drop", 0.1)
    arguments.overrides = {"train.dropout": ["0.1"], "train.lora.dropout": ["0.2"]}
    arguments.overrides |= {"train.lora.rank": ["4"]}
    told = chosen_config(arguments, READS, WITHOUT_CONFIG).train
    assert (told.dropout, told.lora.dropout) == (0.1, 0.2)
    training, data = (
        " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())
        for name in ("training.md", "data.md")
    )
    assert "`epochs=1` instead of the paper's table of steps, `batch_examples` of 8" in training
    assert "`on_long=error`, and `dropout=0`" in training
    assert "A config drops them by default; `train` without `--config` refuses them." in data


def test_the_demo_compares_its_steps_with_others_than_the_paper_s() -> None:
    config = load_config(f"{ROOT / 'configs' / 'smollm2_demo.py'}")
    rows = config.data.seed_limit, config.data.seed_limit + 11  # of the README: trained on
    compute = choose_compute("float32", 1)
    steps = [train_spec(config.train, compute, 0, count).steps for count in rows]
    assert steps == [7, 9]
    paper = train_spec(default_config().train, compute, 0, 3200)
    assert paper.steps == 500
    text = (ROOT / "configs" / "smollm2_demo.py").read_text(encoding="utf-8")
    assert "7B and 500 steps or more: here, 7 to 9" in text


# Each command of the page on speed runs on random weights, where it does not read a GGUF file.
SMALL = "--model=tiny-random --rows=6 --max-tokens=4 --batch-size=4 --rounds=1"
TRAIN = "--model=tiny-random --rows=8 --steps=2 --batch-size=4 --rounds=1 --vs=torch"


@pytest.mark.parametrize(
    ("page", "least"),
    [("adapters.md", 7), ("benchmarks.md", 4), ("data.md", 3), ("scale.md", 2)],
)
def test_every_command_on_a_page_is_understood(
    page: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    commands = shown_commands(ROOT / "docs" / page)
    assert len(commands) >= least
    for command in commands:
        arguments, rest = build_parser().parse_known_args(shlex.split(command)[1:])
        arguments.overrides = config_overrides(rest, arguments)
        if arguments.verb in ("train", "aot"):
            chosen_config(arguments, READS, WITHOUT_CONFIG)


def test_the_page_on_speed_quotes_figures_that_no_file_holds() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name, lines in (
        ("cpu_cases_float32", sample_lines),
        ("cpu_best", sample_lines),
        ("cpu_avx512", sample_lines),
        ("cpu_score", score_lines),
        ("cpu_train", train_lines),
        ("cpu_train_lora", train_lines),
    ):
        result = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        assert "\n".join(line.rstrip() for line in lines(result)) in page
    best = json.loads((ROOT / "benchmarks" / "cpu_best.json").read_text())
    for system in (best["ours"], *best["peers"].values()):
        for precision in ("float32", "bfloat16"):
            rates = [f"{rate:.2f}" for name, rate in system["all_rows_per_s"] if name == precision]
            assert f"{' and '.join(rates)} in {precision}" in page
        spread = [_spread(system, precision) for precision in ("float32", "bfloat16")]
        assert all(0.02 <= apart < 0.055 for apart in spread)
    assert "the two rounds of a system differ by 2 to 5 %" in page
    full, adapter = (
        json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        for name in ("cpu_train", "cpu_train_lora")
    )
    for precision in ("float32", "bfloat16"):
        ours, theirs, tuned = (
            next(rate for _, name, rate in system["all"] if name == precision)
            for system in (full["ours"], full["peers"]["trl"], adapter["ours"])
        )
        text = " ".join(page.split())
        assert f"{ours:.1f} and {theirs:.1f} in {precision}" in text
        assert re.search(rf"{tuned:.1f} (supervised tokens a second )?in {precision}", text)
    with_drafts, without = (
        json.loads((ROOT / "benchmarks" / f"cpu_single_{name}.json").read_text())
        for name in ("drafts", "no_drafts")
    )
    assert [result["ours"]["drafts"] for result in (with_drafts, without)] == [7, 0]
    quoted = (
        f"{with_drafts['ours']['rows_per_s']:.2f} rows/s, and "
        f"{without['ours']['rows_per_s']:.2f} with `--drafts=0` (`benchmarks/cpu_single_*.json`), "
        f"`transformers` {with_drafts['peers']['hf']['rows_per_s']:.2f}."
    )
    assert quoted in " ".join(page.split())


def _spread(system: dict[str, Any], precision: str) -> float:
    """How much faster the better of a system's rounds is."""
    rates = [rate for name, rate in system["all_rows_per_s"] if name == precision]
    return max(rates) / min(rates) - 1


def test_the_page_on_speed_hides_that_nothing_was_rated_or_that_the_machine_was_busy() -> None:
    text = " ".join((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split())
    result = json.loads((ROOT / "benchmarks" / "cpu_score.json").read_text())
    curators = result["ours"]["curators"]
    assert curators["rubric"]["rated"] == 0
    assert f"For none of the {result['workload']['rows']} pairs did the reasoned rubric" in text
    rounds = {name: figures["all_rows_per_s"] for name, figures in curators.items()}
    slow = {name: rates.index(min(rates)) for name, rates in rounds.items()}
    assert slow == {"rubric": 0, "rubric_likelihood": 1, "pmi": 1, "combined": 1}
    shares = [min(rates) / max(rates) for rates in rounds.values()]
    assert "the first round of `rubric` and the second of the others" in text
    assert f"{min(shares):.0%} to {max(shares):.0%}".replace("%", " %") in text
    assert curators["pmi"]["prefill_ratio"] < curators["rubric_likelihood"]["prefill_ratio"]
    assert "its `prefill_ratio` is no higher for that" in text


@pytest.mark.slow
def test_every_command_on_the_page_on_speed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    for number, command in enumerate(shown_commands(ROOT / "docs" / "benchmarks.md")):
        if "llamacpp" not in command:
            command = command.replace("--case=all", "--case=single")
            small = TRAIN if " train " in command else SMALL
            out = tmp_path / f"{number}.json"
            assert main(shlex.split(f"{command} {small} --out={out}")[1:]) == 0, command
            assert out.exists()


def test_the_loop_by_hand_ends_before_its_last_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's commands and the Python between them, in order."""
    monkeypatch.chdir(tmp_path)
    words = ("yes", "no", "so", "go", "oh")
    seed = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in words]
    documents = [{"text": f"A text about {word}. " * 3} for word in words]
    for name, rows in (("seed", seed), ("documents", documents)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = (ROOT / "docs" / "by_hand.md").read_text(encoding="utf-8")
    rated = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    assert rated == set(CURATORS)
    for language, block in re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            # A random model hardly ever ends its text.
            exec(block.replace('"stop"', '"length"'), {})
            continue
        for command in block.splitlines():
            assert main(shlex.split(command)[1:]) == 0, command
    mined = [json.loads(line) for line in Path("runs/web.jsonl").read_text().splitlines()]
    assert len(mined) == 3
    assert {row["response"] for row in mined} <= {row["text"].strip() for row in documents}
    assert load_checkpoint(Path("runs/M_1")).tags == "both"


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.py")))
def test_every_config_says_what_it_shows_and_takes_tiny(config: str) -> None:
    text = (ROOT / "configs" / config).read_text(encoding="utf-8")
    for part in ("What it shows:", "Launch:", "Expected"):
        assert part in text
    assert load_config(f"{ROOT / 'configs' / config}:tiny").base.model == "tiny-random"


def test_the_notebook_runs_on_a_finished_run(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKDIR", str(tiny_run))
    notebook = json.loads((ROOT / "notebooks" / "look_at_a_run.ipynb").read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert "Held-out response NLL" in capsys.readouterr().out


def test_the_readme_s_tables_have_other_rows_or_columns_than_a_report_writes(
    tmp_path: Path,
) -> None:
    """`humpback report --readme` writes them anew: where this fails, that is to be done."""
    estimate = Estimate(1.0, 2, 0.1)
    meter = BackwardMeter(estimate, estimate, 0.1, 0.1, 0.1).record()
    entry = {"name": "round_0/backward_meter", "kind": "meter", "details": meter}
    (tmp_path / "manifest.json").write_text(json.dumps({"artifacts": [entry]}))
    run = RunView(tmp_path)
    block = (ROOT / "README.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    for table in (tables.results(run), tables.curation(run), tables.rounds(run)):
        assert block_markdown(table).splitlines()[0] in block
    (figures,) = re.findall(r"^\| figure \|.*\n\| --- .*\n((?:\|.*\n)+)", block, re.M)
    labels = [line.split("|")[1].strip() for line in figures.splitlines()]
    assert labels == [row[0] for row in tables.backward(run).rows]
