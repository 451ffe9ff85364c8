"""Guides of latents that are not text."""

import pyro.distributions as dist
import pytest
import torch

from lmppl.guides.heads import Head, moved, num_moves

T = torch.tensor
FAMILIES = {
    "Beta": (dist.Beta(2.0, 3.0), 2),
    "Normal": (dist.Normal(1.0, 2.0), 2),
    "Gamma": (dist.Gamma(2.0, 0.5), 2),
    "LogNormal": (dist.LogNormal(0.0, 1.0), 2),
    "Exponential": (dist.Exponential(0.7), 1),
    "Bernoulli": (dist.Bernoulli(0.3), 1),
    "Bernoulli of logits": (dist.Bernoulli(logits=T(-1.0)), 1),
    "Categorical": (dist.Categorical(T([0.2, 0.3, 0.5])), 3),
    "Poisson": (dist.Poisson(3.0), 1),
    "Binomial": (dist.Binomial(5, 0.3), 1),
    "Dirichlet": (dist.Dirichlet(T([1.0, 2.0, 3.0])), 3),
    "Independent": (dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1), 6),
    "twice Independent": (dist.Beta(torch.ones(2, 3), 2 * torch.ones(2, 3)).to_event(2), 12),
    "batch": (dist.Normal(torch.zeros(4), 1.0), 8),
}
LEFT_TO_THE_MODEL = {
    "Uniform": dist.Uniform(0.0, 2.0),  # its parameters are the ends of its support
    "Delta": dist.Delta(T(1.0)),
    "MultivariateNormal": dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "masked": dist.Normal(0.0, 1.0).mask(True),
    "RelaxedBernoulli": dist.RelaxedBernoulli(T(0.5), T(0.3)),
}
ALL = pytest.mark.parametrize("fn, moves", FAMILIES.values(), ids=list(FAMILIES))


@ALL
def test_a_new_head_is_the_prior(fn, moves):
    assert num_moves(fn) == moves
    head = Head(5, moves)
    q = moved(fn, head(torch.randn(5)))
    values = fn.sample((20,))
    assert (q.batch_shape, q.event_shape) == (fn.batch_shape, fn.event_shape)
    torch.testing.assert_close(q.log_prob(values), fn.log_prob(values), atol=1e-5, rtol=1e-5)


@ALL
def test_a_moved_distribution_is_another_one_on_the_same_support(fn, moves):
    torch.manual_seed(0)
    q = moved(fn, torch.randn(moves))
    values = q.sample((20,))
    assert bool(fn.support.check(values).all())
    assert not torch.allclose(q.log_prob(values), fn.log_prob(values), atol=0.01)


@ALL
def test_gradients_reach_the_head(fn, moves):
    torch.manual_seed(0)
    head = Head(5, moves)
    value = fn.sample()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):  # the last layer is zero at first, so those below it wait for it
        optimizer.zero_grad()
        moved(fn, head(torch.ones(5).cumsum(0))).log_prob(value).sum().backward()
        optimizer.step()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("fn", LEFT_TO_THE_MODEL.values(), ids=list(LEFT_TO_THE_MODEL))
def test_what_a_head_cannot_move_is_left_to_the_model(fn):
    assert num_moves(fn) is None


def test_the_model_own_parameters_get_no_gradient():
    loc = T(0.5, requires_grad=True)
    q = moved(dist.Normal(loc, 1.0), torch.zeros(2, requires_grad=True))
    q.log_prob(T(1.0)).backward()
    assert loc.grad is None


def test_how_many_moves_there_are_is_remembered_of_equal_kinds_only():
    """``Multinomial`` is made anew from its probabilities alone, so in one trial."""
    p = T([0.2, 0.3, 0.5])
    for trials, moves in ((1, 3), (5, None), (1, 3)):
        assert num_moves(dist.Multinomial(trials, p)) == moves
    assert num_moves(dist.Categorical(p)) == 3 and num_moves(dist.Categorical(T([0.5, 0.5]))) == 2
    assert num_moves(dist.Categorical(p).expand([2])) == 6
    assert num_moves(dist.Beta(T([1.0]), T([1.0]))) == num_moves(dist.Beta(1.0, 1.0)) == 2
