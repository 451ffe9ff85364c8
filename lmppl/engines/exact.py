"""Exact inference by enumeration of all traces of a finite program.

    particles = [one], run to its first latent site
    while any waits at a latent site:
        replace each that waits by one for every value in its site's support
            log w = log joint so far + log of their number     (so that the mean of w is the evidence)
        run each to its next latent site                       (a few first, then ever more)
        there are too many traces as soon as the supports that are known say so

It is the oracle that every other engine is tested against, and the right engine for small spaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lmppl import runtime
from lmppl.checks import check_int
from lmppl.distributions import LMText, choice_log_probs
from lmppl.engines.base import Engine, State
from lmppl.lm.batches.decoding import enumerate_sequences
from lmppl.runtime import ChoiceWait, DrawWait, Given, Particle

Support = list[tuple[torch.Tensor, torch.Tensor]]
"""Values of positive probability, each with its log-probability (0-d, nats)."""

Choice = DrawWait | ChoiceWait

# Particles that run side by side: up to so many all of them; of more, a few first, as what they come to
# may say that there are too many, and then ever more, up to so many.
_SIDE_BY_SIDE, _FIRST = 1024, 64


@dataclass(frozen=True)
class Exact(Engine):
    """Enumeration of every trace; ``num_samples`` has no meaning here.

    A program with more than ``max_traces`` traces is refused as soon as that is known: of choices
    and discrete distributions when a run comes to them, of a free text after a few passes of the
    language model, of a constrained one when so many matches are found. Later sites count from the first
    runs that come to them.

    Args:
        max_traces: refuse programs with more traces than this.
    """

    max_traces: int = 100_000

    name = "exact"

    def __post_init__(self) -> None:
        check_int("max_traces", self.max_traces)

    def sample(self, state: State) -> None:
        if state.guide is not None:
            raise ValueError("method='exact' enumerates and takes no guide: leave out guide=")
        state.info["exact"] = True
        state.start(1, enumerate_latents=True)
        goes_on = state.extend()
        supports = _Supports(self.max_traces, 1)
        supports.find(state.particles)
        while goes_on:
            supports = self._branch(state, supports)
            goes_on = state.extend()

    def _branch(self, state: State, supports: _Supports) -> _Supports:
        """Replace every waiting particle by one for each value of its site, after those that ended, and
        run them to their next latent sites, of which it returns the supports."""
        before = state.particles.copy()
        waiting = [(i, _wait(p)) for i, p in enumerate(before) if not p.finished]
        ended = [i for i, particle in enumerate(before) if particle.finished]
        branches = [
            (i, wait.name, Given(value, log_prob))
            for i, wait in waiting
            for value, log_prob in supports[wait]
        ]
        total = len(ended) + len(branches)
        found = _Supports(self.max_traces, total)
        with runtime.ending([before[i] for i, _ in waiting]):
            state.particles[:] = [before[i] for i in ended]
            state.log_weights = state.log_weights[ended + [i for i, _, _ in branches]]
            state.log_weights += math.log(total / len(before)) if total else 0.0
            state.bar.begin(len(branches), "trace")
            for begin, end in _portions(len(branches)):
                for i, name, given in branches[begin:end]:
                    state.particles.append(before[i].fork(given={name: given}))
                    state.bar.advance(0)  # it shows the time
                state.extend_part(len(ended) + begin, len(ended) + end)
                found.find(state.particles[len(ended) + begin : len(ended) + end])
                state.bar.advance(end - begin)
        return found


def _portions(num: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the parts in which so many particles run."""
    begin, size = 0, num if num <= _SIDE_BY_SIDE else _FIRST
    while begin < num:
        yield begin, min(begin + size, num)
        begin, size = begin + size, min(4 * size, max(_SIDE_BY_SIDE, size))


