"""Tokens to text and back, for every family of tokenizers."""

import copy
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_families import FAMILIES, byte_level, characters, sentencepiece, vocabulary_of
from transformers import ByT5Tokenizer

from lmppl.lm.tokens.vocabulary import Vocabulary

CONCATENATING = [name for name in FAMILIES if name != "collapsing"]


@cache
def vocabulary(family: str) -> Vocabulary:
    if family == "python_bytes":
        return vocabulary_of(ByT5Tokenizer())
    return vocabulary_of(FAMILIES[family]())


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_recognised(family: str) -> None:
    assert vocabulary(family).concatenates == (family != "collapsing")


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece", "sentencepiece_legacy"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12))
def test_round_trip_of_any_text(family: str, text: str) -> None:
    v = vocabulary(family)
    assert v.decode(v.encode(text)) == text


@given(text=st.text("ab. é", max_size=12))
def test_round_trip_of_characters(text: str) -> None:
    v = vocabulary("characters")
    assert v.decode(v.encode(text)) == text


@pytest.mark.parametrize("family", CONCATENATING)
@given(data=st.data())
def test_decoding_concatenates_bytes(family: str, data: st.DataObject) -> None:
    v = vocabulary(family)
    ids = data.draw(st.lists(st.integers(0, v.size - 1), max_size=8))
    joined = b"".join(v.token_bytes(t) for t in ids)
    assert v.decode(ids) == joined.decode(errors="replace")


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_decoding_is_that_of_the_tokenizer_in_context(family: str, data: st.DataObject) -> None:
    v = vocabulary(family)
    specials = set(v.tokenizer.all_special_ids)
    ordinary = [t for t in range(len(v.tokenizer)) if t not in specials]
    ids = data.draw(st.lists(st.sampled_from(ordinary), max_size=8))
    if "\ufffd" in v.decode(ids):
        return  # families differ in how many marks a broken character gets
    front = v.encode("the" if family in ("spaced_words", "word_pieces") else "a")[0]
    decode = v.tokenizer.decode
    head = decode([front], clean_up_tokenization_spaces=False)
    whole = decode([front, *ids], clean_up_tokenization_spaces=False)
    assert whole == head + v.decode(ids)


@pytest.mark.parametrize("family", ["sentencepiece", "sentencepiece_legacy"])
def test_a_continuation_gets_no_space_and_no_bos(family: str) -> None:
    v = vocabulary(family)
    the, space_the = v.tokenizer.convert_tokens_to_ids(["the", "▁the"])
    assert v.encode("the") == (the,)
    assert v.encode(" the") == (space_the,)
    # At the front, the tokenizer's own way of starting a text.
    assert v.encode_prefix(["the", "the"]) == (1, space_the, the)
    assert v.encode_prefix([(the,), "the"]) == (1, the, the)
    assert tuple(v.tokenizer("the").input_ids) == v.encode_prefix(["the"])


def test_byte_level_prefix_space_is_dropped_in_continuations() -> None:
    v = vocabulary_of(byte_level(prefix_space=True))
    assert v.decode(v.encode("the")) == "the"
    assert v.decode(v.encode_prefix(["the", "the"])) == " thethe"


def test_encoding_leaves_the_tokenizer_as_it_was() -> None:
    tokenizer = sentencepiece()
    before = tokenizer.backend_tokenizer.to_str()
    v = vocabulary_of(tokenizer)
    v.encode("the")
    v.decode([4, 5])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_bos_is_found_and_an_appended_eos_is_not() -> None:
    v = vocabulary("characters")
    assert v.bos_ids == (v.tokenizer.bos_token_id,)
    assert v.encode_prefix(["ab", "a"]) == (*v.bos_ids, 0, 1, 0)
    assert v.encode_prefix([]) == v.encode_prefix([""]) == v.bos_ids
    assert vocabulary("byte_level").bos_ids == ()
    assert vocabulary("byte_level").encode_prefix([""]) == ()


def test_a_first_part_that_brings_its_bos_gets_no_second() -> None:
    v = vocabulary("sentencepiece")
    assert v.encode_prefix(["<s>the"])[:2] != (1, 1)
    assert v.encode_prefix(["<s>the"])[0] == 1
    assert v.encode_prefix([(1, 5)]) == (1, 5)


def test_parts_are_tokenised_separately() -> None:
    v = vocabulary("byte_level")
    assert len(v.encode("the")) == 1
    assert v.encode_prefix(["t", "he"]) == v.encode("t") + v.encode("he") != v.encode("the")


def test_special_tokens_are_kept_in_text() -> None:
    v = vocabulary("byte_level")
    (eos,) = v.eos_ids
    assert v.decode([eos]) == "<eos>"
    assert v.encode("a<eos>")[-1] == eos


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    v = vocabulary("byte_level")
    beyond = len(v.tokenizer)
    assert v.token_bytes(beyond) == b""
    assert v.decode([beyond, *v.encode("a"), beyond + 1]) == "a"
    with pytest.raises(ValueError, match="padding"):
        v.decode([-1])


def test_split_characters() -> None:
    v = vocabulary("byte_level")
    ids = v.encode("🙂é")
    assert len(ids) > 2
    assert "\ufffd" in v.decode(ids[:1])
    assert v.decode(ids) == "🙂é"


@given(text=st.text(max_size=12))
def test_a_tokenizer_written_in_python(text: str) -> None:
    v = vocabulary("python_bytes")
    assert v.concatenates and v.bos_ids == ()
    assert v.decode(v.encode(text)) == text


def test_eos_ids() -> None:
    tokenizer = characters()
    assert Vocabulary(tokenizer, [0, 5], 7).eos_id == 5  # the tokenizer's own
    assert Vocabulary(tokenizer, [1, 0], 7).eos_id == 0
    assert Vocabulary(tokenizer, [], 7).eos_id is None
    with pytest.raises(ValueError, match="outside"):
        Vocabulary(tokenizer, [7], 7)


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match="cannot encode 'xyz'"):
        vocabulary("characters").encode("xyz")
    small = Vocabulary(characters(), [], 3)
    with pytest.raises(ValueError, match="resize its embeddings"):
        small.encode("aé")


def test_identity() -> None:
    one, two = vocabulary_of(byte_level()), vocabulary_of(byte_level(), unused=9)
    assert one.fingerprint == two.fingerprint
    assert one.same_as(two) and one.same_as(one)
    assert not one.same_as(vocabulary("characters"))
    assert copy.deepcopy(one) is one
