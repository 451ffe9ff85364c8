"""What llguidance takes for a match, for the beginning of one, and for the end of all: against brute
force over short texts. And where it reads a grammar otherwise than its rules alone would say."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from lmppl.constraints import Grammar, JsonSchema, Regex
from lmppl.testing import Language, tiny_byte_lm

VOCABULARY = tiny_byte_lm([bytes([byte]) for byte in range(32, 127)]).vocabulary


def judged(constraint, text):
    """Whether a match begins so, whether it is one, and whether nothing extends it."""
    start = constraint.start(VOCABULARY)
    state = start.after(text.encode()) if text else start
    return (
        state is not None,
        state is not None and state.is_complete,
        bool(state and state.is_final),
    )


def wrong(constraint, language, texts):
    """The texts that are judged otherwise than by the definition."""
    found = {}
    for text in texts:
        data = text.encode()
        is_match = language.matches(data)
        want = language.begins(data), is_match, is_match and not language.extends(data)
        if judged(constraint, text) != want:
            found[text] = judged(constraint, text), want
    return found


def fullmatch(pattern):
    return re.compile(pattern).fullmatch


def is_halved(text):
    half = len(text) // 2
    return text == "a" * half + "b" * half


def is_palindrome(text):
    return text == text[::-1] and text.count("b") == len(text) % 2 == 1


_GRAMMARS = [
    (Regex("^a+$|(?i)B"), fullmatch("a+|b|B")),
    (Regex("(a|b)*?b"), fullmatch("[ab]*b")),
    (Regex("a&b|[a&&[^b]]a"), fullmatch("a&b|aa")),
    (Grammar('start: "a" "a"*'), fullmatch("a+")),
    (Grammar('start: "a"{2,3} | "b"'), fullmatch("aa|aaa|b")),
    (Grammar("start: /a*/ /b*/"), fullmatch("a*b*")),
    (Grammar('start: "a" | start start'), fullmatch("a+")),
    (Grammar('start: x\nx: x "a" | "a"'), fullmatch("a+")),
    (Grammar('start: "a" start "a" | "b"'), is_palindrome),
    (Grammar('start: "a" start "b" | "ab"'), lambda text: text != "" and is_halved(text)),
    (Grammar("start: X\nX: /[ab]+/ & /.{2}/"), fullmatch("[ab]{2}")),
    (Grammar("start: X\nX: /[ab]*/ & ~/.*aa.*/"), lambda text: "aa" not in text),
    (Grammar('start: word ("a" | "bb")\nword[lazy]: /[ab]*b/'), fullmatch("a*b(a|bb)")),
    (Grammar('start: "a" %json {"enum": ["a", "b"]}'), fullmatch('a"[ab]"')),
]  # fmt: skip


@pytest.mark.parametrize(
    ("constraint", "matches"), _GRAMMARS, ids=[repr(constraint)[:50] for constraint, _ in _GRAMMARS]
)
def test_short_texts_are_judged_by_the_definition(constraint, matches):
    pieces = ["a", "b", "&", "B"] if isinstance(constraint, Regex) else ["a", "b"]
    pieces = [*pieces, '"'] if "json" in repr(constraint) else pieces
    language = Language.of_pieces(matches, pieces, 6 if len(pieces) > 3 else 9)
    texts = ["".join(t) for n in range(5) for t in itertools.product(pieces, repeat=n)]
    assert not wrong(constraint, language, texts)


def compact(value):
    return json.dumps(value, separators=(",", ":"))


_FIELDS = {
    "a": {"enum": [1, 12, None]},
    "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
}
_LISTS = [list(v) for n in range(3) for v in itertools.product([True, False], repeat=n)]
_OBJECT = {"type": "object", "properties": _FIELDS, "additionalProperties": False}
_SCHEMAS = [
    ({"type": "integer", "minimum": -3, "maximum": 12}, [*range(-3, 13), "-0"]),
    ({"anyOf": [{"const": "a"}, {"type": "null"}, {"const": [1, "x"]}]}, ["a", None, [1, "x"]]),
    (
        {**_OBJECT, "required": ["b"]},
        [a | {"b": b} for a in ({"a": 1}, {"a": 12}, {"a": None}, {}) for b in _LISTS],
    ),
    (
        {**_OBJECT, "required": ["a"]},
        [{"a": a} | b for a in (1, 12, None) for b in ({}, *({"b": b} for b in _LISTS))],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "values"), _SCHEMAS, ids=[repr(schema)[:50] for schema, _ in _SCHEMAS]
)
def test_json_is_judged_by_the_definition(schema, values):
    documents = ["-0" if value == "-0" else compact(value) for value in values]
    begun = {text[:length] for text in documents for length in range(1, len(text) + 1)}
    changed = {text[:-1] + new for text in begun for new in '0123456789"{}[],:abtfnel-. '}
    longer = {text + new for text in documents for new in '0e.,"} '}
    texts = sorted(begun | changed | longer)
    assert not wrong(JsonSchema(schema), Language.of_texts(documents), texts)


# --- where a grammar is not only its rules: docs/constraints.md says so ---

_AS_LEXED = [
    # Terminals take as much as they can.
    ('start: A A\nA: /a+/', "aa", (True, False, False)),
    ('start: A "b"\nA: /[ab]+/', "ab", (True, False, False)),
    # Ignored text stands between terminals.
    ('start: "a" "b"\n%ignore " "', "a b", (True, True, True)),
    ('start: "a" "b"\n%ignore " "', " a", (False, False, False)),
    ('start: "a" "b"\n%ignore " "', "ab ", (False, False, False)),
    # A complement goes on by bytes that are no text.
    ("start: X\nX: ~/(?s:.)*aa(?s:.)*/", "aa", (True, False, False)),
    # Rules that never end are not noticed: this match is final.
    ('start: "a" | "a" z\nz: "c" z', "a", (True, True, False)),
    ('start: "a" | "a" z\nz: "c" z', "acc", (True, False, False)),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "text", "expected"), _AS_LEXED)
def test_a_grammar_is_read_with_a_lexer(grammar, text, expected):
    assert judged(Grammar(grammar), text) == expected


def test_white_space_in_json():
    schema = {**_OBJECT, "required": ["a"]}
    for text, is_match in (('{"a": 1}', True), ('{ "a" :1}', True), ('{"a":1} ', False)):
        assert judged(JsonSchema(schema, whitespace=True), text)[1] == is_match
        assert not judged(JsonSchema(schema), text)[1]
    assert judged(JsonSchema(schema), '{"a":1}')[1]


def test_options_of_llguidance_may_stand_in_a_schema():
    schema = {"oneOf": [{"const": 1}, {"const": 2}]}
    with pytest.raises(ValueError, match="coerce_one_of"):
        JsonSchema({"oneOf": [{"type": "integer"}, {"type": "number"}]})
    assert judged(JsonSchema({**schema, "x-guidance": {"coerce_one_of": True}}), "2")[1]


def test_a_limit_of_llguidance_is_no_mismatch():
    """A grammar that reads a text in more ways than llguidance follows."""
    rules = [f'r{i}: s r{(i + 1) % 30} | r{(i + 7) % 30} s | "a"' for i in range(30)]
    names = " | ".join(f"r{i}" for i in range(30))
    state = Grammar("\n".join([f"start: s\ns: {names}", *rules])).start(VOCABULARY)
    with pytest.raises(ValueError, match="llguidance gave up on a constraint: .*max is 2000"):
        for _ in range(40):
            state = state.after(b"a")
            assert state is not None
