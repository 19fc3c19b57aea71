"""Whether a run folder still holds what its manifest says, and whether its work can be redone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from humpback_jax.artifacts import Row, Stage, rows_hash
from humpback_jax.compute import choose_compute
from humpback_jax.curators import PairText, Scored, rate
from humpback_jax.environment import describe_environment
from humpback_jax.errors import HumpbackError
from humpback_jax.inference import Inference
from humpback_jax.models import LanguageModel, load_checkpoint, load_model
from humpback_jax.records import NO_ROOM
from humpback_jax.run_view import RunView
from humpback_jax.sampling.sampler import Decoding

SLICE = 2  # rows of each kind that are made again
# Rows packed beside other neighbours differ by rounding: float32 in the 7th digit of log p(y).
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
LIKELIHOOD_CURATORS = ("rubric_likelihood", "pmi", "pmi_frozen")


def verify_run(workdir: Path, say: Callable[[str], None]) -> Row:
    """Recomputes every artifact's hash, then makes a slice of the run's work again.

    Checked for each artifact: its sealed `artifact.json` agrees with the manifest; its key follows
    from its stage, fields and parents; its parents exist; its rows, or weights, config, tokenizer
    and template, have the hash. The slice: the first instructions that M_yx had room for are drawn
    again, and the first ratings of the last round's likelihood curators made again.

    Args:
      say: progress lines.

    Returns:
      {"ok", "differs": one sentence each, "checked": number of things compared}.

    Raises:
      HumpbackError: no readable manifest.
    """
    run = RunView(workdir)
    if not run.entries:
        raise HumpbackError(
            f"{workdir}: the manifest names no artifact, so nothing can be verified."
        )
    verifier = _Verifier(run, say)
    verifier.artifacts()
    verifier.slice()
    if verifier.differs:
        say("to make again what differs: delete its folder in store/, and run as before")
    return {
        "ok": not verifier.differs,
        "differs": verifier.differs,
        "checked": verifier.checked,
    }


class _Verifier:
    """Collects what differs. Artifacts that share a folder are read once."""

    def __init__(self, run: RunView, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self.differs: list[str] = []
        self.checked = 0
        self._broken: set[str] = set()
        self._content: dict[str, list[str]] = {}
        self._base = self._load_base()

    def artifacts(self) -> None:
        for name, entry in self.run.entries.items():
            path = str(entry.get("path"))
            problems = self._guarded(partial(self._identity, name)) or []
            if path not in self._content:
                self._content[path] = self._guarded(partial(self._content_problems, name)) or []
            self._note(name, [*problems, *self._content[path]])

    def slice(self) -> None:
        """Makes the first rows again, where the models and rows that this takes are sound."""
        try:
            self._compute = choose_compute(**self.run.config.compute)
        except (HumpbackError, AttributeError, TypeError) as error:
            self._note("config.json", [f"cannot be used ({error})"])
            return
        for name in self.run.names("candidates"):
            self._redo(name, self._candidates)
        last = self.run.rounds[-1] if self.run.rounds else 0
        for name in self.run.names("scores"):
            if name.startswith(f"round_{last}/"):
                self._redo(name, self._scores)

    def _note(self, name: str, problems: Sequence[str]) -> None:
        self.checked += 1
        if problems:
            self._broken.add(name)
            self.differs.extend(f"{name}: {problem}" for problem in problems)
        self.say(f"{name}: {'; '.join(problems) if problems else 'agrees'}")

    def _guarded(self, check: Callable[[], list[str] | None]) -> list[str] | None:
        try:
            return check()
        except HumpbackError as error:
            return [_short(str(error))]
        except Exception as error:  # damaged files make libraries raise anything
            return [_short(f"cannot be read ({error!r})")]

    def _identity(self, name: str) -> list[str]:
        """The seal, the key and the parents."""
        entry = self.run.entries[name]
        seal = self.run.folder(name) / "artifact.json"
        if not seal.is_file():
            return [f"{seal} is missing"]
        sealed = json.loads(seal.read_text("utf-8"))
        problems = [
            f"the manifest's {field} is not that of {seal.name} (the artifact's seal)"
            for field in ("hash", "rows", "details", "stage", "fields")
            if entry[field] != sealed[field]
        ]
        key = Stage(sealed["stage"], sealed["version"], sealed["fields"]).key(entry["parents"])
        if key != entry["key"]:
            problems.append("its key does not follow from its stage, fields and parents")
        known = {other["hash"] for other in self.run.entries.values()} | {self.run.base_hash}
        problems.extend(
            f"its parent {parent[:12]} is not in the manifest"
            for parent in entry["parents"]
            if parent not in known
        )
        return problems

    def _content_problems(self, name: str) -> list[str]:
        """Rows, or weights with config, tokenizer and template, against the hash."""
        entry = self.run.entries[name]
        if entry["kind"] == "model":
            found = load_checkpoint(self.run.folder(name)).hash
            used = len(self.run.training_data(name))
            if used != entry["details"]["examples"]:
                return [f"data.parquet lists {used} examples, not {entry['details']['examples']}"]
            kind = "weights, config, tokenizer and template have"
        else:
            rows = self.run.rows(name)
            if len(rows) != entry["rows"]:
                return [
                    f"{len(rows)} rows are there, not {entry['rows']}: a shard is missing or cut"
                ]
            found, kind = rows_hash(rows), "rows have"
        if found != entry["hash"]:
            return [f"its {kind} the hash {found[:12]}, not {entry['hash'][:12]}"]
        return []

    def _load_base(self) -> LanguageModel | None:
        """The base model, if it can be had here; a moved run folder can do without."""
        try:
            config = self.run.config
            base = load_model(config.base.model, config.base.template, config.seed)
        except (HumpbackError, AttributeError) as error:
            self.say(f"base: not at hand, so not checked ({error})")
            return None
        expected = self.run.base_hash
        wrong = expected and base.hash != expected
        text = f"{base.name} has the hash {base.hash[:12]}, the run used {expected[:12]}"
        self._note("base", [text] if wrong else [])
        return None if wrong else base

    def _redo(self, name: str, check: Callable[[str], list[str] | None]) -> None:
        """Runs a check of the slice; one that returns None does not apply."""
        parents = {self.run.name_of(digest) for digest in self.run.entries[name]["parents"]}
        damaged = sorted(self._broken & {name, *parents})
        if damaged:
            self.say(f"{name}: not made again, since {', '.join(damaged)} differs")
            return
        problems = self._guarded(partial(check, name))
        if problems is not None:
            self._note(f"{name}, made again", problems)

    def _candidates(self, name: str) -> list[str] | None:
        rows = [row for row in self.run.rows(name) if row["finish_reason"] != NO_ROOM][:SLICE]
        writer = self._inference(rows[0]["model_hash"]) if rows else None
        if writer is None:
            return None
        decoding = Decoding(**json.loads(rows[0]["decoding"]))
        template = writer.model.template
        prompts = [(r["segment_id"], template.backward_prompt(r["response"])) for r in rows]
        drawn = writer.generate(
            prompts,
            decoding,
            seed=self.run.entries[name]["fields"]["seed"],
            stage="augment",
            draw=rows[0]["draw"],
            opening=template.backward_prompt,
        )
        problems = []
        for row, new in zip(rows, drawn, strict=True):
            if (new.text, new.finish_reason) != (row["raw"], row["finish_reason"]):
                problems.append(
                    f"{row['id']} reads {new.text[:60]!r}, stored is {row['raw'][:60]!r}"
                )
            elif abs(new.logprob - row["logprob"]) > self._tolerance * max(new.tokens, 1):
                problems.append(
                    f"{row['id']} has log-probability {new.logprob:.4f}, stored is {row['logprob']}"
                )
        return self._explained(problems)

    def _scores(self, name: str) -> list[str] | None:
        rows = [row for row in self.run.rows(name) if row["value"] is not None][:SLICE]
        if not rows:
            return None
        curator = rows[0]["curator"]
        stored = {row["candidate_id"]: {curator: row["value"]} for row in rows}
        if curator == "combined":  # ranks among all pairs; its two parts stand in the detail
            stored = {row["candidate_id"]: json.loads(row["detail"]) for row in rows}
        elif curator not in LIKELIHOOD_CURATORS:
            return None
        reader = self._inference(rows[0]["model_hash"])
        if reader is None:
            return None
        pairs = self._pairs(list(stored))
        problems = []
        scored = Scored()
        for part in stored[pairs[0].id]:
            for rating in rate(part, reader, pairs, Decoding(), 0, scored):
                old = stored[rating.id][part]
                if rating.value is None or abs(rating.value - old) > self._tolerance:
                    problems.append(f"{rating.id} has {part} {rating.value}, stored is {old}")
        return self._explained(problems)

    def _pairs(self, names: Sequence[str]) -> list[PairText]:
        found = {r["id"]: r for kind in self.run.names("candidates") for r in self.run.rows(kind)}
        rows = [found[name] for name in names]
        return [PairText(r["id"], r["instruction"], r["response"]) for r in rows]

    def _inference(self, digest: str) -> Inference | None:
        name = self.run.name_of(digest)
        if name == "base":
            return Inference(self._base, self._compute) if self._base else None
        return Inference(load_checkpoint(self.run.folder(name)), self._compute)

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[self._compute.precision.compute]

    def _explained(self, problems: list[str]) -> list[str]:
        """Says where rounding, not damage, may be the reason."""
        here: dict[str, Any] = describe_environment()
        made = self.run.environment
        changed = [key for key, value in here.items() if made.get(key) != value]
        if problems and changed:
            problems.append(
                f"(the run was made with other {', '.join(changed)}, see environment.json: "
                "rounding may flip a near-tie)"
            )
        return problems


def _short(message: str) -> str:
    """The beginning of a message, on one line: libraries explain damage at great length."""
    return textwrap.shorten(message, 300, placeholder=" ...")
