"""The GFlowNet engine, and its guides as proposals of the other engines."""

import functools
import math

import pytest
import torch

import lmppl
from lmppl import lm_sample, require
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES

CASE = CASES["one site"]
FIT = {"batch_size": 16}


@functools.cache
def trained(name="one site", steps=40):
    """A guide, half trained."""
    case = CASES[name]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    return guide.fit([case.args], steps=steps, seed=0, **FIT)


def infer(case=CASE, **options):
    options = {"method": "gflownet", "seed": 0, "progress": False} | options
    return lmppl.infer(case.program, *case.args, lm=case.lm, **options)


def test_without_a_guide_one_is_trained_and_returned():
    seen = []
    posterior = infer(steps=3, fit=FIT, num_samples=8, callback=seen.append)
    assert len(posterior) == 8
    assert isinstance(posterior.guide, lmppl.LMGuide)
    assert len(posterior.guide.history) == 3
    assert [figures["step"] for figures in seen[:3]] == [0, 1, 2]
    assert "trained a guide for 3 steps on this input (.guide)" in posterior.info["notes"]
    again = infer(guide=posterior.guide, num_samples=8)
    assert again.guide is posterior.guide
    assert len(again.guide.history) == 3  # it is used as it is
    assert not any("trained" in note for note in again.info["notes"])


def test_seeds_reproduce():
    one, two = (infer(steps=3, fit=FIT, num_samples=8, seed=5) for _ in range(2))
    assert torch.equal(one.log_weights, two.log_weights)
    assert [str(z) for z in one["z"]] == [str(z) for z in two["z"]]
    other = infer(guide=one.guide, num_samples=8, seed=6)
    assert not torch.equal(one.log_weights, other.log_weights)


def test_weights_are_u():
    """log w = log R - log q of the guide's own draws."""
    guide = trained()
    posterior = infer(guide=guide, num_samples=16)
    for trace, log_weight in zip(posterior.traces, posterior.log_weights.tolist(), strict=True):
        log_r = sum(
            float(node["log_prob_sum"]) for node in trace.nodes.values() if node["type"] == "sample"
        )
        log_q = float(trace.nodes["z"]["proposal_log_prob"])
        assert log_weight == pytest.approx(log_r - log_q, abs=1e-5)
    u = posterior.log_weights
    assert posterior.info["elbo"] == pytest.approx(float(u.mean()))
    assert posterior.log_evidence == pytest.approx(float(torch.logsumexp(u, 0)) - math.log(16))
    assert any("self-normalised" in note for note in posterior.info["notes"])


def test_raw_draws():
    raw = infer(guide=trained(), num_samples=16, correct=False)
    assert torch.equal(raw.weights, torch.full_like(raw.weights, 1 / 16))
    assert raw.log_evidence is None or math.isnan(raw.log_evidence)
    corrected = infer(guide=trained(), num_samples=16)
    assert [str(z) for z in raw["z"]] == [str(z) for z in corrected["z"]]
    assert raw.info["elbo"] == pytest.approx(corrected.info["elbo"])
    assert any("not corrected" in note for note in raw.info["notes"])


def test_dead_draws_have_no_weight():
    case = CASES["hard constraint"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    for correct in (True, False):
        posterior = infer(case, guide=guide, num_samples=64, correct=correct)
        dead = [i for i, trace in enumerate(posterior.traces) if "w" not in trace.nodes]
        assert dead
        assert all(float(posterior.weights[i]) == 0.0 for i in dead)
        assert posterior.info["killed"] == {"mentions b": len(dead)}
        assert math.isfinite(posterior.info["elbo"])


def test_all_draws_dead():
    def program(x):
        z = lm_sample("z", x, max_tokens=1)
        require("never", z == "x")

    lm = tiny_lm("ab.", seed=0)
    guide = lmppl.LMGuide(program, lm=lm)
    with pytest.raises(lmppl.ZeroEvidenceError, match="never"):
        lmppl.infer(program, "ab", lm=lm, method="gflownet", guide=guide, seed=0)
    with pytest.raises(ValueError, match="no trace of any input had a positive probability"):
        lmppl.infer(program, "ab", lm=lm, method="gflownet", steps=2, fit=FIT, seed=0)


def test_a_tempered_target_is_said():
    tempered = {"reward_temperature": (2.0, 1.5)} | FIT
    posterior = infer(steps=2, fit=tempered, num_samples=4)
    note = "the guide's own target is tempered (temperature 1.5)"
    assert note in posterior.info["notes"]
    assert note in infer(guide=posterior.guide, num_samples=4).info["notes"]
    annealed = {"reward_temperature": (2.0, 1.0)} | FIT
    posterior = infer(steps=2, fit=annealed, num_samples=4)
    assert not any("tempered" in note for note in posterior.info["notes"])


def test_a_guide_program_is_a_guide():
    def guide(x, y):
        lm_sample("z", x, max_tokens=3, stop=".", temperature=2.0)

    posterior = infer(guide=guide, num_samples=256)
    exact = CASE.enumerate().log_evidence
    assert posterior.log_evidence == pytest.approx(exact, abs=0.5)


def estimates(method, guide, case=CASE, num_samples=16, runs=20, **options):
    """Z-hat / Z of several runs."""
    exact = case.enumerate().log_evidence
    return torch.tensor(
        [
            math.exp(
                infer(
                    case, method=method, guide=guide, num_samples=num_samples, seed=seed, **options
                ).log_evidence
                - exact
            )
            for seed in range(runs)
        ]
    )


@pytest.mark.parametrize("method", ["importance", "smc", "gflownet"])
def test_a_trained_guide_is_a_good_proposal(method):
    """Less variance than the prior, for the same evidence."""
    guided = estimates(method, trained())
    prior = estimates("importance" if method == "gflownet" else method, None)
    assert float(guided.var()) < 0.2 * float(prior.var())
    error = float(guided.mean() - 1) / float(guided.std() / len(guided) ** 0.5)
    assert abs(error) < 4


@pytest.mark.long
def test_a_guide_over_two_sites_in_smc():
    """What the first barrier undoes of it without a twist, it keeps under its flow."""
    case = CASES["chain"]
    guide = trained("chain", 60)
    guided, prior = (estimates("smc", each, case, runs=12) for each in (guide, None))
    assert float(guided.var()) < 0.5 * float(prior.var())
    error = float(guided.mean() - 1) / float(guided.std() / len(guided) ** 0.5)
    assert abs(error) < 4
    plain, flow, importance = (
        float(estimates(method, guide, case, num_samples=40, runs=40, **how).std())
        for method, how in (("smc", {}), ("smc", {"twist": "flow"}), ("importance", {}))
    )
    assert flow < 0.25 * plain  # docs/engines.md has these figures
    assert flow < 1.5 * importance


def test_one_guide_on_another_input():
    """Trained on one, asked on another: the weights put it right."""
    posterior = lmppl.infer(
        CASE.program, "ab.", "b", lm=CASE.lm, method="gflownet", guide=trained(), seed=0,
        num_samples=400,
    )  # fmt: skip
    exact = lmppl.infer(CASE.program, "ab.", "b", lm=CASE.lm, method="exact")
    assert posterior.log_evidence == pytest.approx(exact.log_evidence, abs=0.3)
    assert posterior.best("z") == exact.best("z")
