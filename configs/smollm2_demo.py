"""Two rounds of Humpback on SmolLM2-135M-Instruct, on a laptop.

What it shows: the whole loop on a real pretrained model and real text. The base is already
instruction-tuned, and the packaged seed set is small, so the gain over the base is adaptation to
the seed's style; what the demo proves is that every stage does its job, and by how much.

Unlabelled text: the language reference that every Python ships. Seed: the packaged pairs.

Launch:   humpback run --config=configs/smollm2_demo.py --workdir=runs/demo     (or: make demo)
Expected: see README.md, whose results table a command writes.
Rehearse: humpback run --config=configs/smollm2_demo.py:tiny --workdir=runs/rehearsal
"""

from __future__ import annotations

from typing import Any

from humpback_jax.config import apply_tiny, arguments, default_config


def get_config(argument: str = "") -> Any:
    config = default_config()
    with config.unlocked():
        config.name = "smollm2-demo"
        config.base.model = "smollm2-135m-instruct"
        config.data.seed_limit = 56
        config.corpus.update({"segments": 48, "min_chars": 600, "max_chars": 1200})
        for section in (config.backward, config.train):
            # A higher rate than the paper's, which is for 7B and 500 steps or more: here, 7 to 9.
            section.update({"learning_rate": 1e-4, "end_learning_rate": 9e-5, "schedule": "linear"})
            section.update({"batch_examples": 8, "row_tokens": 512, "dropout": 0.0})
            section.update({"epochs": 1.0, "eval_every": 5})
        config.augment.max_new_tokens = 64
        config.curate.update({"curator": "pmi", "also": ("rubric_likelihood", "rubric")})
        config.curate.update({"also_limit": 16, "max_new_tokens": 128})
        config.curate.update({"select": "top_fraction", "fraction": 0.3})
        config.meters.curators = ("rubric_likelihood", "combined")
        config.compute.update({"precision": "bfloat16", "batch_size": 32})
    if "tiny" in arguments(argument, ("tiny",), "configs/smollm2_demo.py"):
        apply_tiny(config)
    return config
