"""Lineage: why is this pair here, what became of that document, what did this step train on?"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config, train_again

from humpback_jax.corpus.documents import read_documents
from humpback_jax.errors import HumpbackError
from humpback_jax.lineage import Lineage, batches, trace_id
from humpback_jax.loop import opened
from humpback_jax.records import Example
from humpback_jax.run_view import RunView
from humpback_jax.stages.evaluate import evaluate_stage
from humpback_jax.stages.sources import corpus_stage, packaged_pairs
from humpback_jax.stages.train import train_stage


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> RunView:
    return RunView(tiny_run)


@pytest.fixture(scope="module")
def lineage(run: RunView) -> Lineage:
    return Lineage(run)


def test_N03_no_pair_is_without_its_full_chain(run: RunView, lineage: Lineage) -> None:
    for row in run.rows("candidates"):
        pair = lineage.trace(row["id"])
        assert pair["kind"] == "pair"
        assert None not in pair["origin"].values()
        augmentation = pair["augmentation"]
        assert augmentation["model"] == "round_0/M_yx"
        assert augmentation["model_hash"] == run.entries["round_0/M_yx"]["hash"]
        assert augmentation["decoding"]["max_new_tokens"] == 128
        assert None not in augmentation.values()
        assert [part["round"] for part in pair["rounds"]] == [1, 2]
        for part in pair["rounds"]:
            assert part["decision"]["reason"]
            if part["decision"]["score"] is not None:
                assert {score["curator"] for score in part["scores"]} == {
                    "pmi",
                    "rubric_likelihood",
                }
                judge = f"round_{part['round'] - 1}/M_{part['round'] - 1}"
                assert {score["judge"] for score in part["scores"]} == {judge}
                assert all(score["detail"] for score in part["scores"])


def test_N03_the_byte_span_cuts_the_response_out_of_its_document(
    run: RunView, lineage: Lineage
) -> None:
    documents = {d.id: d.text.encode() for d in read_documents(["pydoc_topics"])}
    for row in run.rows("candidates"):
        origin = lineage.trace(row["id"])["origin"]
        start, end = origin["bytes"]
        assert documents[origin["document"]][start:end].decode() == row["response"]


def check_steps(run: RunView, name: str) -> None:
    data = {(row["source"], row["id"]): row for row in run.training_data(name)}
    log = {row["step"]: row for row in run.history(name) if "loss" in row}
    steps = batches(run, name)
    assert sorted(log) == list(range(1, len(steps) + 1))
    for step, names in enumerate(steps, start=1):
        assert log[step]["examples"] == len(names)
        assert log[step]["tokens"] == sum(data[n]["tokens"] for n in names)
        sources = {data[n]["source"] for n in names}
        assert sources == {key[5:] for key in log[step] if key.startswith("loss/")}


def test_N03_the_steps_that_trained_on_a_row_are_those_of_the_training_log(run: RunView) -> None:
    for name in run.names("model"):
        check_steps(run, name)


@pytest.mark.parametrize(
    ("share", "length", "steps"),
    [
        ("web:repeat=2.5", {"epochs": 1.0}, 10),  # 24 + 15 draws, in batches of 4
        ("web:cap=4:count=2", {"step_table": ((27, 4, 3), (99, 5, 2))}, 3),  # 24 + 2 draws
    ],
)
def test_N03_under_a_mixture_the_steps_are_those_of_the_training_log(
    tiny_run: Path, tmp_path: Path, share: str, length: dict[str, Any], steps: int
) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    run = train_again(folder, steps=0, mixture=(share,), **length)
    assert run.details("round_2/M_2")["steps"] == steps
    check_steps(run, "round_2/M_2")


def test_steps_that_contradict_the_training_are_not_told(tiny_run: Path) -> None:
    run = RunView(tiny_run)
    run.entries["round_1/M_1"]["details"]["steps"] = 7
    with pytest.raises(HumpbackError, match=r"round_1/M_1 was trained in 7 steps, .* give 8"):
        batches(run, "round_1/M_1")


def test_a_pair_and_its_train_steps_lead_to_each_other(run: RunView, lineage: Lineage) -> None:
    chosen = [row["id"] for row in run.rows("round_1/pairs") if row["selected"]]
    for name in chosen:
        usage = {use["model"]: use["steps"] for use in lineage.trace(name)["training"]}
        assert usage["round_1/M_1"]
        for step in usage["round_1/M_1"]:
            found = lineage.trace(f"M_1:{step}")
            assert name in [example["id"] for example in found["examples"]]
            assert found["metrics"]["step"] == step
    refused = [row["id"] for row in run.rows("round_1/pairs") if not row["selected"]]
    for name in refused:
        uses = [use["model"] for use in lineage.trace(name)["training"]]
        assert "round_1/M_1" not in uses


def test_a_document_lists_every_segment_and_what_became_of_it(
    run: RunView, lineage: Lineage
) -> None:
    for name in {row["document_id"] for row in run.rows("corpus")}:
        found = lineage.trace(name)
        own = [row["id"] for row in run.rows("corpus") if row["document_id"] == name]
        assert [segment["segment"] for segment in found["segments"]] == own
        for segment in found["segments"]:
            (pair,) = segment["pairs"]
            assert lineage.trace(segment["segment"])["pairs"][0]["id"] == pair["id"]
            assert len(pair["rounds"]) == 2


def test_human_examples_are_traced_too(run: RunView, lineage: Lineage) -> None:
    source, name = batches(run, "round_0/M_0")[0][0]
    assert source == "seed"
    seed = lineage.trace(name)
    assert seed["kind"] == "seed" and seed["instruction"] and seed["response"]
    steps = {use["model"]: use["steps"] for use in seed["training"]}
    assert steps["round_0/M_0"][0] == 1
    held_out = lineage.trace(run.rows("evaluation/base")[0]["id"])
    assert held_out["kind"] == "heldout" and not held_out["training"]
    assert {row["model"] for row in held_out["evaluation"]} == {"base", "M_0", "M_1", "M_2"}


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """A run whose seed examples, held-out examples and documents all have the ids 0, 1, 2, ..."""
    folder = tmp_path_factory.mktemp("alike")
    config = tiny_config()
    config.data.seed, config.data.heldout = str(folder / "s.jsonl"), str(folder / "h.jsonl")
    write_rows(folder / "s.jsonl", [pair_of(e) for e in packaged_pairs("train")[:16]])
    write_rows(folder / "h.jsonl", [pair_of(e) for e in packaged_pairs("heldout")[:4]])
    texts = [{"text": document.text} for document in read_documents(["pydoc_topics"])]
    write_rows(folder / "documents.jsonl", texts[:12])
    config.corpus.documents = (str(folder / "documents.jsonl"),)
    config.train.update({"steps": 4, "eval_every": 0})
    with opened(config, folder / "run", say=lambda text: None) as context:
        corpus_stage(context)
        model = train_stage(context, "round_0/M_0", context.seed, "forward", [], "S_a")
        evaluate_stage(context, "M_0", model)
    return Lineage(RunView(folder / "run"))


def pair_of(example: Example) -> dict[str, str]:
    return {"instruction": example.instruction, "output": example.response}


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    lines = [json.dumps({"id": str(number), **row}) + "\n" for number, row in enumerate(rows)]
    path.write_text("".join(lines), encoding="utf-8")


def test_a_held_out_example_is_not_shown_as_the_seed_example_of_the_same_id(
    alike: Lineage,
) -> None:
    for number, example in enumerate(packaged_pairs("train")[:16]):
        seed = alike.trace(f"seed:{number}")
        assert (seed["kind"], seed["id"]) == ("seed", str(number))
        assert (seed["instruction"], seed["response"]) == (example.instruction, example.response)
        assert "evaluation" not in seed
        ((model, steps),) = [use.values() for use in seed["training"]]
        for step in steps:
            shown = {row["id"]: row for row in alike.trace(f"{model}:{step}")["examples"]}
            assert shown[str(number)]["source"] == "seed"
            assert shown[str(number)]["instruction"] == example.instruction
    for number, example in enumerate(packaged_pairs("heldout")[:4]):
        held_out = alike.trace(f"heldout:{number}")
        assert (held_out["kind"], held_out["id"]) == ("heldout", str(number))
        assert held_out["instruction"] == example.instruction
        assert not held_out["training"] and held_out["evaluation"]


def test_an_id_of_several_kinds_shows_all_of_them(alike: Lineage) -> None:
    name = next(n for n in "0123" if n in {r["document_id"] for r in alike.run.rows("corpus")})
    several = alike.trace(name)
    assert (several["kind"], several["id"]) == ("several", name)
    kinds = ("document", "seed", "heldout")
    assert several["matches"] == [alike.trace(f"{kind}:{name}") for kind in kinds]
    assert alike.trace(f"document:{name}")["segments"]
    assert alike.trace("15")["kind"] == "seed", "the others have no such id"


def test_the_ids_that_an_error_suggests_are_of_one_kind_each(alike: Lineage) -> None:
    with pytest.raises(HumpbackError, match="knows no id 'heldout:15'") as caught:
        alike.trace("heldout:15")
    kinds = [alike.trace(name)["kind"] for name in suggested(caught.value)]
    assert kinds == ["segment", "document", "seed", "heldout", "model", "step"]


def suggested(error: HumpbackError) -> list[str]:
    return re.findall(r", like ([^;]+);", str(error))


def test_an_unknown_id_is_answered_with_one_example_of_every_kind(tiny_run: Path) -> None:
    with pytest.raises(HumpbackError, match="knows no id 'nonsense'") as caught:
        trace_id(tiny_run, "nonsense")
    kinds = [trace_id(tiny_run, name)["kind"] for name in suggested(caught.value)]
    assert kinds == ["pair", "segment", "document", "seed", "heldout", "model", "step"]


def test_a_step_that_never_was_is_refused_with_the_range(lineage: Lineage) -> None:
    for step in (0, 9):
        with pytest.raises(HumpbackError, match="8 steps, so M_1:1 to M_1:8 exist"):
            lineage.trace(f"M_1:{step}")


def test_losses_before_a_kill_are_not_lost_to_the_report(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    whole = RunView(tmp_path / "run").history("round_1/M_1")
    path = RunView(tmp_path / "run").folder("round_1/M_1") / "history.json"
    path.write_text(json.dumps([row for row in whole if row["step"] > 4]))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "round_1/M_1", "st')
    mended = RunView(tmp_path / "run").history("round_1/M_1")
    assert [(row["step"], row.get("loss")) for row in mended] == [
        (row["step"], row.get("loss")) for row in whole
    ]
