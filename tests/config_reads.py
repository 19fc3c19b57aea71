"""Which fields of a config the package reads, found in its code and not in the names alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

from humpback_jax.compute import choose_compute

PACKAGE = Path(__file__).resolve().parent.parent / "humpback_jax"
THEMSELVES = ("config.py", "overrides.py")  # they set and check fields: that is no use of them
# What functions call `section` that is given to them, by file, or by file and function.
SECTIONS = {
    "stages/augment.py": "augment",
    "stages/curate.py": "curate",
    "stages/settings.py": "train",
    "stages/settings.py:_lora": "train.lora",
    "stages/sources.py": "corpus",
    "stages/texts.py": "train",
    "stages/tune.py": "train",
    "verbs/train.py": "train",
}


def fields_read() -> set[str]:
    """Dotted keys; those of `backward` are found as those of `train`, whose code they share."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name in THEMSELVES:
            continue
        for function in _functions(ast.parse(path.read_text("utf-8"))):
            section = SECTIONS.get(f"{name}:{function.name}", SECTIONS.get(name))
            found |= set(_paths(function, {"config": "", "section": section}))
    return found


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Top-level functions and methods; those inside them are read with them."""
    for node in tree.body:
        bodies = node.body if isinstance(node, ast.ClassDef) else [node]
        yield from (each for each in bodies if isinstance(each, ast.FunctionDef))


def _paths(function: ast.FunctionDef, names: dict[str, str | None]) -> Iterator[str]:
    """Keys behind all attributes of a function. `names`: what its variables stand for."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target, value in _assigned(node.targets[0], node.value):
                names[target] = _path(value, names) or names.get(target)
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and (path := _path(node, names)):
            yield path
        spread = isinstance(node, ast.keyword) and node.arg is None  # f(**config.compute)
        if spread and _path(node.value, names) == "compute":
            yield from (f"compute.{each}" for each in signature(choose_compute).parameters)


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for each, part in zip(target.elts, value.elts, strict=False):  # a part may be starred
            yield from _assigned(each, part)
    elif isinstance(target, ast.Name):
        yield target.id, value


def _path(node: ast.expr, names: dict[str, str | None]) -> str | None:
    """`context.config.train.steps` -> "train.steps"; None for what is no part of a config."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.IfExp):  # config.backward if ... else config.train
        return _path(node.orelse, names)
    if not isinstance(node, ast.Attribute):
        return None
    if node.attr == "config":
        return ""
    inside = _path(node.value, names)
    return None if inside is None else f"{inside}.{node.attr}".lstrip(".")
