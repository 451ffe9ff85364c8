"""The oracle programs: their posteriors are far from their priors, and are what they should be."""

import math

import pytest
import torch
from pyro import poutine

from lmppl import primitives
from lmppl.testing import naive_log_prob, total_variation
from lmppl.testing.programs import CASES

ALL = pytest.mark.parametrize("case", CASES.values(), ids=str)
A, B, DOT, EOS = range(4)
IDS = {"a": A, "b": B, ".": DOT}


@ALL
def test_posterior_is_far_from_prior(case):
    exact = case.enumerate()
    assert total_variation(exact.prior(), exact.posterior()) > 0.3
    per_site = [total_variation(exact.prior(n), exact.posterior(n)) for n in case.text_latents]
    assert max(per_site) > 0.3


@ALL
def test_posterior_is_neither_a_point_nor_hopeless(case):
    exact = case.enumerate()
    assert max(exact.posterior().values()) < 0.65
    live = [trace for trace in exact if trace.log_joint > -math.inf]
    second_moment = math.fsum(
        math.exp(2 * (t.log_joint - t.log_prior - exact.log_evidence) + t.log_prior) for t in live
    )
    assert 0.03 < 1 / second_moment < 0.3  # effective sample size of the prior, as a fraction


@ALL
def test_prior_sums_to_one_and_names_the_latents(case):
    exact = case.enumerate()
    assert math.fsum(exact.prior().values()) == pytest.approx(1.0, abs=1e-6)
    assert set(exact.latents) == set(case.text_latents) | set(case.other_latents)
    assert len(exact) < 250


def score(case, prefix, tokens, temperature=1.0):
    """Of texts and token tuples, EOS kept where it is scored and left out of prefixes."""
    prefix_ids = [t for part in prefix for t in tokens_of(part) if t != EOS]
    return float(naive_log_prob(case.lm, prefix_ids, tokens_of(tokens), temperature).sum())


def tokens_of(part):
    return [IDS[c] for c in part] if isinstance(part, str) else list(part)


def one_site(case, v):
    x, y = case.args
    return score(case, [x], v["z"]) + score(case, [x, v["z"]], y)


def chain(case, v):
    x, y = case.args
    z, w = v["z"], v["w"]
    joint = score(case, [x], z) + score(case, [x, z], w, temperature=1.5)
    return joint + score(case, [x, z, w], y)


def branch(case, v):
    x, y = case.args
    z = v["z"]
    first = score(case, [x], z)
    if B in z:
        return first + score(case, [x, z], v["w"]) + score(case, [x, v["w"]], y)
    return first + score(case, [z, x], v["v"]) + score(case, [x, v["v"]], y)


def observed_text(case, v):
    x, first, last = case.args
    z, w = v["z"], v["w"]
    joint = score(case, [x], z) + score(case, [x, z], (*tokens_of(first), EOS))
    joint += score(case, [z, first], w)
    assert last.endswith(".")  # so it is closed, and no EOS follows
    return joint + score(case, [x, z, w], last)


def factor(case, v):
    x, reward = case.args
    return score(case, [x], v["z"]) + reward * (v["z"].count(B) - v["z"].count(A))


def beta_text(case, v):
    """With theta ~ Beta(4, 1) summed out: B(4 + k, 1 + n - k) / B(4, 1), or k and n - k swapped."""
    x, labels = case.args
    ones = int(sum(labels)) if B in v["z"] else len(labels) - int(sum(labels))
    marginal = log_beta(4 + ones, 1 + len(labels) - ones) - log_beta(4, 1)
    return score(case, [x], v["z"]) + marginal


def beta_mixture(case, v):
    """With theta ~ Beta(2, 5) summed out, k = 1 has probability 2/7."""
    prefixes, y = case.args
    prefix = prefixes[int(v["k"])]
    joint = math.log(2 / 7 if v["k"] else 5 / 7) + score(case, [prefix], v["z"])
    return joint + score(case, [prefix, v["z"]], y)


def hard_constraint(case, v):
    x, y = case.args
    if B not in v["z"]:
        return -math.inf
    z, w = v["z"], v["w"]
    return score(case, [x], z) + score(case, [x, z], w) + score(case, [x, w], y)


def choices(case, v):
    x, y = case.args
    k, z = v["k"], v["z"]
    scores = torch.tensor([score(case, [x], c) / 2.0 for c in ("ab", "ba.", "b.")])
    chosen = [(A, B), (B, A, DOT), (B, DOT)].index(k)
    joint = float(scores.log_softmax(0)[chosen]) + score(case, [k, x], z)
    return joint + score(case, [x, k, z], y)


def scale(case, v):
    x, y = case.args
    return 0.5 * score(case, [x], v["z"]) + 2.0 * score(case, [x, v["z"]], y)


def use_tool(case, v):
    x, y = case.args
    swapped = [{A: B, B: A}[t] for t in v["z"] if t not in (DOT, EOS)]
    return score(case, [x], v["z"]) + score(case, [x, swapped], y)


def log_beta(a, b):
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


BY_HAND = {
    "one site": one_site,
    "chain": chain,
    "branch": branch,
    "observed text": observed_text,
    "factor": factor,
    "beta and text": beta_text,
    "beta mixture": beta_mixture,
    "hard constraint": hard_constraint,
    "choices": choices,
    "scale": scale,
    "tool": use_tool,
}


@ALL
def test_joint_equals_the_sum_written_by_hand(case):
    exact = case.enumerate()
    joints: dict = {}  # theta summed out
    for trace in exact:
        values = tuple((k, v) for k, v in trace.values.items() if k != "theta")
        joints[values] = joints.get(values, 0.0) + math.exp(trace.log_joint)
    for values, joint in joints.items():
        expected = BY_HAND[case.name](case, dict(values))
        if expected == -math.inf:
            assert joint == 0.0
        else:
            assert math.log(joint) == pytest.approx(expected, abs=1e-4)


@ALL
def test_joint_equals_pyros_log_prob_sum(case):
    """lmppl's own scoring of the same values, through Pyro's trace."""
    exact = case.enumerate()
    live = [trace for trace in exact if trace.log_joint > -math.inf]
    with primitives.use(case.lm), torch.no_grad():
        for trace in live[:: max(1, len(live) // 20)]:
            expected = trace.log_joint
            if "theta" in trace.values:  # a quadrature weight is no density: leave the site out
                expected -= math.log(exact.prior("theta")[trace.values["theta"]])
            program = poutine.condition(case.program, data=trace.data)
            pyro_trace = poutine.trace(program).get_trace(*case.args)
            log_joint = pyro_trace.log_prob_sum(lambda name, site: name != "theta")
            assert float(log_joint) == pytest.approx(expected, abs=1e-4)
