"""A diagnosis as a picture: what draws and their weights say of log Z, on one axis of nats."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lmppl.report.plots import BLUE, RED, drawing
from lmppl.report.tables import number, percent, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 30
_SHARES = ("share of the draws", "share of the weight")


class _Row(NamedTuple):
    """A figure of the lower panel: its name, value and standard error, and of a divergence what it is
    called ("": none) and how far from the value its known end is, nats."""

    label: str
    value: float
    stderr: float
    divergence: str = ""
    reach: float = 0.0


def diagnosis_figure(
    summary: Mapping[str, Any],
    log_weights: Sequence[float],
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Histograms of log R - log q of the live draws, by number and by weight, above estimates and bounds
    of log Z with two standard errors to each side; all in nats.

    Args:
        summary: what ``Diagnosis.summary()`` says.
        log_weights: of the draws; those that are ``-inf`` are left out.
        path: as of ``drawing``.

    Raises:
        ValueError: if no draw is alive.
    """
    live = [u for u in log_weights if u > -math.inf]
    if not live:
        raise ValueError("nothing to plot: every draw has probability zero under the program")
    rows = _rows(summary)
    with drawing(6.4, 3.0 + 0.34 * len(rows), path) as figure:
        ratios = {"height_ratios": [2.0, 0.34 * len(rows) + 0.4]}
        above, below = figure.subplots(2, 1, sharex=True, gridspec_kw=ratios)
        _draw_weights(above, live)
        above.set_title(_title(summary), loc="left").set_parse_math(False)
        _draw_rows(below, rows, _log_z(summary), above)
    return figure


def _draw_weights(axis: Any, live: Sequence[float]) -> None:
    top = max(live)
    weights = [math.exp(u - top) for u in live]
    total = sum(weights)
    shares = [1 / len(live)] * len(live), [weight / total for weight in weights]
    ends = (min(live), top) if top - min(live) > 1e-6 else (top - 0.5, top + 0.5)
    for name, share, (colour, _) in zip(_SHARES, shares, (BLUE, RED), strict=True):
        axis.hist(
            live, bins=_BINS, range=ends, weights=share, label=name, histtype="stepfilled",
            facecolor=(colour, 0.25), edgecolor=colour, lw=1.5,
        )  # fmt: skip
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    # Above the axes: the bars may be anywhere in them.
    axis.legend(
        frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2
    )


def _draw_rows(axis: Any, rows: Sequence[_Row], log_z: float | None, above: Any) -> None:
    known = [(place, row) for place, row in enumerate(rows) if math.isfinite(row.value)]
    for place, row in known:
        axis.errorbar(row.value, place, xerr=2 * row.stderr, fmt="o", c=BLUE[0], ms=5, capsize=3)
        if row.divergence:
            axis.plot(_span(row), [place, place], ":", c=RED[0], lw=1.5, zorder=1)
    if log_z is not None:
        for each in (axis, above):
            each.axvline(log_z, color="black", lw=1, ls="--", zorder=0)
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.9)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("log R - log q of a draw; log Z (nats)")
    for place, row in enumerate(rows):
        _name_divergence(axis, place, row)


def _span(row: _Row) -> tuple[float, float]:
    return row.value, row.value + row.reach


def _name_divergence(axis: Any, place: int, row: _Row) -> None:
    """Write it above its line, from the end that leaves it more room."""
    if not row.divergence:
        return
    left, right = axis.get_xlim()
    ends = [x for x in _span(row) if math.isfinite(x)] or [right]
    is_left = min(ends) - left < right - max(ends)
    axis.annotate(
        row.divergence, (min(ends) if is_left else max(ends), place), (0, 7),
        textcoords="offset points", fontsize=8, color=RED[0], ha="left" if is_left else "right",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
    )  # fmt: skip


def _rows(summary: Mapping[str, Any]) -> list[_Row]:
    """From below log Z to above it; only what is known."""
    dead = summary["dead_fraction"] > 0
    elbo = "elbo_alive" if dead else "elbo"
    backward = "kl_alive_posterior" if dead else "kl_guide_posterior"
    source = summary["log_z_source"]
    by = {"exact": ", exact", "prior": ", by the prior", "given": ", given"}.get(source, "")
    names = {
        elbo: "ELBO of the live" if dead else "ELBO",
        "iw_bound": "log mean weight",
        "log_z": f"log Z{by}",
        "iw_upper_bound": "log Z <=",
        "eubo": "EUBO",
    }
    if source == "exact":
        del names["iw_upper_bound"]
    divergences = {
        elbo: _divergence(summary[backward], "guide || posterior", 1.0),
        "eubo": _divergence(summary["kl_posterior_guide"], "posterior || guide", -1.0),
    }
    return [
        _Row(name, summary[key], summary[f"{key}_stderr"] or 0.0, *divergences.get(key, ()))
        for key, name in names.items()
        if summary[key] is not None
    ]


def _divergence(bracket: tuple[float, float] | None, name: str, sign: float) -> tuple[str, float]:
    """Its words, and the way from its figure towards log Z (``sign`` 1: up), as far as it is known."""
    if bracket is None:
        return "", 0.0
    lower, upper = (number(end, ".2f") for end in bracket)
    amount = lower if lower == upper else f">= {lower}" if upper == "inf" else f"{lower} to {upper}"
    known = [end for end in bracket if math.isfinite(end)]
    return f"KL({name}) {amount}", sign * max(known, default=0.0)


def _log_z(summary: Mapping[str, Any]) -> float | None:
    """What the guide's figures are compared with: the second estimate, else the guide's own."""
    log_z = summary["iw_bound"] if summary["log_z"] is None else summary["log_z"]
    return log_z if math.isfinite(log_z) else None


def _title(summary: Mapping[str, Any]) -> str:
    title = f"{plain(summary['guide'])}\nESS {percent(summary['ess_fraction'])}"
    if summary["pareto_k"] is not None:
        title += f", Pareto k {summary['pareto_k']:.2f}"
    if summary["dead_fraction"]:
        title += f", {percent(summary['dead_fraction'])} dead"
    return title
