"""Importance sampling: unbiased by enumeration of its choices, and as good as it can be."""

import math

import pyro
import pyro.distributions as dist
import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased, check_z_test
from proposals import GUIDES, PerfectGuide

import lmppl
from lmppl import lm_sample, require
from lmppl.testing.programs import CASES

FINITE = [case for case in CASES.values() if case.quadrature is None]


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize(
    "program, guide",
    [
        (small.two_sites, None),
        (small.two_sites, small.two_sites_backwards),
        (small.two_sites, small.two_sites_half),
        (small.early_end, None),
        (small.constraint, None),
        (small.scaled, None),
        (small.scaled, small.two_sites_backwards),
        (small.three_sites, small.three_sites_backwards),
        (small.ended, None),
        (small.chosen, None),
        (small.with_tool, None),
        (small.coin, None),
        (small.long, small.long_guide),
    ],
)
def test_unbiased_by_enumeration(remembered, monkeypatch, program, guide, num_samples):
    """E[Z-hat * weighted indicator of z] = R(z), summed over all that the sampler can draw."""
    check_unbiased(
        every_way(monkeypatch),
        program,
        small.ARGS,
        small.small_lm(),
        method="importance",
        guide=guide,
        num_samples=num_samples,
    )


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True], ids=["prior", "guide"])
@pytest.mark.parametrize("case", FINITE, ids=str)
def test_one_draw_is_unbiased_on_every_program(remembered, monkeypatch, case, guided):
    check_unbiased(
        every_way(monkeypatch),
        case.program,
        case.args,
        case.lm,
        method="importance",
        guide=GUIDES[case.name] if guided else None,
        num_samples=1,
    )


@pytest.mark.parametrize("case", FINITE, ids=str)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_perfect_guide_gives_the_evidence_exactly(case, num_samples):
    posterior = lmppl.infer(
        case.program,
        *case.args,
        lm=case.lm,
        method="importance",
        guide=PerfectGuide(case.enumerate()),
        num_samples=num_samples,
        seed=3,
    )
    expected = torch.full((num_samples,), case.enumerate().log_evidence, dtype=torch.float64)
    torch.testing.assert_close(posterior.log_weights, expected, rtol=0, atol=1e-4)


def biased_coin(x):
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.factor("taste", torch.tensor(2.0 * float(k)))
    lm_sample("z", ["a", "b"][int(k)], max_tokens=2)


def biased_coin_posterior(x):
    """What ``biased_coin`` is, given its factor; ``z`` is left to the model."""
    pyro.sample("k", dist.Bernoulli(0.3 * math.exp(2.0) / (0.7 + 0.3 * math.exp(2.0))))


@pytest.mark.parametrize("method", ["importance", "smc"])
@pytest.mark.parametrize("num_samples", [1, 5])
def test_a_guide_program_that_is_the_posterior(method, num_samples):
    posterior = lmppl.infer(
        biased_coin,
        "a",
        lm=CASES["chain"].lm,
        method=method,
        guide=biased_coin_posterior,
        num_samples=num_samples,
        seed=0,
    )
    expected = math.log(0.7 + 0.3 * math.exp(2.0))
    assert posterior.log_weights.tolist() == pytest.approx([expected] * num_samples, abs=1e-5)


@pytest.mark.parametrize("guided", [False, True], ids=["prior", "guide"])
def test_log_weights_average_to_the_evidence(guided):
    case = CASES["hard constraint"]
    posterior = lmppl.infer(
        case.program,
        *case.args,
        lm=case.lm,
        method="importance",
        guide=GUIDES[case.name] if guided else None,
        num_samples=50,
        seed=1,
    )
    mean = torch.logsumexp(posterior.log_weights, 0) - math.log(50)
    assert posterior.log_evidence == pytest.approx(float(mean), abs=1e-12)
    assert sum(posterior.killed.values()) == int((posterior.log_weights == -math.inf).sum()) > 0


def test_all_particles_dead():
    def program():
        z = lm_sample("z", "a", max_tokens=2)
        require("short", len(z) < 2)
        require("long", len(z) >= 2)

    with pytest.raises(lmppl.ZeroEvidenceError, match="'short'|'long'") as caught:
        lmppl.infer(program, lm=CASES["chain"].lm, method="importance", num_samples=20, seed=0)
    assert set(caught.value.posterior.killed) == {"short", "long"}
    assert sum(caught.value.posterior.killed.values()) == 20


def test_a_particle_that_died_runs_no_further():
    calls = []

    def program():
        z = lm_sample("z", "a", max_tokens=1)
        pyro.factor("no b", torch.tensor(-math.inf if "b" in z else 0.0))
        lm_sample("w", z + "a", max_tokens=1)
        calls.append(str(z))

    posterior = lmppl.infer(
        program, lm=CASES["chain"].lm, method="importance", num_samples=30, seed=0
    )
    assert posterior.killed["no b"] + len(calls) == 30
    assert "b" not in calls and posterior.killed["no b"] > 0


def test_no_latent_site():
    def program():
        lm_sample("y", "a", obs="b")

    with pytest.raises(ValueError, match="no latent site"):
        lmppl.infer(program, lm=CASES["chain"].lm, method="importance", num_samples=2)


def test_a_guide_site_that_the_model_lacks():
    def guide(x, y):
        lm_sample("zz", x, max_tokens=3)

    case = CASES["one site"]
    with pytest.raises(ValueError, match="the guide proposes site 'zz'"):
        lmppl.infer(
            case.program, *case.args, lm=case.lm, method="importance", guide=guide, num_samples=2
        )


def test_seed_reproduces_a_run():
    case = CASES["beta mixture"]
    runs = [
        lmppl.infer(
            case.program, *case.args, lm=case.lm, method="importance", num_samples=20, seed=seed
        )
        for seed in (5, 5, 6)
    ]
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)
    assert not torch.equal(runs[0].log_weights, runs[2].log_weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beta and text", "beta mixture"])
@pytest.mark.parametrize("guided", [False, True], ids=["prior", "guide"])
def test_unbiased_with_a_continuous_latent(remembered, name, guided):
    case = CASES[name]
    guide = GUIDES[name] if guided else None
    check_z_test(case, 30, method="importance", guide=guide, num_samples=32)
