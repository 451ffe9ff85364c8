"""Constrained texts: which there are, and what may come next, against brute force by Python's ``re``."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch

import lmppl
from lmppl import LMText, lm_sample
from lmppl.constraints import Constraint, ConstraintState, Regex
from lmppl.lm.tokens import matching
from lmppl.lm.tokens.constraints.constraint import split_characters
from lmppl.lm.tokens.stopping import Stopping
from lmppl.testing import tiny_byte_lm, tiny_lm
from lmppl.testing.naive import NaiveLM

TINY = tiny_lm(["a", "b", ".", "ab", "1", "b."], seed=3)
MOST = 4  # tokens

CASES = {  # a pattern, the matches that something extends, and stop strings
    "alternatives": ("a|ab|b1", lambda text: text == "a", None),
    "star": ("a*b?", lambda text: not text.endswith("b"), None),
    "stop": ("(ab)+", lambda text: True, "."),
    "stop of several tokens": ("[ab]+", lambda text: True, "b.1"),
    "stop within a token": ("a+|ab", lambda text: text != "ab", ["b.", "1"]),
    "stop in the pattern": (r"a\.?b*", lambda text: True, ".1"),
    "whole text": (r"a\.b1", lambda text: False, None),
}


def values(pattern, extends, stop):
    """Every value, by definition."""
    vocabulary, stops = TINY.vocabulary, [stop] if isinstance(stop, str) else list(stop or ())
    found, open_ids = set(), [()]
    while open_ids:
        ids = open_ids.pop()
        for token in range(vocabulary.size):
            new, text = (*ids, token), vocabulary.decode([*ids, token])
            starts = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
            if token in vocabulary.eos_ids:
                if re.fullmatch(pattern, vocabulary.decode(ids)):
                    found.add(new)
            elif starts:
                if re.fullmatch(pattern, text[: min(starts)[1]]):
                    found.add(new)
            elif re.fullmatch(pattern, text) and not extends(text):
                found.add(new)
            elif len(new) == MOST:
                if re.fullmatch(pattern, text):
                    found.add(new)
            else:
                open_ids.append(new)
    return found


@pytest.mark.parametrize("case", CASES)
def test_values_and_masks_are_those_of_the_definition(case):
    pattern, extends, stop = CASES[case]
    want = values(pattern, extends, stop)
    stopping = Stopping(TINY.vocabulary, stop, MOST, Regex(pattern))
    begun = {ids[:n] for ids in want for n in range(len(ids) + 1)}
    tokens = range(TINY.vocabulary.size)
    for length in range(MOST):
        for ids in itertools.product(tokens, repeat=length):
            state = stopping.start()
            if any(state.push(token) is not None for token in ids):
                continue
            steered = state.mask(steered=True).tolist()
            for token, allowed in enumerate(state.mask().tolist()):
                new = (*ids, token)
                assert stopping.is_value(new) == (new in want), new
                assert allowed == state.allows(token)
                # A mask may not see that no text comes to its end in time, or that a stop cuts it.
                assert allowed or new not in begun
                # Steering leaves out only what begins no value; without stop strings all of that.
                assert allowed >= steered[token] >= (new in begun)
                assert stop or steered[token] == (new in begun)


@pytest.mark.parametrize("case", CASES)
def test_densities_are_those_of_the_definition(case):
    pattern, extends, stop = CASES[case]
    naive, prefix = NaiveLM(TINY), TINY.encode("ab")
    want = {ids: float(naive.log_prob(prefix, ids).sum()) for ids in values(pattern, extends, stop)}

    def program():
        return lm_sample("z", "ab", max_tokens=MOST, stop=stop, regex=pattern)

    exact = lmppl.infer(program, lm=TINY, method="exact")
    nodes = [trace.nodes["z"] for trace in exact.traces]
    got = {node["fn"].token_ids(node["value"]): float(node["log_prob"]) for node in nodes}
    assert got == pytest.approx(want, abs=1e-5)
    log_z = float(torch.tensor(list(want.values()), dtype=torch.float64).logsumexp(0))
    assert exact.log_evidence == pytest.approx(log_z, abs=1e-5)
    fn = LMText(TINY, "ab", max_tokens=MOST, stop=stop, constraint=Regex(pattern))
    scores = fn.log_prob(torch.stack([fn.value(ids) for ids in want]))
    assert scores.tolist() == pytest.approx(list(want.values()), abs=1e-5)


def test_a_split_character_matches_as_a_whole():
    lm = tiny_byte_lm()
    for pattern, text, reason in (
        ("é+", "éé", None), ("[^a]", "è", "constraint"), ("a.?", "aé", "constraint")
    ):  # fmt: skip
        stopping = Stopping(lm.vocabulary, (), 8, Regex(pattern))
        state = stopping.start()
        for token in lm.vocabulary.encode(text):
            assert state.mask()[token]
            state.push(token)
        assert state.reason == reason
        assert reason or state.mask()[lm.vocabulary.eos_id]


def test_the_place_of_a_mismatch_is_said():
    stopping = Stopping(TINY.vocabulary, (), 8, Regex("ab1"))
    assert "character 2" in stopping.mismatch(TINY.vocabulary.encode("aa1"))
    assert "ends before" in stopping.mismatch(TINY.vocabulary.encode("ab"))
    assert stopping.mismatch(TINY.vocabulary.encode("ab1")) == ""


def test_an_observation_that_does_not_match_has_probability_zero():
    def program(pattern):
        lm_sample("z", "a", max_tokens=2)
        lm_sample("y", "ab", max_tokens=4, regex=pattern, obs="ab1")

    posterior = lmppl.infer(program, "a.*", lm=TINY, method="importance", num_samples=4, seed=0)
    assert posterior.log_evidence > -math.inf
    with pytest.raises(lmppl.ZeroEvidenceError, match="'y'"):
        lmppl.infer(program, "b.*", lm=TINY, method="importance", num_samples=4, seed=0)


@pytest.mark.parametrize("stop", [None, ".1"])
def test_an_observation_too_short_for_any_match_has_probability_zero(stop):
    """No error, as the pattern may depend on latents. (Without ``max_tokens`` the site is as long
    as its observation.)"""

    def program():
        z = lm_sample("z", "a", max_tokens=1)
        lm_sample("y", "b", regex="a{6}" if z == "a" else "a+", stop=stop, obs="a" + (stop or ""))

    posterior = lmppl.infer(program, lm=TINY, method="exact")
    assert posterior.log_evidence > -math.inf and "a" not in posterior.probs("z")


def test_what_is_remembered_of_all_constraints_has_a_limit(monkeypatch):
    most = 200 * 2 * TINY.vocabulary.size  # bytes, of the two masks of 200 texts
    monkeypatch.setattr(matching, "_MOST_BYTES", most)
    stoppings = [Stopping(TINY.vocabulary, (), 9, Regex(f"[ab]*{end}")) for end in ("1", "11")]
    held = []
    for ids in itertools.product(range(2), repeat=8):
        for stopping in stoppings:
            state = stopping.start()
            for token in ids:
                state.push(token)
        held.append(sum(stopping.matching.remembered_bytes for stopping in stoppings))
    assert max(held) < 2 * most
    assert min(held[len(held) // 2 :]) < most / 2  # it was dropped, also of the other constraint


class OneOf(Constraint):
    """One of some texts."""

    def __init__(self, texts):
        self.texts = texts

    def allows(self, prefix):
        return any(text.startswith(prefix) for text in self.texts)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_copy_with_other_attributes_is_another_constraint(kind):
    first = OneOf(kind(["a"]))
    assert first == first and hash(first) == hash(first)  # from now on its key is known
    second = copy.copy(first)
    second.texts = kind(["b"])
    assert first != second
    assert (
        not Stopping(TINY.vocabulary, (), 1, second).start().allows(TINY.vocabulary.encode("a")[0])
    )
    assert (OneOf(("a",)) == OneOf(("a",))) and (OneOf(["a"]) != OneOf(["a"]))


class OneText(ConstraintState):
    """The one text of ``Bytes``, which is no UTF-8."""

    def __init__(self, text=b""):
        self.text = text

    def after(self, data):
        text = self.text + data
        return OneText(text) if b"\xffa".startswith(text) else None

    @property
    def is_complete(self):
        return self.text == b"\xffa"

    def mask(self):
        return torch.ones(3).bool()


class Bytes(Constraint):
    """By states, over any bytes."""

    def start(self, vocabulary):
        return OneText()


def test_a_text_of_any_byte_may_match():
    vocabulary = tiny_byte_lm([b"a", b"\xff"]).vocabulary
    assert Stopping(vocabulary, (), 3, Bytes()).is_value([1, 0, vocabulary.eos_id])


def test_what_can_begin_a_text_is_what_begins_a_character():
    points = itertools.chain(range(0x80, 0xD800), range(0xE000, 0x110000))
    characters = (chr(point).encode() for point in points)
    begun = {data[:length] for data in characters for length in range(1, len(data))}
    for data in (bytes(pair) for pair in itertools.product(range(256), repeat=2)):
        for length in (0, 1, 2):
            whole, rest = data[: 2 - length], data[2 - length :]
            if (not rest or rest in begun) and (text := _decoded(whole)) is not None:
                assert split_characters(data) == (text, rest)
                break
        else:
            assert split_characters(data) == (None, b"")


def _decoded(data):
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
