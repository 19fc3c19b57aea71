"""The training loop: what it hands back, what it reports, and how it goes on after a stop.

If these fail, a preempted run ends with other weights than an unbroken one, or a broken one goes
on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from tiny_llama import from_torch, random_examples, torch_llama, torch_nll, trees_equal

from humpback_jax.checkpoint import ResumeFolder, load_params, save_params
from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import flatten, unflatten
from humpback_jax.model.lora import lora_spec
from humpback_jax.sampling.likelihood import sequence_nll
from humpback_jax.training.examples import TrainingExample, index_of
from humpback_jax.training.optimizer import OptimizerSpec, make_optimizer
from humpback_jax.training.order import BatchOrder
from humpback_jax.training.state import StepSpec, finished_params, initial_state
from humpback_jax.training.trainer import Trained, TrainSpec, train

EXAMPLES = random_examples(10)
SPEC = TrainSpec(
    steps=6,
    batch_examples=4,
    row_tokens=64,
    layout="unrolled",
    optimizer=OptimizerSpec(3e-3, 1e-3),
)
LORA = lora_spec(2, 4, 0.1, ("q", "v"))


@functools.cache
def base():
    return from_torch(torch_llama(num_hidden_layers=1))


def step_spec(spec: TrainSpec) -> StepSpec:
    return StepSpec(base()[0], 1, layout=spec.layout, precision=spec.precision, lora=spec.lora)


def run(spec: TrainSpec = SPEC, examples=EXAMPLES, **arguments) -> Trained:
    config, params = base()
    return train(config, params, examples, spec, **arguments)


class Stop(Exception):
    pass


def stop_after(step: int):
    def on_metrics(row: dict) -> None:
        if row["step"] == step and "loss" in row:
            raise Stop

    return on_metrics


VARIANTS = {
    "full": {},
    "full_scan": {"layout": "scan"},
    "adapter": {"lora": LORA, "dropout": 0.1},
    "adapter_scan": {
        "lora": dataclasses.replace(LORA, dora=True, base="int8"),
        "layout": "scan",
        "optimizer": dataclasses.replace(SPEC.optimizer, lora_plus_ratio=4.0),
    },
    "accumulated_with_dropout": {"accumulation": 2, "dropout": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_with_the_unbroken_run_s_weights_bit_for_bit(variant, tmp_path) -> None:
    spec = dataclasses.replace(SPEC, resume_every=2, **VARIANTS[variant])
    unbroken = run(spec)
    resume = ResumeFolder(tmp_path / "resume")
    with pytest.raises(Stop):
        run(spec, resume=resume, on_metrics=stop_after(5))
    rows: list[dict] = []
    resumed = run(spec, resume=ResumeFolder(tmp_path / "resume"), on_metrics=rows.append)
    assert [row["step"] for row in rows] == [5, 6], "it went on from step 4"
    assert trees_equal(resumed.params, unbroken.params)
    assert (resumed.adapter is None) == (spec.lora is None)
    if resumed.adapter is not None:
        assert trees_equal(resumed.adapter, unbroken.adapter)
    assert [row["loss"] for row in rows] == [row["loss"] for row in unbroken.history[4:]]


def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, capsys) -> None:
    spec = dataclasses.replace(SPEC, resume_every=2)
    resume = ResumeFolder(tmp_path / "resume")
    with pytest.raises(Stop):
        run(spec, resume=resume, on_metrics=stop_after(5))
    newest = sorted((tmp_path / "resume").iterdir())[-1]
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    rows: list[dict] = []
    resumed = run(spec, resume=resume, on_metrics=rows.append)
    assert rows[0]["step"] == 3
    assert "warning" in capsys.readouterr().out
    assert trees_equal(resumed.params, run(spec).params)


def test_a_state_of_another_optimizer_or_model_is_not_taken_up(tmp_path) -> None:
    """The folder belongs to one run; should another find it, it must not continue from it."""
    spec = dataclasses.replace(SPEC, resume_every=2)
    resume = ResumeFolder(tmp_path / "resume")
    with pytest.raises(Stop):
        run(spec, resume=resume, on_metrics=stop_after(3))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HumpbackError, match=r"of step 2, is of another kind of run.*delete"):
        run(dataclasses.replace(spec, **VARIANTS["adapter"]), resume=resume)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_the_newest_states_are_kept_and_none_once_deleted(tmp_path) -> None:
    resume = ResumeFolder(tmp_path / "resume", keep=2)
    run(dataclasses.replace(SPEC, resume_every=1), resume=resume)
    names = sorted(path.name for path in (tmp_path / "resume").iterdir())
    assert names == ["00000004", "00000005"], "the finished run itself needs none"
    resume.delete()
    assert not (tmp_path / "resume").exists()


def test_parameters_survive_a_checkpoint_bit_for_bit_with_their_dtypes(tmp_path) -> None:
    _, params = base()
    flat = flatten(params)
    flat[("norm", "scale")] = flat[("norm", "scale")].astype(ml_dtypes.bfloat16)
    mixed = unflatten(flat)
    save_params(tmp_path / "weights", mixed)
    again = load_params(tmp_path / "weights")
    assert trees_equal(again, mixed)
    assert again["norm"]["scale"].dtype == ml_dtypes.bfloat16
    assert all(type(leaf) is np.ndarray for leaf in flatten(again).values()), (
        "a model that no single device holds could not be read"
    )
    with pytest.raises(HumpbackError, match="nowhere"):
        load_params(tmp_path / "nowhere")


def test_the_base_is_left_as_it_was_whatever_holds_it() -> None:
    """M_t is trained from the base again in the next round."""
    config, params = base()
    for layout in ("scan", "unrolled"):
        spec = dataclasses.replace(SPEC, layout=layout)
        for held in (jax.tree.map(np.array, params), jax.tree.map(jax.numpy.array, params)):
            first = train(config, held, EXAMPLES, spec)
            assert trees_equal(held, params)
            assert not trees_equal(first.params, params)


def test_bfloat16_bases_are_trained_in_float32() -> None:
    config, params = base()
    half = jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.bfloat16), params)
    trained = train(config, half, EXAMPLES, SPEC)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained.params)} == {"float32"}


def test_metrics_tell_loss_tokens_and_sources_of_each_step() -> None:
    row = run().history[0]
    order = [e for e in EXAMPLES if e.id in _ids_of_first_batch()]
    with torch.no_grad():
        nll = torch_nll(torch_llama(num_hidden_layers=1), order).numpy()
    supervised = [example.supervised for example in order]
    assert row["loss"] == pytest.approx(nll.sum() / sum(supervised), rel=1e-5)
    assert row["supervised_tokens"] == sum(supervised)
    assert row["tokens"] == sum(example.length for example in order)
    assert row["examples"] == len(order) == 4
    assert row["learning_rate"] == pytest.approx(3e-3)
    for source in ("seed", "web"):
        places = [i for i, e in enumerate(order) if e.source == source]
        if places:
            tokens = sum(supervised[i] for i in places)
            assert row[f"supervised_tokens/{source}"] == tokens
            assert row[f"loss/{source}"] == pytest.approx(nll[places].sum() / tokens, rel=1e-5)


def _ids_of_first_batch() -> set[str]:
    indices = BatchOrder(index_of(EXAMPLES).keys, 4, SPEC.seed).indices(0)
    return {EXAMPLES[i].id for i in indices}


@pytest.mark.parametrize("log_every", [0, 1, 4])
def test_every_step_is_reported_once_however_often_rows_are_written(log_every) -> None:
    spec = dataclasses.replace(SPEC, log_every=log_every, resume_every=0)
    rows: list[dict] = []
    start = time.monotonic()
    trained = run(spec, on_metrics=rows.append)
    seconds = time.monotonic() - start
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows == trained.history
    stepping = sum(row["tokens"] / row["tokens_per_s"] for row in rows)
    found = trained.goodput
    assert stepping == pytest.approx(found["steps"] + found["data"])
    assert 0 < stepping <= sum(found.values()) - found["compile"] - found["setup"] <= seconds


def test_rates_are_those_of_the_work_not_of_its_dispatch() -> None:
    """A step returns before it has run: measured there, a minute of work would take no time."""
    sizes = {"hidden_size": 256, "vocab_size": 4096, "max_position_embeddings": 256}
    config, params = from_torch(torch_llama(num_hidden_layers=1, **sizes))
    examples = random_examples(4, 250, 200)
    spec = dataclasses.replace(SPEC, steps=3, row_tokens=256)
    arrivals: list[float] = []
    history = train(
        config, params, examples, spec, on_metrics=lambda _: arrivals.append(time.monotonic())
    ).history
    for row, seconds in zip(history[1:], np.diff(arrivals), strict=True):
        assert row["tokens"] / row["tokens_per_s"] > 0.3 * seconds


def test_an_example_longer_than_the_models_window_is_named_before_training_starts() -> None:
    config, params = base()
    window = config.max_position_embeddings
    longer = random_examples(4, window + 2, window + 2)
    spec = dataclasses.replace(SPEC, row_tokens=2 * window)
    with pytest.raises(
        HumpbackError, match=rf"row-0 takes {window + 1} places.*window has {window}"
    ):
        train(config, params, longer, spec)


def test_an_example_longer_than_a_row_is_named_before_training_starts() -> None:
    with pytest.raises(HumpbackError, match=r"row-0 takes 39 places, a row has 32.*on_long"):
        run(dataclasses.replace(SPEC, row_tokens=32), random_examples(4, 40, 40))


def test_training_lowers_the_loss_and_the_same_seed_repeats_it_in_any_order_of_the_input() -> None:
    trained = run()
    losses = [row["loss"] for row in trained.history]
    assert losses[-1] < losses[0] - 0.1
    assert trees_equal(run().params, trained.params)
    assert trees_equal(run(examples=EXAMPLES[::-1]).params, trained.params)


def test_a_loss_that_is_not_a_number_is_an_error_that_names_step_and_examples() -> None:
    config, params = base()
    scale = np.array(params["norm"]["scale"])
    scale[0] = np.inf
    broken = {**params, "norm": {"scale": scale}}
    with pytest.raises(HumpbackError, match=r"step 1: the loss is (nan|inf).*row-") as caught:
        train(config, broken, EXAMPLES, SPEC)
    assert all(name in str(caught.value) for name in _ids_of_first_batch())


@pytest.mark.parametrize("as_what", ["state", "epoch"])
def test_a_broken_model_is_never_saved(as_what, tmp_path) -> None:
    """Rows are seldom written here: the loss has to be looked at before saving all the same."""
    config, params = base()
    broken = {**params, "norm": {"scale": np.full_like(params["norm"]["scale"], np.nan)}}
    spec = dataclasses.replace(SPEC, log_every=0, checkpoint_epochs=True)
    spec = dataclasses.replace(spec, resume_every=1 if as_what == "state" else 0)
    resume, epochs = ResumeFolder(tmp_path / "resume"), []
    with pytest.raises(HumpbackError, match="loss"):
        train(config, broken, EXAMPLES, spec, resume=resume, on_epoch=lambda e, _: epochs.append(e))
    assert not (tmp_path / "resume").exists()
    assert epochs == []


@pytest.mark.parametrize("where", ["training", "validation"])
def test_an_example_without_a_supervised_token_is_an_error_that_names_it(where) -> None:
    silent = TrainingExample("silent-row", np.arange(9, dtype=np.int32), np.arange(9) < 1)
    examples = [*EXAMPLES, silent] if where == "training" else EXAMPLES
    validation = [EXAMPLES[0], silent] if where == "validation" else []
    with pytest.raises(HumpbackError, match=f"{where} example silent-row"):
        run(examples=examples, validation=validation)


def test_T30_too_little_data_is_an_error_before_anything_is_computed() -> None:
    with pytest.raises(HumpbackError, match="batch_examples"):
        run(examples=EXAMPLES[:3])


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_examples": 0}, {"accumulation": 0}, {"row_tokens": 0}], ids=str
)
def test_a_size_that_is_not_positive_is_refused_by_name(wrong) -> None:
    with pytest.raises(HumpbackError, match=next(iter(wrong))):
        run(dataclasses.replace(SPEC, **wrong))


def test_validation_rows_come_every_n_steps_and_change_nothing() -> None:
    """T-22: elsewhere, peeking shifted the training data."""
    validation = random_examples(4, seed=9)
    sources = ["seed", "web", "web", "seed"]
    validation = [
        dataclasses.replace(e, source=s) for e, s in zip(validation, sources, strict=True)
    ]
    spec = dataclasses.replace(SPEC, eval_every=2, **VARIANTS["accumulated_with_dropout"])
    trained = run(spec, validation=validation)
    rows = [row for row in trained.history if "validation_nll" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    nll, counts = sequence_nll(base()[0], trained.params, validation, spec.precision, layout="scan")
    assert rows[-1]["validation_nll"] == pytest.approx(nll.sum() / counts.sum(), rel=1e-6)
    assert rows[-1]["validation_nll"] != rows[0]["validation_nll"]
    for source in ("seed", "web"):
        own = np.array(sources) == source
        mean = nll[own].sum() / counts[own].sum()
        assert rows[-1][f"validation_nll/{source}"] == pytest.approx(mean, rel=1e-6)
    assert trees_equal(run(dataclasses.replace(spec, eval_every=0)).params, trained.params)


@pytest.mark.parametrize("variant", ["full", "full_scan", "adapter"])
def test_epochs_are_handed_out_when_their_last_example_is_seen(variant, tmp_path) -> None:
    """10 examples by 4: epochs end within steps 3 and 5."""
    spec = dataclasses.replace(SPEC, resume_every=1, checkpoint_epochs=True, **VARIANTS[variant])
    steps: list[int] = []
    epochs: dict[int, tuple[int, dict]] = {}

    def on_epoch(epoch: int, params: dict) -> None:
        epochs[epoch] = (len(steps), jax.tree.map(np.array, params))

    resume = ResumeFolder(tmp_path / "resume")
    run(spec, resume=resume, on_metrics=lambda row: steps.append(row["step"]), on_epoch=on_epoch)
    assert {epoch: step for epoch, (step, _) in epochs.items()} == {1: 3, 2: 5}
    optimizer = make_optimizer(spec.optimizer, spec.steps)
    # An adapter is saved after the last step, too, before it is merged.
    shutil.rmtree(tmp_path / "resume" / "00000006", ignore_errors=True)
    state = resume.restore(initial_state(step_spec(spec), base()[1], optimizer, spec.seed))
    assert int(state.step) == 5
    assert trees_equal(epochs[2][1], finished_params(state, step_spec(spec), base()[1])[0])
    assert not trees_equal(epochs[1][1], epochs[2][1])


def test_an_epoch_whose_saving_was_killed_is_missing_after_the_restart(tmp_path) -> None:
    spec = dataclasses.replace(SPEC, resume_every=1, checkpoint_epochs=True)

    def killed(epoch: int, params: dict) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(spec, resume=ResumeFolder(tmp_path / "resume"), on_epoch=killed)
    epochs: list[int] = []
    resume = ResumeFolder(tmp_path / "resume")
    run(spec, resume=resume, on_epoch=lambda epoch, _: epochs.append(epoch))
    assert epochs == [1, 2]


def test_without_the_setting_no_epoch_is_handed_out() -> None:
    seen: list[int] = []
    run(on_epoch=lambda epoch, _: seen.append(epoch))
    assert seen == []


def test_fresh_state_holds_one_copy_of_what_is_trained() -> None:
    _, params = base()
    with_adapter = step_spec(dataclasses.replace(SPEC, lora=LORA))
    full = initial_state(step_spec(SPEC), params, optax.sgd(1.0), seed=0)
    adapted = initial_state(with_adapter, params, optax.sgd(1.0), seed=0)
    assert full.frozen == {}
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert sum(leaf.size for leaf in jax.tree.leaves(full.trainable)) == size
    assert sum(leaf.size for leaf in jax.tree.leaves(adapted.frozen)) == size
    assert sum(leaf.size for leaf in jax.tree.leaves(adapted.trainable)) == 2 * 128 + 2 * 96


def test_a_checkpoint_folder_under_way_is_replaced_not_mixed(tmp_path: Path) -> None:
    _, params = base()
    save_params(tmp_path / "weights", params)
    changed = {**params, "norm": {"scale": params["norm"]["scale"] + 1}}
    save_params(tmp_path / "weights", changed)
    assert trees_equal(load_params(tmp_path / "weights"), changed)


def test_a_step_that_memory_does_not_hold_is_called_a_defect() -> None:
    """Attention of rows so long takes more than a terabyte."""
    config = dataclasses.replace(base()[0], max_position_embeddings=1 << 17)
    examples = random_examples(2, longest=100_000, shortest=100_000)
    spec = dataclasses.replace(SPEC, layout="scan", batch_examples=2, row_tokens=100_000)
    with pytest.raises(
        HumpbackError, match=r"micro-batch of 2 x 100,000 tokens.*EXHAUSTED"
    ) as told:
        train(config, base()[1], examples, spec)
    for setting in ("accumulation=2", "remat=full", "row_tokens", "lora.rank", "larger mesh"):
        assert setting in str(told.value)
