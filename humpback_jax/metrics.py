"""Metrics of a run, for people and plots: JSON lines and TensorBoard events. Not artifacts."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


def logged_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of `FOLDER/metrics.jsonl`, but for lines that a kill cut short."""
    path, rows = folder / FILE_NAME, []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class MetricsLog:
    """Writes rows to `FOLDER/metrics.jsonl` and their numbers to `FOLDER/tensorboard/STAGE/`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] = {}

    def write(self, stage: str, row: dict[str, Any]) -> None:
        """Logs one row; its "step" is the x-axis."""
        line = json.dumps({"time": round(time.time(), 3), "stage": stage, **row})
        with open(self._folder / FILE_NAME, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        writer = self._writer(stage)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from tensorboardX import SummaryWriter

            folder = self._folder / "tensorboard" / stage.replace("/", "_")
            self._writers[stage] = SummaryWriter(str(folder))
        return self._writers[stage]
