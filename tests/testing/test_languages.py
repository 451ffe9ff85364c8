"""Constrained sites by definition, on texts whose answer is written by hand."""

import itertools
import math

import pytest

from lmppl import lm_sample
from lmppl.testing import (
    ConstrainedSite,
    Language,
    enumerate_program,
    enumerate_site,
    tiny_byte_lm,
    tiny_lm,
)
from lmppl.testing.naive import NaiveLM

LM = tiny_lm(["a", "b", ".", "ab"], seed=1, bos=True)
A, B, DOT, AB, EOS, BOS = range(6)


def site(language, *, max_tokens=3, stop=(), is_local=False, lm=LM, temperature=1.0):
    prefix = lm.encode("a" if lm is LM else "a.")
    return ConstrainedSite(NaiveLM(lm), language, prefix, max_tokens, stop, temperature, is_local)


def test_a_language_of_texts():
    language = Language.of_texts(["ab", "abé"])
    asked = [b"", b"a", b"ab", b"ab\xc3", "abé".encode(), b"b"]
    assert [language.matches(text) for text in asked] == [False, False, True, False, True, False]
    assert [language.begins(text) for text in asked] == [True, True, True, True, True, False]
    assert [language.extends(text) for text in asked] == [True, True, True, True, False, False]


def test_a_language_of_pieces_holds_the_strings_that_match():
    language = Language.of_pieces(lambda text: text.startswith("xy"), ["xy", "z"], 2)
    texts = ["xy", "xyxy", "xyz"]
    assert all(language.matches(text.encode()) for text in texts)
    assert not any(language.matches(text) for text in (b"", b"z", b"zxy", b"xyzz"))
    assert language.extends(b"xy") and not language.extends(b"xyz")


def test_a_language_of_predicates_is_asked_on_whole_characters():
    asked = []

    def allows(text):
        asked.append(text)
        return len(text) <= 1

    language = Language.of_predicates(allows, lambda text: text != "")
    assert language.begins(b"\xc3") and asked == [""]
    assert not language.matches(b"\xc3") and not language.matches(b"")
    assert language.begins("é".encode()) and language.matches("é".encode())
    assert not language.begins("éa".encode()) and not language.begins(b"\xa9")
    assert language.extends("é".encode())  # as far as anybody knows


def test_outcomes():
    some = site(Language.of_texts(["a", "ab", "bab"]), stop=("..",))
    outcomes = {
        (A,): "open", (B,): "open", (DOT,): "dead", (AB,): "match", (EOS,): "dead", (BOS,): "dead",
        (A, EOS): "match", (A, B): "match", (A, DOT): "open", (A, A): "dead", (A, BOS): "dead",
        (B, EOS): "dead", (B, AB): "match", (B, A): "open", (B, DOT): "dead",
        (A, DOT, DOT): "match", (A, DOT, A): "dead", (A, DOT, EOS): "dead", (B, A, B): "match",
    }  # fmt: skip
    assert {tokens: some.outcome(tokens) for tokens in outcomes} == outcomes
    shorter = site(Language.of_texts(["a", "ab", "bab"]), stop=("..",), max_tokens=2)
    assert shorter.outcome((B, A)) == shorter.outcome((A, DOT)) == "cut"
    assert site(Language.of_texts(["aa", "aab"]), max_tokens=2).outcome((A, A)) == "match"


def test_the_first_stop_string_that_ends_counts_and_of_those_the_longest():
    matching = [Language.of_texts([body]) for body in ("a", "ab", "a.")]
    some = [site(language, stop=("b", ".b", "b.")) for language in matching]
    assert [s.outcome((A, DOT, B)) for s in some] == ["match", "dead", "dead"]


def test_values_are_the_matches_and_their_densities_the_models():
    texts = {(A, EOS), (A, B), (AB,), (B, A, B), (B, AB)}
    some = site(Language.of_texts(["a", "ab", "bab"]))
    naive, prefix = NaiveLM(LM), LM.encode("a")
    expected = {ids: float(naive.log_prob(prefix, ids).sum()) for ids in texts}
    assert some.enumerate() == pytest.approx(expected)
    for ids, log_prob in expected.items():
        assert some.log_prob(ids) == pytest.approx(log_prob)
    for ids in itertools.chain(itertools.product(range(6), repeat=2), [(A,), (AB, EOS)]):
        assert some.log_prob(ids) == pytest.approx(expected.get(ids, -math.inf))


def test_local_steps_are_renormalised():
    some = site(Language.of_texts(["aa", "ab"]), is_local=True)
    law = NaiveLM(LM).next_log_probs(LM.encode("a")).exp()
    first = law[[A, AB]] / law[[A, AB]].sum()
    values = some.enumerate()
    assert math.exp(values[(AB,)]) == pytest.approx(float(first[1]))
    assert sum(map(math.exp, values.values())) == pytest.approx(1)
    cut = site(Language.of_texts(["aa", "ab"]), is_local=True, max_tokens=1)
    assert {ids: math.exp(lp) for ids, lp in cut.enumerate().items()} == pytest.approx(
        {(AB,): float(first[1])}
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_site_that_everything_matches_is_a_free_one(temperature):
    lm = tiny_byte_lm([b"a", b"."], seed=2)
    everything = Language(lambda data: True, lambda data: True, lambda data: True)
    prefix = lm.encode("a.")
    free = enumerate_site(lm, prefix, 3, stop="..", temperature=temperature)
    found = site(everything, stop=("..",), lm=lm, temperature=temperature).enumerate()
    assert found == pytest.approx(free)


def test_a_program_needs_a_language_for_every_constraint():
    def program(pattern):
        return lm_sample("z", "a", max_tokens=2, regex=pattern)

    with pytest.raises(ValueError, match=r"site 'z': languages= says nothing of .*Regex\('a\+'\)"):
        enumerate_program(program, "a+", lm=LM)
    nothing = enumerate_program(program, "a+", lm=LM, languages={"z": Language.of_texts([])})
    assert nothing.log_evidence == -math.inf and nothing[0].values == {}
