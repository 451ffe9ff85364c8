"""What a program asks of a language model: draw a sequence, or score one.

Requests are plain data. A model serves many of them for little more than the price of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from lmppl.lm.tokens.stopping import Stopping
from lmppl.lm.tokens.text import FinishReason


@dataclass(frozen=True, eq=False)
class Draw:
    """Draw one sequence that continues ``prefix`` until ``stopping`` closes it: token k is the
    inverse of the k-th conditional distribution function at ``uniforms[k]``."""

    prefix: tuple[int, ...]
    stopping: Stopping
    uniforms: Tensor  # (max_tokens,) float64 in [0, 1), on the CPU
    temperature: float = 1.0
    name: str = ""  # the site, for error messages


@dataclass(frozen=True, eq=False)
class Drawn:
    """A sequence, and the log-probability of each of its tokens under what it was drawn from."""

    token_ids: tuple[int, ...]
    log_probs: Tensor  # (n,) float32, nats, on the CPU
    reason: FinishReason


def no_distribution(where: str) -> ValueError:
    """The error of logits that define none; ``where`` they are begins its message."""
    return ValueError(
        f"{where} define no distribution: they contain NaN or +inf, or give every token probability "
        "zero. Check the model's weights, its dtype (float16 overflows), and any adapter that was "
        "trained"
    )


@dataclass(frozen=True)
class Score:
    """Score the tokens of ``continuation`` after ``prefix``."""

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]
    temperature: float = 1.0
    closing_token: int | None = None  # also score this token at every position
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