class _Supports:
    """The supports of the sites at which particles wait.

    Args:
        limit: the most traces there may be.
        total: so many there are at least: one for each particle.
    """

    def __init__(self, limit: int, total: int) -> None:
        self._limit, self._total = limit, total
        self._found: dict[Any, Support] = {}

    def __getitem__(self, wait: Choice) -> Support:
        return self._found[_key(wait)]

    def find(self, particles: list[Particle]) -> None:
        """Find those of further particles. Raises ``ValueError`` if there are too many traces."""
        for wait in (_wait(particle) for particle in particles if not particle.finished):
            key = _key(wait)
            if key not in self._found:
                room = self._limit - self._total + 1
                support = _support(wait, room)
                if support is None or len(support) > room:
                    raise ValueError(self._too_many(wait))
                self._found[key] = support
            self._total += len(self._found[key]) - 1
            if self._total > self._limit:
                raise ValueError(self._too_many(wait))

    def _too_many(self, wait: Choice) -> str:
        others = f", beside at least {self._total - 1:,} other traces" * (self._total > 1)
        return (
            f"enumeration of site '{wait.name}' passes max_traces={self._limit} traces: it has "
            f"{_size(wait)}{others}. Give the site choices=, regex= or a smaller max_tokens, take "
            "method='smc' or 'importance', or raise max_traces"
        )


def _size(wait: Choice) -> str:
    """How many values a site has, as far as that is known, in words."""
    fn = wait.fn
    if isinstance(wait, ChoiceWait):
        return f"{len(fn.enumerate_support(expand=False)):,} values"
    if fn.choices is not None:
        return f"{len(fn.choices):,} choices"
    words, most = fn.lm.vocabulary.size, fn.stopping.max_tokens or 0
    texts = f"texts of up to {most:,} of {words:,} tokens"
    if (constraint := fn.stopping.constraint) is not None:
        return f"{texts} that match its {constraint.name}"
    digits = most * math.log10(words)
    return f"{texts}, at most {words**most:,}" if digits < 9 else f"{texts}, about 10^{digits:.0f}"


def _support(wait: Choice, room: int) -> Support | None:
    """The support of one site; None: it has more than ``room`` values."""
    fn = wait.fn
    if isinstance(wait, DrawWait):
        if fn.choices is None:
            return _texts(fn, wait.name, room)
        if len(fn.choices) > room:
            return None
        table = choice_log_probs([fn], [wait.name])[0]
        pairs = [(fn.value(c), lp) for c, lp in zip(fn.choices, table, strict=True)]
    elif getattr(fn, "has_enumerate_support", False):
        if fn.batch_shape.numel() != 1:
            raise ValueError(
                f"site '{wait.name}' has batch shape {tuple(fn.batch_shape)}: method='exact' "
                "enumerates one variable a site; use a sequential plate"
            )
        pairs = [(value, fn.log_prob(value)) for value in fn.enumerate_support(expand=True)]
    else:
        raise ValueError(
            f"site '{wait.name}' ({type(fn).__name__}) has no finite support, so "
            "method='exact' cannot enumerate it. Use method='smc' or 'importance' "
            "(lmppl.testing has quadrature for one continuous latent)"
        )
    return [(value, log_prob) for value, log_prob in pairs if float(log_prob.sum()) > -math.inf]


def _texts(fn: LMText, name: str, room: int) -> Support | None:
    """The texts of one site; None: there are more than ``room``."""
    try:
        sequences = enumerate_sequences(
            fn.lm.runner,
            fn.prefix_ids,
            fn.stopping,
            fn.temperature,
            limit=room,
            renormalised=fn.law == "local",
        )
    except ValueError as error:
        raise ValueError(f"site '{name}': {error}") from error
    except Exception as error:
        error.add_note(f"raised at site '{name}'")
        raise
    if sequences == []:  # no text can match: one that does not stands for all
        return [(fn.value(()), torch.tensor(-math.inf))]
    return None if sequences is None else [(fn.value(ids), lp) for ids, lp in sequences]


def _wait(particle: Particle) -> Choice:
    assert isinstance(particle.waiting, DrawWait | ChoiceWait)
    return particle.waiting


def _key(wait: Choice) -> Any:
    """Equal for waits with the same support and probabilities."""
    if isinstance(wait, ChoiceWait):
        return id(wait)
    fn = wait.fn
    law = fn.stopping, fn.law, fn.choices, fn.temperature
    return (wait.name, id(fn.lm), fn.prefix_ids, *law)
