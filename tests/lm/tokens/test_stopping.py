"""When a sequence closes: the fast way against the definition."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_families import FAMILIES, vocabulary_of

from lmppl.lm.tokens.stopping import Stopping
from lmppl.lm.tokens.vocabulary import Vocabulary

ALPHABETS = {
    "byte_level": [*"the cat.\n", "é", "ï", "日", "本", "🙂", "🙃", " the"],
    "characters": [*"ab. é"],
    "sentencepiece": [*"ab the.", "日", "é"],
    "collapsing": [*"ab."],
}


@cache
def vocabulary(family: str) -> Vocabulary:
    return vocabulary_of(FAMILIES[family]())


def by_definition(stopping: Stopping, ids: list[int]) -> tuple[int, str, str | None] | None:
    """Section 3 of the design, by decoding every beginning of the sequence."""
    if not stopping.stop and stopping.max_tokens is None:
        return None
    for n in range(1, len(ids) + 1):
        text = stopping.vocabulary.decode(ids[:n])
        if ids[n - 1] in stopping.vocabulary.eos_ids:
            return n, "eos", None
        found = [
            (start + len(stop.encode()), start, stop)
            for stop in stopping.stop
            if (start := text.encode().find(stop.encode())) >= 0
        ]
        if found:
            return n, "stop", min(found)[2]
        if n == stopping.max_tokens:
            return n, "length", None
    return None


@st.composite
def cases(draw: st.DrawFn, family: str) -> tuple[Stopping, list[int]]:
    v = vocabulary(family)
    character = st.sampled_from(ALPHABETS[family])
    string = st.lists(character, min_size=1, max_size=4).map("".join)
    stop = draw(st.lists(string, max_size=3))
    stopping = Stopping(v, tuple(stop), draw(st.none() | st.integers(1, 12)))
    # Canonical tokens, in which stop strings occur, between tokens at random.
    piece = st.one_of(
        st.lists(st.integers(0, v.size - 1), max_size=2),
        string.map(lambda s: list(v.encode(s))),
        st.sampled_from(stop or ["a"]).map(lambda s: list(v.encode(s))),
    )
    return stopping, [t for ids in draw(st.lists(piece, max_size=5)) for t in ids]


@pytest.mark.parametrize("family", ALPHABETS)
@given(data=st.data())
def test_scan_is_the_definition(family: str, data: st.DataObject) -> None:
    stopping, ids = data.draw(cases(family))
    assert stopping.scan(ids) == by_definition(stopping, ids)


@pytest.mark.parametrize("family", ALPHABETS)
@given(data=st.data(), fork=st.integers(0, 6))
def test_states_are_incremental_and_copies_independent(
    family: str, data: st.DataObject, fork: int
) -> None:
    stopping, ids = data.draw(cases(family))
    closed = stopping.scan(ids)
    state = stopping.start()
    for n, token in enumerate(ids, 1):
        if n == fork:
            stray = state.copy()
            stray.push(data.draw(st.integers(0, stopping.vocabulary.size - 1)))
        reason = state.push(token)
        assert state.length == n
        if closed is not None and n == closed[0]:
            assert (reason, state.stop) == closed[1:]
            with pytest.raises(ValueError, match="has closed"):
                state.push(token)
            break
        assert reason is None and state.reason is None
    else:
        assert closed is None


@pytest.mark.parametrize("family", ALPHABETS)
@given(data=st.data())
def test_the_value_of_a_site(family: str, data: st.DataObject) -> None:
    stopping, ids = data.draw(cases(family))
    closed = stopping.scan(ids)
    if closed is not None:
        if closed[0] < len(ids):
            with pytest.raises(ValueError, match="closes at token"):
                stopping.text(ids)
        ids = ids[: closed[0]]
    v = stopping.vocabulary
    text = stopping.text(ids)
    assert text.token_ids == tuple(ids)
    assert text == v.decode([t for t in ids if t not in v.eos_ids])
    assert (text.finish_reason, text.stop) == (closed[1:] if closed else (None, None))
    if text.stop is None:
        assert text.body == text
    else:
        assert text.startswith(text.body + text.stop)
        # The stop string that closed it does not occur before its end.
        assert text.stop not in (text.body + text.stop)[:-1]


@pytest.mark.parametrize("family", ALPHABETS)
@given(data=st.data())
def test_the_closing_token_closes_any_open_state(family: str, data: st.DataObject) -> None:
    stopping, ids = data.draw(cases(family))
    if stopping.scan(ids) is None and stopping.closing_token is not None:
        closed = stopping.scan([*ids, stopping.closing_token])
        assert closed is not None
        assert closed[0] == len(ids) + 1 and closed[1] in ("stop", "eos")


def test_a_stop_string_that_spans_tokens_and_a_split_character() -> None:
    v = vocabulary("byte_level")
    ids = v.encode("cat 🙂🙃 the")
    stopping = Stopping(v, "🙂🙃")
    closed = stopping.scan(ids)
    assert closed is not None and closed[1:] == ("stop", "🙂🙃")
    text = stopping.text(ids[: closed[0]])
    assert (text, text.body) == ("cat 🙂🙃", "cat ")


def test_the_stop_string_must_lie_in_the_text_itself() -> None:
    v = vocabulary("characters")
    assert Stopping(v, "ab", 9).scan(v.encode("b")) is None


def test_precedence_at_one_token() -> None:
    v = vocabulary("characters")
    (eos,) = v.eos_ids
    a, dot = v.encode("a.")
    assert Stopping(v, (".", "<eos>"), 2).scan([a, eos]) == (2, "eos", None)
    assert Stopping(v, ".", 2).scan([a, dot]) == (2, "stop", ".")
    assert Stopping(v, ".", 2).scan([a, a]) == (2, "length", None)
    assert Stopping(v, ".").scan([a, a]) is None


def test_of_two_stop_strings_the_first_to_end_counts_then_the_longer() -> None:
    v = vocabulary("characters")
    ids = v.encode("aab.")
    assert Stopping(v, ("b.", "ab")).scan(ids) == (3, "stop", "ab")
    assert Stopping(v, ("b", "ab")).scan(ids) == (3, "stop", "ab")


def test_nothing_closes_a_prefix_likelihood() -> None:
    v = vocabulary("characters")
    (eos,) = v.eos_ids
    stopping = Stopping(v)
    assert not stopping.closes and stopping.closing_token is None
    assert stopping.scan([eos, 0, eos]) is None
    text = stopping.text([0, eos, 1])
    assert text == "ab" and text.finish_reason is None and text.parts == ((0, 1),)


def test_eos_is_not_visible_but_counted() -> None:
    v = vocabulary("characters")
    (eos,) = v.eos_ids
    text = Stopping(v, ".", 3).text([0, eos])
    assert text == "a" and text.token_ids == (0, eos) and text.finish_reason == "eos"
    assert text.parts == ((0,),)


def test_closing_tokens() -> None:
    v = vocabulary("byte_level")
    (dot,) = v.encode(".")
    (eos,) = v.eos_ids
    assert Stopping(v, ".", 4).closing_token == dot
    assert Stopping(v, ("🙂🙃", "."), 4).closing_token == dot
    assert Stopping(v, "🙂🙃", 4).closing_token == eos
    assert Stopping(v, max_tokens=4).closing_token == eos
    without_eos = vocabulary("word_pieces")
    assert Stopping(without_eos, max_tokens=4).closing_token is None


def test_forms_of_stop() -> None:
    v = vocabulary("characters")
    assert Stopping(v, "ab").stop == ("ab",)  # type: ignore[arg-type]
    assert Stopping(v, ["a", "b", "a"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert Stopping(v, None).stop == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stop", "max_tokens", "error", "message"),
    [
        ("", 3, ValueError, "must not be empty"),
        ([".", ""], 3, ValueError, "must not be empty"),
        ([1], 3, TypeError, "1 is not a string"),
        (3, 3, TypeError, "a string or a list"),
        (".", 0, ValueError, "max_tokens=0.*at least 1"),
        (".", -2, ValueError, "max_tokens=-2.*at least 1"),
        (".", 2.5, TypeError, "max_tokens=2.5.*an int"),
        (".", True, TypeError, "max_tokens=True.*an int"),
    ],
)
def test_bad_arguments(stop: object, max_tokens: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Stopping(vocabulary("characters"), stop, max_tokens)  # type: ignore[arg-type]


def test_equality() -> None:
    one, two = (vocabulary_of(FAMILIES["characters"]()) for _ in range(2))
    assert Stopping(one, ".", 3) == Stopping(two, ".", 3)
    assert hash(Stopping(one, ".", 3)) == hash(Stopping(two, ".", 3))
    assert Stopping(one, ".", 3) != Stopping(one, ".", 4)
    assert Stopping(one, ".", 3) != Stopping(vocabulary("byte_level"), ".", 3)
    assert Stopping(one, ".", 3) != "."
