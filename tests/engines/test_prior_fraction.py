"""A share of the program's own draws among a guide's: unbiased, and no weight above likelihood / eps."""

import math
from contextlib import nullcontext

import pyro
import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased
from proposals import PerfectGuide
from test_flow_twist import shaken

import lmppl
from lmppl import lm_sample
from lmppl.engines.base import State
from lmppl.guides.scoring import score_latents
from lmppl.testing import enumerate_program, tiny_lm

pytestmark = pytest.mark.usefixtures("remembered")
IMPORTANCE = {"method": "importance"}
SMC = {"method": "smc", "ess_threshold": 1.0}
LM = small.small_lm()


def forgets(x, y):
    """A guide of ``three_sites`` that never draws one choice, hardly ever one token, and lacks a
    site."""
    k = lm_sample("k", x, choices=["a"])
    lm_sample("z", [x, k], max_tokens=1, temperature=0.3)


def forgets_z(x, y):
    """A guide of ``two_sites`` with the order of the program."""
    z = lm_sample("z", x, max_tokens=1, temperature=0.3)
    lm_sample("w", [x, z, "b"], max_tokens=1, temperature=0.5)


def only_w(x, y):
    """It draws the second text when it is asked for the first, which it lacks."""
    lm_sample("w", [x, "b"], max_tokens=2, stop="b", temperature=3.0)


def coin_guide(x, y):
    """The coin is tossed as soon as the text is drawn, whoever draws the text."""
    z = lm_sample("z", x, max_tokens=2, stop="b", temperature=0.4)
    pyro.sample("k", small.Coin(0.05 if "a" in z else 0.9))


def chain(x, y):
    z = lm_sample("z", x, choices=["a", "b"], temperature=2.0)
    w = lm_sample("w", [x, z], max_tokens=2, stop="b", temperature=2.0)
    lm_sample("y", [x, w, z], obs=y)


def two_choices(x, y):
    k = lm_sample("k", x, choices=["a", "b"], temperature=3.0)
    pyro.factor("taste", torch.tensor(1.5 if k == "b" else 0.0))
    v = lm_sample("v", [k, x], choices=["a", "b"], temperature=2.0)
    lm_sample("y", [x, v], obs=y)


def forgets_b(x, y):
    k = lm_sample("k", x, choices=["a"])
    lm_sample("v", [k, x], choices=["a", "b"], temperature=0.5)


def choices_half(x, y):
    lm_sample("v", x, choices=["b", "a"], temperature=0.5)


# --- E[Z-hat * weighted indicator of z] = R(z) ---------------------------------------------------


@pytest.mark.parametrize(
    "program, guide",
    [
        (small.two_sites, forgets_z),
        (small.three_sites, forgets),
        (small.early_end, small.two_sites_half),
        (small.constraint, forgets_z),
        (small.scaled, small.two_sites_half),
        (small.coin, coin_guide),
        (chain, only_w),
    ],
)
def test_unbiased_by_enumeration(monkeypatch, program, guide):
    check(monkeypatch, program, guide, num_samples=1, **IMPORTANCE)


@pytest.mark.parametrize("guide", [forgets_b, pytest.param(choices_half, marks=pytest.mark.slow)])
def test_unbiased_by_enumeration_in_smc(monkeypatch, guide):
    check(monkeypatch, two_choices, guide, **SMC)


def check(monkeypatch, program, guide, num_samples=2, **options):
    check_unbiased(
        every_way(monkeypatch),
        program,
        small.ARGS,
        LM,
        guide=guide,
        num_samples=num_samples,
        prior_fraction=0.3,
        **options,
    )


def test_unbiased_by_enumeration_with_an_automatic_guide(monkeypatch):
    check(monkeypatch, two_choices, shaken(two_choices, LM), num_samples=1, **IMPORTANCE)


@pytest.mark.long
def test_unbiased_by_enumeration_in_smc_with_an_automatic_guide(monkeypatch):
    def program(x, y):
        k = lm_sample("k", x, choices=["a", "b"], temperature=3.0)
        pyro.factor("taste", torch.tensor(1.5 if k == "b" else 0.0))
        v = lm_sample("v", [k, x], choices=["a"])
        lm_sample("y", [x, k, v], obs=y)

    check(monkeypatch, program, shaken(program, LM), **SMC)


@pytest.mark.parametrize("twist", ["flow", lambda text: 2.0 * text.count("a") - 1.0])
def test_unbiased_by_enumeration_with_a_twist(monkeypatch, twist):
    """Slots of both kinds are compared within a text, and copies go on with their ancestor's."""
    check(monkeypatch, small.longer, small.longer_guide, twist=twist, **SMC)


@pytest.mark.slow
def test_unbiased_by_enumeration_where_a_guide_runs_ahead(monkeypatch):
    """The guide's last text is twisted while the program is at its first."""

    def program(x):
        z = lm_sample("z", x, choices=["a"])
        w = lm_sample("w", [x, z], max_tokens=2, temperature=2.0)
        pyro.factor("taste", torch.tensor(1.0 * len(w)))

    def guide(x):
        lm_sample("w", [x, "aa"], max_tokens=2, temperature=5.0)

    check_unbiased(
        every_way(monkeypatch), program, ("a",), tiny_lm("a", seed=2), guide=guide, num_samples=2,
        prior_fraction=0.3, twist={"w": lambda text: 2.0 * len(text)}, **SMC,
    )  # fmt: skip


