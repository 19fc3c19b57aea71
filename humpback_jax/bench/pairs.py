"""The pairs that the curators are measured on."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

from humpback_jax.curators import PairText
from humpback_jax.errors import HumpbackError
from humpback_jax.records import Example
from humpback_jax.rows import ReadReport, stream_examples
from humpback_jax.stages.sources import packaged_pairs


@dataclasses.dataclass(frozen=True)
class PairsJob:
    """Real pairs to rate, `slots` rows decoded together, reasons of up to `max_new_tokens`.

    data: name of the file that the pairs are from.
    """

    model: str
    data: str
    precision: str
    slots: int
    max_new_tokens: int
    pairs: list[PairText]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> PairsJob:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["pairs"] = [PairText(**pair) for pair in fields["pairs"]]
        return cls(**fields)


def read_pairs(data: str, count: int) -> list[PairText]:
    """The first `count` pairs of a file, or of the packaged seed pairs ("builtin").

    Raises:
      HumpbackError: unreadable rows, a row that is no pair, or fewer rows.
    """
    if data == "builtin":
        examples: list[Example] = packaged_pairs("train")[:count]
    else:
        rows = stream_examples(Path(data), "seed", ReadReport())
        examples = list(itertools.islice(rows, count))
    if len(examples) < count:
        raise HumpbackError(f"--data={data}: {len(examples)} pairs, {count} are wanted by --rows.")
    for example in examples:
        if not example.messages:
            raise HumpbackError(
                f"--data={data}: row {example.id} is plain text; pairs need an instruction and a "
                "response."
            )
    return [PairText(e.id, e.instruction, e.response) for e in examples]
