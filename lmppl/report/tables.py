"""Reports as tables: text for terminals, HTML for notebooks. Those of profiles and diagnoses are here.

A report is a list of blocks, lines and tables. What a model wrote is shown as Python would show the
string: no line breaks, control characters, console markup or HTML of its making reach the screen.
"""

from __future__ import annotations

import html
import io
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

MAX_ROWS = 10
_BAR_WIDTH = 10
NEGLIGIBLE = 1e-4  # nats a token that drawing and scoring in float32 differ by, at most
ABSENT = "-"  # such as a site that a branch of the program did not reach

Kind = Literal["figure", "name", "text", "bar"]
"""What a column holds: figures (on the right), names, texts (cut where there is no room), or bars (given
as shares of the longest)."""


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    columns: Sequence[tuple[str, Kind]]  # headings; a line break in one keeps its column narrow
    rows: Sequence[Sequence[Any]]
    gap: int = 2  # blanks between columns

    def cells(
        self, as_bar: Callable[[float], str], as_text: Callable[[str], Any]
    ) -> list[list[Any]]:
        """The cells of all rows, as two functions write bars and all else."""
        writers = [as_bar if kind == "bar" else as_text for _, kind in self.columns]
        return [
            [write(cell) for write, cell in zip(writers, row, strict=True)] for row in self.rows
        ]


Block = str | Table


class Report:
    """An object that is shown as a report, of ``_blocks``: by ``print``, and in notebooks."""

    @abstractmethod
    def _blocks(self) -> Sequence[Block]: ...

    def __repr__(self) -> str:
        return as_text(self._blocks())

    def _repr_html_(self) -> str:
        return as_html(self._blocks())


class Shown(Report):
    """Blocks as a report of their own."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._shown = blocks

    def _blocks(self) -> Sequence[Block]:
        return self._shown


def as_text(blocks: Sequence[Block], width: int | None = None) -> str:
    """A report as text no wider than ``width`` columns (default: the terminal; at least 40)."""
    from rich.console import Console  # when a table is wanted
    from rich.text import Text

    out = io.StringIO()
    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    console = Console(
        file=out, width=max(width, 40), color_system=None, force_terminal=False,
        force_jupyter=False, legacy_windows=False,
    )  # fmt: skip
    for block in blocks:
        console.print(Text(block) if isinstance(block, str) else _rich_table(block))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _rich_table(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    gap = (0, table.gap, 0, 0)
    shown = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=gap)
    for heading, kind in table.columns:
        # Texts are cut by the cell: rich takes width only from columns that may wrap.
        shown.add_column(
            Text(heading, no_wrap=True, overflow="ellipsis"),
            justify="right" if kind == "figure" else "left",
            vertical="bottom",
            width=_BAR_WIDTH if kind == "bar" else None,
            no_wrap=kind != "text",
        )
    for row in table.cells(bar, str):
        shown.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
    return shown


def as_html(blocks: Sequence[Block]) -> str:
    """A report as HTML."""
    parts = [
        _html_table(block) if isinstance(block, Table) else f"<div>{html.escape(block)}</div>"
        for block in blocks
        if block
    ]
    return "".join(["<div>", *parts, "</div>"])


def _html_table(table: Table) -> str:
    style = ' style="text-align:left;white-space:pre-wrap"'
    styles = [style if kind == "text" else "" for _, kind in table.columns]

    def row(tag: str, cells: Iterable[str]) -> str:
        marked = zip(cells, styles, strict=True)
        return f"<tr>{''.join(f'<{tag}{style}>{cell}</{tag}>' for cell, style in marked)}</tr>"

    head = row("th", (html.escape(heading.replace("\n", " ")) for heading, _ in table.columns))
    body = [row("td", cells) for cells in table.cells(_html_bar, html.escape)]
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def bar(share: float) -> str:
    """A bar of at most ten cells, in eighths."""
    eighths = round(8 * _BAR_WIDTH * share)
    return "█" * (eighths // 8) + ("" if eighths % 8 == 0 else "▏▎▍▌▋▊▉"[eighths % 8 - 1])


def _html_bar(share: float) -> str:
    style = f"background:#6a8fc5;height:0.8em;width:{100 * share:.0f}%"
    return f'<div style="width:6em;text-align:left"><div style="{style}"></div></div>'


# --- values --------------------------------------------------------------------------------------


def show(value: Any, *, quote: bool = True) -> str:
    """One printable line that stands for a value."""
    if isinstance(value, str):
        text = repr(str(value))  # escapes for what is not printable, quotes that show the blanks
        return text if quote else text[1:-1]
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if value is None or isinstance(value, float):
        return number(value, ".4g")
    if isinstance(value, (list, tuple)):
        shown = [show(part) for part in value[:4]] + ["..."] * (len(value) > 4)
        return f"[{', '.join(shown)}]"
    return printable(repr(value))


def plain(text: str) -> str:
    return show(text, quote=False)


def printable(text: str) -> str:
    """One line without control characters, which would move the terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def percent(share: float) -> str:
    return f"{share:.1%}"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.3f} s"


def number(value: float | None, spec: str) -> str:
    """A figure as a format has it; a dash if there is none."""
    return ABSENT if value is None else format(value, spec)


def notes_of(summary: Mapping[str, Any]) -> list[str]:
    """The notes of a summary, a line each."""
    return [f"note: {plain(note)}" for note in summary["notes"]]


# --- profiles ------------------------------------------------------------------------------------


