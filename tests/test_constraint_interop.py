"""Pyro's own tools on constrained programs, outside ``infer``: densities are right; draws under a
global constraint are not from them, and a warning says so."""

from __future__ import annotations

import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Importance, Trace_ELBO

import lmppl
from lmppl import distributions, lm_sample
from lmppl.testing import Language, enumerate_program, tiny_lm

LM = tiny_lm(["a", "b", "."], seed=3)
LM.model.requires_grad_(False)
LANGUAGES = {"z": Language.of_texts(["a", "ab", "abb", "b"])}  # of at most three tokens


@pytest.fixture(autouse=True)
def _fresh_state():
    distributions._warned_of_draws.clear()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with lmppl.use(LM):
        yield


def program(y, constrain):
    """Without dead ends: ``ab*`` may close, or go on, at every token."""
    z = lm_sample("z", "ab", max_tokens=3, regex="ab{0,2}|b", constrain=constrain)
    lm_sample("y", ["b", z], obs=y)
    return z


def exact(constrain):
    return enumerate_program(program, "b", constrain, lm=LM, languages=LANGUAGES)


@pytest.mark.parametrize("constrain", ["global", "local"])
def test_traces_that_are_given_have_the_joint_density(constrain):
    traces = exact(constrain)
    assert len(traces) > 3
    for expected in traces:
        given = pyro.condition(program, data={"z": expected.data["z"]})
        conditioned = poutine.trace(given).get_trace("b", constrain)
        assert float(conditioned.log_prob_sum()) == pytest.approx(expected.log_joint, abs=1e-5)
        conditioned.nodes["z"]["is_observed"] = False
        replayed = poutine.replay(program, trace=conditioned)
        again = poutine.trace(replayed).get_trace("b", constrain)
        assert float(again.log_prob_sum()) == pytest.approx(expected.log_joint, abs=1e-5)


@pytest.mark.parametrize("constrain", ["global", "local"])
def test_a_given_text_that_does_not_match_has_density_zero(constrain):
    given = pyro.condition(program, data={"z": "ba"})
    trace = poutine.trace(given).get_trace("b", constrain)
    assert float(trace.log_prob_sum()) == -math.inf
    assert trace.nodes["_RETURN"]["value"] == "ba"  # and the program runs on


def test_draws_under_a_global_constraint_warn_that_their_weights_are_wrong():
    """Pyro cancels the text's density as if it were that of the draw."""
    with pytest.warns(
        UserWarning, match="site 'z': .* the masks of its constraint, and its density"
    ):
        check_weights("global")
    with warnings.catch_warnings():  # once a site
        warnings.simplefilter("error")
        check_weights("global")


def test_importance_is_right_under_a_local_constraint():
    check_weights("local")


def check_weights(constrain):
    traces = {trace.values["z"]: trace for trace in exact(constrain)}
    posterior = Importance(program, num_samples=20).run("b", constrain)
    for trace, weight in zip(posterior.exec_traces, posterior.log_weights, strict=True):
        drawn = traces[trace.nodes["z"]["fn"].token_ids(trace.nodes["z"]["value"])]
        assert float(weight) == pytest.approx(drawn.log_joint - drawn.log_prior, abs=1e-4)


def test_neither_engines_nor_bare_calls_warn():
    lmppl.infer(program, "b", "global", method="importance", num_samples=4)
    fn = lmppl.LMText(LM, "ab", max_tokens=3, constraint=lmppl.constraints.Regex("a"))
    assert fn.text(fn.sample()).body == "a"
    assert program("b", "global").startswith(("a", "b"))


def test_the_elbo_is_right_with_a_guide_whose_density_is_that_of_its_draws():
    """The model's text is held to a global constraint, the guide's to a local one without dead ends."""
    joints = {trace.values["z"]: trace for trace in exact("global")}
    guided = {trace.values["z"]: trace.log_prior for trace in exact("local")}
    elbo = sum(math.exp(q) * (joints[ids].log_joint - q) for ids, q in guided.items())

    def guide(y, constrain):
        lm_sample("z", "ab", max_tokens=3, regex="ab{0,2}|b", constrain="local")

    with torch.no_grad():
        loss = Trace_ELBO(num_particles=64).loss(program, guide, "b", "global")
    spread = math.sqrt(
        sum(math.exp(q) * (joints[i].log_joint - q - elbo) ** 2 for i, q in guided.items())
    )
    assert -loss == pytest.approx(elbo, abs=4 * spread / 8)
    assert elbo < exact("global").log_evidence
