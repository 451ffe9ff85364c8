"""A posterior as a table: what was run, what the latent sites are, and what to beware of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmppl.report.tables import MAX_ROWS, Block, Kind, Table, notes_of, number, percent, plain, show


def posterior_blocks(summary: Mapping[str, Any]) -> list[Block]:
    """What ``Posterior.summary()`` says."""
    rows, sites = summary["rows"], summary["sites"]
    shown = []
    for row in rows[:MAX_ROWS]:
        weight, values = row["weight"], [show(row["values"].get(name)) for name in sites]
        shown.append([percent(weight), weight / rows[0]["weight"], *values])
    texts: list[tuple[str, Kind]] = [(plain(name), "text") for name in sites]
    table = Table([("weight", "figure"), ("", "bar"), *texts], shown)
    chains = _chains(summary["chains"]) if summary["chains"] else []
    beside = [*_beside_the_rows(summary), *notes_of(summary)]
    return [*_run(summary), *chains, *[table] * bool(rows), *beside]


def _run(summary: Mapping[str, Any]) -> list[str]:
    """What was run, and how far the result can be trusted."""
    count = summary["num_samples"]
    first = f"Posterior by {summary['engine']}: " if summary["engine"] else "Posterior: "
    first += f"{count:,} sample{'s' * (count != 1)}"
    if chains := summary["chains"]:
        num = chains["num_chains"]
        first += f" of {num:,} Markov chain{'s' * (num != 1)}"
    if count:
        first += f", ESS {summary['ess']:.1f} ({summary['ess'] / count:.0%})"
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
    return [first, second, *[cost] * bool(cost)]


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


def _beside_the_rows(summary: Mapping[str, Any]) -> list[str]:
    """What the rows leave out: further rows, numeric sites, dead samples."""
    lines = []
    if rest := summary["rows"][MAX_ROWS:]:
        share = percent(sum(row["weight"] for row in rest))
        lines.append(f"and {len(rest):,} more, together {share}")
    for name, moments in summary["numeric"].items():
        reached = f" (reached in {percent(moments['weight'])})" * (moments["weight"] < 1 - 1e-9)
        lines.append(f"{plain(name)}: {show(moments['mean'])} +- {show(moments['sd'])}{reached}")
    if summary["killed"]:
        sites = [f"{plain(site)} ({count:,})" for site, count in summary["killed"].items()]
        ended = "samples with probability zero, by the site that ended them"
        lines.append(f"{ended}: {', '.join(sites)}")
    for site, reason in summary["reasons"].items():
        lines.append(f"{plain(site)}, the first time: {plain(reason)}")
    return lines
