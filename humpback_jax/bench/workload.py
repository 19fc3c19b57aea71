"""What is measured: real texts, rendered and tokenised once, the same for every system."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from humpback_jax.corpus.documents import read_documents
from humpback_jax.corpus.segments import segments
from humpback_jax.errors import HumpbackError
from humpback_jax.models import LanguageModel

CHARS_PER_TOKEN = 4  # of English text, about


@dataclasses.dataclass(frozen=True)
class Workload:
    """A job as token ids.

    Attributes:
      model: name or folder of the model, as we load it. hf: its folder in Hugging Face's format.
      prompts: ids of each prompt. shared: how many of them all prompts begin with.
      max_new_tokens, stop_ids: when a text ends.
    """

    model: str
    hf: str
    precision: str
    prompts: list[list[int]]
    shared: int
    max_new_tokens: int
    stop_ids: list[int]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Workload:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def texts(model: LanguageModel, data: str, count: int, shortest: int, longest: int) -> list[str]:
    """The first `count` segments of `shortest` to `longest` tokens.

    Args:
      data: documents, as the corpus stage reads and cuts them.

    Raises:
      HumpbackError: the data hold fewer such segments.
    """

    def fitting() -> Iterator[str]:
        for document in read_documents([data]):
            for segment, _ in segments(document, CHARS_PER_TOKEN * longest):
                if shortest <= len(model.tokenizer.encode(segment.text)) <= longest:
                    yield segment.text

    found = list(itertools.islice(fitting(), count))
    if len(found) < count:
        raise HumpbackError(
            f"--data={data}: {len(found)} segments of {shortest} to {longest} tokens, {count} are "
            "wanted. Lower --rows, or widen --shortest and --longest."
        )
    return found
