"""The answer of a method: what most of a few draws say."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import lmppl
from lmppl.runtime import nth_seed

VOTES = 10
"""Draws an input."""

Shares = dict[str, float]
"""What the live draws returned, with its share of them, the largest first; {}: no draw was alive."""

Inputs = Sequence[tuple[Any, ...]]


def shares(program: Callable[..., Any], inputs: Inputs, **options: Any) -> list[Shares]:
    """What a program returns on each input, in ``VOTES`` weighted draws.

    Args:
        program: returns a string.
        inputs: its arguments.
        **options: of ``lmppl.infer_batch``.
    """
    found = _posteriors(program, inputs, **options)
    return [{} if each is None else each.probs(returns=True) for each in found]


def guided_shares(
    latents: Callable[..., Any],
    reply: Callable[..., Any],
    inputs: Inputs,
    *,
    guide: Any,
    lm: lmppl.LM,
    seed: int,
) -> list[Shares]:
    """The same where a guide draws the latents and the model the answer: q(z | x) p(y | x, z), as the
    guide has learned nothing of the answer.

    Args:
        latents: the program up to its answer; what it returns are the arguments of ``reply``.
        reply: the rest of the program; returns a string.
        inputs: the arguments of ``latents``.
    """
    drawn = _posteriors(
        latents, inputs, lm=lm, seed=seed, method="gflownet", guide=guide, correct=False
    )
    rests = [[] if each is None else _live_returns(each) for each in drawn]
    flat = [rest for of_input in rests for rest in of_input]
    options = {"lm": lm, "seed": nth_seed(seed, 0), "method": "importance"}
    answers = iter(_posteriors(reply, flat, num_samples=1, **options))
    found = []
    for of_input in rests:
        counts = Counter(next(answers).returns[0] for _ in of_input)
        found.append({answer: n / len(of_input) for answer, n in counts.most_common()})
    return found


def score(found: Sequence[Shares], right: Sequence[str]) -> dict[str, float]:
    """``accuracy``: the share of the inputs for which most draws are right; ``share``: of the draws that
    are right, in the mean."""
    pairs = list(zip(found, right, strict=True))
    return {
        "accuracy": statistics.fmean(next(iter(each), None) == answer for each, answer in pairs),
        "share": statistics.fmean(each.get(answer, 0.0) for each, answer in pairs),
    }


def _posteriors(
    program: Callable[..., Any], inputs: Inputs, num_samples: int = VOTES, **options: Any
) -> list[lmppl.Posterior | None]:
    """One an input; None where no draw is alive."""
    found: list[lmppl.Posterior | None] = []
    for each in lmppl.infer_batch(
        program, inputs, num_samples=num_samples, progress=False, on_error="return", **options
    ):
        if isinstance(each, lmppl.ZeroEvidenceError):
            found.append(None)
        elif isinstance(each, Exception):
            raise each
        else:
            found.append(each)
    return found


def _live_returns(posterior: lmppl.Posterior) -> list[Any]:
    weighted = zip(posterior.returns, posterior.weights.tolist(), strict=True)
    return [returned for returned, weight in weighted if weight > 0]
