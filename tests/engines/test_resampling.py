"""Resampling: unbiased in every scheme, and the dead stay dead."""

import itertools
import math

import pytest
import torch
from choices import at_uniforms, cells_of, in_cell
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppl.engines.resampling import SCHEMES, settle_in_place
from lmppl.lm.batches.inverse_cdf import inverse_cdf

NAMES = pytest.mark.parametrize("name", sorted(SCHEMES))

# Ordinary weights, zeros, and weights that vanish beside others.
_WEIGHT = st.one_of(
    st.floats(0.0, 1.0), st.just(0.0), st.sampled_from([1.0, 1e-16, 1e-40, 1e-300, 5e-324])
)
_WEIGHTS = st.lists(_WEIGHT, min_size=1, max_size=12).filter(lambda w: max(w) > 0)
_UNIFORMS = st.one_of(
    st.floats(0.0, 1.0, exclude_max=True), st.sampled_from([0.0, 5e-324, 0.5, 1 - 2**-53])
)


def expected_copies(name, weights):
    """By summing over the cells on which the ancestors are constant."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for cells in itertools.product(*cells_of(name, weights)):
        ancestors = in_cell(SCHEMES[name], weights, list(cells))
        probability = math.prod(high - low for low, high in cells)
        total += probability * torch.bincount(ancestors, minlength=len(weights)).double()
    return total


def check_expected_copies(name, weights):
    expected = len(weights) * weights / weights.sum()
    torch.testing.assert_close(expected_copies(name, weights), expected, rtol=0, atol=1e-9)


@NAMES
@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [0.3, 0.7],
        [0.0, 2.0],
        [0.5, 0.0, 3.0],
        [0.2, 0.2, 0.2, 0.4],
        [1.0, 1.0, 1.0, 1.0],
        [0.9, 0.0, 0.06, 0.04],
    ],
    ids=str,
)
def test_expected_copies_are_n_times_the_weight(name, weights):
    check_expected_copies(name, torch.tensor(weights, dtype=torch.float64))


@NAMES
@settings(max_examples=300, deadline=None)
@given(weights=_WEIGHTS, seed=st.integers(0, 2**32))
def test_the_dead_are_never_chosen(name, weights, seed):
    weights = torch.tensor(weights, dtype=torch.float64)
    ancestors = SCHEMES[name](weights, torch.Generator().manual_seed(seed))
    assert ancestors.shape == weights.shape
    assert bool((weights[ancestors] > 0).all())


@settings(max_examples=500, deadline=None)
@given(weights=_WEIGHTS, uniforms=st.lists(_UNIFORMS, min_size=1, max_size=8))
def test_the_dead_are_never_chosen_at_any_uniform(weights, uniforms):
    weights = torch.tensor(weights, dtype=torch.float64)
    index = inverse_cdf(weights, torch.tensor(uniforms, dtype=torch.float64))
    assert bool((weights[index] > 0).all())


@NAMES
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_dead_at_both_ends_are_not_chosen_by_extreme_uniforms(name, u):
    weights = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.0, 0.0], dtype=torch.float64)
    ancestors = at_uniforms(SCHEMES[name], weights, [u] * len(cells_of(name, weights)))
    assert bool((weights[ancestors] > 0).all())


def test_small_weights_are_summed_in_float64():
    """In float32 a running sum of 1 swallows 1e-8, a million times over."""
    weights = torch.full((1_000_001,), 1e-8)
    weights[0] = 1.0
    index = inverse_cdf(weights, torch.tensor([0.9999], dtype=torch.float64))
    expected = (0.9999 * 1.01 - 1.0) / 1e-8
    assert int(index[0]) == pytest.approx(expected, rel=1e-2)


@NAMES
@settings(max_examples=100, deadline=None)
@given(weights=_WEIGHTS, seed=st.integers(0, 2**32), power=st.integers(-30, 30))
def test_only_the_ratio_of_weights_matters(name, weights, seed, power):
    """A power of two, so that nothing is rounded; weights that would be lost are left out."""
    weights = torch.tensor([w if w > 1e-30 else 0.0 for w in weights], dtype=torch.float64)
    if weights.sum() == 0:
        return
    first = SCHEMES[name](weights, torch.Generator().manual_seed(seed))
    second = SCHEMES[name](weights * 2.0**power, torch.Generator().manual_seed(seed))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["stratified", "systematic", "residual"])
@settings(max_examples=200, deadline=None)
@given(weights=_WEIGHTS.filter(lambda w: max(w) > 1e-9), seed=st.integers(0, 2**32))
def test_copies_deviate_less_than_multinomial_ones(name, weights, seed):
    """Systematic: by less than 1; stratified: by less than 2; residual: no fewer than the floor."""
    weights = torch.tensor(weights, dtype=torch.float64)
    ancestors = SCHEMES[name](weights, torch.Generator().manual_seed(seed))
    copies = torch.bincount(ancestors, minlength=len(weights)).double()
    expected = len(weights) * weights / weights.sum()
    slack = 1e-9
    if name == "residual":
        assert bool((copies + 1 + slack > expected).all())
        assert bool((copies >= (expected - slack).floor()).all())
    else:
        bound = 1.0 if name == "systematic" else 2.0
        assert bool(((copies - expected).abs() < bound + slack).all())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=12, max_size=12))
def test_settling_keeps_the_offspring_and_moves_no_survivor(ancestors):
    ancestors = torch.tensor(ancestors)
    placed = settle_in_place(ancestors)
    assert torch.equal(placed.sort().values, ancestors.sort().values)
    for slot in set(ancestors.tolist()):
        assert placed[slot] == slot
