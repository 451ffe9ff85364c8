"""Figures on how different drawn texts are."""

from __future__ import annotations

import numpy as np
import pytest

import lmppl
from lmppl.diagnostics.diversity import distinct_n, edit_distance, text_diversity
from lmppl.testing.programs import CASES


def levenshtein(a, b):
    """By the definition."""
    if not a or not b:
        return len(a) + len(b)
    substituted = levenshtein(a[1:], b[1:]) + (a[0] != b[0])
    return min(substituted, levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1)


def naive(texts, weights):
    """Mean over pairs of different draws, one by one."""
    total = norm = 0.0
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            if i != j:
                longest = max(len(a), len(b))
                total += weights[i] * weights[j] * (levenshtein(a, b) / longest if longest else 0)
                norm += weights[i] * weights[j]
    return total / norm


TEXTS = [(1, 2, 3), (1, 2), (1, 2, 3), (200_000, 2), (), (3, 1, 2, 1)]


def test_distinct_n():
    assert distinct_n([(1, 2, 1), (2,)], 1) == 2 / 4
    assert distinct_n([(1, 2, 1), (1, 2)], 2) == 2 / 3
    assert distinct_n([(1,), ()], 2) is None


@pytest.mark.parametrize("weights", [np.ones(6), np.array([0.1, 0.5, 0.0, 2.0, 0.3, 0.1])])
def test_edit_distance_is_that_of_all_pairs(weights):
    assert edit_distance(TEXTS, weights) == pytest.approx(naive(TEXTS, weights), abs=1e-6)


def test_edit_distance_without_a_pair():
    assert edit_distance([(1,)], np.ones(1)) is None
    assert edit_distance(TEXTS, np.zeros(6)) is None
    assert edit_distance(TEXTS, np.eye(6)[0]) is None
    assert edit_distance([(1, 2)] * 5, np.ones(5)) == pytest.approx(0.0)


def test_of_samples():
    case = CASES["branch"]
    samples = lmppl.infer(
        case.program, *case.args, lm=case.lm, method="importance", num_samples=60, seed=0
    )
    texts = text_diversity(samples)
    assert set(texts) == {"z", "w", "v"}
    for name, found in texts.items():
        pairs = [
            (value, float(weight))
            for value, weight in zip(samples[name], samples.weights, strict=True)
            if value is not None
        ]
        tokens = [value.parts[0] for value, _ in pairs]  # without EOS
        weights = np.array([weight for _, weight in pairs])
        lengths = np.array([len(ids) for ids in tokens])
        assert found.num_draws == len(pairs)
        assert found.num_distinct == len({str(value) for value, _ in pairs})
        assert found.mean_length == pytest.approx(lengths.mean())
        assert found.weighted_mean_length == pytest.approx(weights @ lengths / weights.sum())
        assert found.edit_distance == pytest.approx(naive(tokens, np.ones(len(pairs))), abs=1e-6)
        assert found.weighted_edit_distance == pytest.approx(naive(tokens, weights), abs=1e-6)
