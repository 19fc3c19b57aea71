"""GGUF files: what users lose if these fail."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import flatten, init_params, unflatten
from humpback_jax.weights.gguf_file import read_gguf_header
from humpback_jax.weights.gguf_io import load_gguf
from humpback_jax.weights.layout import layer_leaves
from humpback_jax.weights.names import file_tensors

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    bos_token_id=1,
    eos_token_ids=(2, 5),
    pad_token_id=0,
)


def as_llama_cpp_permutes(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the q and k rows of a Hugging Face model."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def random_params(config: LlamaConfig, seed: int = 0) -> dict:
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: generator.standard_normal(x.shape, np.float32), shapes)


def write_gguf(
    path: Path,
    config: LlamaConfig,
    params: dict,
    kind: Kind = Kind.F32,
    extra: dict[str, np.ndarray] | None = None,
    metadata=lambda writer: None,
    skip: tuple[str, ...] = (),
    architecture: str = "llama",
    special: dict[str, int] | None = None,
) -> dict:
    """Writes a file as llama.cpp's converter would; returns the values that the file holds."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"<token {i} é>" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    for name, i in ({"bos": 1, "eos": 2, "eot": 5, "padding": 0} | (special or {})).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    metadata(writer)
    leaves = layer_leaves(params)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    stored = {}
    for tensor in file_tensors(config):
        if tensor.gguf in skip:
            continue
        value = leaves[tensor.path, tensor.layer].numpy()
        value = np.ascontiguousarray(value.T if tensor.transposed else value)
        count = heads.get(tensor.path[-2], 0) if "attn" in tensor.path else 0
        value = as_llama_cpp_permutes(value, count) if count else value
        own = kind if value.ndim == 2 else Kind.F32  # vectors stay float32, as in llama.cpp
        encoded = quantize(value, own)
        writer.add_tensor(tensor.gguf, encoded, raw_dtype=own)
        stored[tensor.gguf] = dequantize(encoded, own)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def expected_params(config: LlamaConfig, stored: dict) -> dict:
    """The tree that the stored (permuted) values stand for, found by an independent inverse."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    layers: dict[tuple, list] = {}
    for tensor in file_tensors(config):
        value = stored[tensor.gguf]
        count = heads.get(tensor.path[-2], 0) if "attn" in tensor.path else 0
        if count:
            order = as_llama_cpp_permutes(np.arange(value.shape[0]), count)
            value = value[np.argsort(order)]
        layers.setdefault(tensor.path, []).append(value.T if tensor.transposed else value)
    return unflatten(
        {
            path: np.stack(values) if path[0] == "layers" else values[0]
            for path, values in layers.items()
        }
    )


def assert_equal(left: dict, right: dict) -> None:
    ours, theirs = flatten(left), flatten(right)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=str(path))


QUANTISABLE = [
    Kind.F32,
    Kind.F16,
    Kind.BF16,
    Kind.Q8_0,
    Kind.Q4_0,
    Kind.Q4_1,
    Kind.Q5_0,
    Kind.Q5_1,
    Kind.TQ1_0,
]


@pytest.mark.parametrize("kind", QUANTISABLE, ids=lambda kind: kind.name)
def test_gguf_models_load_with_scrambled_or_wrong_weights(tmp_path, kind):
    width = 256 if kind == Kind.TQ1_0 else 64  # rows must fill whole blocks
    config = dataclasses.replace(CONFIG, hidden_size=width, intermediate_size=2 * width)
    config = dataclasses.replace(config, head_dim=width // 4)
    params = random_params(config)
    stored = write_gguf(tmp_path / "m.gguf", config, params, kind)
    read_config, loaded = load_gguf(tmp_path / "m.gguf")
    assert read_config == config
    assert_equal(loaded, expected_params(config, stored))
    if kind == Kind.F32:
        assert_equal(loaded, params)


def test_biased_or_tied_gguf_models_lose_tensors(tmp_path):
    config = dataclasses.replace(
        CONFIG, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    )
    params = random_params(config)
    write_gguf(tmp_path / "m.gguf", config, params)
    read_config, loaded = load_gguf(tmp_path / "m.gguf")
    assert read_config == config and "lm_head" not in loaded
    assert_equal(loaded, params)


@pytest.mark.filterwarnings("ignore:invalid value")  # random scales may be infinite
def test_k_quants_which_most_published_files_use_load_wrong(tmp_path):
    config = dataclasses.replace(
        CONFIG, hidden_size=256, head_dim=64, intermediate_size=512, tie_word_embeddings=True
    )
    generator = np.random.default_rng(0)
    kinds = [Kind.Q6_K, Kind.Q4_K, Kind.Q5_K, Kind.Q3_K, Kind.Q2_K, Kind.IQ4_XS, Kind.IQ4_NL]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(96)
    stored = {}
    for number, tensor in enumerate(file_tensors(config)):
        kind = kinds[number % len(kinds)] if len(tensor.shape) == 2 else Kind.F32
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = generator.integers(0, 256, (*tensor.shape[:-1], tensor.shape[-1] // block * size))
        raw = raw.astype(np.uint8)
        if kind == Kind.F32:
            raw = raw.reshape(-1)
        stored[tensor.gguf] = dequantize(raw, kind)
        writer.add_tensor(
            tensor.gguf, stored[tensor.gguf] if kind == Kind.F32 else raw, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_equal(load_gguf(tmp_path / "m.gguf")[1], expected_params(config, stored))


def test_gguf_weights_cannot_be_had_in_half_precision(tmp_path):
    params = random_params(CONFIG)
    write_gguf(tmp_path / "m.gguf", CONFIG, params)
    _, loaded = load_gguf(tmp_path / "m.gguf", dtype="bfloat16")
    for path, leaf in flatten(loaded).items():
        expected = flatten(params)[path].astype(ml_dtypes.bfloat16)
        assert leaf.dtype == expected.dtype and leaf.tobytes() == expected.tobytes(), path


def llama3_factors(config: LlamaConfig, factor: float, low=1.0, high=4.0, original=8192):
    factors = []
    for exponent in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (exponent / config.head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama_3_1_files_lose_their_position_scaling(tmp_path):
    config = dataclasses.replace(CONFIG, head_dim=64, rope_theta=500000.0)
    params = random_params(config)
    for factor in (8.0, 32.0):
        extra = {"rope_freqs.weight": llama3_factors(config, factor)}
        write_gguf(tmp_path / "m.gguf", config, params, extra=extra)
        read_config, loaded = load_gguf(tmp_path / "m.gguf")
        assert read_config.rope_type == "llama3"
        assert read_config.rope_parameters == {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        assert_equal(loaded, params)
    for unknown in (llama3_factors(config, 8.0, original=4096), np.full(32, 2, np.float32)):
        write_gguf(tmp_path / "m.gguf", config, params, extra={"rope_freqs.weight": unknown})
        with pytest.raises(HumpbackError, match="frequency factors"):
            load_gguf(tmp_path / "m.gguf")


def test_a_padding_id_of_no_token_stands_in_the_exported_config(tmp_path):
    """4294967295 is how some converters write -1; transformers refuses such a config."""
    path = tmp_path / "m.gguf"
    config = dataclasses.replace(CONFIG, pad_token_id=None)
    write_gguf(path, config, random_params(CONFIG), special={"padding": 2**32 - 1})
    assert load_gguf(path)[0] == config
    write_gguf(path, CONFIG, random_params(CONFIG), special={"eos": 2**32 - 1})
    with pytest.raises(HumpbackError, match=r"m\.gguf: tokenizer\.ggml\.eos_token_id=4294967295"):
        load_gguf(path)


def test_linear_and_yarn_scaling_are_dropped(tmp_path):
    def linear(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(16.0)
        writer.add_rope_scaling_orig_ctx_len(4096)

    def longrope(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    params = random_params(CONFIG)
    expected = {
        linear: ("linear", {"factor": 4.0}),
        yarn: ("yarn", {"factor": 16.0, "original_max_position_embeddings": 4096}),
    }
    for metadata, (kind, parameters) in expected.items():
        write_gguf(tmp_path / "m.gguf", CONFIG, params, metadata=metadata)
        config, _ = load_gguf(tmp_path / "m.gguf")
        assert (config.rope_type, config.rope_parameters) == (kind, parameters)
    write_gguf(tmp_path / "m.gguf", CONFIG, params, metadata=longrope)
    with pytest.raises(HumpbackError, match="longrope"):
        load_gguf(tmp_path / "m.gguf")


def test_a_model_that_is_not_supported_loads_silently(tmp_path):
    params = random_params(CONFIG)
    path = tmp_path / "m.gguf"
    small = np.zeros(4, np.float32)
    cases = {
        "'blk.1.ffn_up.weight' is missing": {"skip": ("blk.1.ffn_up.weight",)},
        "unexpected tensor 'blk.0.extra'": {"extra": {"blk.0.extra": small}},
        "only 'llama' is supported": {"architecture": "qwen2"},
        "mixtures of experts": {"metadata": lambda writer: writer.add_expert_count(8)},
        "one of the 3 files of a split model": {
            "metadata": lambda writer: writer.add_uint16("split.count", 3),
            "skip": ("blk.1.ffn_up.weight",),
        },
        "only equal widths": {"metadata": lambda writer: writer.add_value_length(8)},
    }
    for message, options in cases.items():
        write_gguf(path, CONFIG, params, **options)
        with pytest.raises(HumpbackError, match=message) as caught:
            load_gguf(path)
        assert str(path) in str(caught.value)
    wider = dataclasses.replace(CONFIG, intermediate_size=64)
    write_gguf(path, wider, params)
    with pytest.raises(HumpbackError, match=r"'blk\.0\.ffn_gate\.weight' has shape"):
        load_gguf(path)


def test_a_tensor_type_without_decoder_gives_a_traceback(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, random_params(CONFIG))
    whole = path.read_bytes()
    name = b"blk.0.attn_v.weight"
    place = whole.index(name) + len(name) + 4 + 2 * 8  # after the name: dimensions, then the type
    for type_id, message in {
        int(Kind.I32): "type I32, which the gguf library cannot",
        255: "ggml type 255, which is unknown",
        int(Kind.Q6_K): "no multiple of the 256",
    }.items():
        path.write_bytes(whole[:place] + type_id.to_bytes(4, "little") + whole[place + 4 :])
        with pytest.raises(HumpbackError, match=message) as caught:
            load_gguf(path)
        assert "'blk.0.attn_v.weight'" in str(caught.value)


def test_an_incomplete_or_damaged_file_gives_a_traceback_or_hangs(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, random_params(CONFIG))
    whole = path.read_bytes()
    header = min(entry.start for entry in read_gguf_header(path).tensors.values())
    generator = random.Random(0)
    cuts = [0, 3, 4, 8, 23, header, len(whole) - 1]
    for size in [*cuts, *generator.sample(range(len(whole)), 30)]:
        path.write_bytes(whole[:size])
        with pytest.raises(HumpbackError, match=r"m\.gguf"):
            load_gguf(path)
    started = time.perf_counter()
    for position in generator.sample(range(header), 400):
        path.write_bytes(whole[:position] + b"\xf7" + whole[position + 1 :])
        try:
            load_gguf(path)
        except HumpbackError as error:
            assert "m.gguf" in str(error)
    assert time.perf_counter() - started < 30
    for text in (b"", b"PK\x03\x04" * 100):
        path.write_bytes(text)
        with pytest.raises(HumpbackError, match="not a readable GGUF file"):
            load_gguf(path)
    with pytest.raises(HumpbackError, match="absent"):
        load_gguf(tmp_path / "absent.gguf")


def test_metadata_differ_from_what_the_reference_reader_gives(tmp_path):
    path = tmp_path / "m.gguf"

    def metadata(writer):
        writer.add_array("some.floats", [0.5, 1.5])
        writer.add_array("some.flags", [True, False])
        writer.add_array("some.texts", ["", "é", "\n"])
        writer.add_uint64("some.large", 2**40)
        writer.add_int8("some.negative", -3)
        writer.add_bool("some.flag", True)
        writer.add_float64("some.double", 1e300)
        writer.add_custom_alignment(64)

    write_gguf(path, CONFIG, random_params(CONFIG), metadata=metadata)
    header, reference = read_gguf_header(path), gguf.GGUFReader(path)
    assert header.metadata == {
        key: field.contents()
        for key, field in reference.fields.items()
        if not key.startswith("GGUF.")
    }
    assert {
        name: (entry.shape, entry.type_id, entry.start) for name, entry in header.tensors.items()
    } == {
        tensor.name: (
            tuple(int(size) for size in reversed(tensor.shape)),
            int(tensor.tensor_type),
            tensor.data_offset,
        )
        for tensor in reference.tensors
    }
