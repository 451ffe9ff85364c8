"""llguidance's masks by slices of the vocabulary are those of asking about each token."""

from __future__ import annotations

import random

import pytest

from lmppl.constraints import Constraint, Grammar, JsonSchema, Regex
from lmppl.testing import tiny_lm

TOKENS = [*'aZ1 .,{}:"', "ab", "abc", "Abc", " ab", " Ab", "ab1", '":', "a" * 31, "Z" * 31, ". "]
CONSTRAINTS = [
    Regex(r"( ?([A-Z][a-z]*|[a-z]+|[0-9]+)[,.]?)*"),
    Regex(r"[a-z]{2,31}1?"),
    Regex(r"[A-Za-z]{3,30}"),
    Regex(r"([A-Z][a-z]+( [a-z]+)*\. )+"),
    Regex(r"(?s)a.{5,40}Z"),
    JsonSchema({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}),
    Grammar('start: e\ne: /[a-z]+/ | " " e | e "." e'),
]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
def test_masks_are_what_each_token_says(constraint: Constraint) -> None:
    vocabulary = tiny_lm(TOKENS).vocabulary
    generator = random.Random(0)
    seen = set()
    for _ in range(12):
        state = constraint.start(vocabulary)
        for _ in range(16):
            assert state is not None
            following = {
                token: after
                for token in vocabulary.text_tokens.nonzero().flatten().tolist()
                if (after := state.after(vocabulary.token_bytes(token))) is not None
            }
            allowed = state.mask() & vocabulary.text_tokens
            assert allowed.nonzero().flatten().tolist() == list(following)
            seen.add(len(following))
            if not following:
                break
            state = following[generator.choice(list(following))]
    assert max(seen) > 0 and min(seen) < len(TOKENS)
