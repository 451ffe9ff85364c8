"""A posterior as a table: what was run, what the latent sites are, and what to beware of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lmppl.report.tables import (
    ABSENT,
    MAX_ROWS,
    Block,
    Kind,
    Table,
    notes_of,
    number,
    percent,
    plain,
    show,
)

# Rows of each table, by how many tables there are, and how many of them are shown.
_ROWS = {1: MAX_ROWS, 2: 6, 3: 5}
_FEW_ROWS = 3
_MOST_TABLES = 6
_MOST_NUMBERS = 12


def posterior_blocks(summary: Mapping[str, Any], rows: int | None = None) -> list[Block]:
    """What ``Posterior.summary()`` says, with at most ``rows`` rows a site (None: few)."""
    tools = set(summary["tools"])
    tables = {_label(name, tools): found for name, found in summary["marginals"].items()}
    numeric = {_label(name, tools): found for name, found in summary["numeric"].items()}
    if returned := summary["returned"]:
        (numeric if "numeric" in returned else tables)["returned"] = next(iter(returned.values()))
    absent = {
        _label(name, tools): ABSENT if name in tools else f"{ABSENT} (not reached)"
        for name in summary["marginals"]
    }
    shown = list(tables)[: _MOST_TABLES if rows is None else None]
    most = _ROWS.get(len(shown), _FEW_ROWS) if rows is None else rows
    blocks: list[Block] = []
    for name in shown:
        blocks += [
            *[""] * bool(blocks),
            *_marginal(name, tables[name], most, absent.get(name, "None")),
        ]
    if left_out := list(tables)[len(shown) :]:
        names = ", ".join(left_out)
        blocks.append(f"and {len(left_out)} more, shown by posterior.table(name): {names}")
    if numeric:
        limit = _MOST_NUMBERS if rows is None else rows
        blocks += [*[""] * bool(blocks), *_numbers(numeric, limit)]
    return [*_run(summary), *blocks, *_beside(summary)]


def joint_blocks(summary: Mapping[str, Any], rows: int | None = None) -> list[Block]:
    """What ``Posterior.summary(joint=True)`` says of joint values, ``rows`` of them (None: ten)."""
    found, sites = summary["rows"], summary["sites"]
    first = found[: MAX_ROWS if rows is None else rows]
    cells = [[show(row["values"].get(name)) for name in sites] for row in first]
    weights = [row["weight"] for row in found]
    return [*_run(summary), *_ranked(list(map(plain, sites)), weights, cells), *_beside(summary)]


def _label(name: str, tools: set[str]) -> str:
    return plain(name) + " (tool)" * (name in tools)


def _marginal(name: str, found: Sequence[Mapping[str, Any]], most: int, absent: str) -> list[Block]:
    """``absent`` stands for None."""
    values = [row["value"] for row in found[:most]]
    texts = [absent if value is None else show(value) for value in values]
    return _ranked([name], [row["weight"] for row in found], [[text] for text in texts])


def _ranked(
    columns: Sequence[str], weights: Sequence[float], cells: Sequence[Sequence[str]]
) -> list[Block]:
    """A table of values, the most probable first: the cells of the first few for every column, and a
    line for the others, of which only the weights are there."""
    if not weights:
        return []
    pairs = zip(weights, cells, strict=False)
    shown = [[percent(weight), weight / weights[0], *texts] for weight, texts in pairs]
    texts: list[tuple[str, Kind]] = [(name, "text") for name in columns]
    blocks: list[Block] = [Table([("weight", "figure"), ("", "bar"), *texts], shown)]
    if rest := weights[len(cells) :]:
        blocks.append(f"and {len(rest):,} more, together {percent(sum(rest))}")
    return blocks


def _numbers(numeric: Mapping[str, Mapping[str, Any]], most: int) -> list[Block]:
    """A row a number: mean, standard deviation, quantiles; of a tensor, a row an entry."""
    figures = ["mean", "sd", "5%", "50%", "95%"]
    rows: list[list[str]] = []
    for name, found in numeric.items():
        part = f" (in {percent(found['weight'])})" * (found["weight"] < 1 - 1e-9)
        entries = list(zip(*(_entries(found[figure]) for figure in figures), strict=True))
        for same in entries:
            rows.append([f"{name}{same[0][0]}{part}", *(show(value) for _, value in same)])
    columns: list[tuple[str, Kind]] = [("number", "name"), *((name, "figure") for name in figures)]
    blocks: list[Block] = [Table(columns, rows[:most])]
    if rest := len(rows) - most:
        blocks += [f"and {rest:,} more"] * (rest > 0)
    return blocks


def _entries(value: Any, index: str = "") -> list[tuple[str, float]]:
    """The numbers of a nested list, each with its index: ``[0, 1]``; none of a single number."""
    if not isinstance(value, list):
        return [(f"[{index}]" * bool(index), value)]
    comma = ", " * bool(index)
    return [one for i, part in enumerate(value) for one in _entries(part, f"{index}{comma}{i}")]


def _run(summary: Mapping[str, Any]) -> list[Block]:
    """What was run, how far the result can be trusted, and how chains mixed."""
    count = summary["num_samples"]
    first = f"Posterior by {summary['engine']}: " if summary["engine"] else "Posterior: "
    first += f"{count:,} sample{'s' * (count != 1)}"
    if chains := summary["chains"]:
        num = chains["num_chains"]
        first += f" of {num:,} Markov chain{'s' * (num != 1)}"
    if summary["islands"] > 1:
        first += f" in {summary['islands']:,} islands"
    if count:
        known = f"{summary['ess']:.1f} ({summary['ess'] / count:.0%})"
        first += f", ESS {'not known' if math.isnan(summary['ess']) else known}"
    second = "no claim about the evidence"
    if summary["log_evidence"] is not None:
        second = f"log evidence {summary['log_evidence']:.3f} nats"
    if summary["log_evidence_stderr"] is not None:
        second += f" (standard error {summary['log_evidence_stderr']:.2g})"
    costs = [
        ("{:,} tokens drawn", summary["tokens_sampled"]),
        ("{:,} tokens scored", summary["tokens_scored"]),
        ("{:,} tokens trained on", summary["tokens_trained"] or None),  # by few runs
        ("{:.1f} s", summary["seconds"]),
    ]
    cost = ", ".join(text.format(figure) for text, figure in costs if figure is not None)
    doubts = f"don't trust these figures: {', and '.join(map(plain, summary['doubts']))}"
    remedies = f"what may help: {', '.join(summary['remedies'])}"
    trust = [doubts, remedies] if summary["doubts"] else []
    lines = [first, second, *trust, *[cost] * bool(cost)]
    return [*lines, *(_chains(summary["chains"]) if summary["chains"] else [])]


def _chains(chains: Mapping[str, Any]) -> list[Block]:
    """How Markov chains mixed: a row a function, then the moves."""
    columns: list[tuple[str, Kind]] = [("chains", "name"), ("R-hat", "figure")]
    columns += [("bulk ESS", "figure"), ("tail ESS", "figure")]
    rows = [
        [
            plain(name),
            number(found.get("r_hat"), ".3f"),
            *(number(found.get(key), ",.0f") for key in ("ess_bulk", "ess_tail")),
        ]
        for name, found in (chains.get("diagnostics") or {}).items()
    ]
    blocks: list[Block] = ["", Table(columns, rows)] if rows else []
    if acceptance := chains.get("acceptance"):
        shares = [f"{plain(site)} {number(share, '.1%')}" for site, share in acceptance.items()]
        blocks.append(f"moves accepted: {', '.join(shares)}")
    return [*blocks, *[""] * bool(rows)]


def _beside(summary: Mapping[str, Any]) -> list[str]:
    """Dead samples and notes."""
    lines = []
    if summary["killed"]:
        sites = [f"{plain(site)} ({count:,})" for site, count in summary["killed"].items()]
        ended = "samples with probability zero, by the site that ended them"
        lines.append(f"{ended}: {', '.join(sites)}")
    for site, reason in summary["reasons"].items():
        lines.append(f"{plain(site)}, the first time: {plain(reason)}")
    return [*lines, *notes_of(summary)]
