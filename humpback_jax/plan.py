"""What a run would do, before it does it: rows, tokens, steps and time of every stage."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from humpback_jax.artifacts import Row
from humpback_jax.curators import COMBINED
from humpback_jax.loop import prepare
from humpback_jax.model.remat import Remat
from humpback_jax.parallel.mesh import training_mesh
from humpback_jax.parallel.rules import param_shardings, place
from humpback_jax.records import Example, Message, Segment, stable_id
from humpback_jax.sampling.likelihood import WIDTH, sequence_nll
from humpback_jax.sampling.sampler import Decoding
from humpback_jax.stages.context import Context
from humpback_jax.stages.curate import choose, rubric_decoding, scores_name
from humpback_jax.stages.settings import train_spec
from humpback_jax.stages.sources import corpus_stage
from humpback_jax.stages.texts import Direction, render, tokenized_examples
from humpback_jax.text.template import Rendered, Tags
from humpback_jax.training.examples import TrainingExample, index_of
from humpback_jax.training.mixture import parse_mixture, pools_of, shares_of
from humpback_jax.training.order import BatchOrder, draws_of
from humpback_jax.training.packing import plan_packing

# Cost of a trained and of a decoded token in forward passes of one token. Arithmetic gives 3 for
# training; on a CPU the optimizer and the element-wise work, bound by memory, come on top. Decoding
# is bound by memory everywhere: what it costs off the CPU depends on model and batch size.
MEASURED_ON_CPU = (5.5, 2.0)
ELSEWHERE = (3.0, 8.0)
# "full" computes a layer's forward pass again, the others less than half of it: `model/remat.py`.
REMAT_FACTOR: dict[Remat, float] = {"none": 1.0, "full": 4 / 3, "named": 7 / 6, "offload": 7 / 6}
PROBE_TOKENS = 512
KINDS = 4  # forms of a pair in the curation meter: true, shuffled, truncated, promo


@dataclasses.dataclass
class StagePlan:
    """One line of the plan.

    Attributes:
      tokens: read or trained on; for generation also the new ones. steps: optimizer steps.
      cost: in forward places, i.e. multiples of one token's forward pass.
      expected: the figures rest on assumptions, see `dry_run`.
    """

    name: str
    rows: int
    tokens: int
    cost: float
    steps: int = 0
    expected: bool = False
    seconds: float = 0.0


def dry_run(config: Any, say: Callable[[str], None]) -> Row:
    """Checks a config, counts its work with the real tokenizer, and estimates the time.

    The base model is loaded (fetched first, if need be), documents are cut into segments and all
    texts tokenised, as the run would; nothing is kept. The time is that of one forward pass,
    measured on a batch of 2 x 512 tokens, times the tokens of each stage times a factor: 1 for
    likelihoods and prompts; for a trained token, places left empty in packed rows included, 5.5 on
    a CPU and 3 elsewhere (up to a third more with `remat`); for a decoded token 2 on a CPU and 8
    elsewhere. The factors for the CPU are medians measured with the default model; single steps
    varied by a factor of two on a busy machine. Compilation, once a program, is not counted.

    What depends on generated text is assumed, and marked so: every candidate passes the gates, its
    instruction has the median length of the seed's, rows stop after the longest of these, a
    reasoned rating takes all its tokens, and with `select="absolute"` the share `curate.fraction`
    is chosen.

    Args:
      say: receives the lines of the table.

    Raises:
      HumpbackError: whatever would stop the run before its first model is trained.
    """
    with tempfile.TemporaryDirectory(prefix="humpback-plan-") as folder:
        context = prepare(config, Path(folder), say=lambda text: None)
        corpus = corpus_stage(context)
        segments = [Segment(**row) for row in context.folder.read(corpus)]
    planner = _Planner(context, segments)
    stages = planner.stages()
    rate = forward_seconds(context)
    for stage in stages:
        stage.seconds = stage.cost * rate
    total = sum(stage.seconds for stage in stages)
    for line in _table(stages, rate, total, context):
        say(line)
    return {
        "status": "planned",
        "documents": corpus.details["documents"],
        "segments": len(segments),
        "seed": len(context.seed),
        "heldout": len(context.heldout),
        "trained_tokens": sum(stage.tokens for stage in stages if stage.steps),
        "forward_tokens_per_s": round(1 / rate, 1),
        "seconds": round(total, 1),
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }


def forward_seconds(context: Context) -> float:
    """Seconds of one token's forward pass: the better of two timed batches, compiled before."""
    model = context.base
    width = min(PROBE_TOKENS, model.config.max_position_embeddings - 1)
    ids = np.arange(width + 1, dtype=np.int32) % model.config.vocab_size
    mask = np.arange(width + 1) >= width // 2
    count = WIDTH // width
    examples = [TrainingExample(str(index), ids, mask) for index in range(count)]
    precision = context.compute.precision
    mesh = training_mesh(context.compute.mesh, model.config.hidden_size)
    if mesh is None:
        params = jax.tree.map(jax.numpy.asarray, model.params)
    else:
        shardings = param_shardings(model.config, mesh, "scan")
        params = place(model.params, shardings, lambda piece: piece)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        sequence_nll(model.config, params, examples, precision, layout="scan", mesh=mesh)
        times.append(time.perf_counter() - started)
    return min(times[1:]) / (count * width)


