"""Results: what a benchmark found, on which machine, as a small JSON file.

``results/<machine>/<benchmark>.<dtype>.json``; a run replaces the files of what it ran.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from benchmarks.measuring import Timed
from lmppl.states import write_text

FOLDER = Path(__file__).parent / "results"
LOCAL = "local"  # the machine whose results nobody publishes
TASKS = "tasks"  # no machine: the folder of benchmarks.tasks


class Skipped(Exception):
    """A benchmark cannot run here; the message says why, and what to do about it."""


@dataclass(frozen=True)
class Goal:
    """What a value is meant to be."""

    value: float
    at_least: bool = True

    def met_by(self, value: float) -> bool:
        return value >= self.value if self.at_least else value <= self.value


@dataclass
class Row:
    """One case of a benchmark.

    Attributes:
        case: its sizes, in words.
        sides: lmppl's time and memory, then the alternative's (if there is one).
        value: what the benchmark is about: a ratio, a fraction, bytes; None: only the sides.
        spread: the smallest and the largest value of the repetitions.
        unit: of the value.
        goal: of the value.
        figures: what plots need beside, by name.
        note: what else a reader should know.
    """

    case: str
    sides: list[Timed]
    value: float | None = None
    spread: tuple[float, float] | None = None
    unit: Literal["x", "%", "bytes", ""] = ""
    goal: Goal | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def of(cls, case: str, sides: Sequence[Timed], values: Sequence[float], **options: Any) -> Row:
        """A row whose value is the median of the repetitions' values."""
        spread = (min(values), max(values))
        return cls(case, list(sides), median(values), spread, **options)


@dataclass
class Result:
    """A benchmark's rows, and the circumstances.

    Attributes:
        benchmark: its name.
        title: its name in words.
        value_label: what the rows' values are.
        circumstances: machine, versions, threads, dtype, date, revision, ...
        rows: empty if it was skipped.
        skipped: why it was.
    """

    benchmark: str
    title: str
    value_label: str
    circumstances: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: str | None = None

    @property
    def dtype(self) -> str:
        return str(self.circumstances["dtype"])

    @property
    def file_name(self) -> str:
        return f"{self.benchmark}.{self.dtype}.json"

    def save(self, folder: Path) -> Path:
        """Write it to its file in ``folder``; the file appears whole or not at all."""
        path = folder / self.file_name
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what ``save`` wrote."""
        content = json.loads(path.read_text())
        content["rows"] = [_row(row) for row in content["rows"]]
        return cls(**content)


def load_all(folder: Path) -> list[Result]:
    """The results in a folder, in the order of their names."""
    return [Result.load(path) for path in sorted(folder.glob("*.json"))]


def _row(content: dict[str, Any]) -> Row:
    sides = [Timed(**side) for side in content.pop("sides")]
    goal = content.pop("goal")
    spread = content.pop("spread")
    return Row(
        sides=sides,
        goal=Goal(**goal) if goal else None,
        spread=(spread[0], spread[1]) if spread else None,
        **content,
    )
