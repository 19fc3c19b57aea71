"""Held-out response NLL, under each set of tags."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from humpback_jax.inference import Inference
from humpback_jax.records import Example
from humpback_jax.text.template import Tags


def response_nll(
    reader: Inference, examples: Sequence[Example], tags: Tags
) -> tuple[np.ndarray, np.ndarray]:
    """(nll [n] in nats, tokens [n]) of each conversation's assistant turns, EOS included."""
    template = reader.model.template
    rows = [(e.id, template.forward(e.chat(), tags)) for e in examples]
    return reader.nll(rows, template.question)


def instruction_nll(
    reader: Inference, examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """(nll, tokens) of each pair's instruction given its response, for M_yx."""
    template = reader.model.template
    rows = [(e.id, template.backward(e.response, e.instruction)) for e in examples]
    return reader.nll(rows, template.backward_prompt)
