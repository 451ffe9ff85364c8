"""Masks that texts share if they have come to one state of a pattern's automaton: as without sharing."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from lmppl.constraints import Regex
from lmppl.lm.tokens.constraints.distance import Distance
from lmppl.lm.tokens.constraints.guidance import RegexState, found_in_states
from lmppl.testing import tiny_byte_lm, tiny_lm

KELVIN = "\u212a"  # whose small letter is k
VOCABULARY = tiny_lm([*"abkK1 .-@é٤", "ab", "a1", "1 ", "éa", "٤a", KELVIN]).vocabulary
# It spells U+0340, an accent that an automaton over bytes takes for a digit, for the sake of its size.
BYTES = tiny_byte_lm([b"\x80", b"\xcd", *(bytes([byte]) for byte in b"abkK1 .-@")]).vocabulary

SHARED = [
    r"( ?[a-z]+|[0-9]+)*@", r"\d+( - \d+)*\.", r"(ab?){2,4}é|k", r"(\d|b)a|.b", r"(?i)k+b", r"\w+ \w+",
    r"(\da|[^1]b)+", r"[\w--a]+", r"(?i)[é1]a|ab",
]  # fmt: skip
ALONE = [r"^ab|a1", r"(\p{Lowercase}|1)a|.b", r"(?i)[\u{17f}a]b|kb"]  # an s, but for its case


def walk(vocabulary, state, rng, length):
    """The tokens of a random text that a match may begin with."""
    for _ in range(length):
        yield state
        allowed = (state.mask() & vocabulary.text_tokens).nonzero().flatten().tolist()
        if not allowed:
            return
        state = state.after(vocabulary.token_bytes(rng.choice(allowed)))


@pytest.mark.parametrize("vocabulary", [VOCABULARY, BYTES], ids=["characters", "bytes"])
@pytest.mark.parametrize("pattern", [*SHARED, *ALONE])
def test_shared_masks_are_those_of_each_text(pattern, vocabulary, monkeypatch):
    shared = Regex(pattern).start(vocabulary)
    assert isinstance(shared, RegexState)
    rng = random.Random(0)
    for _ in range(60):
        for state in walk(vocabulary, shared, rng, 6):
            alone = copy.copy(state)
            vars(alone).pop("_bits", None)
            monkeypatch.setattr(alone, "_known", lambda what, find: find())
            assert torch.equal(state.mask(), alone.mask())
            vars(state).pop("goes_on", None)
            assert state.goes_on == alone.goes_on


@pytest.mark.parametrize("pattern", SHARED)
def test_texts_in_one_state_share_a_mask(pattern):
    distance = Distance.of(pattern, VOCABULARY)
    assert distance is not None and distance.is_exact_in_ascii


@pytest.mark.parametrize("pattern", [*ALONE, "(ab){3000}"])
def test_patterns_that_are_not_read_exactly_share_none(pattern):
    distance = Distance.of(pattern, VOCABULARY)
    assert distance is not None and not distance.is_exact_in_ascii


def test_a_mask_is_found_once_for_all_texts_in_a_state(monkeypatch):
    start = Regex("[ab]+@").start(VOCABULARY)
    first, second = start.after(b"a"), start.after(b"bab")
    assert first is not None and second is not None
    mask = first.mask()
    monkeypatch.setattr(second.matcher.__class__, "compute_bitmask", None, raising=False)
    assert second.mask() is mask


def test_few_masks_are_kept():
    state = Regex("[ab]{900}@").start(VOCABULARY)
    sizes = []
    for _ in range(700):
        state = state.after(b"a")
        state.mask()
        sizes.append(len(found_in_states))
    assert max(sizes) <= found_in_states.MOST and min(sizes[1:]) < sizes[0] + 10  # dropped once
