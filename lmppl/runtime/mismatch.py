"""How far apart two log-probabilities of the same texts are: as drawn, and as scored afterwards.

With d_i = log q(text i) when it was drawn, less log q(text i) by a scoring pass,

    ESS fraction = (sum_i exp(-d_i))^2 / (n sum_i exp(-2 d_i))     (exp(-var d), of normal d)

is Kish's, of n texts of the sampler, weighted to be texts of the scorer. So it is also the ESS that
importance sampling has left where the density that is scored is exactly the posterior: log-weights
are then log Z - d_i. In training of large language models this is the training-inference mismatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.runtime.weights import ess


class TextMismatch(NamedTuple):
    """Of one text of ``num_tokens``: the sum of its tokens' differences, the sum of their sizes, and
    the largest, nats."""

    num_tokens: int
    total: float
    size: float
    largest: float


@dataclass(frozen=True)
class Mismatch:
    """How far two log-probabilities of the same texts are apart.

    Attributes:
        num_texts: texts that were compared.
        num_tokens: tokens of all of them.
        per_token: mean size of a token's difference, nats.
        largest: of any token, nats.
        per_text_stdev: standard deviation of the texts' differences, nats; None of one text.
        ess_fraction: what it leaves of the effective sample size: that of weights that differ by
            nothing else, over the number of texts; near exp(-v), v the square of
            ``per_text_stdev``. In programs that draw several texts a run, each costs as much.
    """

    num_texts: int
    num_tokens: int
    per_token: float
    largest: float
    per_text_stdev: float | None
    ess_fraction: float


def between(firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> Mismatch:
    """Of at least one text, from two versions of its tokens' log-probabilities, (n,) each, n > 0."""
    return over_texts(text_mismatches(zip(firsts, seconds, strict=True)))


def over_texts(texts: Sequence[TextMismatch]) -> Mismatch:
    """The figures of at least one text that was compared."""
    tokens = sum(text.num_tokens for text in texts)
    totals = torch.tensor([text.total for text in texts], dtype=torch.float64)
    return Mismatch(
        num_texts=len(texts),
        num_tokens=tokens,
        per_token=sum(text.size for text in texts) / tokens,
        largest=max(text.largest for text in texts),
        per_text_stdev=float(totals.std()) if len(texts) > 1 else None,
        ess_fraction=ess(-totals) / len(texts),
    )


def text_mismatches(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[TextMismatch]:
    """Of each text, from its log-probabilities (n,), n > 0, as drawn and as scored. Those of all texts
    come to the CPU at once."""
    firsts, seconds = [list(of_all) for of_all in zip(*pairs, strict=True)] or ([], [])
    if not firsts:
        return []
    sizes = [len(first) for first in firsts]
    device = seconds[0].device  # several models' texts may be on several
    seconds = [second.detach().to(device) for second in seconds]
    drawn, scored = (torch.cat(of_all).cpu().double() for of_all in (firsts, seconds))
    differences = torch.where(drawn == scored, 0.0, drawn - scored)  # equal are -inf and -inf, too
    return [
        TextMismatch(len(d), float(d.sum()), float(d.abs().sum()), float(d.abs().max()))
        for d in differences.split(sizes)
    ]