def profile_blocks(summary: Mapping[str, Any]) -> list[Block]:
    """What ``Profile.summary()`` says: a row a kind of work, then what is outside the models."""
    count, total = summary["passes"], summary["seconds"] or 1.0
    line = f"Profile: {duration(summary['seconds'])}, {count:,} forward pass{'es' * (count != 1)}"
    if count:
        line += f" of {summary['mean_batch']:.1f} rows on average"
    rows = [
        [
            work["kind"],
            *(number(work[name] or None, ",") for name in ("tokens", "positions", "passes")),
            number(work["mean_batch"], ".1f"),
            duration(work["seconds"]),
            percent(work["seconds"] / total),
            number(work["tokens_per_second"], ",.0f"),
            number(work["roofline"], ".1%"),
        ]
        for work in summary["works"]
    ]
    outside = [duration(summary["seconds_outside"]), percent(summary["share_outside"])]
    rows.append(["outside", *4 * [""], *outside, "", ""])
    figures = ["tokens", "positions", "passes", "batch", "seconds", "share", "tokens/s", "roofline"]
    return [line, Table([("", "name"), *((name, "figure") for name in figures)], rows, gap=1)]


# --- diagnoses -----------------------------------------------------------------------------------


def diagnosis_blocks(summary: Mapping[str, Any]) -> list[Block]:
    """What ``Diagnosis.summary()`` says."""
    line = f"Diagnosis of {plain(summary['guide'])}: {summary['num_samples']:,} draws"
    if summary["dead_fraction"]:
        line += f", {percent(summary['dead_fraction'])} with probability zero"
    if summary["killed"]:
        line += f" (by {', '.join(map(plain, summary['killed']))})"
    columns: list[tuple[str, Kind]] = [("", "name"), ("nats", "figure"), ("std. error", "figure")]
    blocks: list[Block] = [line, "", Table(columns, _bounds(summary) + _weights(summary))]
    if summary["texts"]:
        blocks += ["", _diversity(summary["texts"])]
    return [*blocks, *notes_of(summary)]


def _bounds(summary: Mapping[str, Any]) -> list[list[str]]:
    """Bounds of log Z from below to above, then divergences."""

    def row(label: str, key: str) -> list[str]:
        value, stderr = summary[key], summary[key + "_stderr"]
        lower, upper = (
            number(v, ".3f") for v in (value if isinstance(value, tuple) else 2 * [value])
        )
        bracket = f">= {lower}" if upper == "inf" else f"{lower} to {upper}"
        error = "exact" if stderr == 0 else number(stderr, ".2g")
        error += " (see note)" * (key in summary["doubts"])
        return [label, lower if lower == upper else bracket, error]

    dead = summary["dead_fraction"] > 0
    source, has_exact = summary["log_z_source"], summary["eubo"] is not None
    by = "by the prior's draws" if source == "prior" else source
    rows = [
        (True, "ELBO", "elbo"),
        (dead, "ELBO of the live part", "elbo_alive"),
        (True, "log Z >=, log mean weight", "iw_bound"),
        (summary["log_z"] is not None, f"log Z, {by}", "log_z"),
        (has_exact and source != "exact", "log Z <=, with an exact draw", "iw_upper_bound"),
        (has_exact, "EUBO", "eubo"),
        (True, "KL(guide || posterior)", "kl_guide_posterior"),
        (dead, "  of the live part", "kl_alive_posterior"),
        (summary["kl_posterior_guide"] is not None, "KL(posterior || guide)", "kl_posterior_guide"),
    ]
    return [row(label, key) for is_known, label, key in rows if is_known]


def _weights(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    if summary["z_score"] is not None:
        agree = "disagree" if abs(summary["z_score"]) > 3 else "agree"
        rows.append([f"log Z's two estimates {agree}", f"z = {summary['z_score']:.1f}", ""])
    rows.append(["effective sample size", percent(summary["ess_fraction"]), ""])
    if summary["pareto_k"] is not None:
        good = f"good below {summary['pareto_k_threshold']:.2f}"
        rows.append(["Pareto k", number(summary["pareto_k"], ".2f"), good])
    for pair, mismatch in summary["mismatch"].items():
        if mismatch["per_token"] > NEGLIGIBLE or "float32" in pair:
            apart, left = f"{mismatch['per_token']:.2g} a token", percent(mismatch["ess_fraction"])
            rows.append([two_versions(pair), apart, f"ESS {left}"])
    return rows


_VERSIONS = {"drawn": "as drawn", "scored": "as scored", "float32": "in float32"}


def two_versions(pair: str) -> str:
    """A key of ``Diagnosis.mismatch``, in words."""
    first, second = (_VERSIONS[version] for version in pair.split(", "))
    return f"log q {first} and {second}"


_DIVERSITY = {
    "draws": ("num_draws", ","), "distinct": ("num_distinct", ","),
    "dist-1": ("distinct_1", ".2f"), "dist-2": ("distinct_2", ".2f"),
    "edits": ("edit_distance", ".2f"), "edits|w": ("weighted_edit_distance", ".2f"),
    "tokens": ("mean_length", ".1f"), "tokens|w": ("weighted_mean_length", ".1f"),
}  # fmt: skip


def _diversity(texts: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a site."""
    rows = [
        [plain(name), *(number(text[key], spec) for key, spec in _DIVERSITY.values())]
        for name, text in texts.items()
    ]
    return Table([("site", "name"), *((name, "figure") for name in _DIVERSITY)], rows)
