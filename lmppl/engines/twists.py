"""What is known of texts under way, by which SMC compares them: what constraints have cost them, and
twists, guesses of how well they will end.

    M slots draw their texts side by side; each time these have grown by a few tokens:
        psi_i = twist of text i so far
        L_i   = product of the local masses of text i so far; 0 if it can't match any more
        a_i   = (1 - eps) w_i L_i psi_i / sum(w L psi)  +  eps w_i L_i / sum(w L)
        if 1 / sum(a^2) < threshold * M:
            ancestors ~ a;  a copy of i weighs w_i / (M a_i), and goes on with the L of text i

Here w is what a slot's particle weighs without its text. The expectation of any function of the texts is
the same as before, whatever the numbers psi and L are and whatever they depend on, since i has M a_i
copies on average. So nothing has to be undone when the texts have closed.

*Constraints.* A text that the program itself draws under a global constraint is drawn among the tokens
that this allows, and pays for it in its weight, p / q: the product, token by token, of the *local mass*,
the model's probability of all that was allowed (or an unbiased estimate of it, by rejection). So part of
the weight is known before the text closes, and it is the text's alone: two texts may be compared by it,
whatever site or branch they are of, and also with one that pays nothing. (One that pays less on the way
than another will at its end looks better than it is until then. That is noise, no bias.) A closed text
keeps its L. A guide's text pays p / q of another kind, of which nothing is known, and one under a local
constraint pays nothing: for both L is 1, as long as they may match.

*Defence.* A twist may mislead by tens of nats, and with eps = 0 all slots would follow it: an estimate
that is unbiased on paper, and far too small in every run. The second term is a *defence* (Hesterberg,
1995): a share eps of the slots goes by w L alone, and no copy weighs more than mean(w L) / eps, when it
has paid L. L needs no defence, since it is no guess: it is paid whatever comes. Where nothing has a psi,
both terms are the same, whatever eps is.

A text of which a twist has no number (it can't close here, say, as it is no match yet) *keeps its
share* of the weight of all slots: its psi grows by the factor by which the weight of the others has
grown, so that resampling neither favours nor kills it. (psi = 1 would take all slots from neighbours
with a sentence of evidence, e^-30, still to come.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lmppl.distributions import LMText, draw_request, drawn_text
from lmppl.engines.base import State
from lmppl.engines.genealogy import Genealogy
from lmppl.lm import begin_draws
from lmppl.lm.batches.decoding import Decoding
from lmppl.lm.tokens.text import Text
from lmppl.lm.tokens.vocabulary import Vocabulary
from lmppl.runtime import DrawWait, Given, Particle, ending, is_latent, run_to_draws
from lmppl.runtime.batching import resume

Twist = Callable[[Text], float]
"""log psi (nats) of a site's text so far; finite wherever a completion has mass."""

LogPsi = list[float | None]


class TwistFunction(ABC):
    """How well texts under way will end."""

    def takes(self, particle: Particle) -> bool:
        """Whether it has anything to say of the text that the particle waits to draw."""
        return True

    def is_known(self, particle: Particle) -> bool:
        """Whether anything is known of that text while it is under way: by the twist, or by what its
        constraint costs."""
        return self.takes(particle) or _wait(particle).is_weighed_on_the_way

    @abstractmethod
    def __call__(self, particles: list[Particle], decoding: Decoding, slots: list[int]) -> LogPsi:
        """log psi (nats) of the texts so far of some slots; some may have closed. None: nothing is
        known of it; ``-inf``: it is certain to end badly. ``particles`` wait to draw these texts."""


class NoTwist(TwistFunction):
    """Nothing is known of how texts will end."""

    def takes(self, particle: Particle) -> bool:
        return False

    def __call__(self, particles: list[Particle], decoding: Decoding, slots: list[int]) -> LogPsi:
        return [None] * len(slots)


