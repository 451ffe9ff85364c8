"""Objectives that are known to fail, each beside one that works, on a tree that can be enumerated.

Strings over ``a`` and ``b`` of at most three tokens. Shorter ones close with a token ``c``, those
of three tokens with no further factor. The guide is a table: one softmax a node.
"""

import itertools
import math

import pytest
import torch

from lmppl.training import objectives

DEAD = -math.inf
STRINGS = ["".join(s) for n in range(4) for s in itertools.product("ab", repeat=n)]
NODES = [s for s in STRINGS if len(s) < 3]
LENGTHS = torch.tensor([float(len(s)) for s in STRINGS], dtype=torch.float64)
TRUNCATIONS = [[STRINGS.index(s[:t]) for t in range(len(s) + 1)] for s in STRINGS]
ALL = torch.ones(len(STRINGS), dtype=torch.bool)
LONG = LENGTHS >= 2


def paths():
    """Which of the (node, token) pairs each string consists of, (15, 21)."""
    steps = torch.zeros(len(STRINGS), len(NODES), 3, dtype=torch.float64)
    for i, string in enumerate(STRINGS):
        for t, token in enumerate((string + "c")[:3]):
            steps[i, NODES.index(string[:t]), "abc".index(token)] = 1.0
    return steps.flatten(1)


PATHS = paths()
WITHOUT_CLOSE = PATHS * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).repeat(len(NODES))


def log_density(logits, legal=ALL, steps=PATHS):
    """log q of every string, (15,); where a string is illegal, so is the token that closes it."""
    closed = torch.zeros(len(NODES), 3, dtype=torch.bool)
    closed[:, 2] = ~legal[: len(NODES)]
    factors = torch.log_softmax(logits.masked_fill(closed, DEAD), 1).flatten()
    log_q = steps @ factors.masked_fill(factors == DEAD, 0.0)
    return log_q.masked_fill(~legal, DEAD)


def reward(seed=0, spread=1.0):
    """log R of every string: a uniform language model, times a likelihood; short is probable."""
    generator = torch.Generator().manual_seed(seed)
    prior = log_density(torch.zeros(len(NODES), 3, dtype=torch.float64))
    return prior + spread * torch.randn(len(STRINGS), generator=generator, dtype=torch.float64)


