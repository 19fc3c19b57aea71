"""The tiny model with 8 heads and 4 key/value heads, which meshes of 8 devices divide."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from humpback_jax.model.llama import init_params
from humpback_jax.models import LanguageModel, load_model


def eight_headed() -> LanguageModel:
    """Random weights; those of the embedding are large, so that the next token is decided."""
    model = load_model("tiny-random")
    config = dataclasses.replace(model.config, num_attention_heads=8, num_key_value_heads=4)
    params = jax.tree.map(np.array, init_params(config, jax.random.key(1)))
    params["embed"]["embedding"] *= 20
    return dataclasses.replace(model, config=config, params=params)
