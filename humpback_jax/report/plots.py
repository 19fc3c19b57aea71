"""The pictures of a run: one overview, and every curator's scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from humpback_jax.report import facts
from humpback_jax.report.tables import KINDS
from humpback_jax.run_view import RunView, short_name, steps_of

# Okabe and Ito's colours, which people with any colour vision can tell apart.
GREY, INK = "#8a8a8f", "#1d1d1f"
FIXED = {"base": GREY, "M_yx": "#CC79A7", "M_0": "#0072B2"}
TUNED = ("#E69F00", "#D55E00", "#009E73", "#56B4E9", "#F0E442")
KIND_COLOURS = {"shuffled": "#0072B2", "truncated": "#E69F00", "promo": "#009E73"}
MAX_BINS = 20


def draw_overview(run: RunView, path: Path) -> None:
    """Counts, losses, held-out NLL, scores and curation meter in one picture (PNG)."""
    figure = _figure(13.5, 8.6)
    grid = figure.add_gridspec(2, 3, width_ratios=(1.05, 1.2, 1.2), wspace=0.42, hspace=0.42)
    _flow(figure.add_subplot(grid[:, 0]), run)
    _losses(figure.add_subplot(grid[0, 1]), run)
    _likelihoods(figure, grid[0, 2], run)
    curator = str(run.config.curate.curator)
    _histograms(figure, grid[1, 1], run, curator, f"scores of {curator}")
    _meters(figure.add_subplot(grid[1, 2]), run)
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)


def draw_scores(run: RunView, path: Path) -> None:
    """A histogram of every curator's scores in every round (PNG)."""
    loop = str(run.config.curate.curator)
    known = {curator for _, curator in facts.scores(run)}
    curators = sorted(known, key=lambda name: (name != loop, name))
    figure = _figure(4.6 * max(len(curators), 1), 1.0 + 1.5 * max(len(run.rounds), 1))
    grid = figure.add_gridspec(1, max(len(curators), 1), wspace=0.3)
    for place, curator in enumerate(curators):
        _histograms(figure, grid[0, place], run, curator, curator)
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)


