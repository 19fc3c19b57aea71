"""Every mistake gives one readable message that names the place; nothing is lost."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from humpback_jax.cli import build_parser, config_overrides, main
from humpback_jax.models import load_model, save_checkpoint
from humpback_jax.verbs.arguments import chosen_config, writable_folder
from humpback_jax.verbs.train import READS
from humpback_jax.weights.safetensors_io import save_hf

ROOT = Path(__file__).parent.parent
GOOD = {"instruction": "Name a colour.", "output": "Blue."}


@pytest.fixture(autouse=True)
def stay_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    folder.mkdir()
    model = load_model("tiny-random")
    save_hf(folder, model.config, model.params)
    model.tokenizer.save(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail, and returns its one message."""
    capsys.readouterr()
    code = main(list(arguments))
    message = capsys.readouterr().err.strip()
    assert code != 0
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert "Traceback" not in message
    return message


def parsed(*command: str) -> argparse.Namespace:
    """What a verb is given for a command line."""
    arguments, rest = build_parser().parse_known_args(command)
    arguments.overrides = config_overrides(rest, arguments)
    return arguments


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train(data: Path, out: Path, *extra: str) -> list[str]:
    sizes = ("--config.train.steps=1", "--config.train.batch_examples=1")
    return ["train", "--model=tiny-random", f"--data={data}", f"--out={out}", *sizes, *extra]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--limit=-1", "--limit=-1 has to be 0 or more"),
        ("--preview=-2", "--preview=-2 has to be 0 or more"),
        ("--config.data.heldout=x", "--config.data.heldout has no effect on `humpback train`"),
        ("--config.compute.kv=int8", "--config.compute.kv has no effect on `humpback train`"),
        ("--config.train.eval_every=5", "eval_every=5 measures the rows of --heldout=FILE"),
    ],
)
def test_an_option_of_training_that_can_do_nothing_is_refused(option, said, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", GOOD)
    assert said in refused(capsys, *train(data, tmp_path / "out", option))


def test_held_out_rows_that_nothing_measures_are_silently_ignored(tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", GOOD)
    message = refused(capsys, *train(data, tmp_path / "out", f"--heldout={data}"))
    assert "--heldout" in message and "--config.train.eval_every=N" in message


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def alternating_model(hf_folder: Path, tmp_path: Path) -> Path:
    """A model whose chat template refuses two requests in a row."""
    model = shutil.copytree(hf_folder, tmp_path / "model")
    fields = json.loads((model / "tokenizer_config.json").read_text())
    fields["chat_template"] = ALTERNATING
    (model / "tokenizer_config.json").write_text(json.dumps(fields))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    return model


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
ODD = {"id": "the-odd-one", "messages": [USER, USER, ANSWER]}


def test_a_conversation_that_the_chat_template_refuses_is_named_or_counted_with_skip_bad(
    capsys: pytest.CaptureFixture[str], alternating_model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", ODD, GOOD)
    command = train(data, tmp_path / "out", f"--model={alternating_model}")
    message = refused(capsys, *command)
    assert "row the-odd-one" in message and "roles must alternate" in message
    assert main([*command, "--skip-bad", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["examples"] == 1 and result["dropped"] == {"refused_by_template": 1}


def test_validation_is_of_fewer_rows_than_were_given_and_nobody_says_so(
    capsys: pytest.CaptureFixture[str], alternating_model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", GOOD)
    long = {"instruction": "Go on.", "output": "on and " * 500}
    heldout = write(tmp_path / "heldout.jsonl", GOOD, long, ODD, "{no json")
    sizes = (f"--heldout={heldout}", "--config.train.eval_every=1", "--config.train.row_tokens=256")
    command = train(data, tmp_path / "out", f"--model={alternating_model}", *sizes)
    assert "heldout.jsonl" in refused(capsys, *command)
    assert main([*command, "--skip-bad", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])["heldout"]
    assert result["examples"] == 1 and sum(result["left_out"].values()) == 3
    assert result["left_out"]["too_long"] == result["left_out"]["refused_by_template"] == 1
    assert "held-out rows: 1 are measured, left out: {" in out


def test_a_model_trained_over_itself_is_refused_before_a_kill_can_leave_it_half_replaced(
    capsys: pytest.CaptureFixture[str], hf_folder: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", GOOD)
    model = shutil.copytree(hf_folder, tmp_path / "model")
    message = refused(capsys, *train(data, tmp_path / "x" / ".." / "model", f"--model={model}"))
    assert "is the model to be trained" in message and "another folder" in message


def test_train_ignores_the_model_that_its_config_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", GOOD)
    command = ["train", "--config=configs/tiny.py", f"--data={data}", f"--out={tmp_path / 'out'}"]
    command.append("--config.train.eval_every=0")
    named = f"--config.base.model={tmp_path / 'absent'}"
    assert f"{tmp_path / 'absent'}" in refused(capsys, *command, named)
    assert chosen_config(parsed(*command), READS).base.model == "tiny-random"
    assert chosen_config(parsed(*command, "--model=own"), READS).base.model == "own"
    without = parsed("train", f"--data={data}", f"--out={tmp_path / 'out'}")
    assert chosen_config(without, READS).base.model == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("verb", "flag", "field"),
    [
        ("train --config=configs/tiny.py --data=x --out={out}", "model=a", "base.model=b"),
        ("aot --config=configs/tiny.py --topology=v5e:2x2", "model=a", "base.model=b"),
        ("aot --topology=v5e:2x2", "lora=4", "train.lora.rank=8"),
        ("train --data=x --out={out}", "mix=web:cap=3", "train.mixture=web:cap=4"),
        ("train --reverse --data=x --out={out}", "mix=web:cap=3", "backward.mixture=web:cap=4"),
        ("run --config=configs/tiny.py --workdir={out}", "limit=3", "corpus.limit=4"),
    ],
)
def test_of_a_flag_and_a_field_that_mean_the_same_one_is_silently_ignored(
    verb: str, flag: str, field: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = verb.format(out=tmp_path / "out").split()
    message = refused(capsys, *command, f"--{flag}", f"--config.{field}")
    assert f"--{flag.partition('=')[0]}" in message
    assert f"--config.{field.partition('=')[0]}" in message


def test_a_setting_of_the_backward_direction_told_twice_is_silently_ignored_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", GOOD)
    twice = ("--reverse", "--config.train.epochs=2", "--config.backward.epochs=3")
    command = ["train", f"--data={data}", f"--out={tmp_path / 'out'}"]
    message = refused(capsys, *command, *twice)
    assert "--config.train.epochs" in message and "--config.backward.epochs" in message


def test_settings_of_the_other_direction_are_refused_instead_of_ignored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", GOOD)
    message = refused(capsys, *train(data, tmp_path / "out", "--config.backward.epochs=2"))
    assert "config.backward.epochs" in message and "--reverse" in message


def test_hosts_that_try_one_folder_at_a_time_find_it_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch = Path.touch

    def another_host_is_done(path: Path) -> None:
        touch(path)
        path.unlink()

    monkeypatch.setattr(Path, "touch", another_host_is_done)
    writable_folder(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, *train(tmp_path / "absent.jsonl", tmp_path / "out"))
    assert "absent.jsonl" in message
    assert "does not exist" in message


def test_malformed_line_is_named_by_file_and_number_or_counted_with_skip_bad(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write(tmp_path / "pairs.jsonl", GOOD, '{"instruction": ', GOOD)
    message = refused(capsys, *train(data, tmp_path / "out"))
    assert "pairs.jsonl" in message
    assert "line 2" in message
    assert main([*train(data, tmp_path / "out"), "--skip-bad", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(result["bad_rows"].values()) == 1
    assert result["examples"] == 2


def test_a_pair_longer_than_the_window_is_named_when_scored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    long = {"id": "the-long-one", "instruction": "Count.", "output": "one " * 3000}
    data = write(tmp_path / "pairs.jsonl", GOOD, long)
    for curator in ("pmi", "rubric_likelihood", "rubric"):
        message = refused(
            capsys,
            *("score", "--model=tiny-random", f"--data={data}", f"--curator={curator}"),
            f"--out={tmp_path / 'scores.jsonl'}",
        )
        assert "the-long-one" in message
        assert "4096" in message


def test_a_line_nested_too_deeply_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write(tmp_path / "pairs.jsonl", GOOD, "[" * 100_000)
    assert "line 2" in refused(capsys, *train(data, tmp_path / "out"))


@pytest.mark.parametrize("empty", ["", "  \n "])
def test_empty_response_is_named(
    empty: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write(tmp_path / "pairs.jsonl", GOOD, {"instruction": "Say it.", "output": empty})
    message = refused(capsys, *train(data, tmp_path / "out"))
    assert "line 2" in message
    assert "'output'" in message


def test_response_longer_than_the_context_is_named_and_can_be_dropped_or_cut(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    long = {"id": "long-one", "instruction": "Go on.", "output": "word " * 3000}
    data = write(tmp_path / "pairs.jsonl", GOOD, long)
    message = refused(capsys, *train(data, tmp_path / "out"))
    assert "long-one" in message
    dropped = [*train(data, tmp_path / "dropped"), "--config.train.on_long=drop", "--json"]
    assert main(dropped) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["dropped"] == {"too_long": 1}


def test_prompt_that_fills_the_window_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = write(tmp_path / "p.jsonl", {"id": "short", "prompt": "Hi"})
    out = tmp_path / "out.jsonl"
    write(out, {"output": "an earlier result"})
    write(prompts, {"id": "short", "prompt": "Hi"}, {"id": "huge", "prompt": "x" * 5000})
    message = refused(
        capsys, "sample", "--model=tiny-random", f"--prompts={prompts}", f"--out={out}"
    )
    assert "huge" in message
    assert "4096" in message
    assert "an earlier result" in out.read_text()


def test_prompt_that_fills_the_window_in_training_has_nothing_to_learn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = {"id": "wide", "instruction": "x" * 5000, "output": "Yes."}
    data = write(tmp_path / "pairs.jsonl", row)
    extra = ("--config.train.on_long=truncate",)
    message = refused(capsys, *train(data, tmp_path / "out", *extra))
    assert "no_supervised_token" in message


def test_truncated_safetensors_file_is_named(
    hf_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(hf_folder, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "model.safetensors" in refused(capsys, "sample", f"--model={folder}", "--prompt=Hi")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"text"])
def test_corrupt_gguf_file_is_named(
    content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    assert "broken.gguf" in refused(capsys, "sample", f"--model={file}", "--prompt=Hi")


def test_tokenizer_that_does_not_fit_the_model_is_refused(
    hf_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "mismatch"
    shutil.copytree(hf_folder, folder)
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"].append(
        {**raw["added_tokens"][0], "id": 5000, "content": "<|beyond|>"},
    )
    raw["model"]["vocab"]["<|beyond|>"] = 5000
    path.write_text(json.dumps(raw))
    message = refused(capsys, "sample", f"--model={folder}", "--prompt=Hi")
    assert "vocab" in message


def test_checkpoint_with_another_template_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "model", load_model("tiny-random", "plain"), {})
    data = write(tmp_path / "pairs.jsonl", GOOD)
    message = refused(
        capsys,
        "train",
        f"--model={tmp_path / 'model'}",
        f"--data={data}",
        f"--out={tmp_path / 'out'}",
        "--config.base.template=chat",
    )
    assert "template" in message


def test_corpus_without_segments_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    documents = write(tmp_path / "docs.jsonl", {"text": "Too short."})
    message = refused(
        capsys,
        "run",
        "--config=configs/tiny.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.corpus.documents={documents}",
    )
    assert "no segment is left" in message


def test_selection_of_nothing_is_refused_and_the_scores_stay(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tiny_run import tiny_config

    from humpback_jax.artifacts import read_manifest
    from humpback_jax.errors import HumpbackError
    from humpback_jax.loop import run

    shutil.copytree(tiny_run, tmp_path / "run")
    config = tiny_config()
    with config.unlocked():
        config.curate.update({"select": "absolute", "threshold": 4.9})
    with pytest.raises(HumpbackError, match=r"none of .* is selected"):
        run(config, tmp_path / "run", say=lambda text: None)
    before = {entry["name"]: entry["hash"] for entry in read_manifest(tiny_run)}
    after = {entry["name"]: entry["hash"] for entry in read_manifest(tmp_path / "run")}
    assert after["round_1/scores"] == before["round_1/scores"]


def test_workdir_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    message = refused(capsys, "run", "--config=configs/tiny.py", f"--workdir={file / 'run'}")
    assert str(file / "run") in message
    assert file.read_text() == "in the way"


def test_text_that_is_not_utf8_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = tmp_path / "latin1.jsonl"
    data.write_bytes('{"instruction": "Café?", "output": "Oui."}\n'.encode("latin-1"))
    assert "latin1.jsonl" in refused(capsys, *train(data, tmp_path / "out"))
    documents = tmp_path / "latin1.txt"
    documents.write_bytes("Café ".encode("latin-1") * 300)
    message = refused(
        capsys,
        "run",
        "--config=configs/tiny.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.corpus.documents={documents}",
    )
    assert "latin1.txt" in message


def test_unknown_model_is_refused_with_the_known_names(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "sample", "--model=no-such-model", "--prompt=Hi")
    assert "no-such-model" in message
    assert "smollm2-135m-instruct" in message


def test_a_prompt_that_is_not_utf8_is_refused_as_a_file_of_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = b"Caf\xe9?".decode(errors="surrogateescape")  # as Python gives arguments
    message = refused(capsys, "sample", "--model=tiny-random", f"--prompt={text}")
    assert "--prompt" in message and "UTF-8" in message


@pytest.mark.parametrize("verb", ["sample --prompt=Hi", "score --data=x --out=y"])
@pytest.mark.parametrize("wrong", ["0", "-3", "1.5", "many"])
def test_a_count_that_is_none_is_refused_and_named(
    verb: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ["--batch-size", "--n"][: 2 if verb.startswith("sample") else 1]:
        with pytest.raises(SystemExit) as stopped:
            main([*verb.split(), "--model=tiny-random", f"{option}={wrong}"])
        assert stopped.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert option in message and f"'{wrong}' is not a whole number from 1 on" in message


def test_run_folder_that_is_none_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for verb in (["verify"], ["report"], ["trace", "x"]):
        assert "there is no run in this folder" in refused(capsys, *verb, f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    "command",
    [
        ("run", "--config=configs/tiny.py", "--workdir=gs://bucket/run"),
        ("train", "--model=tiny-random", "--data=rows.jsonl", "--out=gs://bucket/model"),
        ("sample", "--model=tiny-random", "--prompt=Hi", "--out=s3://bucket/rows.jsonl"),
    ],
)
def test_a_bucket_is_no_folder_named_gs_on_a_machine_that_will_be_gone(
    command: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is not on this machine" in refused(capsys, *command)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_to_be_full_and_an_earlier_adapter_stays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write(tmp_path / "pairs.jsonl", GOOD, GOOD)
    tuned, out = tmp_path / "tuned", tmp_path / "peft"
    assert main([*train(data, tuned), "--config.train.lora.rank=2"]) == 0
    export = ("export", f"--model={tuned}", "--format=peft", f"--out={out}")
    assert main(list(export)) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    with full_disk():
        message = refused(capsys, *export)
        assert "cannot be written" in message and "kept" in message
        message = refused(capsys, "export", f"--model={tuned}", f"--out={tmp_path / 'hf'}")
        assert "File too large" in message and "Make room" in message
        message = refused(capsys, *train(data, tmp_path / "again"))
        assert "could not be written" in message or "File too large" in message
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 2 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_held_out_pair_longer_than_the_window_stops_a_run_at_its_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pairs = [{"id": str(n), "instruction": f"Say {n}.", "output": f"{n}."} for n in range(6)]
    long = {"id": "the-long-one", "instruction": "Count.", "output": "one " * 3000}
    heldout = write(tmp_path / "heldout.jsonl", *pairs, long)
    run = ["run", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", "--json"]
    assert main([*run, f"--config.data.heldout={heldout}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        "1 pairs of data.heldout are too long" in line and "the-long-one" in line for line in lines
    )
    assert json.loads(lines[-1])["models"]["base"]["nll"]["n"] == len(pairs)
    write(heldout, long)
    message = refused(capsys, *run, f"--config.data.heldout={heldout}")
    assert "none of 1 pairs fits" in message
