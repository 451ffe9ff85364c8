"""How the time of sampling grows with the number of particles, their length, and the prompt.

    python -m benchmarks --only scaling

Expect the time a particle to fall until the processor is busy; the time a token to stay almost
level with the length; and the prompt, computed once, to matter little.
"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.measuring import Timed
from benchmarks.results import Row


def run(bench: Bench) -> list[Row]:
    particles = bench.choose_particles(smoke=[3, 6], quick=[64, 256], full=[64, 256, 1024])
    lengths = bench.choose(smoke=[4, 6], quick=[16, 32], full=[16, 64, 256])
    prompts = bench.choose(smoke=[8, 16], quick=[64, 512], full=[32, 128, 512, 2048])
    num, length, prompt = bench.choose(smoke=(3, 4, 8), quick=(64, 32, 64), full=(64, 32, 64))
    cases = [
        *(("particles", n, length, prompt) for n in particles),
        *(("tokens", num, n, prompt) for n in lengths),
        *(("prompt", num, length, n) for n in prompts),
    ]
    sizes = dict.fromkeys((num, length, prompt) for _, num, length, prompt in cases)
    measured = {each: measure(bench, *each) for each in sizes}
    return [_row(axis, n, t, p, measured[n, t, p]) for axis, n, t, p in cases]


def measure(bench: Bench, num: int, length: int, prompt: int) -> Timed:
    """``num`` continuations of ``length`` tokens after ``prompt`` tokens."""

    def work(number: int) -> int:
        draws = bench.draws(bench.tokens(prompt, number), num, length, seed=number)
        return sum(len(drawn.token_ids) for drawn in bench.lm.draw(draws))

    (side,) = bench.in_turns({"lmppl": work}, repeats=max(1, bench.repeats - 2))
    return side


def _row(axis: str, num: int, length: int, prompt: int, side: Timed) -> Row:
    return Row(
        f"{axis}: {num} x {length} tokens, prompt of {prompt}",
        [side],
        figures={"particles": num, "tokens": length, "prompt": prompt, "axis": axis},
    )
