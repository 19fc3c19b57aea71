"""TRL's SFTTrainer: `python -m humpback_jax.bench.trl JOB PRECISION SETTING`."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from humpback_jax.bench.torch_model import torch_model, torch_peak_bytes
from humpback_jax.bench.training_job import UNLABELLED, TrainingJob

# How TRL is set up, beside what all share. Rows of a packed step hold about what a batch does.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},  # padded batches, gradient checkpointing
    "plain": {"gradient_checkpointing": False},
    "packed": {"gradient_checkpointing": False, "packing": True},  # best fit, masked by example
    "wrapped": {"gradient_checkpointing": False, "packing": True, "packing_strategy": "wrapped"},
}


def measure(job: TrainingJob, precision: str, setting: str) -> dict[str, Any]:
    """Rates of SFTTrainer over the job's rows, its first step left out."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    before = torch_peak_bytes()
    workload, options = job.workload, dict(SETTINGS[setting])
    batch, row_tokens = workload.batch_examples, workload.row_tokens
    if options.get("packing"):
        lengths = [len(ids) for _, ids, _ in job.rows]
        tokens = sum(lengths) / job.steps
        batch = max(round(tokens / row_tokens), 1)
        row_tokens = min(row_tokens, max(math.ceil(tokens), *lengths))
    ends, counts, losses = [], [], []

    class Clock(TrainerCallback):  # type: ignore[misc]  # no stubs
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class Counting(SFTTrainer):  # type: ignore[misc]  # no stubs
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            supervised = int((inputs["labels"][:, 1:] != UNLABELLED).sum())
            used = inputs.get("attention_mask")
            used = inputs["input_ids"].numel() if used is None else int(used.sum())
            counts.append((supervised, used))
            loss = super().training_step(model, inputs, *rest, **more)
            losses.append(loss)
            return loss

    model = torch_model(job.hf)
    adapter = None
    if spec := workload.adapter():
        from peft import LoraConfig

        adapter = LoraConfig(
            r=spec.rank,
            lora_alpha=int(spec.alpha),
            target_modules=[f"{name}_proj" for name in spec.targets],
        )
    rows = [{"input_ids": ids, "labels": labels} for _, ids, labels in job.rows]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Counting(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(job.hf),
            train_dataset=Dataset.from_list(rows),
            peft_config=adapter,
            callbacks=[Clock()],
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                num_train_epochs=1,
                max_length=row_tokens,
                bf16=precision == "bfloat16",
                learning_rate=workload.learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.1,
                adam_beta2=0.95,
                logging_steps=1000,
                save_strategy="no",
                train_sampling_strategy="sequential",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                **options,
            ),
        )
        trainer.train()
    seconds = ends[-1] - ends[0]
    supervised, tokens = (sum(column) for column in zip(*counts[1:], strict=True))
    return {
        "supervised_tokens_per_s": supervised / seconds,
        "tokens_per_s": tokens / seconds,
        "rows_per_s": workload.batch_examples * (job.steps - job.steps / len(ends)) / seconds,
        "seconds": seconds,
        "steps": len(ends) - 1,
        "precision": precision,
        "setting": setting,
        "batch": batch,
        "losses": [float(loss) for loss in losses],
        "peak_bytes": torch_peak_bytes() - before,
    }


if __name__ == "__main__":
    print(json.dumps(measure(TrainingJob.load(Path(sys.argv[1])), sys.argv[2], sys.argv[3])))
