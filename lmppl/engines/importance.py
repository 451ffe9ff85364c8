"""Importance sampling: run the program N times, weigh each run.

    for i in 1..N:   z_i ~ q (the guide; the program's prior if there is none)
                     w_i = p(z_i, observations) / q(z_i)

``mean(w)`` is an unbiased estimate of the evidence, and the weighted runs estimate the posterior
(self-normalised). With the prior as proposal, the weights are the likelihoods.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmppl.engines.base import Engine, State
from lmppl.guides.mixture import check_prior_fraction


@dataclass(frozen=True)
class Importance(Engine):
    """Importance sampling with the prior or a guide as proposal.

    Args:
        prior_fraction: eps, mixes so many draws of the program into the guide's: the proposal is
            (1 - eps) guide + eps prior, and no trace weighs more than its likelihood / eps.
    """

    prior_fraction: float = 0.0

    name = "importance"

    def __post_init__(self) -> None:
        check_prior_fraction(self.prior_fraction)

    def sample(self, state: State) -> None:
        state.iid = True
        state.start(prior_fraction=self.prior_fraction, purpose="weights")
        while state.extend():
            state.draw()
