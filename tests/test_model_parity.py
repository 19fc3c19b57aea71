"""The model is the model that the weights were trained for: logits equal transformers'.

If these fail, users sample from, and train, something that is not the LLaMA they named.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from tiny_llama import (
    SIZES,
    from_torch,
    logits_function,
    random_tokens,
    torch_llama,
    torch_logits,
    whole_rows,
)

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import bind, init_params, stack_layers, unstack_layers
from humpback_jax.model.rope import rope_tables

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FAMILY = {
    "llama_1": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama_2": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "llama_3": {"rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    "llama_3.1": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "llama_3.2": {
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
        "head_dim": 24,
    },
    "tinyllama": {"num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "smollm2": {
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope_linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "rope_linear_old_spelling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "rope_yarn": {"rope_scaling": YARN},
    "rope_yarn_own_attention_factor": {"rope_scaling": {**YARN, "attention_factor": 0.7}},
    "rope_yarn_betas": {"rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 2.0}},
    "rope_yarn_mscale": {"rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.2}},
    "rope_yarn_untruncated": {"rope_scaling": {**YARN, "truncate": False}},
}
LENGTH = 100  # beyond max_position_embeddings = 64 and the 32 places of original training


@functools.cache
def pair(name: str):
    """(torch model, our config, our stacked params, tokens, torch logits)."""
    model = torch_llama(**FAMILY[name])
    tokens = random_tokens((2, LENGTH))
    return model, *from_torch(model), tokens, torch_logits(model, tokens)


@pytest.mark.parametrize("name", FAMILY)
def test_logits_equal_transformers(name) -> None:
    _, config, params, tokens, expected = pair(name)
    logits = np.asarray(logits_function(config)(params, *whole_rows(tokens)))
    assert logits.dtype == np.float32
    assert 0.5 < expected.std() < 10, "the test sees nothing if all logits are alike"
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["llama_1", "llama_3.2", "smollm2", "biases", "rope_dynamic"])
def test_logits_with_layers_kept_apart_equal_transformers(name) -> None:
    """The layout of CPU training and of decoding; rotation is the same code in both."""
    _, config, params, tokens, expected = pair(name)
    run = logits_function(config, "unrolled")
    logits = np.asarray(run(unstack_layers(params), *whole_rows(tokens)))
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("name", [n for n in FAMILY if n.startswith(("rope", "llama_3.1"))])
def test_every_rope_scaling_changes_the_logits(name) -> None:
    """Else the comparison above would pass with the scaling dropped on both sides."""
    changes = {k: v for k, v in FAMILY[name].items() if k != "rope_scaling"}
    _, _, _, tokens, expected = pair(name)
    plain = torch_logits(torch_llama(**changes), tokens)
    assert np.abs(plain - expected).max() > 0.05


@pytest.mark.parametrize("name", ["rope_dynamic", "rope_yarn", "llama_3.1"])
def test_packed_neighbours_leave_a_sequence_s_logits_alone(name) -> None:
    """A short sequence packed beside a long one is rotated as if it stood alone."""
    model, config, params, _, _ = pair(name)
    lengths = (90, 20, 75)
    tokens = random_tokens((1, sum(lengths) + 3))
    positions = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(3)]).astype(np.int32)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 3]).astype(np.int32)
    logits = np.asarray(logits_function(config)(params, tokens, positions[None], segments[None]))
    for segment in (1, 2, 3):
        places = segments == segment
        # transformers remembers the longest sequence it has seen; start anew
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        alone = torch_logits(model, tokens[:, places])
        assert np.abs(logits[:, places] - alone).max() < 1e-4, segment


def test_rope_tables_equal_transformers_far_out() -> None:
    """At position 100,000 a rounding difference in the frequencies would have grown large."""
    scaling = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    model = torch_llama(rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=131072)
    config, _ = from_torch(model)
    positions = np.array([[0, 1, 5000, 100_000, 131_071]], np.int32)
    cos, sin = rope_tables(config, positions)
    with torch.no_grad():
        places = torch.tensor(positions, dtype=torch.long)
        expected_cos, expected_sin = model.model.rotary_emb(torch.zeros(1), places)
    half = config.head_dim // 2
    assert np.abs(np.asarray(cos) - expected_cos.numpy()[..., :half]).max() < 1e-4
    assert np.abs(np.asarray(sin) - expected_sin.numpy()[..., :half]).max() < 1e-4


def test_bfloat16_logits_stay_close_to_float32() -> None:
    _, config, params, tokens, expected = pair("llama_3")
    for precision in (Precision("bfloat16", "float32"), Precision("bfloat16", "bfloat16")):
        run = logits_function(config, precision=precision)
        logits = np.asarray(run(params, *whole_rows(tokens)))
        assert logits.dtype == np.float32
        assert np.abs(logits - expected).mean() < 0.02 * expected.std()


@pytest.mark.parametrize("kind", ["longrope", "su", "mrope", "ntk", "Llama3"])
@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_an_unknown_rope_type_is_refused_not_ignored(kind, spelling) -> None:
    raw = {"model_type": "llama", **SIZES, "rope_scaling": {spelling: kind, "factor": 2.0}}
    with pytest.raises(HumpbackError, match=kind):
        LlamaConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 3}}, "alpha"),
        ({"model_type": "mistral"}, "mistral"),
        # transformers goes by model_type: a sliding window, and a factor on the embeddings
        ({"model_type": "mistral", "architectures": ["LlamaForCausalLM"]}, "mistral"),
        ({"model_type": "granite", "architectures": ["LlamaForCausalLM"]}, "granite"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_a_config_that_we_would_run_wrongly_is_refused(changes, message) -> None:
    with pytest.raises(HumpbackError, match=message):
        LlamaConfig.from_hf({"model_type": "llama", **SIZES, **changes})


def test_position_scaling_written_beside_the_newer_field_is_not_ignored() -> None:
    """As model cards advise for long texts; where the two agree, nothing is in doubt."""
    plain = {"rope_type": "default", "rope_theta": 500000.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    raw = {"model_type": "llama", **SIZES, "rope_parameters": plain, "rope_scaling": yarn}
    with pytest.raises(HumpbackError, match="rope_parameters and rope_scaling"):
        LlamaConfig.from_hf(raw)
    raw["rope_parameters"] = {**yarn, "rope_theta": 500000.0}
    agreed = LlamaConfig.from_hf({**raw, "rope_theta": 500000.0})
    assert (agreed.rope_type, agreed.rope_theta) == ("yarn", 500000.0)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_trained_length_beside_the_rope_fields_is_not_dropped(kind) -> None:
    """transformers lets a top-level original_max_position_embeddings override the inner one."""
    scaling = dict(YARN if kind == "yarn" else LLAMA3_ROPE)
    scaling["original_max_position_embeddings"] = 48
    outer = {**SIZES, "rope_scaling": scaling, "original_max_position_embeddings": 16}
    config = LlamaConfig.from_hf({"model_type": "llama", **outer})
    assert config.rope_parameters["original_max_position_embeddings"] == 16
    model = torch_llama(**outer)
    _, params = from_torch(model)
    tokens = random_tokens((1, LENGTH))
    logits = np.asarray(logits_function(config)(params, *whole_rows(tokens)))
    assert np.abs(logits - torch_logits(model, tokens)).max() < 1e-4


@pytest.mark.parametrize("name", FAMILY)
def test_config_survives_export_and_import(name) -> None:
    config = pair(name)[1]
    varied = dataclasses.replace(
        config, eos_token_ids=(2, 5), bos_token_id=1, pad_token_id=0, rms_norm_eps=3e-6
    )
    for each in (config, varied, dataclasses.replace(config, eos_token_ids=(0,))):
        assert LlamaConfig.from_hf(each.to_hf()) == each


@pytest.mark.parametrize("name", FAMILY)
def test_transformers_reads_our_config_to_the_same_model(name) -> None:
    model, config, _, tokens, expected = pair(name)
    theirs = transformers.LlamaConfig(**config.to_hf(), attn_implementation="eager")
    again = transformers.LlamaForCausalLM(theirs).eval()
    again.load_state_dict(model.state_dict())
    assert np.abs(torch_logits(again, tokens) - expected).max() < 1e-5


def test_a_yarn_model_is_refused_for_saying_that_it_was_tuned_so() -> None:
    plain = LlamaConfig.from_hf({"model_type": "llama", **SIZES, "rope_scaling": YARN})
    raw = {"model_type": "llama", **SIZES, "rope_scaling": {**YARN, "finetuned": True}}
    assert LlamaConfig.from_hf(raw) == plain


def test_an_exported_tokenizer_is_taken_for_a_broken_one_of_mistral() -> None:
    """transformers 4.57.3 does so, and advises a flag that breaks it, unless this is >= 5."""
    written = LlamaConfig.from_hf({"model_type": "llama", **SIZES}).to_hf()
    assert written["transformers_version"] == "5.0.0"


def test_fresh_parameters_have_the_tree_of_loaded_ones() -> None:
    for name in ("llama_3.2", "biases", "llama_1"):
        _, config, params, _, _ = pair(name)
        for layout in ("scan", "unrolled"):
            make = functools.partial(init_params, config, layout=layout)
            fresh = jax.eval_shape(make, jax.random.key(0))
            expected = unstack_layers(params) if layout == "unrolled" else params
            shapes = jax.tree.map(lambda x: x.shape, fresh)
            assert shapes == jax.tree.map(lambda x: x.shape, expected)


def test_stacking_layers_undoes_unstacking_in_numeric_order() -> None:
    """With more than ten layers, an order by name would put layer 10 before layer 2."""
    params = {"layers": {"mlp": {"up": {"kernel": np.arange(12.0).reshape(12, 1, 1)}}}}
    again = stack_layers(unstack_layers(params))["layers"]["mlp"]["up"]["kernel"]
    assert np.array_equal(np.asarray(again), params["layers"]["mlp"]["up"]["kernel"])


def test_parameters_that_do_not_fit_the_model_are_refused() -> None:
    """A tree with a missing, an additional or a mis-shaped leaf must not run as something else."""
    _, config, params, _, _ = pair("llama_1")
    additional = {**params, "extra": {"kernel": np.zeros((2, 2), np.float32)}}
    missing = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    misshaped = {**params, "norm": {"scale": np.ones(7, np.float32)}}
    for wrong, name in ((additional, "extra"), (missing, "lm_head"), (misshaped, "norm")):
        with pytest.raises(HumpbackError, match=name):
            bind(config, wrong)


@pytest.mark.real_model
def test_the_default_model_s_logits_equal_torch() -> None:
    """transformers reads the same GGUF file with its own dequantisation and its own row order."""
    from humpback_jax.weights.gguf_io import load_gguf
    from humpback_jax.weights.named import resolve

    path = resolve("smollm2-135m-instruct").path
    config, params = load_gguf(path)
    model = transformers.LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = random_tokens((1, 96), config.vocab_size)
    expected = torch_logits(model.eval(), tokens)
    logits = np.asarray(logits_function(config)(params, *whole_rows(tokens)))
    assert expected.std() > 1
    assert np.abs(logits - expected).max() < 1e-3
