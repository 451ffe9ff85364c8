"""Constrained programs in the engines, against brute force that knows nothing of masks."""

import math

import pytest
from choices import every_way
from constrained import CASES, SMALL
from estimates import check_unbiased, check_z_test, joint_of, weighted_values

import lmppl
from lmppl.constraints import Constraint

# A predicate says that it is slow where it is asked about every token.
pytestmark = pytest.mark.filterwarnings("ignore:.* is asked about every token")

ALL = pytest.mark.parametrize("case", [*CASES.values(), *SMALL.values()], ids=str)
EACH_SMALL = pytest.mark.parametrize("case", SMALL.values(), ids=str)


@ALL
def test_exact_equals_the_oracle(case):
    oracle = case.enumerate()
    posterior = lmppl.infer(case.program, *case.args, lm=case.lm, method="exact", progress=False)
    assert posterior.log_evidence == pytest.approx(oracle.log_evidence, abs=1e-5)
    found, expected = weighted_values(posterior), joint_of(oracle)
    assert found.keys() == expected.keys()
    for values, joint in expected.items():
        assert math.log(found[values]) == pytest.approx(math.log(joint), abs=1e-5, rel=1e-6)


@ALL
def test_importance_is_unbiased_by_enumeration(remembered, monkeypatch, case):
    check_by_enumeration(monkeypatch, case, method="importance", num_samples=1)


@pytest.mark.parametrize("case", SMALL.values(), ids=str)
def test_smc_is_unbiased_by_enumeration(remembered, monkeypatch, case):
    check_by_enumeration(monkeypatch, case, method="smc", num_samples=2, ess_threshold=1.0)


def check_by_enumeration(monkeypatch, case, **options):
    # By masks: there are too many ways to draw by rejection (see ``test_constraints``).
    monkeypatch.setattr(Constraint, "is_lazy", False)
    ways, languages = every_way(monkeypatch), case.languages()
    check_unbiased(ways, case.program, case.args, case.lm, languages=languages, **options)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_smc_is_unbiased(remembered, case):
    check_z_test(case, 50, method="smc", num_samples=16)
