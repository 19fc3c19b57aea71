"""`transformers.generate`: `python -m humpback_jax.bench.hf WORKLOAD PRECISION BATCHES`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from humpback_jax.bench.workload import Workload

TRIAL_ROWS = 32  # rows on which the batch size is chosen


def measure(workload: Workload, precision: str, batches: list[int]) -> dict[str, Any]:
    """Rates of greedy generation with the best of some batch sizes, prompts sorted by length."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(workload.hf, dtype=dtype).eval().to(device)
    order = sorted(range(len(workload.prompts)), key=lambda i: -len(workload.prompts[i]))

    def run(chosen: list[int], size: int) -> tuple[float, dict[int, list[int]]]:
        outputs: dict[int, list[int]] = {}
        started = time.perf_counter()
        for start in range(0, len(chosen), size):
            batch = chosen[start : start + size]
            prompts = [workload.prompts[i] for i in batch]
            width = max(map(len, prompts))
            tokens = torch.zeros((len(batch), width), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, prompt in enumerate(prompts):
                tokens[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            with torch.inference_mode():
                drawn = model.generate(
                    tokens.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=workload.max_new_tokens,
                    do_sample=False,
                    eos_token_id=workload.stop_ids,
                    pad_token_id=workload.stop_ids[0],
                )[:, width:]
            for index, row in zip(batch, drawn.tolist(), strict=True):
                ends = [i for i, token in enumerate(row) if token in workload.stop_ids]
                outputs[index] = row[: ends[0]] if ends else row
        return time.perf_counter() - started, outputs

    trial = order[:: max(len(order) // TRIAL_ROWS, 1)]
    run(trial[:2], 2)
    rates = {size: len(trial) / run(trial, size)[0] for size in batches if len(batches) > 1}
    best = max(rates, key=lambda size: rates[size]) if rates else batches[0]
    seconds, outputs = run(order, best)
    return {
        **workload.figures(seconds, outputs),
        "precision": precision,
        "batch": best,
    }


if __name__ == "__main__":
    sizes = [int(size) for size in sys.argv[3].split(",")]
    print(json.dumps(measure(Workload.load(Path(sys.argv[1])), sys.argv[2], sizes)))
