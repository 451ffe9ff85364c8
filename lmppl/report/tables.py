"""Posteriors, profiles, diagnoses and training runs as tables: text for terminals, HTML for notebooks.

What a model wrote is shown as Python would show the string, never interpreted: no line breaks,
control characters, console markup or HTML of its making reach the screen.
"""

from __future__ import annotations

import html
import io
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # rich is imported when a table is wanted
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as RichText

MAX_ROWS = 10
_BAR_WIDTH = 10
ABSENT = "-"  # such as a site that a branch of the program did not reach


def text_table(summary: Mapping[str, Any], width: int | None = None) -> str:
    """``Posterior.summary()`` as text no wider than ``width`` columns (default: the terminal)."""
    out = io.StringIO()
    console = _console(out, width)
    for line in header_lines(summary):
        console.print(_plain(line), soft_wrap=False)
    rows: Sequence[Mapping[str, Any]] = summary["rows"]
    if rows:
        table = _table()
        table.add_column("weight", justify="right", width=6, no_wrap=True)
        table.add_column("", width=_BAR_WIDTH, no_wrap=True)
        for name in summary["sites"]:
            table.add_column(_cell(show(name, quote=False)))
        for row in rows[:MAX_ROWS]:
            cells = [_cell(show_in(row, name)) for name in summary["sites"]]
            table.add_row(percent(row["weight"]), bar(row["weight"], rows[0]["weight"]), *cells)
        console.print(table)
    for line in footer_lines(summary):
        console.print(_plain(line))
    return _stripped(out)


def _console(out: io.StringIO, width: int | None) -> Console:
    """One that writes plain text, as wide as the terminal unless ``width`` is given."""
    from rich.console import Console

    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    return Console(
        file=out, width=max(width, 40), color_system=None, force_terminal=False,
        force_jupyter=False, legacy_windows=False,
    )  # fmt: skip


def _table(gap: int = 2) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))


def _stripped(out: io.StringIO) -> str:
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _plain(text: str, **options: Any) -> RichText:
    """Text as it is: rich reads no markup in it."""
    from rich.text import Text as RichText

    return RichText(text, **options)


def _cell(text: str) -> RichText:
    # Cut by the cell, not by the column: rich takes width only from columns that may wrap.
    return _plain(text, no_wrap=True, overflow="ellipsis")


def html_table(summary: Mapping[str, Any]) -> str:
    """``Posterior.summary()`` as HTML."""
    rows: Sequence[Mapping[str, Any]] = summary["rows"]
    parts = ["<div>", *(f"<div>{html.escape(line)}</div>" for line in header_lines(summary))]
    if rows:
        names = "".join(
            f'<th style="text-align:left">{html.escape(show(name, quote=False))}</th>'
            for name in summary["sites"]
        )
        parts.append(f"<table><thead><tr><th>weight</th><th></th>{names}</tr></thead><tbody>")
        for row in rows[:MAX_ROWS]:
            share = 100 * row["weight"] / rows[0]["weight"]
            cells = "".join(
                f'<td style="text-align:left;white-space:pre-wrap">'
                f"{html.escape(show_in(row, name))}</td>"
                for name in summary["sites"]
            )
            parts.append(
                f"<tr><td>{percent(row['weight'])}</td>"
                '<td><div style="width:6em;text-align:left"><div style="background:#6a8fc5;'
                f'height:0.8em;width:{share:.0f}%"></div></div></td>{cells}</tr>'
            )
        parts.append("</tbody></table>")
    parts += [f"<div>{html.escape(line)}</div>" for line in footer_lines(summary)]
    return "".join([*parts, "</div>"])


def header_lines(summary: Mapping[str, Any]) -> list[str]:
    """What was run, and how far the result can be trusted."""
    count = summary["num_samples"]
    first = f"Posterior by {summary['engine']}: " if summary["engine"] else "Posterior: "
    first += f"{count:,} sample{'s' * (count != 1)}"
    if count:
        first += f", ESS {summary['ess']:.1f} ({summary['ess'] / count:.0%})"
    if summary["log_evidence"] is None:
        second = "no claim about the evidence"
    else:
        second = f"log evidence {summary['log_evidence']:.3f} nats"
        if summary["log_evidence_stderr"] is not None:
            second += f" (standard error {summary['log_evidence_stderr']:.2g})"
    cost = [
        f"{summary[key]:,} tokens {verb}"
        for key, verb in (("tokens_sampled", "drawn"), ("tokens_scored", "scored"))
        if summary[key] is not None
    ]
    if summary["tokens_trained"]:  # by few runs
        cost.append(f"{summary['tokens_trained']:,} tokens trained on")
    if summary["seconds"] is not None:
        cost.append(f"{summary['seconds']:.1f} s")
    return [first, second, *([", ".join(cost)] if cost else [])]


