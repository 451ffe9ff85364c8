"""Guides as proposals for constrained programs, against brute force; trained ones against it, too."""

import pytest
from choices import every_way
from constrained import CASES, SMALL
from estimates import check_unbiased, check_z_test
from guide_helpers import shaken

import lmppl
from lmppl import lm_sample
from lmppl.testing import guide_report

pytestmark = pytest.mark.filterwarnings("ignore:.* is asked about every token")

FLOW = {"method": "smc", "twist": "flow", "num_samples": 2, "ess_threshold": 1.0}
IMPORTANCE = {"method": "importance", "num_samples": 1}


class Known:
    """An automatic guide, far from the prior, that has read its input: whose draws are the only ones."""

    def __init__(self, case):
        self._guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
        (self._seen,) = self._guide.observations_of([(case.program, case.args)])

    def proposer_factory(self, args):
        return self._guide.proposer_factory(args, observations=self._seen)


def check_by_enumeration(monkeypatch, case, guide, **options):
    ways, languages = every_way(monkeypatch), case.languages()
    options |= {"guide": guide, "languages": languages}
    check_unbiased(ways, case.program, case.args, case.lm, **options)


SOME = [name for name in CASES if name.split(",")[0] in ("alternatives", "nested", "predicate")]


@pytest.mark.parametrize("name", SOME)
def test_importance_with_a_guide_is_unbiased_by_enumeration(remembered, monkeypatch, name):
    check_by_enumeration(monkeypatch, CASES[name], Known(CASES[name]), **IMPORTANCE)


@pytest.mark.parametrize("case", SMALL.values(), ids=str)
def test_smc_with_a_guide_and_its_flow_is_unbiased_by_enumeration(remembered, monkeypatch, case):
    check_by_enumeration(monkeypatch, case, Known(case), **FLOW)


@pytest.mark.parametrize("constrain", ["global", "local"])
def test_importance_with_a_guide_program_is_unbiased(remembered, monkeypatch, constrain):
    """Its constraint masks it, whatever the program's makes of the density."""
    case = CASES[f"alternatives, {constrain}"]
    q = case.lm.adapter()

    def guide(x, y, constrain):
        regex = "bb+a|a|ab|b(ab)*"
        lm_sample("z", [y, x], max_tokens=3, regex=regex, temperature=1.5, lm=q)

    check_by_enumeration(monkeypatch, case, guide, **IMPORTANCE)


# --- trained -------------------------------------------------------------------------------------

TRAINED = [
    name
    for name in CASES
    if name.split(",")[0] in ("alternatives", "json", "balanced", "predicate", "second of three")
]


# One of each law, and the shortest; the others take some 10 seconds each.
SOON = {"alternatives, global", "json, local"}


# Over two seeds, 150 steps end at a TV of .008 and a gap of .003 at most.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOON else pytest.mark.long) for name in TRAINED]
)
def test_a_guide_trained_on_a_constrained_program_is_its_posterior(name):
    case = CASES[name]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    before = guide_report(guide, case.program, case.args, case.lm, exact=case.enumerate())
    guide.fit([case.args], steps=150, seed=0)
    report = guide_report(guide, case.program, case.args, case.lm, exact=case.enumerate())
    print(
        f"{name}: TV {before.tv:.3f} to {report.tv:.4f}, log Z - E_q[u] {report.gap:.4f}, "
        f"dead mass {before.dead_mass:.4f} to {report.dead_mass:.5f}"
    )
    assert report.tv < 0.02 and -1e-4 <= report.gap < 0.01
    options = {"lm": case.lm, "guide": guide, "num_samples": 64, "seed": 0, "progress": False}
    posterior = lmppl.infer(case.program, *case.args, method="gflownet", **options)
    log_z = case.enumerate().log_evidence
    assert posterior.log_evidence == pytest.approx(log_z, abs=0.02)
    assert posterior.info["elbo"] == pytest.approx(log_z, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED[:4])
def test_smc_with_a_guide_and_its_flow_is_unbiased(remembered, name):
    case = CASES[name]
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
    check_z_test(case, 50, method="smc", num_samples=16, guide=guide, twist="flow")
