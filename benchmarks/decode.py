"""One decoding step of B sequences, against the matrix products in it.

    python -m benchmarks --only decode [--dtype float32]

A step reads one token of every sequence, draws the next one and does the bookkeeping. The products
alone (``products.py``) are its floor; the rest is attention, norms, sampling and Python. Expect the
products to be 60% of a step at 256 sequences.
"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.products import Products
from benchmarks.results import Goal, Row
from lmppl.lm import begin_draws

GOALS = {256: 0.6}
FIRST = 4  # steps that are not counted: the prompt, and what is allocated at first


def run(bench: Bench) -> list[Row]:
    prompt = bench.choose(smoke=8, quick=64, full=64)
    steps = bench.choose(smoke=2, quick=12, full=24)
    sizes = bench.choose_particles(smoke=[3], quick=[64, 256], full=[16, 64, 256, 1024])
    return [compare(bench, num, prompt, steps) for num in sizes]


def compare(bench: Bench, num: int, prompt: int, steps: int) -> Row:
    """``num`` sequences, over ``steps`` steps."""
    draws = bench.draws(bench.tokens(prompt), num, FIRST + 1 + steps)
    decoding = begin_draws([(bench.lm, draw) for draw in draws])
    for _ in range(FIRST):
        decoding.step()
    products = Products(bench.lm.model)
    inputs = products.inputs(num)

    def step(_: int) -> int:
        decoding.step()
        return num

    def multiply(_: int) -> int:
        products.run(inputs)
        return num

    sides = bench.in_turns({"decoding step": step, "matrix products": multiply}, repeats=steps)
    values = [b / a for a, b in zip(sides[0].seconds, sides[1].seconds, strict=True)]
    gflops = products.flops(num) / sides[1].median / 1e9
    return Row.of(
        f"{num} sequences, prompt of {prompt}",
        sides,
        values,
        unit="%",
        goal=Goal(GOALS[num]) if num in GOALS else None,
        figures={"sequences": num, "gflops": gflops},
        note=f"products at {gflops:,.0f} GFLOP/s; tokens drawn so far {FIRST} to {FIRST + steps}",
    )
