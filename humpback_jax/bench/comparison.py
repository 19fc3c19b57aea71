"""How systems are compared."""

from __future__ import annotations

import dataclasses

PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Our figures, and those of others on the same input.

    Attributes:
      precision: one of `PRECISIONS`, of the peers too; "best" measures each system in both, and the
        better one counts. A peer with a quantised file has the precision of that file.
      peers: other systems, measured in turn with ours.
      rounds: measurements of each; the best one counts, for everybody.
    """

    precision: str = "float32"
    peers: tuple[str, ...] = ()
    rounds: int = 1

    @property
    def precisions(self) -> tuple[str, ...]:
        return PRECISIONS if self.precision == "best" else (self.precision,)
