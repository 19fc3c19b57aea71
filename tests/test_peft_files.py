"""Adapters as files: what peft writes is read here, and what is written here peft reads.

If these fail, adapters cannot leave or enter, or arrive as another model.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from test_adapter_family import KINDS, adapted, make_adapted
from tiny_llama import (
    from_torch,
    logits_function,
    random_tokens,
    torch_llama,
    torch_logits,
    trees_equal,
    whole_rows,
)

from humpback_jax.adapters import Adapter, load_adapter, with_adapter
from humpback_jax.cli import main
from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import flatten, init_params, unflatten
from humpback_jax.model.lora import merge_adapter
from humpback_jax.models import (
    LanguageModel,
    export_peft,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from humpback_jax.text.tokenizer import Tokenizer
from humpback_jax.weights.peft_io import base_name, read_peft, write_peft

SHAPE = {"attention_bias": True}


@pytest.fixture(autouse=True)
def stay_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUMPBACK_IN_PROCESS", "1")


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_export_gives_the_same_logits_in_peft(kind, tmp_path) -> None:
    theirs, config, _, adapter, spec = make_adapted(kind)
    write_peft(tmp_path, config, spec, adapter, "some/base")
    base = torch_llama(num_hidden_layers=config.num_hidden_layers, **SHAPE)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    tokens = random_tokens((2, 20))
    expected = torch_logits(theirs.eval(), tokens)
    assert np.abs(torch_logits(loaded.eval(), tokens) - expected).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_read_as_the_same_adapter(kind, tmp_path) -> None:
    theirs, config, _, adapter, spec = adapted(kind)
    theirs.save_pretrained(tmp_path)
    found, params = read_peft(tmp_path, config)
    assert found == spec
    assert trees_equal(params, adapter)


def test_imported_adapters_give_peft_s_logits_through_the_verb(saved: Path, tmp_path: Path) -> None:
    """The base as its config names it, and as --base names it."""
    base, folder = saved / "base", saved / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    named = changed(folder, tmp_path / "named", config=config)
    for source, extra in ((named, ()), (folder, (f"--base={base}",))):
        out = tmp_path / source.name / "out"
        assert main(["import", f"--from={source}", f"--out={out}", *extra]) == 0
        model = load_checkpoint(out)
        assert model.adapter is not None and model.adapter.base == str(base)
        tokens = random_tokens((2, 20))
        logits = logits_function(model.config)(model.params, *whole_rows(tokens))
        expected = np.load(saved / "logits.npy")
        assert np.abs(np.asarray(logits) - expected).max() < 1e-4
    back = tmp_path / "back"
    export = ["export", f"--model={out}", "--format=peft", f"--out={back}", "--base=org/name"]
    assert main(export) == 0
    ours, theirs = (load_file(each / "adapter_model.safetensors") for each in (back, folder))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert base_name(back) == "hf:org/name"
    assert main([*export[:-1], "--base=hf:org/name@v2"]) == 0
    config = json.loads((back / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "v2")
    assert base_name(back) == "hf:org/name@v2"
    assert (back / "tokenizer.json").exists(), "whoever loads the adapter finds its chat template"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in Hugging Face's layout with our byte tokenizer, peft's adapter on it, its logits."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = load_model("tiny-random").tokenizer
    base = torch_llama(vocab_size=max(tokenizer.vocab_size, 128), num_hidden_layers=1)
    base.save_pretrained(folder / "base")
    tokenizer.save(folder / "base")
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], use_dora=True
    )
    model = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "adapter")
    np.save(folder / "logits.npy", torch_logits(model, random_tokens((2, 20))))
    return folder


def changed(folder: Path, out: Path, *, config: Any = None, tensors: Any = None) -> Path:
    """A copy of a PEFT folder with another config, or other tensors."""
    shutil.copytree(folder, out)
    if config is not None:
        (out / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, out / "adapter_model.safetensors")
    return out


STEM = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED = {
    "rank_pattern": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "some_layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "changed_base": ({"init_lora_weights": "pissa"}, "pissa"),
    "a_new_option": ({"use_something_new": True}, "use_something_new"),
    "unknown_target": ({"target_modules": ["q_proj", "c_attn", "lm_head"]}, "c_attn, lm_head"),
    "other_method": ({"peft_type": "IA3"}, "IA3"),
    "no_rank": ({"r": None}, "readable"),
    "other_rank": ({"r": 2}, r"lora_A.*shape \[3, 64\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adapted_here_is_refused_by_name(name, saved, tmp_path) -> None:
    fields, message = REFUSED[name]
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text()) | fields
    folder = changed(saved / "adapter", tmp_path / "folder", config=config)
    with pytest.raises(HumpbackError, match=message):
        read_peft(folder, load_model(str(saved / "base")).config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{STEM}.lora_A.weight") is None or t, "lora_A.weight' missing"),
        (lambda t: t.pop(f"{STEM}.lora_B.weight") is None or t, "lora_B.weight' missing"),
        (
            lambda t: {n: x for n, x in t.items() if "up_proj" not in n},
            r"up_proj.lora_A.*up_proj.lora_B.*missing",
        ),
        (
            lambda t: t | {"base_model.model.lm_head.lora_A.weight": t[f"{STEM}.lora_A.weight"]},
            "lm_head",
        ),
    ],
    ids=["no_a", "no_b", "target", "head"],
)
def test_tensors_that_are_missing_or_too_many_are_named(change, message, saved, tmp_path) -> None:
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    folder = changed(saved / "adapter", tmp_path / "folder", tensors=change(tensors))
    with pytest.raises(HumpbackError, match=message):
        read_peft(folder, load_model(str(saved / "base")).config)


def test_one_base_takes_any_number_of_adapters_in_turn() -> None:
    """Arms of an experiment: what an arm is does not depend on the one before it."""
    plain = load_model("tiny-random")
    theirs = torch_llama(num_hidden_layers=2, **SHAPE)
    config, params = from_torch(theirs)
    base = LanguageModel("base", config, params, plain.tokenizer, plain.template, "S_a")
    arms = [Adapter(adapted("dora")[4], adapted("dora")[3], "base", "S_w")]
    flat = {
        path: -leaf if path[-1] == "lora_a" else leaf
        for path, leaf in flatten(arms[0].params).items()
    }
    arms.append(Adapter(arms[0].spec, unflatten(flat), "base"))
    first, second = (with_adapter(base, arm) for arm in arms)
    assert (first.tags, second.tags) == ("S_w", "S_a")
    assert first.params["embed"]["embedding"] is params["embed"]["embedding"]
    expected = merge_adapter(params, arms[1].params, arms[1].spec)
    swapped = with_adapter(first, arms[1])
    for found in (second.params, swapped.params):
        for path, leaf in flatten(found).items():
            assert np.abs(np.asarray(leaf) - flatten(expected)[path]).max() < 1e-5
    off = with_adapter(second, None)
    assert off.adapter is None
    for path, leaf in flatten(off.params).items():
        assert np.abs(np.asarray(leaf) - flatten(params)[path]).max() < 1e-5


def test_an_adapter_that_continued_another_one_loses_what_it_was_trained_on(tmp_path: Path) -> None:
    """The second of two trainings with adapters began from the first one's merged weights."""
    *_, params, spec = adapted("dora")
    plain = load_model("tiny-random")
    config, _ = from_torch(torch_llama(num_hidden_layers=2, **SHAPE))
    config = dataclasses.replace(config, vocab_size=plain.config.vocab_size)
    weights = init_params(config, jax.random.key(0))
    base = LanguageModel("base", config, weights, plain.tokenizer, plain.template)
    save_checkpoint(tmp_path / "first", with_adapter(base, Adapter(spec, params, "base")), {})
    first = load_model(str(tmp_path / "first"))
    second = dataclasses.replace(first, adapter=None)
    second = with_adapter(second, Adapter(spec, params, first.name))
    save_checkpoint(tmp_path / "second", second, {})
    model = f"--model={tmp_path / 'second'}"
    assert main(["export", model, "--format=peft", f"--out={tmp_path / 'peft'}"]) == 0
    source = [f"--from={tmp_path / 'peft'}", f"--base={first.name}"]
    assert main(["import", *source, f"--out={tmp_path / 'imported'}"]) == 0
    found = [
        with_adapter(first, load_adapter(str(tmp_path / "second"), first)),
        with_adapter(first, load_adapter(str(tmp_path / "peft"), first)),
        load_model(str(tmp_path / "peft")),
        load_model(str(tmp_path / "imported")),
    ]
    for model in found:
        for path, leaf in flatten(model.params).items():
            assert np.abs(np.asarray(leaf) - flatten(second.params)[path]).max() < 1e-5, path


