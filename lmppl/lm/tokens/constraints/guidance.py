"""Regular expressions, JSON schemas and grammars, by llguidance (MIT).

llguidance knows tokens by their bytes. It is given the distinct ones among the model's tokens, a token
for each of the 256 bytes, so that a text can be read in any pieces, and an EOS, which stands for all
of the model's. A matcher is copied before it reads on (in a microsecond), so states never change.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lmppl.lm.tokens.constraints.constraint import Constraint, ConstraintState
from lmppl.lm.tokens.vocabulary import Vocabulary

# llguidance keeps the tokens that match each of these, and where a text may go on by any of them it need
# not walk through them. Beside its own, which suit strings in JSON, words: a mask of a regular
# expression over 49,152 tokens then takes 0.01 ms instead of 0.4.
_WORDS = (r"[a-z]{1,30}", r" ?[A-Za-z]{1,30}")


class GuidanceConstraint(Constraint):
    """A constraint that llguidance checks.

    Raises:
        ValueError: it is none; says where.
    """

    is_lazy = False

    def __init__(self, given: Any, grammar: str) -> None:
        from llguidance import LLMatcher  # when a constraint is wanted

        self._given = given
        # Else a stretch that is certain could only be written in the tokens that llguidance prefers.
        self._grammar = f'{grammar}\n%llguidance {{"no_forcing": true}}'
        self._starts: WeakKeyDictionary[Vocabulary, GuidanceState] = WeakKeyDictionary()
        is_error, messages = LLMatcher.validate_grammar_with_warnings(self._grammar)
        if is_error:
            raise ValueError(f"{self.name}={given!r}: {messages[0].strip()}")

    @property
    def key(self) -> Hashable:
        return type(self), self._grammar

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._given!r})"

    def start(self, vocabulary: Vocabulary) -> GuidanceState:
        found = self._starts.get(vocabulary)
        if found is None:
            found = self._starts[vocabulary] = self._start(vocabulary)
        return found

    def _start(self, vocabulary: Vocabulary) -> GuidanceState:
        from llguidance import LLMatcher

        tokens = _tokens_of(vocabulary)
        state = GuidanceState(LLMatcher(tokens.tokenizer, self._grammar, log_level=0), tokens)
        what = f"{self.name}={self._given!r}"
        if state.error:
            raise ValueError(f"{what}: {state.error}")
        if not state.goes_on:
            only = "matches only the empty text" if state.is_complete else "matches nothing"
            raise ValueError(f"{what} {only}, so no text of a site can match it")
        if not bool((state.mask() & vocabulary.text_tokens).any()) and not state.is_complete:
            raise ValueError(
                f"{what}: no token of the vocabulary begins a match, so the model can't spell any"
            )
        return state


class Regex(GuidanceConstraint):
    """Texts that match a regular expression as a whole (the syntax of Rust's ``regex`` crate, which has
    no lookaround and no back-references)."""

    name = "regex"

    def __init__(self, pattern: str) -> None:
        from llguidance import LLMatcher

        if not isinstance(pattern, str):
            raise TypeError(f"regex takes a string, given {type(pattern).__name__} ({pattern!r})")
        described = json.loads(LLMatcher.grammar_from_regex(pattern))
        super().__init__(pattern, described["grammars"][0]["lark_grammar"])


class JsonSchema(GuidanceConstraint):
    """Texts that are JSON of a schema.

    Args:
        schema: a JSON schema as a dict or a string of JSON, or a pydantic model's class.
        whitespace: allow white space between the parts; else there is none.
    """

    name = "json_schema"

    def __init__(self, schema: Any, *, whitespace: bool = False) -> None:
        options = {"whitespace_flexible": bool(whitespace)}
        described = {**_schema_of(schema), "x-guidance": options}
        super().__init__(schema, f"start: %json {json.dumps(described)}")


class Grammar(GuidanceConstraint):
    """Texts of a context-free grammar in llguidance's dialect of Lark, from its rule ``start``."""

    name = "grammar"

    def __init__(self, lark: str) -> None:
        if not isinstance(lark, str):
            raise TypeError(
                f"grammar takes a Lark grammar as a string, given {type(lark).__name__} ({lark!r})"
            )
        super().__init__(lark, lark)


