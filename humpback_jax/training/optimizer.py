"""AdamW and learning-rate schedules with the paper's settings as defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from humpback_jax.errors import HumpbackError

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """AdamW (Loshchilov and Hutter, 2019).

    Defaults: learning rate 1e-5 falling linearly to 9e-6 and weight decay 0.1 (Humpback, section
    3.1); beta and the absence of a warm-up from LIMA; the clip norm from the unofficial
    re-implementation. `end_learning_rate` is a rate, not a fraction of the first one.
    `lora_plus_ratio` is the learning rate of an adapter's B by that of all else (LoRA+; Hayou et
    al., 2024).
    """

    learning_rate: float = 1e-5
    end_learning_rate: float = 9e-6
    schedule: str = "linear"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    lora_plus_ratio: float = 1.0


def learning_rate(spec: OptimizerSpec, steps: int) -> optax.Schedule:
    """Schedule over `steps` optimizer steps: lr(s) = first + (last - first) * s / steps (linear).

    With a warm-up the rate first rises linearly from 0, and the rest spans what remains.
    """
    remaining = max(steps - spec.warmup_steps, 1)
    first, last = spec.learning_rate, spec.end_learning_rate
    match spec.schedule:
        case "linear":
            main = optax.linear_schedule(first, last, remaining)
        case "cosine":
            main = optax.cosine_decay_schedule(first, remaining, alpha=last / first)
        case "constant":
            main = optax.constant_schedule(first)
        case unknown:
            raise HumpbackError(
                f"train.schedule={unknown!r} is unknown; choose one of {', '.join(SCHEDULES)}."
            )
    if not spec.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, first, spec.warmup_steps)
    return optax.join_schedules([warmup, main], [spec.warmup_steps])


def make_optimizer(spec: OptimizerSpec, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW. Norm scales, biases and DoRA's magnitudes do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(spec.clip_norm),
        optax.adamw(
            learning_rate(spec, steps),
            b1=spec.beta1,
            b2=spec.beta2,
            eps=spec.epsilon,
            weight_decay=spec.weight_decay,
            mask=_decayed,
        ),
        _faster_b(spec.lora_plus_ratio),
    )


def _faster_b(ratio: float) -> optax.GradientTransformation:
    def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        return update * ratio if path[-1].key == "lora_b" else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def _decayed(params: Any) -> Any:
    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key not in ("scale", "bias", "lora_magnitude")

    return jax.tree_util.tree_map_with_path(is_matrix, params)
