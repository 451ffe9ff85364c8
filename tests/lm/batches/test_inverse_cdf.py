from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppl.lm.batches.inverse_cdf import inverse_cdf, invert, invert_among, tempered

INF = float("inf")
BELOW_ONE = math.nextafter(1.0, 0.0)


def uniforms(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 3, 255, 256, 257, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_is_the_inverse_of_the_distribution_function(size, temperature):
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(1, size, generator=generator)
    probs = torch.softmax(logits[0].double() / temperature, -1)
    cdf = probs.cumsum(-1)
    middles = cdf - probs / 2  # of each token's interval
    tokens, log_probs = invert(logits.expand(size, -1), middles, temperature)
    likely = probs > 1e-5  # wider than float32's rounding
    assert torch.equal(tokens[likely], torch.arange(size)[likely])
    torch.testing.assert_close(log_probs.double(), probs[tokens].log(), atol=1e-5, rtol=1e-5)
    assert log_probs.dtype == torch.float32 and tokens.dtype == torch.long


def test_probabilities_are_the_widths_of_the_intervals():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]])
    n = 20_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, log_probs = invert(logits.expand(n, -1), grid)
    counts = torch.bincount(tokens, minlength=4) / n
    torch.testing.assert_close(counts, torch.softmax(logits[0], -1), atol=2 / n, rtol=0)
    assert torch.equal(tokens, tokens.sort().values)  # increasing in the uniform


def test_chi_square_on_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    size, n = 5000, 40_000
    logits = 2 * torch.randn(1, size, generator=generator)
    u = torch.rand(n, dtype=torch.float64, generator=generator)
    tokens = torch.cat([invert(logits.expand(len(p), -1), p)[0] for p in u.split(2000)])
    order = torch.softmax(logits[0].double(), -1)
    bins = torch.arange(size) % 100
    expected = torch.zeros(100, dtype=torch.float64).index_add_(0, bins, order) * n
    observed = torch.bincount(bins[tokens], minlength=100)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 99 + 4 * math.sqrt(2 * 99)


@pytest.mark.parametrize("size", [4, 256, 700])
def test_zero_probability_is_never_drawn(size):
    logits = torch.full((1, size), -INF)
    alive = [1] if size == 4 else [3, 200, size - 2]
    logits[0, alive] = torch.zeros(len(alive))
    u = uniforms(0.0, 5e-324, 1e-300, 1e-17, 1 / 3, 0.5, 2 / 3, 1 - 1e-16, BELOW_ONE)
    tokens, log_probs = invert(logits.expand(len(u), -1), u)
    assert set(tokens.tolist()) == set(alive)
    torch.testing.assert_close(log_probs, torch.full((len(u),), -math.log(len(alive))))


