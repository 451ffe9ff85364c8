"""Steering: of a constrained site's draws none dies that could be saved, and the evidence stays exact.

Under ``constrain="global"`` the proposal leaves out tokens after which no match can be reached within
the tokens that are left. Without that, a draw that begins a long match too late has probability zero.
"""

from __future__ import annotations

import math

import pytest
from choices import every_way
from constrained import of_regex
from estimates import check_unbiased, joint_of, weighted_values

import lmppl
from lmppl import lm_sample
from lmppl.constraints import Regex
from lmppl.lm.tokens.constraints.guidance import RegexState
from lmppl.testing import enumerate_program, tiny_lm

LM = tiny_lm(["a", "b", "ab", ".", "b."], seed=10)
FEW = tiny_lm(["a", "b"], seed=2)
MOST = 3  # tokens
TIGHT = {  # patterns with beginnings that cannot come to a match within three tokens; stop strings
    "long branch": ("a|b{2}a{3}|(ab){3}b", None),
    "repeats": ("(ab){1,3}|b+ab", None),
    "stop": ("a+b|b{2}a{3}|ba", "b."),
    "stop within a token": ("aba?|b(ba){2}|(ab){2}a?b|a{5}", "."),
}
EACH = pytest.mark.parametrize("case", TIGHT)


def program(pattern, stop, prefix="ab"):
    return lm_sample("z", prefix, max_tokens=MOST, stop=stop, regex=pattern)


def without_steering(monkeypatch):
    monkeypatch.setattr(RegexState, "within", lambda self, left, *, cut=False: None)


def share_of_dead(model, *args, lm=LM, num_samples=300):
    options = {"lm": lm, "num_samples": num_samples, "seed": 0, "progress": False}
    try:
        posterior = lmppl.infer(model, *args, method="importance", **options)
    except lmppl.ZeroEvidenceError as error:
        posterior = error.posterior
    return float((posterior.log_weights == -math.inf).double().mean())


def languages(pattern):
    return {"z": of_regex(pattern, "ab.", 9)}


@EACH
def test_no_draw_dies_that_could_be_saved(case, monkeypatch):
    assert share_of_dead(program, *TIGHT[case]) == 0
    without_steering(monkeypatch)
    assert share_of_dead(program, *TIGHT[case]) > 0.05


@EACH
def test_exact_is_what_it_is_by_definition(case):
    pattern, stop = TIGHT[case]
    oracle = enumerate_program(program, pattern, stop, lm=LM, languages=languages(pattern))
    posterior = lmppl.infer(program, pattern, stop, lm=LM, method="exact", progress=False)
    assert posterior.log_evidence == pytest.approx(oracle.log_evidence, abs=1e-5)
    assert weighted_values(posterior).keys() == joint_of(oracle).keys()


@EACH
def test_importance_is_unbiased_by_enumeration(remembered, monkeypatch, case):
    check_importance(monkeypatch, case)


def check_importance(monkeypatch, case):
    pattern, stop = TIGHT[case]
    check_unbiased(
        every_way(monkeypatch), program, (pattern, stop), LM,
        languages=languages(pattern), method="importance", num_samples=1,
    )  # fmt: skip


def test_no_text_is_lost_whose_last_token_is_cut(remembered, monkeypatch):
    """``aab`` is written by "b." alone: "." closes it, within the three tokens."""
    lm, pattern = tiny_lm(["a", "b."], seed=1), "aab|a{4}"
    number = check_unbiased(
        every_way(monkeypatch), program, (pattern, ".", "a"), lm,
        languages={"z": of_regex(pattern, "ab.", 9)}, method="importance", num_samples=1,
    )  # fmt: skip
    assert number == 1


def test_smc_is_unbiased_by_enumeration(remembered, monkeypatch):
    def two_sites():
        z = lm_sample("z", "ab", max_tokens=3, regex="a|bab|aaaa|bbbb")
        lm_sample("w", ["a", z], max_tokens=1)

    check_unbiased(
        every_way(monkeypatch), two_sites, (), FEW,
        languages=languages("a|bab|aaaa|bbbb"), method="smc", num_samples=2, ess_threshold=1.0,
    )  # fmt: skip


def test_to_rule_out_what_can_match_is_seen(remembered, monkeypatch):
    """The enumeration fails where steering is off by one token."""
    within = RegexState.within
    monkeypatch.setattr(
        RegexState, "within", lambda self, left, *, cut=False: within(self, left - 1, cut=cut)
    )
    with pytest.raises(AssertionError):
        check_importance(monkeypatch, "repeats")


def test_max_tokens_too_small_says_how_many_are_needed():
    with pytest.raises(ValueError, match=r"max_tokens=3 .*b\{8\}.* at least 8 tokens"):
        lmppl.infer(lambda: lm_sample("z", "a", max_tokens=3, regex="b{8}"), lm=LM, method="exact")
    # With a stop string the last token may be cut: "b." holds the last letter.
    lm = tiny_lm(["a", "b."])
    for stop, needed in ((None, 5), (".", 4)):
        with pytest.raises(ValueError, match=f"at least {needed} tokens"):
            lmppl.LMText(lm, "a", max_tokens=3, stop=stop, constraint=Regex("a{3}b|a{5}"))


def test_what_no_tokens_make_up_is_an_error():
    with pytest.raises(ValueError, match="can't spell any"):
        lmppl.infer(lambda: lm_sample("z", "a", max_tokens=3, regex="ac"), lm=LM, method="exact")


@pytest.mark.slow
def test_sums_with_few_tokens(monkeypatch):
    """A sum needs six tokens, and the model likes numbers of several digits, each of them a token."""
    lm = lmppl.LM.from_pretrained("smollm2-135m-instruct")

    def sums(most):
        lm_sample("z", "A sum:", max_tokens=most, regex=r" \d+ [+-] \d+ =")

    with pytest.raises(ValueError, match="at least 6 tokens"):
        share_of_dead(sums, 5, lm=lm)
    for most in (6, 8):
        assert share_of_dead(sums, most, lm=lm, num_samples=64) == 0
    without_steering(monkeypatch)
    for most in (6, 8):
        assert share_of_dead(sums, most, lm=lm, num_samples=64) > 0.1
