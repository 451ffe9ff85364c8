"""What a program asks of a language model: draw a sequence, or score one.

Requests are plain data. A model serves many of them for little more than the price of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

from lmppl.lm.tokens.stopping import Stopping
from lmppl.lm.tokens.text import FinishReason

Way = Literal["masks", "rejection", "model"]
"""How the tokens of a constrained sequence are drawn: among those that a mask over the vocabulary
allows; among the same by rejection, which asks about a few tokens (``rejection.py``); or from the model,
until the sequence can't match any more."""


@dataclass(frozen=True, eq=False)
class Draw:
    """Draw one sequence that continues ``prefix`` until ``stopping`` closes it: token k is the
    inverse of the k-th conditional distribution function at ``uniforms[k]``. Where there is a
    constraint, that is the function of the tokens which it allows; by ``"rejection"``, the uniform
    is the seed of the draw."""

    prefix: tuple[int, ...]
    stopping: Stopping
    uniforms: Tensor  # float64 in [0, 1), on the CPU, one for each token that may be drawn
    temperature: float = 1.0
    name: str = ""  # the site, for error messages
    steered: bool = False  # leave out tokens after which the constraint can't be met in time
    begun: tuple[int, ...] = ()  # the tokens that the sequence begins with, which are not drawn
    way: Way = "masks"


@dataclass(frozen=True, eq=False)
class Drawn:
    """The tokens that were drawn of a sequence, with their log-probabilities under the model.

    It was drawn from these where there is no constraint; else each token had ``log_probs -
    log_masses``. By rejection that is no density, but what makes the draw properly weighted: the masses
    are unbiased estimates then, independent of the tokens.
    """

    token_ids: tuple[int, ...]
    log_probs: Tensor  # (n,) float32, nats, on the CPU
    reason: FinishReason | None  # None: the constraint allowed no further token
    matches: bool = True  # whether it matches the constraint
    # (n,) float32, nats: of the model's probability of all tokens that were allowed, in whose place each
    # was drawn; None: there is no constraint.
    log_masses: Tensor | None = None


def no_distribution(where: str) -> ValueError:
    """The error of logits that define none; ``where`` they are begins its message."""
    return ValueError(
        f"{where} define no distribution: they contain NaN or +inf, or give every token probability "
        "zero. Check the model's weights, its dtype (float16 overflows), and any adapter that was "
        "trained"
    )


@dataclass(frozen=True)
class Allowed:
    """The tokens that a constraint allows: what a next-token distribution is renormalised over."""

    stopping: Stopping
    steered: bool  # without those after which it can't be met in time


@dataclass(frozen=True)
class Score:
    """Score the tokens of ``continuation`` after ``prefix``."""

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]
    temperature: float = 1.0
    closing_token: int | None = None  # also score this token at every position
    allowed: Allowed | None = None  # renormalise over these tokens; None: over all
    name: str = field(default="", compare=False)  # the site, for error messages


@dataclass(frozen=True, eq=False)
class Scored:
    """Log-probabilities of a continuation, token by token."""

    log_probs: Tensor  # (n,) float32: log p(t_k | prefix, t_<k)
    closing_log_probs: Tensor | None = None  # (n,) float32: log p(c | prefix, t_<k)

    @cached_property
    def log_prob(self) -> Tensor:
        """Their sum, 0-d. (Equal requests share it.)"""
        return self.log_probs.sum()
