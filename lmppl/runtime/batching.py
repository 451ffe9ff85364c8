"""Serve what particles wait for, together.

``start`` makes particles and runs each to its first wait; ``run_to_draws`` scores until nobody waits
for a score; ``serve_draws`` draws for everyone who waits for a draw. An engine is a loop over these.
(Whether it has the language models to itself is not its business: see ``scheduler``.)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from lmppl.checks import check_seed
from lmppl.exclusive import exclusive
from lmppl.runtime.coroutine import GlobalState
from lmppl.runtime.particle import Particle, ProposerFactory
from lmppl.runtime.scheduler import ask
from lmppl.runtime.waits import DrawWait, HiddenWait, LateScoresWait, ModelWait, ScoreWait


def fresh_seed(seed: int | None) -> int:
    """``seed``, or one taken from torch's random stream (so that ``pyro.set_rng_seed`` governs)."""
    seed = check_seed(seed)
    with exclusive():
        return int(torch.randint(2**62, ())) if seed is None else seed


def slot_seeds(seed: int, num: int) -> list[int]:
    """Seeds of ``num`` independent streams."""
    return [int(s) for s in np.random.SeedSequence(seed).generate_state(num, np.uint64)]


def nth_seed(seed: int, index: int) -> int:
    """Seed of the ``index``-th of endlessly many independent streams of ``seed``, below ``2**63``."""
    stream = np.random.SeedSequence(seed, spawn_key=(index,))
    return int(stream.generate_state(1, np.uint64)[0] >> np.uint64(1))


def start(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    num: int,
    *,
    seed: int,
    proposer: ProposerFactory | None = None,
    slots: Iterable[int] | None = None,
    **options: Any,
) -> list[Particle]:
    """``num`` particles of ``program(*args)``, each at its first wait. ``seed`` is that of all their
    streams, ``slots`` are those of them that are started (None: all), ``options`` are further arguments
    of ``Particle``."""
    particles, shared = [], dict[Any, Any]()
    seeds = slot_seeds(seed, num)
    for slot in range(num) if slots is None else slots:
        made = None if proposer is None else proposer(slot, seeds[slot] ^ 0x5DEECE66D)
        options |= {"seed": seeds[slot], "proposer": made, "slot": slot, "shared": shared}
        particles.append(Particle(program, args, **options))
    try:
        resume(particles)
    except BaseException:
        with ending(particles):
            raise
    return particles


def resume(particles: Sequence[Particle], answers: Sequence[Any] | None = None) -> None:
    """Run each to its next wait or to its end, with the answers to what they wait for; None: they
    begin."""
    outer = GlobalState()
    try:
        for i, particle in enumerate(particles):
            particle.resume(None if answers is None else answers[i], restore=False)
    finally:
        outer.install()


def run_to_draws(particles: Sequence[Particle], *, grad: bool = False) -> None:
    """Answer scores and hidden states, in batched rounds, until all wait for a draw or have ended.
    (Late scores wait for the last run to end, to be asked for at once.)"""
    while True:
        asking = [_waiting(particles, wait) for wait in (ScoreWait, HiddenWait)]
        if not any(asking) and not _waiting(particles, DrawWait):
            asking = [_waiting(particles, LateScoresWait)]
        if not any(asking):
            return
        for members in asking:
            _serve(members, grad=grad)


def serve_draws(particles: Sequence[Particle]) -> None:
    """Draw, in one batched call, for every particle that waits for a draw."""
    _serve(_waiting(particles, DrawWait))


def _waiting(particles: Sequence[Particle], wait: type[ModelWait]) -> list[Particle]:
    return [particle for particle in particles if type(particle.waiting) is wait]


def _serve(particles: Sequence[Particle], *, grad: bool = False) -> None:
    """Give each what it waits for, which is of one type."""
    if not particles:
        return
    answers = ask([p.waiting for p in particles if isinstance(p.waiting, ModelWait)], grad=grad)
    resume(particles, answers)


def run_to_end(particles: Sequence[Particle]) -> None:
    """Run all to their ends."""
    run_to_draws(particles)
    while any(not p.finished for p in particles):
        serve_draws(particles)
        run_to_draws(particles)


_COLLECT_AFTER = 10_000


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python's cyclic garbage collector look only after every 10,000 new objects.

    While many runs live, it would go through all of them again and again: a quarter of the time of a
    training step of 512 traces.
    """
    before = gc.get_threshold()
    if not 0 < before[0] < _COLLECT_AFTER:  # the user has switched it off, or so has a caller
        yield
        return
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def ending(particles: list[Any]) -> Iterator[list[Any]]:
    """Ends whatever is still suspended when an engine leaves, also on an exception.

    A suspended program must not be left to the garbage collector: its ``finally`` blocks would run
    in somebody else's handlers.
    """
    with rare_collections(), ExitStack() as ends:
        try:
            yield particles
        finally:
            ends.enter_context(exclusive())
            # All of them, also if the ``finally`` block of one raises.
            for particle in reversed(particles):
                ends.callback(particle.close)
