"""Batched text generation: prefill prompts, then decode until every row of the batch has stopped.

A row's text depends on its prompt, its key and the program shapes alone. The shapes follow from the
row's own length: prompts are prefilled in groups of one width, and decoded beside rows of the same
capacity class; the number of rows of a program never changes, dummy rows fill the last group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Params, unstack_layers
from humpback_jax.sampling.programs import (
    decode_program,
    empty_slots,
    insert_program,
    prefill_program,
)
from humpback_jax.sampling.sampler import Decoding

PREFILL_ROWS = 4
PROMPT_WIDTHS = (32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096)
CAPACITIES = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)


@dataclasses.dataclass(frozen=True)
class Request:
    """One draw: `key` is `sampler.record_key(...)`, prompt int32 [n]."""

    id: str
    prompt: np.ndarray
    key: np.ndarray


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was drawn.

    Attributes:
      tokens: int32 [m], without the stop token.
      logprob: sum over drawn tokens, the stop token included, in nats.
      finish_reason: "stop" (a stop token was drawn) or "length".
    """

    tokens: np.ndarray
    logprob: float
    finish_reason: str


class Engine:
    """Holds a model ready for decoding: weights in the compute dtype, layers unstacked once."""

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        stop_ids: Sequence[int],
        precision: Precision = Precision(),
        batch_size: int = 32,
    ) -> None:
        self.config, self.precision, self.batch_size = config, precision, batch_size
        self.stop_ids = tuple(sorted(set(stop_ids)))
        if not self.stop_ids:
            raise HumpbackError("the model names no end-of-turn token, so text would never stop.")
        cast = jax.jit(
            lambda tree: unstack_layers(jax.tree.map(lambda x: x.astype(precision.compute), tree))
        )
        self._params = cast(params)
        self._prefill = prefill_program(config, precision)

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Completions in the order of `requests`.

        Raises:
          HumpbackError: a prompt is empty or leaves no room in the model's window, or the model's
            probabilities are not numbers.
        """
        window = self.config.max_position_embeddings
        classes: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            length = len(request.prompt)
            if not 0 < length < window:
                raise HumpbackError(
                    f"record {request.id}: the prompt has {length} tokens; the model's window of "
                    f"{window} must hold it and at least one new token. Shorten the record."
                )
            longest = self._width(length) + decoding.max_new_tokens
            classes.setdefault(_at_least(longest, CAPACITIES, window), []).append(index)
        results: dict[int, Completion] = {}
        for capacity, members in sorted(classes.items()):
            # Neighbours of one width share a prefill; which rows meet changes no row's text.
            members.sort(key=lambda index: len(requests[index].prompt))
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                drawn = self._run([requests[i] for i in batch], capacity, decoding)
                results.update(zip(batch, drawn, strict=True))
        return [results[index] for index in range(len(requests))]

    def _run(
        self, requests: Sequence[Request], capacity: int, decoding: Decoding
    ) -> list[Completion]:
        rows = self.batch_size
        slots = empty_slots(self.config, self.precision, rows, capacity)
        lengths, keys = np.ones(rows, np.int32), np.zeros((rows, 2), np.uint32)
        for row, request in enumerate(requests):
            lengths[row], keys[row] = len(request.prompt), request.key
        for width, members in self._by_width(requests):
            for start in range(0, len(members), PREFILL_ROWS):
                chosen = members[start : start + PREFILL_ROWS]
                prompts = np.zeros((PREFILL_ROWS, width), np.int32)
                places = np.full(PREFILL_ROWS, rows, np.int32)
                sizes = np.ones(PREFILL_ROWS, np.int32)
                for place, row in enumerate(chosen):
                    prompts[place, : lengths[row]] = requests[row].prompt
                    places[place], sizes[place] = row, lengths[row]
                new = self._prefill(self._params, prompts, sizes)
                slots = insert_program()(slots, new, places)
        decode = decode_program(self.config, self.precision, decoding, self.stop_ids)
        live = np.arange(rows) < len(requests)
        _, drawn = decode(self._params, slots, lengths, keys, live)
        drawn = jax.device_get(drawn)
        completions = []
        for row, request in enumerate(requests):
            if not np.isfinite(drawn.logprobs[row]):
                raise HumpbackError(
                    f"record {request.id}: the model's probabilities are not numbers; its weights "
                    "are broken, or overflow in this precision."
                )
            kept = drawn.counts[row] - int(drawn.stopped[row])
            reason = "stop" if drawn.stopped[row] else "length"
            tokens, logprob = drawn.tokens[row, :kept], float(drawn.logprobs[row])
            completions.append(Completion(tokens, logprob, reason))
        return completions

    def _by_width(self, requests: Sequence[Request]) -> list[tuple[int, list[int]]]:
        groups: dict[int, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(self._width(len(request.prompt)), []).append(row)
        return sorted(groups.items())

    def _width(self, length: int) -> int:
        return _at_least(length, PROMPT_WIDTHS, self.config.max_position_embeddings)


def _at_least(size: int, choices: Sequence[int], window: int) -> int:
    """The smallest choice that holds `size`, within the model's window."""
    return min(next((choice for choice in choices if choice >= size), window), window)
