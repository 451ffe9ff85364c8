"""Tables and plots of recorded results.

python -m benchmarks.report                 remakes the results part of docs/performance.md,
                                            with all machines but "local", and its plots,
                                            without our goals
python -m benchmarks.report --machine local writes results/local/report.md and plots beside it
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import plots
from benchmarks.measuring import Timed
from benchmarks.results import FOLDER, LOCAL, TASKS, Goal, Result, Row, load_all
from benchmarks.suite import BENCHMARKS
from lmppl.states import write_text

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
IMAGES = "images"


def table(results: Sequence[Result]) -> str:
    """The results of one benchmark (in several dtypes) as a markdown table, with its notes."""
    rows = [(result, row) for result in results for row in result.rows]
    lines: list[str] = []
    if rows:
        compared = any(len(row.sides) > 1 for _, row in rows)
        value_label = results[0].value_label if any(row.unit for _, row in rows) else None
        has_goals = any(row.goal for _, row in rows)
        cells = [_cells(result, row, compared, value_label, has_goals) for result, row in rows]
        lines += [
            "| " + " | ".join(cells[0]) + " |",
            "| " + " | ".join("---" for _ in cells[0]) + " |",
            *("| " + " | ".join(each.values()) + " |" for each in cells),
        ]
    for result in results:
        if result.skipped:
            lines += ["", f"{result.dtype}: skipped. {result.skipped}."]
    notes = [f"- {row.case}, {result.dtype}: {row.note}." for result, row in rows if row.note]
    if notes:
        lines += ["", *notes]
    lines += [""] * (not notes) + [f"- {result.dtype}: {_when(result)}." for result in results]
    return "\n".join(lines).strip()


def machine_report(results: Sequence[Result], images: Sequence[tuple[str, str]]) -> str:
    """All that was found on one machine, as markdown.

    Args:
        results: of the machine.
        images: paths and descriptions of plots.
    """
    facts = results[0].circumstances
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    lines = [
        f"{facts['machine']}. {threads}, Python {facts['python']}, {versions}. "
        f"Model: `{facts['model']}`. Memory is {facts['memory']}.",
    ]
    engine = next((r.circumstances.get("engine_bytes") for r in results), None)
    if engine:
        lines.append(
            f"Beside the weights, lmppl keeps {bytes_in_words(max(0, engine))} from its first use on."
        )
    lines += ["", *(f"![{description}]({path})\n" for path, description in images)]
    for name in BENCHMARKS:
        own = [r for r in results if r.benchmark == name]
        if not own:
            continue
        lines += [f"#### {own[0].title}", "", table(own), ""]
    return "\n".join(lines).strip()


def results_of(folder: Path) -> list[Result]:
    """The results of one machine, in the order of the benchmarks.

    Raises:
        FileNotFoundError: there are none.
    """
    names = list(BENCHMARKS)
    known = [result for result in load_all(folder) if result.benchmark in names]
    results = sorted(known, key=lambda result: names.index(result.benchmark))
    if not results:
        raise FileNotFoundError(f"there are no results in {folder}")
    return results


def without_goals(results: Sequence[Result]) -> list[Result]:
    """What was measured, without what we had hoped for."""
    return [
        replace(result, rows=[replace(row, goal=None) for row in result.rows]) for result in results
    ]


def render(results: Sequence[Result], machine: str, images: Path, link: str) -> str:
    """The report of a machine's results.

    Args:
        results: of one machine.
        machine: its name, with which the names of the plots begin.
        images: folder for the plots.
        link: what their names begin with in links.
    """
    drawn = plots.draw(results, images, machine)
    return machine_report(results, [(link + name, words) for name, words in drawn])


def machines(root: Path) -> list[Path]:
    """Folders with results to be published."""
    found = [path.parent for path in root.glob("*/*.json")]
    return sorted({path for path in found if path.name not in (LOCAL, TASKS)})


def update(page: str, content: str, part: str = "results") -> str:
    """The page with other content between the markers of one part of it.

    Raises:
        ValueError: it has no such markers.
    """
    first, last = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page has no {first} ... {last}")
    return f"{before}{first}\n\n{content}\n\n{last}{after}"


def published(root: Path, images: Path) -> str:
    """The results part of docs/performance.md."""
    folders = machines(root)
    if not folders:
        return "No machine's results have been recorded yet."
    parts = []
    for path in folders:
        report = render(without_goals(results_of(path)), path.name, images, IMAGES + "/")
        parts.append(f"### {path.name}\n\n{report}")
    return "\n\n".join(parts)


def bytes_in_words(number: float) -> str:
    size = abs(number)
    if size >= 1 << 30:
        return f"{number / (1 << 30):.1f} GB"
    return f"{number / (1 << 20):.0f} MB"


def seconds_in_words(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _cells(
    result: Result, row: Row, compared: bool, value_label: str | None, has_goals: bool
) -> dict[str, str]:
    ours = row.sides[0]
    cells = {"case": row.case, "dtype": result.dtype, "lmppl": _time(ours), "peak": _peak(ours)}
    if compared:
        other = row.sides[1] if len(row.sides) > 1 else None
        cells["alternative"] = "" if other is None else f"{other.label}: {_time(other)}"
        cells["its peak"] = "" if other is None else _peak(other)
    if value_label is not None:
        cells[value_label] = _value(row)
    if has_goals:
        cells["goal"] = _goal(row)
    return cells


def _time(side: Timed) -> str:
    words = seconds_in_words(side.median)
    return words if side.rate is None else f"{words} ({side.rate:,.0f} tokens/s)"


def _peak(side: Timed) -> str:
    return "not measured" if side.peak_bytes is None else bytes_in_words(side.peak_bytes)


def _value(row: Row) -> str:
    if row.value is None:
        return "not measured" if row.unit else ""
    words = _number(row.value, row.unit)
    low, high = (_number(value, row.unit) for value in row.spread or (row.value, row.value))
    return words if low == high else f"{words} ({low} to {high})"


def _number(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.1f}" if value >= 2 else f"{value:.2f}"
    return f"{value:.0%}" if unit == "%" else bytes_in_words(value)


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    words = f"at {'least' if row.goal.at_least else 'most'} {_limit(row.goal, row.unit)}"
    if row.value is None:
        return words
    return f"{words}: {'met' if row.goal.met_by(row.value) else '**missed**'}"


def _limit(goal: Goal, unit: str) -> str:
    return f"{goal.value:g}" if unit == "x" else _number(goal.value, unit)


def _when(result: Result) -> str:
    facts = result.circumstances
    load = facts.get("load")
    return (
        f"{facts['mode']} run of {facts['date'][:10]}, {_repetitions(result)}, revision "
        f"{facts['revision'] or 'unknown'}" + (f", load {load:g} before it" if load else "")
    )


def _repetitions(result: Result) -> str:
    counts = {len(side.seconds) for row in result.rows for side in row.sides} or {0}
    low, high = min(counts), max(counts)
    words = f"{low} to {high}" if low < high else str(high)
    return f"{words} repetition{'s' * (high != 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", help="whose results are new")
    options = parser.parse_args()
    if options.machine == LOCAL:
        folder = FOLDER / LOCAL
        path = folder / "report.md"
        report = render(results_of(folder), folder.name, folder, "")
        write_text(path, f"# Benchmarks\n\n{report}\n")
    else:
        path = PAGE
        write_text(path, update(PAGE.read_text(), published(FOLDER, DOCS / IMAGES)))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
