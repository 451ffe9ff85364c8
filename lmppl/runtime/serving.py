"""Serve what particles wait for, together.

``start`` makes particles and runs each to its first wait; ``settle`` scores until nobody waits for
a score; ``draw`` draws for everyone who waits for a draw. An engine is a loop over these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from lmppl.distributions import draw_texts, score_texts
from lmppl.runtime.particle import Particle, Proposer


def fresh_seed(seed: int | None) -> int:
    """``seed``, or one taken from torch's random stream (so that ``pyro.set_rng_seed`` governs)."""
    return int(torch.randint(2**62, ())) if seed is None else int(seed)


def slot_seeds(seed: int, num: int) -> list[int]:
    """Seeds of ``num`` independent streams."""
    return [int(s) for s in np.random.SeedSequence(seed).generate_state(num, np.uint64)]


def start(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    num: int,
    *,
    seed: int,
    proposer: Callable[[int, int], Proposer] | None = None,
    **options: Any,
) -> list[Particle]:
    """``num`` particles of one program, each at its first wait.

    Args:
        program: a Pyro program.
        args: its positional arguments.
        num: how many.
        seed: of all their streams.
        proposer: makes a particle's proposer from its slot and a seed.
        options: further arguments of ``Particle``.
    """
    particles = []
    for slot, each in enumerate(slot_seeds(seed, num)):
        own = None if proposer is None else proposer(slot, each ^ 0x5DEECE66D)
        particles.append(Particle(program, args, seed=each, proposer=own, slot=slot, **options))
    for particle in particles:
        particle.resume()
    return particles


def settle(particles: Sequence[Particle], *, grad: bool = False) -> None:
    """Answer scores and hidden states, in batched rounds, until all wait for a draw or have ended."""
    while True:
        scores = [(p, p.waiting) for p in particles if p.waiting and p.waiting.kind == "score"]
        states = [(p, p.waiting) for p in particles if p.waiting and p.waiting.kind == "hidden"]
        if not scores and not states:
            return
        if scores:
            answers = score_texts(
                [wait.fn for _, wait in scores],
                [wait.value for _, wait in scores if wait.value is not None],
                [wait.name for _, wait in scores],
                grad=grad,
                closing=any(wait.closing for _, wait in scores),
            )
            for (particle, _), answer in zip(scores, answers, strict=True):
                particle.resume(answer)
        for lm in {id(wait.fn): wait.fn for _, wait in states}.values():
            members = [(particle, wait) for particle, wait in states if wait.fn is lm]
            hidden = lm.hidden([wait.prefix for _, wait in members])
            for (particle, _), state in zip(members, hidden.cpu(), strict=True):
                particle.resume(state)


def draw(particles: Sequence[Particle]) -> None:
    """Draw, in one batched call, for every particle that waits for a draw."""
    waiting = [p for p in particles if p.waiting is not None and p.waiting.kind == "draw"]
    waits = [p.waiting for p in waiting if p.waiting is not None]
    if not waits:
        return
    answers = draw_texts(
        [w.fn for w in waits],
        [w.uniforms for w in waits if w.uniforms is not None],
        [w.name for w in waits],
    )
    for particle, answer in zip(waiting, answers, strict=True):
        particle.resume(answer)


def complete(particles: Sequence[Particle]) -> None:
    """Run all to their ends."""
    settle(particles)
    while any(not p.finished for p in particles):
        draw(particles)
        settle(particles)


@contextmanager
def closing(particles: list[Particle]) -> Iterator[list[Particle]]:
    """Ends whatever is still suspended when an engine leaves, also on an exception.

    A suspended program must not be left to the garbage collector: its ``finally`` blocks would run
    in somebody else's handlers.
    """
    with ExitStack() as ends:
        try:
            yield particles
        finally:
            # All of them, also if the ``finally`` block of one raises.
            for particle in reversed(particles):
                ends.callback(particle.close)