@dataclass(eq=False)
class Texts:
    """The texts that ``members``, M of the particles, draw side by side, one a slot, with log psi and
    log L of each, (M,) float64, nats. ``programs`` are the particles whose program each slot carries."""

    twist: TwistFunction
    particles: Sequence[Particle]
    members: Sequence[int]
    decoding: Decoding

    def __post_init__(self) -> None:
        num, self.programs = len(self.members), list(self.members)
        self.log_psi = torch.zeros(num, dtype=torch.float64)
        self.log_masses = torch.zeros(num, dtype=torch.float64)
        self._taken = {i for i in self.members if self.twist.takes(self.particles[i])}
        self._weighed = {i for i in self.members if _wait(self.particles[i]).is_weighed_on_the_way}
        self._known = torch.zeros(num, dtype=torch.bool)  # whether psi is of the twist
        self._judged = [0] * num  # tokens of the text that the twist has seen

    def update(self, log_weights: torch.Tensor) -> bool:
        """Judge the texts as they are now, of particles with these ``log_weights`` (M,) without them.
        Returns whether anything is known of any that is new.

        A text that has closed keeps its psi until all have, as its neighbours carry theirs: without
        it, it would seem the better the less likely its end is.
        """
        masses = [self._log_mass(k) for k in range(len(self.programs))]
        before, self.log_masses = self.log_masses, torch.tensor(masses, dtype=torch.float64)
        judges = bool(self._taken) and self._judge(log_weights + self.log_masses)
        return judges or not torch.equal(before, self.log_masses)

    def _log_mass(self, slot: int) -> float:
        """log L of a slot's text."""
        if self.decoding.is_dead(slot):
            return -math.inf
        is_weighed = self.programs[slot] in self._weighed
        return math.fsum(self.decoding.log_masses[slot]) if is_weighed else 0.0

    def _judge(self, log_weights: torch.Tensor) -> bool:
        """Find psi of texts that have grown, and may match; see ``update``."""
        lengths = [len(ids) for ids in self.decoding.token_ids]
        alive = log_weights > -math.inf
        slots = [
            k
            for k, length in enumerate(lengths)
            if length > self._judged[k] and alive[k] and self.programs[k] in self._taken
        ]
        particles = [self.particles[self.programs[k]] for k in slots]
        values = self.twist(particles, self.decoding, slots)
        log_psi = self.log_psi.clone()
        for k, particle, value in zip(slots, particles, values, strict=True):
            if value is not None and not value < math.inf:
                raise ValueError(
                    f"site '{_wait(particle).name}': twist gave log psi = {value}; it must be a "
                    "number of nats, finite wherever a completion has mass"
                )
            self._judged[k] = lengths[k]
            self._known[k] = value is not None
            if value is not None:
                log_psi[k] = value
        others = self._known & (log_psi > -math.inf) & alive
        if bool(others.any()):
            after, before = (log_weights + log_psi)[others], (log_weights + self.log_psi)[others]
            log_psi[~self._known] += after.logsumexp(0) - before.logsumexp(0)
        self.log_psi = log_psi
        return any(value is not None for value in values)

    def so_far(self) -> list[tuple[str, Vocabulary, list[int]]]:
        """Of each slot, the site's name, the vocabulary and the tokens so far."""
        waits = [_wait(self.particles[i]) for i in self.programs]
        ids = self.decoding.token_ids
        return [(w.name, w.fn.lm.vocabulary, t) for w, t in zip(waits, ids, strict=True)]

    def select(self, ancestors: Sequence[int]) -> None:
        """Slot i becomes a copy of slot ``ancestors[i]``."""
        index = torch.tensor(ancestors)
        self.programs = [self.programs[a] for a in ancestors]
        self._judged = [self._judged[a] for a in ancestors]
        self.log_psi, self._known = self.log_psi[index], self._known[index]
        self.log_masses = self.log_masses[index]


def twist_function_of(
    twist: str | Twist | Mapping[str, Twist] | None, state: State
) -> TwistFunction:
    """The twist of one barrier."""
    if not isinstance(twist, str):
        return NoTwist() if twist is None else OfText(twist)
    return Lookahead(_aside(state)) if twist == "lookahead" else Flow(_aside(state))


