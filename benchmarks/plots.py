"""Plots of results, as SVG. Needs matplotlib, the extra ``bench``; without it there are none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Result, Row

OURS, THEIRS, GOAL_COLOUR = "#1b6ca8", "#b0b7bf", "#c8452c"


def draw(results: Sequence[Result], folder: Path, stem: str) -> list[tuple[str, str]]:
    """Draw what can be drawn of one machine's results.

    Args:
        results: of the machine.
        folder: for the files.
        stem: first part of their names.

    Returns:
        File names, each with a description.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    style: Any = {
        "svg.hashsalt": "lmppl",  # equal results give equal files
        "svg.fonttype": "none",  # text stays text
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "figure.constrained_layout.use": True,
    }
    kinds: dict[str, tuple[Callable[[Sequence[Result]], Any], str]] = {
        "ratios": (_ratios, "How many times faster lmppl is than each alternative"),
        "decode": (_decode, "Time of a decoding step and of its matrix products, by batch size"),
        "scaling": (_scaling, "Time of a token by number of particles, length, and prompt"),
    }
    drawn: list[tuple[str, str]] = []
    with matplotlib.rc_context(style):
        for kind, (make, description) in kinds.items():
            figure = make(results)
            if figure is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{stem}-{kind}.svg"
            figure.savefig(folder / name, facecolor="white", metadata={"Date": None})
            drawn.append((name, description))
    return drawn


def _figure(height: float, panels: int = 1) -> tuple[Any, Any]:
    """Panels below each other, so that letters stay legible on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height))
    return figure, figure.subplots(panels, squeeze=False)[:, 0]


def _ratios(results: Sequence[Result]) -> Any:
    """A bar a case."""
    rows = [(r, row) for r in results for row in r.rows if row.unit == "x" and row.value]
    if not rows:
        return None
    figure, (axis,) = _figure(0.9 + 0.62 * len(rows))
    places = range(len(rows), 0, -1)
    for place, (result, row) in zip(places, rows, strict=True):
        assert row.value is not None
        low, high = row.spread or (row.value, row.value)
        errors = [[max(0.0, row.value - low)], [max(0.0, high - row.value)]]
        axis.barh(place, row.value, color=OURS, height=0.4, xerr=errors, ecolor="#333333")
        if row.goal:
            axis.plot([row.goal.value] * 2, [place - 0.28, place + 0.28], color=GOAL_COLOUR, lw=2)
        name = f"{result.benchmark}: {_short(row)}, {result.dtype}"
        axis.annotate(name, (0, place + 0.24), (2, 0), textcoords="offset points", fontsize=9)
    axis.set_yticks([])
    axis.set_ylim(0.5, len(rows) + 0.7)
    axis.axvline(1, color="#333333", lw=0.8)
    axis.set_xlim(left=0)
    axis.grid(axis="y", visible=False)
    has_goals = any(row.goal for _, row in rows)
    axis.set_xlabel("times faster than the alternative" + " (red: goal)" * has_goals)
    return figure


def _short(row: Row) -> str:
    other = row.sides[1].label if len(row.sides) > 1 else ""
    return f"{row.case} (against {other})" if other else row.case


def _decode(results: Sequence[Result]) -> Any:
    """Step and floor against the batch size, a panel a dtype."""
    own = [r for r in results if r.benchmark == "decode" and r.rows]
    if not own:
        return None
    figure, axes = _figure(3.2 * len(own), len(own))
    for axis, result in zip(axes, own, strict=True):
        sizes = [row.figures["sequences"] for row in result.rows]
        for k, colour in enumerate((OURS, THEIRS)):
            times = [1000 * row.sides[k].median for row in result.rows]
            label = result.rows[0].sides[k].label
            axis.plot(sizes, times, "o-", color=colour, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xlabel("sequences")
        axis.set_ylabel("milliseconds a step")
        axis.set_title(result.dtype, fontsize=10)
        axis.legend(frameon=False)
    return figure


def _scaling(results: Sequence[Result]) -> Any:
    """Time a token along the three axes."""
    own = [r for r in results if r.benchmark == "scaling" and r.rows]
    if not own:
        return None
    labels = {"particles": "particles", "tokens": "tokens of each", "prompt": "tokens of prompt"}
    figure, axes = _figure(2.4 * len(labels), len(labels))
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for result in own:
            rows = [row for row in result.rows if row.figures["axis"] == key]
            sizes = [row.figures[key] for row in rows]
            costs = [1000 / row.sides[0].rate if row.sides[0].rate else math.nan for row in rows]
            colour = OURS if result is own[0] else THEIRS
            axis.plot(sizes, costs, "o-", color=colour, label=result.dtype)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_ylim(0, 1.15 * axis.dataLim.y1)
        axis.set_xlabel(label)
        axis.set_ylabel("milliseconds a token")
    axes[0].legend(frameon=False)
    return figure
