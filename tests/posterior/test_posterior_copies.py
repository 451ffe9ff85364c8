"""Posterior: copies, deep and shallow, and what pickling says."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import Posterior
from lmppl.testing import tiny_lm

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
