"""Training losses against slow references, and against what they mean, enumerated."""

import itertools
import math

import pytest
import torch

from lmppl import objectives
from lmppl.testing.programs import CASES

DEAD = -math.inf


def some(n, seed=0, dead=()):
    generator = torch.Generator().manual_seed(seed)
    log_r = torch.randn(n, generator=generator, dtype=torch.float64) * 3 - 5
    log_q = torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()
    log_r[list(dead)] = DEAD
    return log_r, log_q


def gradient(loss, *parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True)


# --- vargrad -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 17])
def test_vargrad_is_the_variance(n):
    log_r, log_q = some(n)
    loss, variance = objectives.vargrad(log_r, log_q), torch.var(log_r - log_q)
    assert loss.item() == pytest.approx(variance.item())
    torch.testing.assert_close(gradient(loss, log_q), gradient(variance, log_q))


def test_vargrad_leaves_dead_traces_out():
    log_r, log_q = some(7, dead=(1, 4))
    live = log_r > DEAD
    loss = objectives.vargrad(log_r, log_q)
    assert loss.item() == pytest.approx(torch.var((log_r - log_q)[live]).item())
    (slope,) = gradient(loss, log_q)
    assert slope[~live].tolist() == [0.0, 0.0] and bool((slope[live] != 0).all())


@pytest.mark.parametrize("dead", [(0, 1, 2), (0, 2)], ids=["none alive", "one alive"])
@pytest.mark.parametrize("loss", [objectives.vargrad, objectives.subtb])
def test_too_few_live_traces_are_no_loss_and_no_gradient(loss, dead):
    log_r, log_q = some(3, dead=dead)
    value = loss(log_r, log_q)
    assert value.item() == 0.0
    assert gradient(value, log_q)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("huber", [0.5, 1.0, 3.0])
def test_huber_against_its_definition(huber):
    log_r, log_q = some(9, seed=1)
    log_r[3] += 40.0  # an outlier
    u = (log_r - log_q).detach()

    def cost(centre):
        total = 0.0
        for each in u.tolist():
            d = abs(each - centre)
            total += d**2 if d <= huber else 2 * huber * d - huber**2
        return total / (len(u) - 1)

    low, high = float(u.min()), float(u.max())
    for _ in range(200):  # ternary search: the cost is convex in the centre
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if cost(a) < cost(b) else (a, high)
    loss = objectives.vargrad(log_r, log_q, huber=huber)
    assert loss.item() == pytest.approx(cost(low), rel=1e-3)
    (slope,) = gradient(loss, log_q)
    naive = -2 * (u - low).clamp(-huber, huber) / (len(u) - 1)
    torch.testing.assert_close(slope, naive, atol=0.05 * huber, rtol=0.0)


def test_huber_far_out_is_the_variance():
    log_r, log_q = some(6)
    wide = objectives.vargrad(log_r, log_q, huber=1e6)
    torch.testing.assert_close(wide, objectives.vargrad(log_r, log_q))


# --- tb ------------------------------------------------------------------------------------------


def test_tb_against_a_loop():
    log_r, log_q = some(6, dead=(2,))
    log_z = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    terms = [
        (log_z.item() + q - r) ** 2
        for r, q in zip(log_r.tolist(), log_q.tolist(), strict=True)
        if r > DEAD
    ]
    loss = objectives.tb(log_r, log_q, log_z)
    assert loss.item() == pytest.approx(sum(terms) / len(terms))
    slope = gradient(loss, log_q)[0]
    assert slope[2] == 0.0


def test_tb_uses_a_learned_log_z_that_is_zero():
    """``log_z or estimate`` would replace it when it is 0, and it would never be learned."""
    log_r, log_q = some(5)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = objectives.tb(log_r, log_q, log_z)
    assert loss.item() == pytest.approx(((log_q - log_r) ** 2).mean().item())
    (slope,) = gradient(loss, log_z)
    assert slope.item() == pytest.approx(2 * (log_q - log_r).mean().item())


def test_tb_of_dead_traces_only():
    log_r, log_q = some(2, dead=(0, 1))
    log_z = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = objectives.tb(log_r, log_q, log_z)
    assert loss.item() == 0.0
    assert gradient(loss, log_z)[0] == 0.0


# --- subtb ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.3, 0.9, 1.0, 1.5])
@pytest.mark.parametrize("dead", [(), (0,), (2, 3)], ids=["alive", "first dead", "inner dead"])
def test_subtb_against_all_pairs(lam, dead):
    log_r, log_q = some(7, seed=3, dead=dead)
    u = log_r - log_q
    total, weights = 0.0, 0.0
    for i, j in itertools.combinations([k for k in range(7) if k not in dead], 2):
        total = total + lam ** (j - i) * (u[j] - u[i]) ** 2
        weights += lam ** (j - i)
    loss, naive = objectives.subtb(log_r, log_q, lam), total / weights
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(gradient(loss, log_q), gradient(naive, log_q))


# --- alive ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4])
def test_alive_is_unbiased_for_the_first_terms_of_minus_log_alive(n):
    """Every on-policy batch of n traces out of four, with its probability."""
    logits = torch.tensor([0.3, -0.5, 1.1, 0.2], dtype=torch.float64, requires_grad=True)
    log_r = torch.tensor([-2.0, DEAD, DEAD, -7.0], dtype=torch.float64)
    log_q = torch.log_softmax(logits, 0)
    expected = torch.zeros(4, dtype=torch.float64)
    for batch in itertools.product(range(4), repeat=n):
        rows = list(batch)
        probability = log_q[rows].sum().exp().item()
        surrogate = objectives.alive(log_r[rows], log_q[rows])
        expected += probability * torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
    mass = log_q.exp()[log_r > DEAD].sum()
    series = sum((1 - mass) ** k / k for k in range(1, n))
    (truth,) = torch.autograd.grad(series, logits, retain_graph=True)
    torch.testing.assert_close(expected, truth)
    (limit,) = torch.autograd.grad(-mass.log(), logits)
    assert float(torch.cosine_similarity(expected, limit, dim=0)) == pytest.approx(1.0)


def test_alive_is_nothing_where_all_are_alive_or_dead():
    for dead in [(), (0, 1, 2)]:
        log_r, log_q = some(3, dead=dead)
        loss = objectives.alive(log_r, log_q)
        assert gradient(loss, log_q)[0].tolist() == [0.0, 0.0, 0.0]


# --- the optimum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_the_exact_posterior_has_no_loss_and_no_gradient(case):
    exact = case.enumerate()
    log_r = torch.tensor([t.log_joint for t in exact], dtype=torch.float64)
    log_r = log_r[log_r > DEAD]
    log_q = (log_r - exact.log_evidence).requires_grad_()
    log_z = torch.tensor(exact.log_evidence, dtype=torch.float64, requires_grad=True)
    for loss in (
        objectives.vargrad(log_r, log_q),
        objectives.vargrad(log_r, log_q, huber=3.0),
        objectives.tb(log_r, log_q, log_z),
        objectives.subtb(log_r, log_q),
        objectives.subtb(log_r, log_q, 0.8),
        objectives.alive(log_r, log_q),
    ):
        assert loss.item() == pytest.approx(0.0, abs=1e-18)
        (slope,) = gradient(loss, log_q)
        assert float(slope.abs().max()) < 1e-9
