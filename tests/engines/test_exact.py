"""Exact: it agrees with an oracle that shares no code with it, and refuses what it cannot do."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from estimates import joint_of, weighted_values

import lmppl
from lmppl import lm_sample, require
from lmppl.testing.programs import CASES

FINITE = [case for case in CASES.values() if case.quadrature is None]
CONTINUOUS = [case for case in CASES.values() if case.quadrature is not None]


def run(case, **options):
    return lmppl.infer(case.program, *case.args, lm=case.lm, method="exact", **options)


@pytest.mark.parametrize("case", FINITE, ids=str)
def test_equals_the_oracle(case):
    oracle, posterior = case.enumerate(), run(case)
    assert posterior.log_evidence == pytest.approx(oracle.log_evidence, abs=1e-4)
    found, expected = weighted_values(posterior), joint_of(oracle)
    assert found.keys() == expected.keys()
    for values, joint in expected.items():
        assert math.log(found[values]) == pytest.approx(math.log(joint), abs=1e-4)
    for name in case.text_latents:
        marginal = oracle.posterior(name, text=True)
        probs = posterior.probs(name)
        assert probs.keys() == marginal.keys()
        for text, p in marginal.items():
            assert probs[text] == pytest.approx(p, abs=1e-4)


@pytest.mark.parametrize("case", FINITE, ids=str)
def test_mean_weight_is_the_evidence(case):
    posterior = run(case)
    mean = torch.logsumexp(posterior.log_weights, 0) - math.log(len(posterior))
    assert float(mean) == pytest.approx(case.enumerate().log_evidence, abs=1e-4)


@pytest.mark.parametrize("case", CONTINUOUS, ids=str)
def test_refuses_a_continuous_latent(case):
    with pytest.raises(ValueError, match="'theta'.*no finite support"):
        run(case)


def test_refuses_too_many_traces():
    with pytest.raises(ValueError, match="site 'w' passes max_traces=20"):
        run(CASES["chain"], max_traces=20)
    number = len(run(CASES["chain"]))
    assert len(run(CASES["chain"], max_traces=number)) == number


def test_refuses_too_many_values_of_one_site():
    with pytest.raises(ValueError, match="site 'z' passes max_traces=3"):
        run(CASES["one site"], max_traces=3)


def test_refuses_a_guide():
    with pytest.raises(ValueError, match="takes no guide"):
        run(CASES["one site"], guide=lambda x, y: None)


def test_names_the_site_of_a_batch():
    def program():
        lm_sample("z", "a", max_tokens=1)
        pyro.sample("k", dist.Bernoulli(torch.tensor([0.5, 0.5])).to_event(0))

    with pytest.raises(ValueError, match="'k'.*batch shape"):
        lmppl.infer(program, lm=CASES["chain"].lm, method="exact")


def test_all_traces_dead():
    def program():
        z = lm_sample("z", "a", max_tokens=2)
        require("impossible", "a" in z and "a" not in z)

    with pytest.raises(lmppl.ZeroEvidenceError, match="impossible") as caught:
        lmppl.infer(program, lm=CASES["chain"].lm, method="exact")
    assert caught.value.posterior.killed["impossible"] == len(caught.value.posterior)


def test_a_discrete_pyro_latent_is_enumerated():
    def program():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = lm_sample("z", ["a", "b", "."][int(k)], max_tokens=2)
        lm_sample("y", z + "a", obs="b")

    lm = CASES["chain"].lm
    posterior = lmppl.infer(program, lm=lm, method="exact")
    oracle = lmppl.testing.enumerate_program(program, lm=lm)
    assert posterior.log_evidence == pytest.approx(oracle.log_evidence, abs=1e-4)
    probs = posterior.probs("k")
    for k, p in oracle.posterior("k").items():
        assert probs[k] == pytest.approx(p, abs=1e-4)
