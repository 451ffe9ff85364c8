"""How many tokens a text needs to match a regular expression, against enumeration of all texts."""

from __future__ import annotations

import copy
import math
import random
import re
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppl.lm.tokens.constraints import distance as distance_module
from lmppl.lm.tokens.constraints.byte_automaton import DEAD, END, ByteAutomaton
from lmppl.lm.tokens.constraints.distance import Distance
from lmppl.lm.tokens.constraints.regex_syntax import parse
from lmppl.lm.tokens.vocabulary import Vocabulary
from lmppl.testing import tiny_byte_lm, tiny_lm

HORIZON = 2
LETTERS = tiny_lm(["a", "b", "ab", "é", "ba.", "."]).vocabulary
WITHOUT_B = tiny_lm(["a", "ab", "bb", "é"]).vocabulary  # spells "b" with a neighbour only
BYTES = tiny_byte_lm([b"a", b".", b"\xc3", b"\xa9", b"\xa8", b"a\xc3"]).vocabulary
VOCABULARIES = {"letters": LETTERS, "without b": WITHOUT_B, "bytes": BYTES}


class Enumeration:
    """What Python's ``re.fullmatch`` says of all texts that begin with a given one.

    With ``cut`` a text whose beginning matches counts as a match too. It looks ``horizon`` tokens ahead.
    """

    def __init__(
        self, pattern: str, vocabulary: Vocabulary, *, cut: bool = False, horizon: int = HORIZON
    ) -> None:
        self.pattern, self.cut, self.horizon = re.compile(pattern), cut, horizon
        silent = vocabulary.special_ids | vocabulary.eos_ids
        self.tokens = {
            t: vocabulary.token_bytes(t) for t in range(vocabulary.size) if t not in silent
        }
        self.needed = lru_cache(None)(self._needed)
        self.matches = lru_cache(None)(self._matches)

    def _matches(self, data: bytes) -> bool:
        if self.cut and data and self.matches(data[:-1]):
            return True
        try:
            return self.pattern.fullmatch(data.decode()) is not None
        except UnicodeDecodeError:
            return False

    def _needed(self, data: bytes) -> float:
        """The least number of tokens to a match; infinity if it is more than ``horizon``."""
        texts = {data}
        for count in range(self.horizon + 1):
            if any(map(self.matches, texts)):
                return count
            texts = {text + token for text in texts for token in self.tokens.values()}
        return math.inf

    def texts(self, length: int) -> set[bytes]:
        """All texts of at most so many tokens."""
        every = texts = {b""}
        for _ in range(length):
            texts = {text + token for text in texts for token in self.tokens.values()}
            every = every | texts
        return every


def check_exact(pattern: str, vocabulary: Vocabulary, *, cut: bool = False) -> None:
    """``needed`` and ``within`` are those of the enumeration, as far as it looks ahead."""
    distance = Distance.of(pattern, vocabulary, cut=cut)
    assert distance is not None
    naive = Enumeration(pattern, vocabulary, cut=cut)
    for text in sorted(naive.texts(2)):
        state = distance.after(distance.start, text)
        for left in range(HORIZON + 1):
            check_mask(distance, naive, text, left)  # first: what needs no tables must be right too
            assert distance.can_match_within(state, left) == (naive.needed(text) <= left)
        needed = distance.needed(state)
        assert needed == naive.needed(text) or needed > HORIZON and naive.needed(text) == math.inf
        assert state != DEAD or needed == math.inf


def check_mask(distance: Distance, naive: Enumeration, text: bytes, left: int) -> None:
    state = distance.after(distance.start, text)
    mask = distance.within(state, left)
    for token, data in naive.tokens.items():
        reached = naive.needed(text + data) <= left
        if mask is not None:
            assert bool(mask[token]) == reached
        elif not reached:  # it cannot go on at all, which a matcher's own mask says
            assert distance.after(state, data) == DEAD
    if mask is not None:
        assert mask.sum() == sum(bool(mask[token]) for token in naive.tokens)


EXACT = [
    "a", "ab", "a|ab", "(a|b)*", "a{2}", "a{2,3}b", "(ab){1,}", "a?b?", "", "[ab]{3}", "[^a]b",
    "[^é]",
    ".", "..", "é", "éa|aé", "(a|é)+b", "[é-ÿ]", r"\.", r"\.a+", "(?:a(?:b|é)){2}", "a*b{2}",
    "aaaa",
    r"\x61b", "(?i:A)b", "(?P<name>a)b", "a+?b", "a{0}b", "(a{0,2}b?){2}", "(?s:.)a", "a||b",
    "(a?){3}",
    "(a?b){0,2}", "(a*)*b", "(a|b?)+é", r"\S", r"\Sb\S", r"b(a\.aaaa)?",
    "(a?b?){0,2}é", "(a?){1,2}b",
]  # fmt: skip


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=list(VOCABULARIES))
@pytest.mark.parametrize("pattern", EXACT)
def test_equals_enumeration(pattern: str, vocabulary: Vocabulary) -> None:
    check_exact(pattern, vocabulary)


