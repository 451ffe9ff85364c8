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


# --- the spread of groups ------------------------------------------------------------------------


def jackknife(log_z, sizes=None):
    """Of groups with these estimates (K,)."""
    sizes = [5] * len(log_z) if sizes is None else sizes
    totals = torch.as_tensor(log_z, dtype=torch.float64) + torch.tensor(sizes).log()
    return estimates.jackknife_stderr(totals, sizes)


def test_groups_that_hardly_differ_have_the_relative_standard_error():
    log_z = 0.01 * torch.randn(12, generator=torch.Generator().manual_seed(0)).double()
    z = log_z.exp()
    expected = float(z.std() / z.mean()) / math.sqrt(12)
    assert jackknife(log_z) == pytest.approx(expected, rel=0.02)
    assert jackknife(log_z - 700.0) == pytest.approx(jackknife(log_z), rel=1e-9)
    assert jackknife([-3.0] * 7) == pytest.approx(0.0, abs=1e-12)


def test_it_is_what_the_log_of_the_mean_would_be_without_each_group():
    log_z = torch.tensor([0.0, 1.5, -2.0, 3.0, 0.5]).double()
    without = torch.stack(
        [log_z[[j for j in range(5) if j != k]].logsumexp(0) - math.log(4) for k in range(5)]
    )
    expected = math.sqrt(4 / 5 * float(((without - without.mean()) ** 2).sum()))
    assert jackknife(log_z) == pytest.approx(expected)


def test_it_grows_with_the_nats_between_groups():
    """The relative standard error of the mean would be 1 nat at most."""
    for nats in (2.0, 5.0, 20.0):
        distance = math.log((math.exp(nats) + 2) / 3)  # of what the others say from what all say
        assert jackknife([0.0, 0.0, 0.0, nats]) == pytest.approx(0.75 * distance)
    assert jackknife([-math.inf, 0.0, 0.0, 0.0]) < 1.0
    assert jackknife([-math.inf, -math.inf, -math.inf, 0.0]) == math.inf


def test_groups_of_unequal_sizes():
    """Of groups of 1, 4 and 16 weights each: the error is that of many such estimates."""
    rng = np.random.default_rng(0)
    sizes, found, errors = [1, 4, 16] * 8, [], []
    weights = rng.gamma(3.0, size=(1000, sum(sizes)))
    for own in torch.from_numpy(weights):
        totals = torch.stack([part.sum() for part in own.split(sizes)]).log()
        found.append(float(own.mean().log()))
        errors.append(estimates.jackknife_stderr(totals, sizes))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(found), rel=0.1)
    hits = np.abs(np.array(found) - math.log(3.0)) < 2 * np.array(errors)
    assert 0.9 < hits.mean() < 0.97


def covers(draws, error=jackknife):
    """How often two standard errors hold the truth, log 1, of groups drawn in rows (R, K)."""
    log_z = torch.from_numpy(draws).log()
    means = log_z.logsumexp(1) - math.log(log_z.shape[1])
    errors = torch.tensor([error(row) for row in log_z])
    return float((means.abs() < 2 * errors).double().mean())


def delta(log_z):
    z = log_z.exp()
    return float(z.std() / z.mean()) / math.sqrt(len(z))


def test_how_often_two_standard_errors_hold_the_truth():
    """What ``LEAST_ISLANDS`` says; and on tails built to mislead, where any spread is too small in most
    runs, the jackknife misses less often than the relative error of the mean."""
    rng = np.random.default_rng(0)
    near = {k: covers(1.0 + 0.1 * rng.normal(size=(1500, k))) for k in (2, 4, 8, 32)}
    assert near == pytest.approx({2: 0.70, 4: 0.86, 8: 0.92, 32: 0.945}, abs=0.03)
    tailed = np.exp(rng.normal(-2.0, 2.0, size=(1500, 16)))  # its mean is 1, its median 0.14
    assert covers(tailed) > 0.71 > 0.69 > covers(tailed, delta)
    rare = rng.binomial(32, 0.03, size=(1500, 16)) / 32 / 0.03  # most groups find it 0 or 1 times
    assert covers(rare) > 0.9


def test_one_island_with_most_of_the_weight_is_a_doubt():
    assert estimates.doubts(50.0, islands=[0.8, 0.1, 0.1]) == [
        "one of 3 islands has 80% of the weight"
    ]
    assert not estimates.doubts(50.0, islands=[0.6, 0.2, 0.2])
    assert not estimates.doubts(50.0, islands=[0.9, 0.1]) and not estimates.doubts(
        50.0, islands=[1.0]
    )
