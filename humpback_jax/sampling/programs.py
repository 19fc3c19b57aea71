"""The compiled programs of generation: prefill of chunks, and some steps of decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from humpback_jax.model.cache import LayerCache, empty_cache
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.kernels import XLA, Kernels
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import Llama, Params, bind
from humpback_jax.parallel.rules import constrain
from humpback_jax.sampling.drafts import accepted, look_up, with_drafts
from humpback_jax.sampling.prefix import PrefixArrays
from humpback_jax.sampling.sampler import (
    STOP_IDS,
    Controls,
    Decoding,
    controls_of,
    draw_tokens,
)


class Slots(NamedTuple):
    """B rows under way, each in its slot.

    Attributes:
      caches: of each layer, for the tokens after the shared prefix.
      offsets: int32 [B], tokens of the shared prefix that the row begins with: all or none.
      lengths: int32 [B], tokens in the cache. last: int32 [B], the token drawn after them.
      text: int32 [B, S], the tokens in the cache.
      drawn: int32 [B], tokens drawn so far. live: bool [B], whether more will be.
      seen: bool [B, V], the tokens that the row contains.
      controls: how each row draws.
    """

    caches: list[LayerCache]
    offsets: jax.Array
    lengths: jax.Array
    last: jax.Array
    text: jax.Array
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


def empty_chunks(count: int, width: int) -> Chunks:
    """The arrays of a prefill call without content."""
    numbers, flags = np.zeros(count, np.int32), np.zeros(count, bool)
    keys = [np.zeros(2, np.uint32)] * count
    controls = controls_of([Decoding(0.0)] * count, keys, ())
    tokens = np.zeros((count, width), np.int32)
    return Chunks._make((tokens, *[numbers] * 4, flags, controls))


class Drawn(NamedTuple):
    """Tokens drawn.

    Attributes:
      tokens, logprobs: int32 and float32 [B, N], of which each row has the first `counts` [B].
      steps: int32 [B], in how many steps they were drawn. live: bool [B], who goes on.
    """

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    steps: jax.Array
    live: jax.Array


def empty_slots(
    config: LlamaConfig,
    precision: Precision,
    rows: int,
    capacity: int,
    mesh: Mesh | None = None,
    kernels: Kernels = XLA,
) -> Slots:
    """Free slots for `rows` rows of at most `capacity` tokens each after the shared prefix."""
    if mesh is None:
        return _empty_slots(config, precision, rows, capacity)
    return _empty_program(config, precision, rows, capacity, mesh, kernels)()


def abstract_slots(
    config: LlamaConfig,
    precision: Precision,
    rows: int,
    capacity: int,
    mesh: Mesh,
    kernels: Kernels,
) -> Slots:
    """The shapes of `empty_slots` on a mesh, and where they lie."""
    make = functools.partial(_empty_slots, config, precision, rows, capacity)
    shapes = jax.eval_shape(make)
    where = jax.tree.broadcast(_slot_shardings(config, precision, rows, mesh, kernels), shapes)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, where
    )


@functools.lru_cache(maxsize=32)
def _empty_program(
    config: LlamaConfig,
    precision: Precision,
    rows: int,
    capacity: int,
    mesh: Mesh,
    kernels: Kernels,
) -> Callable[[], Slots]:
    make = functools.partial(_empty_slots, config, precision, rows, capacity)
    return jax.jit(make, out_shardings=_slot_shardings(config, precision, rows, mesh, kernels))


def _slot_shardings(
    config: LlamaConfig, precision: Precision, rows: int, mesh: Mesh, kernels: Kernels
) -> Any:
    """The cache's heads over tensor, its rows as the kernels want; all else on every device."""
    attention = dataclasses.replace(kernels, mesh=mesh)
    cache = attention.cache_partition(rows, config.num_key_value_heads, precision)
    rest = NamedSharding(mesh, PartitionSpec())
    return Slots._make([NamedSharding(mesh, cache), *[rest] * (len(Slots._fields) - 1)])


