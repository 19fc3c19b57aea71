"""A file of prompts to a file of answers, of any size: rows are read as the engine takes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from humpback_jax.errors import HumpbackError
from humpback_jax.inference import Generation, Inference
from humpback_jax.progress import Progress, Say
from humpback_jax.rows import Prompt, ReadReport, stream_prompts
from humpback_jax.sampling.sampler import Decoding, record_key
from humpback_jax.shards import Row, open_shards
from humpback_jax.streaming import Asked, draw_shards
from humpback_jax.text.template import Tags

DECODING_FIELDS = {field.name for field in dataclasses.fields(Decoding)}
ANSWER_FIELDS = [
    "output",
    "finish_reason",
    "logprob",
    "tokens",
    "draw",
    "logprobs",
    "prompt_logprobs",
]


@dataclasses.dataclass(frozen=True)
class Job:
    """How a file of prompts is answered.

    Attributes:
      decoding: for rows without a field `decoding`, whose entries replace some of it.
      reverse: prompts are responses, for M_yx to write the instruction.
      draws: answers to each prompt. logprobs: also write each drawn token's.
      prompt_logprobs: also write those of the prompt's tokens, from the second one on.
    """

    decoding: Decoding
    seed: int = 0
    tags: Tags = "none"
    reverse: bool = False
    draws: int = 1
    logprobs: bool = False
    prompt_logprobs: bool = False
    skip_bad: bool = False


def answer_file(
    reader: Inference, path: Path, out: Path, form: str | None, job: Job, say: Say
) -> tuple[int, ReadReport]:
    """Answers every row of a file; returns (rows written, what was found in the file).

    Finished shards survive a kill, and the same command goes on after them. Where several
    processes share the job, each computes the shards of its part.

    Raises:
      HumpbackError: an unusable row, or a prompt that leaves no room in the model's window; named,
        and before anything is computed.
    """
    report, share = ReadReport(), reader.share
    fingerprint, total, bad = _survey(reader, path, job, report)
    named = [reader.model.hash, fingerprint, reader.compute.sampling_formats]
    identity = hashlib.sha256(json.dumps(named).encode()).hexdigest()
    with open_shards(out, form, identity, total * job.draws, share.takes) as shards:
        ours, done = shards.part()
        progress = Progress("sample", ours, say, done)
        again = enumerate(stream_prompts(path, ReadReport(), job.skip_bad, job.reverse))
        usable = (prompt for place, prompt in again if place not in bad)
        missing = shards.missing(_draws(usable, job))

        def count() -> None:
            progress.add(1, lambda seconds: reader.replicas.work.speed(seconds))

        for number, rows in _answered(reader, missing, job, count):
            if share.leads:
                shards.write(number, rows)
        shards.join()
    return total * job.draws, report


def answer_prompts(reader: Inference, prompts: list[Prompt], job: Job) -> list[Row]:
    """Answers a few prompts; rows as `answer_file` writes them."""
    return next(rows for _, rows in _answered(reader, [(0, list(_draws(prompts, job)))], job))


def _draws(prompts: Iterable[Prompt], job: Job) -> Iterator[tuple[Prompt, int]]:
    """Each prompt as often as it is answered, with the number of the draw."""
    return ((prompt, draw) for prompt in prompts for draw in range(job.draws))


def _answered(
    reader: Inference,
    shards: Iterable[tuple[int, Sequence[tuple[Prompt, int]]]],
    job: Job,
    drawn: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, list[Row]]]:
    """(number, rows) of shards of `_draws`."""
    template = reader.model.template
    opening = template.backward_prompt if job.reverse else template.question
    for number, answers in draw_shards(
        reader, shards, lambda item: _asked(reader, *item, job), opening, drawn
    ):
        rows = [_row(prompt, draw, text, job) for (prompt, draw), text in answers]
        if job.prompt_logprobs:
            _add_prompt_logprobs(reader, [prompt for (prompt, _), _ in answers], rows, job)
        yield number, rows


def _survey(
    reader: Inference, path: Path, job: Job, report: ReadReport
) -> tuple[str, int, set[int]]:
    """Checks all rows once, so that a bad one is found before anything is spent.

    Returns:
      A fingerprint of the usable rows and the job, their number, and the places of the others.
    """
    bad: set[int] = set()
    digest, total = hashlib.sha256(repr(job).encode()), 0
    for prompt in usable_prompts(reader, path, job, report, bad):
        digest.update(json.dumps([prompt.id, prompt.row]).encode())
        total += 1
    return digest.hexdigest(), total, bad


def usable_prompts(
    reader: Inference, path: Path, job: Job, report: ReadReport, bad: set[int]
) -> Iterator[Prompt]:
    """The rows that can be answered; others are counted with `job.skip_bad`, or else errors.

    Args:
      bad: gets the places of the others among the prompts of the file.

    Raises:
      HumpbackError: names the row.
    """
    for place, prompt in enumerate(stream_prompts(path, report, job.skip_bad, job.reverse)):
        try:
            _, text, _, decoding = _asked(reader, prompt, 0, job)
            reader.check(prompt.id, text, decoding)
        except HumpbackError:
            if not job.skip_bad:
                raise
            report.skip("cannot be answered")
            report.rows -= 1
            bad.add(place)
            continue
        yield prompt


def _asked(reader: Inference, prompt: Prompt, draw: int, job: Job) -> Asked:
    template = reader.model.template
    try:
        if job.reverse:
            text = template.backward_prompt(prompt.messages[-1]["content"])
        else:
            text = template.forward_prompt(prompt.messages, job.tags)
    except HumpbackError as error:
        raise HumpbackError(f"record {prompt.id}: {error}") from error
    key = record_key(job.seed, "sample", prompt.id, draw)
    return prompt.id, text, key, _decoding(prompt, job)


def _decoding(prompt: Prompt, job: Job) -> Decoding:
    changes = prompt.row.get("decoding", {})
    unknown = changes.keys() - DECODING_FIELDS if isinstance(changes, dict) else changes
    if unknown or not isinstance(changes, dict):
        raise HumpbackError(
            f"record {prompt.id}: field 'decoding' must hold some of "
            f"{', '.join(sorted(DECODING_FIELDS))}; found {unknown!r}."
        )
    # In parquet each row has the entries of all rows.
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return dataclasses.replace(job.decoding, **given)
    except HumpbackError as error:
        raise HumpbackError(f"record {prompt.id}, field 'decoding': {error}") from error


def _row(prompt: Prompt, draw: int, done: Generation, job: Job) -> Row:
    row = {
        **_kept(prompt.row),
        "output": done.text,
        "finish_reason": done.finish_reason,
        "logprob": round(done.logprob, 4),
        "tokens": done.tokens,
        "draw": draw,
    }
    if job.logprobs:
        row["logprobs"] = [round(value, 4) for value in done.logprobs]
    return row


def _kept(row: Row) -> Row:
    """What a row held; a field that is named as one of an answer is from now on `given_NAME`."""
    kept: Row = {}
    for field, value in row.items():
        name = field
        while name in ANSWER_FIELDS or (name != field and name in row):
            name = f"given_{name}"
        kept[name] = value
    return kept


def _add_prompt_logprobs(
    reader: Inference, prompts: Sequence[Prompt], rows: Sequence[Row], job: Job
) -> None:
    """Adds to the row of each prompt what the model says of its tokens; equal ones once."""
    texts = {prompt.id: _asked(reader, prompt, 0, job)[1] for prompt in prompts}
    found = reader.text_log_probs(list(texts.items()))
    by_id = dict(zip(texts, found, strict=True))
    for prompt, row in zip(prompts, rows, strict=True):
        row["prompt_logprobs"] = [round(float(value), 4) for value in by_id[prompt.id]]
