"""How the time of sampling grows with the number of particles, their length, and the prompt.

    python -m benchmarks --only scaling

Expect the time a particle to fall until the processor is busy; the time a token to stay almost
level with the length; and the prompt, computed once, to matter little.
"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.results import Row

AXES = ("particles", "tokens", "prompt")


def run(bench: Bench) -> list[Row]:
    particles = bench.choose_particles(smoke=[3, 6], quick=[64, 256], full=[64, 256, 1024])
    lengths = bench.choose(smoke=[4, 6], quick=[16, 64], full=[16, 64, 256])
    prompts = bench.choose(smoke=[8, 16], quick=[32, 512], full=[32, 128, 512, 2048])
    num, length, prompt = bench.choose(smoke=(3, 4, 8), quick=(64, 32, 64), full=(64, 32, 64))
    cases = [
        *(("particles", n, length, prompt) for n in particles),
        *(("tokens", num, n, prompt) for n in lengths),
        *(("prompt", num, length, n) for n in prompts),
    ]
    return [measure(bench, *case) for case in cases]


def measure(bench: Bench, axis: str, num: int, length: int, prompt: int) -> Row:
    """One point on an axis."""

    def work(number: int) -> int:
        draws = bench.draws(bench.tokens(prompt, number), num, length, seed=number)
        return sum(len(drawn.token_ids) for drawn in bench.lm.draw(draws))

    (side,) = bench.in_turns({"lmppl": work}, repeats=max(1, bench.repeats - 2))
    figures = {"particles": num, "tokens": length, "prompt": prompt, "axis": axis}
    return Row(
        f"{axis}: {num} particles x {length} tokens, prompt of {prompt}",
        [side],
        figures=figures,
    )