def _empty_slots(config: LlamaConfig, precision: Precision, rows: int, capacity: int) -> Slots:
    zeros = functools.partial(jnp.zeros, rows)
    return Slots(
        caches=empty_cache(config, rows, capacity, precision.kv or precision.activations),
        offsets=zeros("int32"),
        lengths=zeros("int32"),
        last=zeros("int32"),
        text=jnp.zeros((rows, capacity), jnp.int32),
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
    config: LlamaConfig, precision: Precision, mesh: Mesh | None = None, kernels: Kernels = XLA
) -> Callable[[Params, Slots, PrefixArrays, Chunks], tuple[Slots, Drawn]]:
    """(params, slots, prefix, chunks) -> (slots, the first token of each chunk that is final)."""

    attention = dataclasses.replace(kernels, mesh=mesh)

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
            attention.prefill(chunks.slots, chunks.offsets, chunks.starts, precision),
            slots.caches,
            prefix,
            precision,
        )
        # The rows that begin forget what the slot's last text contained.
        begins = jnp.where(chunks.starts == 0, chunks.slots, slots.live.shape[0])
        shared = prefix.seen & (chunks.offsets > 0)[:, None]
        seen = slots.seen.at[begins].set(shared, mode="drop")
        used = jnp.take_along_axis(chunks.tokens, within, axis=1)
        seen = seen.at[chunks.slots[:, None], used].set(True)

        def draw(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            ends = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
            logits = constrain(model.logits(ends, precision), mesh, PartitionSpec())
            return draw_tokens(logits, seen[chunks.slots], jnp.zeros_like(last), chunks.controls)

        def skip(_: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.zeros_like(last), jnp.zeros(last.shape, jnp.float32)

        token, logprob = jax.lax.cond(chunks.final.any(), draw, skip, hidden)
        place = jnp.where(chunks.final, chunks.slots, slots.live.shape[0])
        one = jnp.ones_like(last)
        lengths = chunks.starts + chunks.counts
        before = (chunks.offsets + lengths)[:, None]
        live = _goes_on(config, token[:, None], one[:, None], before, chunks.controls)[:, 0]
        slots = Slots(
            caches,
            slots.offsets.at[place].set(chunks.offsets, mode="drop"),
            slots.lengths.at[place].set(lengths, mode="drop"),
            slots.last.at[place].set(token, mode="drop"),
            slots.text.at[chunks.slots[:, None], chunks.starts[:, None] + within].set(
                used, mode="drop"
            ),
            slots.drawn.at[place].set(one, mode="drop"),
            slots.live.at[place].set(live, mode="drop"),
            seen.at[place, token].set(True, mode="drop"),
            jax.tree.map(
                lambda old, new: old.at[place].set(new, mode="drop"),
                slots.controls,
                chunks.controls,
            ),
        )
        return slots, Drawn(token[:, None], logprob[:, None], one, one, live)

    return _compiled(config, precision, prefill, attention)


@functools.lru_cache(maxsize=32)
def decode_program(
    config: LlamaConfig,
    precision: Precision,
    steps: int,
    drafts: int,
    mesh: Mesh | None = None,
    kernels: Kernels = XLA,
) -> Callable[[Params, Slots, PrefixArrays, np.ndarray, np.int32], tuple[Slots, Drawn]]:
    """(params, slots, prefix, ended bool [B], patience int32 []) -> (slots, what each row drew).

    Draws in up to `steps` steps for each live row in one call, so that no token goes through the
    host; returns early once `patience` rows have ended, and when none is left. Rows that the host
    has `ended` draw no more.

    Args:
      drafts: tokens guessed in each step, which draws one more than it guesses right. Where no
        row finds anything to guess, a step has one place a row.
    """
    attention = dataclasses.replace(kernels, mesh=mesh)

    def decode(
        params: Params, slots: Slots, prefix: PrefixArrays, ended: jax.Array, patience: jax.Array
    ) -> tuple[Slots, Drawn]:
        model = bind(config, params, "unrolled")
        slots = slots._replace(live=slots.live & ~ended)
        rows = slots.live.shape[0]
        capacity = sum(values.shape[2] for values in slots.caches[0].values)
        started = slots.live.sum()
        every = jnp.arange(rows)[:, None]
        Loop = tuple[jax.Array, Slots, jax.Array, Drawn]

        def known_text(slots: Slots) -> tuple[jax.Array, jax.Array]:
            """(each row's next place in the cache, its text with the token drawn last)."""
            # Slots without a live row draw too, and nobody looks; at a place beyond the last one
            # they write nothing, since a prompt may be under way there.
            places = jnp.where(slots.live, slots.lengths, capacity)
            return places, slots.text.at[every[:, 0], places].set(slots.last, mode="drop")

        def guess(slots: Slots) -> jax.Array:
            found = look_up(known_text(slots)[1], slots.lengths, drafts)
            return jnp.where(slots.live[:, None], found, -1)

        def unfinished(loop: Loop) -> jax.Array:
            step, slots, *_ = loop
            left = slots.live.sum()
            return (step < steps) & (left > 0) & (started - left < patience)

        def body(width: int, loop: Loop) -> Loop:
            step, slots, guessed, new = loop
            guessed, ahead = guessed[:, : width - 1], jnp.arange(width)
            places, text = known_text(slots)
            tokens = jnp.concatenate([slots.last[:, None], jnp.maximum(guessed, 0)], axis=1)
            hidden, caches = _run(
                model,
                tokens,
                (slots.offsets + places)[:, None] + ahead,
                attention.decode(places, slots.offsets, slots.live, precision),
                slots.caches,
                prefix,
                precision,
            )
            logits = constrain(model.logits(hidden, precision), mesh, PartitionSpec())
            drawn = slots.drawn[:, None] + ahead
            token, logprob = _draw_places(
                logits, with_drafts(slots.seen, guessed), drawn, slots.controls
            )
            cached = (slots.offsets + slots.lengths)[:, None] + 1 + ahead
            goes_on = _goes_on(config, token, drawn + 1, cached, slots.controls)
            count = jnp.where(slots.live, accepted(token, guessed, goes_on), 0)
            taken = ahead < count[:, None]
            last = jnp.maximum(count - 1, 0)[:, None]
            live = slots.live & jnp.take_along_axis(goes_on, last, axis=1)[:, 0]
            column = jnp.where(taken, new.counts[:, None] + ahead, new.tokens.shape[1])
            new = Drawn(
                new.tokens.at[every, column].set(token, mode="drop"),
                new.logprobs.at[every, column].set(logprob, mode="drop"),
                new.counts + count,
                new.steps + slots.live,
                live,
            )
            slots = Slots(
                caches,
                slots.offsets,
                slots.lengths + count,
                jnp.take_along_axis(token, last, axis=1)[:, 0],
                text.at[every, jnp.where(taken[:, 1:], places[:, None] + ahead[1:], capacity)].set(
                    tokens[:, 1:], mode="drop"
                ),
                slots.drawn + count,
                live,
                slots.seen.at[jnp.where(taken, every, rows), token].set(True, mode="drop"),
                slots.controls,
            )
            return step + 1, slots, guess(slots), new

        zeros = jnp.zeros(rows, jnp.int32)
        nothing = Drawn(
            jnp.zeros((rows, steps * (1 + drafts)), jnp.int32),
            jnp.zeros((rows, steps * (1 + drafts)), jnp.float32),
            zeros,
            zeros,
            slots.live,
        )
        narrow, wide = functools.partial(body, 1), functools.partial(body, 1 + drafts)

        def guessing(loop: Loop) -> jax.Array:
            return (loop[2] >= 0).any()

        def both(loop: Loop) -> Loop:
            """One token a row while nothing is guessed, which costs less, then more at a time."""
            loop = jax.lax.while_loop(lambda loop: unfinished(loop) & ~guessing(loop), narrow, loop)
            return jax.lax.while_loop(lambda loop: unfinished(loop) & guessing(loop), wide, loop)

        begin = jnp.int32(0), slots, guess(slots), nothing
        _, slots, _, new = jax.lax.while_loop(unfinished, both if drafts else narrow, begin)
        return slots, new

    return _compiled(config, precision, decode, attention)


def _draw_places(
    logits: jax.Array, seen: jax.Array, positions: jax.Array, controls: Controls
) -> tuple[jax.Array, jax.Array]:
    """`draw_tokens` for several places of each row: logits, seen [B, T, V], positions [B, T]."""
    rows, width, vocab = logits.shape
    token, logprob = draw_tokens(
        logits.reshape(-1, vocab),
        seen.reshape(-1, vocab),
        positions.reshape(-1),
        jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), controls),
    )
    return token.reshape(rows, width), logprob.reshape(rows, width)


def _compiled(
    config: LlamaConfig,
    precision: Precision,
    program: Callable[..., Any],
    attention: Kernels,
) -> Callable[..., tuple[Slots, Drawn]]:
    mesh, where = attention.mesh, None
    if mesh is not None:
        slots = _slot_shardings(config, precision, 1, mesh, attention)
        if attention.cuts_the_cache(precision):
            # How depends on the number of rows; they stay where attention leaves them.
            slots = slots._replace(caches=None)
        where = slots, slots.live
    return jax.jit(program, donate_argnums=1, out_shardings=where)


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
    """bool [B, T]: whether a row draws on that has drawn `drawn` tokens, the last being `token`.

    `cached` tokens stand before the last one.
    """
    stopped = (token[:, :, None] == controls.stop_ids[:, None]).any(axis=2)
    full = cached + 1 >= config.max_position_embeddings
    return ~stopped & ~full & (drawn < controls.max_new_tokens[:, None])