def log_psi_between(
    twist: str | Twist | Mapping[str, Twist] | None,
    particles: Sequence[Particle],
    log_weights: torch.Tensor,
) -> torch.Tensor | None:
    """log psi (nats) of particles at a barrier; None: nothing is known of how they will end.

    A guide that equals the posterior draws what comes first in proportion to the mass of all that can
    follow. So under ``"flow"`` those of which it has drawn all latents are worth the same, psi = 1 / w:
    what p / q of them is now, the observations to come will make up for. Where a latent was left to the
    model, nothing is known: what was observed after it, the guide has not foreseen.

    Args:
        twist: as of ``SMC``.
        particles: those that wait at the barrier.
        log_weights: (M,) nats, without twist, of those that are compared: the dead, at ``-inf``, too.

    Returns:
        (M,) float64, or None.
    """
    if twist != "flow" or not all(map(_is_guided, particles)):
        return None
    return torch.where(log_weights > -math.inf, -log_weights, 0.0)


def _is_guided(particle: Particle) -> bool:
    """Whether a guide has drawn all latents so far. (Of a proposer that does not tell, it is taken for
    granted.)"""
    latents = particle.latents.keys()
    return latents <= getattr(particle.proposer, "draws", particle.latents).keys()


def text_waits(particles: Sequence[Particle]) -> dict[int, DrawWait]:
    """Of the particles that wait to draw a text, token by token, what they wait for."""
    return {
        i: particle.waiting
        for i, particle in enumerate(particles)
        if isinstance(particle.waiting, DrawWait)
        and particle.waiting.fn.stopping.max_tokens is not None  # else it is drawn as a whole
    }


def draw(
    state: State,
    members: Sequence[int],
    twist: TwistFunction,
    ancestors_of: Callable[[torch.Tensor], torch.Tensor],
    genealogy: Genealogy,
    *,
    threshold: float,
    every: int,
    defense: float,
) -> int:
    """Draw texts token by token, resampling among them by what is known of them on the way.

    Args:
        members: M particles that wait to draw a text, one a slot.
        twist: judges texts.
        ancestors_of: draws M ancestors with probabilities in proportion to (M,) weights.
        genealogy: where resamplings are taken down.
        threshold, every, defense: as of ``SMC``, where ``threshold`` is of 1 / sum(a^2).

    Returns:
        The number of resamplings.
    """
    particles, num = state.particles, len(members)
    waits = [_wait(particles[i]) for i in members]
    # A slot may take over a text with a larger ``max_tokens``, on another branch of the program, so
    # each gets as many uniforms as the longest needs.
    longest = max(wait.fn.num_uniforms for wait in waits)
    requests = []
    for wait in waits:
        missing = longest - len(wait.uniforms)
        more = torch.rand(missing, generator=state.generator, dtype=torch.float64)
        uniforms = torch.cat([wait.uniforms, more])
        request = draw_request(wait.fn, uniforms, wait.name, wait.begun, wait.purpose)
        requests.append((wait.fn.lm, request))
    decoding = begin_draws(requests)
    texts = Texts(twist, particles, members, decoding)
    index = torch.tensor(members)
    resamplings = 0
    while not decoding.done:
        decoding.step()
        log_weights = state.log_weights[index]
        if decoding.done or decoding.num_steps % every or not texts.update(log_weights):
            continue
        paid = log_weights + texts.log_masses
        a = shares(paid, texts.log_psi, defense)
        if (ess := 1.0 / float((a**2).sum())) < threshold * num:
            ancestors = ancestors_of(a)
            compared = state.log_weights.index_copy(0, index, a.log() + paid.logsumexp(0))
            genealogy.within_texts(
                members, texts.so_far(), compared, ess, ancestors.tolist(), decoding.num_steps
            )
            decoding.select(ancestors.tolist())
            texts.select(ancestors.tolist())
            state.log_weights[index] = log_weights_of_copies(log_weights, a, ancestors)
            resamplings += 1
    taken = dict(zip(members, texts.programs, strict=True))
    # Copies replay particles that still wait at this draw.
    state.select([taken.get(slot, slot) for slot in range(len(particles))], is_drawing=True)
    drawing = [particles[slot] for slot in members]
    answers = [
        drawn_text(_wait(particle).fn, drawn, _wait(particle).begun)
        for particle, drawn in zip(drawing, decoding.results(), strict=True)
    ]
    resume(drawing, answers)
    return resamplings


