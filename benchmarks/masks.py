"""The cost of a constraint: decoding steps with a mask over the vocabulary, and without.

    python -m benchmarks --only masks

64 sequences are drawn with a regular expression, and with a JSON schema, of texts that are longer than
what is drawn; and as many tokens without a constraint. (A few texts may end by EOS where the regular
expression matches, so seconds a token are compared.) Each sequence has a text and, after a few tokens,
a mask of its own. What is counted is the whole difference: the automaton, the masks, steering, drawing
by them. Expect at most 15% of a step.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.bench import Bench
from benchmarks.measuring import ratios
from benchmarks.results import Goal, Row
from lmppl.constraints import Constraint, JsonSchema, Regex
from lmppl.lm.batches.requests import Draw
from lmppl.lm.tokens.stopping import Stopping

GOAL = 0.15

CONSTRAINTS: dict[str, Callable[[], Constraint]] = {
    "regex": lambda: Regex(r"( ?([A-Z][a-z]*|[a-z]+|[0-9]+)[,;:.]?)*"),
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
    return [compare(bench, rows, name) for rows in sizes for name in names]


def compare(bench: Bench, rows: int, name: str) -> Row:
    """``rows`` sequences with the constraint of that name, and without."""
    prompt = bench.choose(smoke=8, quick=64, full=64)
    length = bench.choose(smoke=4, quick=16, full=32)
    stopping = Stopping(bench.lm.vocabulary, max_tokens=length, constraint=CONSTRAINTS[name]())

    def draws(number: int, constrained: bool) -> list[Draw]:
        plain = bench.draws(bench.tokens(prompt, number), rows, length, seed=number)
        if not constrained:
            return plain
        return [Draw(draw.prefix, stopping, draw.uniforms, steered=True) for draw in plain]

    def work(number: int, constrained: bool) -> int:
        found = bench.lm.draw(draws(number, constrained))
        return sum(len(drawn.token_ids) for drawn in found)

    sides = bench.in_turns(
        {
            "lmppl": lambda number: work(number, True),
            "without a constraint": lambda number: work(number, False),
        }
    )
    added = [1 / ratio - 1 for ratio in ratios(sides[1], sides[0])]
    return Row.of(
        f"{name}, {rows} x {length} tokens, prompt of {prompt}",
        sides,
        added,
        unit="%",
        goal=Goal(GOAL, at_least=False) if rows == 64 else None,
    )
