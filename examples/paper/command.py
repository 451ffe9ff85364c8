"""The command line of a task: its methods with each seed, a row each, and a table of them."""

from __future__ import annotations

import argparse
import datetime
import math
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lmppl
from lmppl.report.machine import machine
from lmppl.report.tables import Block, Kind, Table, as_text

from .evaluation import LogZ
from .inputs import BadInput, package
from .rows import Column, Results, Row, groups_of
from .training import LOSSES, Trainer

_COSTS = ("steps", "tokens", "minutes", "seeds")
_MOST_FIGURES = 6  # beside which the costs have room on a terminal
_NOT_SETTINGS = ("method", "seeds", "out", "plot", "quick")
_OF_TRAINING = ("steps", "batch_size")  # what only the rows of methods that are trained depend on


@dataclass
class Run:
    """One method with one seed, as ``Task.measure`` gets it.

    Attributes:
        lm: the language model.
        args: the command line's options.
        method, seed: what is to be measured.
        shared: for what all runs of the command have in common, such as the inputs.
        results: the rows so far, and what they have in common.
        keep: writes ``results`` to the command's file, if it has one.
        training: what ``train`` has cost.
    """

    lm: lmppl.LM
    args: argparse.Namespace
    method: str
    seed: int
    shared: dict[str, Any]
    results: Results = field(default_factory=lambda: Results("", "", {}))
    keep: Callable[[], None] = lambda: None
    training: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, the first time that it is asked for under this name."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def log_z(self, make: Callable[[], list[LogZ]], options: str) -> list[LogZ]:
        """What ``make`` gives, log Z of each held-out input by other means than the methods'. It takes
        longer than many a training, so it is kept with the rows, for further commands.

        Args:
            options: those of the command that it depends on besides the model, with spaces between them.
        """
        settings = _settings(self.args)
        own = {name: settings[name] for name in ("model", "dtype", *options.split())}
        found = next(
            (one["log_z"] for one in self.results.references if one["settings"] == own), None
        )
        if found is None:
            found = make()
            self.results.references.append({"settings": own, "log_z": found})
            self.keep()
        return [(estimate, stderr) for estimate, stderr in found]

    def train(self, make_trainer: Callable[[], Trainer], **options: Any) -> lmppl.LMGuide:
        """A guide trained by the run's method; see ``Trainer.train``."""
        trainer = self.once("trainer", make_trainer)
        guide, self.training = trainer.train(self.method, self.seed, **options)
        return guide


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: of the script, without ``.py``.
        title: of its table.
        methods: what can be measured; the first ones are the default, up to and with ``"guide"``.
        columns: what is shown of a row's figures.
        measure: finds the figures of a run.
        quick: options under ``--quick``.
        trained: the methods whose rows depend on --steps and --batch-size.
        show: prints of a row what the table has no room for, once it is there.
        plot: makes a picture (a matplotlib ``Figure``) of the rows.
    """

    name: str
    title: str
    methods: Sequence[str]
    columns: Mapping[str, Column]
    measure: Callable[[Run], dict[str, Any]]
    quick: Mapping[str, Any]
    trained: Collection[str] = tuple(LOSSES)
    show: Callable[[Row], None] | None = None
    plot: Callable[[Sequence[Row]], Any] | None = None

    def parser(self, description: str) -> argparse.ArgumentParser:
        """The options that all tasks have; a task adds its own."""
        parser = argparse.ArgumentParser(
            prog=f"{self.name}.py",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        few = list(self.methods[: self.methods.index("guide") + 1])
        parser.add_argument(
            "--method", nargs="+", default=few, choices=[*self.methods, "all"], metavar="METHOD",
            help=f"of {', '.join(self.methods)}; or all. By default {', '.join(few)}",
        )  # fmt: skip
        parser.add_argument("--model", default="smollm2-135m-instruct", help="any causal LM")
        parser.add_argument("--dtype", help="by default what suits the machine")
        parser.add_argument("--quick", action="store_true", help="small settings, about 2 minutes")
        parser.add_argument("--seeds", type=positive, default=1, help="how many: 0, 1, ...")
        parser.add_argument("--steps", type=positive, default=100, help="of the guide's training")
        parser.add_argument("--batch-size", type=positive, default=64, help="traces a step")
        parser.add_argument("--samples", type=several, default=1024, help="draws an input")
        parser.add_argument("--out", type=Path, help="JSON file of rows; those in it are kept")
        if self.plot is not None:
            parser.add_argument("--plot", type=Path, help="draw the rows (PNG, SVG, PDF)")
        return parser

    def main(self, parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> Results:
        """Run the command. What the user can put right ends it with a message and status 2."""
        usual = parser.parse_args([])
        if parser.parse_args(argv).quick:
            parser.set_defaults(**self.quick)
        args = parser.parse_args(argv)
        try:
            return self._run(args, _settings(usual))
        except BadInput as error:
            parser.exit(2, f"{parser.prog}: {error}\n")

    def _run(self, args: argparse.Namespace, usual: Mapping[str, Any]) -> Results:
        results = Results(self.name, self.title, dict(self.columns))
        if args.out is not None and args.out.exists():
            kept = Results.load(args.out)
            if kept.task != self.name:
                raise BadInput(f"{args.out} has rows of {kept.task}: give another file")
            results.rows, results.references = kept.rows, kept.references
        if getattr(args, "plot", None) is not None:
            package("matplotlib", "lmppl-pyro[plot]", "--plot")
        lm = lmppl.LM.from_pretrained(args.model, dtype=args.dtype)
        threads = torch.get_num_threads()
        words = f"{machine(lm.device)}, {threads} thread{'s' * (threads != 1)}"
        methods = self.methods if "all" in args.method else args.method
        shared: dict[str, Any] = {}
        shown: list[Row] = []

        def keep() -> None:
            if args.out is not None:
                results.save(args.out)

        for seed in range(args.seeds):
            for method in methods:
                settings = self._settings_of(method, args)
                row = results.find(method, seed, settings)
                if row is None:
                    run = Run(lm, args, method, seed, shared, results, keep)
                    command = _command(self.name, settings, usual)
                    row = self._measured(run, settings, command=command, machine=words)
                    results.rows.append(row)
                    keep()
                shown.append(row)
                if self.show is not None:
                    self.show(row)
        print(as_text(self._blocks(shown)))
        if getattr(args, "plot", None) is not None:
            assert self.plot is not None
            args.plot.parent.mkdir(parents=True, exist_ok=True)
            self.plot(shown).savefig(args.plot, facecolor="white")
        return results

    def _settings_of(self, method: str, args: argparse.Namespace) -> dict[str, Any]:
        """The options that a row of the method depends on."""
        left_out = () if method in self.trained else _OF_TRAINING
        return {name: value for name, value in _settings(args).items() if name not in left_out}

    def _measured(self, run: Run, settings: dict[str, Any], **circumstances: str) -> Row:
        print(f"{run.method}, seed {run.seed} ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        figures = self.measure(run)
        minutes = (time.perf_counter() - began) / 60
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Row(
            run.method, run.seed, settings, figures, minutes=minutes, date=date, **run.training,
            **circumstances,
        )  # fmt: skip

    def _blocks(self, rows: Sequence[Row]) -> list[Block]:
        """The table, as the library's reports have it; the costs in one of their own if it is wide."""
        cells = [group.cells(self.columns) for group in groups_of(rows)]
        headings = [heading for heading in cells[0] if any(of_group[heading] for of_group in cells)]
        costs = [heading for heading in headings if heading in _COSTS]
        figures = [heading for heading in headings[1:] if heading not in _COSTS]
        parts = [[*figures, *costs]] if len(figures) <= _MOST_FIGURES else [figures, costs]
        return ["", self.title, *(line for part in parts for line in ("", _table(cells, part)))]


def _table(cells: Sequence[Mapping[str, str]], headings: Sequence[str]) -> Table:
    """What each method's cells say under some headings."""
    columns: list[tuple[str, Kind]] = [("method", "name")]
    columns += [(heading.replace(" ", "\n"), "figure") for heading in headings]
    rows = [[of_group[name] for name in ("method", *headings)] for of_group in cells]
    return Table(columns, rows, gap=1)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that figures depend on, in JSON's types."""
    found = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}
    return {name: str(v) if isinstance(v, Path) else v for name, v in found.items()}


def _command(name: str, settings: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """What was run, without method and seeds."""
    words = ["python", f"examples/{name}.py"]
    for option, value in settings.items():
        if value != usual[option]:
            words += [f"--{option.replace('_', '-')}"]
            words += (
                [] if value is True else map(str, value if isinstance(value, list) else [value])
            )
    return shlex.join(words)


def positive(text: str) -> int:
    """A whole number above 0, as argparse takes a type."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def several(text: str) -> int:
    """A whole number above 1."""
    number = int(text)
    if number < 2:
        raise ValueError
    return number


def above_0(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    number = above_0(text)
    if number > 1:
        raise ValueError
    return number
