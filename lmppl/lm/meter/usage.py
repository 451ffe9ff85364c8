"""How many tokens went through language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class Usage:
    """Tokens that went through a model and its adapters. Set the numbers to 0 to count anew.

    Attributes:
        tokens_sampled: drawn.
        tokens_scored: scored without a gradient.
        tokens_trained: scored with a gradient to parameters that are trained.
    """

    tokens_sampled: int = 0
    tokens_scored: int = 0
    tokens_trained: int = 0

    _total: ClassVar[list[int]] = [0, 0, 0]  # over all models, for reports of a whole run

    def count(self, *, sampled: int = 0, scored: int = 0, trained: int = 0) -> None:
        self.tokens_sampled += sampled
        self.tokens_scored += scored
        self.tokens_trained += trained
        for kind, tokens in enumerate((sampled, scored, trained)):
            Usage._total[kind] += tokens

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.tokens_sampled - other.tokens_sampled,
            self.tokens_scored - other.tokens_scored,
            self.tokens_trained - other.tokens_trained,
        )


def total_usage() -> Usage:
    """Tokens of all models together since the process began."""
    return Usage(*Usage._total)
