"""Total variation and its floor under sampling."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmppl.testing import iid_tv_floor, total_variation


def test_total_variation_counts_missing_keys():
    assert total_variation({"a": 0.5, "b": 0.5}, {"a": 1.0}) == 0.5
    assert total_variation({"a": 1.0}, {"b": 1.0}) == 1.0
    assert total_variation({"a": 0.3, "b": 0.7}, {"b": 0.7, "a": 0.3}) == 0.0


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3).filter(lambda w: sum(w) > 0.01),
    st.integers(1, 5),
)
def test_floor_equals_enumeration_of_all_draws(weights, n):
    probs = [w / sum(weights) for w in weights]
    expected = 0.0
    for draws in itertools.product(range(len(probs)), repeat=n):
        distance = 0.5 * sum(abs(draws.count(i) / n - p) for i, p in enumerate(probs))
        expected += distance * math.prod(probs[i] for i in draws)
    assert iid_tv_floor(probs, n) == pytest.approx(expected, abs=1e-9)


def test_floor_equals_simulation_for_many_draws():
    probs = {"a": 0.6, "b": 0.3, "c": 0.09, "d": 0.01}
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor(list(probs.values()), dtype=torch.float64)
    draws = torch.multinomial(p.expand(4000, -1), 500, replacement=True, generator=generator)
    counts = torch.stack([(draws == i).sum(-1) for i in range(4)], -1)
    simulated = 0.5 * (counts / 500 - p).abs().sum(-1)
    error = float(simulated.std() / 4000**0.5)
    assert iid_tv_floor(probs, 500.7) == pytest.approx(float(simulated.mean()), abs=4 * error)
