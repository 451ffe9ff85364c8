"""Programs with constraints, and who says what matches: nothing here that is given to the oracle knows
of llguidance or of masks.

``CASES`` are for engines; ``SMALL`` have so few choices that those of a sampler can be enumerated.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro import poutine

from lmppl import LM, lm_sample
from lmppl.constraints import Constraint, ConstraintState, Grammar, Regex
from lmppl.testing import Enumeration, Language, enumerate_program, tiny_byte_lm, tiny_lm
from lmppl.testing.programs import Case

LAWS = ("global", "local")


@dataclass(frozen=True, eq=False)
class ConstrainedCase(Case):
    """A program whose last argument is ``constrain``, under one of the two laws."""

    languages: Callable[[], dict] = dict
    model: Callable[[], LM] = lambda: letters()

    @property
    def lm(self) -> LM:
        return self.model()

    def enumerate(self) -> Enumeration:
        return _enumerated(self)

    __str__ = Case.__str__


@functools.cache
def _enumerated(case: ConstrainedCase) -> Enumeration:
    languages = _languages(case.languages)
    return enumerate_program(case.program, *case.args, lm=case.lm, languages=languages)


_languages = functools.cache(lambda languages: languages())


# --- what matches, known from elsewhere ---


def of_regex(pattern: str, pieces: str, longest: int = 8) -> Language:
    return Language.of_pieces(re.compile(pattern).fullmatch, pieces, longest)


def is_nested(text: str) -> bool:
    """``a`` in any number of parentheses."""
    return text == "a" or (text[:1] == "(" and text[-1:] == ")" and is_nested(text[1:-1]))


def is_balanced(text: str) -> bool:
    """One or several of: ``a``, and parentheses with such a text in them."""
    depth = 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return False
    return text != "" and depth == 0 and "()" not in text


def is_object(text: str) -> bool:
    """JSON of two fields without white space: ``a`` is 1 or 11, ``b`` true or false."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    is_it = isinstance(value, dict) and list(value) == ["a", "b"]
    is_it = is_it and str(value["a"]) in ("1", "11") and isinstance(value["b"], bool)
    return is_it and text == json.dumps(value, separators=(",", ":"))


# --- constraints of one's own ---


class NoDoubles(Constraint):
    """No letter twice in a row; ends in ``b``."""

    def allows(self, prefix):
        return re.search(r"(.)\1", prefix) is None

    def complete(self, text):
        return text.endswith("b")


class Short(Constraint):
    """At most two characters: every text that it allows is a match."""

    def allows(self, prefix):
        return len(prefix) <= 2


class EvenState(ConstraintState):
    """How often ``a`` has stood in a text."""

    def __init__(self, vocabulary, number=0):
        self._vocabulary, self._number = vocabulary, number

    def after(self, data):
        if set(data) - set(b"ab"):
            return None
        return EvenState(self._vocabulary, self._number + data.count(b"a"))

    @property
    def is_complete(self):
        return self._number % 2 == 0

    def mask(self):
        tokens = range(self._vocabulary.size)
        return torch.tensor([not set(self._vocabulary.token_bytes(t)) - set(b"ab") for t in tokens])


class EvenNumberOfA(Constraint):
    """An even number of ``a``, by states with a mask."""

    def start(self, vocabulary):
        return EvenState(vocabulary)


NO_DOUBLES, SHORT, EVEN = NoDoubles(), Short(), EvenNumberOfA()


# --- models ---


@functools.cache
def letters() -> LM:
    return tiny_lm(["a", "b", ".", "ab"], seed=3)


@functools.cache
def two_letters() -> LM:
    """``a``, ``b`` and EOS."""
    return tiny_lm("ab", seed=1)


@functools.cache
def parentheses() -> LM:
    return tiny_lm(["(", ")", "a", "a)"], seed=2)


@functools.cache
def json_pieces() -> LM:
    return tiny_lm(['{"', 'a":', "1", ',"b', '":', "true", "false}", "}", "11,"], seed=5)


@functools.cache
def byte_pieces() -> LM:
    return tiny_byte_lm(seed=4)


# --- programs ---


def alternatives(x, y, constrain):
    z = lm_sample("z", x, max_tokens=3, regex="a|ab|b(ab)*|bb+a", constrain=constrain)
    lm_sample("y", [x, z], obs=y)


