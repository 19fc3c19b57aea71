"""`humpback bench`: if these fail, a figure that the documents quote is not what it says."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from humpback_jax.bench import gpu, rate, roofline
from humpback_jax.bench.limits import copy_bandwidth, matmul_rate, prefill_flops
from humpback_jax.bench.pairs import PairsJob, read_pairs
from humpback_jax.bench.process import Compilations, cpu_model, measure_apart, with_versions
from humpback_jax.bench.score import best_of, gains
from humpback_jax.bench.workload import Case, choose_cases, texts
from humpback_jax.cli import main
from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import flatten, init_params
from humpback_jax.model.shapes import SHAPES
from humpback_jax.models import load_model
from humpback_jax.stages.sources import packaged_pairs


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
    with_more_logits = prefill_flops(config, 0, tokens, 5) - own
    assert with_more_logits == 4 * 2 * width * config.vocab_size


def test_the_rates_are_those_of_this_machine() -> None:
    assert 1e7 < matmul_rate(load_model("tiny-random").config, 64, "float32") < 1e15
    assert 1e7 < copy_bandwidth(1 << 22) < 1e14


@functools.cache
def tiny_kernels() -> int:
    """Elements of all matrices but the table of embeddings, of which a step reads a few rows."""
    config = SHAPES["tiny"]
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), layout="unrolled"))
    kernels = {path: leaf.size for path, leaf in flatten(shapes).items() if leaf.ndim == 2}
    return sum(size for path, size in kernels.items() if "embed" not in path)


@given(batch=st.integers(1, 300), length=st.integers(1, 4096))
def test_a_step_reads_every_weight_but_the_embeddings_and_each_row_s_keys_and_values(
    batch: int, length: int
) -> None:
    config, weights = SHAPES["tiny"], tiny_kernels()
    own = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length
    found = roofline.step_bytes(config, batch, length, itemsize=2, cached=4)
    assert found == 2 * weights + 4 * batch * own


def test_the_shapes_have_the_parameters_that_their_names_say() -> None:
    for name, billions in (("tinyllama", 1.1), ("llama2_7b", 6.74)):
        config = SHAPES[name]
        shapes = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))
        found = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert found == pytest.approx(billions * 1e9, rel=0.01)


def test_random_weights_by_shape_write_text_and_an_unknown_shape_is_refused() -> None:
    model = load_model("random:tiny")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    assert model.config == load_model("tiny-random").config
    with pytest.raises(HumpbackError, match="known: tiny, tinyllama"):
        load_model("random:llama_9000b")


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
    assert 0 < ours["programs"] <= 8
    assert ours["shared_tokens"] > 0
    assert result["environment"]["packages"]["torch"] == version("torch")


@pytest.mark.slow
def test_every_case_is_measured_and_the_best_precision_of_each_system_counts(
    tmp_path, capsys
) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", "sample", "--model=tiny-random", "--case=all", "--rows=9", "--vs=hf"]
    arguments += ["--max-tokens=4", "--batch-size=4", "--precision=best", f"--out={out}"]
    assert main(arguments) == 0
    result = json.loads(out.read_text())
    assert list(result["cases"]) == ["mixed", "single", "short", "long"]
    assert result["ours"] == result["cases"]["mixed"]["ours"]
    assert result["cases"]["single"]["peers"]["hf"]["batch"] == 1
    assert result["cases"]["single"]["workload"]["rows"] == 2
    for compared in result["cases"].values():
        for system in (compared["ours"], compared["peers"]["hf"]):
            rates = {precision: rows for precision, rows in system["all_rows_per_s"]}
            assert set(rates) == {"float32", "bfloat16"}
            assert system["rows_per_s"] == rates[system["precision"]] == max(rates.values())
    short, long = (result["cases"][name]["workload"]["prompt_tokens"] for name in ("short", "long"))
    assert short["max"] < long["min"]


@pytest.mark.slow
@pytest.mark.real_model
def test_llama_cpp_writes_what_we_write_but_where_its_rounding_decides(tmp_path) -> None:
    """It multiplies in eight bits; texts of mixed-up sequences would hardly ever agree."""
    pytest.importorskip("llama_cpp")
    out = tmp_path / "bench.json"
    arguments = ["bench", "sample", "--rows=12", "--max-tokens=6", "--batch-size=4"]
    assert main([*arguments, "--vs=llamacpp", f"--out={out}"]) == 0
    peer = json.loads(out.read_text())["peers"]["llamacpp"]
    assert peer["precision"] == "Q4_1"
    assert peer["same_text"] >= 0.5


def test_the_cases_differ_in_length_and_batch_alone() -> None:
    mixed = Case("mixed", 64, 60, 500, 32)
    cases = {case.name: case for case in choose_cases("all", mixed)}
    assert [case.slots for case in cases.values()] == [32, 1, 32, 32]
    assert cases["single"].rows == 8
    assert choose_cases("short", mixed) == [cases["short"]]
    with pytest.raises(HumpbackError, match="known: all, mixed, single"):
        choose_cases("tall", mixed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vs=vllm"], "known: hf, llamacpp"),
        (["--vs=llamacpp"], "reads GGUF files, and --model=tiny-random is none"),
        (["--case=tall"], "--case=tall is unknown"),
        (["--rounds=0"], "--rounds=0 has to be 1 or more"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused_before_anything_is_measured(
    flags, message, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")
    assert main(["bench", "sample", "--model=tiny-random", *flags]) != 0
    assert message in capsys.readouterr().err


def job(count: int = 4) -> PairsJob:
    return PairsJob("tiny-random", "builtin", "float32", 4, 8, read_pairs("builtin", count))


def test_reading_and_sharing_are_counted_as_done_and_nothing_is_compiled_while_timed() -> None:
    found = rate.measure(job(), "rubric_likelihood")
    model = load_model("tiny-random")
    prompt, encode = model.template.rubric_likelihood_prompt, model.tokenizer.encode
    pairs = [("", ""), *((pair.instruction, pair.response) for pair in job().pairs)]
    assert found["prompt_tokens"] == sum(len(encode(prompt(*pair))) for pair in pairs)
    head = encode(prompt("\n\n", "").split("\n\n\n")[0])
    assert found["shared_tokens"] % len(pairs) == 0
    assert len(head) <= found["shared_tokens"] / len(pairs) <= len(head) + 1
    assert found["unshared_tokens"] == found["prompt_tokens"] - found["shared_tokens"]
    assert found["compiled_while_timed"] == 0
    assert found["bare_prefill_seconds"] > 0 < found["seconds_without_sharing"]
    assert found["matmul_share"] > 0
    assert found["rated"] == len(job().pairs)


def test_a_response_s_own_likelihood_is_computed_once_for_all_its_instructions(
    monkeypatch,
) -> None:
    alone = rate.measure(job(), "pmi")["log_p_y"]
    assert alone["once"] and alone["tokens_computed"] == alone["tokens_needed"] > 0
    assert (alone["responses"], alone["pairs"]) == (4, 8)

    def forgetful(curator, judge, pairs, decoding, seed, scored):
        # A judge that forgets between two calls computes each response twice.
        scored.alone.clear()
        return rating(curator, judge, pairs, decoding, seed, scored)

    rating = rate.rate
    monkeypatch.setattr(rate, "rate", forgetful)
    twice = rate.measure(job(), "pmi")["log_p_y"]
    assert not twice["once"] and twice["tokens_computed"] == 2 * twice["tokens_needed"]


def test_two_copies_on_a_cpu_count_no_program_that_scores(tmp_path) -> None:
    """In a process of its own, as `humpback bench score` measures: there, a CPU is two devices."""
    job().save(tmp_path / "job.json")
    found = measure_apart("rate", tmp_path / "job.json", "rubric_likelihood")
    assert 0 < found["programs"] <= 2
    environment = found["environment"]
    if os.cpu_count() > 1:
        assert len(environment["devices"]) == 2
    assert environment["cpu"]


def test_a_measurement_s_memory_is_that_of_the_process_that_started_it() -> None:
    """Two measurements from a large process would then show the same peak, and no difference."""
    ballast = np.ones(2**30, np.uint8)
    child = "from humpback_jax.bench.process import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < ballast.nbytes


def test_a_table_does_not_say_on_what_processor_and_with_which_peers_it_was_measured(
    tmp_path, monkeypatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Fast Processor 9\n\nprocessor\t: 1\n")
    assert cpu_model(info) == "Fast Processor 9"
    info.write_text("processor\t: 0\nCPU architecture: 8\n")
    monkeypatch.setattr(platform, "processor", lambda: "aarch64")
    assert cpu_model(info) == cpu_model(tmp_path / "none") == "aarch64"
    here = {"packages": {"numpy": "1"}}
    found = with_versions(here, ["torch", "trl"])["packages"]
    assert found == {"numpy": "1", "torch": version("torch"), "trl": version("trl")}
    assert with_versions(here, []) == here


def test_compilations_are_counted() -> None:
    found = Compilations()
    step = jax.jit(lambda x: x * 3 + len(str(found)))
    step(np.ones(7)), step(np.ones(7))
    assert found.count == 1
    step(np.ones(8))
    assert found.count == 2


def test_gains_are_ratios_of_the_best_times_of_any_round() -> None:
    def result(seconds, **more):
        return {"seconds": seconds, "rows_per_s": 8 / seconds, **more}

    likelihood = [
        result(2.0, seconds_without_sharing=3.0, bare_prefill_seconds=2.5),
        result(1.0, seconds_without_sharing=4.0, bare_prefill_seconds=0.5),
    ]
    for each in likelihood:
        each |= {"prompt_tokens": 400, "unshared_tokens": 100}
    curators = {
        "rubric": best_of([result(5.0), result(4.0)]),
        "rubric_likelihood": best_of(likelihood),
        "pmi": {"log_p_y": {"once": True}},
    }
    assert curators["rubric_likelihood"]["prefill_ratio"] == 1.0 / 0.5
    assert gains(curators) == {
        "likelihood_gain": 4.0,
        "prefix_gain": 3.0,
        "prefix_gain_share": 0.75,
        "log_p_y_once": True,
    }


def test_pairs_come_from_the_package_or_a_file_and_too_few_are_an_error(tmp_path) -> None:
    packaged = packaged_pairs("train")
    assert [pair.response for pair in read_pairs("builtin", 3)] == [
        example.response for example in packaged[:3]
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"instruction": "Why?", "output": "Because."}]))
    (pair,) = read_pairs(str(path), 1)
    assert (pair.instruction, pair.response) == ("Why?", "Because.")
    with pytest.raises(HumpbackError, match="1 pairs, 2 are wanted"):
        read_pairs(str(path), 2)
    path.write_text(json.dumps([{"text": "no pair"}]))
    with pytest.raises(HumpbackError, match="is plain text"):
        read_pairs(str(path), 1)


@pytest.mark.slow
def test_bench_score_prints_a_table_and_writes_every_curator_s_figures(tmp_path, capsys) -> None:
    out = tmp_path / "score.json"
    arguments = ["bench", "score", "--model=tiny-random", "--rows=5", "--max-tokens=8"]
    assert main([*arguments, "--batch-size=4", f"--out={out}", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(out.read_text())
    assert json.loads(lines[-1]) == result
    assert {"ours", "peers", "ratio", "matmul_share"} <= set(result)
    curators = result["ours"]["curators"]
    assert list(curators) == ["rubric", "rubric_likelihood", "pmi", "combined"]
    for name, figures in curators.items():
        assert any(line.startswith(name) for line in lines)
        assert figures["compiled_while_timed"] == 0
        assert figures["programs"] > 0
        assert figures["rows_per_s"] == pytest.approx(5 / figures["seconds"])
    assert curators["rubric"]["new_tokens"] <= 5 * 8
    parts = (curators[name]["scored_tokens"] for name in ("pmi", "rubric_likelihood"))
    assert curators["combined"]["scored_tokens"] == sum(parts)
    assert result["ours"]["log_p_y_once"] is True


@pytest.mark.slow
def test_one_call_measures_a_device_and_a_part_that_fails_does_not_hide_the_others(
    tmp_path, capsys
) -> None:
    arguments = ["--shapes=tiny,unknown", "--batches=2,4", "--model=random:tiny", "--rows=6"]
    arguments.append("--train=random:tiny")
    assert gpu.main([*arguments, "--batch-size=4", f"--out={tmp_path}"]) == 1
    (path,) = tmp_path.glob("gpu_*.json")
    result = json.loads(path.read_text())
    assert [row["batch"] for row in result["tiny"]["decode"]] == [2, 4]
    for row in result["tiny"]["decode"]:
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
        # Of a tiny model, which a cache holds, more than the memory gives.
        moved = row["bytes_per_step"] / row["step_ms"] * 1e3
        bandwidth = 1e9 * result["tiny"]["copy_gbytes_per_s"]
        assert row["bandwidth_share"] == pytest.approx(moved / bandwidth)
    assert 0 < result["tiny"]["prefill"]["matmul_share"] < 1.5
    assert "no such shape" in result["unknown"]["failed"]
    trained = result["train random:tiny"]["ours"]
    assert trained["supervised_tokens_per_s"] > 0 and trained["matmul_share"] > 0
    assert np.isfinite(trained["losses"]).all()
    assert result["sample"]["ours"]["rows_per_s"] > 0
    assert result["score"]["ours"]["likelihood_gain"] > 0


def test_a_part_that_takes_too_long_is_ended_with_its_children() -> None:
    forks = "import subprocess; subprocess.run(['sleep', '60'])"
    with pytest.raises(HumpbackError, match="no time left"):
        gpu.run_until(0.0, [sys.executable, "-c", forks])


def test_a_batch_that_does_not_fit_is_left_out_with_the_reason(monkeypatch) -> None:
    monkeypatch.setattr(roofline, "_memory", lambda: 1)
    monkeypatch.setattr(roofline, "_prefill", lambda *_: {})
    (row,) = roofline.measure("tiny", [2])["decode"]
    assert row["skipped"].startswith("needs")


def test_a_job_of_pairs_is_the_same_after_a_file(tmp_path) -> None:
    job().save(tmp_path / "job.json")
    assert dataclasses.asdict(PairsJob.load(tmp_path / "job.json")) == dataclasses.asdict(job())


def test_a_measurement_stopped_for_want_of_memory_fails_with_its_last_warning(
    tmp_path, monkeypatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'warnings.warn(' >&2\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(HumpbackError, match=r"torch_sft was stopped by SIGKILL.*memory"):
        measure_apart("torch_sft")