@pytest.mark.parametrize("pattern", ["ab", "a|abé", "[^a]{3}", "(a|é)+b", "a{2,3}b", "é"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=list(VOCABULARIES))
def test_a_stop_string_may_cut_the_text(pattern: str, vocabulary: Vocabulary) -> None:
    check_exact(pattern, vocabulary, cut=True)


def patterns() -> st.SearchStrategy[str]:
    """Patterns whose meaning is one in Python and in Rust."""
    atoms = st.sampled_from(["a", "b", "é", "è", r"\.", ".", "[ab]", "[^a]", "[^ab]", "[a-é]"])
    repeats = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,2}", "{2,}"])

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map(lambda parts: f"(?:{parts[0]}|{parts[1]})"),
            st.tuples(inner, repeats).map(lambda parts: f"(?:{parts[0]}){parts[1]}"),
        )

    return st.recursive(atoms, grow, max_leaves=6)


@given(patterns(), st.sampled_from(list(VOCABULARIES)), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_enumeration_for_any_pattern(pattern: str, name: str, cut: bool) -> None:
    check_exact(pattern, VOCABULARIES[name], cut=cut)


# Sound: what can still match is never ruled out, where the automaton's language is larger.

UNICODE = tiny_lm(["a", "A", "1", " ", "é", "É", "٣", "_", "ſ", "k", "a1"]).vocabulary
LARGER = [
    r"\d", r"\d{2}a", r"\w+", r"\w\W", r"\D\d", r"\S\s", r"[^\d]", r"[^\W_]{2}", r"[\d_]a", "(?i)É",
    "(?i)k+", "(?i)[a-z]s", "(?i)[^a]", "^a$", r"\ba1\b", r"\Aa", r"a\b \ba", "(?i:S)a", "(?i)[^k]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", LARGER)
def test_rules_out_nothing_that_can_match(pattern: str) -> None:
    distance = Distance.of(pattern, UNICODE)
    assert distance is not None
    naive = Enumeration(pattern, UNICODE, horizon=2)
    possible = 0
    for text in naive.texts(1):
        state = distance.after(distance.start, text)
        assert distance.needed(state) <= naive.needed(text)
        for left in range(2):
            mask = distance.within(state, left)
            for token, data in naive.tokens.items():
                if naive.needed(text + data) <= left:
                    possible += 1
                    assert mask is None or mask[token]
                    assert distance.after(state, data) != DEAD
    assert possible


def test_long_counts_have_no_end() -> None:
    distance = Distance.of("a{5000}b", LETTERS)
    assert distance is not None
    assert 400 < distance.needed(distance.start) <= 5001
    assert distance.after(distance.start, b"a" * 5000 + b"b") != DEAD
    assert Distance.of("(((a{900}){900}){900}){900}", LETTERS) is not None


def test_gives_up_on_too_many_states_and_rules_out_nothing() -> None:
    pattern = "(a|b)*a(a|b){14}"  # 2 ** 15 states
    distance = Distance.of(pattern, LETTERS)
    assert distance is not None
    assert distance.within(distance.start, 2) is None
    assert distance.needed(distance.start) == 5.0  # 15 bytes, of which a token has at most three
    assert distance.after(distance.start, b"a" * 15) != DEAD


def test_nothing_matches_or_nothing_spells_it() -> None:
    empty = Distance.of(r"[^\s\S]", LETTERS)
    assert empty is not None
    assert empty.start == DEAD and empty.needed(empty.start) == math.inf
    assert not empty.can_match_within(empty.start, 100)
    unwritten = Distance.of("a|c", WITHOUT_B)
    assert unwritten is not None
    assert unwritten.needed(unwritten.start) == 1
    in_c = Distance.of("ac", WITHOUT_B)
    assert in_c is not None
    assert in_c.start != DEAD and in_c.needed(in_c.start) == math.inf
    mask = in_c.within(in_c.start, 50)
    assert mask is not None and not mask.any()


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a)", "(?=a)", "(?!a)b", r"(a)\1", "(?<=a)b", "a{,2}", "a{2", "*a", "[b-a]", "[a", r"\q",
     "(?x) a", "(?-u)a", r"\0", "a{3,2}", r"[\d-z", "(?#c)a", r"\Z", "(" * 60 + ")" * 60,
     "(?>a)", r"\x{110000}", r"\x{d800}", "a\\"],
)  # fmt: skip
def test_unknown_syntax_has_no_distance(pattern: str) -> None:
    assert Distance.of(pattern, LETTERS) is None


