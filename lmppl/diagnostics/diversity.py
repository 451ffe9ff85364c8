"""How different the texts are that a distribution draws, as figures over their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmppl.distributions import LMText
from lmppl.posterior import Posterior
from lmppl.runtime.sites import has_value, is_latent

_MAX_COMPARED = 1000  # draws, whose pairs are all compared; they are exchangeable

_Tokens = tuple[int, ...]


@dataclass(frozen=True)
class TextDiversity:
    """The texts drawn at one latent site; tokens without EOS. Dead samples count, too.

    Attributes:
        num_draws: samples that reach the site.
        num_distinct: different strings among them.
        distinct_1: distinct tokens over all tokens of the draws (Li et al., 2016, arXiv
            1510.03055): lower for more draws. None if there are no tokens.
        distinct_2: the same of pairs of neighbouring tokens.
        edit_distance: mean Levenshtein distance of two draws, over the longer's length: 0 if all
            are equal, 1 if no two share a token. Of the first 1000 draws. None for one draw.
        mean_length: tokens.
        weighted_edit_distance, weighted_mean_length: under the importance weights, so estimates of
            the posterior's; None if one sample has all the weight, or all weights are zero.
    """

    num_draws: int
    num_distinct: int
    distinct_1: float | None
    distinct_2: float | None
    edit_distance: float | None
    mean_length: float
    weighted_edit_distance: float | None
    weighted_mean_length: float | None


def text_diversity(samples: Posterior) -> dict[str, TextDiversity]:
    """Of every latent text site of weighted samples."""
    # Scaled by the largest; all are 0 if that is.
    scaled = (samples.log_weights - samples.log_weights.max()).exp().nan_to_num(0.0)
    sites: dict[str, list[tuple[_Tokens, str, float]]] = {}
    for trace, weight in zip(samples.traces, scaled.tolist(), strict=True):
        for name in trace.nodes:
            if not has_value(trace, name) or not is_latent(trace.nodes[name]):
                continue
            fn, value = trace.nodes[name]["fn"], trace.nodes[name]["value"]
            if isinstance(fn, LMText) and not fn.batch_shape:
                eos = fn.lm.vocabulary.eos_ids
                tokens = tuple(token for token in fn.token_ids(value) if token not in eos)
                sites.setdefault(name, []).append((tokens, str(fn.text(value)), weight))
    return {name: _of_site(draws) for name, draws in sites.items()}


def _of_site(draws: Sequence[tuple[_Tokens, str, float]]) -> TextDiversity:
    tokens = [ids for ids, _, _ in draws]
    lengths = np.array([len(ids) for ids in tokens], dtype=float)
    weights = np.array([weight for _, _, weight in draws])
    total = weights.sum()
    return TextDiversity(
        num_draws=len(draws),
        num_distinct=len({string for _, string, _ in draws}),
        distinct_1=distinct_n(tokens, 1),
        distinct_2=distinct_n(tokens, 2),
        edit_distance=edit_distance(tokens, np.ones(len(draws))),
        mean_length=float(lengths.mean()),
        weighted_edit_distance=edit_distance(tokens, weights),
        weighted_mean_length=float(weights @ lengths / total) if total > 0 else None,
    )


def distinct_n(texts: Sequence[_Tokens], n: int) -> float | None:
    """Distinct n-grams over all n-grams; None if there are none."""
    grams = [ids[i : i + n] for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def edit_distance(texts: Sequence[_Tokens], weights: np.ndarray) -> float | None:
    """Mean normalised Levenshtein distance over pairs i != j of weight w_i w_j.

    None if no such pair has a positive weight.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    texts, weights = texts[:_MAX_COMPARED], weights[:_MAX_COMPARED]
    if weights.sum() == 0:
        return None
    weights = weights / weights.sum()
    pairs = 1.0 - float(weights @ weights)
    if pairs < 1e-9:
        return None
    totals: dict[_Tokens, float] = {}  # equal texts are compared once
    for ids, weight in zip(texts, weights.tolist(), strict=True):
        totals[ids] = totals.get(ids, 0.0) + weight
    mass = np.array(list(totals.values()))
    distances = cdist(list(totals), list(totals), scorer=Levenshtein.normalized_distance)
    return float(mass @ distances.astype(float) @ mass) / pairs
