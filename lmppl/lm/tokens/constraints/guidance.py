"""Regular expressions, JSON schemas and grammars, by llguidance (MIT).

llguidance knows tokens by their bytes. It is given the distinct ones among the model's tokens, a token
for each of the 256 bytes, so that a text can be read in any pieces, and an EOS, which stands for all
of the model's. A matcher is copied before it reads on (in a microsecond), so states never change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property, lru_cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lmppl.lm.tokens.constraints.constraint import Constraint, ConstraintState
from lmppl.lm.tokens.constraints.distance import Distance, Place
from lmppl.lm.tokens.vocabulary import Vocabulary

# llguidance keeps the tokens that match each of these, and where a text may go on by any of them it need
# not walk through them. Beside its own, which suit strings in JSON, words: a mask of a regular
# expression over 49,152 tokens then takes 0.01 ms instead of 0.4.
_WORDS = (r"[a-z]{1,30}", r" ?[A-Za-z]{1,30}")
_ENDLESS = 1 << 30  # tokens, where nothing limits them

T = TypeVar("T")


class GuidanceConstraint(Constraint):
    """A constraint that llguidance checks.

    Raises:
        ValueError: it is none; says where.
    """

    is_lazy = False  # type: ignore[assignment]

    def __init__(self, given: Any, grammar: str) -> None:
        self._given = given
        # Else a stretch that is certain could only be written in the tokens that llguidance prefers.
        self._grammar = f"{grammar}\n{_NO_FORCING}"
        self._starts: WeakKeyDictionary[Vocabulary, GuidanceState] = WeakKeyDictionary()
        if message := _error_of(self._grammar):
            raise ValueError(f"{self._what}: {self._plain(message)}")

    @property
    def key(self) -> Hashable:
        return type(self), self._grammar

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_shown(self._given)})"

    @property
    def _what(self) -> str:
        """It as an argument, for messages."""
        return f"{self.name}={_shown(self._given)}"

    def _plain(self, message: str) -> str:
        """A message of llguidance's, without the grammar that was written around what was given."""
        message = re.split(r"\n +1 \| ", message.strip())[0]
        message = re.sub(r"^at \d+\(\d+\): ", "", message)
        message = re.sub(r"^failed to compile JSON schema: ", "", message)
        return re.sub(r'^invalid regex "(?s:.)*?" \(in regex\): ', "", message)

    def start(self, vocabulary: Vocabulary) -> GuidanceState:
        found = self._starts.get(vocabulary)
        if found is None:
            found = self._starts[vocabulary] = self._start(vocabulary)
        return found

    def _start(self, vocabulary: Vocabulary) -> GuidanceState:
        from llguidance import LLMatcher

        tokens = _tokens_of(vocabulary)
        state = GuidanceState(LLMatcher(tokens.tokenizer, self._grammar, log_level=0), tokens)
        what = self._what
        if state.error:
            raise ValueError(f"{what}: {self._plain(state.error)}")
        if not state.goes_on:
            only = "matches only the empty text" if state.is_complete else "matches nothing"
            raise ValueError(f"{what} {only}, so no text of a site can match it")
        if not bool((state.mask() & vocabulary.text_tokens).any()) and not state.is_complete:
            raise ValueError(
                f"{what}: no token of the vocabulary begins a match, so the model can't spell any"
            )
        return state


@lru_cache(maxsize=1024)
def _error_of(grammar: str) -> str:
    """What is wrong with a grammar; empty if nothing is. (It takes a millisecond, and a program may make
    its constraints anew in every run.)"""
    from llguidance import LLMatcher  # when a constraint is wanted

    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return messages[0] if is_error else ""


class Regex(GuidanceConstraint):
    """Texts that match a regular expression as a whole.

    Args:
        pattern: in the syntax of Rust's ``regex`` crate, which has no lookaround and no
            back-references.

    Raises:
        TypeError: it is no string.
        ValueError: it is no regular expression of that syntax. (One that no text of a site can match
            is refused where it is used.)
    """

    name = "regex"

    def __init__(self, pattern: str) -> None:
        from llguidance import LLMatcher

        if not isinstance(pattern, str):
            raise TypeError(
                f"regex takes a string, given {type(pattern).__name__} ({pattern!r})"
                + ": give its .pattern" * hasattr(pattern, "pattern")
            )
        _check_pattern(pattern)
        described = json.loads(LLMatcher.grammar_from_regex(pattern))
        super().__init__(pattern, described["grammars"][0]["lark_grammar"])
        self._pattern = pattern

    def _start(self, vocabulary: Vocabulary) -> GuidanceState:
        state = super()._start(vocabulary)
        exact = Distance.of(self._pattern, vocabulary)
        cut = Distance.of(self._pattern, vocabulary, cut=True)
        if exact is None or cut is None:
            return state
        if not cut.can_match_within(cut.start, _ENDLESS):
            raise ValueError(
                f"{self._what}: no tokens of the vocabulary make up a match, so the model can't "
                "spell any"
            )
        return RegexState(state.matcher, state.tokens, Place.at_start(exact), Place.at_start(cut))