@pytest.fixture
def arm(saved: Path, tmp_path: Path) -> LanguageModel:
    """The adapter on its base, trained for both tags, and exported to `tmp_path / "arm"`."""
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(saved / "base")
    model = load_model(str(changed(saved / "adapter", tmp_path / "named", config=config)))
    assert model.adapter is not None
    told = dataclasses.replace(model.adapter, tags="both")
    model = dataclasses.replace(model, tags="both", adapter=told)
    export_peft(tmp_path / "arm", model)
    return model


def test_an_exported_adapter_comes_back_without_its_tags(
    arm: LanguageModel, saved: Path, tmp_path: Path
) -> None:
    folder, base = tmp_path / "arm", load_model(str(saved / "base"))
    back = [load_model(str(folder)), with_adapter(base, load_adapter(str(folder), base))]
    back.append(load_model(str(folder), "plain"))
    assert [model.tags for model in back] == ["both"] * 3
    assert [model.template for model in back[:2]] == [arm.template] * 2
    assert back[2].template.name == "plain"


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}!"])
def test_an_adapter_is_prompted_as_its_base_and_not_as_it_was_trained(
    template: str | None, arm: LanguageModel, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / "base", tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": template}))
    folder, base = tmp_path / "arm", tmp_path / "base"
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for found in (load_model(str(folder)), load_model(str(folder), "chat")):
        assert (found.template, found.tags) == (arm.template, "both")
    out = tmp_path / "imported"
    assert main(["import", f"--from={folder}", f"--base={base}", f"--out={out}"]) == 0
    assert load_model(str(out)).template == arm.template
    with pytest.raises(HumpbackError, match=r"differ in .*chat_template"):
        load_adapter(str(folder), load_model(str(base)))
    padded = Tokenizer.load(folder)
    padded.backend.add_special_tokens(["<pad>"])  # as training programs do for their batches
    padded.save(folder)
    assert load_model(str(folder)).template == arm.template
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|new|>"))
    with pytest.raises(HumpbackError, match=r"<\|im_start\|>' with None here and 257 there"):
        load_model(str(folder))


def test_an_adapter_of_another_model_is_refused() -> None:
    plain = load_model("tiny-random")
    arm = Adapter(adapted("lora")[4], adapted("lora")[3], "the-other-one")
    with pytest.raises(HumpbackError, match=r"fit tiny-random.*the-other-one"):
        with_adapter(plain, arm)


def shown_on_the_page() -> list[list[str]]:
    text = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text(encoding="utf-8")
    lines = text.partition("```sh\n")[2].partition("```")[0].splitlines()
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.slow
def test_every_command_on_the_page_on_adapters_runs_and_they_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("yes", "no", "so")]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = shown_on_the_page()
    rates = ["--config.train.learning_rate=0.01", "--config.train.end_learning_rate=0.01"]
    results = {}
    for command in commands:
        extra = rates if command[0] == "train" else []
        assert main([*command, *extra, "--json"]) == 0, command
        results[command[0]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    arms = results["evaluate"]["arms"]
    assert [arm["adapter"] for arm in arms] == ["none", "runs/arm_a", "runs/arm_b"]
    assert len({arm["results"]["nll"]["nll_per_token"]["value"] for arm in arms}) == 3
    trained, back = load_checkpoint(Path("runs/arm_b")), load_checkpoint(Path("runs/back"))
    merged = load_model("runs/merged").params
    for path, leaf in flatten(trained.params).items():
        for other in (back.params, merged):
            assert np.abs(np.asarray(flatten(other)[path]) - leaf).max() < 1e-6, path
    base = transformers.AutoModelForCausalLM.from_pretrained("runs/merged")
    assert main(["export", "--model=runs/arm_b", "--adapter=none", "--out=runs/base"]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained("runs/base")
    adapted_base = peft.PeftModel.from_pretrained(plain, "runs/arm_b_peft")
    tokens = random_tokens((1, 20))
    assert np.abs(torch_logits(adapted_base, tokens) - torch_logits(base, tokens)).max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--model=tiny-random", "--format=peft"], "no adapter"),
        (["export", "--model=tiny-random", "--base=org/name"], "--format=peft"),
        (["export", "--model=tiny-random", "--adapter=BASE"], "no adapter"),
        (["import", "--from=BASE", "--base=tiny-random"], "no adapter"),
        (["import", "--from=ADAPTER"], "--base"),
    ],
)
def test_a_missing_adapter_or_base_is_one_readable_message(
    arguments, message, saved, tmp_path, capsys
) -> None:
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    folder = changed(saved / "adapter", tmp_path / "nameless", config=config)
    places = {"BASE": str(saved / "base"), "ADAPTER": str(folder)}
    for name, place in places.items():
        arguments = [argument.replace(f"={name}", f"={place}") for argument in arguments]
    assert main([*arguments, f"--out={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("dora=true", "config.train.lora.dora has no effect without config.train.lora.rank"),
        ("rank=4 targets=q,qq", "'qq'"),
        ("rank=4 scaling=rs", "rslora"),
        ("rank=4 plus_ratio=0.5", "at least 1"),
    ],
)
def test_settings_of_an_adapter_are_refused_before_anything_is_loaded(
    field, message, tmp_path, capsys
) -> None:
    extra = [f"--config.train.lora.{each}" for each in field.split()]
    assert main(["train", "--data=absent", f"--out={tmp_path}", *extra]) == 1
    assert message in capsys.readouterr().err
