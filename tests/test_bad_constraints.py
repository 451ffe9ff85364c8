"""Bad constraints: the message names the site, what was given, and what to do."""

from __future__ import annotations

import json
import re

import numpy as np
import pydantic
import pytest
import torch
from tokenizers import decoders

import lmppl
from lmppl import lm_sample
from lmppl.constraints import Constraint, ConstraintState
from lmppl.testing import tiny_lm
from lmppl.testing.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.* is asked about every token")

LM = tiny_lm(["a", "b", ".", "ab"], seed=0, context_length=32)


def infer(method="importance", lm=LM, **arguments):
    """Run a program whose site ``z`` has these arguments."""
    if not {"choices", "max_tokens"} & set(arguments):
        arguments["max_tokens"] = 3

    def program():
        lm_sample("x", "a", choices=["a", "b"])
        return lm_sample("z", "ab", **arguments)

    return lmppl.infer(program, lm=lm, method=method, num_samples=4, seed=0, progress=False)


# --- broken in themselves ---


class Model(pydantic.BaseModel):
    a: int


_BROKEN = [
    ({"regex": "[a&&b]"}, ValueError, r"site 'z': regex='\[a&&b\]' matches nothing"),
    ({"regex": ""}, ValueError, "regex='' matches only the empty text"),
    ({"regex": "()|$"}, ValueError, "matches only the empty text"),
    (
        {"regex": "ab("},
        ValueError,
        r"site 'z': regex='ab\(': .*\n    ab\(\n      \^\nerror: unclosed",
    ),
    ({"regex": "(?=a)b"}, ValueError, "look-around, .* is not supported"),
    ({"regex": r"(a)\1"}, ValueError, "backreferences are not supported"),
    ({"regex": "a\\"}, ValueError, "backslash with nothing after it, at character 2"),
    ({"regex": "(?x)a\n b"}, ValueError, "must stand in one line"),
    ({"regex": re.compile("a")}, TypeError, r"regex takes a string, given Pattern .*its \.pattern"),
    ({"regex": "x+"}, ValueError, "the model can't spell any"),
    ({"regex": "ax"}, ValueError, "no tokens of the vocabulary make up a match"),
    ({"json_schema": {"type": "nope"}}, ValueError, r"'type': 'nope'}: Invalid type: nope"),
    (
        {"json_schema": {"uniqueItems": True}},
        ValueError,
        r'}: Unimplemented keys: \["uniqueItems"\]',
    ),
    (
        {"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}},
        ValueError,
        r"minimum \(5\) is greater than maximum \(3\)",
    ),
    ({"json_schema": "{"}, ValueError, "json_schema='{' is no JSON: .* line 1 column 2"),
    ({"json_schema": [1]}, TypeError, r"a dict, a string of JSON or a pydantic model, given list"),
    ({"json_schema": {"enum": {1}}}, TypeError, "can't be written as JSON: .* set"),
    ({"json_schema": Model(a=1)}, TypeError, "model's class, given an instance .*: give Model"),
    ({"json_schema": Model}, ValueError, "can't spell any"),
    (
        {"grammar": 'start: "a" |\nfoo bar'},
        ValueError,
        "'z': grammar=.*: line 2, column 5: Expected",
    ),
    ({"grammar": 'start: "a" x'}, ValueError, 'line 1, column 8: unknown name: "x"'),
    ({"grammar": 'first: "a"'}, ValueError, "no start rule"),
    ({"grammar": "start: start"}, ValueError, "matches nothing"),
    (
        {"grammar": 'start: x\nx[max_tokens=3]: "a"'},
        ValueError,
        "line 2 has 'max_tokens=', .*tokens",
    ),
    ({"grammar": 'start: "a" <[5]>'}, ValueError, r"line 1 has '<\[5\]>'"),
    ({"grammar": b"start: A"}, TypeError, "grammar takes a Lark grammar as a string, given bytes"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), _BROKEN)
def test_a_constraint_that_is_broken(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        infer(**arguments)
    assert "%llguidance" not in str(caught.value) and "x-guidance" not in str(caught.value)


def test_a_grammar_may_spell_what_would_speak_of_tokens():
    text = 'start: "<a>" | /max_tokens=b/ | "a"  // stop="b"\n# <[5]>'
    assert infer(grammar=text).log_evidence < 0


def test_a_message_repeats_the_beginning_of_a_long_grammar():
    with pytest.raises(
        ValueError, match=r"grammar='start: \"aaa.*\.\.\.: line 1, column"
    ) as caught:
        infer(grammar=f'start: "{"a" * 1000}" x')
    assert len(str(caught.value).splitlines()[0]) < 250


@pytest.mark.parametrize("stop", [None, "."])
def test_too_few_tokens_for_any_match(stop):
    with pytest.raises(
        ValueError, match="site 'z': max_tokens=3 is too small .* at least 4 tokens"
    ):
        infer(regex="b{4}|a{5}b", stop=stop)
    assert infer(regex="b{3}|a{5}b", stop=stop).log_evidence < 0


# --- beside other arguments ---


class Short(Constraint):
    def allows(self, prefix):
        return len(prefix) < 2


_BESIDE = [
    ({"regex": "a", "choices": ["a", "b"]}, ValueError, "regex beside choices: .* Drop regex"),
    (
        {"regex": "a", "json_schema": {}},
        ValueError,
        "regex and json_schema are given.*one constraint",
    ),
    ({"grammar": "x", "constraint": Short()}, ValueError, "grammar and constraint are given"),
    (
        {"constraint": lambda text: True},
        TypeError,
        r"given function .*its method allows\(self, prefix\)",
    ),
    ({"constraint": Short}, TypeError, r"given type .*: give an object of it, as Short\(\)"),
    ({"constraint": "a+"}, TypeError, r"given str \('a\+'\): a regular expression goes to regex="),
    ({"constraint": 3}, TypeError, r"given int \(3\): make a subclass"),
    (
        {"regex": "a", "constrain": "globl"},
        ValueError,
        "constrain='globl', .* did you mean 'global'",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), _BESIDE)
def test_beside_other_arguments(arguments, error, message):
    with pytest.raises(error, match=f"site 'z': .*{message}"):
        infer(**arguments)


def test_a_tokenizer_whose_texts_are_not_the_bytes_of_their_tokens():
    tokenizer = tiny_tokenizer("ab")
    tokenizer.backend_tokenizer.decoder = decoders.CTC()
    lm = lmppl.LM(tiny_model(len(tokenizer), eos_token_id=2), tokenizer, name="words")
    with pytest.raises(
        ValueError, match="site 'z': regex needs a tokenizer whose texts are the bytes"
    ):
        infer(lm=lm, regex="a+")


# --- constraints of one's own ---


class Raises(Constraint):
    def allows(self, prefix):
        if len(prefix) > 1:
            raise KeyError("e4")
        return True


class ReturnsMatch(Constraint):
    def allows(self, prefix):
        return re.match("a", prefix)


class Forgets(Constraint):
    def allows(self, prefix):
        return True

    def complete(self, text):
        text.endswith("b")


class Nothing(Constraint):
    pass


class State(ConstraintState):
    """Allows everything, by the mask that is given."""

    def __init__(self, mask, following):
        self._mask, self._following = mask, following

    def after(self, data):
        return self if self._following == "itself" else self._following

    @property
    def is_complete(self):
        return True

    def mask(self):
        return self._mask


class ByState(Constraint):
    def __init__(self, state):
        self.state = state

    def start(self, vocabulary):
        return self.state


def by_mask(mask, following="itself"):
    return ByState(State(mask, following))


ALL = torch.ones(LM.vocabulary.size, dtype=torch.bool)
_OWN = [
    (
        ReturnsMatch(),
        TypeError,
        r"ReturnsMatch.allows\(''\) returned None, .* must return True or False",
    ),
    (Forgets(), TypeError, r"Forgets.complete\(.*\) returned None"),
    (Nothing(), TypeError, r"site 'z': Nothing defines neither allows\(self, prefix\) nor start"),
    (by_mask(ALL[:3]), ValueError, r"State.mask\(\) returned a mask of shape \(3,\).*shape \(5,\)"),
    (by_mask(ALL.float()), TypeError, r"State.mask\(\) returned a tensor of torch.float32: .*bool"),
    (
        by_mask(ALL.tolist()),
        TypeError,
        r"State.mask\(\) returned list: .*bool tensor of shape \(5,\)",
    ),
    (by_mask(ALL, following=True), TypeError, r"State.after\(\) returned True, .*ConstraintState"),
    (ByState(3), TypeError, r"site 'z': ByState.start\(\) returned 3, .*ConstraintState"),
]


@pytest.mark.parametrize("method", ["exact", "importance"])
@pytest.mark.parametrize(("constraint", "error", "message"), _OWN)
def test_a_constraint_of_ones_own(constraint, error, message, method):
    with pytest.raises(error, match=message) as caught:
        infer(method, constraint=constraint)
    assert "site 'z'" in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


@pytest.mark.parametrize("constrain", ["global", "local"])
@pytest.mark.parametrize("obs", [None, "abb"])
@pytest.mark.parametrize("method", ["exact", "importance", "smc"])
def test_a_predicate_that_raises(method, obs, constrain):
    with pytest.raises(KeyError, match="e4") as caught:
        infer(method, constraint=Raises(), constrain=constrain, obs=obs)
    notes = "\n".join(caught.value.__notes__)
    assert re.search(r"raised by Raises.allows\('..+'\)", notes)
    assert "site 'z'" in notes


def test_a_predicate_that_raises_an_error_with_arguments_of_its_own():
    class Parses(Constraint):
        def allows(self, prefix):
            return bool(json.loads(prefix))

    with pytest.raises(json.JSONDecodeError) as caught:
        infer(constraint=Parses())
    assert "raised by Parses.allows(''), which must return True or False" in caught.value.__notes__
    assert "raised at site 'z'" in caught.value.__notes__


def test_a_predicate_may_return_a_bool_of_numpy():
    class Odd(Constraint):
        def allows(self, prefix):
            return np.equal(len(prefix) % 1, 0)

    assert infer(constraint=Odd()).log_evidence == pytest.approx(0, abs=1e-5)


# --- nothing matches: that is no error of the program, but probability zero, and why is said ---


class Never(Constraint):
    def allows(self, prefix):
        return False


_DEAD = [
    ({"constraint": Never()}, r"'z' \(\d\)\. 'z', the first time: nothing matches Never\(\)"),
    ({"grammar": "start: A A\nA: /b+/"}, r"ends before it matches Grammar\(.*\): '\w*'"),
    (
        {"regex": "a+", "obs": "ab"},
        r"matching Regex\('a\+'\) at character 2: after 'a' comes 'b'\.",
    ),
    ({"regex": "a+b", "obs": "aa"}, r"ends before it matches Regex\('a\+b'\): 'aa'"),
    (
        {"regex": "ab|a", "obs": "abb"},
        r"'abb' goes on after a match of Regex\('ab\|a'\) that nothing extends",
    ),
    ({"regex": "a+", "stop": ".", "obs": "."}, r"ends before it matches Regex\('a\+'\): '\.'"),
]


@pytest.mark.parametrize("method", ["exact", "importance", "smc"])
@pytest.mark.parametrize(("arguments", "message"), _DEAD)
def test_what_cannot_match_has_probability_zero(arguments, message, method):
    with pytest.raises(lmppl.ZeroEvidenceError, match=message) as caught:
        infer(method, **{"max_tokens": 4} | arguments)
    assert set(caught.value.posterior.reasons) == {"z"}
