"""A plain torch training loop: `python -m humpback_jax.bench.torch_sft JOB PRECISION SETTING`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from humpback_jax.bench.torch_model import torch_device, torch_model, torch_peak_bytes
from humpback_jax.bench.training_job import UNLABELLED, Row, TrainingJob

# Padded rows, or rows without a gap, where tokens attend to the examples before theirs: no mask is
# in the way of the fastest kernels then. "checkpointed" keeps no layer's activations.
SETTINGS = ("plain", "checkpointed", "wrapped", "wrapped_checkpointed")
OPTIMIZERS = ("adamw", "adafactor")


class TorchBatch(NamedTuple):
    """Tensors int64 [rows, T]."""

    tokens: Any
    labels: Any
    mask: Any | None  # where tokens are; None: everywhere


def measure(job: TrainingJob, precision: str, setting: str) -> dict[str, Any]:
    """Rates of a plain loop over the job's batches, the first step left out."""
    import torch

    before = torch_peak_bytes()
    device, workload = torch_device(), job.workload
    model = torch_model(job.hf).train()
    if setting.endswith("checkpointed"):
        model.gradient_checkpointing_enable()
    optimizer = _optimizer(workload.optimizer, model, workload.learning_rate)
    lower: Any = contextlib.nullcontext()
    if precision == "bfloat16":
        lower = torch.autocast(device, dtype=torch.bfloat16)
    ends, losses, tokens, supervised = [], [], 0, 0
    for number, rows in enumerate(job.batches()):
        wrap = setting.startswith("wrapped")
        batch = wrapped(rows, workload.row_tokens) if wrap else padded(rows)
        with lower:
            loss = model(
                input_ids=batch.tokens.to(device),
                attention_mask=None if batch.mask is None else batch.mask.to(device),
                labels=batch.labels.to(device),
                use_cache=False,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        ends.append(time.perf_counter())
        if number:
            tokens += batch.tokens.numel() if batch.mask is None else int(batch.mask.sum())
            supervised += int((batch.labels[:, 1:] != UNLABELLED).sum())
    seconds = ends[-1] - ends[0]
    return {
        "supervised_tokens_per_s": supervised / seconds,
        "tokens_per_s": tokens / seconds,
        "rows_per_s": (len(ends) - 1) * workload.batch_examples / seconds,
        "seconds": seconds,
        "steps": len(ends) - 1,
        "precision": precision,
        "setting": setting,
        "optimizer": workload.optimizer,
        "batch": workload.batch_examples,
        "losses": losses,
        "peak_bytes": torch_peak_bytes() - before,
    }


def padded(rows: list[Row]) -> TorchBatch:
    """One example a row, as wide as the longest."""
    import torch

    width = max(len(ids) for _, ids, _ in rows)
    tokens = torch.zeros((len(rows), width), dtype=torch.long)
    labels, mask = torch.full_like(tokens, UNLABELLED), torch.zeros_like(tokens)
    for place, (_, ids, wanted) in enumerate(rows):
        tokens[place, : len(ids)] = torch.tensor(ids)
        labels[place, : len(ids)] = torch.tensor(wanted)
        mask[place, : len(ids)] = 1
    return TorchBatch(tokens, labels, mask)


def wrapped(rows: list[Row], row_tokens: int) -> TorchBatch:
    """The examples one after another, cut into rows of the same length, at most `row_tokens`.

    What the last row lacks of a token more in each is left out.
    """
    import torch

    total = sum(len(ids) for _, ids, _ in rows)
    count = -(-total // row_tokens)
    used = total - total % count
    tokens = torch.tensor([token for _, ids, _ in rows for token in ids][:used])
    labels = torch.tensor([label for _, _, wanted in rows for label in wanted][:used])
    return TorchBatch(tokens.view(count, -1), labels.view(count, -1), None)


def _optimizer(name: str, model: Any, rate: float) -> Any:
    import torch

    if name == "adafactor":
        return torch.optim.Adafactor(model.parameters(), rate)
    return torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


if __name__ == "__main__":
    print(json.dumps(measure(TrainingJob.load(Path(sys.argv[1])), sys.argv[2], sys.argv[3])))
