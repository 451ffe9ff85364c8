"""The results of the five tasks, as docs/results.md.

python -m benchmarks.tasks     remakes the tables of the page from benchmarks/results/tasks/, each
                               between the markers of its task, and the pictures beside it

It prints what the guides were meant to reach, and whether they did. The files there are written
by the scripts in examples/, each with ``--out``; the page says by which command. A picture needs
matplotlib, the extra ``bench``; without it there are none.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import DOCS, IMAGES, update
from benchmarks.results import FOLDER, TASKS
from lmppl.states import write_text

EXAMPLES = Path(__file__).parent.parent / "examples"
if str(EXAMPLES) not in sys.path:  # where the scripts have it when they are run
    sys.path.insert(0, str(EXAMPLES))

from paper.rows import Column, Group, Results, groups_of  # noqa: E402

PAGE = DOCS / "results.md"
MOST_TIMES, ENOUGH = 10, 0.5
"""The goal of a guide: an ESS of so many times the prior's, or of so large a share of the draws."""


def table(groups: Sequence[Group], columns: dict[str, Column]) -> str:
    """Methods of one setting, as Markdown."""
    cells = [group.cells(columns) for group in groups]
    shown = [heading for heading in cells[0] if any(row[heading] for row in cells)]
    lines = [
        "| " + " | ".join(shown) + " |",
        "| --- |" + " ---: |" * (len(shown) - 1),
        *("| " + " | ".join(row.get(heading, "") for heading in shown) + " |" for row in cells),
    ]
    return "\n".join(lines)


def section(results: Results, images: Path | None) -> str:
    """All that was found of a task: a table for each setting, its command and its machine.

    Args:
        results: of the task.
        images: folder for its picture; None: there is none.
    """
    parts: list[str] = []
    groups = groups_of(results.rows)
    for number, own in enumerate(tables_of(groups)):
        rows = [row for group in own for row in group.rows]
        methods = " ".join(group.method for group in own)
        seeds = 1 + max(row.seed for row in rows)
        whole = (
            f"{_command(own)} --method {methods} --seeds {seeds} "
            f"--out benchmarks/results/{TASKS}/{results.task}.json"
        )
        machines = "; ".join(dict.fromkeys(row.machine for row in rows))
        if options := _settings_of(own):
            parts.append(f"With `{options}`:")
        parts += [table(own, results.columns), *gain(own), f"`{whole}`\n\n{machines}."]
        name = f"{results.task}-{number}.svg"
        if images is not None and _draw(results.task, rows, images / name):
            parts.append(f"![{results.title}, by method]({IMAGES}/{name})")
    return "\n\n".join(parts)


def tables_of(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of the same settings. Those of methods that are not trained have fewer of them, and stand
    in each table of methods that are, if they agree in the rest."""
    settings = [group.settings for group in groups]
    whole = [s for s in settings if not any(s.items() < other.items() for other in settings)]
    distinct = [s for number, s in enumerate(whole) if s not in whole[:number]]
    return [[g for g in groups if g.settings.items() <= s.items()] for s in distinct]


def gain(groups: Sequence[Group]) -> list[str]:
    """A sentence on what the guide's training gains as a proposal. None if the rows don't say."""
    guide, prior = _counted(groups)
    if guide is None or prior is None:
        return []
    times = f"{guide / prior:.1f} times the prior's {prior:.1%}" if prior else "the prior's is 0"
    return [f"ESS of the guide, where log Z agrees: {guide:.1%}, {times}."]


def goals(results: Results) -> list[str]:
    """What its guides were meant to reach, a line a figure and setting, and whether they did."""
    lines = []
    for groups in tables_of(groups_of(results.rows)):
        setting = _settings_of(groups) or "its usual settings"
        found = {c.title: _goal(groups, name, c) for name, c in results.columns.items()}
        guide, prior = _counted(groups)
        if guide is not None and prior is not None:
            met = guide >= min(MOST_TIMES * prior, ENOUGH)
            wanted = f"{MOST_TIMES} times the prior's {prior:.1%}, or {ENOUGH:.0%}"
            found["ESS where log Z agrees"] = f"{guide:.1%}, {wanted}: {'met' if met else 'MISSED'}"
        lines += [
            f"{results.task}, {setting}: {name} {goal}" for name, goal in found.items() if goal
        ]
    return lines


def _counted(groups: Sequence[Group]) -> tuple[float | None, float | None]:
    """The ESS that counts, of the guide and of the prior."""
    found = {group.method: group.mean("counted") for group in groups}
    return found.get("guide"), found.get("prior")


def _command(groups: Sequence[Group]) -> str:
    """What was run, without methods: of those that depend on all settings."""
    return max(groups, key=lambda group: len(group.settings)).rows[0].command


def _settings_of(groups: Sequence[Group]) -> str:
    return _command(groups).partition(".py ")[2]


def updated(page: str, folder: Path, images: Path | None) -> str:
    """The page with what the folder's files say in its part of each task.

    Raises:
        ValueError: it has no such part, from ``<!-- NAME:begin -->`` to ``<!-- NAME:end -->``.
    """
    for path in sorted(folder.glob("*.json")):
        results = Results.load(path)
        page = update(page, section(results, images), results.task)
    return page


def _goal(groups: Sequence[Group], name: str, column: Column) -> str:
    """What the guide is meant to reach, and whether it did in the mean; "" if there is no such goal."""
    means = [group.mean(name) for group in groups if group.method == "guide"]
    if not column.goal() or not means or means[0] is None:
        return ""
    return f"{column.goal()}: {'met' if column.met_by(means[0]) else 'MISSED'}"


def _draw(task: str, rows: Sequence[object], path: Path) -> bool:
    """Draw the rows as the task's script does, if it does and matplotlib is there."""
    plot = importlib.import_module(task).TASK.plot
    try:
        import matplotlib
    except ImportError:
        return False
    if plot is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "lmppl", "svg.fonttype": "none"}):
        plot(rows).savefig(path, facecolor="white", metadata={"Date": None})
    return True


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__).parse_args()
    write_text(PAGE, updated(PAGE.read_text(), FOLDER / TASKS, DOCS / IMAGES))
    for path in sorted((FOLDER / TASKS).glob("*.json")):
        print(*goals(Results.load(path)), sep="\n")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