@given(
    st.lists(
        st.one_of(st.just(-INF), st.floats(-200, 200, width=32)), min_size=1, max_size=600
    ).filter(lambda x: max(x) > -INF),
    st.one_of(st.sampled_from([0.0, BELOW_ONE]), st.floats(0, BELOW_ONE)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=150, deadline=None)
def test_any_row_gives_a_possible_token(row, u, dtype):
    logits = torch.tensor([row]).to(dtype)
    tokens, log_probs = invert(logits, uniforms(u))
    probs = torch.softmax(logits[0].float(), -1)
    assert probs[tokens[0]] > 0
    assert log_probs[0] == pytest.approx(float(probs[tokens[0]].log()), abs=1e-4)


def test_tiny_probabilities_keep_their_logarithm():
    logits = torch.tensor([[0.0, -80.0]])
    tokens, log_probs = invert(logits, uniforms(BELOW_ONE))
    assert int(tokens[0]) == 0  # 1e-35 is less than the spacing of uniforms
    assert float(log_probs[0]) == pytest.approx(0.0, abs=1e-6)


def test_temperature_by_row():
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(3, -1)
    u = uniforms(0.3, 0.3, 0.3)
    for temperature in ([1.0, 0.5, 4.0], torch.tensor([1.0, 0.5, 4.0])):
        tokens, log_probs = invert(logits, u, temperature)
        for row, t in enumerate([1.0, 0.5, 4.0]):
            token, log_prob = invert(logits[:1], u[:1], t)
            assert (tokens[row], log_probs[row]) == (token[0], log_prob[0])


def test_temperature_one_is_the_identity():
    logits = torch.randn(2, 3).bfloat16()
    assert tempered(logits, 1.0) is logits
    assert tempered(logits, [1.0, 1.0]) is logits
    assert tempered(logits, 2.0).dtype == torch.float32


@pytest.mark.parametrize("bad", [[math.nan, 0.0, 0.0], [INF, 0.0, 0.0], [-INF, -INF, -INF]])
def test_invalid_rows_are_nan(bad):
    logits = torch.zeros(4, 3)
    logits[2] = torch.tensor(bad)
    tokens, log_probs = invert(logits, uniforms(0.1, 0.2, 0.3, 0.4))
    assert torch.isnan(log_probs).tolist() == [False, False, True, False]
    assert 0 <= int(tokens[2]) < 3


def test_rows_of_next_to_no_allowed_probability_stand_among_others():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator)
    logits[1::2, 0] += 90.0
    allowed = torch.rand(6, 300, generator=generator) < 0.5
    allowed[:, 0] = False
    u = torch.rand(6, generator=generator, dtype=torch.float64)
    found = invert_among(allowed, logits, u)
    log_probs = torch.log_softmax(logits.double(), -1)
    among = log_probs.masked_fill(~allowed, -INF)
    for row in range(6):
        cdf = (among[row] - among[row].logsumexp(0)).exp().cumsum(0)
        token = int(torch.searchsorted(cdf, u[row], right=True))
        assert int(found[0][row]) == token
        assert float(found[1][row]) == pytest.approx(float(log_probs[row, token]), abs=1e-4)
        assert float(found[2][row]) == pytest.approx(float(among[row].logsumexp(0)), abs=1e-4)


def test_weights_and_logits_are_inverted_alike():
    probs = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    u = uniforms(0.0, 0.2, 0.3, 0.31, 0.99, BELOW_ONE)
    picks = inverse_cdf(5 * probs, u)
    assert picks.tolist() == [1, 1, 3, 3, 3, 3]
    assert torch.equal(picks, invert(probs.log().expand(len(u), -1), u)[0])


@pytest.mark.parametrize("bad", [[math.nan, 0.0, 0.0], [INF, 0.0, 0.0], [-INF, -INF, -INF]])
def test_invalid_rows_are_nan_among_some_tokens(bad):
    logits = torch.zeros(3, 3)
    logits[1] = torch.tensor(bad)
    allowed = torch.tensor([[False] * 3, [False, True, True], [True, False, True]])
    tokens, log_probs, log_masses = invert_among(allowed, logits, uniforms(0.1, 0.2, 0.9))
    assert torch.isnan(log_probs).tolist() == [False, True, False]
    assert float(log_masses[0]) == -INF  # nothing is allowed
    assert int(tokens[2]) == 2 and 0 <= int(tokens.min()) <= int(tokens.max()) < 3
    assert float(log_masses[2]) == pytest.approx(math.log(2 / 3))


@pytest.mark.parametrize("gap", [0.0, 50.0, 95.0, 2000.0])
def test_what_is_allowed_may_have_less_probability_than_a_float_holds(gap):
    logits = torch.tensor([[gap, 0.0, math.log(3.0), -INF]])
    allowed = torch.tensor([[False, True, True, True]])
    tokens, log_probs, log_masses = invert_among(
        allowed.expand(4, -1), logits.expand(4, -1), uniforms(0.0, 0.24, 0.26, BELOW_ONE)
    )
    assert tokens.tolist() == [1, 1, 2, 2]
    want = torch.log_softmax(logits[0].double(), 0)
    assert torch.allclose(log_probs.double(), want[tokens], rtol=1e-6, atol=1e-6)
    assert torch.allclose(log_masses.double(), want[1:].logsumexp(0), rtol=1e-6, atol=1e-5)
