"""Log-likelihoods of given tokens, log p(token | what stands before it), in fixed shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from humpback_jax.errors import HumpbackError
from humpback_jax.model.blockwise import CHUNK, scoring_attention
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.linear import LoraSpec, Precision
from humpback_jax.model.llama import Layout, Llama, Params, bind
from humpback_jax.parallel.mesh import axis_size
from humpback_jax.sampling.prefix import Prefix, PrefixArrays, compute_prefix
from humpback_jax.training.examples import TrainingExample
from humpback_jax.training.packing import best_fit

WIDTH = 1024  # places of one program call, where a query does not take more
TARGETS = 256  # targets whose logits are computed at one time
VOCABULARY = 8192  # tokens of the vocabulary whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class Query:
    """Log-probabilities wanted in one text, or in one text with several continuations.

    Attributes:
      tokens: int32 [n], read by the model.
      places: int32 [n], each token's position: from 0 on, and on from its trunk in a branch.
      branches: int32 [n]: 0 is the trunk; branches 1, 2, ... see it, and not each other.
      after: int32 [m], indices into `tokens`; targets: int32 [m]. Wanted is log p(targets[i] | the
        tokens up to and including after[i]).
    """

    id: str
    tokens: np.ndarray
    places: np.ndarray
    branches: np.ndarray
    after: np.ndarray
    targets: np.ndarray


def supervised_tokens(example: TrainingExample) -> Query:
    """The tokens of an example that are supervised, given all before them."""
    after = np.flatnonzero(example.mask[1:])
    return _causal(example.id, example.ids[:-1], after, example.ids[1:][after])


def every_token(name: str, tokens: np.ndarray) -> Query:
    """Every token but the first, given all before it."""
    return _causal(name, tokens[:-1], np.arange(len(tokens) - 1), tokens[1:])


def next_token(name: str, prompt: np.ndarray, token_ids: Sequence[int]) -> Query:
    """Each of `token_ids` as the token after `prompt`."""
    after = np.full(len(token_ids), len(prompt) - 1)
    return _causal(name, prompt, after, np.array(token_ids))


def continuations(name: str, prompt: np.ndarray, texts: Sequence[np.ndarray]) -> Query:
    """Every token of every continuation of one prompt, which is computed once for all of them.

    Raises:
      HumpbackError: a continuation is empty.
    """
    start, trunk = len(prompt), np.arange(len(prompt))
    tokens, places, branches = [prompt], [trunk], [np.zeros(start, np.int32)]
    after, targets, used = [], [], start
    for branch, text in enumerate(texts, start=1):
        if not len(text):
            raise HumpbackError(f"{name}: continuation {branch} is empty; give it a token.")
        read = len(text) - 1  # the last token is a target only
        tokens.append(text[:-1])
        places.append(start + np.arange(read))
        branches.append(np.full(read, branch))
        after.append(np.concatenate([[start - 1], used + np.arange(read)]))
        targets.append(text)
        used += read
    joined = (np.concatenate(parts) for parts in (tokens, places, branches, after, targets))
    return Query(name, *(part.astype(np.int32) for part in joined))


def _causal(name: str, tokens: np.ndarray, after: np.ndarray, targets: np.ndarray) -> Query:
    places, branches = np.arange(len(tokens)), np.zeros(len(tokens))
    arrays = (tokens, places, branches, after, targets)
    return Query(name, *(array.astype(np.int32) for array in arrays))


def log_probs(
    config: LlamaConfig,
    params: Params,
    queries: Sequence[Query],
    precision: Precision,
    *,
    layout: Layout = "unrolled",
    lora: LoraSpec | None = None,
    prefix: Prefix | None = None,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """Natural logarithms, float32 [m] for each query, over the whole vocabulary.

    A query's result depends on the query alone, to the last bit, and not on the others.

    Args:
      params: in `layout`, as is `prefix`.
      prefix: texts that begin with its tokens do not compute them again.
      mesh: where `params` and `prefix` lie, if not on one device.

    Raises:
      HumpbackError: a query has no token, or a result is not a number.
    """
    prefix = prefix or compute_prefix(config, params, (), precision, layout, lora, mesh)
    shared = [shared_tokens(query, prefix) for query in queries]
    program = _program(config, precision, layout, lora, mesh)
    results = [np.zeros(len(query.targets), np.float32) for query in queries]
    for width, members in _packed(queries, shared):
        batch = _lay_out(queries, shared, members, width)
        asked = sum(len(queries[index].targets) for index in members)
        values, start = np.asarray(program(params, prefix.arrays, batch, np.int32(asked))), 0
        for index in members:
            end = start + len(queries[index].targets)
            results[index], start = values[start:end], end
    for query, values in zip(queries, results, strict=True):
        if not np.isfinite(values).all():
            raise HumpbackError(
                f"{query.id}: the log-likelihood is not a number; the model's weights are broken, "
                "or overflow in this precision."
            )
    return results


def sequence_nll(
    config: LlamaConfig,
    params: Params,
    examples: Sequence[TrainingExample],
    precision: Precision,
    *,
    layout: Layout = "unrolled",
    lora: LoraSpec | None = None,
    prefix: Prefix | None = None,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each example's supervised tokens, given all before them.

    Returns:
      (nll float64 [n] in nats, supervised tokens int64 [n]), in the order of `examples`. See
      `log_probs` for the arguments and errors.
    """
    queries = [supervised_tokens(example) for example in examples]
    found = log_probs(
        config, params, queries, precision, layout=layout, lora=lora, prefix=prefix, mesh=mesh
    )
    return total_nll(found)


