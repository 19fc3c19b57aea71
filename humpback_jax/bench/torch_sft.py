"""A plain torch training loop: `python -m humpback_jax.bench.torch_sft JOB PRECISION SETTING`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from humpback_jax.bench.process import peak_bytes
from humpback_jax.bench.training_job import UNLABELLED, TrainingJob

SETTINGS = ("plain", "checkpointed")  # whether the layers' activations are kept


def measure(job: TrainingJob, precision: str, setting: str) -> dict[str, Any]:
    """Rates of padded batches and torch's AdamW over the job's rows, the first step left out."""
    import torch
    from transformers import AutoModelForCausalLM

    before = peak_bytes()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(job.hf, dtype=torch.float32)
    model.to(device).train()
    if setting == "checkpointed":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        job.workload.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True,
    )
    lower: Any = contextlib.nullcontext()
    if precision == "bfloat16":
        lower = torch.autocast(device, dtype=torch.bfloat16)
    ends, losses, tokens, supervised = [], [], 0, 0
    for number, rows in enumerate(job.batches()):
        width = max(len(ids) for _, ids, _ in rows)
        inputs = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full_like(inputs, UNLABELLED)
        mask = torch.zeros_like(inputs)
        for place, (_, ids, wanted) in enumerate(rows):
            inputs[place, : len(ids)] = torch.tensor(ids)
            labels[place, : len(ids)] = torch.tensor(wanted)
            mask[place, : len(ids)] = 1
        with lower:
            loss = model(
                input_ids=inputs.to(device),
                attention_mask=mask.to(device),
                labels=labels.to(device),
                use_cache=False,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        ends.append(time.perf_counter())
        if number:
            tokens += int(mask.sum())
            supervised += int((labels[:, 1:] != UNLABELLED).sum())
    seconds = ends[-1] - ends[0]
    return {
        "supervised_tokens_per_s": supervised / seconds,
        "tokens_per_s": tokens / seconds,
        "rows_per_s": (len(ends) - 1) * job.workload.batch_examples / seconds,
        "seconds": seconds,
        "steps": len(ends) - 1,
        "precision": precision,
        "setting": setting,
        "batch": job.workload.batch_examples,
        "losses": losses,
        "peak_bytes": peak_bytes() - before,
    }


if __name__ == "__main__":
    print(json.dumps(measure(TrainingJob.load(Path(sys.argv[1])), sys.argv[2], sys.argv[3])))