def _wait(particle: Particle) -> DrawWait:
    assert isinstance(particle.waiting, DrawWait)
    return particle.waiting


def shares(log_weights: torch.Tensor, log_psi: torch.Tensor, defense: float) -> torch.Tensor:
    """The share a of the next generation that each slot is to have, (M,) float64; it sums to 1.
    ``log_weights`` are without twist, and what texts have paid is in them (at least one is finite);
    ``-inf`` there or in ``log_psi`` has no share. Both (M,) nats."""
    lost = (log_psi == -math.inf) | (log_weights == -math.inf)
    if bool(lost.all()):
        return torch.softmax(log_weights, 0)
    plain = torch.softmax(log_weights.masked_fill(lost, -math.inf), 0)
    twisted = torch.softmax(log_weights + log_psi, 0)
    return (1.0 - defense) * twisted + defense * plain


def log_weights_of_copies(
    log_weights: torch.Tensor, a: torch.Tensor, ancestors: torch.Tensor
) -> torch.Tensor:
    """What copies of slots with these weights and shares weigh, (M,) nats: w / (M a). (The weights are
    without what their texts have paid, with which copies go on.)"""
    return (log_weights - (len(a) * a).log())[ancestors]


class OfText(TwistFunction):
    """What a function says of the text, or one of several by the site's name."""

    def __init__(self, twist: Twist | Mapping[str, Twist]) -> None:
        self._of: Callable[[str], Twist | None]
        self._of = twist.get if isinstance(twist, Mapping) else lambda name: twist

    def takes(self, particle: Particle) -> bool:
        return particle.waiting is not None and self._of(particle.waiting.name) is not None

    def __call__(self, particles: list[Particle], decoding: Decoding, slots: list[int]) -> LogPsi:
        values = []
        for wait, slot in zip(map(_wait, particles), slots, strict=True):
            twist = self._of(wait.name)
            assert twist is not None
            values.append(float(twist(wait.fn.stopping.text(decoding.token_ids[slot]))))
        return [None if value == -math.inf else value for value in values]  # it may still end well


@dataclass(eq=False)
class Lookahead(TwistFunction):
    """The likelihood of what follows, up to the next latent site, were the text closed here. Nothing is
    known of one that its constraint does not let close."""

    aside: Particle  # whose random streams it uses

    def __call__(self, particles: list[Particle], decoding: Decoding, slots: list[int]) -> LogPsi:
        forks: dict[int, Particle] = {}
        for k, (particle, slot) in enumerate(zip(particles, slots, strict=True)):
            wait, ids = _wait(particle), _closed(decoding, slot)
            if ids is None:
                raise ValueError(
                    f"site '{wait.name}': twist='lookahead' closes the text early, but its model "
                    "has no EOS token and no stop string that is one token: give stop=, or another "
                    "twist"
                )
            if decoding.reasons[slot] is None and not decoding.may_close(slot):
                continue
            # Its own density is the proposal's business, so it is given as 1 here.
            one = torch.zeros(())
            given = Given(wait.fn.value(ids), log_prob=one, proposal_log_prob=one)
            forks[k] = particle.fork(streams=self.aside, given={wait.name: given})
        with ending(list(forks.values())) as runs:
            run_to_draws(runs)
            weights = {k: fork.take_log_weight() for k, fork in forks.items()}
        found = [weights.get(k, -math.inf) for k in range(len(slots))]
        return [None if weight == -math.inf else weight for weight in found]