# --- the density of the mixture ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["importance", "gflownet"])
@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_a_weight_is_of_the_mixture_of_whole_traces(method, eps):
    """And so at most likelihood / eps."""
    for program, guide in ((small.two_sites, forgets_z), (small.three_sites, forgets)):
        warning = pytest.warns(UserWarning, match="proposed nothing")
        with warning if eps == 1.0 else nullcontext():
            posterior = lmppl.infer(
                program, *small.ARGS, lm=LM, method=method, guide=guide, num_samples=40, seed=0,
                prior_fraction=eps,
            )  # fmt: skip
        latents = [
            {n: trace.nodes[n]["value"] for n in posterior.latents} for trace in posterior.traces
        ]
        with lmppl.use(LM):
            scores = score_latents(guide, program, small.ARGS, latents)
        log_likelihood = scores.log_joint - scores.log_prior
        mixture = torch.logaddexp(
            scores.log_q + math.log1p(-eps) if eps < 1 else torch.tensor(-math.inf).double(),
            scores.log_prior + math.log(eps),
        )
        expected = scores.log_joint - mixture
        assert posterior.log_weights.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert bool((posterior.log_weights <= log_likelihood - math.log(eps) + 1e-4).all())
        if eps < 1.0:  # both have drawn
            assert bool((scores.log_q > scores.log_prior).any())
            assert bool((scores.log_q < scores.log_prior).any())


def test_without_a_fraction_nothing_changes():
    for engine in (IMPORTANCE, SMC):
        runs = [
            lmppl.infer(
                small.two_sites, *small.ARGS, lm=LM, guide=forgets_z, num_samples=8, seed=0,
                **engine, **options,
            )
            for options in ({}, {"prior_fraction": 0.0})
        ]  # fmt: skip
        assert torch.equal(runs[0].log_weights, runs[1].log_weights)


@pytest.mark.parametrize("engine", [IMPORTANCE, SMC], ids=["importance", "smc"])
def test_a_forgotten_mode_is_found(engine):
    """The guide draws only the choice of little evidence."""

    def program(x, y):
        k = lm_sample("k", x, choices=["a", "b"], temperature=3.0)
        pyro.factor("taste", torch.tensor(4.0 if k == "b" else 0.0))
        lm_sample("z", [x, k], max_tokens=1)

    def guide(x, y):
        lm_sample("k", x, choices=["a"])

    evidence = enumerate_program(program, *small.ARGS, lm=LM).log_evidence

    def ratios(eps):
        runs = [
            lmppl.infer(
                program, *small.ARGS, lm=LM, guide=guide, num_samples=40, seed=seed,
                prior_fraction=eps, **engine,
            )
            for seed in range(20)
        ]  # fmt: skip
        return torch.tensor([math.exp(run.log_evidence - evidence) for run in runs])

    assert float(ratios(0.0).max()) < 0.1
    found = ratios(0.3)
    assert float(found.min()) > 0.2 and float(found.mean()) == pytest.approx(1.0, abs=0.2)


def test_copies_choose_for_themselves_unless_their_text_is_under_way():
    for is_drawing in (False, True):
        with lmppl.use(LM):
            state = State("test", small.longer, small.ARGS, 32, small.longer_guide, 0)
            state.start(prior_fraction=0.5)
            with lmppl.runtime.ending(state.particles):
                state.select([0] * 32, is_drawing=is_drawing)
                temperatures = {particle.waiting.fn.temperature for particle in state.particles}
        assert len(temperatures) == (1 if is_drawing else 2)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [IMPORTANCE, SMC], ids=["importance", "smc"])
def test_a_guide_must_draw_in_the_programs_order(engine):
    with pytest.raises(ValueError, match="draws site 'w' before 'z', the program after it"):
        lmppl.infer(
            small.two_sites, *small.ARGS, lm=LM, guide=small.two_sites_backwards, seed=0,
            prior_fraction=0.2, **engine,
        )  # fmt: skip


def test_a_guide_must_score_what_it_has_not_drawn():
    guide = PerfectGuide(enumerate_program(small.two_sites, *small.ARGS, lm=LM))
    with pytest.raises(TypeError, match=r"_Perfect has no condition\(site, trace, value\)"):
        lmppl.infer(small.two_sites, *small.ARGS, lm=LM, guide=guide, prior_fraction=0.2)


def test_a_guide_that_proposes_nothing_is_said():
    with pytest.warns(UserWarning, match="the guide <lambda> proposed nothing"):
        lmppl.infer(
            small.two_sites, *small.ARGS, lm=LM, guide=lambda x, y: None, prior_fraction=0.2, seed=0
        )


@pytest.mark.parametrize("engine", [lmppl.Importance, lmppl.SMC, lmppl.GFlowNet])
def test_it_is_a_share(engine):
    with pytest.raises(ValueError, match="prior_fraction=1.5.*at most 1"):
        engine(prior_fraction=1.5)


def test_raw_draws_are_the_guides_alone():
    with pytest.raises(ValueError, match="prior_fraction.*leave out one"):
        lmppl.GFlowNet(correct=False, prior_fraction=0.1)
