"""The results of a measurement as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def sample_lines(result: Result) -> list[str]:
    """A row for each case and system."""
    rows = [
        ["case", "system", "precision", "batch", "rows/s", "tokens/s", "ours / it", "same text"]
    ]
    for case, compared in result["cases"].items():
        for name, figures in {"ours": compared["ours"], **compared["peers"]}.items():
            ratio = compared["ratio"].get(name)
            same = figures.get("same_text")
            rows.append(
                [
                    case,
                    name,
                    figures["precision"],
                    str(figures["batch"]),
                    f"{figures['rows_per_s']:.2f}",
                    f"{figures['tokens_per_s']:.0f}",
                    "" if ratio is None else f"{ratio:.2f}",
                    "" if same is None else f"{same:.0%}",
                ]
            )
    share = f"{result['matmul_share']:.0%} of the matmul rate measured in its process"
    return [*_aligned(rows), f"our prefill, {result['main_case']}: {share}"]


def score_lines(result: Result) -> list[str]:
    """A row for each curator, and what the comparisons between them say."""
    header = ["curator", "rows/s", "rated", "seconds", "tokens/s", "prompt", "unshared", "new"]
    rows = [[*header, "scored", "x prefill", "matmul", "peak MB"]]
    ours = result["ours"]
    for curator, figures in ours["curators"].items():
        ratio, share = figures.get("prefill_ratio"), figures.get("matmul_share")
        rows.append(
            [
                curator,
                f"{figures['rows_per_s']:.2f}",
                str(figures["rated"]),
                f"{figures['seconds']:.2f}",
                f"{figures['tokens_per_s']:.0f}",
                *(str(figures[f"{name}_tokens"]) for name in ("prompt", "unshared", "new")),
                str(figures["scored_tokens"]),
                "" if ratio is None else f"{ratio:.2f}",
                "" if share is None else f"{share:.0%}",
                f"{figures['peak_bytes'] / 1e6:.0f}",
            ]
        )
    lines = _aligned(rows)
    gain, saved = ours["prefix_gain"], ours["prefix_gain"] / ours["prefix_gain_share"]
    targets = result["targets"]
    lines.append(
        f"rubric_likelihood / rubric: {ours['likelihood_gain']:.2f} x the rows "
        f"(wanted: {targets['likelihood_gain']})"
    )
    lines.append(
        f"sharing the prompts' beginning: {gain:.2f} x as fast, for {saved:.2f} x fewer tokens: "
        f"{ours['prefix_gain_share']:.0%} (wanted: {targets['prefix_gain_share']:.0%})"
    )
    once = "once a response" if ours["log_p_y_once"] else "MORE THAN ONCE a response"
    return [*lines, f"log p(y) was computed {once}"]


def train_lines(result: Result) -> list[str]:
    """A row for each system's best setting."""
    rows = [
        [
            "system",
            "setting",
            "precision",
            "supervised tokens/s",
            "tokens/s",
            "peak MB",
            "ours / it",
        ]
    ]
    for name, figures in {"ours": result["ours"], **result["peers"]}.items():
        ratio = result["ratio"].get(name)
        rows.append(
            [
                name,
                figures["setting"],
                figures["precision"],
                f"{figures['supervised_tokens_per_s']:.1f}",
                f"{figures['tokens_per_s']:.1f}",
                f"{figures['peak_bytes'] / 1e6:.0f}",
                "" if ratio is None else f"{ratio:.2f}",
            ]
        )
    ours = result["ours"]
    return [
        *_aligned(rows),
        f"our step: {ours['matmul_share']:.0%} of the rate of a step's matrix products measured in "
        f"its process, {ours['packing_efficiency']:.0%} of the computed places hold tokens",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
