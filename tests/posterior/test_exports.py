"""Posteriors as data frames and for ArviZ."""

from __future__ import annotations

import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine import Trace
from weighted_traces import Words, posterior_of, trace_of

import lmppl
from lmppl import Posterior, ZeroEvidenceError, lm_sample
from lmppl.distributions import ToolResult
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)


def observed(text: str):
    return Words([text]), torch.tensor([0, -1]), True


def mixed() -> Posterior:
    """Texts, numbers, vectors, tools and data; one site in one branch only, and a dead sample."""
    traces = [
        trace_of(z=" a", p=0.5, v=torch.tensor([1, 2]), n=ToolResult.wrap(3), y=observed("data")),
        trace_of(z=" b", p=1.5, v=torch.tensor([3, 4]), w=" c", n=ToolResult.wrap(5),
                 y=observed("data")),
        trace_of(z=" dead"),
    ]  # fmt: skip
    weights = torch.tensor([0.25, 0.75, 0.0]).log()
    info = {"engine": "importance", "notes": ["by hand"]}
    return Posterior(traces, weights, ["one", {"two": 2}, None], info=info)


# --- data frames ---


def test_a_data_frame_has_a_row_a_sample():
    frame = mixed().to_dataframe()
    assert list(frame.columns) == ["weight", "log_weight", "z", "p", "v", "n", "y", "w"]
    assert frame["weight"].tolist() == pytest.approx([0.25, 0.75, 0.0])
    assert frame["log_weight"].tolist() == mixed().log_weights.tolist()
    assert frame["z"].tolist() == [" a", " b", " dead"] and type(frame["z"][0]) is str
    assert frame["p"].dtype == np.float64 and np.isnan(frame["p"][2])
    assert frame["v"][1].tolist() == [3, 4] and frame["v"][2] is None
    assert frame["w"].isna().tolist() == [True, False, True]
    assert frame["n"].tolist()[:2] == [3, 5]
    assert (frame["p"] * frame["weight"]).sum() == pytest.approx(1.25)
    returned = mixed().to_dataframe(returns=True)["returned"]
    assert returned.tolist()[:2] == ["one", {"two": 2}]


def test_columns_give_way_to_sites():
    posterior = Posterior([trace_of(weight="x", chain=2.0)] * 2, torch.zeros(2), [0, 0],
                          info={"chain": [(0, 0), (0, 1)]})  # fmt: skip
    frame = posterior.to_dataframe()
    assert list(frame.columns) == ["chain_", "draw", "weight_", "log_weight", "weight", "chain"]
    assert frame["weight"].tolist() == ["x", "x"] and frame["weight_"].tolist() == [0.5, 0.5]
    assert frame["draw"].tolist() == [0, 1]


def test_dead_samples_can_be_looked_at_in_a_data_frame():
    frame = posterior_of(["a", "b"], [0.0, 0.0]).to_dataframe()
    assert frame["weight"].tolist() == [0, 0] and frame["z"].tolist() == ["a", "b"]


# --- ArviZ ---


def test_samples_of_a_program_become_a_tree():
    def program(y):
        z = lm_sample("z", "ab", max_tokens=2)
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * theta)
        k = lmppl.tool("length", len, z)
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=torch.tensor([0.5, 1.0]))
        if k > 1:
            lm_sample("only/long", z, max_tokens=1)
        lm_sample("y", ["a", z], obs=y)

    posterior = lmppl.infer(program, "b", lm=LM, method="importance", num_samples=30, seed=0)
    tree = posterior.to_arviz(weighted=True)
    assert set(tree.children) == {"posterior", "sample_stats", "log_likelihood", "observed_data"}
    group = tree["posterior"]
    assert set(group.data_vars) == {"z", "theta", "twice", "length", "only_long"}
    assert dict(group.sizes) == {"chain": 1, "draw": 30}
    assert group["z"].dtype == object and group["z"].values[0].tolist() == posterior["z"]
    assert type(group["z"].values[0, 0]) is str
    found = group["only_long"]
    assert found.isnull().values[0].tolist() == [value is None for value in posterior["only/long"]]
    assert [v for v in found.values[0] if isinstance(v, str)] == [
        str(value) for value in posterior["only/long"] if value is not None
    ]
    assert 0 < found.isnull().sum() < 30
    assert group["theta"].values[0].tolist() == pytest.approx(
        [float(v) for v in posterior["theta"]]
    )
    weights = np.exp(tree["sample_stats"]["log_weight"].values)
    assert weights.shape == (1, 30) and weights.sum() == pytest.approx(1.0)
    mean = (weights * group["theta"].values).sum()
    assert mean == pytest.approx(float(posterior.mean("theta")))
    lp = tree["sample_stats"]["lp"].values[0]
    assert lp.tolist() == pytest.approx([float(t.log_prob_sum()) for t in posterior.traces])
    assert tree["observed_data"]["y"].item() == "b"
    assert tree["observed_data"]["x"].values.tolist() == [0.5, 1.0]
    assert tree["log_likelihood"]["x"].shape == (1, 30, 2)
    assert tree["log_likelihood"]["y"].values[0, 0] == pytest.approx(
        float(posterior.traces[0].nodes["y"]["log_prob"])
    )
    assert tree.attrs["engine"] == "importance" and tree.attrs["ess"] == posterior.ess


