"""The default model's training step: if these fail, a real run learns what nobody meant it to."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from test_loss_parity import mean_and_gradient
from tiny_llama import FLOAT32, gradients_of, torch_nll

from humpback_jax.bench.process import measure_apart
from humpback_jax.bench.training_job import TrainingJob, TrainingWorkload, training_rows
from humpback_jax.model.llama import flatten, unstack_layers
from humpback_jax.models import LanguageModel, export_hf, load_model
from humpback_jax.training.examples import TrainingExample
from humpback_jax.training.loss import Batch
from humpback_jax.training.packing import best_fit, lay_out
from humpback_jax.training.state import StepSpec, TrainState
from humpback_jax.training.step import make_train_step

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
ROWS, WIDTH = 8, 256


@functools.cache
def default_model() -> LanguageModel:
    return load_model("smollm2-135m-instruct")


def real_job(batches: int, batch_examples: int) -> TrainingJob:
    model = default_model()
    asked = TrainingWorkload(
        model.name, rows=160, steps=batches, batch_examples=batch_examples, row_tokens=WIDTH
    )
    return TrainingJob(asked, training_rows(model, asked))


def laid_out(examples: list[TrainingExample], plan: list[list[int]], rows: int) -> Batch:
    return lay_out(examples, plan, rows, WIDTH, ("seed",))


def test_the_default_model_s_loss_and_gradients_are_not_torch_s(tmp_path: Path) -> None:
    """Against torch in float64: its float32 gradients are ten times as far from those as ours."""
    model, examples = default_model(), real_job(1, 4).examples()
    export_hf(tmp_path, model)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    # The padding token ends a turn, too; torch would not learn it where it is read.
    theirs.model.embed_tokens.padding_idx = None
    count = sum(example.supervised for example in examples)
    expected = torch_nll(theirs, examples).sum() / count
    expected.backward()
    plan = best_fit([example.length for example in examples], WIDTH)
    spec = StepSpec(model.config, 1, layout="unrolled", precision=FLOAT32)
    params = unstack_layers(jax.tree.map(jnp.asarray, model.params))
    batch = laid_out(examples, plan, len(plan))
    value, gradient = mean_and_gradient(spec, params, batch)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    ours, torchs = flatten(gradient), flatten(gradients_of(theirs, "unrolled"))
    assert ours.keys() == torchs.keys()
    for path, reference in torchs.items():
        distance = np.linalg.norm(np.asarray(ours[path], np.float64) - reference)
        assert distance <= 1e-4 * np.linalg.norm(reference), path


def test_the_default_model_s_loss_depends_on_how_a_batch_is_cut() -> None:
    """The same examples packed or apart, in 1, 2, 4 or 8 micro-batches."""
    model = default_model()
    examples = sorted(real_job(2, ROWS).examples(), key=lambda example: example.length)[:ROWS]
    spec = StepSpec(model.config, 1, layout="unrolled", precision=FLOAT32)
    descent = optax.sgd(0.0)
    step = make_train_step(spec, descent)
    plans = {
        "packed": best_fit([example.length for example in examples], WIDTH),
        "apart": [[index] for index in range(ROWS)],
    }
    assert len(plans["packed"]) < ROWS
    cuts = [("packed", 1), *(("apart", accumulation) for accumulation in (1, 2, 4, 8))]
    losses, norms = [], []
    for name, accumulation in cuts:
        batch = laid_out(examples, plans[name], ROWS)
        micro = Batch(*(x.reshape(accumulation, -1, x.shape[-1]) for x in batch))
        params = unstack_layers(jax.tree.map(jnp.array, model.params))
        state = TrainState(jnp.int32(0), params, {}, descent.init(params))
        _, metrics = step(state, micro, jax.random.key(0))
        losses.append(float(metrics.nll.sum()) / int(metrics.supervised.sum()))
        norms.append(float(metrics.grad_norm))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)


def test_mixed_precision_strays_further_from_float32_than_torch_s(tmp_path: Path) -> None:
    """By the mean distance of the losses over 50 steps, torch's over the first of them: without
    instructions for bfloat16, torch takes half a minute a step.
    """
    model = default_model()
    export_hf(tmp_path / "hf", model)
    whole, short = tmp_path / "whole.json", tmp_path / "short.json"
    job = dataclasses.replace(real_job(50, 2), hf=str(tmp_path / "hf"))
    job.save(whole)
    dataclasses.replace(job, rows=job.rows[:20]).save(short)
    exact, ours, theirs = (
        np.array(measure_apart(*program)["losses"])
        for program in (
            ("sft", whole, "float32"),
            ("sft", whole, "bfloat16"),
            ("torch_sft", short, "bfloat16", "plain"),
        )
    )
    assert (len(exact), len(ours), len(theirs)) == (50, 50, 10)
    assert exact[-10:].mean() < exact[:10].mean(), "nothing was learnt"
    allowed = np.abs(theirs / exact[:10] - 1).mean()
    assert np.abs(ours / exact - 1)[:10].mean() <= allowed
    assert np.abs(ours / exact - 1).mean() <= 1e-2
