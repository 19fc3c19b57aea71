"""A run is what TRL's SFTTrainer makes of the same rows, or a comparison with it means nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from humpback_jax.bench import torch_sft, train
from humpback_jax.bench.comparison import Comparison
from humpback_jax.bench.process import measure_apart
from humpback_jax.bench.torch_model import torch_model
from humpback_jax.bench.train import bench_train
from humpback_jax.bench.training_job import TrainingJob, TrainingWorkload, training_rows
from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import count_parameters
from humpback_jax.models import export_hf, load_model, outlined

STEPS = 20


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pairs for a random model, at a rate with which the loss falls."""
    folder = tmp_path_factory.mktemp("trl")
    model = load_model("tiny-random")
    export_hf(folder / "hf", model)
    asked = TrainingWorkload(
        "tiny-random",
        rows=160,
        steps=STEPS,
        batch_examples=4,
        row_tokens=1024,
        learning_rate=3e-3,
    )
    rows = training_rows(model, asked)
    TrainingJob(asked, rows, str(folder / "hf")).save(folder / "job.json")
    return folder / "job.json"


@pytest.mark.slow
def test_twenty_steps_learn_what_trl_learns(job: Path) -> None:
    ours = measure_apart("sft", job, "float32")
    theirs = measure_apart("trl", job, "float32", "plain")
    assert len(ours["losses"]) == len(theirs["losses"]) == STEPS
    assert ours["losses"][-1] < 0.9 * ours["losses"][0], "nothing was learnt"
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-3)


@pytest.mark.slow
def test_all_settings_of_the_others_train_on_the_same_tokens(job: Path) -> None:
    """A speed per supervised token counts alike for padded, packed and plain loops."""
    short = TrainingJob.load(job)
    short = dataclasses.replace(short, rows=short.rows[:8])
    short.save(job.with_name("short.json"))
    first = [
        measure_apart(program, job.with_name("short.json"), "float32", *setting)["losses"][0]
        for program, setting in (
            ("sft", ()),
            ("torch_sft", ("plain",)),
            ("torch_sft", ("checkpointed",)),
            ("trl", ("default",)),
        )
    ]
    np.testing.assert_allclose(first, first[0], rtol=1e-4)
    for program, setting in (("trl", "packed"), ("torch_sft", "wrapped_checkpointed")):
        packed = measure_apart(program, job.with_name("short.json"), "float32", setting)
        assert packed["steps"] >= 1


def test_wrapping_rows_for_torch_loses_supervised_tokens() -> None:
    rows = [("a", [1, 2, 3], [-100, 2, 3]), ("b", [4, 5, 6, 7, 8], [-100, -100, 6, 7, 8])]
    whole = torch_sft.wrapped(rows, 8)
    assert whole.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] and whole.mask is None
    assert whole.labels.tolist() == [[-100, 2, 3, -100, -100, 6, 7, 8]]
    cut = torch_sft.wrapped(rows, 3)
    assert cut.tokens.tolist() == [[1, 2], [3, 4], [5, 6]], "7 and 8 would fill no row of three"


def test_a_gpu_is_handed_to_jax_before_torch_is_measured_on_it(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes three quarters of the memory. Here, asking jax for a device is an error."""
    short = TrainingJob.load(job)
    dataclasses.replace(short, rows=short.rows[:8]).save(job.with_name("asked.json"))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    measured = measure_apart("torch_sft", job.with_name("asked.json"), "float32", "plain")
    assert measured["peak_bytes"] > 0


def test_a_setting_for_which_memory_is_short_ends_the_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(program: str, path: Path, precision: str, setting: str) -> dict[str, float]:
        if setting == "plain":
            raise HumpbackError("the measurement torch_sft was stopped by SIGKILL.")
        return {"supervised_tokens_per_s": float(len(setting))}

    monkeypatch.setattr(train, "measure_apart", measure)
    said: list[str] = []
    assert train.fastest("torch", "bfloat16", Path("trial"), said.append) == "wrapped_checkpointed"
    assert said == ["torch (plain, bfloat16): the measurement torch_sft was stopped by SIGKILL."]


def test_large_random_weights_are_made_for_programs_that_draw_their_own(
    tmp_path: Path,
) -> None:
    model = outlined("random:llama3_8b")
    train.hand_over(tmp_path / "hf", model)
    assert not [*(tmp_path / "hf").glob("*.safetensors")]
    small = outlined("tiny-random")
    train.hand_over(tmp_path / "small", small)
    drawn = torch_model(str(tmp_path / "small"))
    assert sum(p.numel() for p in drawn.parameters()) == count_parameters(small.config)
    assert {str(p.dtype) for p in drawn.parameters()} == {"torch.float32"}


def test_too_few_rows_or_an_unknown_peer_are_errors_that_say_so() -> None:
    model = load_model("tiny-random")
    asked = TrainingWorkload("tiny-random", rows=8, steps=2, batch_examples=4, row_tokens=512)
    with pytest.raises(HumpbackError, match=r"steps of 4 want 4000"):
        training_rows(model, dataclasses.replace(asked, rows=50, steps=1000))
    with pytest.raises(HumpbackError, match=r"100000 are wanted by --rows"):
        training_rows(model, dataclasses.replace(asked, rows=100_000))
    with pytest.raises(HumpbackError, match="--steps=1: the first step is not timed"):
        bench_train(dataclasses.replace(asked, steps=1), Comparison(), print)
    torch = Comparison(peers=("torch",))
    with pytest.raises(HumpbackError, match="--vs=torch trains with adamw or adafactor: leave"):
        bench_train(dataclasses.replace(asked, optimizer="lion"), torch, print)
    with pytest.raises(HumpbackError, match="--vs=trl trains with adamw: leave"):
        bench_train(
            dataclasses.replace(asked, optimizer="adafactor"), Comparison(peers=("trl",)), print
        )
    with pytest.raises(HumpbackError, match="--vs=torch tunes all weights"):
        bench_train(dataclasses.replace(asked, lora_rank=4), torch, print)
    unknown = dataclasses.replace(asked, lora_rank=4, lora_targets=("q", "w"))
    with pytest.raises(HumpbackError, match="LoRA targets that match no projection: 'w'"):
        bench_train(unknown, Comparison(), print)
    with pytest.raises(HumpbackError, match="--vs=axolotl is unknown; known: trl, trl_default"):
        bench_train(asked, Comparison(peers=("axolotl",)), print)