def _schema_of(schema: Any) -> Mapping[str, Any]:
    """A schema as a dict of JSON's values."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"json_schema={schema!r} is no JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise TypeError(
            "json_schema takes a dict, a string of JSON or a pydantic model, given "
            f"{type(schema).__name__} ({schema!r})"
        )
    try:
        json.dumps(schema)
    except TypeError as error:
        raise TypeError(f"json_schema={schema!r} can't be written as JSON: {error}") from None
    return schema


class GuidanceState(ConstraintState):
    """A matcher that has read a text."""

    def __init__(self, matcher: Any, tokens: Tokens) -> None:
        self._matcher, self._tokens = matcher, tokens

    @property
    def error(self) -> str:
        """What is wrong with the grammar; empty if nothing is."""
        return self._matcher.get_error().strip() if self._matcher.is_error() else ""

    def after(self, data: bytes) -> GuidanceState | None:
        matcher, of_byte = self._matcher.deep_copy(), self._tokens.of_byte
        if matcher.try_consume_tokens([of_byte[byte] for byte in data]) < len(data):
            return None
        return GuidanceState(matcher, self._tokens)

    @cached_property
    def is_complete(self) -> bool:  # type: ignore[override]
        return self._matcher.is_accepting()

    @cached_property
    def is_final(self) -> bool:  # type: ignore[override]
        return self.is_complete and not self.goes_on

    @cached_property
    def goes_on(self) -> bool:
        """Whether a match may come after further bytes."""
        return not self._matcher.is_stopped() and bool(self._bits[self._tokens.of_byte].any())

    @cached_property
    def _bits(self) -> np.ndarray:
        """Of 0 and 1: which of llguidance's tokens may come next."""
        packed = np.frombuffer(self._matcher.deep_copy().compute_bitmask(), np.uint8)
        return np.unpackbits(packed, bitorder="little")

    def mask(self) -> Tensor:
        if self._matcher.is_stopped():
            return torch.zeros(len(self._tokens.of_token), dtype=torch.bool)
        return torch.from_numpy(self._bits[self._tokens.of_token].view(np.bool_))


class Tokens:
    """The distinct tokens of a vocabulary, as llguidance asks for them.

    Attributes:
        of_token: (V,) llguidance's number of each token; a text's special tokens are an empty one.
        of_byte: its number of each byte.
        tokenizer: llguidance's tokenizer.
    """

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        distinct = {b"": 0} | {bytes([byte]): 1 + byte for byte in range(256)}
        self.of_byte = list(range(1, 257))
        numbers = [
            distinct.setdefault(vocabulary.token_bytes(token) if is_text else b"", len(distinct))
            for token, is_text in enumerate(vocabulary.text_tokens.tolist())
        ]
        self.of_token = np.array(numbers)
        self.tokens = [*distinct, b"<end>"]
        self.eos_token_id = len(distinct)
        self.special_token_ids = [self.eos_token_id]
        slices = [*_WORDS, *LLTokenizer.general_slices()]
        self.tokenizer = LLTokenizer(
            TokenizerWrapper(self), n_vocab=len(self.tokens), slices=slices
        )

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self.of_byte[byte] for byte in data]


_tokens: WeakKeyDictionary[Vocabulary, Tokens] = WeakKeyDictionary()


def _tokens_of(vocabulary: Vocabulary) -> Tokens:
    """The tokens of a vocabulary. (To make them takes a quarter of a second.)"""
    if vocabulary not in _tokens:
        _tokens[vocabulary] = Tokens(vocabulary)
    return _tokens[vocabulary]