def test_large_patterns_have_no_distance() -> None:
    assert Distance.of("|".join(f"{i:05d}" for i in range(3000)), LETTERS) is None


def test_bytes_decide_without_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as much is left, no token of the vocabulary is looked at."""
    distance = Distance.of("a[ab]{4}", LETTERS)
    assert distance is not None
    monkeypatch.setattr(distance_module, "_Tables", None)
    assert distance.within(distance.start, 5) is None
    assert distance.can_match_within(distance.start, 5)
    with pytest.raises(TypeError):
        distance.within(distance.start, 2)


def test_copies_are_the_same() -> None:
    distance = Distance.of("ab", LETTERS)
    assert copy.deepcopy(distance) is distance


# Against llguidance, whose syntax it is.


class Matcher:
    """llguidance over a vocabulary of the 256 bytes."""

    def __init__(self, pattern: str) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(_byte_tokenizer(), LLMatcher.grammar_from_regex(pattern))
        assert not self._matcher.is_error(), self._matcher.get_error()

    def matches(self, data: bytes) -> bool:
        matcher = self._matcher.deep_copy()
        return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()

    def walk(self, random_: random.Random, most: int) -> bytes | None:
        """The bytes of a random match; None if there was none within ``most`` bytes."""
        matcher, data = self._matcher.deep_copy(), b""
        while len(data) < most:
            if matcher.is_accepting() and (matcher.is_stopped() or random_.random() < 0.3):
                return data
            bits = int.from_bytes(matcher.compute_bitmask(), "little")
            allowed = [byte for byte in range(256) if bits >> byte & 1]
            if not allowed:
                break
            likely = [byte for byte in allowed if byte in b"12ab +-@.="]
            byte = random_.choice(likely if likely and random_.random() < 0.7 else allowed)
            matcher.consume_token(byte)
            data += bytes([byte])
        return data if matcher.is_accepting() else None


class _Bytes:
    """The 256 bytes and EOS, as llguidance asks for them."""

    tokens = [*(bytes([byte]) for byte in range(256)), b"<eos>"]
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@lru_cache(None)
def _byte_tokenizer() -> object:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257)


PROBES = [chr(c) for c in range(128)] + list(
    "éêÉßẞſ\u212a\u0085\u2028\u3000٣αΩ😀\U0010ffff\ud7ff\ue000"
)
CLASSES = [
    "[a-c&&b-d]", "[a-d--b]", "[a-c~~b-d]", "[[a-b]d]", "[^[^ab]]", "[a-]", "[-a]", "[--a]", "[]a]",
    "[^]a]", "[a^]", "[a-c-e]", "[+--]", "[[:digit:]&&[^5]]", "[[:^ascii:]&&[aé]]", "[&]",
    "[a&&]", "[&&a]",
    "[a-b&&^a]", r"[\]\-\\]", r"[\x41-\x43]", r"[\u{e9}é\n]", "[[:upper:]&&A-C]",
    r"[\s&&[\t-\r ]]", "[~~]",
    "[]-a]", r"[!-\-]", r"\t|\n|\v|\f|\r|\a", r"\x{1F600}|\u00e9|\U0000000a|\x41",
    r"\#|\&|\ |\-|\]", ".",
    "(?s).", r"\s", r"\S", r"[^\s\S]", "[é-ÿ]", "[^é]", r"[\s\S]", r"[\x00-\u{10ffff}]",
    "[[:foo:]]",
    "[[:word:]]|[[:punct:]]", "[[:alnum:][:blank:]]", "[^[:cntrl:][:graph:]]",
    "[[:xdigit:]&&[[:lower:]0-9]]",
]  # fmt: skip
LARGER_CLASSES = [
    r"\d", r"\w", r"\D", r"\W", r"[^\w]", r"\p{L}", r"\pN", r"\P{Lu}", r"\p{Greek}",
    r"\p{Sc}|\p{Zs}",
    r"\P{Greek}", r"[\pN&&[:ascii:]]", r"[\p{Lu}&&a-zA-C]", r"[\P{L}&&[a-z1]]", r"[\W&&[a-z!é]]",
    "(?i)[a-b--B]", "(?i)[B]", "(?i)k", "(?i)[^k]", "(?i)[^kß]", "(?i)\u212a", "(?i)[^s]",
    "(?i)[[:upper:]]",
    r"(?i)\p{Lu}", r"(?i)\P{Lu}", "(?i)ß", "(?i)[^\u017f]", "(?i)É|ω", "(?i)(?-i)a", "(?i:a)|b",
    "a(?i)|c",
]  # fmt: skip


def is_larger_in_ascii(pattern: str, probe: str) -> bool:
    """Two letters have other cases beyond ASCII, and of a script nothing is known."""
    return "Greek" in pattern or "(?i" in pattern and probe in "kKsS"


@pytest.mark.parametrize("pattern", [*CLASSES, *LARGER_CLASSES])
def test_characters_are_llguidances(pattern: str) -> None:
    """Equal for what is read exactly, and in ASCII; a superset beyond."""
    matcher, distance = Matcher(pattern), Distance.of(pattern, LETTERS)
    assert distance is not None
    for probe in PROBES:
        data = probe.encode("utf-8", "surrogatepass")
        found = distance.needed(distance.after(distance.start, data)) == 0
        if pattern in CLASSES or probe.isascii() and not is_larger_in_ascii(pattern, probe):
            assert found == matcher.matches(data), probe
        else:
            assert found >= matcher.matches(data), probe


FAMILIAR = tiny_lm(list("aéж—日²€ﬁ→٣ß")).vocabulary


EVERY = frozenset(chr(c) for c in range(0x80, 0x20000) if not 0xD800 <= c < 0xE000)
SETS = [r"\w", r"\W", r"\p{L}", r"\P{Lu}", r"\p{N}", r"\p{P}", r"\s"]
SLOW = [pytest.param(pattern, marks=pytest.mark.slow) for pattern in SETS]


@pytest.mark.parametrize("pattern", [r"\d", *SLOW])
def test_every_character_that_llguidance_matches_is_held(pattern: str) -> None:
    """Also if it is known of all characters which of them are held."""
    matcher, automaton = Matcher(pattern), ByteAutomaton(parse(pattern, EVERY).tree)
    others = 0
    beyond = [*range(0x3000, 0xD800, 7), *range(0xE000, 0x1F000, 7), *range(0x1F000, 0x110000, 11)]
    for point in [*range(0x3000), *beyond]:
        data = chr(point).encode()
        held = END in automaton.positions(automaton.after(automaton.start, data))
        if not held or point < 0x3000:
            matches = matcher.matches(data)
            assert held >= matches, hex(point)
            others += held > matches
    assert others < 1200  # those that Python does not know


@pytest.mark.parametrize(
    "pattern", [r"\d", r"\w", r"\W", r"\D", r"\p{L}", r"\P{Lu}", r"\p{P}", r"\pN", r"[^\d\s]"]
)
def test_characters_of_tokens_are_told_exactly(pattern: str) -> None:
    matcher, distance = Matcher(pattern), Distance.of(pattern, FAMILIAR)
    assert distance is not None
    for text in "aéж—日²€ﬁ→٣ß":
        found = distance.needed(distance.after(distance.start, text.encode())) == 0
        assert found == matcher.matches(text.encode()), text


ALL_BYTES = tiny_byte_lm([bytes([b]) for b in range(256)] + [b"12", b" +", b"ab", b"--", b"a\xc3"])
MIXED = [
    r" \d+ [+-] \d+ =", r"[a-z ]+\.", r"\d{4}-(0[1-9]|1[0-2])-\d{2}", r"(?i)yes|no", r".{2,5}\.",
    r"\w+@\w+",
    r"(\w+ ){2}\w+", r"^[^a-z]{3}$", r"é{2,}|[α-ω]+", r"a(b(c|d)*)+?e", r"\p{L}{3}",
    r"(a?b){0,3}c", r"-{3}\s",
]  # fmt: skip


@pytest.mark.parametrize("pattern", MIXED)
def test_llguidances_matches_are_never_ruled_out(pattern: str) -> None:
    """Cut a random match into random tokens: at each, the rest is within what is left."""
    vocabulary = ALL_BYTES.vocabulary
    matcher, distance = Matcher(pattern), Distance.of(pattern, vocabulary)
    assert distance is not None
    random_ = random.Random(0)
    by_bytes = {vocabulary.token_bytes(t): t for t in range(261)}
    walks = [matcher.walk(random_, 40) for _ in range(30)]
    assert sum(data is not None for data in walks) > 5
    for data in filter(None, walks):
        tokens = cut_into_tokens(data, by_bytes, random_)
        state = distance.start
        for place, token in enumerate(tokens):
            left = len(tokens) - place
            assert distance.needed(state) <= left and distance.can_match_within(state, left)
            mask = distance.within(state, left - 1)
            assert mask is None or mask[token]
            state = distance.after(state, vocabulary.token_bytes(token))
        assert distance.needed(state) == 0


def cut_into_tokens(data: bytes, by_bytes: dict[bytes, int], random_: random.Random) -> list[int]:
    tokens = []
    while data:
        length = 2 if data[:2] in by_bytes and len(data) > 1 and random_.random() < 0.8 else 1
        tokens.append(by_bytes[data[:length]])
        data = data[length:]
    return tokens
