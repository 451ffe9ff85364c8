"""Laws of constrained sites, on random regular expressions and stop strings."""

from __future__ import annotations

import functools
import itertools
import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lmppl
from lmppl import LMText
from lmppl.constraints import Constraint, Grammar, JsonSchema, Regex
from lmppl.lm.tokens import matching
from lmppl.lm.tokens.stopping import Stopping
from lmppl.testing import ConstrainedSite, Language, tiny_byte_lm, tiny_lm
from lmppl.testing.naive import NaiveLM

LM = tiny_lm(["a", "b", "ab", "ba"], seed=7)
LM.model.requires_grad_(False)
NAIVE = NaiveLM(LM)
VOCABULARY = LM.vocabulary
PREFIX = LM.encode("ab")
MOST = 3  # tokens, so 6 characters
FEW = settings(max_examples=12, deadline=None, derandomize=True)


# --- random regular expressions of at most six positions, so that what begins a match is at most six
# characters from its end ---

_MOST_POSITIONS = 6
_ATOMS = st.sampled_from(["a", "b", "[ab]", "[^a]", "."]).map(lambda atom: (atom, 1))


def _repeated(part, mark):
    pattern, positions = part
    return f"({pattern}){mark}", positions * (2 if "2" in mark else 1)


def _grown(parts):
    pairs = st.tuples(parts, parts)
    return st.one_of(
        pairs.map(lambda p: (p[0][0] + p[1][0], p[0][1] + p[1][1])),
        pairs.map(lambda p: (f"({p[0][0]}|{p[1][0]})", p[0][1] + p[1][1])),
        st.tuples(parts, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}"])).map(
            lambda p: _repeated(*p)
        ),
    )


PATTERNS = (
    st.recursive(_ATOMS, _grown, max_leaves=_MOST_POSITIONS)
    .filter(lambda part: part[1] <= _MOST_POSITIONS)
    .map(lambda part: part[0])
)
STOPS = st.sets(st.text("ab", min_size=1, max_size=3), max_size=2).map(lambda s: tuple(sorted(s)))


@functools.cache
def language_of(pattern):
    return Language.of_pieces(re.compile(pattern).fullmatch, "ab", 2 * MOST + _MOST_POSITIONS)


def site_of(pattern, stops, *, is_local=False):
    return ConstrainedSite(NAIVE, language_of(pattern), PREFIX, MOST, stops, 1.0, is_local)


def densities(pattern, stops, values, *, law):
    constrain = "local" if law == "local" else "global"
    options = {"stop": stops, "constraint": Regex(pattern), "constrain": constrain}
    fn = LMText(LM, "ab", max_tokens=MOST, **options)
    fn = fn.proposal() if law == "proposal" else fn
    return fn.log_prob(torch.stack([fn.value(ids) for ids in values])) if values else torch.zeros(0)


@FEW
@given(PATTERNS, STOPS)
def test_masks_and_closing_are_those_of_the_definition(pattern, stops):
    site = site_of(pattern, stops)
    try:
        stopping = Stopping(VOCABULARY, stops, MOST, Regex(pattern))
    except ValueError as error:
        assert "max_tokens=3 is too small for any match" in str(error)
        assert not site.enumerate()
        return
    open_texts = [()]
    while open_texts:
        ids = open_texts.pop()
        before = stopping.start()
        for token in ids:
            assert before.push(token) is None
        mask = before.mask().tolist()
        for token in range(VOCABULARY.size):
            outcome, after = site.outcome((*ids, token)), before.copy()
            reason = after.push(token)
            assert mask[token] == before.allows(token) == (outcome != "dead"), (ids, token)
            assert after.is_alive == (outcome in ("open", "match"))
            if outcome == "open":
                assert reason is None
                open_texts.append((*ids, token))
            elif outcome == "match":
                assert reason is not None and after.matches


@FEW
@given(PATTERNS, STOPS)
def test_densities_sum_to_the_probability_of_a_match(pattern, stops):
    values = site_of(pattern, stops).enumerate()
    assume(values)  # else it may be refused
    global_ = densities(pattern, stops, list(values), law="global")
    assert global_.tolist() == pytest.approx(list(values.values()), abs=1e-5)

    site = site_of(pattern, stops, is_local=True)
    expected = site.enumerate()
    local = densities(pattern, stops, list(expected), law="local")
    assert local.tolist() == pytest.approx(list(expected.values()), abs=1e-5)
    total = float(local.exp().sum())
    assert total <= 1 + 1e-5
    if not has_dead_ends(site):
        assert total == pytest.approx(1, abs=1e-5)


def has_dead_ends(site):
    """Whether some allowed text is cut, or comes to where no token is allowed."""
    open_texts = [()]
    while open_texts:
        ids = open_texts.pop()
        outcomes = [site.outcome((*ids, token)) for token in range(VOCABULARY.size)]
        if "cut" in outcomes or set(outcomes) == {"dead"}:
            return True
        open_texts += [(*ids, t) for t, outcome in enumerate(outcomes) if outcome == "open"]
    return False


