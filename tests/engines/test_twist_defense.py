"""Defensive resampling: a twist that misleads costs a share of the particles, and not the posterior."""

import math

import pyro
import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased
from test_flow_twist import shaken

import lmppl
from lmppl import SMC, lm_sample
from lmppl.engines.resampling import SCHEMES
from lmppl.engines.twists import log_weights_of_copies, shares
from lmppl.guides.scoring import score_latents
from lmppl.testing import enumerate_program, tiny_lm

pytestmark = pytest.mark.usefixtures("remembered")
LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)
REWARDS = {"stop": -20.0, "eos": 0.0, "length": 4.0}


def misleading(x):
    """A text that is under way is judged as if it ended by its stop."""
    z = lm_sample("z", x, max_tokens=2, stop=".")
    pyro.factor("end", torch.tensor(REWARDS[z.finish_reason]))


def against(text):
    """A twist that prefers what the program hardly draws."""
    return 12.0 * text.count("a") - 8.0 * text.count("b")


# --- the estimate, of a program and a twist that misleads ----------------------------------------


def relative_rms(num_samples, seeds=200, **options):
    """RMS of Z-hat / Z - 1."""
    evidence = enumerate_program(misleading, "ab", lm=LM).log_evidence
    errors = []
    for seed in range(seeds):
        posterior = lmppl.infer(
            misleading, "ab", lm=LM, method="smc", num_samples=num_samples, seed=seed, **options
        )
        errors.append(math.exp(posterior.log_evidence - evidence) - 1.0)
    return math.sqrt(math.fsum(error**2 for error in errors) / seeds)


def expected_rms(num_samples, guide):
    """The same of independent draws, exactly: sum over z of R(z)^2 / q(z), by enumeration."""
    exact = enumerate_program(misleading, "ab", lm=LM)
    with lmppl.use(LM):
        latents = [{"z": trace.data["z"]} for trace in exact]
        scores = score_latents(guide, misleading, ("ab",), latents)
    log_square = torch.logsumexp(2.0 * scores.log_joint - scores.log_q, 0)
    return math.sqrt(math.expm1(float(log_square) - 2.0 * exact.log_evidence) / num_samples)


@pytest.mark.slow
@pytest.mark.parametrize("twist", ["lookahead", against, "flow"])
def test_a_misleading_twist_costs_no_more_than_the_undefended_share(twist):
    """At most 1.5 times the error of eps N particles without a twist."""
    num, guide = 30, shaken(misleading, LM) if twist == "flow" else None
    defended = SMC()._defense(num) * num
    found = relative_rms(num, twist=twist, guide=guide)
    assert found < 1.5 * expected_rms(defended, guide)


def test_undefended_it_has_nothing_of_the_evidence():
    """So that the test above can fail."""
    found = relative_rms(30, seeds=20, twist="lookahead", twist_defense=0.0)
    assert found > 0.9


# --- E[Z-hat * weighted indicator of z] = R(z) ---------------------------------------------------


@pytest.mark.parametrize("resampling", sorted(SCHEMES))
@pytest.mark.parametrize("defense", [0.1, 0.9])
def test_unbiased_by_enumeration(monkeypatch, resampling, defense):
    check_unbiased(
        every_way(monkeypatch),
        small.longer,
        small.ARGS,
        small.small_lm(),
        method="smc",
        guide=small.longer_guide,
        twist=lambda text: 3.0 * text.count("a") - 2.0 * text.count("b"),
        twist_defense=defense,
        num_samples=2,
        ess_threshold=1.0,
        resampling=resampling,
    )


@pytest.mark.parametrize("resampling", sorted(SCHEMES))
def test_unbiased_by_enumeration_with_a_misleading_lookahead(monkeypatch, resampling):
    def program(x, y):
        z = lm_sample("z", x, max_tokens=2, stop="b", temperature=2.0)
        pyro.factor("end", torch.tensor({"stop": -5.0, "eos": 0.0, "length": 1.0}[z.finish_reason]))

    check_unbiased(
        every_way(monkeypatch),
        program,
        small.ARGS,
        small.small_lm(),
        method="smc",
        twist="lookahead",
        twist_defense=0.3,
        num_samples=2,
        ess_threshold=1.0,
        resampling=resampling,
    )


# --- shares --------------------------------------------------------------------------------------


def nats(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_no_copy_weighs_more_than_the_mean_over_eps():
    log_weights, log_psi = nats(0.3, -1.0, 2.0, 0.0), nats(-40.0, 3.0, -700.0, 900.0)
    for eps in (0.05, 0.2, 1.0):
        a = shares(log_weights, log_psi, eps)
        copies = log_weights_of_copies(log_weights, a, torch.arange(4))
        assert float(a.sum()) == pytest.approx(1.0)
        mean = float(log_weights.exp().mean())
        assert float(copies.exp().max()) <= mean / eps * (1 + 1e-12)


def test_without_defence_all_copies_weigh_the_mean_of_w_psi_over_psi():
    log_weights, log_psi = nats(0.3, -1.0, 2.0), nats(-4.0, 3.0, 1.0)
    copies = log_weights_of_copies(log_weights, shares(log_weights, log_psi, 0.0), torch.arange(3))
    expected = (log_weights + log_psi).logsumexp(0) - math.log(3) - log_psi
    assert copies.tolist() == pytest.approx(expected.tolist())


def test_the_lost_stay_out_of_both_terms():
    a = shares(nats(0.0, 5.0, 0.0), nats(1.0, -math.inf, 1.0), 0.4)
    assert a.tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_if_all_are_lost_the_weights_decide():
    a = shares(nats(0.0, math.log(3.0)), nats(-math.inf, -math.inf), 0.4)
    assert a.tolist() == pytest.approx([0.25, 0.75])


def test_by_default_a_fifth_is_defended_and_several_slots():
    found = [SMC()._defense(num) for num in (1, 2, 8, 16, 20, 64, 1000)]
    assert found == [0.5, 0.5, 0.5, 0.25, 0.2, 0.2, 0.2]
    assert SMC(twist_defense=0.0)._defense(8) == 0.0


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_it_is_a_share(value):
    with pytest.raises(ValueError, match="twist_defense=.*at least 0 and at most 1"):
        SMC(twist_defense=value)
