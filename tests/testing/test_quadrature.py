"""Quadrature nodes reproduce moments."""

import math

import pyro.distributions as dist
import pytest
import torch

from lmppl.testing import quadrature_nodes


@pytest.mark.parametrize("a, b", [(2, 2), (5, 1), (1, 1), (0.5, 0.5), (0.5, 3), (2.25, 0.75)])
def test_beta_moments_are_exact(a, b):
    x, log_w = quadrature_nodes(dist.Beta(a, b), 8)
    for m in range(16):
        log_moment = (
            math.lgamma(a + m) - math.lgamma(a) + math.lgamma(a + b) - math.lgamma(a + b + m)
        )
        assert float((log_w.exp() * x**m).sum()) == pytest.approx(math.exp(log_moment), abs=1e-12)


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Normal(1.0, 2.0),
        dist.Gamma(2.5, 2.0),
        dist.Exponential(2.0),
        dist.Uniform(-1.0, 3.0),
    ],
    ids=lambda d: type(d).__name__,
)
def test_mean_and_variance(distribution):
    x, log_w = quadrature_nodes(distribution, 6)
    mean = (log_w.exp() * x).sum()
    variance = (log_w.exp() * (x - mean) ** 2).sum()
    torch.testing.assert_close(log_w.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(mean, distribution.mean.double())
    torch.testing.assert_close(variance, distribution.variance.double())


def test_others_are_refused():
    with pytest.raises(NotImplementedError, match="LogNormal"):
        quadrature_nodes(dist.LogNormal(0.0, 1.0), 4)
    with pytest.raises(ValueError, match="scalar"):
        quadrature_nodes(dist.Normal(torch.zeros(2), 1.0), 4)
