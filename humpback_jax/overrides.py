"""Overrides of a config: text converted to its field's type, and refused where nothing reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from humpback_jax.config import CUTS, FALLING, check_config, nearest
from humpback_jax.errors import HumpbackError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Of a training section: the choice that a field belongs to, and those with which it is read
# (`training/optimizer.py`).
BELONGS_TO = {
    "end_learning_rate": ("schedule", FALLING),
    "decay_share": ("schedule", ("wsd",)),
    "beta1": ("optimizer", ("adamw", "adamw_bf16", "lion")),
    "beta2": ("optimizer", ("adamw", "adamw_bf16", "lion")),
    "epsilon": ("optimizer", ("adamw", "adamw_bf16")),
}


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Sequence[str]]) -> None:
    """Sets the fields of `--config.a.b=value` overrides, and checks the config with them.

    Raises:
      HumpbackError: see `set_field` and `check_config`; an override that has no effect because of
        another setting. Names the key.
    """
    for key, values in overrides.items():
        set_field(config, key, values)
    check_config(config)
    for key, reason in _without_effect(config):
        if key in overrides:
            raise HumpbackError(f"--config.{key} has no effect {reason}, or leave it out.")


def set_field(config: ConfigDict, key: str, values: Sequence[str]) -> None:
    """Sets one dotted key from command-line text, converted to the type of its default.

    Raises:
      HumpbackError: an unknown key, with the nearest known one, or text of another type.
    """
    from ml_collections import ConfigDict

    node, parts = config, key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            known = list(node) if isinstance(node, ConfigDict) else []
            inside = ".".join(["config", *parts[:depth]])
            raise HumpbackError(
                f"--config.{key}: unknown key {part!r} in {inside}{nearest(part, known)}."
            )
        if depth < len(parts) - 1:
            node = node[part]
    current = node[parts[-1]]
    if isinstance(current, ConfigDict):
        raise HumpbackError(f"--config.{key} is a section; set one of its fields: {list(current)}.")
    node[parts[-1]] = _convert(key, values, current)


def _convert(key: str, values: Sequence[str], current: Any) -> Any:
    if isinstance(current, tuple):
        items = [item for value in values for item in value.split(",") if item]
        if current and not isinstance(current[0], str):
            raise HumpbackError(f"--config.{key} is a table; change it in the config file.")
        return tuple(items)
    text = values[-1]
    try:
        if isinstance(current, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(current, int):
            return int(text)
        if isinstance(current, float) and math.isfinite(number := float(text)):
            return number
        if isinstance(current, str):
            return text
    except (KeyError, ValueError):
        pass
    raise HumpbackError(
        f"--config.{key}={text}: the value must be of type {type(current).__name__}, like "
        f"{current!r}."
    )


def _without_effect(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """(key, why and what to do) of fields that another setting leaves unread."""
    for name in ("backward", "train"):
        yield from _of_training(config[name], name)
    yield from _of_curation(config)
    if not config.backward.eval_every and not config.train.eval_every:
        reason = "where nothing is measured while training; add --config.train.eval_every"
        yield "data.validation", reason


def _of_training(section: ConfigDict, name: str) -> Iterator[tuple[str, str]]:
    if not section.steps and not section.epochs:
        reason = "while the step table gives batch and steps; add"
        yield f"{name}.batch_examples", f"{reason} --config.{name}.epochs or --config.{name}.steps"
    if section.steps and section.epochs:
        reason = f"beside config.{name}.steps={section.steps}; set that to 0"
        yield f"{name}.epochs", reason
    for field, (choice, values) in BELONGS_TO.items():
        if section[choice] not in values:
            reason = f"with config.{name}.{choice}={section[choice]}; add"
            yield f"{name}.{field}", f"{reason} --config.{name}.{choice}={'|'.join(values)}"
    if section.dropout_ramp and not section.dropout:
        reason = f"without dropout; add --config.{name}.dropout"
        yield f"{name}.dropout_ramp", reason


def _of_curation(config: ConfigDict) -> Iterator[tuple[str, str]]:
    section = config.curate
    for select, field in CUTS.items():
        if section.select != select:
            reason = f"on a run with config.curate.select={section.select}; add"
            yield f"curate.{field}", f"{reason} --config.curate.select={select}"
    if "rubric" not in {section.curator, *section.also, *config.meters.curators}:
        for field in ("temperature", "top_p", "max_new_tokens"):
            reason = "where no curator writes; add --config.curate.also=rubric"
            yield f"curate.{field}", reason
    if section.also_limit and not {*section.also} - {section.curator}:
        yield "curate.also_limit", "without further curators; add --config.curate.also"
