"""The compiled programs of generation: prefill of chunks, and some steps of decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from humpback_jax.model.cache import LayerCache, empty_cache
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Llama, Params, bind
from humpback_jax.sampling.prefix import PrefixArrays
from humpback_jax.sampling.sampler import STOP_IDS, Controls, draw_tokens


class Slots(NamedTuple):
    """B rows under way, each in its slot.

    Attributes:
      caches: of each layer, for the tokens after the shared prefix.
      offsets: int32 [B], tokens of the shared prefix that the row begins with: all or none.
      lengths: int32 [B], tokens in the cache. last: int32 [B], the token drawn after them.
      drawn: int32 [B], tokens drawn so far. live: bool [B], whether more will be.
      seen: bool [B, V], the tokens that the row contains.
      controls: how each row draws.
    """

    caches: list[LayerCache]
    offsets: jax.Array
    lengths: jax.Array
    last: jax.Array
    drawn: jax.Array
    live: jax.Array
    seen: jax.Array
    controls: Controls


class Chunks(NamedTuple):
    """R pieces of prompts, each of at most C tokens; the same piece may stand twice.

    Attributes:
      tokens: int32 [R, C], padded on the right; counts: int32 [R], tokens in use.
      slots: int32 [R]. offsets: int32 [R], as in `Slots`.
      starts: int32 [R], the place of the first token in the slot.
      final: bool [R], whether the prompt ends here, and drawing begins.
      controls: of the chunk's row.
    """

    tokens: jax.Array
    counts: jax.Array
    slots: jax.Array
    offsets: jax.Array
    starts: jax.Array
    final: jax.Array
    controls: Controls


class Drawn(NamedTuple):
    """Tokens int32 [B, N] and their log p; of each row the first `counts` [B]; who goes on [B]."""

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    live: jax.Array


def empty_slots(config: LlamaConfig, precision: Precision, rows: int, capacity: int) -> Slots:
    """Free slots for `rows` rows of at most `capacity` tokens each after the shared prefix."""
    zeros = functools.partial(jnp.zeros, rows)
    return Slots(
        caches=empty_cache(config, rows, capacity, precision.activations),
        offsets=zeros("int32"),
        lengths=zeros("int32"),
        last=zeros("int32"),
        drawn=zeros("int32"),
        live=zeros(bool),
        seen=jnp.zeros((rows, config.vocab_size), bool),
        controls=Controls(
            temperature=zeros("float32"),
            top_p=zeros("float32"),
            top_k=zeros("int32"),
            min_p=zeros("float32"),
            repetition_penalty=zeros("float32"),
            max_new_tokens=zeros("int32"),
            stop_ids=jnp.zeros((rows, STOP_IDS), jnp.int32),
            keys=jnp.zeros((rows, 2), jnp.uint32),
        ),
    )


@functools.lru_cache(maxsize=32)
def prefill_program(
    config: LlamaConfig, precision: Precision, kernels: Kernels = XLA
) -> Callable[[Params, Slots, PrefixArrays, Chunks], tuple[Slots, Drawn]]:
    """(params, slots, prefix, chunks) -> (slots, the first token of each chunk that is final)."""

    def prefill(
        params: Params, slots: Slots, prefix: PrefixArrays, chunks: Chunks
    ) -> tuple[Slots, Drawn]:
        model = bind(config, params, "unrolled")
        last = chunks.counts - 1
        within = jnp.minimum(jnp.arange(chunks.tokens.shape[1]), last[:, None])
        hidden, caches = _run(
            model,
            chunks.tokens,
            (chunks.offsets + chunks.starts)[:, None] + within,
            kernels.prefill(chunks.slots, chunks.offsets, chunks.starts, precision),
            slots.caches,
            prefix,
            precision,
        )
        # The rows that begin forget what the slot's last text contained.
        begins = jnp.where(chunks.starts == 0, chunks.slots, slots.live.shape[0])
        before = prefix.seen & (chunks.offsets > 0)[:, None]
        seen = slots.seen.at[begins].set(before, mode="drop")
        used = jnp.take_along_axis(chunks.tokens, within, axis=1)
        seen = seen.at[chunks.slots[:, None], used].set(True)

        def draw(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            ends = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
            logits = model.logits(ends, precision)
            return draw_tokens(logits, seen[chunks.slots], jnp.zeros_like(last), chunks.controls)

        def skip(_: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.zeros_like(last), jnp.zeros(last.shape, jnp.float32)

        token, logprob = jax.lax.cond(chunks.final.any(), draw, skip, hidden)
        place = jnp.where(chunks.final, chunks.slots, slots.live.shape[0])
        one = jnp.ones_like(last)
        lengths = chunks.starts + chunks.counts
        live = _goes_on(config, token, one, chunks.offsets + lengths, chunks.controls)
        slots = Slots(
            caches,
            slots.offsets.at[place].set(chunks.offsets, mode="drop"),
            slots.lengths.at[place].set(lengths, mode="drop"),
            slots.last.at[place].set(token, mode="drop"),
            slots.drawn.at[place].set(one, mode="drop"),
            slots.live.at[place].set(live, mode="drop"),
            seen.at[place, token].set(True, mode="drop"),
            jax.tree.map(
                lambda old, new: old.at[place].set(new, mode="drop"),
                slots.controls,
                chunks.controls,
            ),
        )
        return slots, Drawn(token[:, None], logprob[:, None], one, live)

    return jax.jit(prefill, donate_argnums=1)


@functools.lru_cache(maxsize=32)
def decode_program(
    config: LlamaConfig, precision: Precision, steps: int, kernels: Kernels = XLA
) -> Callable[[Params, Slots, PrefixArrays, jax.Array, jax.Array], tuple[Slots, Drawn]]:
    """(params, slots, prefix, ended bool [B], patience int32 []) -> (slots, what each row drew).

    Draws up to `steps` tokens for each live row in one call, so that no token goes through the
    host; returns early once `patience` rows have ended, and when none is left. Rows that the host
    has `ended` draw no more.
    """

    def decode(
        params: Params, slots: Slots, prefix: PrefixArrays, ended: jax.Array, patience: jax.Array
    ) -> tuple[Slots, Drawn]:
        model = bind(config, params, "unrolled")
        slots = slots._replace(live=slots.live & ~ended)
        rows = slots.live.shape[0]
        capacity = sum(values.shape[2] for values in slots.caches[0].values)
        started = slots.live.sum()
        Loop = tuple[jax.Array, Slots, Drawn]

        def unfinished(loop: Loop) -> jax.Array:
            step, slots, _ = loop
            left = slots.live.sum()
            return (step < steps) & (left > 0) & (started - left < patience)

        def body(loop: Loop) -> Loop:
            step, slots, new = loop
            # Slots without a live row draw too, and nobody looks; at a place beyond the last one
            # they write nothing, since a prompt may be under way there.
            places = jnp.where(slots.live, slots.lengths, capacity)
            hidden, caches = _run(
                model,
                slots.last[:, None],
                (slots.offsets + places)[:, None],
                kernels.decode(places, slots.offsets, slots.live, precision),
                slots.caches,
                prefix,
                precision,
            )
            logits = model.logits(hidden[:, 0], precision)
            token, logprob = draw_tokens(logits, slots.seen, slots.drawn, slots.controls)
            lengths, drawn = slots.lengths + slots.live, slots.drawn + slots.live
            total = slots.offsets + lengths
            live = slots.live & _goes_on(config, token, drawn, total, slots.controls)
            new = Drawn(
                new.tokens.at[:, step].set(token),
                new.logprobs.at[:, step].set(logprob),
                new.counts + slots.live,
                live,
            )
            row = jnp.where(slots.live, jnp.arange(rows), rows)
            seen = slots.seen.at[row, token].set(True, mode="drop")
            slots = Slots(caches, slots.offsets, lengths, token, drawn, live, seen, slots.controls)
            return step + 1, slots, new

        nothing = Drawn(
            jnp.zeros((rows, steps), jnp.int32),
            jnp.zeros((rows, steps), jnp.float32),
            jnp.zeros(rows, jnp.int32),
            slots.live,
        )
        _, slots, new = jax.lax.while_loop(unfinished, body, (jnp.int32(0), slots, nothing))
        return slots, new

    return jax.jit(decode, donate_argnums=1)


def _run(
    model: Llama,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Any,
    caches: list[LayerCache],
    prefix: PrefixArrays,
    precision: Precision,
) -> tuple[jax.Array, list[LayerCache]]:
    """Hidden states of tokens [B, T] that follow the prefix, and the caches that hold them too."""
    pairs = list(zip(caches, prefix.layers, strict=True))
    hidden, pairs = model.hidden_states(tokens, positions, attend, pairs, precision=precision)
    return hidden, [cache for cache, _ in pairs]


def _goes_on(
    config: LlamaConfig,
    token: jax.Array,
    drawn: jax.Array,
    cached: jax.Array,
    controls: Controls,
) -> jax.Array:
    """bool [B]: whether a row draws on that has drawn `drawn` tokens, the last being `token`.

    `cached` tokens stand before the last one.
    """
    stopped = (token[:, None] == controls.stop_ids).any(axis=1)
    full = cached + 1 >= config.max_position_embeddings
    return ~stopped & ~full & (drawn < controls.max_new_tokens)