class JsonSchema(GuidanceConstraint):
    """Texts that are JSON of a schema, its properties in the schema's order.

    Args:
        schema: a JSON schema as a dict or a string of JSON, or a pydantic model's class. llguidance's
            own options may stand in it as ``"x-guidance"``.
        whitespace: allow white space between the parts; else there is none.

    Raises:
        TypeError: it is none of these.
        ValueError: it is no schema, one that nothing matches, or one with keywords that llguidance
            does not know how to check; the message names them.
    """

    name = "json_schema"

    def __init__(self, schema: Any, *, whitespace: bool = False) -> None:
        described = dict(_schema_of(schema))
        options = {"whitespace_flexible": bool(whitespace)}
        described["x-guidance"] = {**options, **described.get("x-guidance", {})}
        super().__init__(schema, f"start: %json {json.dumps(described)}")


class Grammar(GuidanceConstraint):
    """Texts of a context-free grammar in llguidance's dialect of Lark, from its rule ``start``.

    Terminals are read as a lexer reads them: each takes as much as it can. So ``A A`` with
    ``A: /a+/`` matches nothing, as the first ``A`` takes all; say it in one terminal, as ``/aa+/``.

    Args:
        lark: the grammar.

    Raises:
        TypeError: it is no string.
        ValueError: it is no grammar (the message says in which line and column), or it counts or
            names tokens, as ``max_tokens=``, ``stop=`` and ``<[...]>`` do: a constraint speaks of text.
    """

    name = "grammar"

    def __init__(self, lark: str) -> None:
        if not isinstance(lark, str):
            raise TypeError(
                f"grammar takes a Lark grammar as a string, given {type(lark).__name__} ({lark!r})"
            )
        _check_of_text(lark)
        super().__init__(lark, lark)

    def _plain(self, message: str) -> str:
        lines = [line for line in message.strip().splitlines() if _NO_FORCING not in line]
        return re.sub(r"^(?:at )?(\d+)\((\d+)\): ", r"line \1, column \2: ", "\n".join(lines))


_NO_FORCING = '%llguidance {"no_forcing": true}'

