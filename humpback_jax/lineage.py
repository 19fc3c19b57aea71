"""Where a row comes from and what became of it: the lineage of one id, both ways."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection
from pathlib import Path

from humpback_jax.artifacts import Row
from humpback_jax.compute import Compute
from humpback_jax.config import train_section
from humpback_jax.errors import HumpbackError
from humpback_jax.model.linear import Precision
from humpback_jax.records import Example
from humpback_jax.run_view import RunView, round_of, short_name
from humpback_jax.sampling.engine import Shape
from humpback_jax.training.examples import keys_of, numbered
from humpback_jax.training.mixture import parse_mixture, pools_of, shares_of
from humpback_jax.training.order import BatchOrder, draws_of

# By kind, what can be traced; of a row, `KIND:ID` asks for that kind alone.
NAMES = {
    "pair": "a pair (or candidate)",
    "segment": "a segment",
    "document": "a document",
    "seed": "a seed example",
    "heldout": "a held-out example",
    "model": "a model",
    "step": "a train step",
}


def trace_id(workdir: Path, name: str) -> Row:
    """All that a run folder knows about one id.

    Args:
      name: the id of a pair (that of its candidate), segment, document, seed or held-out example,
        alone or after its kind (`heldout:7`; the others are `pair`, `segment`, `document` and
        `seed`), or a model (`M_1`), or one of its train steps (`M_1:12`, counted from 1).

    Returns:
      a row of the id's kind; {"kind": "several", "matches": those rows} of an id of several kinds.

    Raises:
      HumpbackError: no such id; the message gives an example of every kind.
    """
    return Lineage(RunView(workdir)).trace(name)


def batches(run: RunView, model: str) -> list[list[tuple[str, str]]]:
    """(source, id) of the examples of every train step: entry t holds those of step t + 1.

    Nothing was written down while training: batch t is a function of the seed, t and the ids.

    Raises:
      HumpbackError: they would make another number of steps than the model was trained in.
    """
    from ml_collections import ConfigDict

    from humpback_jax.stages.settings import train_spec

    fields = run.entries[model]["fields"]
    data = run.training_data(model)
    identities = [(row["source"], row["id"]) for row in data]
    # The fields that change no result are not stored; their defaults do as well.
    section = ConfigDict({**train_section(), **fields["train"]}, convert_dict=True)
    keys = keys_of(identities)
    names, sources = numbered([source for source, _ in identities])
    pools = pools_of(keys, sources, shares_of(names, parse_mixture(section.mixture)))
    spec = train_spec(
        section, Compute(Precision(), "scan", Shape()), fields["seed"], draws_of(pools)
    )
    if spec.steps != (done := run.details(model)["steps"]):
        raise HumpbackError(
            f"{model} was trained in {done} steps, but its data.parquet and settings give "
            f"{spec.steps}: which examples they had cannot be told."
        )
    order = BatchOrder(keys, spec.batch_examples, spec.seed, pools)
    return [[identities[index] for index in order.indices(step)] for step in range(spec.steps)]


class Lineage:
    """Indices over the rows of a run, built when first needed."""

    def __init__(self, run: RunView) -> None:
        self.run = run

    def trace(self, name: str) -> Row:
        """See `trace_id`."""
        kind, _, rest = name.partition(":")
        asked = [*((each, name) for each in self._kinds), (kind, rest)]
        found = [self._kinds[each](own) for each, own in asked if own in self._ids.get(each, ())]
        if self._model(name):
            found.append(self.model(self._model(name)))
        model, _, step = name.rpartition(":")
        if step.isdecimal() and self._model(model):
            found.append(self.step(self._model(model), int(step)))
        if not found:
            raise HumpbackError(f"{self.run.root} knows no id {name!r}. {self._examples_of_ids()}")
        return found[0] if len(found) == 1 else {"kind": "several", "id": name, "matches": found}

    def pair(self, name: str) -> Row:
        """The whole chain of a pair: document, augmentation, ratings, decisions, train steps."""
        candidate = self._candidates[name]
        return {
            "kind": "pair",
            "id": name,
            "origin": self._origin(candidate["segment_id"]),
            "augmentation": {
                "model": self.run.name_of(candidate["model_hash"]),
                "model_hash": candidate["model_hash"],
                "template_hash": candidate["template_hash"],
                "decoding": json.loads(candidate["decoding"]),
                "draw": candidate["draw"],
                "raw": candidate["raw"],
                "finish_reason": candidate["finish_reason"],
                "logprob": candidate["logprob"],
                "tokens": candidate["tokens"],
            },
            "instruction": candidate["instruction"],
            "response": candidate["response"],
            "rounds": [self._round(name, number) for number in self._rounds],
            "training": self._training("web", name),
        }

    def segment(self, name: str) -> Row:
        """A segment's place in its document, and its pairs."""
        return {
            "kind": "segment",
            "id": name,
            "origin": self._origin(name),
            "text": self._segments[name]["text"],
            "pairs": [self.pair(pair) for pair in self._pairs_of(name)],
        }

    def document(self, name: str) -> Row:
        """A document's segments in the corpus, with the instruction and fate of each pair."""
        segments = []
        for segment, row in self._segments.items():
            if row["document_id"] != name:
                continue
            pairs = [
                {
                    "id": pair,
                    "instruction": self._candidates[pair]["instruction"],
                    "rounds": [self._round(pair, number) for number in self._rounds],
                    "training": self._training("web", pair),
                }
                for pair in self._pairs_of(segment)
            ]
            segments.append({**self._origin(segment), "pairs": pairs})
        return {"kind": "document", "id": name, "segments": segments}

    def human_example(self, name: str, kind: str) -> Row:
        """A seed example and the steps that used it, or a held-out one and its figures."""
        example = self._human.get((kind, name))
        text = {"instruction": example.instruction, "response": example.response} if example else {}
        found: Row = {"kind": kind, "id": name, **text, "training": self._training(kind, name)}
        return found | ({"evaluation": self._measured[name]} if kind == "heldout" else {})

    def model(self, name: str) -> Row:
        """A model's identity, parents and data."""
        entry = self.run.entries[name]
        return {
            "kind": "model",
            "id": name,
            "hash": entry["hash"],
            "parents": [
                {"name": self.run.name_of(parent), "hash": parent} for parent in entry["parents"]
            ],
            "fields": entry["fields"],
            "details": entry["details"],
            "examples": [
                {"id": own, "source": source, "steps": self._steps(name, source, own)}
                for source, own in self._trained_on(name)
            ],
        }

    def step(self, model: str, step: int) -> Row:
        """The examples of one train step, where they come from, and what it measured."""
        steps = self._batches(model)
        if not 1 <= step <= len(steps):
            raise HumpbackError(
                f"{model} was trained in {len(steps)} steps, so {short_name(model)}:1 to "
                f"{short_name(model)}:{len(steps)} exist, not {short_name(model)}:{step}."
            )
        measured = {row["step"]: row for row in self.run.history(model) if "loss" in row}
        return {
            "kind": "step",
            "id": f"{short_name(model)}:{step}",
            "model": model,
            "model_hash": self.run.entries[model]["hash"],
            "step": step,
            "steps": len(steps),
            "metrics": measured.get(step, {}),
            "examples": [self._brief(source, name) for source, name in steps[step - 1]],
        }

    @functools.cached_property
    def _kinds(self) -> dict[str, Callable[[str], Row]]:
        """What shows an id, by kind of row."""
        return {
            "pair": self.pair,
            "segment": self.segment,
            "document": self.document,
            "seed": functools.partial(self.human_example, kind="seed"),
            "heldout": functools.partial(self.human_example, kind="heldout"),
        }

    @functools.cached_property
    def _ids(self) -> dict[str, Collection[str]]:
        """The run's ids, by kind of row."""
        trained = [each for model in self.run.names("model") for each in self._trained_on(model)]
        return {
            "pair": self._candidates,
            "segment": self._segments,
            "document": dict.fromkeys(row["document_id"] for row in self._segments.values()),
            "seed": dict.fromkeys(name for source, name in trained if source == "seed"),
            "heldout": self._measured,
        }

    @functools.cached_property
    def _segments(self) -> dict[str, Row]:
        return {row["id"]: row for row in self.run.rows("corpus")}

    @functools.cached_property
    def _candidates(self) -> dict[str, Row]:
        names = self.run.names("candidates")
        return {row["id"]: row for name in names for row in self.run.rows(name)}

    @functools.cached_property
    def _decisions(self) -> dict[tuple[int, str], Row]:
        return {
            (round_of(name), row["candidate_id"]): row
            for name in self.run.names("pairs")
            for row in self.run.rows(name)
        }

    @functools.cached_property
    def _scores(self) -> dict[tuple[int, str], list[Row]]:
        found: dict[tuple[int, str], list[Row]] = {}
        for name in self.run.names("scores"):
            for row in self.run.rows(name):
                found.setdefault((round_of(name), row["candidate_id"]), []).append(row)
        return found

    @functools.cached_property
    def _rounds(self) -> list[int]:
        return sorted({round_of(n) for n in (*self.run.names("scores"), *self.run.names("pairs"))})

    def _trained_on(self, model: str) -> list[tuple[str, str]]:
        return [(row["source"], row["id"]) for row in self.run.training_data(model)]

    @functools.cached_property
    def _measured(self) -> dict[str, list[Row]]:
        """The figures of every held-out example."""
        found: dict[str, list[Row]] = {}
        for name in self.run.names("evaluation"):
            for row in self.run.rows(name):
                figures = {key: row[key] for key in ("tags", "nll", "tokens")}
                found.setdefault(row["id"], []).append({"model": short_name(name), **figures})
        return found

    @functools.cached_property
    def _human(self) -> dict[tuple[str, str], Example]:
        """The human pairs by (kind, id), from the files that the config names: the run keeps their
        ids alone.
        """
        from humpback_jax.stages.sources import seed_pairs

        try:
            seed, heldout = seed_pairs(self.run.config)
        except HumpbackError:  # the run folder was moved away from them
            return {}
        parts = {"seed": seed, "heldout": heldout}
        return {(kind, example.id): example for kind, part in parts.items() for example in part}

    def _pairs_of(self, segment: str) -> list[str]:
        return [n for n, row in self._candidates.items() if row["segment_id"] == segment]

    def _origin(self, segment: str) -> Row:
        row = self._segments.get(segment, {})
        return {
            "document": row.get("document_id"),
            "segment": segment,
            "bytes": [row.get("start"), row.get("end")],
            "heading": row.get("heading"),
            "source": row.get("source"),
            "rules": row.get("rules"),
        }

    def _round(self, name: str, number: int) -> Row:
        decision = self._decisions.get((number, name))
        return {
            "round": number,
            "scores": [
                {
                    "curator": row["curator"],
                    "value": row["value"],
                    "detail": json.loads(row["detail"]),
                    "judge": self.run.name_of(row["model_hash"]),
                    "judge_hash": row["model_hash"],
                    "template_hash": row["template_hash"],
                }
                for row in self._scores.get((number, name), [])
            ],
            "decision": decision
            and {key: decision[key] for key in ("selected", "reason", "score")},
        }

    def _training(self, source: str, name: str) -> list[Row]:
        """The models that were trained on an example, and in which steps."""
        found = []
        for model in self.run.names("model"):
            steps = self._steps(model, source, name)
            if steps:
                found.append({"model": model, "steps": steps})
        return found

    def _steps(self, model: str, source: str, name: str) -> list[int]:
        return self._uses(model).get((source, name), [])

    @functools.cache  # noqa: B019 - a Lineage lives as long as one query
    def _batches(self, model: str) -> list[list[tuple[str, str]]]:
        return batches(self.run, model)

    @functools.cache  # noqa: B019 - as above
    def _uses(self, model: str) -> dict[tuple[str, str], list[int]]:
        uses: dict[tuple[str, str], list[int]] = {}
        for step, identities in enumerate(self._batches(model), start=1):
            for identity in identities:
                uses.setdefault(identity, []).append(step)
        return uses

    def _brief(self, source: str, name: str) -> Row:
        """An example of a step: enough to recognise it, and the id to ask on with."""
        found: Row = {"id": name, "source": source}
        if source == "web" and name in self._candidates:
            candidate = self._candidates[name]
            origin = self._origin(candidate["segment_id"])
            place = {key: origin[key] for key in ("document", "bytes")}
            return found | {"instruction": candidate["instruction"], **place}
        human = self._human.get((source, name))
        return found | ({"instruction": human.instruction} if human else {})

    def _model(self, name: str) -> str:
        """The artifact's name of a model called by it or by its last part, "" for none."""
        models = self.run.names("model")
        return next((found for found in models if name in (found, short_name(found))), "")

    def _examples_of_ids(self) -> str:
        likes = {kind: f"{kind}:{next(iter(ids))}" for kind, ids in self._ids.items() if ids}
        for model in self.run.names("model")[:1]:
            likes |= {"model": short_name(model), "step": f"{short_name(model)}:1"}
        known = [f"{NAMES[kind]}, like {name}" for kind, name in likes.items()]
        if not known:
            return "The run has no artifact yet."
        return f"It can trace {'; '.join(known)}; the kind of a row may be left out."