def train(loss, *, legal=ALL, steps=200, learned=None, density=PATHS):
    """Fit on 16 strings a step from the guide itself. Returns log q of every string, (15,).

    ``loss(log_q, rows)`` sees ``log_q`` of every string, by the factors in ``density``, and which
    strings were drawn; ``learned`` is a parameter of its own.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(len(NODES), 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    if learned is not None:
        optimizer.add_param_group({"params": [learned], "lr": 1.25})
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        drawn = log_density(logits.detach(), legal).exp()
        rows = torch.multinomial(drawn, 16, replacement=True, generator=generator)
        optimizer.zero_grad()
        loss(log_density(logits, legal, density), rows).backward()
        optimizer.step()
        decay.step()
    return log_density(logits.detach(), legal)


def distance(log_q, log_r):
    """Total variation between the guide and the posterior."""
    return 0.5 * float((log_q.exp() - torch.softmax(log_r, 0)).abs().sum())


def vargrad(log_r):
    return lambda log_q, rows: objectives.vargrad(log_r[rows], log_q[rows])


def subtb(log_r):
    """All pairs of truncations of each string, and the variance between strings."""

    def loss(log_q, rows):
        strings, counts = rows.unique(return_counts=True)
        terms = [objectives.subtb(log_r[TRUNCATIONS[k]], log_q[TRUNCATIONS[k]]) for k in strings]
        return (torch.stack(terms) * counts).sum() / len(rows) + vargrad(log_r)(log_q, rows)

    return loss


def with_alive(loss, log_r):
    return lambda log_q, rows: loss(log_q, rows) + objectives.alive(log_r[rows], log_q[rows])


# --- a minimum length ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [vargrad, subtb])
def test_a_penalty_for_short_strings_where_a_mask_is_exact(loss):
    """Between -99 and its neighbours lie residuals that drown all others.

    Either form of probability zero gets there in the same number of steps: short strings that the
    guide cannot draw, or that have R = 0 and are driven down.
    """
    dead = reward().masked_fill(~LONG, DEAD)
    penalty = reward().masked_fill(~LONG, -99.0)
    masked = distance(train(loss(dead), legal=LONG), dead)
    driven = distance(train(with_alive(loss(dead), dead)), dead)
    penalised = distance(train(loss(penalty)), dead)
    assert masked < 0.01
    assert driven < 0.08  # nearly all of it short strings, which fade as 1 / steps
    assert penalised > 0.2


def test_a_penalty_with_a_learned_log_z():
    def tb(log_r, learned):
        return lambda log_q, rows: objectives.tb(log_r[rows], log_q[rows], learned)

    distances = []
    for zero, legal in ((DEAD, LONG), (-99.0, ALL)):
        log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
        log_r = reward().masked_fill(~LONG, zero)
        distances.append(distance(train(tb(log_r, log_z), legal=legal, learned=log_z), log_r))
    assert distances[0] < 0.01 and distances[1] > 0.2


def test_dead_strings_that_nothing_drives_down():
    """They stay out of the variance, so without ``alive`` it is zero at a wrong guide."""
    dead = reward().masked_fill(~LONG, DEAD)
    log_q = train(vargrad(dead))
    live = (dead - log_q)[LONG]
    assert float(live.max() - live.min()) < 0.1  # the loss has nothing left to say
    assert distance(log_q, dead) > 0.4


# --- length collapse -----------------------------------------------------------------------------


def maximise(log_r):
    """The exact gradient of E_q[log R]: no entropy."""
    return lambda log_q, rows: -(log_q.exp() * log_r).sum()


def policy_gradient(log_r):
    """PPO of one step per batch, without a penalty."""

    def loss(log_q, rows):
        old = log_q[rows].detach()
        return objectives.ppo(log_r[rows], log_q[rows], old, torch.zeros_like(old), kl=0.0)

    return loss


def elbo(log_r):
    return lambda log_q, rows: objectives.elbo(log_r[rows], log_q[rows])


def wake(log_r):
    return lambda log_q, rows: objectives.wake(log_r[rows], log_q[rows])


@pytest.mark.parametrize("loss", [maximise, policy_gradient])
def test_maximising_log_r_collapses_to_the_shortest_string(loss):
    """log R falls with every token, so the mode of the joint is empty or nearly so."""
    log_r = reward(spread=0.3)
    posterior = torch.softmax(log_r, 0)
    assert STRINGS[int(log_r.argmax())] == "" and float(posterior @ LENGTHS) > 1.0
    log_q = train(loss(log_r), steps=400)
    assert float(log_q.exp()[0]) > 0.9
    assert float(log_q.exp() @ LENGTHS) < 0.1
    assert distance(log_q, log_r) > 0.4


@pytest.mark.parametrize("loss", [vargrad, subtb, elbo, wake])
def test_no_collapse_where_the_posterior_is_the_optimum(loss):
    log_r = reward(spread=0.3)
    log_q = train(loss(log_r), steps=400)
    posterior = torch.softmax(log_r, 0)
    assert float(log_q.exp() @ LENGTHS) == pytest.approx(float(posterior @ LENGTHS), abs=0.01)
    assert distance(log_q, log_r) < 0.005


# --- the end's probability -----------------------------------------------------------------------


def test_a_loss_without_the_closing_factor_leaves_the_end_free():
    """log q of the tokens alone is no density of strings: the end's probability drifts."""
    log_r = reward(2)
    posterior = torch.softmax(log_r, 0)
    right = train(vargrad(log_r), steps=400)
    wrong = train(vargrad(log_r), steps=400, density=WITHOUT_CLOSE)
    assert distance(right, log_r) < 0.01
    assert float(right.exp()[0]) == pytest.approx(float(posterior[0]), abs=0.01)
    assert distance(wrong, log_r) > 0.3
    assert abs(float(wrong.exp()[0] - posterior[0])) > 0.1
