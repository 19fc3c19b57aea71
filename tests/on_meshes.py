"""Answers and scores of one model on several meshes, as JSON: `python on_meshes.py MODEL MESH ...`.

A program of its own, because a process has as many CPU devices as it started with.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

DEVICES = 8
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
from eight_heads import eight_headed  # noqa: E402

from humpback_jax.compute import choose_compute, use_compilation_cache  # noqa: E402
from humpback_jax.inference import Inference  # noqa: E402
from humpback_jax.models import LanguageModel, load_model  # noqa: E402
from humpback_jax.sampling.memory import tree_bytes  # noqa: E402
from humpback_jax.sampling.sampler import Decoding  # noqa: E402
from humpback_jax.stages.sources import packaged_pairs  # noqa: E402


def model_of(name: str) -> LanguageModel:
    return eight_headed() if name == "tiny" else load_model(name)


def results(model: LanguageModel, mesh: str, rows: int, new: int) -> dict[str, Any]:
    reader = Inference(model, choose_compute("float32", 4, mesh=mesh))
    prompts = [
        (e.id, e.instruction + "\n" * (i % 3)) for i, e in enumerate(packaged_pairs("train"))
    ]
    prompts = prompts[:rows]
    template = model.template
    opening = template.question
    found: dict[str, Any] = {"bytes": tree_bytes(reader.replicas.engines[0].params)}
    for name, decoding in (
        ("greedy", Decoding(0.0, max_new_tokens=new)),
        ("sampled", Decoding(0.9, 0.9, max_new_tokens=new)),
    ):
        drawn = reader.generate(
            [(name, opening(text)) for name, text in prompts],
            decoding,
            seed=0,
            stage="mesh",
            opening=opening,
        )
        found[name] = [(each.text, each.tokens, each.logprob) for each in drawn]
    scored = reader.next_token_log_probs(prompts, range(5), opening=lambda text: text)
    copies = [1 if mesh is None else mesh.size for mesh in reader.share.meshes]
    return {**found, "scores": scored.tolist(), "copies": copies}


if __name__ == "__main__":
    use_compilation_cache()
    assert jax.device_count() == DEVICES
    chosen = model_of(sys.argv[1])
    count, tokens = int(sys.argv[2]), int(sys.argv[3])
    found = {mesh: results(chosen, mesh, count, tokens) for mesh in sys.argv[4:]}
    print(json.dumps(found))
