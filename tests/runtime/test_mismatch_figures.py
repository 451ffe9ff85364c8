"""How far log-probabilities as drawn are from those as scored: the figures, of known numbers."""

import math

import pytest
import torch

from lmppl.runtime.mismatch import Mismatch, TextMismatch, between, text_mismatches


def versions(*texts):
    """Both versions of texts, from their tokens' differences."""
    drawn = [torch.linspace(-3.0, -1.0, len(text)) for text in texts]
    pairs = zip(drawn, texts, strict=True)
    return drawn, [first - torch.tensor(difference) for first, difference in pairs]


def test_the_figures_of_known_differences():
    found = between(*versions([0.5, -0.25], [0.0], [-0.5, 0.125, -0.125]))
    assert (found.num_texts, found.num_tokens) == (3, 6)
    assert found.per_token == pytest.approx(1.5 / 6)
    assert found.largest == pytest.approx(0.5)
    totals = torch.tensor([0.25, 0.0, -0.5], dtype=torch.float64)
    assert found.per_text_stdev == pytest.approx(float(totals.std()))
    weights = (-totals).exp()
    expected = float(weights.sum() ** 2 / (weights**2).sum()) / 3
    assert found.ess_fraction == pytest.approx(expected) and expected < 0.95


def test_normal_differences_leave_exp_of_minus_their_variance():
    generator = torch.Generator().manual_seed(0)
    sizes = (0.5 * torch.randn(20_000, generator=generator) + 0.7).tolist()  # a mean costs nothing
    found = between(*versions(*[[size] for size in sizes]))
    assert found.per_text_stdev == pytest.approx(0.5, rel=0.02)
    assert found.ess_fraction == pytest.approx(math.exp(-0.25), rel=0.02)


def test_equal_versions_and_one_text():
    found = between(*versions([0.0, 0.0]))
    assert found == Mismatch(1, 2, 0.0, 0.0, None, 1.0)


def test_probabilities_of_zero():
    nothing, some = torch.tensor([-math.inf, -1.0]), torch.tensor([-2.0, -1.0])
    assert text_mismatches([(nothing, nothing)]) == [TextMismatch(2, 0.0, 0.0, 0.0)]
    found = between([some, some], [nothing, some])
    assert found.largest == math.inf and found.ess_fraction == 0.5


def test_gradients_are_left_behind():
    drawn, scored = versions([0.5])
    (found,) = text_mismatches([(drawn[0], scored[0].requires_grad_())])
    assert found.total == pytest.approx(0.5)
    assert text_mismatches([]) == []
