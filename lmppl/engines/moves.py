"""Metropolis-Hastings moves of whole traces: the kernel that ``mcmc`` and ``SMC(rejuvenate=k)`` share.

    a move from the trace z with K latent sites:
        choose one of them, and one of the n cuts of its value     (a text's tokens), uniformly
        keep what comes before the cut; draw the rest of the value from the law q of the site
        run the program on:  a later latent keeps its value where that is still legal (or, if asked,
                             never does); others are drawn from q;  tools run anew
        accept the new trace z' with probability

            min(1,  R(z') / R(z)  *  q(old values) / q(new values)  *  (K n) / (K' n'))

R is the joint of the trace, with scales; q never has any. q(new) is of all that was drawn, q(old) of all
that the reverse move from z' would draw to come back to z: the rest of the chosen site's old value, and
the old values of later latents that were not kept. Where the reverse move cannot come back, the proposal
is rejected: the cut is none of those of the new value, or a later latent was drawn although the reverse
would keep what was drawn.

At a barrier of SMC a trace ends where the next text would be drawn, the target is the joint up to there,
and proposals that come to no such barrier are rejected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.trace_struct import Trace
from torch.distributions import Independent

from lmppl import runtime
from lmppl.engines.kernels import Latent, SiteKernel, SiteLaw, draw_from, kernel_at
from lmppl.guides.laws import Laws
from lmppl.runtime import Given, Particle, Proposer, ScoreWait, Wait, latents_of, suspend
from lmppl.runtime.particle import Rejected
from lmppl.runtime.sites import is_text

# --- the trace that a chain is at ----------------------------------------------------------------


@dataclass(eq=False)
class ChainState:
    """A chain's trace: a run that has ended, or waits at its barrier. What it learns of the laws of its
    latents is kept, as most moves leave it where it is.

    Args:
        particle: the run.
        laws: what moves draw from.
        site_laws: those that are known, by site.
    """

    particle: Particle
    laws: Laws
    site_laws: dict[str, SiteLaw] = field(default_factory=dict)

    @cached_property
    def sites(self) -> dict[str, Any]:
        """The sample sites, by name."""
        return self.particle.sites

    @cached_property
    def latents(self) -> dict[str, Any]:
        """The latent sites, by name."""
        return self.particle.latents

    @cached_property
    def log_joint(self) -> float:
        """log R (nats)."""
        return self.particle.log_joint

    def site_law(self, name: str) -> SiteLaw:
        """The law of a latent, with the terms of its value. It is asked within a run, and may wait."""
        known, node = self.site_laws.get(name), self.latents[name]
        if known is None:
            before = Trace()
            for other, other_node in self.particle.trace.nodes.items():
                if other == name:
                    break
                before.nodes[other] = other_node
            known = SiteLaw(self.laws.law(node, before))
        if known.terms is None:
            known = SiteLaw(known.fn, _terms(known.fn, node))
        self.site_laws[name] = known
        return known


def _terms(law: Any, node: Any) -> torch.Tensor:
    """The terms of a recorded value under a law (see ``SiteLaw``)."""
    value, scored = node["value"], node.get("scored")
    if not is_text(law):
        return law.log_prob(value).sum().reshape(1)
    if law is not node["fn"] or scored is None:
        ids = node["fn"].token_ids(value)
        log_prob, scored = suspend(ScoreWait(node["name"], law, law.value(ids)))
        if scored is None:  # one term of a choice; or the law cannot draw it, whatever is kept
            return log_prob.expand(max(1, len(ids))) if log_prob == -math.inf else log_prob[None]
    return scored.log_probs


# --- one move ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a move goes: its own choices, which the reverse move has to make as well.

    Args:
        site: which latent it begins at.
        kernel: what happens there.
        cut: of the kernel's.
        turn: number of the move.
        keep: whether later latents keep values that are still legal.
        barrier: the run has to come to where so many texts are drawn and a further one is to be, and
            stays there; None: it has to end.
    """

    site: str
    kernel: SiteKernel
    cut: int
    turn: int
    keep: bool = True
    barrier: int | None = None

    def log_choice(self, latents: Mapping[str, Any]) -> float:
        """log-probability (nats) of choosing this site and cut in a trace with these latents; ``-inf``
        if there is no such cut."""
        cuts = self.kernel.cuts(latents[self.site], self.turn)
        return -math.log(len(latents) * len(cuts)) if self.cut in cuts else -math.inf


@dataclass(frozen=True, eq=False)
class BarrierWait(Wait):
    """The run is at its barrier. Nobody answers."""


@dataclass(eq=False)
class _OldLatent(Latent):
    state: ChainState
    name: str

    def __post_init__(self) -> None:
        self.node = self.state.latents[self.name]

    def law(self) -> SiteLaw:
        return self.state.site_law(self.name)


