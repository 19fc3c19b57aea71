"""Estimates for slices: if these fail, users plan weeks of training by wrong figures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from humpback_jax.aot.estimate import (
    Costs,
    Exchange,
    Roofline,
    attention_costs,
    bytes_by_kind,
    compiled_costs,
    exchanged,
    loss_costs,
    needed_flops,
    step_costs,
)
from humpback_jax.aot.hlo import collectives
from humpback_jax.aot.memory import Compiled, bytes_report, compile_program, held_bytes
from humpback_jax.aot.programs import described, training_plan
from humpback_jax.aot.suggest import candidates, flags, predicted_costs, shapes, unfilled_line
from humpback_jax.aot.summary import summary_lines
from humpback_jax.aot.table import check_lines, fill_table, table_lines, write_page
from humpback_jax.aot.train import (
    TrainPlan,
    lower_step,
    most_rows,
    plan_training,
    state_of,
)
from humpback_jax.config import default_config
from humpback_jax.errors import HumpbackError
from humpback_jax.model.kernels import Kernels
from humpback_jax.model.llama import count_parameters
from humpback_jax.model.lora import lora_spec
from humpback_jax.model.shapes import SHAPES
from humpback_jax.overrides import set_field
from humpback_jax.parallel.mesh import AXES
from humpback_jax.parallel.rules import check_sharded
from humpback_jax.parallel.topology import CHIPS
from humpback_jax.training.examples import ExampleIndex
from humpback_jax.training.loss import chunk_size
from humpback_jax.training.order import BatchOrder
from humpback_jax.training.packing import plan_packing
from humpback_jax.training.trainer import TrainSpec

ROOT = Path(__file__).parent.parent
PROGRAM = """
  %ag = bf16[8,1024]{1,0} all-gather(bf16[1,1024]{1,0} %x), channel_id=1, replica_groups=[4,8]<=[32]
  %ars = (f32[16]{0}, f32[4]{0}) all-reduce(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}
  %rs = f32[2,4]{1,0} reduce-scatter(f32[8,4]{1,0} %y), replica_groups={{0,1,2,3}}, dimensions={0}
  %ags = (bf16[8]{0}, bf16[32]{0}) all-gather-start(bf16[8]{0} %z), replica_groups=[8,4]<=[32]
  %arm = f32[8]{0} all-reduce(%m), replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}
  %art = f32[8]{0:T(8)} all-reduce(%n), replica_groups=mesh['a'=4,'b'=8] {'a','b':(2)4}, x={{0}}
  %agd = bf16[32]{0} all-gather-done((bf16[8]{0}, bf16[32]{0}) %ags)
  %cp = pred[64]{0} collective-permute(pred[64]{0} %p), source_target_pairs={{0,1},{1,0}}
