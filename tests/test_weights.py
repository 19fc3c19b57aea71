"""Hugging Face folders in and out, and content hashes: what users lose if these fail."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import flatten, init_params, unflatten, unstack_layers
from humpback_jax.weights import safetensors_io
from humpback_jax.weights.hashing import params_hash
from humpback_jax.weights.names import file_tensors
from humpback_jax.weights.safetensors_io import load_hf, open_hf, read_config, save_hf, tensor_specs

MODELS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 16, "tie_word_embeddings": True},
}


def write_with_transformers(
    folder: Path, dtype: str = "float32", max_shard_size: str = "5GB", **changes
) -> None:
    import torch
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": [1, 2],
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms would start as constants
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


def logits_in_transformers(folder: Path) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits.float().numpy()


def assert_bit_equal(left: dict, right: dict) -> None:
    ours, theirs = flatten(left), flatten(right)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        other = np.asarray(theirs[path])
        assert (leaf.dtype, leaf.shape) == (other.dtype, other.shape), path
        assert np.asarray(leaf).tobytes() == other.tobytes(), path


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    write_with_transformers(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_published_model_becomes_another_one_on_import_and_export(tmp_path, model, dtype):
    write_with_transformers(tmp_path / "theirs", dtype, **MODELS[model])
    config, params = load_hf(tmp_path / "theirs")
    assert all(leaf.dtype == np.dtype(dtype) for leaf in flatten(params).values())

    save_hf(tmp_path / "ours", config, params)

    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys() == tensor_specs(config).keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and np.array_equal(tensor, theirs[name]), name
        assert tensor.shape == tensor_specs(config)[name]
    np.testing.assert_array_equal(
        logits_in_transformers(tmp_path / "ours"), logits_in_transformers(tmp_path / "theirs")
    )


def test_sharded_models_of_the_hub_cannot_be_read_or_written(tmp_path):
    write_with_transformers(tmp_path / "theirs", "bfloat16", max_shard_size="8KB")
    write_with_transformers(tmp_path / "single", "bfloat16")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    config, params = load_hf(tmp_path / "theirs")
    assert_bit_equal(params, load_hf(tmp_path / "single")[1])

    written = save_hf(tmp_path / "ours", config, params, max_shard_bytes=8000)

    assert len(written) > 2 and all(file.stat().st_size < 9500 for file in written)
    index = json.loads((tmp_path / "ours" / safetensors_io.INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in written}
    assert_bit_equal(load_hf(tmp_path / "ours")[1], params)
    np.testing.assert_array_equal(
        logits_in_transformers(tmp_path / "ours"), logits_in_transformers(tmp_path / "single")
    )


def test_export_from_jax_or_unstacked_layers_differs(tmp_path, hf_folder):
    config, params = load_hf(hf_folder)
    on_device = jax.tree.map(jnp.asarray, params)
    for name, given in {"jax": on_device, "unstacked": unstack_layers(on_device)}.items():
        save_hf(tmp_path / name, config, given)
        assert_bit_equal(load_hf(tmp_path / name)[1], params)


def test_export_in_another_dtype_keeps_the_old_one(tmp_path, hf_folder):
    config, params = load_hf(hf_folder)
    save_hf(tmp_path / "half", config, params, dtype="bfloat16")
    _, half = load_hf(tmp_path / "half")
    assert_bit_equal(half, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(HumpbackError, match="int8"):
        save_hf(tmp_path / "half", config, params, dtype="int8")


def test_mixed_dtypes_are_misaligned_or_lost(tmp_path):
    config = LlamaConfig(5, 7, 9, 1, 1, 1, 2)
    flat = flatten(init_params(config, jax.random.key(0)))
    for path in flat:
        if path[-1] != "scale":
            flat[path] = flat[path].astype(jnp.bfloat16)
    (file,) = save_hf(tmp_path, config, unflatten(flat))
    assert_bit_equal(load_hf(tmp_path)[1], unflatten(flat))
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert header.pop("__metadata__") == {"format": "pt"}
    sizes = {"F32": 4, "BF16": 2}
    assert {entry["dtype"] for entry in header.values()} == set(sizes)
    for name, entry in header.items():
        assert (start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, name


def test_position_scaling_or_ids_are_dropped_on_export(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    write_with_transformers(tmp_path / "theirs", rope_parameters=scaling)
    config, params = load_hf(tmp_path / "theirs")
    save_hf(tmp_path / "ours", config, params)
    assert read_config(tmp_path / "ours") == config
    assert config.eos_token_ids == (1, 2) and config.rope_type == "llama3"
    np.testing.assert_array_equal(
        logits_in_transformers(tmp_path / "ours"), logits_in_transformers(tmp_path / "theirs")
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_parameter_of_the_model_has_no_name_in_files(tied, biased):
    config = LlamaConfig(
        64, 32, 48, 2, 4, 2, 8, tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased
    )
    params = init_params(config, jax.random.key(0))
    tensors = file_tensors(config)
    assert {tensor.path for tensor in tensors} == set(flatten(params))
    for kind in ("hf", "gguf"):
        file_names = [getattr(tensor, kind) for tensor in tensors]
        assert len(set(file_names)) == len(file_names)


def edit(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


NORM = "model.norm.weight"
FAULTS = {
    "missing": (lambda t: t.pop(NORM), NORM),
    "unexpected": (lambda t: t.update(extra=t[NORM]), "extra"),
    "adapter": (lambda t: t.update({"base.lora_A.weight": t[NORM]}), "adapters must be merged"),
    "misshaped": (lambda t: t.update({NORM: t[NORM][:-1]}), r"\[31\].*\[32\]"),
    "integer": (lambda t: t.update({NORM: t[NORM].astype(np.int8)}), "I8"),
    "mixed": (
        lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((48, 32), np.float16)}),
        "must agree",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_loads_silently(hf_folder, fault):
    change, message = FAULTS[fault]
    edit(hf_folder, change)
    with pytest.raises(HumpbackError, match=message) as caught:
        load_hf(hf_folder)
    assert str(hf_folder) in str(caught.value)


def test_old_files_with_rotary_buffers_are_refused(hf_folder):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit(hf_folder, lambda tensors: tensors.update(buffer))
    load_hf(hf_folder)


def test_a_tied_model_with_its_head_stored_is_refused_or_misread(tmp_path):
    write_with_transformers(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "lm_head" not in load_hf(tmp_path)[1]
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(HumpbackError, match="tie_word_embeddings"):
        load_hf(tmp_path)


def test_an_incomplete_download_gives_a_traceback_or_garbage(hf_folder):
    file = hf_folder / "model.safetensors"
    whole = file.read_bytes()
    generator = random.Random(0)
    for size in [0, 4, 8, 100, len(whole) - 1, *generator.sample(range(len(whole)), 20)]:
        file.write_bytes(whole[:size])
        with pytest.raises(HumpbackError, match=r"model\.safetensors"):
            load_hf(hf_folder)
    for position in generator.sample(range(2000), 60):
        file.write_bytes(whole[:position] + b"\xff" + whole[position + 1 :])
        with pytest.raises(HumpbackError, match=r"safetensors|missing"):
            load_hf(hf_folder)


def test_a_broken_index_gives_a_traceback(tmp_path):
    write_with_transformers(tmp_path, max_shard_size="8KB")
    index = tmp_path / safetensors_io.INDEX_NAME
    listing = json.loads(index.read_text())
    first, *_, last = sorted(set(listing["weight_map"].values()))

    moved = dict.fromkeys(listing["weight_map"], first) | {"model.norm.weight": last}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(HumpbackError, match="places here, is not in the file"):
        load_hf(tmp_path)

    index.write_text(json.dumps(listing))
    (tmp_path / last).rename(tmp_path / "elsewhere")
    with pytest.raises(HumpbackError, match=last):
        load_hf(tmp_path)

    (tmp_path / last).write_bytes((tmp_path / first).read_bytes())
    with pytest.raises(HumpbackError, match="is also in"):
        load_hf(tmp_path)

    for text in ["{", "[]", '{"weight_map": {}}']:
        index.write_text(text)
        with pytest.raises(HumpbackError, match=r"index\.json"):
            load_hf(tmp_path)
    index.unlink()
    with pytest.raises(HumpbackError, match="neither"):
        load_hf(tmp_path)


def test_a_config_that_is_absent_or_broken_gives_a_traceback(hf_folder):
    (hf_folder / "config.json").write_text("{")
    with pytest.raises(HumpbackError, match=r"config\.json: not readable"):
        load_hf(hf_folder)
    (hf_folder / "config.json").unlink()
    with pytest.raises(HumpbackError, match=r"config\.json: the file is missing"):
        load_hf(hf_folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "wide"),
        ("num_hidden_layers", 0),
        ("rms_norm_eps", None),
        ("vocab_size", True),
        ("rope_scaling", "linear"),
    ],
)
def test_a_config_field_of_the_wrong_type_gives_a_traceback(hf_folder, field, value):
    path = hf_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(HumpbackError, match=rf"config\.json: the field '{field}' is"):
        load_hf(hf_folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_quantised_model_is_refused_for_its_tensors_names(hf_folder, method):
    path = hf_folder / "config.json"
    quantised = {"quantization_config": {"quant_method": method, "bits": 4}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    for read in (load_hf, open_hf):
        with pytest.raises(HumpbackError, match=rf"config\.json: quantization_config.*{method}"):
            read(hf_folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    load_hf(hf_folder)


def test_parameters_of_another_model_are_exported(tmp_path, hf_folder):
    config, params = load_hf(hf_folder)
    flat = flatten(params)
    kernel = ("layers", "attn", "q", "kernel")
    wrong = {
        "hold no": {path: leaf for path, leaf in flat.items() if path != kernel},
        "has shape": flat | {kernel: flat[kernel][:, :-1]},
        "merge": flat | {("layers", "attn", "q", "lora_a"): np.zeros((3, 32, 2), np.float32)},
    }
    for message, leaves in wrong.items():
        with pytest.raises(HumpbackError, match=message):
            save_hf(tmp_path / "out", config, unflatten(leaves))
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_midway_destroys_the_model_it_replaces(hf_folder, monkeypatch):
    config, params = load_hf(hf_folder)
    write = safetensors_io._write_file

    def fail_on_the_third(path, entries):
        if "00003" in path.name:
            raise OSError("No space left on device")
        write(path, entries)

    monkeypatch.setattr(safetensors_io, "_write_file", fail_on_the_third)
    before = sorted(hf_folder.iterdir())
    with pytest.raises(OSError, match="No space"):
        save_hf(hf_folder, config, jax.tree.map(np.zeros_like, params), max_shard_bytes=8000)
    assert sorted(hf_folder.iterdir()) == before
    assert_bit_equal(load_hf(hf_folder)[1], params)


def test_files_of_an_earlier_export_shadow_the_new_one(tmp_path, hf_folder):
    config, params = load_hf(hf_folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    for scale, size in enumerate([10**9, 4000, 8000, 10**9]):
        scaled = jax.tree.map(lambda leaf, factor=scale: leaf * np.float32(factor), params)
        files = save_hf(tmp_path / "out", config, scaled, max_shard_bytes=size)
        assert_bit_equal(load_hf(tmp_path / "out")[1], scaled)
        assert set((tmp_path / "out").glob("*.safetensors")) == set(files)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_large_models_need_twice_their_size_in_memory(tmp_path):
    config = LlamaConfig(512, 256, 1024, 12, 4, 4, 64)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: generator.standard_normal(leaf.shape, np.float32),
        jax.eval_shape(lambda: init_params(config, jax.random.key(0))),
    )
    total = sum(leaf.nbytes for leaf in flatten(params).values())
    largest = 1024 * 256 * 4
    tracemalloc.start()
    try:
        save_hf(tmp_path, config, params, max_shard_bytes=20_000_000)
        _, saving = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        loaded = load_hf(tmp_path)
        _, loading = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_bit_equal(loaded[1], params)
    slack = 3 * largest + 1_000_000
    assert saving < slack, f"{saving / 1e6:.1f} MB beside the parameters"
    assert loading < total + slack, f"{(loading - total) / 1e6:.1f} MB beside the parameters"


def test_equal_weights_get_different_hashes_and_stages_run_again(hf_folder):
    _, params = load_hf(hf_folder)
    expected = params_hash(params)
    on_device = jax.tree.map(jnp.asarray, params)
    mesh = jax.sharding.Mesh(jax.devices(), "fsdp")

    def sharded(leaf: jax.Array) -> jax.Array:
        spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp")
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    same = {
        "jax": on_device,
        "sharded": jax.tree.map(sharded, on_device),
        "unstacked": unstack_layers(on_device),
        "reordered": unflatten(dict(reversed(flatten(params).items()))),
        "strided": jax.tree.map(np.asfortranarray, params),
    }
    for name, given in same.items():
        assert params_hash(given) == expected, name
    half = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    assert params_hash(half) == params_hash(jax.tree.map(jnp.asarray, half)) != expected


def test_retrained_weights_keep_their_hash_and_reuse_old_results(hf_folder):
    _, params = load_hf(hf_folder)
    seen = {params_hash(params)}
    flat = flatten(params)
    for path, leaf in flat.items():
        changed = leaf.copy()
        changed.reshape(-1)[-1] = np.nextafter(changed.reshape(-1)[-1], np.float32(9))
        seen.add(params_hash(unflatten(flat | {path: changed})))
    q, o = ("layers", "attn", "q", "kernel"), ("layers", "attn", "o", "kernel")
    seen.add(params_hash(unflatten(flat | {q: flat[o], o: flat[q]})))
    seen.add(params_hash(unflatten(flat | {q: flat[q][::-1]})))
    seen.add(params_hash(unflatten(flat | {q: flat[q].reshape(3, 16, 64)})))
    assert len(seen) == len(flat) + 4
