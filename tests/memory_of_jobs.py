"""Draws a few short texts in several jobs; prints the memory of this process after each, in bytes.

`python memory_of_jobs.py JOBS`
"""

from __future__ import annotations

import json
import sys

import numpy as np

from humpback_jax.compute import choose_compute, use_cores
from humpback_jax.inference import Inference
from humpback_jax.models import load_model
from humpback_jax.sampling.engine import Request
from humpback_jax.sampling.sampler import Decoding, record_key


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main(jobs: int) -> None:
    use_cores()
    reader = Inference(load_model("smollm2-135m-instruct"), choose_compute("float32", 32))
    prompt = np.arange(100, 110, dtype=np.int32)
    requests = [
        Request(str(n), prompt, record_key(0, "jobs", str(n), 0), Decoding(max_new_tokens=2))
        for n in range(4)
    ]
    found = []
    for _ in range(jobs):
        reader.replicas.generate(requests)
        found.append(resident_bytes())
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
