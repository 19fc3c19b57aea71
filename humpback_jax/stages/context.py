"""What every stage is given: the config, the run folder, and models loaded one at a time."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from humpback_jax.artifacts import Artifact, RunFolder
from humpback_jax.compute import Compute
from humpback_jax.inference import Inference
from humpback_jax.metrics import MetricsLog
from humpback_jax.models import LanguageModel, load_checkpoint
from humpback_jax.records import Example


@dataclasses.dataclass
class Context:
    """State of one run.

    Attributes:
      base: the pretrained model. seed, heldout: human pairs.
      validation: pairs that training is watched on.
      say: progress lines for people; metrics go to `metrics.jsonl`.
      profile: folder for traces of each training, if any.
    """

    config: Any
    folder: RunFolder
    compute: Compute
    base: LanguageModel
    seed: list[Example]
    heldout: list[Example]
    metrics: MetricsLog
    say: Callable[[str], None]
    profile: Path | None = None
    validation: Sequence[Example] = ()
    _cached: tuple[str, Inference] | None = None

    @property
    def base_artifact(self) -> Artifact:
        """The base model as a parent of other artifacts: known by its content."""
        return Artifact("base", "model", "", self.base.hash, (), 0, "", "base", {}, {})

    def model(self, artifact: Artifact) -> LanguageModel:
        """The model of an artifact, from disk (or the base)."""
        if artifact.name == "base":
            return self.base
        return load_checkpoint(self.folder.root / artifact.path)

    def inference(self, artifact: Artifact) -> Inference:
        """A model ready to be asked; the last one is kept, so that stages can share it."""
        if self._cached is None or self._cached[0] != artifact.hash:
            self.release()
            self._cached = (artifact.hash, Inference(self.model(artifact), self.compute))
        return self._cached[1]

    def release(self) -> None:
        """Gives the memory of the model kept by `inference` back: what comes next needs it."""
        self._cached = None
        gc.collect()  # the engine's threads and programs refer to one another

    @property
    def resume_root(self) -> Path:
        return self.folder.root / "resume"
