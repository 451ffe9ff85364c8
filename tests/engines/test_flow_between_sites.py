"""The flow of a guide between the sites of a program, where its particles weigh p / q so far."""

import math

import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased
from proposals import PerfectGuide

import lmppl
from lmppl import lm_sample, require
from lmppl.testing.programs import CASES

FLOW = {"method": "smc", "twist": "flow", "ess_threshold": 1.0}

SEVERAL = [
    case
    for case in CASES.values()
    if case.quadrature is None and len((*case.text_latents, *case.other_latents)) > 1
]


def three_to_the_second(x, y):
    k = lm_sample("k", x, choices=["a", "b"], temperature=5.0)
    lm_sample("z", [x, k], max_tokens=1, temperature=3.0)


def between(x, y):
    """A condition between two texts."""
    z = lm_sample("z", x, max_tokens=1, temperature=2.0)
    require("no b", "b" not in z)
    w = lm_sample("w", [x, z], max_tokens=1, temperature=2.0)
    lm_sample("y", [x, z, w], obs=y)


def two_guided(x, y):
    z = lm_sample("z", [x, "b"], max_tokens=1, temperature=3.0)
    lm_sample("w", [z, x], max_tokens=1, temperature=4.0)


def spread(values):
    return float(values.max() - values.min())


@pytest.mark.parametrize("case", SEVERAL, ids=str)
@pytest.mark.parametrize("num_samples", [1, 4, 32])
def test_a_perfect_guide_of_several_sites_gives_the_evidence_exactly(case, num_samples):
    """However unequal p / q is between the sites: nothing is resampled for it."""
    exact = case.enumerate()
    posterior = lmppl.infer(
        case.program, *case.args, lm=case.lm, guide=PerfectGuide(exact), num_samples=num_samples,
        seed=1, twist_defense=0.0, **{**FLOW, "ess_threshold": 0.99},
    )  # fmt: skip
    assert posterior.info["resamplings"] == 0
    expected = [exact.log_evidence] * num_samples
    assert posterior.log_weights.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_resampling_does_not_undo_what_the_guide_foresees():
    """Nor does the defence, which resamples a share as if nothing were foreseen."""
    case = CASES["chain"]
    exact = case.enumerate()
    deviation = {}
    for twist, defense in ((None, None), ("flow", None), ("flow", 1.0)):
        estimates = [
            lmppl.infer(
                case.program, *case.args, lm=case.lm, guide=PerfectGuide(exact), num_samples=40,
                seed=seed, method="smc", twist=twist, twist_defense=defense, ess_threshold=0.9,
            ).log_evidence
            for seed in range(12)
        ]  # fmt: skip
        z = (torch.tensor(estimates) - exact.log_evidence).exp()
        deviation[twist, defense] = float(z.std())
    assert deviation["flow", None] < 1e-3
    assert deviation[None, None] > 0.1
    assert deviation["flow", 1.0] > 0.1, "all is defence: as without a twist"


def test_where_a_latent_was_left_to_the_model_weights_are_compared():
    """What was observed after it, the guide has not foreseen."""

    def first_of_three(x, y):
        lm_sample("k", x, choices=["a", "b"], temperature=5.0)

    for guide, are_equal in ((three_to_the_second, True), (first_of_three, False)):
        posterior = lmppl.infer(
            small.three_sites, *small.ARGS, lm=small.small_lm(), guide=guide, num_samples=12, seed=3,
            twist_defense=0.0, **{**FLOW, "ess_threshold": 0.99},
        )  # fmt: skip
        steps = {step.sites: step for step in posterior.particles}
        assert spread(steps["k",].log_weights) < 1e-9
        assert (spread(steps["z",].log_weights) < 1e-9) == are_equal


def test_the_dead_are_replaced_by_those_that_the_guide_has_drawn():
    options = {"lm": small.small_lm(), "guide": two_guided, "num_samples": 40, "seed": 0}
    posterior = lmppl.infer(between, *small.ARGS, **options, **FLOW)
    step = posterior.particles[0]
    assert step.is_resampled and -math.inf in step.log_weights.tolist()
    assert bool((posterior.log_weights > -math.inf).all())
    plain = lmppl.infer(between, *small.ARGS, **options, **{**FLOW, "twist": None}).particles[0]
    assert step.log_evidence == pytest.approx(plain.log_evidence, abs=1e-9)
    assert not torch.allclose(step.log_weights, plain.log_weights)


@pytest.mark.parametrize(
    "program, guide, scheme",
    [
        (small.two_sites, two_guided, "systematic"),
        pytest.param(small.two_sites, two_guided, "multinomial", marks=pytest.mark.slow),
        pytest.param(small.three_sites, three_to_the_second, "systematic", marks=pytest.mark.slow),
        pytest.param(small.three_sites, three_to_the_second, "multinomial", marks=pytest.mark.long),
        (between, two_guided, "systematic"),
        pytest.param(between, two_guided, "multinomial", marks=pytest.mark.slow),
    ],
)
def test_unbiased_by_enumeration(remembered, monkeypatch, program, guide, scheme):
    check_unbiased(
        every_way(monkeypatch), program, small.ARGS, small.small_lm(), guide=guide, num_samples=2,
        resampling=scheme, **FLOW,
    )  # fmt: skip


def test_moved_particles_are_compared_by_weight():
    """Moves bring them to the program's own law up to the barrier, which is not the guide's."""
    for moves, are_equal in ((0, True), (1, False)):
        posterior = lmppl.infer(
            small.two_sites, *small.ARGS, lm=small.small_lm(), guide=two_guided, num_samples=12,
            seed=0, twist_defense=0.0, rejuvenate=moves, **{**FLOW, "ess_threshold": 0.0},
        )  # fmt: skip
        step = {step.sites: step for step in posterior.particles}["z",]
        assert (spread(step.log_weights) < 1e-9) == are_equal
