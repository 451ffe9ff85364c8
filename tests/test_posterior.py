"""Posterior: weights, evidence, probabilities of texts, resampling, tables."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import Counter
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.poutine import Trace
from rich.cells import cell_len
from weighted_traces import Words, posterior_of, trace_of

import lmppl
from lmppl import Posterior, ZeroEvidenceError
from lmppl.distributions import ToolResult
from lmppl.report.posteriors import posterior_blocks
from lmppl.report.tables import MAX_ROWS, as_text, bar
from lmppl.testing import tiny_lm

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


CHAINS = {
    "engine": "mcmc",
    "ess": 312.4,
    "chain": [(0, 0), (0, 1), (1, 0), (1, 1)],
    "chains": {
        "num_chains": 2,
        "num_draws": 2,
        "acceptance": {"z": 0.312, "kind": 0.5},
        "diagnostics": {
            "log joint": {"r_hat": 1.0041, "ess_bulk": 1312.4, "ess_tail": 290.2},
            "length of z": {"r_hat": 1.2, "ess_bulk": 31.0, "ess_tail": None},
        },
    },
}


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


# --- values and probabilities --------------------------------------------------------------------


def test_values_are_texts_tool_results_and_tensors():
    posterior = Posterior(
        [trace_of(z=" a", found=ToolResult.wrap({"hits": 3}), p=torch.tensor(0.25))],
        torch.zeros(1),
        [None],
    )
    assert posterior["z"] == [" a"]
    assert posterior["found"] == [{"hits": 3}]
    assert posterior["p"] == [torch.tensor(0.25)]
    assert posterior.sites == ["z", "found", "p"]
    assert posterior.latents == ["z", "p"]  # a tool's result is not drawn
    assert posterior.probs("found") == {"{'hits': 3}": 1.0}


def test_sites_of_a_pyro_program():
    """Factors, plates and parameters are no values; observations are values, not latents."""

    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.param("weight", torch.ones(()))
        for i in pyro.plate("plate", 2):
            pyro.sample(f"x{i}", dist.Bernoulli(p), obs=torch.tensor(1.0))
        coin = pyro.sample("coin", dist.Bernoulli(p))
        pyro.factor("f", coin)
        return coin

    pyro.clear_param_store()
    traces = [poutine.trace(model).get_trace() for _ in range(6)]
    posterior = Posterior(traces, torch.zeros(6), [t.nodes["_RETURN"]["value"] for t in traces])
    assert posterior.sites == ["p", "x0", "x1", "coin"]
    assert posterior.latents == ["p", "coin"]
    assert set(posterior.probs("coin")) <= {0.0, 1.0}  # discrete, though a float tensor
    with pytest.raises(TypeError, match="'p' is continuous.*mean"):
        posterior.probs("p")
    summary = posterior.summary()
    assert list(summary["marginals"]) == ["coin"] and list(summary["numeric"]) == ["p"]
    assert summary["returned"] is None  # the coin


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=30))
@settings(deadline=None)
def test_probs_sum_equal_texts_largest_first(pairs):
    texts, counts = [text for text, _ in pairs], [float(count) for _, count in pairs]
    if not sum(counts):
        return
    posterior = posterior_of(texts, counts)
    probs = posterior.probs("z")
    assert sum(probs.values()) == pytest.approx(1.0)
    assert list(probs.values()) == sorted(probs.values(), reverse=True)
    for text in "abc":
        expected = sum(c for t, c in pairs if t == text) / sum(counts)
        assert probs.get(text, 0.0) == pytest.approx(expected)
    assert all(value > 0 for value in probs.values())
    rows = posterior.summary()["marginals"]["z"]
    assert [row["value"] for row in rows] == list(probs)
    assert [row["weight"] for row in rows] == pytest.approx(list(probs.values()))
    joint = posterior.summary(joint=True)["rows"]
    assert {row["values"]["z"]: row["weight"] for row in joint} == pytest.approx(probs)
    assert probs[posterior.best("z")] == max(probs.values())


def test_texts_equal_as_strings_count_as_one_whatever_their_tokens():
    site = Words(["ab", "ab", "b"])
    traces = [trace_of(z=(site, torch.tensor([i, -1]), False)) for i in range(3)]
    posterior = Posterior(traces, torch.tensor([0.2, 0.3, 0.5]).log(), [0] * 3)
    assert posterior.probs("z") == pytest.approx({"ab": 0.5, "b": 0.5})
    assert len(posterior.summary()["marginals"]["z"]) == 2


def test_a_site_in_one_branch_only():
    traces = [trace_of(kind="long", z="a"), trace_of(kind="short"), trace_of(kind="long", z="b")]
    posterior = Posterior(traces, torch.tensor([0.2, 0.5, 0.3]).log(), [0] * 3)
    assert posterior["z"] == ["a", None, "b"]
    assert posterior.probs("z") == pytest.approx({None: 0.5, "b": 0.3, "a": 0.2})
    assert posterior.best("z") == "b"
    rows = posterior.summary()["marginals"]["z"]
    assert rows == [{"weight": pytest.approx(w), "value": v} for w, v in
                    ((0.5, None), (0.3, "b"), (0.2, "a"))]  # fmt: skip
    assert " 50.0%   ██████████   - (not reached)" in repr(posterior).splitlines()
    rows = [row["values"] for row in posterior.summary(joint=True)["rows"]]
    assert rows == [{"kind": "short"}, {"kind": "long", "z": "b"}, {"kind": "long", "z": "a"}]
    dead = Posterior(traces[:2], torch.tensor([NO_WEIGHT, 0.0]), [0] * 2)
    assert dead.best("z") is None


def test_texts_in_containers_are_shown_as_strings():
    text = LM.sample("ab", 1, max_tokens=2, seed=0)[0][0]
    traces = [trace_of(z="a", n=ToolResult.wrap({"of": [text]}))]
    posterior = Posterior(traces, torch.zeros(1), [[text, {text}]])
    assert posterior.probs("n") == {f"{{'of': [{str(text)!r}]}}": 1.0}
    rows = posterior.summary()["marginals"]["n"]
    assert rows == [{"weight": 1.0, "value": {"of": [str(text)]}}]
    assert type(rows[0]["value"]["of"][0]) is str and "Text(" not in repr(posterior)


def test_tensors_of_any_shape_are_values_of_probs():
    site = dist.Categorical(torch.ones(4))
    traces = [trace_of(k=(site, torch.tensor(v), False)) for v in ([0, 1], [2, 3], [0, 1])]
    posterior = Posterior(traces, torch.zeros(3), [0] * 3)
    assert posterior.probs("k") == pytest.approx({(0, 1): 2 / 3, (2, 3): 1 / 3})


def test_probs_of_a_function_and_of_what_the_program_returns():
    traces = [trace_of(z=" a b", n=1.0), trace_of(z=" a c", n=2.0), trace_of(z=" b"), Trace()]
    weights = torch.tensor([0.3, 0.3, 0.4, 0.0]).log()
    posterior = Posterior(traces, weights, [[1], [1], (2, 3), None])
    assert posterior.probs(lambda v: v["z"].split()[0]) == pytest.approx({"a": 0.6, "b": 0.4})
    assert posterior.probs(lambda v: "n" in v) == pytest.approx({True: 0.6, False: 0.4})
    assert posterior.probs(returns=True) == pytest.approx({"[1]": 0.6, (2, 3): 0.4})
    assert posterior.best(lambda v: len(v["z"])) == 4
    assert posterior.best(returns=True) == "[1]"
    for wrong in ({}, {"name_or_fn": "z", "returns": True}, {"name_or_fn": 3}):
        with pytest.raises(
            TypeError, match="say of what.*name of a site.*Sites: z|name_or_fn must"
        ):
            posterior.probs(**wrong)
    with pytest.raises(TypeError, match="returns='z'"):
        posterior.probs(returns="z")


# --- expectations --------------------------------------------------------------------------------


def test_mean_of_a_site_and_of_a_function():
    traces = [trace_of(p=0.2, z="a"), trace_of(p=0.6, z="b"), trace_of(p=1.0, z="b")]
    posterior = Posterior(traces, torch.tensor([0.5, 0.25, 0.25]).log(), [0] * 3)
    assert posterior.mean("p").dtype == torch.float64
    assert float(posterior.mean("p")) == pytest.approx(0.5)
    assert float(posterior.mean(lambda v: v["z"] == "b")) == pytest.approx(0.5)
    vector = posterior.mean(lambda v: torch.stack([v["p"], v["p"] ** 2]))
    assert vector.tolist() == pytest.approx([0.5, 0.5 * 0.04 + 0.25 * 0.36 + 0.25])


def test_mean_leaves_out_samples_of_weight_zero():
    """They may be incomplete, and 0 * nan is nan."""
    traces = [trace_of(p=0.2), trace_of(q=1.0), trace_of(p=math.nan)]
    posterior = Posterior(traces, torch.tensor([0.0, NO_WEIGHT, NO_WEIGHT]), [0] * 3)
    assert float(posterior.mean("p")) == pytest.approx(0.2)
    assert float(posterior.mean(lambda v: v["p"])) == pytest.approx(0.2)


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 6)), min_size=1, max_size=12),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_a_quantile_is_the_smallest_value_that_reaches_the_level(pairs, levels):
    values, counts = [value for value, _ in pairs], [count for _, count in pairs]
    if not sum(counts):
        return
    traces = [trace_of(p=float(value), v=torch.tensor([value, -2.0 * value])) for value in values]
    posterior = Posterior(traces, torch.tensor(counts).double().log(), values)
    drawn = sorted(v for v, count in zip(values, counts, strict=True) for _ in range(count))
    # Of equal draws, q = k / n is reached by the k-th.
    levels = [*levels, *(k / len(drawn) for k in range(len(drawn) + 1))]
    expected = [
        next(v for i, v in enumerate(drawn, 1) if i / len(drawn) >= q - 1e-13) for q in levels
    ]
    found = posterior.quantile("p", levels)
    assert found.dtype == torch.float64 and found.tolist() == expected
    assert posterior.quantile(lambda v: v["p"], levels[0]).item() == expected[0]
    entries = posterior.quantile("v", levels)
    assert entries.shape == (len(levels), 2) and entries[:, 0].tolist() == expected
    other = [
        next(
            v for i, v in enumerate(sorted(-2 * v for v in drawn), 1) if i / len(drawn) >= q - 1e-13
        )
        for q in levels
    ]
    assert entries[:, 1].tolist() == other


def test_quantiles_of_bad_levels():
    posterior = Posterior([trace_of(p=0.2, z="a")], torch.zeros(1), [0])
    assert posterior.quantile("p", torch.tensor([0.1, 0.9])).shape == (2,)
    with pytest.raises(ValueError, match="q=1.5.*at least 0 and at most 1"):
        posterior.quantile("p", 1.5)
    with pytest.raises(ValueError, match="q=-1"):
        posterior.quantile("p", [0.5, -1])
    with pytest.raises(TypeError, match="'z' has no mean"):
        posterior.quantile("z", 0.5)
    with pytest.raises(KeyError, match="'nope'"):
        posterior.quantile("nope", 0.5)


def test_mean_says_why_there_is_none():
    traces = [trace_of(z="a", p=0.2, n=ToolResult.wrap(3)), trace_of(z="b", n=ToolResult.wrap(5))]
    posterior = Posterior(traces, torch.zeros(2), [0] * 2)
    with pytest.raises(TypeError, match="'z' has no mean.*probs"):
        posterior.mean("z")
    with pytest.raises(ValueError, match="'p' is not reached in every sample"):
        posterior.mean("p")
    assert float(posterior.mean("n")) == 4.0  # a tool's number has a mean


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


# --- copies ---

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)


@pytest.fixture
def inferred():
    def program(scales):
        z = lmppl.lm_sample("z", "ab", max_tokens=2)
        found = lmppl.tool("count", lambda text: {"length": [len(text)]}, z)
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        lmppl.lm_sample("y", ["a", z], obs="b")
        return {"z": z, "found": found, "theta": theta, "lm": scales["lm"].name}

    def guide(scales):
        lmppl.lm_sample("z", "b", max_tokens=2)

    pyro.clear_param_store()
    posterior = lmppl.infer(
        program, {"lm": LM}, lm=LM, guide=guide, method="importance", num_samples=20, seed=0,
        profile=True,
    )  # fmt: skip
    posterior.guide = guide
    return posterior


def told(posterior):
    """All that a posterior says of itself."""
    figures = [posterior.weights.tolist(), posterior.log_evidence, posterior.killed]
    values = [[str(z) for z in posterior["z"]], posterior["count"], posterior.mean("theta").item()]
    returned = [(str(r["z"]), r["found"], float(r["theta"])) for r in posterior.returns]
    return repr(posterior), figures, values, returned


@pytest.mark.parametrize("how", ["of infer", "resampled", "returned by a copy"])
def test_a_deep_copy_is_equal_and_independent(inferred, how):
    original = {
        "of infer": lambda: copy.copy(inferred),
        "resampled": lambda: inferred.resample(30, seed=0),
        "returned by a copy": lambda: copy.deepcopy(copy.deepcopy(inferred)),
    }[how]()
    before = told(original)
    copied = copy.deepcopy({"kept": [original, original]})["kept"]
    assert copied[0] is copied[1] and copied[0] is not original
    copied = copied[0]
    assert told(copied) == before
    assert {node["fn"].lm for _, node in nodes(copied, "z", "y")} == {LM}
    assert copied.guide is original.guide and copied.profile is original.profile is not None
    # A trace that stands in several places is one in the copy, too.
    assert len(set(map(id, copied.traces))) == len(set(map(id, original.traces)))
    assert not {id(trace) for trace in copied.traces} & {id(trace) for trace in original.traces}
    # What is then done to the copy, the original does not see, and the other way round.
    for one, other in ((copied, original), (original, copied)):
        kept = told(other)
        for trace in one.traces:
            trace.nodes["theta"]["value"].fill_(9.0)
            trace.nodes["z"]["value"].fill_(0)
            trace.nodes["count"]["value"].result["length"].append(3)
            trace.nodes.pop("y", None)
        one.log_weights += torch.arange(len(one)).double()
        one.__dict__.pop("weights", None)
        one.returns[0]["found"]["length"].append(7)
        one.returns[-1] = {"z": "changed", "found": None, "theta": 0.0}
        one.info["notes"].append("changed")
        assert told(other) == kept


def nodes(posterior, *names):
    return [(name, trace.nodes[name]) for trace in posterior.traces for name in names]


def test_a_shallow_copy_has_lists_of_its_own(inferred):
    copied = copy.copy(inferred)
    assert told(copied) == told(inferred)
    assert copied.traces[0] is inferred.traces[0]
    copied.traces.pop()
    copied.returns.pop()
    del copied.info["notes"]
    assert len(inferred.traces) == len(inferred.returns) == 20 and "notes" in inferred.info
    copied.log_weights.zero_()
    assert float(inferred.log_weights.abs().sum()) > 0


def test_a_posterior_of_pyros_traces_is_copied():
    with lmppl.use(LM):
        trace = poutine.trace(lambda: pyro.sample(
            "x", dist.Normal(pyro.param("loc", torch.tensor(0.5)) * 2, 1.0)
        )).get_trace()  # fmt: skip
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].grad_fn is not None
    copied = copy.deepcopy(Posterior([trace], torch.zeros(1), [trace.nodes["_RETURN"]["value"]]))
    assert copied["x"] == [trace.nodes["x"]["value"]]


def test_pickling_says_what_to_store(inferred):
    for protocol in range(2, 6):
        with pytest.raises(
            TypeError, match=r"use posterior\.save\(path\) and lmppl\.Posterior\.load\(path"
        ):
            pickle.dumps(inferred, protocol)


# --- tables --------------------------------------------------------------------------------------


def report() -> dict[str, Any]:
    return {
        "engine": "importance",
        "iid": True,
        "tokens_sampled": 1234,
        "tokens_scored": 567,
        "seconds": 3.21,
        "killed": Counter({"y": 2}),
        "notes": ["self-normalised"],
    }


def rows_of(table: object) -> list[list[str]]:
    return [line.split() for line in repr(table).splitlines()]


def two_sites() -> Posterior:
    traces = [trace_of(a="x", b=" one"), trace_of(a="x", b=" two"), trace_of(a="y", b=" two")]
    return Posterior(traces, torch.tensor([0.2, 0.4, 0.4]).log(), [0] * 3, info=report())


def test_the_table_has_a_marginal_a_site():
    lines = repr(two_sites()).splitlines()
    assert lines[0] == "Posterior by importance: 3 samples, ESS 2.8 (93%)"
    assert lines[1].startswith("log evidence -1.099 nats (standard error 0.2")
    assert lines[2] == "don't trust these figures: ESS 2.8 is below 10"
    assert lines[3].startswith("what may help: more samples (num_samples=), ")
    assert lines[4] == "1,234 tokens drawn, 567 tokens scored, 3.2 s"
    assert [line.split() for line in lines if line and "─" not in line][5:-2] == [
        ["weight", "a"], ["60.0%", "█" * 10, "'x'"], ["40.0%", "██████▋", "'y'"],
        ["weight", "b"], ["80.0%", "█" * 10, "'", "two'"], ["20.0%", "██▌", "'", "one'"],
        ["weight", "returned"], ["100.0%", "█" * 10, "0"],
    ]  # fmt: skip
    assert lines[-2] == "samples with probability zero, by the site that ended them: y (2)"
    assert lines[-1] == "note: self-normalised"


def test_joint_rows_on_request():
    posterior = two_sites()
    assert "rows" not in posterior.summary()
    rows = posterior.summary(joint=True)["rows"]
    assert [row["values"] for row in rows][-1] == {"a": "x", "b": " one"}
    table = posterior.table(joint=True)
    assert ["weight", "a", "b"] in rows_of(table)
    assert ["20.0%", "█████", "'x'", "'", "one'"] in rows_of(table)
    assert ["weight", "b"] in rows_of(posterior.table("b", joint=True, rows=1))
    assert "and 1 more, together 20.0%" in repr(posterior.table("b", joint=True, rows=1))
    assert table._repr_html_().count("<table>") == 1 and str(table) == repr(table)
    one = posterior.table("b", rows=1)
    assert ["weight", "a"] not in rows_of(one) and "'x'" not in repr(one)
    assert "and 1 more, together 20.0%" in repr(one)
    with pytest.raises(KeyError, match="no trace has a site 'c'"):
        posterior.table("c")
    with pytest.raises(ValueError, match="rows=0"):
        posterior.table(rows=0)


def test_tools_and_returned_values_are_in_the_table():
    traces = [trace_of(z="a", n=ToolResult.wrap({"hits": i % 2}), s=ToolResult.wrap(0.5 * i),
                       y=(Words(["w"]), torch.tensor([0, -1]), True)) for i in range(4)]  # fmt: skip
    posterior = Posterior(traces, torch.zeros(4), [("a", i % 2) for i in range(4)])
    summary = posterior.summary()
    assert summary["marginals"]["n"] == [
        {"weight": 0.5, "value": {"hits": 0}}, {"weight": 0.5, "value": {"hits": 1}},
    ]  # fmt: skip
    assert summary["numeric"]["s"]["mean"] == 0.75 and summary["tools"] == ["n", "s"]
    assert [row["value"] for row in summary["returned"]["rows"]] == [("a", 0), ("a", 1)]
    assert "y" not in summary["marginals"], "what is observed is known"
    table = repr(posterior)
    assert "n (tool)" in table and "{'hits': 1}" in table and "['a', 1]" in table
    assert "s (tool)   0.75" in table
    assert "'w'" in repr(posterior.table("y")), "unless it is asked for"
    floats = Posterior(traces, torch.zeros(4), [0.5, 1.5, 2.5, 3.5])
    assert floats.summary()["returned"]["numeric"]["mean"] == 2.0
    assert any(row[:3] == ["returned", "2", "1.118"] for row in rows_of(floats))


@pytest.mark.parametrize("returns", [[None] * 3, ["a", "b", "a"], [" one"] * 3])
def test_what_a_program_returns_is_shown_if_it_says_something(returns):
    traces = [trace_of(z=z, w="w") for z in ("a", "b", "a")]
    shown = Posterior(traces, torch.zeros(3), returns).summary()["returned"]
    assert (shown is not None) == (returns[0] == " one")


def test_deterministic_values_are_shown():
    def model():
        p = pyro.sample("p", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * p)
        pyro.deterministic("big", torch.tensor(3))

    traces = [poutine.trace(model).get_trace() for _ in range(3)]
    summary = Posterior(traces, torch.zeros(3), [None] * 3).summary()
    assert summary["numeric"]["twice"]["mean"] == pytest.approx(2 * summary["numeric"]["p"]["mean"])
    assert summary["marginals"]["big"] == [{"weight": pytest.approx(1.0), "value": 3}]


def test_a_program_of_many_sites_has_a_short_table():
    traces = [trace_of(**{f"z{k}": f"{i * k % 7}" for k in range(20)}) for i in range(50)]
    posterior = Posterior(traces, torch.zeros(50), [None] * 50)
    lines = repr(posterior).splitlines()
    assert len(lines) < 45 and max(map(len, lines)) < 120
    assert sum("weight" in line for line in lines) == 6
    assert any(
        line.startswith("and 14 more, shown by posterior.table(name): z6, z7") for line in lines
    )
    assert repr(posterior.table("z6", rows=7)).count("%") == 1 + 7
    vector = Posterior([trace_of(v=torch.arange(30.0))], torch.zeros(1), [None])
    assert "v[11]" in repr(vector) and "v[12]" not in repr(vector) and "and 18 more" in repr(vector)


# --- trust ---


def heavy(k: float, count: int = 400) -> Posterior:
    """Weights whose tail has shape k: quantiles of a Pareto distribution."""
    log_weights = -k * torch.log1p(-(torch.arange(count) + 0.5).double() / count)
    info = {"iid": True, "engine": "importance"}
    return Posterior(
        [trace_of(z=str(i)) for i in range(count)], log_weights, [0] * count, info=info
    )


def test_a_table_says_when_its_figures_cannot_be_trusted():
    few = posterior_of(list("abcdefghijkl"), [50.0, *[1.0] * 11], info={"iid": True})
    assert few.ess < 10 and few.log_evidence_stderr < 1
    line = f"don't trust these figures: ESS {few.ess:.1f} is below 10"
    assert repr(few).splitlines()[2] == line and line.replace("'", "&#x27;") in few._repr_html_()
    enough = posterior_of(list("abcdefghijkl"), [1.0] * 12, info={"iid": True})
    assert "trust" not in repr(enough) and "help" not in repr(enough)
    assert enough.summary()["doubts"] == enough.summary()["remedies"] == []
    tail = heavy(0.85)
    assert tail.ess > 10 and tail.summary()["pareto_k"] > 0.7
    assert tail.summary()["doubts"] == [f"Pareto k {tail.summary()['pareto_k']:.2f} is above 0.7"]
    assert heavy(0.3).summary()["doubts"] == [] and heavy(0.3).summary()["pareto_k"] < 0.7


def heard(x, y):
    lmppl.lm_sample("y", [x, lmppl.lm_sample("z", x, max_tokens=2)], obs=y)


def heard_guide(x, y):
    lmppl.lm_sample("z", x, max_tokens=2)


@pytest.mark.parametrize(
    ("engine", "options", "remedies"),
    [
        ("importance", {}, 'more samples (num_samples=), method="smc", a guide (guide=)'),
        ("smc", {}, 'more samples (num_samples=), a twist (twist="lookahead"), a guide (guide=)'),
        (
            "mcmc",
            {"num_chains": 1, "warmup": 20},
            "more moves (num_samples=, thin=), better starts (initial=), a guide (guide=)",
        ),
        (
            "gflownet",
            {"steps": 1, "fit": {"batch_size": 4}},
            "more samples (num_samples=), more training of the guide (guide.fit)",
        ),
        (lmppl.Importance(), {}, 'more samples (num_samples=), method="smc", a guide (guide=)'),
    ],
)
def test_beside_a_doubt_stands_what_may_help_by_the_engine(engine, options, remedies, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that no line is broken
    common = {"num_samples": 4, "seed": 0, "lm": LM}
    posterior = lmppl.infer(heard, "ab.", "a", method=engine, **common, **options)
    lines = repr(posterior).splitlines()
    assert lines[2].startswith("don't trust these figures: ESS ")
    assert lines[3] == f"what may help: {remedies}"
    assert ", ".join(posterior.summary()["remedies"]) == remedies


def test_a_guide_that_was_there_could_be_better():
    common = {"num_samples": 4, "seed": 0, "lm": LM}
    posterior = lmppl.infer(heard, "ab.", "a", guide=heard_guide, **common)
    assert posterior.summary()["remedies"][-1] == "a better guide"
    mine = posterior_of(["a"], [1.0], info={"engine": "an engine of mine"})
    assert mine.summary()["remedies"] == ["more samples (num_samples=)"]


def test_nothing_is_doubted_where_nothing_is_estimated():
    exact = posterior_of(["a", "b"], [9.0, 1.0], info={"engine": "exact", "exact": True})
    dead = posterior_of(["a", "b"], [0.0, 0.0])
    assert exact.summary()["doubts"] == dead.summary()["doubts"] == []
    drawn = exact.resample(3, seed=0).summary()
    assert drawn["doubts"] and drawn["remedies"] == ["more draws (resample)"], "three are few"


def test_chains_that_disagree_are_doubted(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that no line is broken
    posterior = posterior_of(list("abab"), [1.0] * 4, info=CHAINS, claims_evidence=False)
    doubt = "R-hat of 'length of z' is 1.20, above 1.01: the chains disagree"
    assert posterior.summary()["doubts"] == [doubt] and doubt in repr(posterior)


def test_the_table_shows_the_first_ten():
    texts = [chr(ord("a") + i) for i in range(14)]
    table = repr(posterior_of(texts, [float(20 - i) for i in range(14)]))
    assert MAX_ROWS == 10 and "'j'" in table and "'k'" not in table
    assert f"and 4 more, together {100 * (10 + 9 + 8 + 7) / 189:.1f}%" in table


@pytest.mark.parametrize("width", [40, 60, 200])
def test_the_table_is_no_wider_than_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    long = posterior_of(["word " * 50, "漢字" * 60], [0.6, 0.4], info=report())
    lines = repr(long).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert any(line.startswith(" 60.0%") for line in lines), "the weights are never cut"
    assert sum("word word" in line for line in lines) == 1, "one row a value, cut, not wrapped"
    assert "…" in repr(long)


HOSTILE = "[bold]x[/bold][/nope] \x1b[31mred\nnew\r\tline <script>alert(1)</script> :smile: \u202e"


def test_what_a_model_wrote_is_shown_never_interpreted():
    posterior = posterior_of([HOSTILE], [1.0], info={"notes": [HOSTILE], "killed": {HOSTILE: 1}})
    table = as_text(posterior_blocks(posterior.summary()), width=400)
    row = next(line for line in table.splitlines() if "100.0%" in line)
    assert (
        repr(HOSTILE) in row
    )  # as Python shows a string: markup, escapes, emoji codes as they are
    assert not set(table) & {"\x1b", "\r", "\t", "\u202e"}
    page = posterior._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert not set(page) & {"\x1b", "\r", "\t", "\n", "\u202e"}


def test_hostile_names_of_sites():
    name = "<b>[red]\n"
    posterior = Posterior([trace_of(**{name: "a"})], torch.zeros(1), [0])
    assert "<b>[red]\\n" in repr(posterior)
    assert "&lt;b&gt;[red]\\n" in posterior._repr_html_()


def test_continuous_sites_are_summarised():
    values = [0.0, 1.0, 2.0]
    traces = [trace_of(z="a", p=v, v=torch.tensor([v, 2 * v])) for v in values]
    posterior = Posterior(traces, torch.tensor([0.25, 0.5, 0.25]).log(), [0] * 3)
    summary = posterior.summary()
    assert list(summary["marginals"]) == ["z"]
    sd = math.sqrt(0.5)
    levels = {"5%": 0.0, "50%": 1.0, "95%": 2.0}
    assert summary["numeric"]["p"] == pytest.approx({"mean": 1.0, "sd": sd, "weight": 1, **levels})
    assert summary["numeric"]["v"]["mean"] == pytest.approx([1.0, 2.0])
    assert summary["numeric"]["v"]["95%"] == pytest.approx([2.0, 4.0])
    table = rows_of(posterior)
    assert ["number", "mean", "sd", "5%", "50%", "95%"] in table
    assert ["p", "1", "0.7071", "0", "1", "2"] in table
    assert ["v[1]", "2", "1.414", "0", "2", "4"] in table
    only = Posterior([trace_of(p=v) for v in values], torch.zeros(3), [None] * 3)
    assert "weight" not in repr(only) and ["p", "1", "0.8165", "0", "1", "2"] in rows_of(only)
    assert only._repr_html_().count("<table>") == 1


def test_a_continuous_site_in_one_branch_is_averaged_where_it_is():
    traces = [trace_of(p=0.5), trace_of(z="a"), trace_of(p=1.5)]
    posterior = Posterior(traces, torch.tensor([0.2, 0.6, 0.2]).log(), [0] * 3)
    assert posterior.summary()["numeric"]["p"] == pytest.approx(
        {"mean": 1.0, "sd": 0.5, "weight": 0.4, "5%": 0.5, "50%": 0.5, "95%": 1.5}
    )
    assert "p (in 40.0%)      1   0.5   0.5   0.5   1.5" in repr(posterior)


def test_bars_are_in_eighths():
    assert bar(1.0) == "█" * 10
    assert bar(0.0) == ""
    assert bar(1 / 80) == "▏"
    lengths = [len(bar(i / 80)) for i in range(81)]
    assert all(a <= b for a, b in itertools.pairwise(lengths))


def test_a_dead_or_bare_posterior_has_a_table():
    bare = Posterior([Trace()], torch.zeros(1), [None])
    assert repr(bare).splitlines()[0] == "Posterior: 1 sample, ESS 1.0 (100%)"
    assert bare.summary()["marginals"] == {} and bare.summary(joint=True)["rows"] == []
