"""How many tokens went through language models."""

from __future__ import annotations

from dataclasses import dataclass, replace


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

    def count(self, *, sampled: int = 0, scored: int = 0, trained: int = 0) -> None:
        for usage in (self, _total):
            usage.tokens_sampled += sampled
            usage.tokens_scored += scored
            usage.tokens_trained += trained

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.tokens_sampled - other.tokens_sampled,
            self.tokens_scored - other.tokens_scored,
            self.tokens_trained - other.tokens_trained,
        )


_total = Usage()  # over all models, for reports of a whole run


def total_usage() -> Usage:
    """Tokens of all models together since the process began."""
    return replace(_total)
