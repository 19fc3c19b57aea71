"""Mixtures: if these fail, a source is seen more or less, or counts for more, than users asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import tiny_config

from humpback_jax.cli import main
from humpback_jax.config import default_config
from humpback_jax.errors import HumpbackError
from humpback_jax.loop import prepare
from humpback_jax.models import load_checkpoint
from humpback_jax.overrides import set_field
from humpback_jax.training.examples import ExampleIndex, keys_of, numbered
from humpback_jax.training.mixture import (
    Share,
    check_sources,
    loss_weights,
    parse_mixture,
    pools_of,
    shares_of,
    source_counts,
)
from humpback_jax.training.order import BatchOrder

SOURCES = ("seed", "web")


def index_with(seed: int, web: int) -> ExampleIndex:
    identities = [("seed", f"id-{i}") for i in range(seed)] + [
        ("web", f"id-{i}") for i in range(web)
    ]
    names, sources = numbered([source for source, _ in identities])
    ones = np.ones(len(identities), np.int32)
    return ExampleIndex(keys_of(identities), 9 * ones, 4 * ones, sources, names)


def order_of(index: ExampleIndex, mixture: list[Share], seed: int = 0, size: int = 1) -> BatchOrder:
    pools = pools_of(index.keys, index.sources, shares_of(index.names, mixture))
    return BatchOrder(index.keys, size, seed, pools)


def epoch(order: BatchOrder, number: int) -> list[int]:
    steps = range(number * order.epoch_examples, (number + 1) * order.epoch_examples)
    return [int(order.indices(step)[0]) for step in steps]


draws = st.one_of(
    st.builds(dict, repeat=st.floats(0.1, 3.5)), st.builds(dict, count=st.integers(1, 40))
)


@given(st.integers(1, 9), st.integers(1, 9), draws, st.integers(0, 3))
def test_an_epoch_draws_from_each_source_what_was_asked(seed_rows, web_rows, amount, seed) -> None:
    """And nobody is drawn twice more often than another of its source when an epoch ends."""
    index, share = index_with(seed_rows, web_rows), Share("web", **amount)
    order = order_of(index, [share], seed)
    wanted = share.count or max(round(share.repeat * web_rows), 1)
    assert order.epoch_examples == seed_rows + wanted
    seen: Counter[int] = Counter()
    for number in range(4):
        drawn = epoch(order, number)
        assert sum(index.sources[drawn] == 0) == seed_rows
        assert sum(index.sources[drawn] == 1) == wanted
        seen.update(drawn)
        assert {seen[i] for i in range(seed_rows)} == {number + 1}
        web = [seen[i] for i in range(seed_rows, seed_rows + web_rows)]
        assert max(web) - min(web) <= 1


@given(st.permutations(range(14)), st.integers(1, 9), st.integers(0, 5))
def test_a_cap_keeps_the_same_examples_in_any_order_and_under_any_seed(
    permutation, cap, seed
) -> None:
    index = index_with(5, 9)
    mixture = [Share("web", cap=cap)]
    kept = {index.keys[i] for i in epoch(order_of(index, mixture), 0)}
    assert len(kept) == 5 + cap
    moved = ExampleIndex(
        index.keys[permutation],
        index.lengths,
        index.supervised,
        index.sources[permutation],
        index.names,
    )
    order = order_of(moved, mixture, seed)
    assert {moved.keys[i] for i in epoch(order, 1)} == kept
    smaller = {index.keys[i] for i in epoch(order_of(index, [Share("web", cap=1)]), 0)}
    assert smaller <= kept, "a larger cap adds examples and changes none"


@given(st.integers(1, 5), st.integers(0, 9), st.permutations(range(14)), draws)
def test_batches_of_a_mixture_depend_on_seed_and_step_alone(
    size, step, permutation, amount
) -> None:
    index, mixture = index_with(5, 9), [Share("web", **amount)]
    moved = ExampleIndex(
        index.keys[permutation],
        index.lengths,
        index.supervised,
        index.sources[permutation],
        index.names,
    )
    one = index.keys[order_of(index, mixture, 7, size).indices(step)]
    used = order_of(moved, mixture, 7, size)
    for other in (step + 3, 0):
        used.indices(other)
    assert np.array_equal(moved.keys[used.indices(step)], one)


def test_a_mixture_that_asks_for_nothing_changes_nothing() -> None:
    index = index_with(5, 9)
    plain = BatchOrder(index.keys, 3, 0)
    mixed = order_of(index, [Share("web"), Share("seed", repeat=1.0, cap=5)], size=3)
    assert all(np.array_equal(plain.indices(t), mixed.indices(t)) for t in range(12))
    assert loss_weights(shares_of(SOURCES, [])) == ()
    assert loss_weights(shares_of(SOURCES, [Share("web", 0.5)])) == (1.0, 0.5)


def test_the_written_form_says_all_that_a_share_can() -> None:
    found = parse_mixture(["web:weight=0.5:cap=1000:repeat=1.5", "chat:count=7", "seed"])
    assert found == (Share("web", 0.5, 1000, 1.5), Share("chat", count=7), Share("seed"))
    config = default_config()
    set_field(config, "train.mixture", ["web:weight=0.5:cap=2,seed:repeat=2"])
    assert parse_mixture(config.train.mixture) == (Share("web", 0.5, 2), Share("seed", repeat=2.0))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("web:cap=0", "web:cap=0 must be above 0; leave web out"),
        ("web:weight=0", "web:weight=0.0 must be above 0"),
        ("web:weight=nan", "must be above 0"),
        ("web:weight=inf", "must be above 0"),
        ("web:repeat=-1", "must be above 0"),
        ("web:cap=1.5", "'cap=1.5' in .* is not known"),
        ("web:wieght=1", "'wieght=1' in .* is not known; .*weight, cap, repeat, count"),
        ("web=0.5", "not of the form"),
        (":cap=3", "not of the form"),
        ("web:count=3:repeat=2", "both repeat and count"),
        ("seed", "named twice"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(HumpbackError, match=complaint):
        parse_mixture(["seed", text])


def test_a_source_that_there_is_not_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    with pytest.raises(HumpbackError, match=r"no source 'wed'; the sources are: seed, web"):
        check_sources([Share("wed")], SOURCES)
    config = tiny_config()
    config.train.mixture = ("wed:weight=2",)
    with pytest.raises(HumpbackError, match="no source 'wed'"):
        prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_counts_by_source_are_of_the_examples_in_use() -> None:
    counts = source_counts(index_with(5, 9), [Share("web", 0.5, cap=4, repeat=2)])
    assert counts["seed"] == {
        **{"examples": 5, "draws": 5, "tokens": 45, "supervised_tokens": 20, "weight": 1.0}
    }
    assert counts["web"] == {
        **{"examples": 4, "draws": 8, "tokens": 36, "supervised_tokens": 16, "weight": 0.5}
    }


def trained(folder: Path, capsys: Any, *extra: str) -> dict[str, Any]:
    arguments = ["train", "--model=tiny-random", f"--out={folder}", "--json", "--preview=0"]
    assert main([*arguments, *extra]) == 0
    printed = capsys.readouterr().out
    assert "of the computed places hold tokens" in printed
    return json.loads(printed.splitlines()[-1])


def test_train_mixes_files_and_says_what_it_took(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs, and plain text against forgetting, with a weight."""
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    pairs = [{"id": str(i), "instruction": f"Say {i}", "output": str(i)} for i in range(8)]
    texts = [{"id": str(i), "text": f"Number {i} is a number."} for i in range(6)]
    for name, rows in (("pairs", pairs), ("texts", texts)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = [f"--data={tmp_path / 'pairs.jsonl'}", f"--data=plain={tmp_path / 'texts.jsonl'}"]
    out = tmp_path / "model"
    mix = ["--mix=plain:weight=0.1:cap=4:repeat=2", "--config.train.batch_examples=4"]
    mix += [part.replace("--data", "--heldout") for part in data] + ["--config.train.eval_every=4"]
    mix += ["--config.train.checkpoint_epochs=true"]
    found = trained(out, capsys, *data, *mix)
    assert found["sources"]["seed"]["draws"] == found["sources"]["seed"]["examples"] == 8
    assert found["sources"]["plain"]["examples"] == 4
    assert found["sources"]["plain"]["draws"] == 8
    assert found["sources"]["plain"]["weight"] == 0.1
    assert 0 < found["packing_efficiency"] <= 1
    *log, checked = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert len(log) == (8 + 8) // 4, "one epoch"
    names = ("validation_nll/plain", "validation_nll", "validation_nll/seed")
    by_size = sorted(checked[name] for name in names)
    assert by_size[1] == checked["validation_nll"] and by_size[0] < by_size[2]
    assert {"loss/seed", "loss/plain"} <= {key for row in log for key in row}
    seen = sum(row.get("supervised_tokens/plain", 0) for row in log)
    assert seen == 2 * found["sources"]["plain"]["supervised_tokens"]
    assert load_checkpoint(out).tags == "S_a"
    epoch = load_checkpoint(out / "epoch_1")
    assert epoch.tags == "S_a", "an epoch's model is prompted in another way than it was trained"
    assert not list((out / "resume").rglob("*.u32")), "tokens are not kept unasked"


def test_train_refuses_a_mixture_of_other_sources_and_an_empty_one(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "Some text."}) + "\n", encoding="utf-8")
    arguments = ["train", "--model=tiny-random", f"--data={path}", f"--out={tmp_path / 'm'}"]
    assert main([*arguments, "--mix=web:cap=3"]) == 1
    assert "no source 'web'; the sources are: seed" in capsys.readouterr().err
    assert main([*arguments, "--config.train.row_tokens=3", "--config.train.on_long=drop"]) == 1
    assert "rows.jsonl: no training example is left of 1" in capsys.readouterr().err


def test_rows_read_in_another_form_than_meant_are_trained_on_unseen(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    forms = {"inputs+targets": {"inputs": "a", "targets": "b"}, "text": {"text": "Some text."}}
    for form, row in forms.items():
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        arguments = ["train", "--model=tiny-random", f"--data={path}", f"--out={tmp_path / 'm'}"]
        short = ["--config.train.row_tokens=3", "--config.train.on_long=drop"]  # ends before a step
        assert main([*arguments, *short]) == 1
        assert f"rows.jsonl: its first row has the form {form}" in capsys.readouterr().out
