"""How far narrow number formats move what a model writes: measured against the same in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from humpback_jax.evaluation.statistics import Estimate, token_mean
from humpback_jax.inference import Inference
from humpback_jax.records import Example
from humpback_jax.sampling.engine import Completion, Request
from humpback_jax.sampling.likelihood import supervised_tokens
from humpback_jax.sampling.sampler import Decoding, record_key
from humpback_jax.text.template import Tags
from humpback_jax.training.examples import TrainingExample

TOKENS = 64  # drawn after each prompt


def fidelity(
    reader: Inference, exact: Inference, examples: Sequence[Example], tags: Tags
) -> dict[str, Estimate]:
    """Compares what `reader` writes after each conversation's beginning with `exact`.

    Unlike scores, texts are drawn through the cache of keys and values, so that its format counts.

    Args:
      exact: the same model in float32.

    Returns:
      kl_per_token: KL(reader || exact) in nats a token, as half of the mean squared difference of
        the log-probabilities of tokens drawn at temperature 1 (Schulman, 2020).
      same_tokens: share of exact's greedy tokens that stand before the first other one of reader.
    """
    template, tokenizer = reader.model.template, reader.model.tokenizer
    prompts = {
        e.id: np.array(
            tokenizer.encode(template.forward_prompt(e.chat()[:-1], tags)),
            np.int32,
        )
        for e in examples
    }
    drawn = _draw(reader, prompts, Decoding(1.0, 1.0, max_new_tokens=TOKENS))
    greedy = Decoding(0.0, max_new_tokens=TOKENS)
    ours, theirs = (_draw(each, prompts, greedy) for each in (reader, exact))
    return {
        "kl_per_token": _divergence(exact, prompts, drawn),
        "same_tokens": token_mean(
            np.array([_agreement(a, b) for a, b in zip(ours, theirs, strict=True)]),
            np.array([len(completion.logprobs) for completion in theirs]),
        ),
    }


def _draw(
    reader: Inference, prompts: dict[str, np.ndarray], decoding: Decoding
) -> list[Completion]:
    return reader.replicas.generate(
        [
            Request(name, prompt, record_key(0, "fidelity", name, 0), decoding)
            for name, prompt in prompts.items()
        ]
    )


def _divergence(
    exact: Inference, prompts: dict[str, np.ndarray], drawn: Sequence[Completion]
) -> Estimate:
    texts = [
        TrainingExample(
            name,
            np.concatenate([prompt, done.tokens]),
            np.arange(len(prompt) + len(done.tokens)) >= len(prompt),
        )
        for (name, prompt), done in zip(prompts.items(), drawn, strict=True)
    ]
    exactly = exact.log_probs([supervised_tokens(text) for text in texts])
    squares = [
        np.square(done.logprobs[: len(done.tokens)].astype(np.float64) - expected).sum() / 2
        for done, expected in zip(drawn, exactly, strict=True)
    ]
    return token_mean(np.array(squares), np.array([len(done.tokens) for done in drawn]))


def _agreement(ours: Completion, theirs: Completion) -> int:
    """Tokens before the first difference; the end counts as one."""
    count = min(len(ours.tokens), len(theirs.tokens))
    differs = np.flatnonzero(ours.tokens[:count] != theirs.tokens[:count])
    if len(differs):
        return int(differs[0])
    return len(theirs.logprobs) if len(ours.tokens) == len(theirs.tokens) else count
