"""Train, sample, export: the same model says the same here and in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from humpback_jax.cli import main
from humpback_jax.lock import sole_user
from humpback_jax.models import load_model

ROOT = Path(__file__).parent.parent
PROMPTS = ("What is a list?", "Name three colours.\nOne a line.", "Explain: why does ice float? ✓")


@pytest.fixture(autouse=True)
def stay_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    monkeypatch.chdir(ROOT)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seed_rows(count: int) -> list[dict[str, Any]]:
    rows = read(ROOT / "humpback_jax" / "data" / "seed.jsonl")
    return [{"instruction": r["instruction"], "output": r["response"]} for r in rows[:count]]


def train(out: Path, data: Path, model: str, *extra: str) -> Path:
    assert main(["train", f"--model={model}", f"--data={data}", f"--out={out}", *extra]) == 0
    return out


def sample(model: Path, prompts: Path, out: Path, *extra: str) -> list[dict[str, Any]]:
    arguments = ["sample", f"--model={model}", f"--prompts={prompts}", f"--out={out}", *extra]
    assert main(arguments) == 0
    return read(out)


def transformers_answers(folder: Path, prompts: list[str], tokens: int) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def check_same_greedy_text(model: Path, folder: Path, tokens: int) -> None:
    prompts = write(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    greedy = ("--temperature=0", f"--max-tokens={tokens}")
    ours = [row["output"] for row in sample(model, prompts, folder / "ours.jsonl", *greedy)]
    exported = folder / "exported"
    assert main(["export", f"--model={model}", "--format=hf", f"--out={exported}"]) == 0
    assert ours == transformers_answers(exported, list(PROMPTS), tokens)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model trained on packaged pairs."""
    folder = tmp_path_factory.mktemp("tuned")
    data = write(folder / "pairs.jsonl", seed_rows(20))
    rate = ("--config.train.learning_rate=0.01", "--config.train.end_learning_rate=0.01")
    return train(folder / "model", data, "tiny-random", *rate)


def test_exported_model_says_the_same_in_transformers(tuned: Path, tmp_path: Path) -> None:
    check_same_greedy_text(tuned, tmp_path, tokens=48)


@pytest.mark.slow
@pytest.mark.real_model
def test_real_model_trained_on_dolly_says_the_same_in_transformers(
    shared_data: Path, tmp_path: Path
) -> None:
    rows = json.loads((shared_data / "seeds" / "dolly_3k.json").read_text())[:64]
    data = write(tmp_path / "dolly.jsonl", rows)
    drop = ("--config.train.on_long=drop", "--config.train.row_tokens=1024")
    model = train(tmp_path / "model", data, "smollm2-135m-instruct", *drop)
    check_same_greedy_text(model, tmp_path, tokens=64)


def test_export_and_import_keep_every_bit_of_the_weights(tuned: Path, tmp_path: Path) -> None:
    from humpback_jax.weights.hashing import params_hash

    assert main(["export", f"--model={tuned}", f"--out={tmp_path / 'hf'}"]) == 0
    assert main(["import", f"--from={tmp_path / 'hf'}", f"--out={tmp_path / 'back'}"]) == 0
    first, last = load_model(str(tuned)), load_model(str(tmp_path / "back"))
    assert params_hash(first.params) == params_hash(last.params)


def test_a_trained_model_does_not_say_of_which_config_data_and_template_it_came(
    tuned: Path,
) -> None:
    details = json.loads((tuned / "humpback.json").read_text(encoding="utf-8"))["details"]
    assert set(details["identity"]) == {"model", "config", "data", "template"}
    assert details["identity"]["model"].startswith("tiny-random (")


def test_sampled_rows_do_not_depend_on_their_order(tuned: Path, tmp_path: Path) -> None:
    rows = [{"id": f"p{i}", "prompt": f"Write about number {i}."} for i in range(7)]
    straight = sample(tuned, write(tmp_path / "a.jsonl", rows), tmp_path / "a.out.jsonl")
    turned = sample(tuned, write(tmp_path / "b.jsonl", rows[::-1]), tmp_path / "b.out.jsonl")
    assert straight == turned[::-1]


def test_draws_differ_and_stand_beside_each_other(tuned: Path, tmp_path: Path) -> None:
    prompts = write(
        tmp_path / "p.jsonl", [{"id": "a", "prompt": "Go"}, {"id": "b", "prompt": "No"}]
    )
    rows = sample(tuned, prompts, tmp_path / "out.jsonl", "--n=2", "--temperature=1", "--top-p=1")
    assert [(row["id"], row["draw"]) for row in rows] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert rows[0]["output"] != rows[1]["output"]


def test_parquet_comes_out_with_the_columns_that_went_in(tuned: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Hi", "topic": "greeting"}])
    out = tmp_path / "out.parquet"
    arguments = ["sample", f"--model={tuned}", f"--prompts={prompts}", f"--out={out}"]
    assert main([*arguments, "--max-tokens=4"]) == 0
    (row,) = pq.ParquetFile(out).read().to_pylist()
    assert row["topic"] == "greeting"
    assert {"output", "finish_reason", "logprob"} <= row.keys()


def test_backward_model_is_trained_and_asked_in_one_wording(tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", seed_rows(8))
    model = train(tmp_path / "m_yx", data, "tiny-random", "--reverse", "--config.train.steps=2")
    steps = [row["step"] for row in read(model / "metrics.jsonl")]
    assert steps == [1, 2], "a run has the settings that it was given, whichever its direction"
    prompts = write(tmp_path / "texts.jsonl", [{"text": "Ice floats because it is lighter."}])
    rows = sample(model, prompts, tmp_path / "out.jsonl", "--reverse", "--max-tokens=8")
    assert len(rows) == 1


@pytest.mark.parametrize("curator", ["pmi", "rubric_likelihood", "combined", "rubric"])
def test_score_rates_every_pair(curator: str, tuned: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", seed_rows(3))
    out = tmp_path / "scores.jsonl"
    arguments = ["score", f"--model={tuned}", f"--data={data}", f"--curator={curator}"]
    assert main([*arguments, f"--out={out}", "--max-tokens=8"]) == 0
    rows = read(out)
    assert len(rows) == 3
    if curator != "rubric":  # a random model writes no rating that could be parsed
        assert all(isinstance(row["score"], float) for row in rows)


def test_evaluate_writes_value_n_and_stderr(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation"
    arguments = ["evaluate", f"--model={tuned}", "--suite=nll", f"--out={out}", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    stored = json.loads((out / "results.json").read_text())
    figure = stored["results"]["nll"]["nll_per_token"]
    assert printed["results"] == stored["results"]
    assert figure["n"] == 32
    assert figure["stderr"] > 0


def test_two_jobs_replace_each_others_half_written_model(tuned: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", seed_rows(4))
    with sole_user(tuned):
        for command in (
            ["train", f"--data={data}", "--model=tiny-random"],
            ["import", f"--from={tuned}"],
        ):
            assert main([*command, f"--out={tuned}"]) == 1
    assert load_model(str(tuned)).hash
