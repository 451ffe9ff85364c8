"""Every engine on every program: what it estimates against the exact posterior."""

import math

import pytest
from choices import every_way
from estimates import check_unbiased, check_z_test, joint_of, weighted_values
from proposals import GUIDES

import lmppl
from lmppl.testing import iid_tv_floor, total_variation
from lmppl.testing.programs import CASES

ALL = pytest.mark.parametrize("case", CASES.values(), ids=str)
GUIDED = pytest.mark.parametrize("guided", [False, True], ids=["prior", "guide"])

pytestmark = pytest.mark.usefixtures("remembered")


def taste(text):
    """A twist that has little to do with the posterior: it must not change an expectation."""
    return 0.7 * text.count("b") - 0.5 * text.count("a")


def tv_and_floor(case, seeds, **options):
    """Total variation of the joint posterior of the discrete latents, and its i.i.d. floor at the
    effective sample size: both are means over runs, since one run's may be twice its mean."""
    joint = joint_of(case.enumerate())
    evidence = math.fsum(joint.values())
    exact = {values: each / evidence for values, each in joint.items()}
    distances, floors = [], []
    for seed in seeds:
        posterior = lmppl.infer(case.program, *case.args, lm=case.lm, seed=seed, **options)
        found = weighted_values(posterior)
        total = math.fsum(found.values())
        normalised = {values: each / total for values, each in found.items()}
        distances.append(total_variation(normalised, exact))
        floors.append(iid_tv_floor(exact, posterior.ess))
    return math.fsum(distances) / len(distances), math.fsum(floors) / len(floors)


@ALL
def test_importance_is_at_the_iid_floor(case):
    """Of one draw the expectation is enumerated instead (``test_importance.py``)."""
    distance, floor = tv_and_floor(case, range(4), method="importance", num_samples=120)
    assert distance < 1.3 * floor


@pytest.mark.long
@ALL
@GUIDED
def test_importance_is_at_the_iid_floor_with_many_samples(case, guided):
    guide = GUIDES[case.name] if guided else None
    distance, floor = tv_and_floor(
        case, range(10, 14), method="importance", guide=guide, num_samples=1000
    )
    print(f"{case.name}, {'guide' if guided else 'prior'}: TV {distance:.3f}, floor {floor:.3f}")
    assert distance < 1.3 * floor


# A covering set: every program, every twist, guides, every resampling scheme, thresholds.
_COVER = [
    ("one site", "lookahead", False, "systematic", 1.0),
    ("chain", None, False, "multinomial", 0.9),
    ("branch", taste, False, "stratified", 1.0),
    ("observed text", None, True, "residual", 1.0),
    ("factor", "lookahead", True, "multinomial", 0.7),
    ("beta and text", "lookahead", False, "residual", 0.9),
    ("beta mixture", taste, True, "systematic", 0.9),
    ("hard constraint", taste, False, "stratified", 0.5),
    ("choices", "lookahead", False, "residual", 1.0),
    ("scale", "lookahead", False, "multinomial", 1.0),
    ("tool", taste, True, "systematic", 0.5),
]


@pytest.mark.parametrize("name, twist, guided, resampling, threshold", _COVER)
def test_smc_is_unbiased(name, twist, guided, resampling, threshold):
    check_z_test(
        CASES[name],
        50,
        method="smc",
        num_samples=8,
        guide=GUIDES[name] if guided else None,
        twist=twist,
        resampling=resampling,
        ess_threshold=threshold,
    )


@pytest.mark.long
@ALL
@GUIDED
@pytest.mark.parametrize("twist", [None, taste], ids=["none", "callable"])
def test_smc_is_unbiased_everywhere(case, guided, twist):
    schemes = ["systematic", "multinomial", "stratified", "residual"]
    check_z_test(
        case,
        60,
        method="smc",
        num_samples=16,
        guide=GUIDES[case.name] if guided else None,
        twist=twist,
        resampling=schemes[len(case.name) % 4],
        ess_threshold=0.9,
    )


_LOOKAHEADS = [(name, guided) for name in ("one site", "scale", "tool") for guided in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, guided",
    [
        pytest.param(*each, marks=[] if each == ("tool", False) else pytest.mark.long)
        for each in _LOOKAHEADS
    ],
)
def test_smc_with_lookahead_is_unbiased_by_enumeration(monkeypatch, name, guided):
    """Where closing a text early is very unlikely, the lookahead all but rules out what would end
    well, so that its estimates have a tail that no number of runs shows: enumerate instead."""
    case = CASES[name]
    check_unbiased(
        every_way(monkeypatch),
        case.program,
        case.args,
        case.lm,
        method="smc",
        guide=GUIDES[name] if guided else None,
        twist="lookahead",
        num_samples=2,
        ess_threshold=1.0,
    )
