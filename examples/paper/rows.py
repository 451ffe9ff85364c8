"""Rows of results: one method of a task with one seed, as JSON; and their means over the seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmppl.states import write_text

from .inputs import BadInput


@dataclass(frozen=True)
class Column:
    """A figure of the rows.

    Args:
        title: its heading.
        form: its format, as ``format`` takes it.
        least, most: what it is meant to be for the method ``"guide"``.
    """

    title: str
    form: str = ".3f"
    least: float | None = None
    most: float | None = None

    def written(self, mean: float, deviation: float | None) -> str:
        """The mean over the seeds, and their standard deviation, if there is one."""
        if deviation is None or not math.isfinite(deviation):
            return format(mean, self.form)
        return f"{mean:{self.form}} ± {deviation:{self.form}}"

    def goal(self) -> str:
        """In words; "" if there is none."""
        bounds = (("at least", self.least), ("at most", self.most))
        words = [f"{word} {bound:{self.form}}" for word, bound in bounds if bound is not None]
        return " and ".join(words)

    def met_by(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )


@dataclass
class Row:
    """What one method found with one seed.

    Attributes:
        settings: the options of the command line that it depends on.
        figures: by column; others than those of the task's columns are kept too.
        steps, tokens: of its training; tokens are drawn, scored or trained on.
        training_minutes, minutes: of its training, and of all.
        command: what was run, without method and seeds.
        machine: in words, with the threads.
    """

    method: str
    seed: int
    settings: dict[str, Any]
    figures: dict[str, Any]
    steps: int = 0
    tokens: int = 0
    training_minutes: float = 0.0
    minutes: float = 0.0
    command: str = ""
    machine: str = ""
    date: str = ""

    def is_of(self, method: str, seed: int, settings: Mapping[str, Any]) -> bool:
        return (self.method, self.seed, self.settings) == (method, seed, settings)


@dataclass
class Results:
    """The rows of a task, with what it takes to write a table of them.

    Attributes:
        references: estimates of log Z of held-out inputs, each with the settings that it depends on.
    """

    task: str
    title: str
    columns: dict[str, Column]
    rows: list[Row] = field(default_factory=list)
    references: list[dict[str, Any]] = field(default_factory=list)

    def find(self, method: str, seed: int, settings: Mapping[str, Any]) -> Row | None:
        return next((row for row in self.rows if row.is_of(method, seed, settings)), None)

    def save(self, path: Path) -> None:
        """Write them; the file is there whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what ``save`` wrote.

        Raises:
            BadInput: if the file is something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["columns"] = {name: Column(**c) for name, c in content["columns"].items()}
            content["rows"] = [Row(**row) for row in content["rows"]]
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path} holds no results of a task: give another file") from error


@dataclass(frozen=True)
class Group:
    """The rows of one method and one setting, whatever the seed."""

    method: str
    settings: dict[str, Any]
    rows: list[Row]

    def values(self, name: str) -> list[float]:
        """A figure of the rows that have it."""
        return [row.figures[name] for row in self.rows if row.figures.get(name) is not None]

    def mean(self, name: str) -> float | None:
        """The mean of a figure; None if no row has it."""
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def cells(self, columns: Mapping[str, Column]) -> dict[str, str]:
        """What a table says of them, by heading; "" for a figure that they have not."""
        cells = {"method": self.method}
        for name, column in columns.items():
            values = self.values(name)
            deviation = statistics.stdev(values) if len(values) > 1 else None
            cells[column.title] = (
                column.written(statistics.fmean(values), deviation) if values else ""
            )
        trained = [row for row in self.rows if row.steps]
        for name in ("steps", "tokens"):
            spent = [getattr(row, name) for row in trained]
            cells[name] = f"{statistics.fmean(spent):,.0f}" if spent else ""
        cells["minutes"] = f"{statistics.fmean(row.minutes for row in self.rows):.1f}"
        cells["seeds"] = str(len(self.rows))
        return cells


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Rows that differ only in their seeds, together, in the order in which they came."""
    groups: list[Group] = []
    for row in rows:
        same = [g for g in groups if (g.method, g.settings) == (row.method, row.settings)]
        if same:
            same[0].rows.append(row)
        else:
            groups.append(Group(row.method, row.settings, [row]))
    return groups
