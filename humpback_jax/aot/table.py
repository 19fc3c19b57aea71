"""The table of `docs/scale.md`: what fits which slice. Each row is computed once, and kept."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from humpback_jax.aot.programs import compile_for, training_plan
from humpback_jax.aot.published import PUBLISHED, check
from humpback_jax.aot.suggest import suggest
from humpback_jax.aot.summary import mesh_text
from humpback_jax.artifacts import write_json
from humpback_jax.config import default_config
from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import count_parameters
from humpback_jax.model.shapes import SHAPES
from humpback_jax.parallel.mesh import one_copy
from humpback_jax.parallel.topology import GIB, tpu_slice
from humpback_jax.row_files import read_text
from humpback_jax.sampling.memory import parts_that_hold

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
DECODED_ROWS = 64  # of each copy
LORA_RANK = 16
HEADER = (
    "| model | tuning | slice | train on | remat | GiB a chip | step | tokens/s | MFU "
    "| decode on | GiB a chip | step |"
)
CHECK_HEADER = "| model | slice | rows x tokens a chip | published | estimated | off |"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row of the table."""

    shape: str
    topology: str
    lora: int = 0

    @property
    def name(self) -> str:
        return f"{self.shape} {'LoRA' if self.lora else 'full'} {self.topology}"


SETTINGS = (
    *(Setting("tinyllama", slice_) for slice_ in ("v5e:2x2", "v4:2x2x1", "v6e:2x2")),
    *(Setting("7b", slice_) for slice_ in ("v5e:4x4", "v5p:2x2x1", "v4:2x2x4", "v6e:2x4")),
    Setting("7b", "v5e:2x2", LORA_RANK),
    *(Setting("13b", slice_) for slice_ in ("v5e:4x8", "v5p:2x2x1", "v6e:4x4")),
    *(Setting("33b", slice_) for slice_ in ("v5p:2x2x4", "v6e:4x8")),
    Setting("33b", "v5e:4x4", LORA_RANK),
    *(Setting("65b", slice_) for slice_ in ("v5p:4x4x4", "v4:4x4x8", "v6e:8x8")),
    Setting("llama2_70b", "v5p:4x4x4"),
    Setting("llama2_70b", "v5p:2x2x4", LORA_RANK),
    Setting("llama2_70b", "v6e:4x4", LORA_RANK),
    *(Setting("llama3_8b", slice_) for slice_ in ("v5e:4x4", "v5p:2x2x1", "v6e:2x4")),
)


def fill_table(path: Path, only: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Computes what the file lacks, and writes the Markdown beside it (`scale.md`), row by row.

    Args:
      only: a row is computed if its name holds this text.

    Raises:
      HumpbackError: TPU support is not installed, or the page is missing or lacks the table's
        marks; before anything is computed.
    """
    page = path.parent / "scale.md"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"published {case.model}", functools.partial(check, case)) for case in PUBLISHED
    ]
    jobs += [(setting.name, functools.partial(_row, setting, say)) for setting in SETTINGS]
    write_page(page, rows)
    for name, job in jobs:
        if name not in rows and only in name:
            say(f"{name} ...")
            try:
                rows[name] = job()
            except HumpbackError as error:
                say(f"{name}: {error}")
                continue
            jax.clear_caches()
            write_json(path, {name: rows[name] for name, _ in jobs if name in rows})
            write_page(page, rows)
    missing = [name for name, _ in jobs if name not in rows]
    say(f"{len(jobs) - len(missing)} of {len(jobs)} rows; missing: {', '.join(missing) or 'none'}")
    return {"rows": len(jobs) - len(missing), "missing": missing}


def _row(setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """Training by the plan that promises most among those that fit, and decoding."""
    architecture = SHAPES[setting.shape]
    devices, chip = tpu_slice(setting.topology)
    config = default_config()
    with config.unlocked():
        config.base.model = f"random:{setting.shape}"
        config.train.lora.rank = setting.lora
        config.compute.batch_size = DECODED_ROWS
    run = training_plan(config, architecture, devices, rows=1).run
    train = suggest(architecture, run, devices, chip, compiled=1, say=say)
    del train["tried"]
    weights = 2 * count_parameters(architecture)
    parts = parts_that_hold(weights, chip.memory, len(devices))
    copy = one_copy(parts, architecture.num_key_value_heads)
    config.compute.mesh = f"fsdp={copy.fsdp},tensor={copy.tensor}"
    decode = compile_for(config, setting.topology, names=("decode",))["decode"]
    return {"topology": setting.topology, "train": train, "decode": decode}


def write_page(page: Path, rows: dict[str, Any]) -> None:
    """Puts the table between its marks on the page.

    Raises:
      HumpbackError: the page or the marks are missing.
    """
    text = read_text(page)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise HumpbackError(f"{page} has no place for the table: {BEGIN} and {END}.")
    lines = [*table_lines(rows), "", missing_line(rows), "", *check_lines(rows)]
    table = "\n".join([BEGIN, *lines, END])
    page.write_text(before + table + after, encoding="utf-8")


def table_lines(rows: dict[str, Any]) -> Iterator[str]:
    """One line for each setting that was computed."""
    yield HEADER
    yield "| --- " * HEADER.count(" |") + "|"
    for setting in SETTINGS:
        if setting.name not in rows:
            continue
        train, decode = (rows[setting.name][part] for part in ("train", "decode"))
        cells = (
            setting.shape,
            f"LoRA {setting.lora}" if setting.lora else "full",
            setting.topology.replace(":", " "),
            f"{mesh_text(train['mesh'])}; {train['rows']} x {train['row_tokens']}",
            train["remat"],
            f"{train['bytes_per_device'] / GIB:.1f} of {train['hbm_bytes'] / GIB:.0f}",
            f"{train['est_step_s']:.2f} s",
            f"{train['est_tokens_per_s']:,.0f}",
            f"{train['est_mfu']:.0%}",
            f"{mesh_text(decode['mesh'])}; {decode['slots']} rows",
            f"{decode['bytes_per_device'] / GIB:.1f}",
            f"{1e3 * decode['est_step_s']:.1f} ms",
        )
        yield "| " + " | ".join(cells) + " |"


def missing_line(rows: dict[str, Any]) -> str:
    """What the table lacks."""
    missing = [setting.name.replace(":", " ") for setting in SETTINGS if setting.name not in rows]
    return f"Not computed yet: {', '.join(missing) or 'none'}."


def check_lines(rows: dict[str, Any]) -> Iterator[str]:
    """The estimates held against published measurements."""
    yield CHECK_HEADER
    yield "| --- " * CHECK_HEADER.count(" |") + "|"
    for case in PUBLISHED:
        found = rows.get(f"published {case.model}")
        if found:
            yield (
                f"| {case.model} | {case.topology.replace(':', ' ')} | {case.rows} x "
                f"{case.row_tokens} | {case.step_s:.1f} s ({case.mfu:.1%}) | "
                f"{found['est_step_s']:.1f} s | {found['off']:+.0%} |"
            )