def footer_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the rows leave out: further rows, numeric sites, dead samples, notes."""
    lines = []
    rest = summary["rows"][MAX_ROWS:]
    if rest:
        share = percent(sum(row["weight"] for row in rest))
        lines.append(f"and {len(rest):,} more, together {share}")
    for name, moments in summary["numeric"].items():
        line = f"{show(name, quote=False)}: {show(moments['mean'])} +- {show(moments['sd'])}"
        if moments["weight"] < 1 - 1e-9:
            line += f" (reached in {percent(moments['weight'])})"
        lines.append(line)
    if summary["killed"]:
        sites = ", ".join(
            f"{show(name, quote=False)} ({count:,})" for name, count in summary["killed"].items()
        )
        lines.append(f"samples with probability zero, by the site that ended them: {sites}")
    return lines + [f"note: {show(note, quote=False)}" for note in summary["notes"]]


def percent(weight: float) -> str:
    return f"{100 * weight:.1f}%"


def bar(weight: float, largest: float) -> str:
    """A bar of at most ten cells, in eighths."""
    eighths = round(8 * _BAR_WIDTH * weight / largest)
    return "█" * (eighths // 8) + ("" if eighths % 8 == 0 else "▏▎▍▌▋▊▉"[eighths % 8 - 1])


def show_in(row: Mapping[str, Any], name: str) -> str:
    value = row["values"].get(name)
    return ABSENT if value is None else show(value)


def show(value: Any, *, quote: bool = True) -> str:
    """One printable line that stands for a value."""
    if isinstance(value, str):
        # As repr writes it: escapes for what is not printable, quotes that show the blanks.
        text = repr(str(value))
        return text if quote else text[1:-1]
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        shown = [show(each) for each in value[:4]] + ["..."] * (len(value) > 4)
        return f"[{', '.join(shown)}]"
    text = repr(value)
    return "".join(each if each.isprintable() else " " for each in text)


# --- figures -------------------------------------------------------------------------------------


def grid_text(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    above: str,
    below: str = "",
    width: int | None = None,
) -> str:
    """Figures as text no wider than ``width`` columns (default: the terminal).

    Args:
        columns: their headings; one without a heading holds the names of the rows. A line break
            in a heading keeps its column narrow.
        rows: their cells.
        above: a line above the table.
        below: a line below it, or nothing.
        width: of a line at most.
    """
    out = io.StringIO()
    console = _console(out, width)
    console.print(_plain(above))
    # Many columns, and a terminal may have 80. (Rich puts a blank of its own between them.)
    table = _table(gap=1 if len(columns) < 10 else 0)
    for column in columns:
        table.add_column(
            _plain(column),
            justify="right" if column else "left",
            vertical="bottom",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    console.print(table)
    if below:
        console.print(_plain(below))
    return _stripped(out)


def grid_html(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, above: str, below: str = ""
) -> str:
    """The same as HTML."""
    last = f"<div>{html.escape(below)}</div>" if below else ""
    table = _html_rows([name.replace("\n", " ") for name in columns], rows)
    return f"<div><div>{html.escape(above)}</div>{table}{last}</div>"


def _html_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# --- profiles ------------------------------------------------------------------------------------

_PROFILE_COLUMNS = (
    "", "tokens", "positions", "passes", "batch", "seconds", "share", "tokens/s", "roofline",
)  # fmt: skip


def profile_text(summary: Mapping[str, Any], width: int | None = None) -> str:
    """``Profile.summary()`` as text no wider than ``width`` columns (default: the terminal)."""
    rows = profile_rows(summary)
    return grid_text(_PROFILE_COLUMNS, rows, above=profile_header(summary), width=width)


def profile_html(summary: Mapping[str, Any]) -> str:
    """``Profile.summary()`` as HTML."""
    return grid_html(_PROFILE_COLUMNS, profile_rows(summary), above=profile_header(summary))


def profile_header(summary: Mapping[str, Any]) -> str:
    count = summary["passes"]
    line = f"Profile: {duration(summary['seconds'])}, {count:,} forward pass{'es' * (count != 1)}"
    if count:
        line += f" of {summary['mean_batch']:.1f} rows on average"
    return line


def profile_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One a kind of work, then what is outside the language models."""
    total = summary["seconds"] or 1.0
    rows = [
        [
            work["kind"],
            f"{work['tokens']:,}" if work["tokens"] else ABSENT,
            f"{work['positions']:,}",
            f"{work['passes']:,}",
            ABSENT if work["mean_batch"] is None else f"{work['mean_batch']:.1f}",
            duration(work["seconds"]),
            percent(work["seconds"] / total),
            ABSENT if work["tokens_per_second"] is None else f"{work['tokens_per_second']:,.0f}",
            ABSENT if work["roofline"] is None else percent(work["roofline"]),
        ]
        for work in summary["works"]
    ]
    outside = [duration(summary["seconds_outside"]), percent(summary["share_outside"])]
    return [*rows, ["outside", *4 * [""], *outside, "", ""]]


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.3f} s"


