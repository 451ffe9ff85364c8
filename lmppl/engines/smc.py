"""Sequential Monte Carlo over the latent sites of a program.

    particles run to their first latent site; log w_i = 0, log Z = 0
    until all have ended:
        every particle draws its latent site (from the guide, or the program's prior)
        and runs on, scoring observations and factors, to the next latent site: the *barrier*
        log w_i += log p - log q of what happened since the last barrier
        if ESS(w) < threshold * N:
            log Z += log mean w;  ancestors ~ w;  fork;  log w = 0
    log w_i += log Z

``mean(w)`` is an unbiased estimate of the evidence at every number of particles and threshold
(Del Moral, 2004, section 7.4). Particles meet at barriers, because comparing one that has paid for its
observation with one that has not would favour whoever pays late.

*Within* a site nothing distinguishes one partial text from another unless a twist does (twisted
SMC; Zhao et al., 2024, arXiv 2404.17546): with psi of the text so far, particles inside the site
are compared by w psi, and one that is copied gets weight mean(w psi) / psi. So psi is gone when the
site's last text has closed, and changes no expectation (``twists.py``). Without a twist and with
the prior as proposal, SMC on a program with one latent site *is* importance sampling with
resampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lmppl import runtime
from lmppl.distributions import draw_request
from lmppl.engines import twists
from lmppl.engines.base import Meter, finish, proposer_factory
from lmppl.engines.resampling import SCHEMES, settle_in_place
from lmppl.engines.twists import Twist
from lmppl.lm import LM, begin_draws
from lmppl.lm.batches.requests import Draw
from lmppl.posterior import Posterior
from lmppl.runtime import DrawWait, Particle, ess, log_mean_exp


@dataclass(frozen=True)
class SMC:
    """Sequential Monte Carlo.

    Args:
        ess_threshold: resample when the effective sample size falls below this fraction of N;
            0: never, 1: at every barrier.
        resampling: ``"systematic"``, ``"stratified"``, ``"multinomial"`` or ``"residual"``.
        twist: how texts are compared within a site. None: not at all. ``"lookahead"``: by the
            likelihood of what follows in the program, up to the next latent site, were the
            text closed here. ``"flow"``: by what the ``guide=`` knows: R / q of the program's
            run on the text closed here, which is the same for all texts if the guide is perfect;
            for the last text of a program. A callable ``twist(text) -> float`` gives log psi of a
            site's text so far; a dict gives callables by site name.
        twist_every: texts are compared each time they have grown by so many tokens. A
            comparison by ``"lookahead"`` or ``"flow"`` scores what follows for every text.
    """

    ess_threshold: float = 0.5
    resampling: Literal["systematic", "stratified", "multinomial", "residual"] = "systematic"
    twist: Literal["lookahead", "flow"] | Twist | Mapping[str, Twist] | None = None
    twist_every: int = 1

    name = "smc"

    def __post_init__(self) -> None:
        if not 0.0 <= self.ess_threshold <= 1.0:
            raise ValueError(
                f"ess_threshold={self.ess_threshold}: it is a fraction of the number of particles, "
                "between 0 (never resample) and 1 (at every barrier)"
            )
        if self.resampling not in SCHEMES:
            raise ValueError(f"resampling={self.resampling!r}, allowed: {sorted(SCHEMES)}")
        if isinstance(self.twist, str) and self.twist not in ("lookahead", "flow"):
            raise ValueError(
                f"twist={self.twist!r}, allowed: None, 'lookahead', 'flow', a callable that gives "
                "log psi of a text, or a dict of callables by site name"
            )
        if not isinstance(self.twist_every, int) or self.twist_every < 1:
            raise ValueError(
                f"twist_every={self.twist_every!r}: it is a number of tokens, 1 or more"
            )

    def run(
        self,
        model: Callable[..., Any],
        *args: Any,
        num_samples: int = 64,
        guide: Any = None,
        seed: int | None = None,
        progress: bool | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Posterior:
        """The posterior of ``model(*args)`` as ``num_samples`` weighted traces.

        Raises:
            ValueError: for ``twist="flow"`` without a guide.
            ZeroEvidenceError: if at some barrier every particle has weight zero; it carries the
                posterior.
        """
        if self.twist == "flow" and guide is None:
            raise ValueError(
                "twist='flow' compares texts by what a guide knows: give guide=, an LMGuide or a "
                "guide program, or take twist='lookahead'"
            )
        seed = runtime.fresh_seed(seed)
        generator = torch.Generator().manual_seed(seed % 2**63)
        proposer = proposer_factory(guide, args)
        with Meter(self.name, progress, callback) as meter:
            particles = runtime.start(model, args, num_samples, seed=seed, proposer=proposer)
            with runtime.ending(particles):
                log_weights = torch.zeros(num_samples, dtype=torch.float64)
                log_evidence, barrier, resamplings = 0.0, 0, 0
                while True:
                    runtime.run_to_draws(particles)
                    for i, particle in enumerate(particles):
                        log_weights[i] += particle.take_log_weight()
                        if log_weights[i] == -math.inf and not particle.finished:
                            particle.close()
                    size = ess(log_weights)
                    unfinished = sum(not p.finished for p in particles)
                    meter.report(
                        stage=barrier, ess=size, finished=num_samples - unfinished, of=num_samples
                    )
                    if not unfinished or size == 0.0:
                        break
                    if size < self.ess_threshold * num_samples:
                        log_evidence += log_mean_exp(log_weights)
                        ancestors = self._ancestors(log_weights, generator)
                        particles[:] = _fork(particles, ancestors)
                        log_weights.zero_()
                        resamplings += 1
                    guess = twists.guess_of(self.twist, particles[0], proposer, generator)
                    resamplings += self._draw(particles, log_weights, generator, guess)
                    barrier += 1
            return finish(
                self.name,
                particles,
                log_weights + log_evidence,
                meter,
                iid=False,
                resamplings=resamplings,
            )

    def _ancestors(self, log_weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        weights = (log_weights - log_weights.max()).exp()
        return settle_in_place(SCHEMES[self.resampling](weights, generator))

    def _draw(
        self,
        particles: list[Particle],
        log_weights: torch.Tensor,
        generator: torch.Generator,
        guess: twists.Guess | None,
    ) -> int:
        """Every waiting particle draws its site. Returns the number of resamplings within it."""
        twisted = [
            i
            for i, particle in enumerate(particles)
            if guess is not None
            and isinstance(particle.waiting, DrawWait)
            and particle.waiting.fn.stopping.max_tokens is not None  # else it is drawn as a whole
            and guess.takes(particle)
        ]
        chosen = set(twisted)
        # First: a fork of one of these still waits at its draw, which the others have behind them.
        resamplings = 0
        if guess is not None and twisted:
            resamplings = self._draw_twisted(particles, twisted, log_weights, generator, guess)
        runtime.serve_draws([p for i, p in enumerate(particles) if i not in chosen])
        return resamplings

    def _draw_twisted(
        self,
        particles: list[Particle],
        members: Sequence[int],
        log_weights: torch.Tensor,
        generator: torch.Generator,
        guess: twists.Guess,
    ) -> int:
        """Draw token by token, resampling among ``members`` under the twisted target."""
        decoding = begin_draws(_requests([particles[i].waiting for i in members], generator))
        texts = twists.Texts(guess, particles, members, decoding)
        index = torch.tensor(members)
        resamplings = 0
        while not decoding.done:
            decoding.step()
            if decoding.done or decoding.num_steps % self.twist_every:
                continue
            if not texts.update(log_weights[index]):
                continue  # the same weights as before
            twisted = log_weights[index] + texts.log_psi
            if ess(twisted) < self.ess_threshold * len(members):
                ancestors = self._ancestors(twisted, generator).tolist()
                decoding.select(ancestors)
                texts.select(ancestors)
                log_weights[index] = log_mean_exp(twisted) - texts.log_psi
                resamplings += 1
        programs = texts.programs
        before = list(particles)
        # Forks first: they replay particles that still wait at this draw.
        for slot, program in zip(members, programs, strict=True):
            if program != slot:
                particles[slot] = before[program].fork(streams=before[slot])
        for slot, program in zip(members, programs, strict=True):
            if program != slot:
                before[slot].close()
        for slot, drawn in zip(members, decoding.results(), strict=True):
            wait = particles[slot].waiting
            assert isinstance(wait, DrawWait)
            particles[slot].resume((wait.fn.value(drawn.token_ids), drawn.log_probs.sum()))
        return resamplings


def _requests(waits: Sequence[Any], generator: torch.Generator) -> list[tuple[LM, Draw]]:
    """What to draw. A slot may take over a text with a larger ``max_tokens``, on another branch of
    the program, so each gets as many uniforms as the longest needs."""
    longest = max(wait.fn.num_uniforms for wait in waits)
    requests = []
    for wait in waits:
        assert isinstance(wait, DrawWait)
        missing = longest - len(wait.uniforms)
        more = torch.rand(missing, generator=generator, dtype=torch.float64)
        uniforms = torch.cat([wait.uniforms, more])
        requests.append((wait.fn.lm, draw_request(wait.fn, uniforms, wait.name)))
    return requests


def _fork(particles: Sequence[Particle], ancestors: torch.Tensor) -> list[Particle]:
    """Slot i carries on from ancestor ``ancestors[i]``, with its own random streams."""
    new = list(particles)
    for slot, ancestor in enumerate(ancestors.tolist()):
        source = particles[ancestor]
        if ancestor != slot:
            new[slot] = source.fork(streams=particles[slot])
    for slot, ancestor in enumerate(ancestors.tolist()):
        if ancestor != slot:
            particles[slot].close()
    return new
