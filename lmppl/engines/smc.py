"""Sequential Monte Carlo over the latent sites of a program.

    particles run to their first latent site; log w_i = 0
    until all have ended:
        among the slots of the M particles that wait or are dead:
            if ESS(w) < threshold * M:                       (with twist="flow": of w psi)
                ancestors ~ w;  fork;  log w = log mean w
        (rejuvenate: k Markov moves of each that waits, up to here;  w stays)
        every particle draws its latent site (from the guide, or the program's prior)
        and runs on, scoring observations and factors, to the next latent site: the *barrier*
        log w_i += log p - log q of what happened since the last barrier

``mean(w)`` is an unbiased estimate of the evidence at every number of particles and threshold
(Del Moral, 2004, section 7.4). Particles meet at barriers, because comparing one that has paid for its
observation with one that has not would favour whoever pays late. For the same reason a run that has
ended, where others go on, keeps its slot and its weight: it has paid for everything, and they may not
have paid for anything.

A guide's particles weigh p / q of what they have drawn, and a guide draws with an eye to what is
observed later: whoever is promising weighs little, until the observation has been paid. So resampling
by w undoes what the guide knows, and ``twist="flow"`` compares them by the guide's own law instead.

*Within* a site two things distinguish one partial text from another: what a global constraint has cost
it so far, where the program itself draws it, and a twist (twisted SMC; Zhao et al., 2024, arXiv
2404.17546); see ``twists.py``. Without both and with the prior as proposal, SMC on a program with one
latent site *is* importance sampling with resampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lmppl import runtime
from lmppl.checks import check_choice, check_int, check_number
from lmppl.engines import twists
from lmppl.engines.base import Engine, State
from lmppl.engines.genealogy import Genealogy
from lmppl.engines.islands import on_islands
from lmppl.engines.rejuvenation import rejuvenate
from lmppl.engines.resampling import SCHEMES, settle_in_place
from lmppl.engines.twists import Twist
from lmppl.guides.laws import laws_of
from lmppl.guides.mixture import check_prior_fraction
from lmppl.runtime import log_mean_exp

# A fifth costs a twist that helps a tenth of its precision. Of fewer slots than a few the defence
# would be noise; and with more than half of all there would be no twist.
_DEFENSE, _DEFENDED_SLOTS, _MOST_DEFENSE = 0.2, 4, 0.5


@dataclass(frozen=True)
class SMC(Engine):
    """Sequential Monte Carlo. What became of its particles, the posterior shows by ``plot_particles``.

    Args:
        ess_threshold: resample when the effective sample size of the particles that go on falls below
            this fraction of their number (dead ones count); 0: never, 1: at every barrier.
        resampling: ``"systematic"``, ``"stratified"``, ``"multinomial"`` or ``"residual"``.
        twist: how texts are compared within a site, beside what a constraint on them has cost so far,
            which always counts. None: not at all. ``"lookahead"``: by the
            likelihood of what follows, up to the next latent site, were the text closed here.
            ``"flow"``: by what a guide knows of the end. Between sites all that ``guide=`` has drawn
            are worth the same (not with ``rejuvenate``); the last text of a program is compared by
            R / q of a run on the text closed here, equal for all texts if the guide is perfect. A
            callable ``twist(text) -> float`` gives log psi of a text so far; a dict, callables by
            site.
        twist_every: texts are compared each time they have grown by so many tokens. A
            comparison by ``"lookahead"`` or ``"flow"`` scores what follows for every text.
        twist_defense: which share of the particles is resampled without regard to the twist, which
            may mislead; 0: none. None: a fifth, but at least 4 of them, and at most half.
        prior_fraction: as of ``Importance``, at every site: who draws it is chosen by the
            probability that the guide, or the program, has drawn the latents so far.
        rejuvenate: so many Markov moves (those of ``lmppl.MCMC``) of each particle at every barrier,
            after the resampling if there is one.
        islands: in so many parts, each resampled by itself, that make up one posterior (see ``pool``).
            Part k has the seed ``lmppl.runtime.nth_seed(seed, k)``; 1: there are no parts.

    Raises:
        TypeError: for an option of another type.
        ValueError: for one out of range, and for ``rejuvenate`` beside ``prior_fraction``.
    """

    ess_threshold: float = 0.5
    resampling: Literal["systematic", "stratified", "multinomial", "residual"] = "systematic"
    twist: Literal["lookahead", "flow"] | Twist | Mapping[str, Twist] | None = None
    twist_every: int = 1
    twist_defense: float | None = None
    prior_fraction: float = 0.0
    rejuvenate: int = 0
    islands: int = 1

    name = "smc"

    def __post_init__(self) -> None:
        check_number("ess_threshold", self.ess_threshold, least=0, most=1)
        check_choice("resampling", self.resampling, sorted(SCHEMES))
        check_int("twist_every", self.twist_every)
        if self.twist_defense is not None:
            check_number("twist_defense", self.twist_defense, least=0, most=1)
        functions = self.twist.values() if isinstance(self.twist, Mapping) else [self.twist]
        if self.twist not in (None, "lookahead", "flow") and not all(map(callable, functions)):
            raise ValueError(
                f"twist={self.twist!r}, allowed: None, 'lookahead', 'flow', a callable that gives "
                "log psi of a text, or a dict of callables by site name"
            )
        check_int("rejuvenate", self.rejuvenate, least=0)
        check_int("islands", self.islands)
        if check_prior_fraction(self.prior_fraction) and self.rejuvenate:
            raise ValueError(
                "rejuvenate= with prior_fraction=: who draws the next site, the guide or the program, "
                "depends on who drew the last ones, which a moved particle has not. Leave out one of "
                "the two"
            )

    def sample(self, state: State) -> None:
        if self.twist == "flow" and state.guide is None:
            raise ValueError(
                "twist='flow' compares texts by what a guide knows: give guide=, an LMGuide or a "
                "guide program, or take twist='lookahead'"
            )
        sites = set[str]().union(*on_islands(state, self.islands, self._on_island))
        unmet = self.twist.keys() - sites if isinstance(self.twist, Mapping) else ()
        if unmet and state.ess > 0.0:
            state.warn(
                f"twist= names {', '.join(map(repr, sorted(unmet)))}, where no particle drew a text "
                f"token by token; sites where one did: {', '.join(sorted(sites)) or 'none'}. (A site "
                "may be on a branch that none took.)"
            )

    def _on_island(self, state: State) -> set[str]:
        """The algorithm on one island. Returns the sites at which texts were drawn token by token."""
        state.start(prior_fraction=self.prior_fraction, purpose="weights")
        laws = laws_of(state.guide, state.args) if self.rejuvenate else None
        if laws is not None:
            state.info["rejuvenation"] = []
        state.info["resamplings"] = 0
        state.genealogy = genealogy = Genealogy()
        sites: set[str] = set()
        while state.extend():
            self._resample(state, genealogy)
            if laws is not None:
                acceptance = rejuvenate(state, laws, self.rejuvenate)
                state.info["rejuvenation"] += [] if acceptance is None else [acceptance]
            sites |= {wait.name for wait in twists.text_waits(state.particles).values()}
            self._draw(state, genealogy)
        everyone = torch.arange(len(state.particles))
        genealogy.at_barrier(state.particles, state.log_weights, everyone)
        return sites

    def _resample(self, state: State, genealogy: Genealogy) -> None:
        """If the particles that go on are unequal, let copies of them take their slots and those of the
        dead."""
        particles, log_weights = state.particles, state.log_weights
        has_ended = torch.tensor([particle.finished for particle in particles])
        slots = (~has_ended | (log_weights == -torch.inf)).nonzero().flatten()
        among = log_weights[slots]
        going_on = [particle for particle in particles if not particle.finished]
        # Moves bring particles to the program's law up to here, of which the guide's flow says nothing.
        twist = None if self.rejuvenate else self.twist
        log_psi = twists.log_psi_between(twist, going_on, among)
        compared = among
        if log_psi is not None:
            a = twists.shares(among, log_psi, self._defense(len(slots)))
            compared = a.log() + among.logsumexp(0)
        shown = log_weights.index_copy(0, slots, compared)
        if not 0.0 < runtime.ess(compared) < self.ess_threshold * len(slots):
            genealogy.at_barrier(particles, shown, slots)
            return
        picked = self._ancestors((compared - compared.max()).exp(), state.generator)
        ancestors = torch.arange(len(log_weights))
        ancestors[slots] = slots[picked]
        genealogy.at_barrier(particles, shown, slots, ancestors.tolist())
        state.select(ancestors.tolist())
        copies = (among - compared)[picked] + log_mean_exp(compared)
        state.log_weights = log_weights.index_copy(0, slots, copies)
        state.info["resamplings"] += 1

    def _ancestors(self, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Ancestors with probability in proportion to ``weights``, both (N,)."""
        return settle_in_place(SCHEMES[self.resampling](weights, generator))

    def _draw(self, state: State, genealogy: Genealogy) -> None:
        """Every waiting particle draws its site: texts of which something is known on the way token by
        token, the others at once."""
        twist = twists.twist_function_of(self.twist, state)
        waits = twists.text_waits(state.particles)
        known = [i for i in waits if twist.is_known(state.particles[i])]
        others = [state.particles[i] for i in set(range(len(state.particles))) - set(known)]
        # Known ones first, as their forks still wait at this draw.
        if known:
            state.info["resamplings"] += twists.draw(
                state,
                known,
                twist,
                lambda weights: self._ancestors(weights, state.generator),
                genealogy,
                threshold=self.ess_threshold,
                every=self.twist_every,
                defense=self._defense(len(known)),
            )
        runtime.serve_draws(others)

    def _defense(self, num: int) -> float:
        """The defended share of so many slots."""
        usual = min(_MOST_DEFENSE, max(_DEFENSE, _DEFENDED_SLOTS / num))
        return usual if self.twist_defense is None else self.twist_defense
