"""What Python costs: work with a tiny language model, against plain Pyro traces of the same shape.

    python -m benchmarks.overhead                        all cases, without loading a model
    python -m benchmarks.overhead importance fit         of these
    python -m benchmarks --only overhead                 as part of the suite

A plain trace is ``poutine.trace(program).get_trace()`` and its ``compute_log_prob()``, of a program
with as many ``Categorical`` sites as the other has texts. Costs are CPU seconds on one thread
(``time.process_time``), alternatives in turns; each value is the median of the ratios. On a GPU the
language model is fast enough for Python to be the bound, and this is what it is then bound by.

SMC resamples at every barrier here (``ess_threshold=1``), and a factor after each latent makes the
weights differ. ``import lmppl`` stands beside ``import torch, pyro, transformers``, each in a
fresh process.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine

import lmppl
from benchmarks.bench import REPEATS, Bench
from benchmarks.measuring import Contender, Local, in_turns
from benchmarks.results import Goal, Row
from lmppl import lm_sample
from lmppl.testing import tiny_lm

FIT_STEPS = 8
"""So long last the traces that a step draws ahead from the program."""
OTHERS = "torch, pyro, transformers"


@dataclass(frozen=True)
class Side:
    """One of the two that a case compares.

    Args:
        label: what it is, in words.
        contender: does it.
        traces: how many it makes.
    """

    label: str
    contender: Contender
    traces: int = 1


@dataclass(frozen=True)
class Case:
    """A ratio of two costs, each a trace.

    Args:
        words: what is measured, with its sizes.
        ours: its side.
        other: what it is compared with.
        at_most: goal of the ratio, at the sizes of a real run.
    """

    words: str
    ours: Side
    other: Side
    at_most: float

    def measure(self, repeats: int) -> Row:
        """Run both in turns."""
        contenders = {side.label: side.contender for side in (self.ours, self.other)}
        ours, other = in_turns(contenders, repeats)
        values = [
            (a / self.ours.traces) / (b / self.other.traces)
            for a, b in zip(ours.seconds, other.seconds, strict=True)
        ]
        costs = [1e3 * ours.median / self.ours.traces, 1e3 * other.median / self.other.traces]
        goal = None if self.at_most is None else Goal(self.at_most, at_least=False)
        note = f"{costs[0]:.3g} ms against {costs[1]:.3g} ms"
        if self.ours.traces > 1:
            note = f"a trace, {note}"
        return Row.of(self.words, [ours, other], values, unit="x", goal=goal, note=note)


def run(bench: Bench) -> list[Row]:
    costly = {"fit_growth", "imports"} if bench.mode == "smoke" else set()
    return measure([name for name in CASES if name not in costly], bench)


def measure(names: list[str], bench: Bench) -> list[Row]:
    """The cases of these names, in a bench's sizes and repeats (its model is not used)."""
    with one_thread():
        return [case.measure(bench.repeats) for name in names for case in CASES[name](bench)]


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU seconds then are those of Python and of the sums, not of threads that wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- programs ------------------------------------------------------------------------------------


def story(x: str, y: str) -> None:
    """Two latent texts and an observed one."""
    z = lm_sample("z", x, max_tokens=3, stop=".")
    w = lm_sample("w", [x, z], max_tokens=3, stop=".")
    lm_sample("y", [x, z, w], obs=y)


def plain_story(logits: torch.Tensor, observed: torch.Tensor) -> None:
    """The same shape in plain Pyro."""
    pyro.sample("z", dist.Categorical(logits=logits))
    pyro.sample("w", dist.Categorical(logits=logits))
    pyro.sample("y", dist.Categorical(logits=logits), obs=observed)


def chain(length: int) -> None:
    """``length`` latent texts, each after the one before, and a factor after each that sets them
    apart: of 16 particles about half are replaced every time."""
    text: Any = "a"
    for i in range(length):
        text = lm_sample(f"z{i}", ["a", text], max_tokens=3, stop=".")
        nats = zlib.crc32(f"{i} {text}".encode()) % 11 - 5
        pyro.factor(f"f{i}", torch.tensor(float(nats)))


# --- cases ---------------------------------------------------------------------------------------


def importance(bench: Bench) -> list[Case]:
    particles = bench.choose(smoke=4, quick=1024, full=1024)
    lm = frozen_lm()

    def work(number: int) -> int:
        options: dict[str, Any] = {"method": "importance", "num_samples": particles}
        lmppl.infer(story, "ab.", "aba", lm=lm, seed=number, progress=False, **options)
        return 0

    ours = Side("importance", counted(work), particles)
    words = f"importance, {particles:,} particles, three sites"
    return [Case(words, ours, plain_traces(particles), 1.0)]


