"""Optimizers and learning-rate schedules with the paper's settings as defaults."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from humpback_jax.errors import HumpbackError

OPTIMIZERS = ("adamw", "adamw_bf16", "adafactor", "lion")
SCHEDULES = ("linear", "cosine", "constant", "wsd", "inverse_sqrt")
UNWARMED_SCALE = 10_000  # steps of a warm-up that "inverse_sqrt" goes on from where there is none


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """How gradients become updates.

    Defaults: AdamW, learning rate 1e-5 falling linearly to 9e-6 and weight decay 0.1 (Humpback,
    section 3.1); beta and the absence of a warm-up from LIMA; the clip norm from the unofficial
    re-implementation. `end_learning_rate` is a rate, not a fraction of the first one.

    Attributes:
      lora_plus_ratio: the learning rate of an adapter's B by that of all else (LoRA+; Hayou et al.,
        2024).
      decay_share: the last part of the steps, in which "wsd" decays.
      name: "adamw" (Loshchilov and Hutter, 2019): 8 bytes of state a parameter.
        "adamw_bf16": its first moment in bfloat16, 6 bytes. The second one stays float32: it
        changes by a share of 1 - beta2 a step, which bfloat16 may round away.
        "adafactor" (Shazeer and Stern, 2018): a second moment for each row and each column of a
        matrix, and no first one: next to nothing. Rates are absolute, as AdamW's are, and updates
        of each tensor have a root mean square of 1 at most. Reads neither beta nor epsilon.
        "lion" (Chen et al., 2023): the sign of a moving average, 4 bytes. Every entry moves by the
        full rate: its authors advise a rate 3 to 10 times smaller than AdamW's, and a weight decay
        as many times larger.
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
    decay_share: float = 0.1
    name: str = "adamw"


def learning_rate(spec: OptimizerSpec, steps: int) -> optax.Schedule:
    """Schedule over `steps` optimizer steps: lr(s) = first + (last - first) * s / steps (linear).

    With a warm-up the rate first rises linearly from 0, and the rest spans what remains. "wsd"
    (warm-up, stable, decay; Hu et al., 2024) is constant, and linear in its last `decay_share`.
    "inverse_sqrt" is first * sqrt(w / s) from the end of the w steps of warm-up on. Without a
    warm-up it falls from the first step on, first * sqrt(w / (w + s)) with w = 10,000, as that of
    transformers does; T5's own would stay constant for w steps. Like "constant", it does not know
    of a last rate.
    """
    remaining = max(steps - spec.warmup_steps, 1)
    first, last = spec.learning_rate, spec.end_learning_rate
    match spec.schedule:
        case "linear":
            main = optax.linear_schedule(first, last, remaining)
        case "cosine":
            main = optax.cosine_decay_schedule(
                first, remaining, alpha=last / first if first else 0.0
            )
        case "constant":
            main = optax.constant_schedule(first)
        case "wsd":
            decay = min(max(round(spec.decay_share * steps), 1), remaining)
            main = optax.linear_schedule(first, last, decay, remaining - decay)
        case "inverse_sqrt":
            scale = spec.warmup_steps or UNWARMED_SCALE

            def main(step: Any) -> jax.Array:
                return first * jnp.sqrt(scale / (scale + jnp.asarray(step, jnp.float32)))
        case unknown:
            raise HumpbackError(
                f"train.schedule={unknown!r} is unknown; choose one of {', '.join(SCHEDULES)}."
            )
    if not spec.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, first, spec.warmup_steps)
    return optax.join_schedules([warmup, main], [spec.warmup_steps])


def make_optimizer(spec: OptimizerSpec, steps: int) -> optax.GradientTransformation:
    """Clip by global norm (0: do not), then the optimizer of that name.

    Weight decay is apart from the gradient, times the rate; norm scales, biases and DoRA's
    magnitudes have none.
    """
    return optax.chain(
        optax.clip_by_global_norm(spec.clip_norm or math.inf),
        _direction(spec),
        optax.add_decayed_weights(spec.weight_decay, _decayed),
        _scaled_by(learning_rate(spec, steps), steps),
        _faster_b(spec.lora_plus_ratio),
    )


class RateState(NamedTuple):
    """step: int32 [], those done. rates: float32 [at least steps], of each step."""

    step: jax.Array
    rates: jax.Array


def _scaled_by(rate: optax.Schedule, steps: int) -> optax.GradientTransformation:
    """Descends by the rate of each step, which is data: runs that differ in their rates, or a
    little in their steps, share one compiled program, and a step takes a minute to compile.
    """
    length = 1 << (steps - 1).bit_length()

    def init(params: Any) -> RateState:
        rates = jnp.broadcast_to(rate(jnp.arange(length)), length)
        return RateState(jnp.zeros((), jnp.int32), rates.astype(jnp.float32))

    def update(updates: Any, state: RateState, params: Any = None) -> tuple[Any, RateState]:
        factor = -state.rates[state.step]
        updates = jax.tree.map(lambda leaf: factor * leaf, updates)
        return updates, state._replace(step=state.step + 1)

    return optax.GradientTransformation(init, update)


def _faster_b(ratio: float) -> optax.GradientTransformation:
    def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        return update * ratio if path[-1].key == "lora_b" else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def _direction(spec: OptimizerSpec) -> optax.GradientTransformation:
    """Of the update, before decay and rate."""
    match spec.name:
        case "adamw":
            return optax.scale_by_adam(spec.beta1, spec.beta2, spec.epsilon)
        case "adamw_bf16":
            return optax.scale_by_adam(
                spec.beta1, spec.beta2, spec.epsilon, mu_dtype=jnp.dtype("bfloat16")
            )
        case "adafactor":
            return optax.chain(optax.scale_by_factored_rms(), _at_most_one())
        case "lion":
            return optax.scale_by_lion(spec.beta1, spec.beta2)
        case unknown:
            raise HumpbackError(
                f"train.optimizer={unknown!r} is unknown; choose one of {', '.join(OPTIMIZERS)}."
            )


def _at_most_one() -> optax.GradientTransformation:
    """Scales down each tensor whose root mean square is above 1.

    A tensor is one layer's: optax's own rule would take stacked layers for one, so that the layout
    changed what is learnt.
    """

    def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        stacked = path[0].key == "layers" and not isinstance(path[1].key, int)
        axes = tuple(range(int(stacked), update.ndim))
        square = jnp.mean(jnp.square(update), axes, keepdims=True)
        return update / jnp.maximum(jnp.sqrt(square), 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def _decayed(params: Any) -> Any:
    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key not in ("scale", "bias", "lora_magnitude")

    return jax.tree_util.tree_map_with_path(is_matrix, params)