class _Planner:
    """Counts the work of each stage; the order and names are those of `loop.run`."""

    def __init__(self, context: Context, segments: Sequence[Segment]) -> None:
        self.context, self.config = context, context.config
        self.template = context.base.template
        on_cpu = jax.default_backend() == "cpu"
        self.train_factor, self.decode_factor = MEASURED_ON_CPU if on_cpu else ELSEWHERE
        self.segments = segments
        lengths = [self._length(e.instruction) for e in context.seed]
        self.new_tokens = min(max(lengths), self.config.augment.max_new_tokens)
        middle = statistics.median_low(lengths)
        self.instruction = context.seed[lengths.index(middle)].instruction
        self.web = [_pair(segment, self.instruction) for segment in segments]

    def stages(self) -> list[StagePlan]:
        config, context = self.config, self.context
        selected = self._selected()
        found = [
            StagePlan(
                "corpus", len(self.segments), sum(self._length(s.text) for s in self.segments), 0
            ),
            self._training("round_0/M_yx", context.seed, "backward"),
            self._training("round_0/M_0", context.seed, "forward"),
            self._backward_meter(),
            *([self._curation_meter(1)] if config.rounds else []),
            self._augment(),
        ]
        for t in range(1, config.rounds + 1):
            if t > 1:
                found.append(self._curation_meter(t))
            for curator in config.curate.also:
                if curator != config.curate.curator:
                    found += self._scores(t, curator, config.curate.also_limit, found)
            found += self._scores(t, config.curate.curator, 0, found)
            trained = self._training(f"round_{t}/M_{t}", [*context.seed, *selected], "forward")
            found.append(dataclasses.replace(trained, expected=True))
        for name in ("base", *(f"M_{t}" for t in range(config.rounds + 1))):
            found += [self._evaluation(f"evaluation/{name}"), self._answers(f"answers/{name}")]
        return found

    def _training(self, name: str, examples: Sequence[Example], direction: Direction) -> StagePlan:
        section = self.config.backward if direction == "backward" else self.config.train
        base, seed = self.context.base, self.config.seed
        kept, _ = tokenized_examples(base, examples, section, direction)
        index = index_of(kept)
        pools = pools_of(
            index.keys, index.sources, shares_of(index.names, parse_mixture(section.mixture))
        )
        spec = train_spec(section, self.context.compute, seed, draws_of(pools))
        order = BatchOrder(index.keys, spec.batch_examples, seed, pools)
        packing = plan_packing(index, order, spec.steps, spec.row_tokens, spec.accumulation)
        tokens = sum(int(index.lengths[order.indices(step)].sum()) for step in range(spec.steps))
        cost = tokens / packing.efficiency * self.train_factor * REMAT_FACTOR[spec.remat]
        if spec.eval_every:
            watched = self._tokens(render(self.template, self.context.validation, direction))
            cost += spec.steps // spec.eval_every * watched
        return StagePlan(name, len(kept), tokens, cost, spec.steps)

    def _backward_meter(self) -> StagePlan:
        examples = self.context.heldout[: self.config.meters.pairs]
        prompts = [self.template.backward_prompt(e.response) for e in examples]
        generated = self._generation("round_0/backward_meter", prompts, self.new_tokens)
        likelihoods = self._tokens(render(self.template, examples, "backward"))
        likelihoods += self._rating("pmi", examples).tokens
        return dataclasses.replace(
            generated, tokens=generated.tokens + likelihoods, cost=generated.cost + likelihoods
        )

    def _augment(self) -> StagePlan:
        section = self.config.augment
        Decoding(section.temperature, section.top_p, section.top_k, section.max_new_tokens)
        prompts = [self.template.backward_prompt(segment.text) for segment in self.segments]
        return self._generation("candidates", prompts, self.new_tokens)

    def _curation_meter(self, t: int) -> StagePlan:
        examples = self.context.heldout[: self.config.meters.pairs]
        curators = dict.fromkeys([self.config.curate.curator, *self.config.meters.curators])
        found = [self._rating(curator, examples) for curator in curators]
        tokens, cost = sum(f.tokens for f in found), sum(f.cost for f in found)
        rows = KINDS * len(examples) * len(curators)
        name = f"round_{t}/curation_meter"
        return StagePlan(name, rows, KINDS * tokens, KINDS * cost, expected=True)

    def _scores(
        self, t: int, curator: str, limit: int, known: Sequence[StagePlan]
    ) -> list[StagePlan]:
        """A curator's scores; for `combined` those of its parts, unless they are known, before."""
        name = scores_name(self.config.curate, t, curator, limit)
        pairs = self.web[: limit or None]
        if curator == "combined":
            parts = [line for part in COMBINED for line in self._scores(t, part, limit, known)]
            return [*parts, StagePlan(name, len(pairs), 0, 0, expected=True)]
        line = dataclasses.replace(self._rating(curator, pairs), name=name)
        return [] if line in known else [line]

    def _rating(self, curator: str, pairs: Sequence[Example]) -> StagePlan:
        """One curator on pairs: prompts read, and for the reasoned rubric text written."""
        template = self.template
        if curator == "rubric":
            prompts = [template.rubric_prompt(e.instruction, e.response) for e in pairs]
            decoding = rubric_decoding(self.config.curate)
            return self._generation(curator, prompts, decoding.max_new_tokens)
        tokens = 0
        if curator != "rubric_likelihood":
            tokens += self._tokens(render(template, pairs, "forward"))
            tokens += self._tokens([(e.id, template.response_alone(e.response)) for e in pairs])
        if curator in ("rubric_likelihood", "combined"):
            for e in pairs:
                prompt = template.rubric_likelihood_prompt(e.instruction, e.response)
                tokens += self._length(prompt)
        return StagePlan(curator, len(pairs), tokens, tokens, expected=True)

    def _evaluation(self, name: str) -> StagePlan:
        tags: Sequence[Tags] = self.config.evaluate.tags
        tokens = sum(
            self._tokens(
                [(e.id, self.template.forward(e.chat(), tag)) for e in self.context.heldout]
            )
            for tag in tags
        )
        return StagePlan(name, len(tags) * len(self.context.heldout), tokens, tokens)

    def _answers(self, name: str) -> StagePlan:
        section = self.config.evaluate
        examples = self.context.heldout[: section.answers]
        prompts = [
            self.template.forward_prompt([{"role": "user", "content": e.instruction}])
            for e in examples
        ]
        return self._generation(name, prompts, section.answer_tokens)

    def _generation(self, name: str, prompts: Sequence[str], new: int) -> StagePlan:
        """Slots that stay empty for want of rows cost as much as others."""
        read = sum(self._length(prompt) for prompt in prompts)
        places = max(len(prompts), self.config.compute.batch_size) * new
        tokens = read + len(prompts) * new
        return StagePlan(
            name, len(prompts), tokens, read + self.decode_factor * places, expected=True
        )

    def _selected(self) -> list[Example]:
        section = self.config.curate
        chosen, _ = choose({example.id: 0.0 for example in self.web}, section)
        if section.select == "absolute":
            order = sorted(self.web, key=lambda e: stable_id("plan", e.id))
            return order[: max(round(section.fraction * len(order)), 1)]
        return [example for example in self.web if example.id in chosen]

    def _length(self, text: str) -> int:
        return len(self.context.base.tokenizer.encode(text))

    def _tokens(self, rows: Sequence[tuple[str, Rendered]]) -> int:
        return sum(self._length(rendered.text) for _, rendered in rows)


def _pair(segment: Segment, instruction: str) -> Example:
    """A segment with a stand-in for the instruction that is still to be written."""
    turns = (Message("user", instruction), Message("assistant", segment.text))
    return Example(segment.id, turns, "web")


def _table(stages: Sequence[StagePlan], rate: float, total: float, context: Context) -> list[str]:
    lines = [f"{'stage':<34}{'rows':>9}{'tokens':>13}{'steps':>8}{'time':>10}"]
    for stage in stages:
        steps = str(stage.steps) if stage.steps else ""
        mark = "~" if stage.expected else " "
        lines.append(
            f"{stage.name:<34}{stage.rows:>9,}{mark + format(stage.tokens, ','):>13}{steps:>8}"
            f"{_duration(stage.seconds):>10}"
        )
    lines.append(f"{'all':<34}{'':>9}{'':>13}{'':>8}{_duration(total):>10}")
    lines.append(
        f"Seed {len(context.seed)}, held out {len(context.heldout)}. Time from {1 / rate:,.0f} "
        f"tokens/s forward on {jax.devices()[0].device_kind}, without compilation; ~ marks what "
        "rests on text still to be written."
    )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
