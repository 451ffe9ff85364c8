"""The cost of a constraint: decoding steps with a mask over the vocabulary, and without.

    python -m benchmarks --only masks

64 sequences are drawn with a regular expression, and with a JSON schema, and as many tokens without a
constraint. Either way hardly any text ends before its last token, so that all steps have as many rows:
the schema needs more tokens than are drawn, the regular expression ends in a character that no text
holds elsewhere. Each sequence has a text and, after a few tokens, a mask of its own. What is counted
is the whole difference: the automaton, the masks, steering, drawing by them. Expect at most 15% of a
step. On a CPU these are CPU seconds of all threads, which hardly depend on what else runs.

The last row is what a constraint adds to a guide's training: the same texts are scored with gradients,
each step renormalised over what the regular expression allows, and over everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.measuring import Local, ratios
from benchmarks.results import Goal, Row
from lmppl.constraints import Constraint, JsonSchema, Regex
from lmppl.lm.batches.requests import Allowed, Draw, Score
from lmppl.lm.tokens.stopping import Stopping

GOAL = 0.15
SIDES = {"lmppl": True, "without a constraint": False}  # whether there is a constraint

CONSTRAINTS: dict[str, Callable[[], Constraint]] = {
    "regex": lambda: Regex(r"( ?([A-Z][a-z]*|[a-z]+|[0-9]+)[,;:.]?)*@"),
    "JSON schema": lambda: JsonSchema(
        {
            "type": "array",
            "minItems": 9,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                "required": ["name", "age"],
                "additionalProperties": False,
            },
        }
    ),
}


def run(bench: Bench) -> list[Row]:
    sizes = bench.choose_particles(smoke=[3], quick=[64], full=[64])
    names = bench.choose(smoke=["regex"], quick=[*CONSTRAINTS], full=[*CONSTRAINTS])
    decoding = [compare(bench, rows, name) for rows in sizes for name in names]
    return [
        *decoding,
        compare_training(bench, *bench.choose(smoke=(3, 4), quick=(32, 12), full=(32, 12))),
    ]


def compare_training(bench: Bench, num: int, length: int) -> Row:
    """``num`` texts of up to ``length`` tokens, scored with gradients with and without masks."""
    prompt = bench.choose(smoke=8, quick=64, full=64)
    adapter = bench.lm.adapter()
    stopping = Stopping(bench.lm.vocabulary, max_tokens=length, constraint=CONSTRAINTS["regex"]())
    allowed = Allowed(stopping, steered=True)
    drawn: dict[int, list[Score]] = {}

    def scores(number: int) -> list[Score]:
        """The requests of a repetition, whose texts are drawn before it is timed."""
        if number not in drawn:
            plain = bench.draws(bench.tokens(prompt, number), num, length, seed=number)
            draws = [Draw(d.prefix, stopping, d.uniforms, steered=True) for d in plain]
            texts = zip(draws, bench.lm.draw(draws), strict=True)
            drawn[number] = [Score(draw.prefix, text.token_ids) for draw, text in texts]
        return drawn[number]

    def work(number: int, constrained: bool) -> int:
        requests = scores(number)
        if constrained:
            requests = [replace(request, allowed=allowed) for request in requests]
        scored = adapter.score(requests, grad=True)
        (-torch.stack([text.log_prob for text in scored]).sum()).backward()
        return sum(len(request.continuation) for request in requests)

    for number in range(bench.repeats + 1):
        scores(number)
    case = f"training, regex, {num} x {length} tokens, prompt of {prompt}"
    sides = {side: partial(work, constrained=value) for side, value in SIDES.items()}
    return row_of(bench, case, sides, has_goal=num == 32)


def compare(bench: Bench, rows: int, name: str) -> Row:
    """``rows`` sequences with the constraint of that name, and without."""
    prompt = bench.choose(smoke=8, quick=64, full=64)
    length = bench.choose(smoke=4, quick=16, full=32)
    stopping = Stopping(bench.lm.vocabulary, max_tokens=length, constraint=CONSTRAINTS[name]())

    def draws(number: int, constrained: bool) -> list[Draw]:
        # A prompt for each side, as the one that comes second would find the first one's in the cache.
        plain = bench.draws(
            bench.tokens(prompt, 2 * number + constrained), rows, length, seed=number
        )
        if not constrained:
            return plain
        return [Draw(draw.prefix, stopping, draw.uniforms, steered=True) for draw in plain]

    def work(number: int, constrained: bool) -> int:
        found = bench.lm.draw(draws(number, constrained))
        return sum(len(drawn.token_ids) for drawn in found)

    clock = time.process_time if bench.device.type == "cpu" else time.perf_counter
    sides = {
        side: Local(partial(work, constrained=value), bench.device, clock)
        for side, value in SIDES.items()
    }
    case = f"{name}, {rows} x {length} tokens, prompt of {prompt}"
    return row_of(bench, case, sides, has_goal=rows == 64)


def row_of(bench: Bench, case: str, sides: dict[str, Any], *, has_goal: bool) -> Row:
    """What the constraint adds to the seconds a token of the other side."""
    measured = bench.in_turns(sides)
    added = [1 / ratio - 1 for ratio in ratios(measured[1], measured[0])]
    goal = Goal(GOAL, at_least=False) if has_goal else None
    return Row.of(case, measured, added, unit="%", goal=goal)