class MoveProposer(Proposer):
    """Gives the run of a new trace its values, from the site of the plan on.

    Attributes:
        log_q, log_q_old: of all values that it has drawn, and of those that the reverse move would
            have to draw (nats).
        is_possible: whether the reverse move can come back, as far as is known.
        has_ended: whether the run has come to where it has to.
        site_laws: see ``ChainState``.
    """

    def __init__(self, old: ChainState, plan: Plan) -> None:
        self._old, self._plan = old, plan
        names = list(old.latents)
        at = names.index(plan.site)
        self.site_laws = {n: law for n, law in old.site_laws.items() if n in names[:at]}
        # Values of the old trace after the site of the plan, as long as they were not kept.
        self._left = {name: old.latents[name] for name in names[at + 1 :]}
        self.log_q = self.log_q_old = 0.0
        self.is_possible, self.has_ended = True, False

    def propose(self, site: Any, trace: Trace) -> Given | None:
        name, plan = site["name"], self._plan
        if is_text(site["fn"]) and num_texts(latents_of(trace)) == plan.barrier:
            self._end()
            suspend(BarrierWait(name))
        if name == plan.site:
            return self._move(site)
        before = self._left.get(name)
        if before is None:
            return self._draw(site, trace)
        kept = carried(before, site) if plan.keep else None
        if kept is None:
            given = self._draw(site, trace)
            # The reverse move would keep this, and not draw the old value.
            if plan.keep and carried({**site, "value": given.value}, before) is not None:
                self._give_up(name)
            return given
        del self._left[name]
        same = is_text(site["fn"]) and site["fn"].same_as(before["fn"])
        return Given(kept, before["unscaled_log_prob"] if same else None)

    def _move(self, site: Any) -> Given:
        name, plan = site["name"], self._plan
        new = plan.kernel.propose(_OldLatent(self._old, name), site, plan.cut)
        self._count(new.log_q, new.log_q_old)
        if new.law.terms is not None:
            self.site_laws[name] = new.law
        if plan.cut not in plan.kernel.cuts({**site, "value": new.value}, plan.turn):
            self._give_up(name)
        return Given(new.value, new.log_prob)

    def _draw(self, site: Any, trace: Trace) -> Given:
        law = self._old.laws.law(site, trace)
        value, terms, log_prob = draw_from(law, site)
        self._count(float(terms.sum()), 0.0)
        self.site_laws[site["name"]] = SiteLaw(law, terms)
        return Given(value, log_prob if law is site["fn"] else None)

    def _count(self, log_q: float, log_q_old: float) -> None:
        self.log_q, self.log_q_old = self.log_q + log_q, self.log_q_old + log_q_old

    def _give_up(self, name: str) -> None:
        """End the run: the reverse move cannot come back, whatever follows."""
        self.is_possible = False
        raise Rejected(name)

    def finish(self, trace: Trace) -> None:
        if self._plan.barrier is None:
            self._end()

    def _end(self) -> None:
        """The run is where it has to come to: count what the reverse move would have to draw."""
        for name in self._left:
            law = self._old.site_law(name)
            assert law.terms is not None
            self._count(0.0, float(law.terms.sum()))
        self.has_ended = True

    def fork(self, streams: Proposer) -> Proposer:
        raise NotImplementedError("the run of a move is not forked")


def num_texts(latents: Mapping[str, Any]) -> int:
    """How many latent sites are texts."""
    return sum(is_text(node["fn"]) for node in latents.values())


def carried(node: Any, site: Any) -> torch.Tensor | None:
    """A recorded value as one of a site of the same name in another trace; None: it is not legal there.
    A text keeps its tokens. A number has to be of a distribution of the same class, as others may have
    a density by another measure (a coin's 1 is no draw of a Beta), and of positive density."""
    value, before, fn = node["value"], node["fn"], site["fn"]
    if is_text(fn) and is_text(before):
        ids = before.token_ids(value)
        if len(ids) > fn.event_shape[0] or not fn.lm.vocabulary.same_as(before.lm.vocabulary):
            return None
        value = fn.value(ids)
        return value if fn.supports(value) else None
    if _class(fn) is not _class(before) or value.shape != fn.shape():
        return None
    try:
        if not bool(fn.support.check(value).all()):
            return None
    except NotImplementedError:
        pass  # its density says all
    log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    return None if bool((log_prob == -math.inf).any()) else value


def _class(fn: Any) -> type:
    """The class of a distribution, or of the one that is repeated or masked in it."""
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return type(fn)


# --- many moves side by side ---------------------------------------------------------------------