def fit(bench: Bench) -> list[Case]:
    size = bench.choose(smoke=4, quick=512, full=512)
    words = f"fit, {size:,} traces a step, three sites"
    side = fitting(size, bench.choose(smoke=1, quick=FIT_STEPS, full=FIT_STEPS))
    return [Case(words, side, plain_traces(2 * size), 1.5)]


def fit_growth(bench: Bench) -> list[Case]:
    small, large = bench.choose(smoke=(4, 6), quick=(512, 4096), full=(512, 4096))
    words = f"fit, {large:,} against {small:,} traces a step"
    return [Case(words, fitting(large), fitting(small), 1.1)]


def smc(bench: Bench) -> list[Case]:
    lengths = bench.choose(smoke=[3], quick=[60, 200], full=[60, 200])
    particles = bench.choose(smoke=2, quick=16, full=16)
    lm = frozen_lm()

    def side(length: int, method: str, **more: Any) -> Side:
        def work(number: int) -> int:
            options = {"method": method, "num_samples": particles, **more}
            lmppl.infer(chain, length, lm=lm, seed=number, progress=False, **options)
            return 0

        return Side(f"{method}, {length}", counted(work), particles)

    return [
        Case(
            f"smc, {length} latent sites, {particles} particles",
            side(length, "smc", ess_threshold=1.0),
            side(length, "importance"),
            2.0,
        )
        for length in lengths
    ]


def imports(bench: Bench) -> list[Case]:
    return [Case("import lmppl", Side("lmppl", Import("lmppl")), Side(OTHERS, Import(OTHERS)), 1.1)]


CASES: dict[str, Callable[[Bench], list[Case]]] = {
    "importance": importance,
    "fit": fit,
    "fit_growth": fit_growth,
    "smc": smc,
    "imports": imports,
}


# --- sides ---------------------------------------------------------------------------------------


def counted(work: Callable[[int], int]) -> Contender:
    """Work in this process, by its CPU seconds."""
    return Local(work, torch.device("cpu"), clock=time.process_time)


def plain_traces(traces: int) -> Side:
    """Plain Pyro traces of three sites, and their densities."""
    logits, observed = torch.zeros(5), torch.tensor(1)

    def work(number: int) -> int:
        for _ in range(traces):
            poutine.trace(plain_story).get_trace(logits, observed).compute_log_prob()
        return 0

    return Side("plain Pyro", counted(work), traces)


def fitting(size: int, steps: int = FIT_STEPS) -> Side:
    return Side(f"fit, {size:,}", Fitting(frozen_lm(), size, steps), steps * size)


@dataclass
class Fitting:
    """Steps of a guide's training after the first, with the defaults: truncations, replayed and
    tempered traces. (The first makes the guide's adapter and meets an empty replay buffer.)"""

    lm: lmppl.LM
    size: int
    steps: int

    def warm_up(self) -> None:
        self.repeat(0)

    def repeat(self, number: int) -> tuple[float, int]:
        ends: list[float] = []
        guide = lmppl.LMGuide(story, lm=self.lm)
        options = {"batch_size": self.size, "inputs_per_step": 1, "seed": number}
        options |= {"progress": False, "callback": lambda _: ends.append(time.process_time())}
        guide.fit([("ab.", "aba")], steps=1 + self.steps, **options)
        return ends[-1] - ends[0], 0


@dataclass
class Import:
    """Modules, imported in a fresh process."""

    modules: str

    def warm_up(self) -> None:
        self.repeat(0)

    def repeat(self, number: int) -> tuple[float, int]:
        folder = Path(lmppl.__file__).parent.parent
        before = _children_seconds()
        subprocess.run(
            [sys.executable, "-c", f"import {self.modules}"],
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            check=True,
        )
        return _children_seconds() - before, 0


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def frozen_lm() -> lmppl.LM:
    lm = tiny_lm("ab.", seed=0)
    lm.model.requires_grad_(False)
    return lm


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=REPEATS["quick"])
    options = parser.parse_args()
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}, there are {', '.join(CASES)}")
    bench = Bench(frozen_lm(), repeats=options.repeats)
    for name in options.cases or CASES:
        for row in measure([name], bench):
            low, high = row.spread or (row.value, row.value)
            limit = row.goal and row.goal.value
            print(
                f"{row.case:42}{row.value:6.2f} ({low:.2f} to {high:.2f}; at most {limit}): {row.note}"
            )


if __name__ == "__main__":
    main()
