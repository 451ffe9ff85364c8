"""A posterior by SMC, whose particles were resampled."""

from lmppl import infer
from lmppl.testing.programs import CASES


def by_smc():
    case = CASES["observed text"]
    options = {"lm": case.lm, "method": "smc", "num_samples": 8, "ess_threshold": 1.0, "seed": 0}
    return infer(case.program, *case.args, **options)