def plan_move(
    state: ChainState,
    rng: np.random.Generator,
    *,
    turn: int,
    kernels: Mapping[str, SiteKernel] = MappingProxyType({}),
    block: int | None = None,
    keep: bool = True,
    at_barrier: bool = False,
) -> Plan:
    """The random choices with which a move begins."""
    names = list(state.latents)
    name = names[pick(rng, len(names))]
    node = state.latents[name]
    kernel = kernel_at(node, kernels, block)
    cuts = kernel.cuts(node, turn)
    barrier = num_texts(state.latents) if at_barrier else None
    return Plan(name, kernel, cuts[pick(rng, len(cuts))], turn, keep, barrier)


def pick(rng: np.random.Generator, num: int) -> int:
    """One of the numbers below ``num``."""
    return int(rng.integers(num))


@dataclass(frozen=True, eq=False)
class Proposed:
    """The trace that a move proposes, and the logarithm of its Metropolis-Hastings ratio (nats)."""

    state: ChainState
    log_ratio: float


def propose(
    states: Sequence[ChainState], plans: Sequence[Plan], seeds: Sequence[int]
) -> list[Proposed]:
    """The proposals of moves, one a chain, whose language-model calls are answered together."""
    runs: list[Particle] = []
    proposers: list[MoveProposer] = []
    with torch.no_grad(), runtime.ending(runs):
        for state, plan, seed in zip(states, plans, seeds, strict=True):
            before = {}
            for name, node in state.sites.items():
                if name == plan.site:
                    break
                before[name] = node
            proposers.append(MoveProposer(state, plan))
            runs.append(state.particle.rerun(before, {}, seed=seed, proposer=proposers[-1]))
        _run(runs)
    for run in runs:
        run.proposer = None  # it holds the old trace, which holds older ones
    return [
        Proposed(
            ChainState(run, state.laws, proposer.site_laws), _log_ratio(state, plan, run, proposer)
        )
        for state, plan, run, proposer in zip(states, plans, runs, proposers, strict=True)
    ]


def _run(runs: Sequence[Particle]) -> None:
    """Run all to their end or barrier; one that has probability zero stops."""
    while True:
        runtime.run_to_draws(runs)
        for run in runs:
            if not run.finished and run.killed_by is not None:
                run.close()
        if all(run.finished or isinstance(run.waiting, BarrierWait) for run in runs):
            return
        runtime.serve_draws(runs)


def _log_ratio(state: ChainState, plan: Plan, run: Particle, proposer: MoveProposer) -> float:
    """log of R(z') q(old) K n / (R(z) q(new) K' n'), nats; ``-inf`` if the proposal is dead."""
    log_joint = run.log_joint
    if not (proposer.is_possible and proposer.has_ended) or log_joint == -math.inf:
        return -math.inf
    if not log_joint < math.inf:
        sites = run.sites.items()
        name = next(n for n, node in sites if not float(node["log_prob_sum"]) < math.inf)
        raise ValueError(
            f"site '{name}' has the log-probability {float(run.sites[name]['log_prob_sum'])}: it must "
            "be a number, or -inf"
        )
    log_q = proposer.log_q - proposer.log_q_old
    choice = plan.log_choice(run.latents) - plan.log_choice(state.latents)
    log_ratio = log_joint - state.log_joint - log_q + choice
    return -math.inf if math.isnan(log_ratio) else log_ratio  # a walk that left the numbers


@dataclass(frozen=True, eq=False)
class Made:
    """A move that was made: where it began, and the trace that was accepted (None: rejected)."""

    site: str
    state: ChainState | None


def move_all(
    states: Sequence[ChainState], seeds: Sequence[int], turn: int, **options: Any
) -> list[Made]:
    """One move of each chain.

    Args:
        states: where they are.
        seeds: of each chain's random streams.
        turn: number of the move, which makes its random numbers others than those of the last.
        options: those of ``plan_move``.
    """
    rngs = [np.random.default_rng(np.random.SeedSequence(s, spawn_key=(turn,))) for s in seeds]
    plans = [
        plan_move(state, rng, turn=turn, **options) for state, rng in zip(states, rngs, strict=True)
    ]
    run_seeds = [int(rng.integers(2**63)) for rng in rngs]
    return [
        Made(plan.site, proposed.state if accepts(rng, proposed.log_ratio) else None)
        for plan, rng, proposed in zip(plans, rngs, propose(states, plans, run_seeds), strict=True)
    ]


def accepts(rng: np.random.Generator, log_ratio: float) -> bool:
    """True with probability min(1, exp(log_ratio))."""
    return log_ratio >= 0.0 or float(rng.random()) < math.exp(log_ratio)


def is_same(one: ChainState, other: ChainState) -> bool:
    """Whether two traces have the same latents."""
    if one.latents.keys() != other.latents.keys():
        return False
    pairs = ((one.latents[n]["value"], other.latents[n]["value"]) for n in one.latents)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
