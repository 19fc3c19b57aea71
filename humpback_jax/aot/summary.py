"""What was found about compiled programs, as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from humpback_jax.parallel.topology import GIB


def summary_lines(report: dict[str, Any]) -> Iterator[str]:
    """Of `programs.compile_for` or `suggest.suggest_for`: two lines a program."""
    for name in ("train", "prefill", "decode"):
        if "reason" in report.get(name, ()):
            yield f"{name}: does not fit: {report[name]['reason']}"
        elif name in report:
            yield memory_line(name, report[name])
    if "train" in report:
        yield from _train_lines(report["train"])
    if "est_step_s" in report.get("decode", ()):
        yield _decode_line(report["decode"])


def memory_line(name: str, entry: dict[str, Any]) -> str:
    """What a device holds, and whether that fits."""
    listed = _listed(entry["bytes_by_kind"], GIB)
    return (
        f"{name}: {entry['bytes_per_device'] / GIB:.2f} of {entry['hbm_bytes'] / GIB:.0f} GiB a "
        f"device ({listed}), {'fits' if entry['fits'] else 'does not fit'}; compiled in "
        f"{entry['compile_s']:.0f} s"
    )


def _train_lines(entry: dict[str, Any]) -> Iterator[str]:
    examples = f" (the most that batches of {entry['batch_examples']} examples take)"
    yield (
        f"mesh {mesh_text(entry['mesh'])}, {entry['micro_batches']} times {entry['rows']} rows of "
        f"{entry['row_tokens']} tokens a device{examples if entry['at_worst'] else ''}, "
        f"{entry['tokens']:,} tokens a step, remat {entry['remat']}"
        + (f", adapter of rank {entry['lora']}" if entry["lora"] else "")
    )
    if not entry["fits"]:
        if entry["at_worst"]:
            yield (
                "--suggest finds an accumulation with which every batch fits; --rows=N compiles "
                "for batches that pack better"
            )
        return
    parts = {name: 1e3 * seconds for name, seconds in entry["est_parts"].items()}
    yield (
        f"a step is estimated at {entry['est_step_s']:.2f} s, {entry['est_mfu']:.1%} MFU, "
        f"{entry['est_tokens_per_s']:,.0f} tokens/s (ms alone: {_listed(parts, 1, 0)}); a device "
        f"sends {_listed(entry['collective_bytes'], GIB)} GiB"
    )


def _decode_line(entry: dict[str, Any]) -> str:
    return (
        f"mesh {mesh_text(entry['mesh'])}, {entry['slots']} rows of {entry['capacity']} tokens a "
        f"copy; a step is estimated at {1e3 * entry['est_step_s']:.1f} ms, "
        f"{entry['est_mfu']:.1%} of the products' rate"
    )


def mesh_text(mesh: dict[str, int]) -> str:
    """The axes that are cut: "fsdp=4,tensor=2"; "one" for a single device."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def _listed(values: dict[str, float], unit: float, digits: int = 2) -> str:
    shown = {name: value / unit for name, value in values.items()}
    least = 0.5 * 10**-digits
    return ", ".join(f"{k} {v:,.{digits}f}" for k, v in shown.items() if v >= least) or "nothing"