_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/|(?://|#)[^\n]*')
_OF_TOKENS = re.compile(r"\b(?:max_tokens|stop|stop_capture)\s*=|<[^>\s]+>")


def _check_of_text(lark: str) -> None:
    """Refuse what speaks of tokens in a grammar."""
    found = _OF_TOKENS.search(_LITERAL.sub(lambda literal: " " * len(literal[0]), lark))
    if found is not None:
        line = lark.count("\n", 0, found.start()) + 1
        raise ValueError(
            f"grammar={_shown(lark)}: line {line} has {found[0]!r}, which speaks of tokens, and a "
            "constraint speaks of text: leave it out (lm_sample has max_tokens= and stop=)"
        )


def _check_pattern(pattern: str) -> None:
    """Refuse what llguidance would read in another way."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise ValueError(
            f"regex={_shown(pattern)} ends in a backslash with nothing after it, at character "
            f"{len(pattern)}: write two for one"
        )
    if "\n" in pattern and re.search(r"\(\?[a-zA-Z]*x", pattern):
        raise ValueError(
            f"regex={_shown(pattern)}: with (?x), a pattern must stand in one line, without comments"
        )


def _shown(given: Any) -> str:
    """What was given, cut to a length that a message can hold."""
    text = repr(given)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


_MOST_SHOWN = 120  # characters


def is_schema_class(given: Any) -> bool:
    """Whether ``given`` is a pydantic model's class, which has a JSON schema."""
    return isinstance(given, type) and hasattr(given, "model_json_schema")


def _schema_of(schema: Any) -> Mapping[str, Any]:
    """A schema as a dict of JSON's values."""
    if is_schema_class(type(schema)):
        raise TypeError(
            f"json_schema takes a pydantic model's class, given an instance ({schema!r}): give "
            f"{type(schema).__name__}"
        )
    if is_schema_class(schema):
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
        self.matcher, self.tokens = matcher, tokens

    @property
    def error(self) -> str:
        """What is wrong with the grammar; empty if nothing is."""
        return self.matcher.get_error().strip() if self.matcher.is_error() else ""

    def after(self, data: bytes) -> GuidanceState | None:
        matcher = self._matcher_after(data)
        return None if matcher is None else GuidanceState(matcher, self.tokens)

    def _matcher_after(self, data: bytes) -> Any:
        """A matcher that has read some more; None if no match begins so."""
        matcher, of_byte = self.matcher.deep_copy(), self.tokens.of_byte
        read = matcher.try_consume_tokens([of_byte[byte] for byte in data])
        if read == len(data):
            return matcher
        _check_limits(matcher)
        return None

    @cached_property
    def is_complete(self) -> bool:  # type: ignore[override]
        return self.matcher.is_accepting()

    @cached_property
    def is_final(self) -> bool:  # type: ignore[override]
        return self.is_complete and not self.goes_on

    @cached_property
    def goes_on(self) -> bool:
        """Whether a match may come after further bytes."""
        return not self.matcher.is_stopped() and bool(self._bits[self.tokens.of_byte].any())

    @cached_property
    def _bits(self) -> np.ndarray:
        """Of 0 and 1: which of llguidance's tokens may come next."""
        # Not of a copy: what the matcher finds out about the grammar, later copies of it know.
        packed = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        _check_limits(self.matcher)
        return np.unpackbits(packed, bitorder="little")

    def mask(self) -> Tensor:
        if self.matcher.is_stopped():
            return torch.zeros(len(self.tokens.of_token), dtype=torch.bool)
        return torch.from_numpy(self._bits[self.tokens.of_token].view(np.bool_))


_NO_MATCH = "NoExtensionBias"  # the error of a matcher that nothing can match


def _check_limits(matcher: Any) -> None:
    """Raise ``ValueError`` if a matcher has come to a limit of llguidance's. (Else what it gave up on
    would count as no match.)"""
    reason = matcher.get_error().strip().split("\n")[0]
    if reason and reason != _NO_MATCH:
        raise ValueError(
            f"llguidance gave up on a constraint: {reason}. Write it so that a text can be read in "
            "fewer ways, or lower max_tokens"
        )


class Found:
    """What was found out in the states of automata, for other texts that come to them. It is dropped
    when it is much."""

    MOST = 512  # of all patterns together, as each takes a byte a token

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: Hashable, find: Callable[[], T]) -> T:
        """What was found under a key; ``find`` finds it where nothing was."""
        if key not in self._found:
            found = find()
            if len(self._found) >= self.MOST:
                self._found = {}
            self._found[key] = found
            return found
        known: T = self._found[key]
        return known


found_in_states = Found()


class RegexState(GuidanceState):
    """A matcher of a regular expression, and how far the text is from a match, in tokens.

    Args:
        matcher: that has read the text.
        tokens: as it knows them.
        exact: where the text has come to.
        cut: where it has come to, if a stop string may cut it.
        is_ascii: whether the text is in ASCII.
    """

    def __init__(
        self, matcher: Any, tokens: Tokens, exact: Place, cut: Place, is_ascii: bool = True
    ) -> None:
        super().__init__(matcher, tokens)
        self._exact, self._cut = exact, cut
        self._is_ascii = is_ascii

    def after(self, data: bytes) -> RegexState | None:
        matcher = self._matcher_after(data)
        if matcher is None:
            return None
        return RegexState(
            matcher, self.tokens, self._exact.after(data), self._cut.after(data),
            self._is_ascii and data.isascii(),
        )  # fmt: skip

    @cached_property
    def _bits(self) -> np.ndarray:  # type: ignore[override]
        return self._known("bits", lambda: super(RegexState, self)._bits)

    def mask(self) -> Tensor:
        return self._known("mask", super().mask)

    def _known(self, what: str, find: Callable[[], T]) -> T:
        """What is found in the text's state, which decides it; found anew where it does not."""
        if not (self._is_ascii and self._exact.distance.is_exact_in_ascii):
            return find()
        return found_in_states.get((what, self._exact.distance, self._exact.state), find)

    def needed(self, *, cut: bool = False) -> float:
        return self._place(cut).needed()

    def can_match_within(self, left: int, *, cut: bool = False) -> bool:
        return self._place(cut).can_match_within(left)

    def within(self, left: int, *, cut: bool = False) -> Tensor | None:
        return self._place(cut).within(left)

    def _place(self, cut: bool) -> Place:
        return self._cut if cut else self._exact


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
