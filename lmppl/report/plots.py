"""Figures: what all plots share, and distributions as bars or histograms, one beside the other."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmppl.report.tables import ABSENT, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED, BLUE = ("#c8452c", "#eec2b8"), ("#1b6ca8", "#b3cde1")  # of lines and of points
_SERIES = BLUE[0], "#e69f00", "#009e73"  # told apart by the colour-blind, and by their lightness
_LONGEST = 44  # characters of a value that stands beside its bar
_BINS = 30

Values = tuple[Sequence[float], Sequence[float]]
"""Numbers and their weights, which sum to 1."""


@contextmanager
def drawing(
    width: float, height: float, path: str | os.PathLike[str] | None = None
) -> Iterator[Figure]:
    """A matplotlib ``Figure`` of so many inches, to be drawn on in the block. It is shown by notebooks;
    pyplot does not know it.

    Args:
        path: also write it to this file in the end; its ending says the format (none: PNG). The file is
            there either whole or not at all.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install lmppl-pyro[plot]") from error

    class Shown(Figure):
        # Notebooks know how to show a figure only once pyplot has been imported.
        def _repr_png_(self) -> bytes:
            self.savefig(out := io.BytesIO(), format="png")
            return out.getvalue()

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    style |= {"grid.alpha": 0.25, "axes.titlesize": 10, "font.size": 9}
    style |= {"figure.constrained_layout.use": True}
    with matplotlib.rc_context(style):
        figure = Shown(figsize=(width, height), dpi=120)
        yield figure
        if path is not None:
            _write(figure, Path(path))


def bars(
    series: Mapping[str, Mapping[Any, float]],
    title: str,
    rows: int,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Probabilities of values as horizontal bars, a group a value.

    Args:
        series: of each distribution, by its name, the probability of each value; the first one's order
            is that of the bars.
        title: what the values are of.
        rows: so many values; the others' probability is one bar below.
    """
    first, *others = series.values()
    values = list(dict.fromkeys([*first, *(value for other in others for value in other)]))
    shown = values[:rows]
    labels = [_label(value) for value in shown]
    if left_out := len(values) - len(shown):
        labels.append(f"{left_out:,} more")
    thickness = 0.8 / len(series)
    with drawing(6.4, 1.0 + 0.3 * len(labels) * max(1.0, 0.7 * len(series)), path) as figure:
        axis = figure.subplots()
        for number, (name, found) in enumerate(series.items()):
            shares = [found.get(value, 0.0) for value in shown]
            shares += [sum(found.get(value, 0.0) for value in values[rows:])] if left_out else []
            at = [
                place + (number - (len(series) - 1) / 2) * thickness for place in range(len(labels))
            ]
            drawn = axis.barh(
                at, shares, thickness, color=_SERIES[number % len(_SERIES)], label=name
            )
            axis.bar_label(drawn, [f"{share:.1%}" for share in shares], padding=3, fontsize=8)
        axis.set_yticks(range(len(labels)), labels)
        for label in axis.get_yticklabels():
            label.set_parse_math(False)  # a dollar sign is one
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.12)
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        _name(axis, title, series)
    return figure


def histogram(
    series: Mapping[str, Values], title: str, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Densities of numbers, one over the other; ``series``: of each distribution by its name."""
    everything = [value for values, _ in series.values() for value in values]
    limits = min(everything), max(everything)
    with drawing(5.2, 3.0, path) as figure:
        axis = figure.subplots()
        for number, (name, (values, weights)) in enumerate(series.items()):
            colour = _SERIES[number % len(_SERIES)]
            axis.hist(
                values, bins=_BINS, range=limits, weights=weights, density=True, label=name,
                histtype="stepfilled", facecolor=(colour, 0.25), edgecolor=colour, lw=1.5,
            )  # fmt: skip
        axis.set_ylabel("density")
        _name(axis, title, series)
    return figure


def _name(axis: Any, title: str, series: Mapping[str, Any]) -> None:
    axis.set_title(title, loc="left").set_parse_math(False)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=8)


def _label(value: Any) -> str:
    text = ABSENT if value is None else show(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        figure.savefig(temporary, format=path.suffix[1:] or "png", facecolor="white")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
