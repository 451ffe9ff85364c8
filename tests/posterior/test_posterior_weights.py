"""Posterior: weights, evidence, effective sample sizes, resampling."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weighted_traces import CHAINS, posterior_of, trace_of

from lmppl import Posterior, ZeroEvidenceError

NO_WEIGHT = -math.inf


log_weight_lists = st.lists(
    st.one_of(st.floats(-1e5, 1e5), st.just(NO_WEIGHT)), min_size=1, max_size=20
).filter(lambda each: max(each) > NO_WEIGHT)


# --- weights -------------------------------------------------------------------------------------


def test_weights_evidence_and_ess_by_hand():
    posterior = posterior_of(["a", "b", "c", "d"], [1.0, 2.0, 1.0, 0.0])
    assert posterior.weights.dtype == torch.float64
    torch.testing.assert_close(
        posterior.weights, torch.tensor([0.25, 0.5, 0.25, 0.0], dtype=torch.float64)
    )
    assert posterior.log_evidence == pytest.approx(math.log(4.0 / 4))  # the mean weight
    assert posterior.ess == pytest.approx(1 / (2 * 0.25**2 + 0.5**2))
    assert len(posterior) == 4
    assert [weight for _, weight in posterior] == pytest.approx([0.25, 0.5, 0.25, 0.0])
    assert posterior.returns == ["a", "b", "c", "d"]


@given(log_weight_lists, st.floats(-1e4, 1e4))
@settings(deadline=None)
def test_a_common_factor_moves_only_the_evidence(log_weights, shift):
    traces = [trace_of(z=str(i)) for i in range(len(log_weights))]
    tensor = torch.tensor(log_weights, dtype=torch.float64)
    one = Posterior(traces, tensor, log_weights)
    two = Posterior(traces, tensor + shift, log_weights)
    torch.testing.assert_close(one.weights, two.weights, atol=1e-7, rtol=1e-6)
    assert two.log_evidence == pytest.approx(one.log_evidence + shift, abs=1e-6)
    assert float(one.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert 1 - 1e-9 <= one.ess <= len(log_weights) + 1e-9
    top = max(log_weights)
    assert top - math.log(len(log_weights)) - 1e-6 <= one.log_evidence <= top + 1e-6


@pytest.mark.parametrize("scale", [-1e300, -1e5, 0.0, 1e5, 1e300])
def test_extreme_weights_stay_finite(scale):
    log_weights = torch.full((2,), scale, dtype=torch.float64)
    posterior = Posterior([trace_of(z="a")] * 2, log_weights, [0, 0])
    assert posterior.weights.tolist() == [0.5, 0.5]
    assert posterior.log_evidence == pytest.approx(scale)


def test_the_posterior_is_not_tied_to_the_tensor_it_was_given():
    weights = torch.zeros(2, requires_grad=True)
    posterior = Posterior([trace_of(z="a")] * 2, weights, [0, 0])
    with torch.no_grad():
        weights += 1
    assert posterior.log_weights.tolist() == [0.0, 0.0] and not posterior.log_weights.requires_grad


def test_the_standard_error_is_that_of_the_log_of_a_mean():
    weights = torch.tensor([0.3, 1.0, 2.0, 0.1, 0.0, 0.7], dtype=torch.float64)
    posterior = posterior_of(["a"] * 6, weights.tolist(), info={"iid": True})
    expected = weights.std() / math.sqrt(6) / weights.mean()
    assert posterior.log_evidence_stderr == pytest.approx(float(expected))
    assert posterior_of(["a"] * 6, weights.tolist()).log_evidence_stderr is None
    assert posterior_of(["a"], [1.0], info={"iid": True}).log_evidence_stderr is None
    equal = posterior_of(["a"] * 3, [1.0] * 3, info={"iid": True})
    assert equal.log_evidence_stderr == pytest.approx(0.0, abs=1e-7)


def test_the_standard_error_covers():
    """About 95% of intervals of two standard errors hold the truth: E[exp(x)] = exp(1/8)."""
    generator = torch.Generator().manual_seed(0)
    trials, hits = 400, 0
    traces = [trace_of(z="a")] * 500
    for _ in range(trials):
        x = 0.5 * torch.randn(500, generator=generator, dtype=torch.float64)
        posterior = Posterior(traces, x, traces, info={"iid": True})
        hits += abs(posterior.log_evidence - 1 / 8) < 2 * posterior.log_evidence_stderr
    assert 0.91 < hits / trials < 0.99


def test_no_evidence_is_claimed_for_raw_draws():
    posterior = posterior_of(["a", "b"], [1.0, 1.0], claims_evidence=False, info={"iid": True})
    assert posterior.log_evidence is None and posterior.log_evidence_stderr is None
    assert posterior.probs("z") == {"a": 0.5, "b": 0.5}
    assert posterior.resample(3, seed=0).log_evidence is None
    assert "no claim about the evidence" in repr(posterior)


def test_the_effective_sample_size_of_chains_is_theirs():
    posterior = posterior_of(list("abab"), [1.0] * 4, info=CHAINS, claims_evidence=False)
    assert posterior.ess == posterior.summary()["ess"] == 312.4
    assert posterior.log_evidence is None
    assert posterior.summary()["chains"] == CHAINS["chains"]
    lines = repr(posterior).splitlines()
    assert lines[0].startswith("Posterior by mcmc: 4 samples of 2 Markov chains, ESS 312.4")
    assert ["chains", "R-hat", "bulk", "ESS", "tail", "ESS"] in [line.split() for line in lines]
    assert ["log", "joint", "1.004", "1,312", "290"] in [line.split() for line in lines]
    assert ["length", "of", "z", "1.200", "31", "-"] in [line.split() for line in lines]
    assert "moves accepted: z 31.2%, kind 50.0%" in lines
    assert "moves accepted: z 31.2%" in posterior._repr_html_()
    assert "chain" not in posterior.resample(3, seed=0).info  # these are no chains any more


def test_an_effective_sample_size_that_is_not_known():
    posterior = posterior_of(list("abcd"), [1.0] * 4, info={"engine": "mcmc", "ess": math.nan})
    assert math.isnan(posterior.ess) and math.isnan(posterior.resample(3, seed=0).ess)
    lines = repr(posterior).splitlines()
    assert lines[0] == "Posterior by mcmc: 4 samples, ESS not known"
    assert "don't trust these figures: ESS is not known" in lines


def test_resampling_makes_no_information():
    """Its draws are equal in weight, and yet no better than the samples that they come from."""
    weights = [10.0, 1.0, 1.0, 1.0]
    posterior = posterior_of(list("abcd"), weights, info={"engine": "importance"})
    assert posterior.resample(100, seed=0).ess == posterior.ess < 2
    assert posterior.resample(1, seed=0).ess == 1.0
    exact = posterior_of(list("abcd"), weights, info={"engine": "exact", "exact": True})
    draws = exact.resample(100, seed=0)
    assert draws.ess == 100.0 and not draws.info["exact"]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_a_number_is_refused_with_its_index(bad):
    with pytest.raises(ValueError, match=r"log_weights\[1\] is (nan|inf).*1 of 2"):
        Posterior([trace_of(z="a")] * 2, torch.tensor([0.0, bad]), [0, 0])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 traces needs as many"):
        Posterior([trace_of(z="a")] * 2, torch.zeros(3), [0, 0])
    with pytest.raises(ValueError, match="1 returns"):
        Posterior([trace_of(z="a")] * 2, torch.zeros(2), [0])
    with pytest.raises(ValueError, match="at least one trace"):
        Posterior([], torch.zeros(0), [])


def test_all_dead_names_the_sites_that_killed_and_keeps_the_samples():
    killed = Counter({"polite": 1, "y": 2})
    posterior = posterior_of(["a", "b", "c"], [0.0] * 3, info={"killed": killed, "engine": "smc"})
    assert posterior.log_evidence == NO_WEIGHT and posterior.ess == 0.0
    for ask in (
        lambda: posterior.weights,
        lambda: posterior.probs("z"),
        lambda: posterior.best("z"),
        lambda: posterior.mean(lambda v: 1.0),
        lambda: posterior.resample(2),
        posterior.check_alive,
    ):
        with pytest.raises(
            ZeroEvidenceError, match=r"all 3 samples.*'y' \(2\), 'polite' \(1\)"
        ) as e:
            ask()
        assert e.value.posterior is posterior
    assert posterior["z"] == ["a", "b", "c"]  # what was sampled can still be looked at
    assert "y (2), polite (1)" in repr(posterior) and "-inf nats" in repr(posterior)
    assert "y (2), polite (1)" in posterior._repr_html_()
    posterior_of(["a", "b"], [0.0, 1.0]).check_alive()


def test_a_site_may_say_why_it_ended_a_sample():
    killed = Counter({"polite": 1, "y": 2})
    info = {"killed": killed, "reasons": {"polite": "an oath.", "y": "'ab' stops matching at 'b'"}}
    posterior = posterior_of(["a", "b", "c"], [0.0] * 3, info=info)
    message = (
        r"'y' \(2\), 'polite' \(1\)\. 'y', the first time: 'ab' stops matching at 'b'\. "
        r"'polite', the first time: an oath\. Draw more"
    )
    with pytest.raises(ZeroEvidenceError, match=message):
        posterior.check_alive()
    assert list(posterior.summary()["reasons"]) == ["y", "polite"]
    assert "y, the first time: 'ab' stops matching at 'b'" in repr(posterior)


def test_an_unknown_site_names_the_known_ones_and_the_nearest():
    posterior = Posterior([trace_of(middle="a", tone="b")], torch.zeros(1), [0])
    for ask in (lambda: posterior["midle"], lambda: posterior.probs("midle")):
        with pytest.raises(KeyError, match="did you mean 'middle'.*Sites: middle, tone"):
            ask()
    with pytest.raises(KeyError, match="'midle'"):
        posterior.mean("midle")
    assert "middle" in posterior and "midle" not in posterior


# --- resampling ----------------------------------------------------------------------------------


@given(log_weight_lists, st.integers(1, 50), st.integers(0, 2**31))
@settings(deadline=None)
def test_resampling_never_revives_the_dead_and_keeps_the_evidence(log_weights, n, seed):
    traces = [trace_of(z=str(i)) for i in range(len(log_weights))]
    posterior = Posterior(
        traces, torch.tensor(log_weights, dtype=torch.float64), list(range(len(log_weights)))
    )
    draws = posterior.resample(n, seed=seed)
    assert len(draws) == n
    assert all(posterior.weights[i] > 0 for i in draws.returns)
    assert [str(i) for i in draws.returns] == draws["z"]  # traces and returns stay together
    torch.testing.assert_close(draws.weights, torch.full((n,), 1 / n, dtype=torch.float64))
    assert draws.log_evidence == pytest.approx(posterior.log_evidence, abs=1e-6)
    assert posterior.resample(n, seed=seed).returns == draws.returns


def test_a_uniform_that_rounds_up_to_the_whole_sum_draws_a_live_sample(monkeypatch):
    posterior = posterior_of(["a", "b", "dead"], [1.0, 1.0, 0.0])
    for u in (0.0, 0.5, 1.0 - 2**-53, 1.0):
        monkeypatch.setattr(torch, "rand", lambda n, u=u, **_: torch.full((n,), u).double())
        assert posterior.resample(4)["z"] == ["a" if u < 0.5 else "b"] * 4
    first_dead = posterior_of(["dead", "a"], [0.0, 1.0])
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.zeros(n).double())
    assert first_dead.resample(2)["z"] == ["a", "a"]


def test_resampling_draws_by_weight():
    weights = [0.1, 0.2, 0.3, 0.4]
    posterior = posterior_of(list("abcd"), weights)
    n = 20_000
    counts = Counter(posterior.resample(n, seed=3).returns)
    chi_square = sum(
        (counts[text] - n * weight) ** 2 / (n * weight)
        for text, weight in zip("abcd", weights, strict=True)
    )
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_resampling_goes_by_normalised_weights(offset):
    """exp of the log-weights themselves would be 0 or inf."""
    log_weights = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log() + offset
    posterior = Posterior([trace_of(z=text) for text in "abc"], log_weights, list("abc"))
    counts = Counter(posterior.resample(4000, seed=0).returns)
    assert counts["a"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert counts["c"] / 4000 == pytest.approx(0.5, abs=0.03)


def test_resampling_follows_torchs_seed_and_says_what_it_did():
    posterior = posterior_of(list("abcd"), [1.0] * 4, info={"iid": True, "engine": "importance"})
    torch.manual_seed(1)
    first = posterior.resample(10).returns
    torch.manual_seed(1)
    again = posterior.resample(10)
    assert again.returns == first
    assert again.log_evidence_stderr is None
    assert "resampled from 4 samples" in repr(again)
    assert "notes" not in posterior.info
    with pytest.raises(ValueError, match="n=0.*at least 1"):
        posterior.resample(0)