%all-reduce-scatter.1 (input.1: f32[8,4]) -> f32[2,4] {
  %sum = f32[8,4]{1,0} all-reduce(%input.1), replica_groups={{0,1,2,3}}, to_apply=%add.1
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %whole = f32[4]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add.1
"""


def plan_of(layers: int, rows: int = 1, tokens: int = 64, **settings: object) -> TrainPlan:
    config = dataclasses.replace(SHAPES["tiny"], num_hidden_layers=layers)
    run = TrainSpec(1, row_tokens=tokens, **settings)  # type: ignore[arg-type]
    return plan_training(config, run, jax.devices()[:1], None, rows)


def test_bytes_between_devices_are_counted_twice_or_by_the_wrong_ring() -> None:
    sent = bytes_by_kind(exchanged(PROGRAM, tensor=1))
    assert sent == {
        "all-gather": 8 * 1024 * 2 * 7 / 8 + 32 * 2 * 3 / 4,
        "all-reduce": 2 * (16 + 4) * 4 * 3 / 4 + 2 * 32 * 7 / 8 + 2 * 32 * 15 / 16 + 2 * 16 * 3 / 4,
        "reduce-scatter": 2 * (2 * 4 * 4 * 3),
        "collective-permute": 64,
    }


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("[2,8]<=[16]", tuple(range(8))),
        ("[4,4]<=[8,2]T(1,0)", (0, 2, 4, 6)),
        ("[4,4]<=[2,4,2]T(0,2,1)", (0, 2, 4, 6)),
        ("mesh['a'=8,'b'=1,'c'=2] {'c'}", (0, 1)),
        ("mesh['a'=8,'b'=2] {'a'}", tuple(range(0, 16, 2))),
        ("mesh['a'=2,'b'=4,'c'=2], device_ids=([2,4,2]T(2,1,0)) {'a'}", (0, 1)),
        ("mesh['a'=4,'b'=4], device_ids=([2,4,2]T(1,0,2)) {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2,'c'=2], device_ids=([2,8]T(1,0)) {'b'}", (0, 1)),
        ("mesh['a'=2,'b'=8] {'a','b':(2)4}", (0, 1, 2, 3, 8, 9, 10, 11)),
    ],
)
def test_an_exchange_is_taken_for_one_of_other_devices(groups: str, first: tuple[int, ...]) -> None:
    (found,) = collectives(f"  %x = f32[8]{{0}} all-gather(%y), replica_groups={groups}, x=1")
    assert found.group == first


def test_partial_sums_look_free_or_sums_of_gradients_do_not() -> None:
    """Layers need the former at once; the latter are added up beside the products of others."""
    lines = {
        "{{0,1},{2,3}}": Exchange("all-reduce", waited_for=True),
        "{{0,2},{1,3}}": Exchange("all-reduce"),
        "{{0,1,2,3}}": Exchange("all-reduce"),
    }
    for groups, expected in lines.items():
        program = f"  %x = f32[8]{{0}} all-reduce(%y), replica_groups={groups}"
        assert [*exchanged(program, tensor=2)] == [expected]
    together = "  %x = (f32[8]{0}, f32[8]{0}) all-reduce(%y, %z), replica_groups={{0,2},{1,3}}"
    assert [*exchanged(together, tensor=2)] == [Exchange("all-reduce", waited_for=True)]


def test_sums_along_all_sides_of_a_slice_take_as_long_as_along_one() -> None:
    strategies = {"UniDirectionNDRingStrategy": True, "StrategyND": True, "StrategyRing": False}
    for strategy, all_sides in strategies.items():
        (sent,) = exchanged(
            "  %x = f32[8]{0} all-reduce(%y), replica_groups={{0,1}}, backend_config="
            f'{{"emitter":"RotatedPincerEmitter","strategy":"{strategy}"}}',
            tensor=1,
        )
        assert sent.all_sides is all_sides
    chip = CHIPS["v5p"]
    assert Exchange("all-reduce").seconds(chip.links, chip) == 2
    assert Exchange("all-reduce", all_sides=True).seconds(chip.links, chip) == 1


def test_an_exchange_beside_products_counts_once_for_each_of_its_pieces() -> None:
    piece = "  %x = bf16[32]{{0}} all-gather(%y), channel_id={}, replica_groups={{{{0,1}}}}\n"
    program = "".join(
        f"%{name} (y: bf16[16]) -> bf16[32] {{\n{piece.format(channel)}}}\n"
        for name, channel in (
            ("fused_computation.1", 7),
            ("async_collective_fusion.2", 7),
            ("fused_computation.3", 7),
            ("fused_computation.4", 8),
        )
    )
    assert len(collectives(program)) == 2
    whole = piece.format(9)
    assert len(collectives(whole + whole)) == 2, "two of their own"


def test_a_layer_more_costs_something_else_than_the_difference_of_two_compiles() -> None:
    plan = plan_of(4, layout="unrolled")
    whole = compiled_costs(lower_step(plan)[0].compile())
    estimated = step_costs(plan)
    assert estimated.flops == pytest.approx(whole.flops, rel=0.01)


def test_the_mathematics_of_a_step_is_not_six_operations_a_weight_and_a_token() -> None:
    config = SHAPES["7b"]
    run = TrainSpec(1, row_tokens=2048)
    plan = plan_training(config, run, jax.devices()[:1], None, 2)
    weights = count_parameters(config) - 32000 * 4096
    attention = 3 * 4 * 2 * 2048**2 / 2 * 4096 * 32
    assert needed_flops(plan) == pytest.approx(6 * weights * 4096 + attention)
    adapted = plan_training(
        config,
        dataclasses.replace(run, lora=lora_spec(8, 16, 0.0, ("q",))),
        jax.devices()[:1],
        None,
        2,
    )
    assert needed_flops(adapted) == pytest.approx(4 * weights * 4096 + attention)


def test_kernels_of_a_layer_that_is_computed_again_cost_nothing() -> None:
    plan = plan_of(1, kernels=Kernels.of_platform("tpu"))
    full = plan_of(1, kernels=Kernels.of_platform("tpu"), remat="full")
    assert attention_costs(full).flops == pytest.approx(attention_costs(plan).flops * 11 / 9)
    assert attention_costs(plan_of(1)).flops == 0, "XLA counts its own"


@pytest.mark.parametrize("places", [512, 1024, 4096])
def test_chunks_of_a_short_row_s_loss_are_left_out(places: int) -> None:
    """XLA counts the first chunk of a loop; the head is computed at every place."""
    plan = plan_of(1, tokens=places)
    head = plan.config.hidden_size * plan.config.vocab_size
    counted = 6 * chunk_size(places) * head
    assert loss_costs(plan).flops + counted == pytest.approx(6 * places * head)
    assert counted < 6 * places * head, "there are several"


def test_micro_batches_update_the_parameters_once_each() -> None:
    alone, four = plan_of(2, accumulation=1), plan_of(2, accumulation=4)
    assert four.tokens == 4 * alone.tokens
    one, several = step_costs(alone), step_costs(four)
    assert several.flops == pytest.approx(4 * one.flops)
    held = state_of(alone)
    update = 3 * held_bytes(held.trainable) + 2 * held_bytes(held.optimizer)
    added = 3 * held_bytes(held.trainable)
    assert several.memory == pytest.approx(4 * one.memory + 3 * (added - update))


def test_a_step_is_faster_than_the_slowest_of_its_parts() -> None:
    chip = CHIPS["v5p"]
    sums = Exchange("all-reduce", waited_for=True)
    sent = {Exchange("all-gather"): chip.links, sums: chip.links}
    costs = Costs(chip.flops, chip.bandwidth, sent)
    roofline = Roofline.of(costs, chip)
    assert roofline.seconds >= max(roofline.products, roofline.memory, roofline.hidden)
    assert roofline.seconds == pytest.approx(roofline.hidden + roofline.waited_for)


def _alone() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_a_program_that_was_refused_fits() -> None:
    report = bytes_report(Compiled(None, 1.0, 20 * 2**30), {}, CHIPS["v5e"])
    assert not report["fits"]
    assert report["bytes_per_device"] == 20 * 2**30
    held = {"cache": jax.ShapeDtypeStruct((2**30,), "int8", sharding=_alone())}
    beside = bytes_report(Compiled(None, 1.0, 20 * 2**30, beside=True), held, CHIPS["v5e"])
    assert beside["bytes_per_device"] == 21 * 2**30
    assert beside["bytes_by_kind"] == {"cache": 2**30, "activations": 20 * 2**30}


def test_the_kinds_of_bytes_do_not_add_up_or_forget_the_optimizer() -> None:
    lowered, state, batch = lower_step(plan_of(1))
    arguments = {
        "parameters": state.trainable,
        "optimizer": state.optimizer,
        "gradients": state.trainable,
        "batch": batch,
    }
    report = bytes_report(compile_program(lowered), arguments, CHIPS["v5e"])
    kinds = report["bytes_by_kind"]
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(state.trainable))
    assert kinds["parameters"] == kinds["gradients"] == parameters
    assert kinds["optimizer"] == pytest.approx(2 * parameters, rel=1e-3)
    assert sum(kinds.values()) == report["bytes_per_device"]
    assert report["fits"]


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_an_adapter_on_an_int8_base_cannot_be_planned_or_takes_the_room_of_float32(layout) -> None:
    spec = lora_spec(4, 8, 0.0, ("q", "v"))
    wide, narrow = (
        lower_step(plan_of(2, layout=layout, lora=dataclasses.replace(spec, base=base)))[1]
        for base in ("auto", "int8")
    )
    assert held_bytes(narrow.frozen) == pytest.approx(held_bytes(wide.frozen) / 4, rel=0.1)
    assert held_bytes(narrow.trainable) == held_bytes(wide.trainable)


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))
def test_a_run_computes_more_rows_at_a_time_than_were_compiled_for_it(
    examples: int, parts: int, accumulation: int
) -> None:
    """Of examples of which no two share a row."""
    lengths = np.full(examples, 100, np.int32)
    index = ExampleIndex(
        np.arange(examples, dtype=np.uint64), lengths, lengths, np.zeros_like(lengths), ("seed",)
    )
    order = BatchOrder(index.keys, examples, 0)
    packed = plan_packing(index, order, 1, 128, accumulation, parts)
    assert packed.micro_rows == parts * most_rows(examples, parts, accumulation)


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, 32),  # the step table's largest batch
        ({"accumulation": "3"}, 11),
        ({"epochs": "1", "batch_examples": "10"}, 10),
        ({"steps": "5", "batch_examples": "10", "accumulation": "2"}, 5),
    ],
)
def test_aot_compiles_one_row_where_a_batch_of_the_config_takes_more(
    fields: dict[str, str], rows: int
) -> None:
    config = default_config()
    for name, value in fields.items():
        set_field(config, f"train.{name}", [value])
    plan = training_plan(config, SHAPES["tiny"], jax.devices()[:1], None)
    assert plan.rows == rows
    (text, *_) = _train_lines(plan)
    assert f"the most that batches of {plan.run.batch_examples} examples take" in text
    asked = training_plan(config, SHAPES["tiny"], jax.devices()[:1], 3)
    assert asked.rows == 3
    assert "the most" not in " ".join(_train_lines(asked))


def _train_lines(plan: TrainPlan) -> list[str]:
    report = {**described(plan), "bytes_per_device": 1, "bytes_by_kind": {}, "hbm_bytes": 1}
    lines = list(summary_lines({"train": {**report, "fits": False, "compile_s": 1.0}}))
    return lines[1:]


def test_suggested_rows_are_not_those_of_a_run_with_the_suggested_flags() -> None:
    run = TrainSpec(1, batch_examples=20, row_tokens=64)
    plans = list(candidates(SHAPES["tiny"], run, jax.devices()[:1], CHIPS["v5e"], limited=True))
    ways = {(plan.rows, plan.micro_batches) for plan in plans}
    assert ways == {(1, 20), (2, 10), (4, 5), (7, 3), (10, 2)}
    for plan in plans:
        assert most_rows(20, 1, plan.micro_batches) == plan.rows
        assert f"--config.train.accumulation={plan.micro_batches}" in flags(described(plan))
    of_any_batch = candidates(SHAPES["tiny"], run, jax.devices()[:1], CHIPS["v5e"])
    assert {(plan.rows, plan.micro_batches) for plan in of_any_batch} == {
        (rows, 1) for rows in (1, 2, 4, 8, 16)
    }


def test_micro_batches_look_free_to_the_search() -> None:
    once = predicted_costs(plan_of(2, rows=2))
    four = predicted_costs(plan_of(2, rows=2, accumulation=4))
    assert four.flops == pytest.approx(4 * once.flops)
    assert once.memory < four.memory < 4 * once.memory, "one update"


def test_a_slice_that_a_batch_does_not_fill_is_praised_for_all_of_its_rows() -> None:
    report = {"mesh": {"data": 1, "fsdp": 64, "tensor": 2}, "rows": 1, "micro_batches": 1}
    assert "32 of the 64 rows" in unfilled_line(report, 32)
    assert unfilled_line(report, 64) == ""


@given(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 256]), st.sampled_from(["tinyllama", "llama2_70b"]))
def test_a_suggested_mesh_cuts_heads_or_leaves_chips_idle(chips: int, name: str) -> None:
    config = SHAPES[name]
    found = list(shapes(chips, config))
    assert found
    for shape in found:
        assert math.prod((shape.data, shape.fsdp, shape.tensor)) == chips
        assert config.num_key_value_heads % shape.tensor == 0


def test_one_mesh_that_does_not_fit_ends_the_search_for_others() -> None:
    """40 heads divide by 5, and the inner width of the MLP does not."""
    for shape in shapes(20, SHAPES["13b"]):
        sizes = (shape.data, shape.fsdp, shape.tensor)
        check_sharded(SHAPES["13b"], AbstractMesh(sizes, AXES))


def test_the_page_shows_another_table_than_the_file_holds(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    file = ROOT / "docs" / "scale_table.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    copy = tmp_path / "scale.md"
    copy.write_text(page, encoding="utf-8")
    write_page(copy, rows)
    assert copy.read_text(encoding="utf-8") == page
    assert len(list(table_lines(rows))) <= 32
    assert len(list(check_lines(rows))) == 5
    text = " ".join(page.split())
    worst = max(abs(row["off"]) for name, row in rows.items() if name.startswith("published"))
    assert f"All are within {worst:.0%}".replace("%", " %") in text
    full = {name: row.get("train", row) for name, row in rows.items()}
    full = {name: row for name, row in full.items() if not row["lora"]}
    full = {name: row for name, row in full.items() if row["mesh"]["tensor"] == 1}
    adding = {name for name, row in full.items() if _largest(row) == "all-reduce"}
    many = {name for name, row in full.items() if row["mesh"]["fsdp"] >= 16}
    assert adding == {name for name in many if "v6e:4x8" not in name}
    said = "with 16 or more chips along fsdp, XLA adds up whole gradients by sums on all chips"
    assert said in text and "(on v6e 4x8 it scatters them)" in text
    copy.write_text("no marks", encoding="utf-8")
    with pytest.raises(HumpbackError, match="has no place"):
        write_page(copy, rows)


def test_the_table_lacks_what_people_rent_or_lists_what_does_not_fit() -> None:
    rows = json.loads((ROOT / "docs" / "scale_table.json").read_text(encoding="utf-8"))
    asked = {
        ("7b full v5e:4x4", "7b full v5p:2x2x1"): 16,
        ("65b full v5p:4x4x4", "llama2_70b full v5p:4x4x4"): 64,
        ("llama2_70b LoRA v5p:2x2x4",): 16,
    }
    for names, chips in asked.items():
        for name in names:
            train, decode = rows[name]["train"], rows[name]["decode"]
            assert train["fits"] and decode["fits"] and train["est_step_s"] > 0
            assert train["chips"] <= chips


def test_hours_of_compiling_end_at_a_page_that_is_not_there(tmp_path: Path) -> None:
    """Found first of all: nothing was compiled, so that this needs no TPU support."""
    with pytest.raises(HumpbackError, match=r"scale\.md: the file does not exist"):
        fill_table(tmp_path / "table.json", "tinyllama full v5e:2x2", print)


def _largest(row: dict[str, Any]) -> str:
    """The kind of exchange that sends most."""
    sent = row["collective_bytes"]
    return max(sent, key=lambda kind: sent[kind])