@dataclass(eq=False)
class Flow(TwistFunction):
    """The flow of a guide over the prefixes of its texts (Hu et al., 2024, arXiv 2310.04363).

    A guide q that equals the posterior draws any complete text, also one cut short at t by the
    closing token c, with probability R / Z. So ``F_t = R(z_<=t c) / q(c | z_<=t)`` is then the
    unnormalised posterior of the prefix z_<=t: the optimal target. The proposal has paid q(z_<=t)
    of it, which leaves ``log psi = log R(z_<=t c) - log q(z_<=t c)``. R begins at this site; what
    was drawn before it is in the particle's weight. If the text has closed, psi is its own R / q.

    Nothing is known where R(z_<=t c) = 0, where c is illegal or has no probability, and where the
    program comes to another latent site after it; see ``log_psi_between`` for what is known there once
    the text has closed. A text that has itself closed with R = 0 is lost, unless chance (a tool, a
    subsample) has a say in that.
    """

    aside: Particle  # whose random streams it uses
    _ending: set[str] = field(default_factory=set)  # sites after which some run met no other latent
    _followed: set[str] = field(default_factory=set)  # sites after which all runs did

    def takes(self, particle: Particle) -> bool:
        """Not what is left to the model; nor a draw of a guide program that is at another site."""
        wait, site = particle.waiting, particle.site
        if not isinstance(wait, DrawWait) or site is None:
            return False
        name, fn = site
        is_guided = name == wait.name and wait.fn is not fn and isinstance(fn, LMText)
        return is_guided and wait.fn.stopping.closing_token is not None

    def __call__(self, particles: list[Particle], decoding: Decoding, slots: list[int]) -> LogPsi:
        values: LogPsi = [None] * len(slots)
        sites = [particle.site for particle in particles if particle.site is not None]
        if all(name in self._followed for name, _ in sites):
            return values
        close_log_probs = decoding.closing_log_probs()
        forks: dict[int, Particle] = {}
        members = zip(particles, slots, sites, strict=True)
        for k, (particle, slot, (name, fn)) in enumerate(members):
            ids = _closed(decoding, slot)
            log_q = math.fsum(decoding.log_probs[slot]) - math.fsum(decoding.log_masses[slot])
            if decoding.reasons[slot] is None:
                log_q += close_log_probs[slot]
            if ids is None or name in self._followed or log_q == -math.inf:
                continue
            value = fn.value(ids)
            if fn.supports(value):
                given = Given(value, proposal_log_prob=torch.tensor(log_q, dtype=torch.float64))
                forks[k] = particle.fork(streams=self.aside, given={name: given})
        with ending(list(forks.values())) as runs:
            run_to_draws(runs)
            for k, fork in forks.items():
                name, before, after = sites[k][0], particles[k].trace.nodes, fork.sites
                new = [after[other] for other in after.keys() - {name, *before}]
                chance = [node for node in new if not node["is_observed"]]
                if fork.site is not None or any(map(is_latent, chance)):
                    continue
                self._ending.add(name)
                weight = fork.take_log_weight()
                is_lost = decoding.reasons[slots[k]] is not None and not chance
                values[k] = weight if weight > -math.inf or is_lost else None
        self._followed |= {sites[k][0] for k in forks} - self._ending
        return values


def _closed(decoding: Decoding, slot: int) -> list[int] | None:
    """The tokens of a slot's text, closed here if it is open; None if no one token can do that."""
    ids = decoding.token_ids[slot]
    if decoding.reasons[slot] is not None:
        return ids
    c = decoding.draw_of(slot)[1].stopping.closing_token
    return None if c is None else [*ids, c]


def _aside(state: State) -> Particle:
    """A run that lends its random streams to runs ahead, and is never started.

    What these draw at Pyro's own sites must not be what their particles will draw there: slots would
    be chosen by it, and the estimate be biased. All draw the same numbers, to be comparable.
    """
    seed, proposer_seed = torch.randint(2**62, (2,), generator=state.generator).tolist()
    slot = state.particles[0].slot
    proposer = None if state.proposer is None else state.proposer(slot, proposer_seed)
    return Particle(state.model, state.args, seed=seed, proposer=proposer, slot=slot)