@FEW
@given(PATTERNS, STOPS)
def test_the_proposal_draws_every_match_and_has_no_more_mass_than_one(pattern, stops):
    values = list(site_of(pattern, stops).enumerate())
    assume(values)
    proposed = densities(pattern, stops, values, law="proposal")
    assert bool((proposed > -math.inf).all())
    assert float(proposed.exp().sum()) <= 1 + 1e-5


@settings(FEW, max_examples=5)
@given(PATTERNS, STOPS)
def test_what_is_remembered_changes_nothing(pattern, stops):
    """The masks of a constraint that was asked much, in any order, are those of a fresh one."""
    old = Stopping(VOCABULARY, stops, 2 * _MOST_POSITIONS, Regex(pattern))
    tokens = range(VOCABULARY.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_MOST_BYTES", 1)
        patch.setattr(matching, "_COUNTED_AFTER", 1)
        for length in (2, 0, 1):
            for ids in itertools.product(tokens, repeat=length):
                fresh = matching.Matching(
                    Regex(pattern), VOCABULARY, [stop.encode() for stop in stops]
                )
                state, match = old.start(), fresh.start
                for token in ids:
                    if state.reason is None:
                        state.push(token)
                        match = match.after(token)
                if state.reason is None:
                    assert torch.equal(state.mask(), match.mask(9))


def test_every_tokenisation_of_a_match_has_mass():
    values = [
        ids for ids in itertools.product(range(4), repeat=3) if VOCABULARY.decode(ids) == "abab"
    ]
    values += [VOCABULARY.encode("ab") * 2]
    assert len(values) == 4
    for law in ("global", "local", "proposal"):
        log_probs = densities(
            "(abab)+|abab.*", (), [v if len(v) == MOST else (*v, 4) for v in values], law=law
        )
        assert bool((log_probs > -math.inf).all())


# --- masks against states: a token is allowed where its bytes are ---


class NoDoubles(Constraint):
    def allows(self, prefix):
        return re.search(r"(.)\1", prefix) is None


_OTHERS = [
    (Grammar('start: "a" start "é" | "."'), ["", "a", "aa", "aa.", "aa.é"]),
    (Grammar('start: (A | B)+\nA: "a"\nB: /\\.a?/\n%ignore "è"'), ["", "a", "aè", ".", ".a"]),
    (Grammar('start: text "."\ntext[lazy]: /[aé]*é/'), ["", "a", "aé", "aé."]),
    (JsonSchema({"type": "string", "maxLength": 2}), ["", '"', '"a', '"é', '"aé']),
    (Regex("[^a]+a?"), ["", "é", "éa", ".."]),
    (NoDoubles(), ["", "a", "é", "aé."]),
]


@pytest.mark.filterwarnings("ignore:.* is asked about every token")
@pytest.mark.parametrize(("constraint", "texts"), _OTHERS, ids=lambda part: repr(part)[:40])
def test_a_token_is_allowed_where_its_bytes_are(constraint, texts):
    pieces = [b"a", b".", b"\xc3", b"\xa9", b"\xa8", b".\xc3", b"\xa9a", b"aa", b'"', b'a"', b"\\"]
    check_masks(tiny_byte_lm(pieces).vocabulary, constraint, texts)


@pytest.fixture(scope="module")
def embedded_vocabulary():
    return lmppl.LM.from_pretrained("smollm2-135m-instruct", device="cpu").vocabulary


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        (Regex(r" \d+ [+-] \d+ ="), ["", " 12", " 12 + 3"]),
        (Regex("[A-Z][a-z]+( [a-z]+)*[.!?]"), ["", "The", "The ca", "The cat."]),
        (Regex(".{1,30}"), ["", "Some words, then"]),
        (
            JsonSchema({"type": "object", "properties": {"a": {"type": "string"}}}),
            ["", '{"', '{"a":"x'],
        ),
        (Grammar('start: "(" start ")" | WORD\nWORD: /[a-zé]+/'), ["", "((", "(a", "(a)"]),
    ],
    ids=lambda part: repr(part)[:40],
)
def test_a_token_of_a_real_model_is_allowed_where_its_bytes_are(
    constraint, texts, embedded_vocabulary
):
    check_masks(embedded_vocabulary, constraint, texts)


def check_masks(vocabulary, constraint, texts):
    start = constraint.start(vocabulary)
    for text in texts:
        state = start.after(text.encode()) if text else start
        mask = state.mask()
        for token in vocabulary.text_tokens.nonzero().flatten().tolist():
            follows = state.after(vocabulary.token_bytes(token)) is not None
            assert bool(mask[token]) == follows, (text, vocabulary.token_bytes(token))
