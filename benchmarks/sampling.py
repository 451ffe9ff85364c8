"""Sampling N continuations of one prompt, against ``model.generate``.

    python -m benchmarks --only sampling

Both draw exactly as many tokens, untruncated, at temperature 1. ``generate`` runs on a model that
was loaded in the ordinary way, without gradients, and isn't asked for log-probabilities, which
lmppl gives with every token. Expect 3 times its speed at 64 continuations, more with more of them
or a longer prompt.
"""

from __future__ import annotations

import torch

from benchmarks.bench import Bench
from benchmarks.measuring import ratios
from benchmarks.results import Goal, Row

GOALS = {(64, 64): 3.0, (256, 64): 4.0, (64, 512): 6.0}  # by continuations and prompt
FLOAT32_GOALS = {(64, 64): 2.7}


def run(bench: Bench) -> list[Row]:
    prompts = bench.choose(smoke=[8], quick=[64], full=[64, 512])
    length = bench.choose(smoke=4, quick=32, full=32)
    particles = bench.choose_particles(smoke=[3], quick=[64], full=[64, 256])
    # The longer prompt with the smallest number only: generate computes it once for each.
    cases = [
        (num, prompt)
        for prompt in prompts
        for num in (particles if prompt == prompts[0] else particles[:1])
    ]
    return [compare(bench, num, prompt, length) for num, prompt in cases]


def compare(bench: Bench, num: int, prompt: int, length: int) -> Row:
    """``num`` continuations of ``length`` tokens after ``prompt`` tokens."""
    model = bench.ordinary

    def ours(number: int) -> int:
        draws = bench.draws(bench.tokens(prompt, number), num, length, seed=number)
        return sum(len(drawn.token_ids) for drawn in bench.lm.draw(draws))

    @torch.no_grad()
    def generate(number: int) -> int:
        ids = torch.tensor([bench.tokens(prompt, number)], device=bench.device)
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=num,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
        )
        return generated[:, prompt:].numel()

    sides = bench.in_turns({"lmppl": ours, "generate": generate})
    goals = FLOAT32_GOALS if bench.lm.dtype == torch.float32 else GOALS
    goal = goals.get((num, prompt))
    return Row.of(
        f"{num} x {length} tokens, prompt of {prompt}",
        sides,
        ratios(sides[1], sides[0]),
        unit="x",
        goal=None if goal is None else Goal(goal),
    )
