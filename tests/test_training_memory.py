"""What full tuning takes of a machine's memory, beside torch with gradient checkpointing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from humpback_jax.bench.process import measure_apart
from humpback_jax.bench.training_job import TrainingJob
from humpback_jax.corpus.documents import PYDOC_TOPICS, read_documents
from humpback_jax.models import export_hf, load_model

ROWS, PLACES = 4, 2048


@pytest.mark.slow
@pytest.mark.real_model
def test_tuning_the_default_model_takes_more_than_0_7_of_torch_s_memory(tmp_path: Path) -> None:
    """Peak of each process less what it had before the model was loaded: 4 rows of 2,048 tokens."""
    model = load_model("smollm2-135m-instruct")
    export_hf(tmp_path / "hf", model)
    texts = (document.text for document in read_documents([PYDOC_TOPICS]))
    tokens = [
        token for text in itertools.islice(texts, 60) for token in model.tokenizer.encode(text)
    ]
    width = PLACES + 1
    rows = [tokens[start * width : (start + 1) * width] for start in range(2 * ROWS)]
    assert {len(row) for row in rows} == {width}
    job = tmp_path / "job.json"
    named = [(f"row-{number}", row, row) for number, row in enumerate(rows)]
    TrainingJob(model.name, str(tmp_path / "hf"), PLACES, ROWS, 0, 1e-5, named, "full").save(job)
    ours = measure_apart("sft", job, "float32")
    theirs = measure_apart("torch_sft", job, "float32", "checkpointed")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert ours["peak_bytes"] <= 0.7 * theirs["peak_bytes"]