def test_by_default_the_weights_are_resampled_away():
    tree = mixed().to_arviz(num_draws=4000, seed=0)
    group = tree["posterior"]
    assert group.sizes["draw"] == 4000 and "sample_stats" not in tree.children
    assert float(group["p"].mean()) == pytest.approx(1.25, abs=0.03)
    assert set(group["z"].values[0]) == {" a", " b"} and group["v"].shape == (1, 4000, 2)
    assert set(group["w"].values[0][~group["w"].isnull().values[0]]) == {" c"}
    assert float(group["w"].isnull().mean()) == pytest.approx(0.25, abs=0.03)
    assert tree.attrs["notes"] == ["by hand", "resampled from 3 samples"]
    assert tree.attrs["ess"] == pytest.approx(mixed().ess)
    assert mixed().to_arviz(seed=1)["posterior"].sizes["draw"] == 3


def test_what_a_branch_does_not_reach_and_a_name_that_is_a_dimension():
    traces = [trace_of(draw=1.0, k=(dist.Categorical(torch.ones(3)), torch.tensor(2), False)),
              trace_of(draw=2.0)]  # fmt: skip
    group = Posterior(traces, torch.zeros(2), [0, 0]).to_arviz()["posterior"]
    assert group["draw_"].values.tolist() == [[1.0, 2.0]]
    assert group["k"].values[0, 0] == 2.0 and np.isnan(group["k"].values[0, 1])


def test_equal_weights_stay_as_they_are():
    posterior = posterior_of(list("abca"), [1.0] * 4)
    assert posterior.to_arviz()["posterior"]["z"].values.tolist() == [list("abca")]


CHAIN = [(1, 1), (0, 0), (1, 0), (0, 1), (0, 2), (1, 2)]


def test_chains_stay_chains():
    info = {"engine": "mcmc", "ess": 3.5, "chain": CHAIN}
    posterior = posterior_of(list("abcdef"), [1.0] * 6, info=info, claims_evidence=False)
    tree = posterior.to_arviz()
    assert tree["posterior"]["z"].values.tolist() == [["b", "d", "e"], ["c", "a", "f"]]
    assert tree.attrs["ess"] == 3.5 and "log_evidence" not in tree.attrs
    assert posterior.to_arviz(num_draws=4, seed=0)["posterior"]["z"].shape == (1, 4)
    posterior.info["chain"] = [*CHAIN[:5], (1, 7)]
    with pytest.raises(ValueError, match="chains with the same draws.*{0: 3, 1: 3}"):
        posterior.to_arviz()


def test_more_chains_than_draws_is_no_mistake():
    """ArviZ's warning that the two may be mixed up is not heard (it would be an error here)."""
    info = {"engine": "mcmc", "chain": [(0, 0), (1, 0), (2, 0)]}
    posterior = posterior_of(list("abc"), [1.0, 2.0, 1.0], info=info, claims_evidence=False)
    assert posterior.to_arviz(weighted=True)["posterior"]["z"].shape == (3, 1)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_draws= is of draws that are resampled"):
        mixed().to_arviz(weighted=True, num_draws=3)
    with pytest.raises(ZeroEvidenceError):
        posterior_of(["a"], [0.0]).to_arviz()
    with pytest.raises(TypeError, match="weighted=1"):
        mixed().to_arviz(weighted=1)
    with pytest.raises(TypeError, match="returns='z'"):
        mixed().to_dataframe(returns="z")


@pytest.mark.parametrize(
    ("module", "ask", "extra"),
    [("pandas", Posterior.to_dataframe, "pandas"), ("arviz_base", Posterior.to_arviz, "arviz")],
)
def test_without_the_library(module, ask, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs .*pip install 'lmppl-pyro\[{extra}\]'"):
        ask(mixed())


def test_a_posterior_of_pyros_traces():
    """They have no log-probabilities yet."""
    trace: Trace = poutine.trace(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))).get_trace()
    tree = Posterior([trace], torch.zeros(1), [None]).to_arviz()
    assert tree["posterior"]["x"].shape == (1, 1) and list(tree.children) == ["posterior"]
