"""What the runtime costs: the share of the time that many particles spend outside the LM.

    python -m benchmarks --only outside [--particles 64 256]

A three-site program (latent, latent, observed) is run by importance sampling. "Outside the model's
calls" is everything but the LM's own batched calls (drawing and scoring of token sequences); the
second figure counts only its forward passes as LM, so also sampling and bookkeeping per token as
overhead. Expect less than 10% for the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

import lmppl
from benchmarks.bench import Bench
from benchmarks.measuring import synchronize
from benchmarks.results import Goal, Row
from lmppl import lm_sample
from lmppl.lm.network.runner import Runner

GOAL = 0.10


class Clock:
    """Seconds spent inside wrapped methods (not counted twice when they nest)."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self._depth, self._device = 0.0, 0, device

    @contextmanager
    def wrapping(self, owner: Any, *names: str) -> Iterator[None]:
        originals = {name: getattr(owner, name) for name in names}
        for name, original in originals.items():
            setattr(owner, name, self._timed(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(owner, name, original)

    def _timed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    synchronize(self._device)
                    self.seconds += time.perf_counter() - began

        return timed


def run(bench: Bench) -> list[Row]:
    sizes = bench.choose_particles(smoke=[4], quick=[256], full=[64, 256])
    length = bench.choose(smoke=4, quick=16, full=16)
    return [measure(bench, particles, length) for particles in sizes]


def measure(bench: Bench, particles: int, length: int) -> Row:
    """``particles`` particles, two latent texts of at most ``length`` tokens each."""
    calls, passes = Clock(bench.device), Clock(bench.device)
    outside: list[tuple[float, float]] = []  # of calls, of forward passes

    def story(x: str, y: str) -> lmppl.Text:
        z = lm_sample("z", x, max_tokens=length, stop=".")
        w = lm_sample("w", [x, z], max_tokens=length, stop=".")
        lm_sample("y", [x, z, w], obs=y)
        return w

    def work(number: int) -> int:
        calls.seconds = passes.seconds = 0.0
        began = time.perf_counter()
        posterior = lmppl.infer(
            story,
            bench.text(length // 2, number),
            bench.text(length // 2, number + 1),
            lm=bench.lm,
            method="importance",
            num_samples=particles,
            seed=number,
            progress=False,
        )
        total = time.perf_counter() - began
        outside.append((1 - calls.seconds / total, 1 - passes.seconds / total))
        return posterior.info["tokens_sampled"] + posterior.info["tokens_scored"]

    with (
        calls.wrapping(lmppl.LM, "draw", "score"),
        passes.wrapping(Runner, "run_cached", "run_plain"),
    ):
        # Shares vary little, and a repetition is long.
        sides = bench.in_turns({"lmppl": work}, repeats=max(1, bench.repeats // 2))
    measured = outside[1:]  # the first was the warm-up
    beyond_passes = median(share for _, share in measured)
    return Row.of(
        f"{particles} particles, three sites",
        sides,
        [share for share, _ in measured],
        unit="%",
        goal=Goal(GOAL, at_least=False) if particles == 256 else None,
        figures={"particles": particles, "outside_passes": beyond_passes},
        note=f"outside forward passes: {beyond_passes:.0%}",
    )