def two_fields(x, y, constrain):
    fields = {"a": {"enum": [1, 11]}, "b": {"type": "boolean"}}
    schema = {
        "type": "object", "properties": fields, "required": ["a", "b"], "additionalProperties": False
    }  # fmt: skip
    z = lm_sample("z", x, max_tokens=8, json_schema=schema, constrain=constrain)
    lm_sample("y", z, obs=y)


NESTED = Grammar('start: "a" | "(" start ")"')
BALANCED = Grammar('start: item+\nitem: "a" | "(" start ")"')


def nested(x, y, constrain):
    """A recursive grammar that ``max_tokens`` cuts; a match is final."""
    z = lm_sample("z", x, max_tokens=4, constraint=NESTED, constrain=constrain)
    lm_sample("y", [x, z], obs=y)


def balanced(x, y, constrain):
    """A recursive grammar that ``max_tokens`` cuts; a match can go on."""
    z = lm_sample("z", x, max_tokens=4, constraint=BALANCED, constrain=constrain)
    lm_sample("y", [x, z], obs=y)


def predicate(x, y, constrain):
    z = lm_sample("z", x, max_tokens=3, stop=".", constraint=NO_DOUBLES, constrain=constrain)
    lm_sample("y", [x, z], obs=y)


def own_state(x, y, constrain):
    z = lm_sample("z", x, max_tokens=3, constraint=EVEN, constrain=constrain)
    lm_sample("y", [x, z], obs=y)


def second_of_three(x, y, constrain):
    """The constraint depends on what was drawn before; an observation and a free text follow."""
    k = lm_sample("k", x, choices=["a", "b"], temperature=2.0)
    z = lm_sample("z", [x, k], max_tokens=2, regex=f"{k}b*", constrain=constrain)
    lm_sample("y", [x, z], obs=y)
    lm_sample("w", [z, x], max_tokens=1)


def observed(x, y, constrain):
    """An observed text must match what was drawn; it goes on, or closes where nothing goes on."""
    z = lm_sample("z", x, max_tokens=2, stop=".")
    letter = "a" if "a" in z else "b"
    lm_sample("y", [x, z], max_tokens=4, regex=f"{letter}+b?", constrain=constrain, obs=y)
    lm_sample("w", [z, x], regex="ab|b*", constrain=constrain, obs="ab")


def stop_of_tokens(x, y, constrain):
    """A stop string that spans tokens, and begins with what a match may hold."""
    z = lm_sample("z", x, max_tokens=4, stop="b.a", regex="a+b?|b", constrain=constrain)
    lm_sample("y", [x, z], obs=y)


def stop_within_tokens(x, y, constrain):
    z = lm_sample("z", x, max_tokens=3, stop=["b", ".."], regex="a*|.b", constrain=constrain)
    lm_sample("y", [x, z], obs=y)


def tempered(x, y, constrain):
    with poutine.scale(scale=0.5):
        z = lm_sample(
            "z", x, max_tokens=3, regex="(ab)*a?", constrain=constrain, temperature=2.0
        )  # fmt: skip
    with poutine.scale(scale=2.0):
        lm_sample("y", [x, z], max_tokens=3, regex="b*", constrain=constrain, obs=y)


def characters(x, y, constrain):
    """Of two bytes each, which tokens split."""
    z = lm_sample("z", x, max_tokens=4, regex="[éa]+|è\\.", constrain=constrain)
    lm_sample("y", [x, z], obs=y)


def predicate_of_characters(x, y, constrain):
    z = lm_sample("z", x, max_tokens=3, constraint=SHORT, constrain=constrain)
    lm_sample("y", [x, z], obs=y)


def _cases(name, program, *args, languages, latents=("z",), model=letters):
    """A case under each law."""
    return [
        ConstrainedCase(
            f"{name}, {law}", program, (*args, law), latents, languages=languages, model=model
        )
        for law in LAWS
    ]


def _of_regexes(*patterns, pieces="ab", **sites):
    """What matches regular expressions, wherever they stand, and the constraints of sites."""
    return lambda: (
        {Regex(p): of_regex(p, pieces) for p in patterns}
        | {site: make() for site, make in sites.items()}
    )


