"""Stage: M_yx writes one instruction for every segment (section 2.2). Done once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from humpback_jax.artifacts import Artifact, Row, Stage
from humpback_jax.evaluation.meters import copy_rate, echoes
from humpback_jax.inference import Generation, Inference, holds
from humpback_jax.progress import Progress
from humpback_jax.records import NO_ROOM, Candidate, Segment, stable_id
from humpback_jax.sampling.sampler import Decoding, record_key
from humpback_jax.stages.context import Context
from humpback_jax.streaming import Asked, draw_shards
from humpback_jax.text.template import Template

VERSION = 3


def augment_stage(context: Context, backward: Artifact, corpus: Artifact) -> Artifact:
    """Candidates (x̂_j, y_j), one row per segment, in the order of the corpus."""
    section = context.config.augment
    segments = [Segment(**row) for row in context.folder.read(corpus)]
    decoding = Decoding(section.temperature, section.top_p, section.top_k, section.max_new_tokens)
    fields: Row = {"decoding": dataclasses.asdict(decoding), "seed": context.config.seed}
    fields["precision"] = context.compute.sampling_formats
    stage = Stage("augment", VERSION, json.loads(json.dumps(fields)))
    size = section.shard_rows
    shards = [segments[i : i + size] for i in range(0, len(segments), size)]

    def make(missing: Sequence[int]) -> Iterator[tuple[int, list[Row]]]:
        reader = context.inference(backward)
        template = reader.model.template
        left = sum(len(shards[index]) for index in missing)
        progress = Progress("augment", len(segments), context.say, len(segments) - left)

        def fitting() -> Iterator[tuple[int, list[Segment]]]:
            for index in missing:
                yield index, [s for s in shards[index] if _fits(reader, s.text, decoding)]

        def ask(segment: Segment) -> Asked:
            prompt = template.backward_prompt(segment.text)
            key = record_key(context.config.seed, "augment", segment.id, 0)
            return segment.id, prompt, key, decoding

        def candidate(segment: Segment, drawn: Generation) -> Candidate:
            return Candidate(
                id=stable_id(backward.hash, segment.id, "0"),
                segment_id=segment.id,
                instruction=drawn.text,
                response=segment.text,
                raw=drawn.text,
                draw=0,
                finish_reason=drawn.finish_reason,
                logprob=round(drawn.logprob, 4),
                tokens=drawn.tokens,
                model_hash=backward.hash,
                template_hash=template.content_hash(),
                decoding=json.dumps(dataclasses.asdict(decoding)),
            )

        for index, drawn in draw_shards(
            reader, fitting(), ask, template.backward_prompt, lambda: progress.add(1)
        ):
            progress.add(len(shards[index]) - len(drawn))
            written = {segment.id: text for segment, text in drawn}
            nothing = Generation("", 0, 0.0, NO_ROOM)
            rows = [candidate(s, written.get(s.id, nothing)) for s in shards[index]]
            yield index, [dataclasses.asdict(row) for row in rows]

    return context.folder.streamed(
        "candidates",
        "candidates",
        stage,
        [backward, corpus],
        len(shards),
        make,
        shard_rows=size,
    )


def _fits(reader: Inference, response: str, decoding: Decoding) -> bool:
    prompt = reader.model.template.backward_prompt(response)
    return holds(reader.model, prompt, decoding.max_new_tokens)


def gate(
    text: str, response: str, finish_reason: str, template: Template, section: Any
) -> str | None:
    """The structural reason to refuse a generated instruction before any model rates it, or None.

    Args:
      section: `config.augment`.
    """
    if finish_reason == NO_ROOM:
        return "response_exceeds_window"
    if finish_reason != "stop":
        return "instruction_unfinished"
    if not text or len(text) < section.min_chars:
        return "instruction_too_short"
    if len(text) > section.max_chars:
        return "instruction_too_long"
    if echoes(text, template):
        return "instruction_echoes_prompt"
    if len(text) >= 40 and copy_rate(text, response) > 0.9:
        return "instruction_copies_document"
    return None
