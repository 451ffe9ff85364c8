"""A teacher-forced pass with gradients through a LoRA adapter, against its matrix products.

    python -m benchmarks --only training_pass

The log-probabilities of 32 sequences of 64 tokens after one prompt of 64 are computed and
differentiated. With a frozen base that takes 4 N operations a token: 2 N forward and 2 N backward,
as no gradient of the weights is needed (N: elements of all matrices, the output layer included).
The tokens are the scored ones and the prompt's, once. The floor is that many operations at the rate
of ``products.py`` for as many rows. Expect it to be 40% of the pass.
"""

from __future__ import annotations

import torch

from benchmarks.bench import Bench
from benchmarks.products import Products
from benchmarks.results import Goal, Row
from lmppl.lm.batches.requests import Score

GOAL = 0.4


def run(bench: Bench) -> list[Row]:
    sizes = bench.choose(smoke=(2, 4, 8), quick=(32, 64, 64), full=(32, 64, 64))
    return [compare(bench, *sizes)]


def compare(bench: Bench, num: int, length: int, prompt: int) -> Row:
    """``num`` sequences of ``length`` tokens after ``prompt`` tokens."""
    adapter = bench.lm.adapter()
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    continuations = bench.random_tokens(num, length)
    products = Products(bench.lm.model)
    rows = num * length + prompt
    inputs = products.inputs(rows)

    def training_pass(number: int) -> int:
        x = bench.tokens(prompt, number)
        scored = adapter.score([Score(x, each) for each in continuations], grad=True)
        (-torch.stack([each.log_probs.sum() for each in scored]).sum()).backward()
        for parameter in parameters:
            parameter.grad = None
        return num * length

    def multiply(_: int) -> int:
        for _ in range(2):  # as many operations forward as backward
            products.run(inputs)
        return num * length

    sides = bench.in_turns({"training pass": training_pass, "matrix products": multiply})
    values = [b / a for a, b in zip(sides[0].seconds, sides[1].seconds, strict=True)]
    gflops = 2 * products.flops(rows) / sides[1].median / 1e9
    return Row.of(
        f"{num} x {length} tokens, prompt of {prompt}",
        sides,
        values,
        unit="%",
        goal=Goal(GOAL) if bench.mode != "smoke" else None,
        figures={"gflops": gflops},
        note=f"products at {gflops:,.0f} GFLOP/s",
    )
