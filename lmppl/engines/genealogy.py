"""What SMC remembers of its particles: who was a copy of whom, what they weighed, and their texts.

At every barrier, and within texts at every resampling, ``Genealogy`` takes down

    log-weights, ancestors                           a few numbers a particle
    of each particle, what it has that its ancestor had not at the step before: tokens, numbers

so each token that was drawn is kept once, and nothing is decoded before somebody asks. Hence there is no
switch. It reads, and changes nothing, and holds no particle, trace or distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lmppl import runtime
from lmppl.lm.tokens.vocabulary import Vocabulary
from lmppl.report.particles import ParticleStep
from lmppl.runtime import Particle
from lmppl.runtime.sites import is_text


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Tokens of a text; ``is_more``: they go on where those of the step before end."""

    vocabulary: Vocabulary
    ids: tuple[int, ...]
    is_more: bool = False

    def __str__(self) -> str:
        eos_ids = self.vocabulary.eos_ids
        return self.vocabulary.decode([token for token in self.ids if token not in eos_ids])


_Change = _Tokens | torch.Tensor | None
"""What is new of a site; None: it is no longer there (a move, or a guide, has come by another way)."""


class Genealogy:
    """The steps of one run of SMC."""

    def __init__(self) -> None:
        # Steps without sites and values, each with what is new of every particle.
        self._recorded: list[tuple[ParticleStep, list[dict[str, _Change]]]] = []
        # What each slot's particle had when it was last seen, to know what is new: values by site, and
        # of a text under way how many of its tokens.
        self._seen: list[dict[str, torch.Tensor | int]] = []

    def at_barrier(
        self,
        particles: Sequence[Particle],
        log_weights: torch.Tensor,
        compared: torch.Tensor,
        ancestors: Sequence[int] | None = None,
    ) -> None:
        """Take down a step at a barrier, before its resampling.

        Args:
            particles: N of them.
            log_weights: (N,), nats.
            compared: the slots whose particles are compared.
            ancestors: a slot for each; None: no resampling.
        """
        self._seen = self._seen or [{} for _ in particles]
        seen, changes = [], []
        for particle, before in zip(particles, self._seen, strict=True):
            latents = particle.latents
            now = {name: node["value"] for name, node in latents.items()}
            fresh = [name for name, value in now.items() if before.get(name) is not value]
            new: dict[str, _Change] = {n: _change(latents[n], before.get(n)) for n in fresh}
            changes.append(new | {name: None for name in before if name not in now})
            seen.append(now)
        self._seen = seen
        ess = runtime.ess(log_weights[compared])
        self._add(None, log_weights, ess, len(compared), changes, ancestors)

    def within_texts(
        self,
        members: Sequence[int],
        texts: Sequence[tuple[str, Vocabulary, Sequence[int]]],
        log_weights: torch.Tensor,
        ess: float,
        ancestors: Sequence[int],
        num_tokens: int,
    ) -> None:
        """Take down a resampling of texts under way, before it is made.

        Args:
            members: the M slots that draw texts.
            texts: of each, the site's name, the vocabulary and the tokens so far.
            log_weights: (N,), nats, by which all are compared.
            ess: of the members.
            ancestors: of each member, another: numbers from 0 to M - 1.
            num_tokens: of the longest text.
        """
        changes: list[dict[str, _Change]] = [{} for _ in self._seen]
        for slot, (name, vocabulary, ids) in zip(members, texts, strict=True):
            count = self._seen[slot].get(name)
            known = count if isinstance(count, int) else 0
            changes[slot][name] = _Tokens(vocabulary, tuple(ids[known:]), is_more=known > 0)
            self._seen[slot] = {**self._seen[slot], name: len(ids)}
        whole = list(range(len(self._seen)))
        for k, slot in enumerate(members):
            whole[slot] = members[ancestors[k]]
        self._add(num_tokens, log_weights, ess, len(members), changes, whole)

    def _add(
        self,
        num_tokens: int | None,
        log_weights: torch.Tensor,
        ess: float,
        num_compared: int,
        changes: list[dict[str, _Change]],
        ancestors: Sequence[int] | None,
    ) -> None:
        whole = tuple(range(len(changes)) if ancestors is None else ancestors)
        self._seen = [self._seen[ancestor] for ancestor in whole]
        all_equal = bool((log_weights == log_weights[0]).all())
        if self._recorded or any(changes) or not all_equal:  # else nothing has happened yet
            step = ParticleStep(
                sites=(),
                num_tokens=num_tokens,
                log_weights=log_weights.clone(),
                ess=ess,
                num_compared=num_compared,
                ancestors=whole,
                is_resampled=ancestors is not None,
                values=(),
            )
            self._recorded.append((step, changes))

    def steps(self) -> list[ParticleStep]:
        """What was taken down, with texts."""
        held: list[dict[str, Any]] = [{} for _ in self._seen]
        decoded: dict[_Tokens, str] = {}
        steps = []
        for step, changes in self._recorded:
            held = [_after(*pair) for pair in zip(held, changes, strict=True)]
            values = tuple({n: _shown(v, decoded) for n, v in own.items()} for own in held)
            sites = dict.fromkeys(n for own in changes for n, v in own.items() if v is not None)
            steps.append(replace(step, sites=tuple(sites), values=values))
            held = [held[ancestor] for ancestor in step.ancestors]
        return steps


def _change(node: Any, known: torch.Tensor | int | None) -> _Change:
    """The value of a site; of a text, ``known`` may be how many of its tokens are recorded."""
    fn, value = node["fn"], node["value"]
    if not is_text(fn):
        return value.detach()
    first = known if isinstance(known, int) else 0
    return _Tokens(fn.lm.vocabulary, fn.token_ids(value)[first:], is_more=first > 0)


def _after(held: dict[str, Any], changes: dict[str, _Change]) -> dict[str, Any]:
    """The values of a particle after some changes."""
    if not changes:
        return held
    held = dict(held)
    for name, change in changes.items():
        if isinstance(change, _Tokens) and change.is_more:
            held[name] = _Tokens(change.vocabulary, held[name].ids + change.ids)
        elif change is None:
            del held[name]
        else:
            held[name] = change
    return held


def _shown(value: Any, decoded: dict[_Tokens, str]) -> Any:
    """A value as a step has it; ``decoded`` are the texts that are known already."""
    if not isinstance(value, _Tokens):
        return value
    if value not in decoded:
        decoded[value] = str(value)
    return decoded[value]
