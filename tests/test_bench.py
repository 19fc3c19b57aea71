"""`humpback bench`: if these fail, a figure that the documents quote is not what it says."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from humpback_jax.bench.ours import matmul_rate, prefill_flops
from humpback_jax.bench.workload import texts
from humpback_jax.cli import main
from humpback_jax.errors import HumpbackError
from humpback_jax.models import load_model


def test_the_work_of_a_prefill_is_what_xla_counts() -> None:
    """One layer's products and attention, twice as many for two layers; and the head once."""
    model = load_model("tiny-random")
    config, tokens = model.config, 64
    width, inner = config.hidden_size, config.intermediate_size
    heads, groups = (n * config.head_dim for n in (4, 2))
    own = prefill_flops(config, 0, tokens)
    products = 2 * tokens * (width * (2 * heads + 2 * groups) + 3 * width * inner)
    scores = 4 * heads * tokens * (tokens + 1) / 2
    assert own == 2 * (products + scores) + 2 * width * config.vocab_size
    counted = jax.jit(lambda x, w: x @ w).lower(np.ones((64, 64)), np.ones((64, 128))).compile()
    assert counted.cost_analysis()["flops"] == 2 * 64 * 64 * 128
    after_prefix = prefill_flops(config, 100, tokens) - own
    assert after_prefix == config.num_hidden_layers * 4 * heads * tokens * 100


def test_the_matmul_rate_is_that_of_this_machine() -> None:
    rate = matmul_rate(load_model("tiny-random").config, 64, "float32")
    assert 1e7 < rate < 1e15


def test_the_work_is_real_segments_of_the_lengths_asked_for() -> None:
    model = load_model("tiny-random")
    found = texts(model, "pydoc_topics", 9, 200, 900)
    assert len(set(found)) == 9
    assert all(200 <= len(model.tokenizer.encode(text)) <= 900 for text in found)
    with pytest.raises(HumpbackError, match="segments of 1 to 2 tokens, 3 are wanted"):
        texts(model, "pydoc_topics", 3, 1, 2)


def test_ours_and_transformers_do_the_same_work_and_the_results_are_written(
    tmp_path, capsys
) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", "sample", "--model=tiny-random", "--rows=9", "--longest=800"]
    arguments += ["--max-tokens=6", "--batch-size=4", "--vs=hf", f"--out={out}", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads(out.read_text())
    assert printed["ratio"] == result["ratio"]
    ours, theirs = result["ours"], result["peers"]["hf"]
    assert theirs["same_text"] == 1.0
    assert ours["new_tokens"] == theirs["new_tokens"]
    assert result["ratio"]["hf"] == pytest.approx(ours["rows_per_s"] / theirs["rows_per_s"])
    assert 0 < result["matmul_share"] == ours["matmul_share"]
    assert ours["programs"] <= 8
    assert ours["shared_tokens"] > 0


def test_an_unknown_peer_is_refused_before_anything_is_measured(monkeypatch, capsys) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    assert main(["bench", "sample", "--vs=vllm"]) != 0
    assert "known: hf" in capsys.readouterr().err
