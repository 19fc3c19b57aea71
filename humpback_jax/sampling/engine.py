"""Batched text generation: prefill a batch of prompts, then decode until every row has stopped.

A row's text depends on its prompt, its key and the batch shape alone: prompts are grouped by their
own length, every batch has the same number of rows, and dummy rows fill the last one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from humpback_jax.errors import HumpbackError
from humpback_jax.model.cache import decode_attention, prefill_attention
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Params, bind, unstack_layers
from humpback_jax.sampling.sampler import Decoding, draw_tokens

PROMPT_BUCKETS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)


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

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Completions in the order of `requests`.

        Raises:
          HumpbackError: a prompt is empty or leaves no room in the model's window.
        """
        window = self.config.max_position_embeddings
        by_bucket: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            length = len(request.prompt)
            if not 0 < length < window:
                raise HumpbackError(
                    f"record {request.id}: the prompt has {length} tokens; the model's window of "
                    f"{window} must hold it and at least one new token. Shorten the record."
                )
            by_bucket.setdefault(_bucket(length, window), []).append(index)
        results: dict[int, Completion] = {}
        for bucket, members in sorted(by_bucket.items()):
            for start in range(0, len(members), self.batch_size):
                group = members[start : start + self.batch_size]
                drawn = self._run([requests[i] for i in group], bucket, decoding)
                results.update(zip(group, drawn, strict=True))
        return [results[index] for index in range(len(requests))]

    def _run(
        self, requests: Sequence[Request], bucket: int, decoding: Decoding
    ) -> list[Completion]:
        rows = self.batch_size
        prompts = np.full((rows, bucket), self.stop_ids[0], np.int32)
        lengths = np.ones(rows, np.int32)
        keys = np.zeros((rows, 2), np.uint32)
        for row, request in enumerate(requests):
            prompts[row, : len(request.prompt)] = request.prompt
            lengths[row] = len(request.prompt)
            keys[row] = request.key
        live = np.arange(rows) < len(requests)
        window = self.config.max_position_embeddings
        capacity = min(bucket + decoding.max_new_tokens, window)
        prefill, decode = _programs(self.config, self.precision, decoding, self.stop_ids, capacity)
        logits, caches = prefill(self._params, prompts, lengths)
        state = decode(self._params, logits, caches, lengths, keys, live)
        tokens, counts, logprobs, stopped = jax.device_get(
            (state.tokens, state.counts, state.logprobs, state.stopped)
        )
        completions = []
        for row in range(len(requests)):
            kept = counts[row] - int(stopped[row])
            reason = "stop" if stopped[row] else "length"
            completions.append(Completion(tokens[row, :kept], float(logprobs[row]), reason))
        return completions


class DecodeState(NamedTuple):
    """Loop state: tokens [B, N]; counts, lengths int32 [B]; stopped, live bool [B]."""

    step: jax.Array
    logits: jax.Array
    caches: Any
    tokens: jax.Array
    counts: jax.Array
    logprobs: jax.Array
    stopped: jax.Array
    live: jax.Array


def _bucket(length: int, window: int) -> int:
    fitting = [size for size in PROMPT_BUCKETS if length <= size <= window]
    return fitting[0] if fitting else window - 1


@functools.lru_cache(maxsize=64)
def _programs(
    config: LlamaConfig,
    precision: Precision,
    decoding: Decoding,
    stop_ids: tuple[int, ...],
    capacity: int,
) -> tuple[Callable[..., Any], Callable[..., DecodeState]]:
    def prefill(params: Params, prompts: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Any]:
        model = bind(config, params, "unrolled")
        rows, width = prompts.shape
        places = jnp.broadcast_to(jnp.arange(width), (rows, width))
        hidden, caches = model.hidden_states(
            prompts,
            jnp.minimum(places, lengths[:, None] - 1),
            prefill_attention(lengths, capacity, precision),
            [None] * config.num_hidden_layers,
            precision=precision,
        )
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return model.logits(last, precision), caches

    def decode(
        params: Params,
        logits: jax.Array,
        caches: Any,
        lengths: jax.Array,
        keys: jax.Array,
        live: jax.Array,
    ) -> DecodeState:
        model = bind(config, params, "unrolled")
        rows = lengths.shape[0]
        stops = jnp.array(stop_ids, jnp.int32)

        def unfinished(state: DecodeState) -> jax.Array:
            return state.live.any() & (state.step < decoding.max_new_tokens)

        def body(state: DecodeState) -> DecodeState:
            drawn, logprob = draw_tokens(state.logits, keys, state.counts, decoding)
            stops_now = state.live & jnp.isin(drawn, stops)
            tokens = state.tokens.at[:, state.step].set(drawn)
            counts = state.counts + state.live
            logprobs = state.logprobs + jnp.where(state.live, logprob, 0.0)
            positions = jnp.minimum(lengths + state.step, capacity - 1)
            full = lengths + counts >= config.max_position_embeddings
            live = state.live & ~stops_now & ~full
            hidden, caches = model.hidden_states(
                drawn[:, None],
                positions[:, None],
                decode_attention(positions, precision),
                state.caches,
                precision=precision,
            )
            return DecodeState(
                state.step + 1,
                model.logits(hidden[:, 0], precision),
                caches,
                tokens,
                counts,
                logprobs,
                state.stopped | stops_now,
                live,
            )

        start = DecodeState(
            jnp.int32(0),
            logits,
            caches,
            jnp.zeros((rows, decoding.max_new_tokens), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(rows, bool),
            live,
        )
        return jax.lax.while_loop(unfinished, body, start)

    return jax.jit(prefill), jax.jit(decode, donate_argnums=(2,))
