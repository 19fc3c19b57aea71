"""The rows that training is measured on: real pairs, tokenised once, in the order of a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.model.linear import LoraSpec
from humpback_jax.model.lora import PROJECTIONS, lora_spec
from humpback_jax.model.remat import Remat
from humpback_jax.models import LanguageModel
from humpback_jax.records import Example
from humpback_jax.rows import ReadReport, stream_examples
from humpback_jax.stages.sources import packaged_pairs
from humpback_jax.stages.texts import render
from humpback_jax.text.tokenize import tokenize_batch
from humpback_jax.training.examples import TrainingExample, keys_of
from humpback_jax.training.order import BatchOrder

UNLABELLED = -100  # what transformers takes for no label
Row = tuple[str, list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class TrainingWorkload:
    """SFT on `steps` batches of the first `rows` rows of a file, the responses supervised.

    Attributes:
      model: name or folder. data: a file of rows, or "builtin" for the packaged pairs.
      row_tokens: the longest example, and the longest packed row.
      lora_rank: of an adapter on the projections `lora_targets` (names); 0 for full tuning.
      remat: what our backward pass finds kept (`model/remat.py`).
      learning_rate: the same one in every step. optimizer: one of `optimizer.OPTIMIZERS`.
    """

    model: str
    data: str = "builtin"
    rows: int = 64
    steps: int = 6
    batch_examples: int = 8
    row_tokens: int = 2048
    lora_rank: int = 0
    remat: Remat = "none"
    learning_rate: float = 1e-5
    lora_targets: tuple[str, ...] = PROJECTIONS
    optimizer: str = "adamw"

    def adapter(self) -> LoraSpec | None:
        """None for full tuning.

        Raises:
          HumpbackError: a target that matches no projection.
        """
        if not self.lora_rank:
            return None
        return lora_spec(self.lora_rank, 2.0 * self.lora_rank, 0.0, tuple(self.lora_targets))


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """What a measuring program is given: a workload with its batches made.

    Attributes:
      rows: (id, tokens, labels); labels are the tokens, but `UNLABELLED` where a token is not
        supervised. `workload.batch_examples` rows after another are a batch.
      hf: folder of the model in Hugging Face's format, "" where no peer needs it.
    """

    workload: TrainingWorkload
    rows: list[Row]
    hf: str = ""

    @property
    def steps(self) -> int:
        return len(self.rows) // self.workload.batch_examples

    def batches(self) -> list[list[Row]]:
        size = self.workload.batch_examples
        return [self.rows[start : start + size] for start in range(0, len(self.rows), size)]

    def examples(self) -> list[TrainingExample]:
        return [
            TrainingExample(name, np.array(ids, np.int32), np.array(labels) >= 0)
            for name, ids, labels in self.rows
        ]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TrainingJob:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(TrainingWorkload(**fields.pop("workload")), **fields)


def training_rows(model: LanguageModel, workload: TrainingWorkload) -> list[Row]:
    """The rows of the first batches of a run on the workload's pairs, with seed 0.

    Rows that are too long are left out.

    Raises:
      HumpbackError: unreadable rows, or too few of them.
    """
    data, count, steps = workload.data, workload.rows, workload.steps
    batch_examples = workload.batch_examples
    if data == "builtin":
        pairs: list[Example] = packaged_pairs("train")[:count]
    else:
        pairs = list(itertools.islice(stream_examples(Path(data), "seed", ReadReport()), count))
    if len(pairs) < count:
        raise HumpbackError(f"--data={data}: {len(pairs)} rows, {count} are wanted by --rows.")
    limit = min(workload.row_tokens + 1, model.config.max_position_embeddings)
    rendered = render(model.template, pairs, "forward")
    examples = tokenize_batch(model.tokenizer, rendered, limit, "drop").examples
    if len(examples) < steps * batch_examples:
        raise HumpbackError(
            f"--data={data}: {len(examples)} rows of at most {limit} tokens, and {steps} steps of "
            f"{batch_examples} want {steps * batch_examples}. Raise --rows or lower --steps."
        )
    keys = keys_of([("seed", example.id) for example in examples])
    order = BatchOrder(keys, batch_examples, 0)
    chosen = [examples[index] for step in range(steps) for index in order.indices(step)]
    return [(e.id, e.ids.tolist(), np.where(e.mask, e.ids, UNLABELLED).tolist()) for e in chosen]
