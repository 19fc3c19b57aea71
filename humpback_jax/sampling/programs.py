"""The compiled programs of generation: prefill some prompts, insert them into the cache, decode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from humpback_jax.model.cache import LayerCache, decode_attention, prefill_attention
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Params, bind
from humpback_jax.sampling.sampler import Decoding, draw_tokens


class Slots(NamedTuple):
    """A batch under way: next-token logits float32 [B, V] and each layer's cache [B, G, S, K]."""

    logits: jax.Array
    caches: list[LayerCache]


class Drawn(NamedTuple):
    """What a batch has drawn: tokens int32 [B, N]; counts, sums of log p, stopped: [B]."""

    tokens: jax.Array
    counts: jax.Array
    logprobs: jax.Array
    stopped: jax.Array


def empty_slots(config: LlamaConfig, precision: Precision, rows: int, capacity: int) -> Slots:
    """Slots without content, for `rows` rows of at most `capacity` tokens each."""
    shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
    caches = [
        LayerCache(jnp.zeros(shape, precision.activations), jnp.zeros(shape, precision.activations))
        for _ in range(config.num_hidden_layers)
    ]
    return Slots(jnp.zeros((rows, config.vocab_size), jnp.float32), caches)


@functools.lru_cache(maxsize=32)
def prefill_program(config: LlamaConfig, precision: Precision) -> Callable[..., Slots]:
    """(params, prompts int32 [R, P] right-padded, lengths [R]) -> slots of R rows, P places."""

    def prefill(params: Params, prompts: jax.Array, lengths: jax.Array) -> Slots:
        model = bind(config, params, "unrolled")
        rows, width = prompts.shape
        places = jnp.broadcast_to(jnp.arange(width), (rows, width))
        hidden, caches = model.hidden_states(
            prompts,
            jnp.minimum(places, lengths[:, None] - 1),
            prefill_attention(lengths, precision),
            [None] * config.num_hidden_layers,
            precision=precision,
        )
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return Slots(model.logits(last, precision), caches)

    return jax.jit(prefill)


@functools.lru_cache(maxsize=1)
def insert_program() -> Callable[..., Slots]:
    """(batch, prefilled rows, their places in the batch) -> batch; the place B drops a row."""

    def insert(slots: Slots, new: Slots, rows: jax.Array) -> Slots:
        width = new.caches[0].keys.shape[2]
        logits = slots.logits.at[rows].set(new.logits, mode="drop")
        caches = [
            LayerCache(
                old.keys.at[rows, :, :width].set(fresh.keys, mode="drop"),
                old.values.at[rows, :, :width].set(fresh.values, mode="drop"),
            )
            for old, fresh in zip(slots.caches, new.caches, strict=True)
        ]
        return Slots(logits, caches)

    return jax.jit(insert, donate_argnums=0)


@functools.lru_cache(maxsize=32)
def decode_program(
    config: LlamaConfig, precision: Precision, decoding: Decoding, stop_ids: tuple[int, ...]
) -> Callable[..., tuple[Slots, Drawn]]:
    """(params, slots, prompt lengths [B], keys uint32 [B, 2], live bool [B]) -> (slots, drawn).

    Decodes until every live row has stopped, in one call: no token goes through the host. The slots
    are donated, and come back so that their memory can be.
    """

    def decode(
        params: Params, slots: Slots, lengths: jax.Array, keys: jax.Array, live: jax.Array
    ) -> tuple[Slots, Drawn]:
        model = bind(config, params, "unrolled")
        rows = lengths.shape[0]
        capacity = slots.caches[0].keys.shape[2]
        stops = jnp.array(stop_ids, jnp.int32)
        Loop = tuple[jax.Array, Slots, Drawn, jax.Array]

        def unfinished(loop: Loop) -> jax.Array:
            step, _, _, live = loop
            return live.any() & (step < decoding.max_new_tokens)

        def body(loop: Loop) -> Loop:
            step, slots, drawn, live = loop
            token, logprob = draw_tokens(slots.logits, keys, drawn.counts, decoding)
            stops_now = live & jnp.isin(token, stops)
            drawn = Drawn(
                drawn.tokens.at[:, step].set(token),
                drawn.counts + live,
                drawn.logprobs + jnp.where(live, logprob, 0.0),
                drawn.stopped | stops_now,
            )
            full = lengths + drawn.counts >= config.max_position_embeddings
            positions = jnp.minimum(lengths + step, capacity - 1)
            hidden, caches = model.hidden_states(
                token[:, None],
                positions[:, None],
                decode_attention(positions, precision),
                slots.caches,
                precision=precision,
            )
            slots = Slots(model.logits(hidden[:, 0], precision), caches)
            return step + 1, slots, drawn, live & ~stops_now & ~full

        start = Drawn(
            jnp.zeros((rows, decoding.max_new_tokens), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(rows, bool),
        )
        begin = (jnp.int32(0), slots, start, live)
        _, slots, drawn, _ = jax.lax.while_loop(unfinished, body, begin)
        return slots, drawn

    return jax.jit(decode, donate_argnums=1)
