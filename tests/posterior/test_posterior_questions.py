"""Posterior: values of sites, probabilities of texts, expectations."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.poutine import Trace
from weighted_traces import Words, posterior_of, trace_of

from lmppl import Posterior
from lmppl.distributions import ToolResult
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)
NO_WEIGHT = -math.inf


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
