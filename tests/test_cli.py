"""The program's surface: help, flags, errors, JSON."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from humpback_jax.cli import HOME, build_parser, main

ROOT = Path(__file__).parent.parent
VERBS = (
    "run",
    "train",
    "sample",
    "score",
    "evaluate",
    "export",
    "import",
    "fetch",
    "report",
    "verify",
    "trace",
)


@pytest.fixture(autouse=True)
def stay_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    monkeypatch.chdir(ROOT)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "humpback_jax", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "HUMPBACK_IN_PROCESS": "0"},
    )


def test_help_comes_within_a_second_and_loads_no_jax() -> None:
    # By its own time on the processor: other tests may keep it waiting.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    code = (
        "import sys, humpback_jax.cli as c; c.build_parser();"
        "assert not {'jax', 'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_both_forms_of_a_flag_mean_the_same() -> None:
    parser = build_parser()
    spaced = parser.parse_args(["run", "--workdir", "w", "--limit", "3"])
    joined = parser.parse_args(["run", "--workdir=w", "--limit=3"])
    assert vars(spaced) == vars(joined)


def test_of_a_list_by_commas_or_by_repeating_its_flag_only_the_last_item_counts() -> None:
    for verb, flag, field, items in (
        ("evaluate", "suite", "suite", ["nll", "fidelity"]),
        ("evaluate", "adapter", "adapter", ["a", "b"]),
        ("sample", "stop-id", "stop_id", ["3", "5"]),
        ("bench train", "vs", "vs", ["trl", "torch"]),
        ("aot", "programs", "programs", ["train", "decode"]),
    ):
        commas, repeated = (
            build_parser().parse_args([*verb.split(), *given])
            for given in ([f"--{flag}={','.join(items)}"], [f"--{flag}={i}" for i in items])
        )
        assert [str(item) for item in getattr(commas, field)] == items
        assert getattr(commas, field) == getattr(repeated, field)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.train.learning_rat=1"], "did you mean 'learning_rate'"),
        (["--config.train.learning_rate=high"], "must be of type float"),
        (["--config.seed=x"], "must be of type int"),
        (["--config.train=1"], "is a section"),
        (["--workdirr=x"], "unknown argument '--workdirr=x'"),
        (["--config.train.lora.rank"], "needs a value"),
    ],
)
def test_T29_a_wrong_setting_is_refused_before_anything_runs(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    code = main(["run", "--config=configs/tiny.py", f"--workdir={folder}", *arguments])
    errors = capsys.readouterr().err
    assert code != 0
    assert expected in errors
    assert len(errors.strip().splitlines()) == 1
    assert not folder.exists()


def test_an_error_is_one_line_and_debug_shows_the_traceback(tmp_path: Path) -> None:
    arguments = ["run", "--config=missing.py", f"--workdir={tmp_path / 'run'}"]
    plain = run(*arguments)
    assert plain.returncode != 0
    assert "Traceback" not in plain.stderr + plain.stdout
    assert "missing.py" in plain.stderr
    assert "Traceback" in run(*arguments, "--debug").stderr


def test_json_is_the_last_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Name a colour."}) + "\n")
    code = main(
        ["sample", "--model=tiny-random", f"--prompts={prompts}", "--max-tokens=3", "--json"]
    )
    assert code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 1


def test_a_machine_with_too_little_memory_is_called_a_defect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    def perform(arguments: object) -> None:
        jax.numpy.zeros(1 << 50).block_until_ready()

    monkeypatch.setattr("humpback_jax.verbs.perform", perform)
    assert main(["fetch", "x"]) == 1
    message = capsys.readouterr().err
    assert "memory is exhausted (RESOURCE_EXHAUSTED" in message and "defect" not in message


def test_a_job_whose_output_nobody_reads_any_more_ends_as_if_it_were_done(tmp_path: Path) -> None:
    """`humpback ... | head`: a scheduler takes exit code 0 for a finished job."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"prompt": "Name a colour."}) + "\n")
    command = ["sample", "--model=tiny-random", f"--prompts={rows}", "--max-tokens=3", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "humpback_jax", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    assert errors.strip().splitlines() == ["stopped: nobody reads the standard output any more."]


def test_home_becomes_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell replaces the tilde of --FLAG=~/FILE."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Say ~/x."}) + "\n")
    assert (
        main(
            [
                "sample",
                "--model=tiny-random",
                "--prompts=~/rows.jsonl",
                "--out=~/o.jsonl",
                "--max-tokens=1",
            ]
        )
        == 0
    )
    (row,) = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert row["prompt"] == "Say ~/x." and not (tmp_path / "~").exists()
    words = ["--data=seed=~/a", "--config.data.seed=~/b", "--prompt=~/c", "--x=~user/d", "--y=a~/e"]
    assert [HOME.sub(r"\1HOME", word) for word in words] == [
        *("--data=seed=HOME/a", "--config.data.seed=HOME/b", "--prompt=~/c"),
        *("--x=~user/d", "--y=a~/e"),
    ]
