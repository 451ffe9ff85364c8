"""Resampling at every token, as a twisted SMC may do it.

    python -m benchmarks --only resampling

The same sequences are drawn with and without ``Decoding.select`` after every step, each slot
becoming a copy of a random one: about a third of the sequences die each time. What that adds to the
time of a step should stay below 10%, and 1,024 particles of 64 tokens below 8 GB (in full).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.bench import Bench
from benchmarks.measuring import synchronize
from benchmarks.results import Goal, Row
from lmppl.lm import begin_draws

GOAL = 0.10
MEMORY_GOAL = 8 << 30


def run(bench: Bench) -> list[Row]:
    prompt = bench.choose(smoke=8, quick=64, full=64)
    length = bench.choose(smoke=4, quick=32, full=32)
    sizes = bench.choose_particles(smoke=[3], quick=[64], full=[64, 256])
    rows = [compare(bench, num, length, prompt) for num in sizes]
    most = bench.choose(smoke=(5, 6), quick=None, full=(1024, 64))
    if most is not None:
        rows.append(largest(bench, *most, prompt))
    return rows


def compare(bench: Bench, num: int, length: int, prompt: int) -> Row:
    """With and without, ``num`` particles x ``length`` tokens."""
    selecting: list[float] = []
    with_it = drawing(bench, num, length, prompt, resample=True, selecting=selecting)
    without = drawing(bench, num, length, prompt, resample=False)
    sides = bench.in_turns({"resampled": with_it, "not resampled": without})
    # Not only what passes inside ``select``: it may leave work to the next step.
    values = [a / b - 1 for a, b in zip(sides[0].seconds, sides[1].seconds, strict=True)]
    shares = [a / b for a, b in zip(selecting[1:], sides[0].seconds, strict=True)]
    return Row.of(
        f"{num} particles x {length} tokens, prompt of {prompt}",
        sides,
        values,
        unit="%",
        goal=Goal(GOAL, at_least=False) if bench.mode != "smoke" else None,
        figures={"particles": num, "select_share": median(shares)},
        note=f"{median(shares):.1%} of the time passes inside select",
    )


def largest(bench: Bench, num: int, length: int, prompt: int) -> Row:
    """The memory of many particles."""
    work = drawing(bench, num, length, prompt, resample=True)
    sides = bench.in_turns({"resampled": work}, repeats=1)
    peak = sides[0].peak_bytes
    return Row(
        f"{num} particles x {length} tokens, prompt of {prompt}: memory",
        sides,
        value=None if peak is None else float(peak),
        unit="bytes",
        goal=Goal(MEMORY_GOAL, at_least=False),
    )


def drawing(
    bench: Bench,
    num: int,
    length: int,
    prompt: int,
    *,
    resample: bool,
    selecting: list[float] | None = None,
) -> Callable[[int], int]:
    """Draw sequences. The seconds inside ``select`` are appended to ``selecting``."""

    def work(number: int) -> int:
        draws = bench.draws(bench.tokens(prompt, number), num, length, seed=number)
        generator = torch.Generator().manual_seed(number)
        decoding = begin_draws([(bench.lm, draw) for draw in draws])
        inside = 0.0
        while not decoding.done:
            decoding.step()
            if resample and not decoding.done:
                ancestors = torch.randint(num, (num,), generator=generator).tolist()
                synchronize(bench.device)
                began = time.perf_counter()
                decoding.select(ancestors)
                synchronize(bench.device)
                inside += time.perf_counter() - began
        if selecting is not None:
            selecting.append(inside)
        return sum(map(len, decoding.token_ids))

    return work
