"""A model ready to be asked: log-likelihoods and generations of rendered texts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from humpback_jax.compute import Compute
from humpback_jax.errors import HumpbackError
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import (
    Params,
    count_parameters,
    unstack_layers,
)
from humpback_jax.models import LanguageModel
from humpback_jax.parallel.mesh import Share, our_share
from humpback_jax.parallel.processes import connect
from humpback_jax.parallel.rules import check_sharded, param_shardings, place, place_int8
from humpback_jax.sampling.engine import Completion, Engine, Request
from humpback_jax.sampling.likelihood import (
    Query,
    every_token,
    next_token,
    supervised_tokens,
    total_nll,
)
from humpback_jax.sampling.memory import device_bytes, parts_that_hold
from humpback_jax.sampling.replicas import Replicas
from humpback_jax.sampling.sampler import Decoding, all_stop_ids, record_key
from humpback_jax.text.template import Rendered
from humpback_jax.text.tokenize import tokenize_batch
from humpback_jax.text.tokenizer import Tokenizer
from humpback_jax.training.examples import TrainingExample

# Renders a prompt around a text: what comes before the text, whatever it is, is shared.
Opening = Callable[[str], str]
SPECIAL = 8  # tokens that a tokenizer may put around a text, at most
FILLERS = ("Why", " a", "\n\n", "7", "(", "é")


@dataclasses.dataclass(frozen=True)
class Generation:
    """One drawn text; see `sampling.engine.Completion` for the other fields."""

    text: str
    tokens: int
    logprob: float
    finish_reason: str
    logprobs: tuple[float, ...] = ()


class Inference:
    """Holds a model on the devices, in the form that decoding needs."""

    def __init__(self, model: LanguageModel, compute: Compute) -> None:
        self.model, self.compute, self.precision = model, compute, compute.precision
        self.share = _share(model.config, compute)
        devices = sum(1 if mesh is None else mesh.size for mesh in self.share.meshes)
        memory = compute.memory or device_bytes(jax.local_devices()[0], devices)
        self.replicas = Replicas(
            [
                Engine(
                    model.config,
                    _prepare(model, compute.weights, mesh),
                    model.stop_ids,
                    compute.precision,
                    compute.engine_shape,
                    mesh,
                    memory,
                    compute.kernels,
                )
                for mesh in self.share.meshes
            ]
        )

    def nll(
        self, rows: Sequence[tuple[str, Rendered]], opening: Opening | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(nll [n] in nats, supervised tokens [n]) of rendered texts with their ids.

        Raises:
          HumpbackError: a text is longer than the model's window.
        """
        window = self.model.config.max_position_embeddings
        tokenized = tokenize_batch(self.model.tokenizer, rows, None, "error")
        for example in tokenized.examples:
            _require_room(example.id, "text", len(example.ids), window)
        examples = [TrainingExample(e.id, e.ids, e.mask) for e in tokenized.examples]
        return total_nll(self.log_probs([supervised_tokens(e) for e in examples], opening))

    def next_token_log_probs(
        self,
        prompts: Sequence[tuple[str, str]],
        ids: Sequence[int],
        opening: Opening | None = None,
    ) -> np.ndarray:
        """log p(token | prompt) float64 [prompts, ids], for each (record id, prompt).

        Raises:
          HumpbackError: a prompt is longer than the model's window.
        """
        window = self.model.config.max_position_embeddings
        queries = []
        for record_id, text in prompts:
            tokens = np.array(self.model.tokenizer.encode(text), np.int32)
            _require_room(record_id, "prompt", len(tokens), window)
            queries.append(next_token(f"record {record_id}", tokens, ids))
        found = self.log_probs(queries, opening)
        return np.array(found, np.float64).reshape(len(prompts), len(ids))

    def text_log_probs(self, texts: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        """log p of each token but the first, given those before it, for each (record id, text)."""
        tokens = [(name, self.model.tokenizer.encode(text)) for name, text in texts]
        queries = [
            every_token(f"record {name}", np.array(ids, np.int32))
            for name, ids in tokens
            if len(ids) > 1
        ]
        found = iter(self.log_probs(queries))
        return [next(found) if len(ids) > 1 else np.zeros(0, np.float32) for _, ids in tokens]

    def log_probs(
        self, queries: Sequence[Query], opening: Opening | None = None
    ) -> list[np.ndarray]:
        """See `sampling.likelihood.log_probs`; what precedes the opening's text is shared."""
        return self.replicas.log_probs(queries, self.shared_by(opening))

    def generate(
        self,
        prompts: Sequence[tuple[str, str]],
        decoding: Decoding,
        *,
        seed: int,
        stage: str,
        draw: int = 0,
        opening: Opening | None = None,
    ) -> list[Generation]:
        """Draws one text for each (record id, prompt); keyed by (seed, stage, id, draw)."""
        requests = (
            (record_id, text, record_key(seed, stage, record_id, draw), decoding)
            for record_id, text in prompts
        )
        drawn = dict(self.stream(requests, opening))
        return [drawn[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Iterable[tuple[str, str, np.ndarray, Decoding]],
        opening: Opening | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """(place in `prompts`, text) as texts end; prompts are read as slots become free.

        Args:
          prompts: (record id, prompt, key by `record_key`, how to draw) each.
        """
        tokenizer = self.model.tokenizer
        stops: dict[int, tuple[str, ...]] = {}

        def requests() -> Iterator[Request]:
            for index, (name, text, key, decoding) in enumerate(prompts):
                decoding = _by_id(decoding, self._hidden)
                cut = None
                if decoding.stop_strings:
                    stops[index] = decoding.stop_strings
                    cut = functools.partial(_first_stop, tokenizer, decoding.stop_strings)
                tokens = np.array(tokenizer.encode(text), np.int32)
                yield Request(name, tokens, key, decoding, cut)

        for index, done in self.replicas.stream(requests(), self.shared_by(opening)):
            yield index, _generation(tokenizer, done, stops.pop(index, ()))

    def check(self, record_id: str, prompt: str, decoding: Decoding) -> None:
        """Raises HumpbackError for what `stream` cannot draw.

        That is a prompt that leaves no room in the model's window, a row that the memory does not
        hold, or too many stop tokens.
        """
        length = len(self.model.tokenizer.encode(prompt))
        self.replicas.check(record_id, length, decoding.max_new_tokens)
        try:
            all_stop_ids(_by_id(decoding, self._hidden), self.model.stop_ids)
        except HumpbackError as error:
            raise HumpbackError(f"record {record_id}: {error}") from error

    @functools.cached_property
    def _hidden(self) -> dict[str, int]:
        """The tokens that no text shows, with their ids."""
        tokenizer = self.model.tokenizer
        ids = ((text, tokenizer.id_of(text)) for text in tokenizer.control_tokens)
        return {text: i for text, i in ids if i is not None}

    def shared_by(self, opening: Opening | None) -> tuple[int, ...]:
        """The tokens that all prompts of the opening begin with."""
        return common_start(self.model.tokenizer, opening) if opening else ()


def holds(model: LanguageModel, text: str, written: int) -> bool:
    """Whether the window of a model holds a text and so many tokens after it."""
    window = model.config.max_position_embeddings
    # No token is shorter than a character; only of others than ASCII may a tokenizer make more.
    if text.isascii() and len(text) + SPECIAL + written <= window:
        return True
    return len(model.tokenizer.encode(text)) + written <= window


def common_start(tokenizer: Tokenizer, opening: Opening) -> tuple[int, ...]:
    """The tokens that a prompt begins with by its template alone, never by the rows of a job."""
    texts = [tokenizer.encode(opening(text)) for text in FILLERS]
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    return tuple(column[0] for column in columns)


def _require_room(record_id: str, what: str, tokens: int, window: int) -> None:
    if tokens > window:
        raise HumpbackError(
            f"record {record_id}: the {what} has {tokens} tokens, the model's window holds "
            f"{window}. Shorten the record."
        )


def _share(config: LlamaConfig, compute: Compute) -> Share:
    """The devices, and the part of jobs, of this process.

    Raises:
      HumpbackError: the devices do not divide into the mesh, or the mesh would not cut the weights.
    """
    weights = count_parameters(config) * jnp.dtype(compute.weights).itemsize
    budget = compute.memory or device_bytes(jax.local_devices()[0], jax.local_device_count())
    parts = parts_that_hold(weights, budget, jax.device_count())
    share = our_share(compute.mesh, parts, config.num_key_value_heads)
    if share.meshes[0] is not None:
        check_sharded(config, share.meshes[0])
        connect(share.meshes[0])
    return share


def _prepare(model: LanguageModel, weights: str, mesh: Mesh | None) -> Params:
    """Layers apart; kernels and embeddings in the format given, norms and biases in their own."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(weights) if leaf.ndim > 1 else leaf

    apart = unstack_layers(model.params)
    if weights == "int8":
        return place_int8(apart, model.config, mesh, "unrolled", lambda leaf: leaf)
    if mesh is None:
        return jax.tree.map(lambda leaf: cast(jnp.asarray(leaf)), apart)
    return place(apart, param_shardings(model.config, mesh, "unrolled"), cast)


def _by_id(decoding: Decoding, hidden: Mapping[str, int]) -> Decoding:
    """Where stop texts name tokens that no text shows, they stop it by their ids."""
    ids = tuple(hidden[text] for text in decoding.stop_strings if text in hidden)
    rest = tuple(text for text in decoding.stop_strings if text not in hidden)
    return dataclasses.replace(decoding, stop_ids=decoding.stop_ids + ids, stop_strings=rest)


def _first_stop(tokenizer: Tokenizer, stops: Sequence[str], tokens: list[int]) -> int | None:
    """The fewest tokens whose text contains one of `stops`, if all of them do."""

    def stopped(count: int) -> bool:
        text = tokenizer.decode(tokens[:count])
        return any(stop in text for stop in stops)

    if not stopped(len(tokens)):
        return None
    return next(count for count in range(1, len(tokens) + 1) if stopped(count))


def _generation(tokenizer: Tokenizer, done: Completion, stops: Sequence[str]) -> Generation:
    text = tokenizer.decode(done.tokens.tolist())
    ends = [text.index(stop) for stop in stops if stop in text]
    return Generation(
        text[: min(ends, default=len(text))].strip(),
        len(done.tokens),
        done.logprob,
        done.finish_reason,
        tuple(done.logprobs.tolist()),
    )
