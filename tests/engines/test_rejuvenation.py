"""Markov moves within SMC: estimates stay unbiased, and copies come apart."""

import math
from collections import Counter

import pyro
import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased, check_z_test

import lmppl
from lmppl import lm_sample
from lmppl.engines import moves
from lmppl.testing import trace_values
from lmppl.testing.programs import CASES

pytestmark = pytest.mark.usefixtures("remembered")

SMC = {"method": "smc", "ess_threshold": 1.0, "resampling": "multinomial", "rejuvenate": 1}


def picked(x, y):
    """Two whole strings, the first of which the program likes or not before it draws the second."""
    k = lm_sample("k", x, choices=["a", "b"], temperature=3.0)
    pyro.factor("taste", torch.tensor(1.5 if "a" in k else 0.0))
    z = lm_sample("z", [x, k], choices=["a", "b"], temperature=2.0)
    lm_sample("y", [x, k, z], obs=y)


def picked_guide(x, y):
    lm_sample("k", [x, "b"], choices=["a", "b"], temperature=2.0)


def early_end(x, y):
    """Some runs end at the first barrier."""
    k = lm_sample("k", x, choices=["aa", "b", "ab"], temperature=3.0)
    lm_sample("y", [x, k], obs=y)
    if "b" in k:
        z = lm_sample("z", [x, k], choices=["a", "b"])
        lm_sample("v", [x, z], obs=y)


def check(monkeypatch, program, **options):
    ways = every_way(monkeypatch)
    options = SMC | {"num_samples": 2} | options
    return check_unbiased(ways, program, small.ARGS, small.small_lm(), **options)


@pytest.mark.parametrize(
    "program, options",
    [
        (picked, {}),
        pytest.param(early_end, {}, marks=pytest.mark.slow),
        pytest.param(picked, {"guide": picked_guide}, marks=pytest.mark.slow),
    ],
)
def test_estimates_are_unbiased(monkeypatch, program, options):
    """Over all choices of the sampler, its moves among them."""
    assert check(monkeypatch, program, **options) > 200


def accept_all(patch):
    patch.setattr(moves, "_log_ratio", lambda *args: 0.0)


def test_moves_that_are_not_invariant_are_found(monkeypatch):
    accept_all(monkeypatch)
    with pytest.raises(AssertionError, match=" not "):
        check(monkeypatch, picked)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "beta mixture", "hard constraint"])
def test_many_estimates_average_to_the_exact_ones(name):
    options = {"num_samples": 8, "method": "smc", "ess_threshold": 1.0, "rejuvenate": 2}
    check_z_test(CASES[name], 150, **options)


def error(seed, rejuvenate):
    """How far 12 particles' first texts are from the posterior's (total variation)."""
    case = CASES["observed text"]
    posterior = lmppl.infer(
        case.program, *case.args, lm=case.lm, method="smc", num_samples=12, ess_threshold=1.0,
        rejuvenate=rejuvenate, seed=seed, progress=False,
    )  # fmt: skip
    found, exact = Counter(), case.enumerate().posterior("z")
    for trace, weight in posterior:
        found[trace_values(trace)["z"]] += weight
    return sum(abs(found[z] - exact.get(z, 0.0)) for z in {*found, *exact}) / 2


def test_moves_make_particles_that_are_copies_differ():
    plain, moved = ([error(seed, k) for seed in range(12)] for k in (0, 6))
    assert math.fsum(moved) < 0.75 * math.fsum(plain)


def test_the_acceptance_is_told_and_seeds_reproduce():
    case = CASES["observed text"]
    options = {"method": "smc", "num_samples": 16, "ess_threshold": 1.0, "rejuvenate": 2}
    one, two = (
        lmppl.infer(case.program, *case.args, lm=case.lm, seed=1, **options) for _ in range(2)
    )
    assert [str(z) for z in one["z"]] == [str(z) for z in two["z"]]
    assert one.log_evidence == two.log_evidence
    assert len(one.info["rejuvenation"]) == one.info["resamplings"] == 1
    assert 0 < one.info["rejuvenation"][0] <= 1


def test_an_automatic_guide_goes_on_after_a_move():
    case = CASES["observed text"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    options = {"method": "smc", "num_samples": 16, "ess_threshold": 1.0, "rejuvenate": 3}
    posterior = lmppl.infer(case.program, *case.args, lm=case.lm, guide=guide, seed=0, **options)
    assert posterior.info["rejuvenation"][0] > 0


def test_what_is_refused():
    with pytest.raises(ValueError, match="rejuvenate= with prior_fraction="):
        lmppl.SMC(rejuvenate=2, prior_fraction=0.1)
    with pytest.raises(ValueError, match="rejuvenate"):
        lmppl.SMC(rejuvenate=-1)
    with pytest.raises(ValueError, match="draws site 'z' before 'k'"):
        lmppl.infer(
            small.three_sites, *small.ARGS, lm=small.small_lm(), method="smc", rejuvenate=1,
            ess_threshold=1.0, guide=small.three_sites_backwards, seed=0,
        )  # fmt: skip
