"""Text: a string that keeps its tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppl import Text
from lmppl.lm.tokens.stopping import Stopping
from lmppl.testing import tiny_lm

LM = tiny_lm(["a", "b", "ab", "."], seed=0)
VOCABULARY = LM.vocabulary
A, B, AB, DOT, EOS = range(5)
OTHER = tiny_lm("ba.", seed=0).vocabulary


def text(*ids: int, stop: tuple[str, ...] = (), max_tokens: int | None = None) -> Text:
    return Stopping(VOCABULARY, stop, max_tokens).text(ids)


def test_it_is_a_string():
    z = text(A, B)
    assert isinstance(z, str) and z == "ab" and hash(z) == hash("ab") and len(z) == 2
    assert {z: 1}["ab"] == 1 and z in {"ab"}
    assert repr(z) == "Text('ab')" and str(z) == "ab" and type(str(z)) is str


def test_equality_is_by_string_and_tokens_stay_apart():
    apart, merged = text(A, B), text(AB)
    assert apart == merged and hash(apart) == hash(merged)
    assert apart.token_ids == (A, B) and merged.token_ids == (AB,)


@pytest.mark.parametrize(
    "make",
    [
        lambda z: f"{z}",
        lambda z: f"{z}!",
        lambda z: z[:1],
        lambda z: z.strip(),
        lambda z: z.upper(),
        lambda z: z * 2,
        lambda z: "".join([z, z]),
        lambda z: z.replace("a", "b"),
        lambda z: z.center(9),
        lambda z: str(z),
    ],
)
def test_other_string_operations_return_a_plain_str(make):
    assert type(make(text(A, B))) is str


def test_joining_keeps_tokens_in_order():
    x, z = text(A, B), text(AB, DOT)
    joined = x + z
    assert isinstance(joined, Text) and joined == "abab."
    assert joined.token_ids == (A, B, AB, DOT)
    assert (x + z + x).token_ids == (A, B, AB, DOT, A, B)
    assert LM.encode(x + z) == LM.encode([x, z]) == (A, B, AB, DOT)


def test_joining_with_a_str_tokenises_only_the_str():
    z = text(A, B)  # the canonical tokens of "ab" are (AB,)
    assert (z + "ab").token_ids == (A, B, AB)
    left = "ab" + z
    assert isinstance(left, Text) and left == "abab" and left.token_ids == (AB, A, B)
    assert ("a" + z + "b").token_ids == (A, A, B, B)
    assert z.parts == ((A, B),) and left.parts == ("ab", (A, B))


def test_augmented_assignment_makes_a_new_text():
    z = kept = text(A)
    z += text(B)
    assert z == "ab" and z.token_ids == (A, B)
    assert kept == "a" and kept.token_ids == (A,)


def test_a_join_with_what_is_no_string_is_a_type_error():
    for join in (
        lambda z: z + 1, lambda z: 1 + z, lambda z: z + ["b"], lambda z: ["b"] + z,
        lambda z: z + None,
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"cannot join 'a' and .*\[before, z, after\]"):
            join(text(A))


def test_eos_is_counted_and_not_passed_on():
    z = text(A, EOS, max_tokens=4)
    assert z == "a" and z.token_ids == (A, EOS) and z.finish_reason == "eos"
    assert z.parts == ((A,),)
    assert (z + "b").token_ids == (A, B)
    assert LM.encode(["b", z, "b"]) == (B, A, B)


def test_body_is_the_text_without_its_stop_string():
    z = text(A, B, DOT, stop=(".",), max_tokens=8)
    assert (z, z.body, z.finish_reason, z.stop) == ("ab.", "ab", "stop", ".")
    open_ = text(A, B, stop=(".",), max_tokens=8)
    assert (open_.body, open_.finish_reason, open_.stop) == ("ab", None, None)
    full = text(A, B, stop=(".",), max_tokens=2)
    assert (full.body, full.finish_reason, full.stop) == ("ab", "length", None)


def test_a_join_has_not_closed():
    z = text(A, DOT, stop=(".",))
    joined = z + "b"
    assert (joined.body, joined.finish_reason, joined.stop) == ("a.b", None, None)


def test_joining_texts_of_two_tokenizers_suggests_str():
    other = Text("ba", (0, 1), OTHER)
    for join in (lambda: text(A) + other, lambda: other + text(A)):
        with pytest.raises(ValueError, match=r"different tokenizers.*str\(z\)"):
            join()
    assert (text(A) + str(other)).token_ids == (A, B, A)


def test_a_second_load_of_one_tokenizer_is_the_same_tokenizer():
    again = tiny_lm(["a", "b", "ab", "."], seed=5).vocabulary
    assert again is not VOCABULARY
    assert (text(A) + Text("b", (B,), again)).token_ids == (A, B)


@pytest.mark.parametrize("name", ["body", "parts", "token_ids", "finish_reason", "vocabulary", "x"])
def test_it_is_immutable(name):
    z = text(A, B)
    with pytest.raises(AttributeError):
        setattr(z, name, "other")
    with pytest.raises(AttributeError):
        delattr(z, name)


def test_copies_are_the_object_itself():
    z = text(A, B)
    assert copy.copy(z) is z and copy.deepcopy(z) is z
    assert copy.deepcopy({"z": [z]})["z"][0] is z  # Pyro copies traces and stores


def test_pickling_says_what_to_store_instead():
    with pytest.raises(TypeError, match="token_ids"):
        pickle.dumps(text(A))


def test_empty():
    z = Text("", (), VOCABULARY)
    assert not z and z.token_ids == () and z.parts == ((),)
    assert (z + "a").token_ids == (A,) and ("a" + z).token_ids == (A,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=4))
def test_a_join_of_texts_is_associative_and_concatenates(rows):
    texts = [text(*row) for row in rows]
    left = texts[0]
    for each in texts[1:]:
        left = left + each
    right = texts[-1]
    for each in reversed(texts[:-1]):
        right = each + right
    assert left == right == "".join(texts)
    assert left.token_ids == right.token_ids == tuple(t for row in rows for t in row)
