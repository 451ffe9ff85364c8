"""What a suspended run waits for: five types, four of which language models answer in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from lmppl.distributions import LMText, Purpose, draw_texts, score_texts
from lmppl.lm import LM

ScoredTokens = tuple[LM, bool, tuple[int, ...], tuple[int, ...]]
"""A text that a language model scores: the model, whether it stands alone (and is not one of
several choices), the prefix, the tokens. Equal ones are computed once."""


@dataclass(frozen=True, eq=False)
class Wait:
    """What a suspended run waits for, at the site ``name``."""

    name: str


class ModelWait(Wait, ABC):
    """A wait that a language model ends."""

    @classmethod
    @abstractmethod
    def answer(cls, waits: Sequence[Any], *, grad: bool = False) -> list[Any]:
        """Answer some waits of this type, at least one, in one call of each language model.

        Args:
            waits: what some runs wait for.
            grad: keep the graph of scores.
        """

    @abstractmethod
    def work(self, answer: Any) -> tuple[int, set[ScoredTokens]]:
        """Tokens that are sampled, and texts that are scored, to answer this wait alone."""


@dataclass(frozen=True, eq=False)
class DrawWait(ModelWait):
    """A draw of ``fn``, made from ``uniforms``; the answer is a ``DrawnText``. Its text begins with the
    tokens ``begun``, which are not drawn."""

    fn: LMText
    uniforms: torch.Tensor  # (num_uniforms,) float64, in [0, 1)
    begun: tuple[int, ...] = ()
    purpose: Purpose = "density"

    @property
    def is_weighed_on_the_way(self) -> bool:
        """Whether the program itself draws a text under a global constraint for its weight, which is
        the product of what the constraint left of the model's probability at each token: so that part
        of it is known of a text under way."""
        fn = self.fn
        return fn.is_constrained and fn.law == "global" and self.purpose == "weights"

    @classmethod
    def answer(cls, waits: Sequence[DrawWait], *, grad: bool = False) -> list[Any]:
        return draw_texts(
            [wait.fn for wait in waits],
            [wait.uniforms for wait in waits],
            [wait.name for wait in waits],
            [wait.begun for wait in waits],
            [wait.purpose for wait in waits],
        )

    def work(self, answer: Any) -> tuple[int, set[ScoredTokens]]:
        if answer.drawn is not None:
            return len(answer.drawn.token_ids), set()
        return 0, _scored_tokens(self.fn, answer.value)


@dataclass(frozen=True, eq=False)
class ScoreWait(ModelWait):
    """The density of ``value`` under ``fn``; the answer is ``(log_prob, Scored | None)``."""

    fn: LMText
    value: torch.Tensor
    score_closing: bool = False

    @classmethod
    def answer(cls, waits: Sequence[ScoreWait], *, grad: bool = False) -> list[Any]:
        return score_texts(
            [wait.fn for wait in waits],
            [wait.value for wait in waits],
            [wait.name for wait in waits],
            grad=grad,
            score_closing=[wait.score_closing for wait in waits],
        )

    def work(self, answer: Any) -> tuple[int, set[ScoredTokens]]:
        return 0, _scored_tokens(self.fn, self.value)


@dataclass(frozen=True, eq=False)
class LateScoresWait(ModelWait):
    """Scores of a run's sites when its program has ended; the answer is a list, one a site."""

    scores: tuple[ScoreWait, ...]

    @classmethod
    def answer(cls, waits: Sequence[LateScoresWait], *, grad: bool = False) -> list[Any]:
        flat = [score for wait in waits for score in wait.scores]
        answers = iter(ScoreWait.answer(flat, grad=grad))
        return [list(islice(answers, len(wait.scores))) for wait in waits]

    def work(self, answer: Any) -> tuple[int, set[ScoredTokens]]:
        return 0, set[ScoredTokens]().union(*(score.work(None)[1] for score in self.scores))


@dataclass(frozen=True, eq=False)
class HiddenWait(ModelWait):
    """The state (``hidden_size``,) of ``lm`` after the tokens ``prefix``."""

    lm: LM
    prefix: tuple[int, ...]

    @classmethod
    def answer(cls, waits: Sequence[HiddenWait], *, grad: bool = False) -> list[Any]:
        states: list[Any] = [None] * len(waits)
        for lm in {id(wait.lm): wait.lm for wait in waits}.values():
            members = [i for i, wait in enumerate(waits) if wait.lm is lm]
            found = lm.hidden([waits[i].prefix for i in members]).cpu()
            for i, state in zip(members, found, strict=True):
                states[i] = state
        return states

    def work(self, answer: Any) -> tuple[int, set[ScoredTokens]]:
        return 0, set()  # no tokens are counted for it


@dataclass(frozen=True, eq=False)
class ChoiceWait(Wait):
    """A value of ``fn``, any distribution but a text's, of an enumerating run: the engine gives
    each in turn to a fork of the run."""

    fn: Any


def _scored_tokens(fn: LMText, value: torch.Tensor) -> set[ScoredTokens]:
    """The texts that scoring a value takes; none outside of the support, which has probability 0."""
    if not fn.supports(value):
        return set()
    texts = (fn.token_ids(value),) if fn.choices is None else fn.choices
    return {(fn.lm, fn.choices is None, fn.prefix_ids, ids) for ids in texts}
