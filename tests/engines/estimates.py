"""What engines estimate, compared with the exact answer."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import lmppl
from lmppl.testing import enumerate_program, trace_values
from lmppl.testing.programs import Case

Values = tuple[tuple[str, Any], ...]  # names and values of the latents of a trace; no theta


def values_of(values: dict[str, Any]) -> Values:
    """A trace's latents that can be counted, sorted by name."""
    return tuple(sorted((k, v) for k, v in values.items() if k != "theta"))


def joint_of(exact: lmppl.testing.Enumeration) -> dict[Values, float]:
    """R(z): the joint density of every z with the observations. Sums to the evidence."""
    joint: Counter[Values] = Counter()
    for trace in exact:
        if trace.log_joint > -math.inf:
            joint[values_of(trace.values)] += math.exp(trace.log_joint)
    return dict(joint)


def weighted_values(posterior: lmppl.Posterior) -> dict[Values, float]:
    """Z-hat times the weighted indicator of every z: its expectation is R(z)."""
    total: Counter[Values] = Counter()
    for trace, log_weight in zip(posterior.traces, posterior.log_weights.tolist(), strict=True):
        if log_weight > -math.inf:
            total[values_of(trace_values(trace))] += math.exp(log_weight) / len(posterior)
    return dict(total)


def estimate(case_or_program: Any, *args: Any, lm: Any = None, **options: Any) -> dict:
    """``weighted_values`` of one run; all zero if every particle died."""
    seen = options.pop("seen", None)
    program = case_or_program
    if isinstance(program, Case):
        program, args, lm = program.program, program.args, program.lm
    try:
        posterior = lmppl.infer(program, *args, lm=lm, progress=False, **options)
    except lmppl.ZeroEvidenceError:
        return {}
    if seen is not None:
        seen.append(posterior)
    return weighted_values(posterior)


def expectation(every_way: Any, run: Callable[[], dict]) -> tuple[dict, float, int]:
    """E[run()] over all of the sampler's choices, their total probability, and their number."""
    total: Counter = Counter()
    probability, number = 0.0, 0
    with contextlib.closing(every_way):  # what it patches must not wait for the garbage collector
        for choices in every_way:
            for values, weight in run().items():
                total[values] += choices.probability * weight
            probability += choices.probability
            number += 1
    return dict(total), probability, number


def relative_errors(found: dict, expected: dict) -> dict:
    """Of every value's expectation; infinite where nothing is expected."""
    return {
        values: abs(found.get(values, 0.0) / expected[values] - 1)
        if values in expected
        else math.inf
        for values in {**found, **expected}
    }


def check_unbiased(
    every_way: Any,
    program: Any,
    args: Any,
    lm: Any,
    *,
    languages: Any = None,
    expected: Any = None,
    **options: Any,
) -> int:
    """Assert E[Z-hat * weighted indicator of z] = R(z) for every z, to 1e-4 of each.
    ``languages`` says what matches the program's constraints, if it has any.

    For SMC it is also asserted that some way resamples. ``expected`` is R, if it is known. Returns the
    number of ways.
    """
    seen: list[lmppl.Posterior] = []
    if expected is None:
        expected = joint_of(enumerate_program(program, *args, lm=lm, languages=languages))
    found, probability, number = expectation(
        every_way, lambda: estimate(program, *args, lm=lm, seed=0, seen=seen, **options)
    )
    assert abs(probability - 1) < 1e-9
    if options["method"] == "smc":
        assert any(posterior.info["resamplings"] for posterior in seen)
    errors = relative_errors(found, expected)
    worst = max(errors, key=lambda values: errors[values])
    assert errors[worst] < 1e-4, f"{dict(worst)}: {found.get(worst)} not {expected.get(worst)}"
    return number


# Fewer expected runs with a value than this, and the mean of its estimates is not normal.
_COMMON = 0.1


def z_scores(case: Case, runs: int, seed: int = 0, **options: Any) -> dict[Any, float]:
    """How many standard errors the mean of ``runs`` estimates is off, of Z and of common values."""
    joint = joint_of(case.enumerate())
    evidence = math.fsum(joint.values())
    common = [values for values, each in joint.items() if each > _COMMON * evidence]
    columns: dict[Any, list[float]] = {"evidence": [], **{values: [] for values in common}}
    for run in range(runs):
        found = estimate(case, seed=seed * 1_000_003 + run, **options)
        columns["evidence"].append(math.fsum(found.values()) / evidence)
        for values in common:
            columns[values].append(found.get(values, 0.0) / joint[values])
    scores = {}
    for name, column in columns.items():
        mean = math.fsum(column) / runs
        variance = math.fsum((x - mean) ** 2 for x in column) / (runs - 1)
        if variance <= 1e-12:  # an estimate without noise; or one that never found the value
            scores[name] = 0.0 if abs(mean - 1) < 1e-4 else math.inf
        else:
            scores[name] = (mean - 1) / math.sqrt(variance / runs)
    return scores


def check_z_test(case: Case, runs: int, **options: Any) -> None:
    """Assert that no mean estimate is more than four standard errors off.

    Estimates are skewed, and the standard error of a few is too small if a rare, large one is
    not among them. So a failure is tried again on ten times as many new runs: skewness loses its
    effect, and a bias is only seen better.
    """
    for seed, number in enumerate((runs, 10 * runs)):
        scores = z_scores(case, number, seed=seed, **options)
        worst = max(scores, key=lambda name: abs(scores[name]))
        if abs(scores[worst]) < 4:
            return
    raise AssertionError(f"{worst}: {scores[worst]:.1f} standard errors off in {number} runs")
