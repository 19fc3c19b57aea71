"""Collectives of a train step for 8 devices, as JSON: `python collectives_of_training.py MESH ...`.

A program of its own, because XLA warns on the standard error of a process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

from humpback_jax.aot.hlo import collectives
from humpback_jax.aot.train import lower_step, plan_training
from humpback_jax.model.shapes import SHAPES
from humpback_jax.parallel.mesh import parse_mesh
from humpback_jax.training.trainer import TrainSpec

VOCAB, WIDTH, TOKENS = 512, 64, 64


def main() -> None:
    config = dataclasses.replace(SHAPES["tiny"], vocab_size=VOCAB, num_hidden_layers=1)
    found = {}
    for mesh in sys.argv[1:]:
        run = TrainSpec(1, row_tokens=TOKENS)
        plan = plan_training(config, run, jax.devices(), parse_mesh(mesh), rows=1)
        program = lower_step(plan)[0].compile().as_text()
        found[mesh] = [dataclasses.asdict(each) for each in collectives(program)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
