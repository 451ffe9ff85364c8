"""Markov moves of SMC's particles at a barrier (Gilks and Berzuini, 2001; Del Moral et al., 2006).

    at every barrier, k times:
        every particle that waits there proposes another trace that comes to the same barrier, and
        accepts it by the Metropolis-Hastings ratio of the joints up to there           (``moves.py``)

Copies of one particle come apart so. The moves leave the target at the barrier invariant, so the
weights stay, and the estimate of the evidence stays unbiased.

Whether a particle is moved depends on nothing but itself. Were all moved only after a resampling, the
other particles would decide, and the estimate would be biased: what is resampled is not distributed as
the target, it is only together with what is not. For the same reason a run that has ended stays as it
is, and is nowhere to move to: whether there is a further barrier is decided by the others.
"""

from __future__ import annotations

from typing import Any

from lmppl.engines import moves
from lmppl.engines.base import State
from lmppl.engines.moves import ChainState
from lmppl.guides.laws import Laws
from lmppl.runtime import Particle, nth_seed, run_to_draws


def rejuvenate(state: State, laws: Laws, num: int, **options: Any) -> float | None:
    """Move every particle that waits at a text ``num`` times, to another trace up to there.

    Args:
        state: particles at a barrier.
        laws: what moves draw from.
        num: how many moves each makes.
        options: further ones of ``moves.plan_move``.

    Returns:
        The share of moves that were accepted; None: there was nothing to move.
    """
    members = enumerate(state.particles)
    slots = [slot for slot, particle in members if not particle.finished and particle.latents]
    states = [ChainState(state.particles[slot], laws) for slot in slots]
    seeds = [nth_seed(state.seed, slot) for slot in slots]
    first, accepted = num * state.stage, 0
    for turn in range(first, first + num):
        for k, made in enumerate(moves.move_all(states, seeds, turn, at_barrier=True, **options)):
            if made.state is not None:
                states[k] = made.state
                accepted += 1
    for slot, moved in zip(slots, states, strict=True):
        if moved.particle is not state.particles[slot]:
            _replace(state, slot, moved.particle)
    run_to_draws(state.particles)
    return accepted / (num * len(slots)) if slots else None


def _replace(state: State, slot: int, moved: Particle) -> None:
    """Let a slot go on from where a move has come, with its own random streams."""
    old = state.particles[slot]
    proposer: Any = old.proposer
    if proposer is not None:
        proposer = proposer.resumed(moved.latents, proposer)
    new = moved.rerun(moved.sites, {}, seed=0, proposer=proposer, streams=old)
    state.particles[slot] = new
    old.close()
