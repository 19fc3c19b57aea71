"""A model ready to be asked: log-likelihoods and generations of rendered texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from humpback_jax.compute import Compute
from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import Params
from humpback_jax.models import LanguageModel
from humpback_jax.sampling.engine import Engine, Request
from humpback_jax.sampling.likelihood import next_token_log_probs, sequence_nll
from humpback_jax.sampling.sampler import Decoding, record_key
from humpback_jax.text.template import Rendered
from humpback_jax.text.tokenize import tokenize_batch
from humpback_jax.training.packing import TrainingExample
from humpback_jax.training.step import StepSpec


@dataclasses.dataclass(frozen=True)
class Generation:
    """One drawn text; see `sampling.engine.Completion` for the other fields."""

    text: str
    tokens: int
    logprob: float
    finish_reason: str


class Inference:
    """Holds a model on the device; the decoding form of the weights is made when first needed."""

    def __init__(self, model: LanguageModel, compute: Compute) -> None:
        self.model, self.compute = model, compute
        self._params: Params = jax.tree.map(jax.numpy.asarray, model.params)
        self._spec = StepSpec(model.config, "scan", compute.precision, 0, 1)
        self._engine: Engine | None = None

    def nll(self, rows: Sequence[tuple[str, Rendered]]) -> tuple[np.ndarray, np.ndarray]:
        """(nll [n] in nats, supervised tokens [n]) of rendered texts with their ids.

        Raises:
          HumpbackError: a text is longer than the model's window.
        """
        window = self.model.config.max_position_embeddings
        tokenized = tokenize_batch(self.model.tokenizer, rows, window, "error")
        examples = [TrainingExample(e.id, e.ids, e.mask) for e in tokenized.examples]
        return sequence_nll(self._spec, self._params, examples)

    def next_token_log_probs(
        self, prompts: Sequence[tuple[str, str]], ids: Sequence[int]
    ) -> np.ndarray:
        """log p(token | prompt) [prompts, ids], for each (record id, prompt).

        Raises:
          HumpbackError: a prompt is longer than the model's window.
        """
        window = self.model.config.max_position_embeddings
        encoded = []
        for record_id, text in prompts:
            tokens = np.array(self.model.tokenizer.encode(text), np.int32)
            if len(tokens) > window:
                raise HumpbackError(
                    f"record {record_id}: the prompt has {len(tokens)} tokens, the model's window "
                    f"holds {window}. Shorten the record."
                )
            encoded.append(tokens)
        return next_token_log_probs(self._spec, self._params, encoded, np.array(ids, np.int32))

    def generate(
        self,
        prompts: Sequence[tuple[str, str]],
        decoding: Decoding,
        *,
        seed: int,
        stage: str,
        draw: int = 0,
    ) -> list[Generation]:
        """Draws one text for each (record id, prompt); keyed by (seed, stage, id, draw)."""
        if self._engine is None:
            self._engine = Engine(
                self.model.config,
                self._params,
                self.model.stop_ids,
                self.compute.precision,
                self.compute.batch_size,
            )
        tokenizer = self.model.tokenizer
        requests = [
            Request(
                record_id,
                np.array(tokenizer.encode(text), np.int32),
                record_key(seed, stage, record_id, draw),
            )
            for record_id, text in prompts
        ]
        return [
            Generation(
                tokenizer.decode(done.tokens.tolist()).strip(),
                len(done.tokens),
                done.logprob,
                done.finish_reason,
            )
            for done in self._engine.generate(requests, decoding)
        ]
