"""The oracle matrix of trained guides: their own distribution, enumerated, against the posterior.

All cases have the same default settings. "beta mixture" is not among them: the posterior of its
number, which is drawn before the choice that it governs, is a mixture of two Betas, and the
automatic guide's family for it is one Beta.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch

import lmppl
from lmppl import lm_sample
from lmppl.testing import guide_report, tiny_lm
from lmppl.testing.programs import CASES

pytestmark = pytest.mark.slow

_CASES = [case for name, case in CASES.items() if name != "beta mixture"]
# On the chain, the hardest, 400 steps end at a TV of .004 to .014, depending on the seed (and, with
# one seed, on how numbers are rounded); 700 end at .003 to .004.
_STEPS = 700
# These are there at half of them, with a TV of .0005 or less.
_SOON = {"one site": 350, "scale": 350, "tool": 350}
# Over three seeds the worst is .0077 on the chain, .0088 and .0091 on these (docs/training.md);
# another machine's rounding is like another seed.
_WIDER = {"beta and text": 0.015, "hard constraint": 0.015}


# One of each kind; the others, and the other losses, run with the long tests.
_EACH_KIND = {"one site", "beta and text", "choices"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case.name in _EACH_KIND else pytest.mark.long)
        for case in _CASES
    ],
    ids=str,
)
def test_a_trained_guide_is_the_posterior(case):
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    guide.fit([case.args], steps=_SOON.get(case.name, _STEPS), seed=0)
    report = guide_report(guide, case.program, case.args, case.lm)
    print(
        f"{case.name}: TV {report.tv:.4f}, log Z - E_q[u] {report.gap:.4f}, "
        f"dead mass {report.dead_mass:.5f}"
    )
    assert report.tv < _WIDER.get(case.name, 0.01)
    assert -1e-4 <= report.gap < 0.01  # it is a divergence, up to float32


# Over three seeds, 350 steps end at a TV of .001, .0002, .005 and .004 at most (of the first four).
@pytest.mark.long
@pytest.mark.parametrize(
    "loss, steps",
    [
        ("tb", 350),
        ("subtb", 350),
        ("elbo", 500),
        ("wake", 350),
        (lmppl.losses.VarGrad(forward=0.0), 350),
    ],
)
def test_the_other_losses_have_the_same_optimum(loss, steps):
    """``benchmarks.guide_oracle`` asks the same of every program, with three seeds."""
    case = CASES["one site"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    guide.fit([case.args], steps=steps, seed=0, loss=loss)
    report = guide_report(guide, case.program, case.args, case.lm)
    print(f"{loss}: TV {report.tv:.4f}, log Z - E_q[u] {report.gap:.4f}")
    assert report.tv < 0.01
    assert -1e-4 <= report.gap < 0.01


def apart(x, y):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    w = lm_sample("w", x, max_tokens=2, stop=".")
    lm_sample("y", [x, z, w], obs=y)


def number_and_text(x, want):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    z = lm_sample("z", x, max_tokens=2, stop=".")
    pyro.factor("match", torch.tensor(want if z.count("a") == int(k) else -1.0))


@pytest.mark.long
@pytest.mark.parametrize(
    "program, args", [(apart, ("ab.", "aba")), (number_and_text, ("ab.", 2.0))]
)
def test_latents_that_only_the_end_ties_together(program, args):
    """What was drawn before is no part of the text's prefix, so the model's text does not depend on
    it. (A guide that does not read it stays at 0.17 and 0.37.)"""
    lm = tiny_lm("ab.", seed=0)
    guide = lmppl.LMGuide(program, lm=lm).fit([args], steps=350, seed=0)
    report = guide_report(guide, program, args, lm)
    print(f"{program.__name__}: TV {report.tv:.4f}, log Z - E_q[u] {report.gap:.4f}")
    assert report.tv < 0.04


def infill(x, y):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("y", [x, z], obs=y)


def test_one_guide_of_several_inputs():
    """Amortised: it tells the inputs apart by the observation that it reads, and knows each."""
    lm = tiny_lm("ab.", seed=0)
    inputs = [("ab.", "a"), ("ab.", "bb"), ("ba", "b.")]
    guide = lmppl.LMGuide(infill, lm=lm)
    untrained = [guide_report(guide, infill, args, lm) for args in inputs]
    guide.fit(inputs, steps=250, seed=0, batch_size=24)
    for args, before in zip(inputs, untrained, strict=True):
        report = guide_report(guide, infill, args, lm)
        print(f"{args}: TV {before.tv:.3f} to {report.tv:.4f}")
        assert report.tv < 0.02
