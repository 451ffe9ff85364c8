"""Markov moves of SMC's particles (Gilks and Berzuini, 2001; Del Moral, Doucet and Jasra, 2006).

    after a resampling at a barrier, k times:
        every particle proposes another trace up to the same barrier, or to its end, and accepts it
        by the Metropolis-Hastings ratio of the joints up to there                      (``moves.py``)

Copies of one particle come apart so. The moves leave the target at the barrier invariant, hence the
weights stay, and the estimate of the evidence stays unbiased.
"""

from __future__ import annotations

from typing import Any

from lmppl.engines import moves
from lmppl.engines.base import State
from lmppl.engines.moves import ChainState
from lmppl.guides.laws import Laws
from lmppl.runtime import Particle, nth_seed, run_to_draws


def rejuvenate(state: State, laws: Laws, num: int, **options: Any) -> float:
    """Move every particle ``num`` times, to another trace up to the barrier at which they are.

    Args:
        state: particles of positive weight, some of which wait at a text.
        laws: what moves draw from.
        num: how many moves each makes.
        options: further ones of ``moves.plan_move``.

    Returns:
        The share of moves that were accepted.
    """
    barrier = _barrier(state.particles)
    slots = [slot for slot, particle in enumerate(state.particles) if particle.latents]
    states = [ChainState(state.particles[slot], laws) for slot in slots]
    seeds = [nth_seed(state.seed, slot) for slot in slots]
    first, accepted = num * state.stage, 0
    for turn in range(first, first + num):
        for k, made in enumerate(moves.move_all(states, seeds, turn, barrier=barrier, **options)):
            if made.state is not None:
                states[k] = made.state
                accepted += 1
    for slot, moved in zip(slots, states, strict=True):
        if moved.particle is not state.particles[slot]:
            _replace(state, slot, moved.particle)
    run_to_draws(state.particles)
    return accepted / max(1, num * len(slots))


def _barrier(particles: list[Particle]) -> int:
    """How many texts the runs have drawn that wait for a further one."""
    nums = {moves.num_texts(p.latents) for p in particles if not p.finished}
    if len(nums) != 1:
        raise ValueError(
            "rejuvenate= moves particles that wait at the same text, but they have drawn "
            f"{sorted(nums)} texts: a guide must draw the texts of the program in its order, one at "
            "a time"
        )
    return nums.pop()


def _replace(state: State, slot: int, moved: Particle) -> None:
    """Let a slot go on from where a move has come, with its own random streams."""
    old = state.particles[slot]
    if moved.site is None:  # it has ended
        state.particles[slot] = moved.fork(streams=old)
    else:
        proposer: Any = old.proposer
        if proposer is not None:
            proposer = proposer.resumed(moved.latents, proposer)
        new = moved.rerun(moved.sites, {}, seed=0, proposer=proposer, streams=old)
        state.particles[slot] = new
    old.close()