def colour(model: str) -> str:
    """The colour of a model everywhere; round t has that of M_t."""
    if model in FIXED:
        return FIXED[model]
    return TUNED[(int(model.removeprefix("M_")) - 1) % len(TUNED)]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _clean(axes: Any, title: str, xlabel: str = "", ylabel: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, color=GREY, labelcolor=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c4c4c8")


def _nothing(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _flow(axes: Any, run: RunView) -> None:
    """Rows after every stage, as bars from top to bottom."""
    _clean(axes, "rows after each stage")
    found = facts.counts(run)
    if not found:
        return _nothing(axes, "nothing counted yet")
    place, places = 0.0, []
    for before, count in zip([None, *found], found, strict=False):
        place += 1.6 if before and before.round != count.round else 1.0
        places.append(place)
    values = [count.value for count in found]
    colours = [colour(f"M_{c.round}") if c.round else "#b9c4cf" for c in found]
    axes.barh(places, values, color=colours, height=0.72)
    limit = max(max(values), 1)
    for place, count in zip(places, found, strict=True):
        axes.text(
            count.value + 0.02 * limit,
            place,
            f"{count.value:,}",
            va="center",
            fontsize=10,
            color=INK,
        )
    names = [f"round {c.round}: {c.label}" if c.round else c.label for c in found]
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0, labelsize=9.5)
    axes.set_xlim(0, limit * 1.18)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _losses(axes: Any, run: RunView) -> None:
    """Training loss (thin) and validation NLL (points) of each model."""
    _clean(axes, "loss while training", "step", "nats a token")
    drawn = False
    for name in run.names("model"):
        history, model = run.history(name), short_name(name)
        steps, losses = steps_of(history, "loss")
        if not steps:
            continue
        drawn = True
        axes.plot(*_smooth(steps, losses), color=colour(model), lw=1.4, label=model)
        checks, values = steps_of(history, "validation_nll")
        axes.plot(checks, values, "o--", color=colour(model), ms=4.5, lw=0.8, mec="white", mew=0.6)
    if not drawn:
        return _nothing(axes, "no model trained yet")
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    handles, _ = axes.get_legend_handles_labels()
    if any("validation_nll" in row for name in run.names("model") for row in run.history(name)):
        (mark,) = axes.plot([], [], "o--", color=GREY, ms=4.5, lw=0.8, label="validation")
        handles.append(mark)
    _legend(axes, handles)


def _smooth(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A running mean over a thirtieth of a long run; short ones as they are."""
    width = max(len(values) // 30, 1)
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    return np.asarray(steps)[width - 1 :], mean


def _likelihoods(figure: Any, place: Any, run: RunView) -> None:
    """Held-out NLL by model, and paired differences to the base, with 95 % intervals."""
    table = facts.results(run)
    left, right = (figure.add_subplot(part) for part in place.subgridspec(1, 2, wspace=0.25))
    _clean(left, "held-out NLL", "nats a token")
    _clean(right, "minus base", "paired difference")
    if not table:
        right.set_axis_off()
        right.set_title("", loc="left")
        return _nothing(left, "not evaluated yet")
    names = list(table)
    for row, name in enumerate(names):
        figures = table[name]
        style: dict[str, Any] = {"color": colour(name), "ms": 6, "lw": 2, "capsize": 0}
        nll = figures["nll"]
        left.errorbar(nll["value"], row, xerr=1.96 * nll["stderr"], fmt="o", **style)
        if difference := figures.get("versus_base"):
            value = difference["value"]
            reach = [[value - difference["low"]], [difference["high"] - value]]
            right.errorbar(value, row, xerr=reach, fmt="o", **style)
    right.axvline(0, color=GREY, lw=1)
    for axes in (left, right):
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color="#ececef", lw=0.8)
        axes.set_axisbelow(True)
    left.set_yticks(range(len(names)), names)
    right.set_yticks([])


def _histograms(figure: Any, place: Any, run: RunView, curator: str, title: str) -> None:
    """One curator's scores, one histogram a round, the selected part in full colour."""
    found = facts.scores(run)
    values = {
        t: {name: v for name, v in found[t, curator].items() if v is not None}
        for t in run.rounds
        if (t, curator) in found
    }
    everything = [value for by_id in values.values() for value in by_id.values()]
    if not everything:
        axes = figure.add_subplot(place)
        _clean(axes, title)
        return _nothing(axes, "no score could be read" if values else "no scores yet")
    parts = place.subgridspec(len(values), 1, hspace=0.4)
    shared: Any = None
    edges = _edges(everything)
    for row, (t, by_id) in enumerate(values.items()):
        axes = shared = figure.add_subplot(parts[row], sharex=shared)
        last = row == len(values) - 1
        _clean(axes, title if row == 0 else "", "score" if last else "", f"pairs, round {t}")
        chosen = facts.selected(run, t)
        kept = [value for name, value in by_id.items() if name in chosen]
        rest = [value for name, value in by_id.items() if name not in chosen]
        axes.hist(
            [kept, rest],
            bins=edges,
            stacked=True,
            color=[colour(f"M_{t}"), "#d5d9de"],
            edgecolor="white",
            linewidth=0.6,
        )
        label = f"{len(kept)} of {len(by_id)} selected"
        axes.set_title(label, loc="right", fontsize=8.5, color=INK, pad=8)
        axes.tick_params(labelbottom=last)
        axes.locator_params(axis="x", nbins=5)
        axes.locator_params(axis="y", nbins=4, integer=True)


def _edges(values: Sequence[float]) -> np.ndarray:
    """Bins around whole scores for ratings of 1 to 5, else at most `MAX_BINS` equal ones."""
    if all(float(value).is_integer() for value in values) and 1 <= min(values) <= max(values) <= 5:
        return np.arange(0.5, 6)
    count = min(max(round(len(values) ** 0.5), 5), MAX_BINS)
    return np.histogram_bin_edges(values, bins=count)


def _meters(axes: Any, run: RunView) -> None:
    """Curation meter of the last round as bars; earlier rounds as open circles."""
    found = facts.curation(run)
    _clean(axes, "curation meter", "AUC: true against broken pairs (0.5 is chance)")
    if not found:
        return _nothing(axes, "not measured yet")
    latest = max(found)
    curators = list(found[latest])
    height = 0.8 / len(KINDS)
    for row, curator in enumerate(curators):
        for offset, kind in enumerate(KINDS):
            where = row + (offset - (len(KINDS) - 1) / 2) * height
            value = found[latest][curator][kind]["auc"]
            axes.barh(where, value, height=height * 0.86, color=KIND_COLOURS[kind])
            rings = [found[t][curator][kind]["auc"] for t in found if curator in found[t]][:-1]
            axes.plot(rings, [where] * len(rings), "o", mfc="none", mec=INK, ms=4, mew=0.9)
            near = [ring for ring in rings if -0.02 < ring - value < 0.12]
            axes.text(
                max(value, *near, 0) + 0.02,
                where,
                f"{value:.2f}",
                va="center",
                fontsize=8,
                color=INK,
            )
    axes.axvline(0.5, color=GREY, lw=1, ls=":")
    axes.set_yticks(range(len(curators)), curators)
    axes.set_ylim(len(curators) - 0.5, -0.5)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=KIND_COLOURS[kind], label=kind) for kind in KINDS]
    if len(found) > 1:
        ring = {"marker": "o", "ls": "", "mfc": "none", "mec": INK, "ms": 4}
        # Each keyword has a type of its own, which a dict cannot say.
        handles.append(Line2D([], [], label="earlier round", **ring))  # type: ignore[arg-type]
    _legend(axes, handles)


def _legend(axes: Any, handles: Sequence[Any]) -> None:
    """Under the axes, where it covers nothing."""
    axes.legend(
        handles=handles,
        fontsize=8,
        frameon=False,
        ncols=len(handles),
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.17),
        handlelength=1.3,
        columnspacing=1.2,
        borderpad=0,
    )