# --- diagnoses -----------------------------------------------------------------------------------

_FIGURE_COLUMNS = ("", "nats", "std. error")
_DIVERSITY_COLUMNS = (
    "site", "draws", "distinct", "dist-1", "dist-2", "edits", "edits|w", "tokens", "tokens|w",
)  # fmt: skip


def diagnosis_text(summary: Mapping[str, Any], width: int | None = None) -> str:
    """``Diagnosis.summary()`` as text no wider than ``width`` columns (default: the terminal)."""
    out = io.StringIO()
    console = _console(out, width)
    console.print(_plain(diagnosis_header(summary)))
    for columns, rows in _diagnosis_tables(summary):
        console.print()
        table = _table()
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(_cell, row))
        console.print(table)
    for note in summary["notes"]:
        console.print(_plain(f"note: {show(note, quote=False)}"))
    return _stripped(out)


def diagnosis_html(summary: Mapping[str, Any]) -> str:
    """``Diagnosis.summary()`` as HTML."""
    tables = [_html_rows(columns, rows) for columns, rows in _diagnosis_tables(summary)]
    notes = [
        f"<div>{html.escape(show(f'note: {note}', quote=False))}</div>" for note in summary["notes"]
    ]
    header = f"<div>{html.escape(diagnosis_header(summary))}</div>"
    return "".join(["<div>", header, *tables, *notes, "</div>"])


def diagnosis_header(summary: Mapping[str, Any]) -> str:
    line = f"Diagnosis of {show(summary['guide'], quote=False)}: {summary['num_samples']:,} draws"
    if summary["dead_fraction"]:
        line += f", {percent(summary['dead_fraction'])} with probability zero"
        if summary["killed"]:
            line += f" (by {', '.join(show(name, quote=False) for name in summary['killed'])})"
    return line


def _diagnosis_tables(
    summary: Mapping[str, Any],
) -> list[tuple[Sequence[str], list[list[str]]]]:
    tables: list[tuple[Sequence[str], list[list[str]]]] = [
        (_FIGURE_COLUMNS, diagnosis_rows(summary))
    ]
    if summary["texts"]:
        rows = [
            [show(name, quote=False), f"{text['num_draws']:,}", f"{text['num_distinct']:,}"]
            + [_number(text[key], 2) for key in (
                "distinct_1", "distinct_2", "edit_distance", "weighted_edit_distance",
            )]
            + [_number(text[key], 1) for key in ("mean_length", "weighted_mean_length")]
            for name, text in summary["texts"].items()
        ]  # fmt: skip
        tables.append((_DIVERSITY_COLUMNS, rows))
    return tables


def diagnosis_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Bounds of log Z from below to above, divergences, then the weights' figures."""

    def row(label: str, key: str) -> list[str]:
        return [label, _number(summary[key], 3), _error(summary[key + "_stderr"])]

    def kl(label: str, key: str) -> list[str]:
        return [label, _bracket(summary[key]), _error(summary[key + "_stderr"])]

    dead = summary["dead_fraction"] > 0
    rows = [row("ELBO", "elbo")]
    if dead:
        rows.append(row("ELBO of the live part", "elbo_alive"))
    rows.append(row("log Z >=, log mean weight", "iw_bound"))
    if summary["log_z"] is not None:
        by = "exact" if summary["log_z_source"] == "exact" else "by the prior's draws"
        rows.append(row(f"log Z, {by}", "log_z"))
    if summary["eubo"] is not None:
        if summary["log_z_source"] != "exact":
            rows.append(row("log Z <=, with an exact draw", "iw_upper_bound"))
        rows.append(row("EUBO", "eubo"))
    rows.append(kl("KL(guide || posterior)", "kl_guide_posterior"))
    if dead:
        rows.append(kl("  of the live part", "kl_alive_posterior"))
    if summary["kl_posterior_guide"] is not None:
        rows.append(kl("KL(posterior || guide)", "kl_posterior_guide"))
    if summary["z_score"] is not None:
        agree = "disagree" if abs(summary["z_score"]) > 3 else "agree"
        rows.append([f"log Z's two estimates {agree}", f"z = {summary['z_score']:.1f}", ""])
    rows.append(["effective sample size", percent(summary["ess_fraction"]), ""])
    if summary["pareto_k"] is not None:
        good = f"good below {summary['pareto_k_threshold']:.2f}"
        rows.append(["Pareto k", _number(summary["pareto_k"], 2), good])
    return rows


def _number(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def _error(stderr: float | None) -> str:
    return ABSENT if stderr is None else "exact" if stderr == 0 else f"{stderr:.2g}"


def _bracket(bracket: tuple[float, float]) -> str:
    """One number where the ends agree."""
    lower, upper = (_number(end, 3) for end in bracket)
    if lower == upper:
        return lower
    return f">= {lower}" if upper == "inf" else f"{lower} to {upper}"
