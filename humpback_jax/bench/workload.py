"""What is measured: real texts, rendered and tokenised once, the same for every system."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from humpback_jax.corpus.documents import read_documents
from humpback_jax.corpus.segments import segments
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import common_start
from humpback_jax.models import LanguageModel, is_random

CHARS_PER_TOKEN = 4  # of English text, about
SHORT, LONG = (20, 80), (300, 500)  # tokens of the segments of the cases of these names
CASES = ("mixed", "single", "short", "long")


@dataclasses.dataclass(frozen=True)
class Case:
    """So many segments of `shortest` to `longest` tokens, `slots` of them decoded together.

    `drafts`, `mesh`: tokens that we guess in each step, and our devices, as `choose_compute` takes
    them; each of our copies of the model has so many slots.
    """

    name: str
    rows: int
    shortest: int
    longest: int
    slots: int
    drafts: str = "auto"
    mesh: str = "auto"


def choose_cases(name: str, mixed: Case) -> list[Case]:
    """The case of that name, or with "all" every one, the main case, `mixed`, first.

    `short` and `long` have other segments; `single` decodes one row at a time, and has an eighth of
    the rows.

    Raises:
      HumpbackError: no such case.
    """
    known = {
        "mixed": mixed,
        "single": dataclasses.replace(mixed, name="single", rows=-(-mixed.rows // 8), slots=1),
        "short": dataclasses.replace(mixed, name="short", shortest=SHORT[0], longest=SHORT[1]),
        "long": dataclasses.replace(mixed, name="long", shortest=LONG[0], longest=LONG[1]),
    }
    if name == "all":
        return list(known.values())
    if name not in known:
        raise HumpbackError(f"--case={name} is unknown; known: all, {', '.join(known)}.")
    return [known[name]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A job as token ids.

    Attributes:
      model: name or folder of the model, as we load it. hf: its folder in Hugging Face's format;
        gguf: its file for llama.cpp; each empty where no peer needs it.
      data: name of the documents' file.
      prompts: ids of each prompt. shared: how many of them all prompts begin with.
      max_new_tokens, stop_ids: when a text ends.
      drafts, mesh: as in `Case`.
    """

    model: str
    data: str
    hf: str
    gguf: str
    prompts: list[list[int]]
    shared: int
    max_new_tokens: int
    stop_ids: list[int]
    drafts: str = "auto"
    mesh: str = "auto"

    def figures(self, seconds: float, outputs: dict[int, list[int]]) -> dict[str, Any]:
        """Rates of a peer that drew `outputs`, by the prompt's place, without stop tokens.

        A text shorter than the limit was ended by a stop token, which was drawn too.
        """
        texts = [outputs[place] for place in range(len(self.prompts))]
        new = sum(min(len(text) + 1, self.max_new_tokens) for text in texts)
        return {
            "rows_per_s": len(texts) / seconds,
            "new_tokens_per_s": new / seconds,
            "tokens_per_s": (new + sum(map(len, self.prompts))) / seconds,
            "new_tokens": new,
            "outputs": texts,
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Workload:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def backward_workload(
    model: LanguageModel, data: str, case: Case, max_new_tokens: int, hf: str, gguf: str
) -> Workload:
    """Augmentation: real segments under the backward prompt. See `texts` for the errors."""
    encode, prompt = model.tokenizer.encode, model.template.backward_prompt
    found = texts(model, data, case.rows, case.shortest, case.longest)
    return Workload(
        model=model.name,
        data=Path(data).name,
        hf=hf,
        gguf=gguf,
        prompts=[encode(prompt(text)) for text in found],
        shared=len(common_start(model.tokenizer, prompt)),
        max_new_tokens=max_new_tokens,
        stop_ids=list(model.stop_ids),
        drafts=case.drafts,
        mesh=case.mesh,
    )


def texts(model: LanguageModel, data: str, count: int, shortest: int, longest: int) -> list[str]:
    """The first `count` segments of `shortest` to `longest` tokens.

    Args:
      data: documents, as the corpus stage reads and cuts them.

    Raises:
      HumpbackError: the data hold fewer such segments.
    """

    chars = longest * (1 if is_random(model.name) else CHARS_PER_TOKEN)  # random models read bytes

    def fitting() -> Iterator[str]:
        for document in read_documents([data]):
            for segment, _ in segments(document, chars):
                if shortest <= len(model.tokenizer.encode(segment.text)) <= longest:
                    yield segment.text

    found = list(itertools.islice(fitting(), count))
    if len(found) < count:
        raise HumpbackError(
            f"--data={data}: {len(found)} segments of {shortest} to {longest} tokens, {count} are "
            "wanted. Lower --rows, or widen --shortest and --longest."
        )
    return found
