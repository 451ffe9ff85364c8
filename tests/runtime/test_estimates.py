"""Bounds of log Z, their errors, and the tail of log-weights."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch

from lmppl.runtime import estimates


def log_pareto(k, num, seed=0):
    """Logs of draws of a generalised Pareto distribution of shape k, above 0.1."""
    uniform = np.random.default_rng(seed).random(num)
    return np.log((uniform**-k - 1) / k + 0.1)


@pytest.mark.parametrize("k", [-0.5, 0.3, 0.7, 1.2])
def test_pareto_k_is_the_shape_of_the_upper_tail_of_the_weights(k):
    found = [estimates.pareto_k(log_pareto(k, 20_000, seed) - 50.0)[0] for seed in range(4)]
    assert np.mean(found) == pytest.approx(k, abs=0.15)


def test_pareto_k_looks_at_large_weights_only():
    u = log_pareto(0.3, 20_000)
    u[u < np.median(u)] -= 30.0
    assert estimates.pareto_k(u)[0] == pytest.approx(0.3, abs=0.2)


def test_pareto_k_beyond_floating_point_is_infinite():
    assert estimates.pareto_k(2000.0 * np.random.default_rng(0).normal(size=300)) == (
        math.inf,
        None,
    )


def test_pareto_k_says_why_there_is_none(monkeypatch):
    u = np.random.default_rng(0).normal(size=300)
    assert estimates.pareto_k(u[:25])[0] is not None
    assert estimates.pareto_k(u[:24]) == (None, "24 live draws, it takes 25")
    for equal in (np.zeros(300), np.repeat([0.0, 1.0, 2.0], 100)):
        value, why = estimates.pareto_k(equal)
        assert value is None and "equal" in why
    for name in [each for each in sys.modules if each.split(".")[0] == "arviz_stats"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "arviz_stats", None)
    value, why = estimates.pareto_k(u)
    assert value is None and "lmppl-pyro[diagnostics]" in why


def test_upper_bound_in_expectation():
    """Over all outcomes of two draws of q and one of p: above log Z, and below the EUBO."""
    log_r = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    log_z = float(log_r.logsumexp(0))
    p, u = (log_r - log_z).exp(), log_r - q.log()
    expected = 0.0
    for i, j, k in itertools.product(range(3), repeat=3):
        bound, stderr = estimates.iw_upper_bound(u[[i]], u[[j, k]], 0.1)
        assert stderr is None  # one exact draw has no spread
        assert bound == pytest.approx(float(u[[i, j, k]].exp().mean().log()))
        expected += float(p[i] * q[j] * q[k]) * bound
    assert log_z + 0.01 < expected < float(p @ u) - 0.1


def test_upper_bound_error_covers_repetition():
    generator = torch.Generator().manual_seed(0)

    def once():
        u = torch.randn(100, dtype=torch.float64, generator=generator)
        exact = 1.0 + torch.randn(50, dtype=torch.float64, generator=generator)  # tilted by exp(u)
        iw_stderr = float(u.exp().std() / u.exp().mean()) / math.sqrt(100)
        return estimates.iw_upper_bound(exact, u, iw_stderr)

    bounds, stderrs = zip(*[once() for _ in range(300)], strict=True)
    assert np.std(bounds) < np.mean(stderrs) < 1.5 * np.std(bounds)


def test_elbo_of_the_live_part():
    u = torch.tensor([-1.0, -math.inf, -2.0, -3.0], dtype=torch.float64)
    value, stderr = estimates.elbo_alive(u)
    assert value == pytest.approx(-2.0 + math.log(0.75))
    # The mean's error, and that of the log of the share.
    assert stderr == pytest.approx(math.sqrt(1 / 3 + (0.25 / 0.75) / 4))
    assert estimates.mean_of(u) == (-math.inf, None)
    assert estimates.elbo_alive(u[[1]]) == (-math.inf, None)
    assert estimates.elbo_alive(u[[0]]) == (-1.0, None)


def test_infinitely_far_whatever_the_bounds():
    assert estimates.less(-2.0, -1.0, -5.0) == (3.0, 4.0)
    assert estimates.less(-math.inf, math.inf, -math.inf) == (math.inf, math.inf)
    assert estimates.combined(3.0, 4.0) == 5.0
    assert estimates.combined(3.0, None) is None