def total_nll(found: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(nll float64 [n] in nats, tokens int64 [n]) of n results of `log_probs`."""
    nll = np.array([-values.astype(np.float64).sum() for values in found])
    return nll, np.array([len(values) for values in found], np.int64)


def programs(config: LlamaConfig, precision: Precision, mesh: Mesh | None = None) -> int:
    """How many programs have been compiled that score with this model, layers apart."""
    program: Any = _program(config, precision, "unrolled", None, mesh)
    return int(program._cache_size())


def shared_tokens(query: Query, prefix: Prefix) -> int:
    """How many of the query's first tokens are taken from the prefix.

    Raises:
      HumpbackError: the query has no token.
    """
    if not len(query.tokens):
        raise HumpbackError(f"{query.id} is empty: nothing comes next.")
    trunk = query.tokens[query.branches == 0]
    # The first token that is asked about, and the one before it, are the query's own.
    return prefix.shared_by(trunk[: int(query.after.min(initial=len(trunk) - 1)) + 1])


def _packed(queries: Sequence[Query], shared: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """(width, the indices of the queries) of each program call."""
    sizes = []
    for query, count in zip(queries, shared, strict=True):
        chunks = -(-(len(query.tokens) - count) // CHUNK)
        # Targets have as many places as tokens; a query with more takes the room of both.
        sizes.append(max(chunks * CHUNK, len(query.targets)))
    # A query's width is its own business: programs of other widths may round otherwise.
    widths = np.array([max(WIDTH, 1 << (size - 1).bit_length()) for size in sizes], int)
    for width in np.unique(widths).tolist():
        indices = np.flatnonzero(widths == width).tolist()
        for members in best_fit([sizes[index] for index in indices], width):
            yield width, [indices[member] for member in members]


class _Batch(NamedTuple):
    """Queries one after another, each from the beginning of a chunk on. All int32.

    Attributes:
      tokens, positions, places, branches: [T]; a position counts the prefix, a place does not.
      starts, lengths, shared: [T / CHUNK], of the chunk's query: its first index, its number of
        tokens, and how many tokens of the prefix it follows.
      after, targets: [T], as in `Query`.
    """

    tokens: jax.Array
    positions: jax.Array
    places: jax.Array
    branches: jax.Array
    starts: jax.Array
    lengths: jax.Array
    shared: jax.Array
    after: jax.Array
    targets: jax.Array


def _lay_out(
    queries: Sequence[Query], shared: Sequence[int], members: Sequence[int], width: int
) -> _Batch:
    tokens, positions, places, branches, after, targets = np.zeros((6, width), np.int32)
    starts, lengths, counts = np.zeros((3, width // CHUNK), np.int32)
    start = asked = 0
    for index in members:
        query, skipped = queries[index], shared[index]
        length = len(query.tokens) - skipped
        following = start + -(-length // CHUNK) * CHUNK
        text, chunk = slice(start, start + length), slice(start // CHUNK, following // CHUNK)
        tokens[text], branches[text] = query.tokens[skipped:], query.branches[skipped:]
        positions[text], places[text] = query.places[skipped:], query.places[skipped:] - skipped
        starts[chunk], lengths[chunk], counts[chunk] = start, length, skipped
        wanted = slice(asked, asked + len(query.targets))
        after[wanted], targets[wanted] = query.after - skipped + start, query.targets
        start, asked = following, wanted.stop
    arrays = (tokens, positions, places, branches, starts, lengths, counts, after, targets)
    return _Batch._make(arrays)


@functools.lru_cache(maxsize=32)
def _program(
    config: LlamaConfig,
    precision: Precision,
    layout: Layout,
    lora: LoraSpec | None,
    mesh: Mesh | None,
) -> Callable[[Params, PrefixArrays, _Batch, np.int32], jax.Array]:
    """(params, prefix, batch, how many targets it has) -> float32 [T]."""
    # Parts of the vocabulary that lie on other devices are not worth cutting further.
    piece = VOCABULARY if axis_size(mesh, "tensor") == 1 else config.vocab_size

    def run(params: Params, prefix: PrefixArrays, batch: _Batch, asked: jax.Array) -> jax.Array:
        model = bind(config, params, layout, lora)
        attend = scoring_attention(
            batch.places, batch.branches, batch.starts, batch.lengths, batch.shared, precision
        )
        hidden, _ = model.hidden_states(
            batch.tokens[None], batch.positions[None], attend, prefix.layers, precision=precision
        )
        return _target_log_probs(model, hidden[0], batch, asked, piece, precision)

    # Every process of a copy reads the result.
    return jax.jit(run, out_shardings=mesh and NamedSharding(mesh, PartitionSpec()))


def _target_log_probs(
    model: Llama,
    hidden: jax.Array,
    batch: _Batch,
    asked: jax.Array,
    piece: int,
    precision: Precision,
) -> jax.Array:
    """float32 [T]: log p of each target; logits exist for some targets and tokens at a time."""
    size, width = min(TARGETS, hidden.shape[0]), hidden.shape[0]
    vocab = model.config.vocab_size
    piece = min(piece, vocab)
    pieces = -(-vocab // piece)

    def block(index: jax.Array, result: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, width - size)
        after = jax.lax.dynamic_slice_in_dim(batch.after, start, size)
        targets = jax.lax.dynamic_slice_in_dim(batch.targets, start, size)
        rows = hidden[after]

        def add(number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, chosen = sums
            # The last piece begins earlier where the vocabulary is not a multiple.
            first = jnp.minimum(number * piece, vocab - piece)
            logits = model.some_logits(rows, first, piece, precision)
            fresh = first + jnp.arange(piece) >= number * piece
            logits = jnp.where(fresh, logits, -jnp.inf)
            new = jnp.maximum(highest, logits.max(axis=-1))
            total = total * jnp.exp(highest - new) + jnp.exp(logits - new[:, None]).sum(axis=-1)
            column = jnp.clip(targets - first, 0, piece - 1)[:, None]
            mine = (targets >= number * piece) & (targets < first + piece)
            value = jnp.take_along_axis(logits, column, axis=1)[:, 0]
            return new, total, jnp.where(mine, value, chosen)

        zeros = jnp.zeros(size, jnp.float32)
        highest, total, chosen = jax.lax.fori_loop(0, pieces, add, (zeros - jnp.inf, zeros, zeros))
        found = chosen - highest - jnp.log(total)
        return jax.lax.dynamic_update_slice_in_dim(result, found, start, 0)

    blocks = (asked + size - 1) // size
    return jax.lax.fori_loop(0, blocks, block, jnp.zeros(width, jnp.float32))