CASES: dict[str, ConstrainedCase] = {
    case.name: case
    for case in [
        *_cases(
            "alternatives", alternatives, "ab", "b", languages=_of_regexes("a|ab|b(ab)*|bb+a")
        ),
        *_cases(
            "json", two_fields, '{"', "1", model=json_pieces,
            languages=lambda: {
                "z": Language.of_pieces(is_object, ['{"a":', "1", ',"b":', "true", "false", "}"], 6)
            },
        ),
        *_cases(
            "nested", nested, "(a", ")", model=parentheses,
            languages=lambda: {"z": Language.of_pieces(is_nested, "a()", 9)},
        ),
        *_cases(
            "balanced", balanced, "(a", ")", model=parentheses,
            languages=lambda: {"z": Language.of_pieces(is_balanced, "a()", 9)},
        ),
        *_cases(
            "predicate", predicate, "ab", "b",
            languages=lambda: {
                "z": Language.of_predicates(NO_DOUBLES.allows, NO_DOUBLES.complete)
            },
        ),
        *_cases(
            "own state", own_state, "ab", "b",
            languages=lambda: {
                "z": Language.of_pieces(lambda text: text.count("a") % 2 == 0, "ab", 9)
            },
        ),
        *_cases(
            "second of three", second_of_three, "ab", "b", latents=("k", "z", "w"),
            languages=_of_regexes("ab*", "bb*"),
        ),
        *_cases(
            "observed", observed, "ab", "ab", languages=_of_regexes("a+b?", "b+b?", "ab|b*")
        ),
        *_cases(
            "stop of tokens", stop_of_tokens, "ab", "b", languages=_of_regexes("a+b?|b")
        ),
        *_cases(
            "stop within tokens", stop_within_tokens, "ab", "b",
            languages=_of_regexes("a*|.b", pieces="ab."),
        ),
        *_cases(
            "tempered", tempered, "ab", "b", languages=_of_regexes("(ab)*a?", "b*")
        ),
        *_cases(
            "characters", characters, "a.", "a", model=byte_pieces,
            languages=lambda: {"z": of_regex("[éa]+|è\\.", "aéè.", 5)},
        ),
        *_cases(
            "predicate of characters", predicate_of_characters, "a.", "a", model=byte_pieces,
            languages=lambda: {"z": Language.of_predicates(SHORT.allows)},
        ),
    ]
}  # fmt: skip


# --- with few choices ---


def small_latent(x, y, constrain):
    """A match that goes on, and one that is final; a dead end (``b`` needs two more)."""
    z = lm_sample("z", x, max_tokens=2, regex="a?b|aa+|bbb", constrain=constrain, temperature=2.0)
    lm_sample("y", [x, z], obs=y)
    lm_sample("w", [z, x], choices=["a", "b"])


def small_two(x, y, constrain):
    """Two sites, of which the second depends on the first, with an observation between them."""
    z = lm_sample("z", x, max_tokens=2, regex="a|bb?", constrain=constrain, temperature=2.0)
    lm_sample("y", [x, z], obs=y)
    lm_sample("w", [z, x], max_tokens=1, regex="a*" if "a" in z else "[ab]*", constrain=constrain)


def small_predicate(x, y, constrain):
    z = lm_sample("z", x, max_tokens=2, constraint=NO_DOUBLES, constrain=constrain, temperature=2.0)
    lm_sample("y", [x, z], obs=y)
    lm_sample("w", [z, x], choices=["a", "b"])


def small_observed(x, y, constrain):
    """An observation that matches after some latents only."""
    z = lm_sample("z", x, max_tokens=1, temperature=2.0)
    form = {"a": "ab?", "b": "a*"}.get(z, "b+")
    lm_sample("y", [x, z], max_tokens=3, regex=form, constrain=constrain, obs=y)
    lm_sample("w", [z, x], max_tokens=1)


SMALL: dict[str, ConstrainedCase] = {
    case.name: case
    for case in [
        *_cases(
            "latent", small_latent, "ab", "a", model=two_letters, latents=("z", "w"),
            languages=_of_regexes("a?b|aa+|bbb"),
        ),
        *_cases(
            "two", small_two, "ab", "a", model=two_letters, latents=("z", "w"),
            languages=_of_regexes("a|bb?", "a*", "[ab]*"),
        ),
        *_cases(
            "predicate", small_predicate, "ab", "a", model=two_letters, latents=("z", "w"),
            languages=lambda: {
                "z": Language.of_predicates(NO_DOUBLES.allows, NO_DOUBLES.complete)
            },
        ),
        *_cases(
            "observed", small_observed, "ab", "a", model=two_letters, latents=("z", "w"),
            languages=_of_regexes("ab?", "a*", "b+"),
        ),
    ]
}  # fmt: skip
