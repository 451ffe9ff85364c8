"""The suite: its benchmarks, by name, and how one of them is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import (
    decode,
    gflownet,
    masks,
    outside,
    overhead,
    ray_actors,
    resampling,
    sampling,
    scaling,
    scoring,
    smc,
    training_pass,
)
from benchmarks.bench import Bench
from benchmarks.machine import circumstances
from benchmarks.results import Result, Row, Skipped


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        title: what is measured, in words.
        value_label: what the values of its rows are.
        run: does it.
    """

    title: str
    value_label: str
    run: Callable[[Bench], list[Row]]


BENCHMARKS = {
    "sampling": Benchmark(
        "Sampling, against `model.generate`", "times faster than generate", sampling.run
    ),
    "scoring": Benchmark(
        "Scoring, against a plain forward pass", "times faster than the pass", scoring.run
    ),
    "smc": Benchmark(
        "Sequential Monte Carlo, against genlm-control", "times genlm-control's tokens/s", smc.run
    ),
    "gflownet": Benchmark(
        "A GFlowNet training step, against gfn-lm-tuning",
        "times faster than gfn-lm-tuning",
        gflownet.run,
    ),
    "decode": Benchmark(
        "A decoding step, against its matrix products", "share that is products", decode.run
    ),
    "training_pass": Benchmark(
        "A training pass, against its matrix products",
        "share that is products",
        training_pass.run,
    ),
    "outside": Benchmark(
        "Python outside the language model", "share outside the model's calls", outside.run
    ),
    "overhead": Benchmark(
        "Python with a tiny language model, against plain Pyro traces",
        "times the other's CPU seconds",
        overhead.run,
    ),
    "masks": Benchmark("A constraint at every token", "added to the time of a step", masks.run),
    "resampling": Benchmark(
        "Resampling at every token", "added to the time, or memory", resampling.run
    ),
    "ray_actors": Benchmark(
        "Two actors of Ray, against one", "times one actor's samples/s", ray_actors.run
    ),
    "scaling": Benchmark("How time grows", "", scaling.run),
}


def run(name: str, bench: Bench, engine_bytes: int | None = None) -> Result:
    """Run one benchmark.

    Args:
        name: of ``BENCHMARKS``.
        bench: what to run it with.
        engine_bytes: what ``bench.prepare`` returned.
    """
    benchmark = BENCHMARKS[name]
    facts = circumstances(bench.lm, bench.mode, bench.repeats)
    facts["engine_bytes"] = engine_bytes
    rows: list[Row] = []
    skipped = None
    began = time.perf_counter()
    try:
        rows = benchmark.run(bench)
    except Skipped as reason:
        skipped = str(reason)
    facts["seconds"] = round(time.perf_counter() - began, 1)
    return Result(name, benchmark.title, benchmark.value_label, facts, rows, skipped)
