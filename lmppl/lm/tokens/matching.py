"""Matching: whether the text of a constrained site matches, and which tokens it may go on with.

A constraint speaks of the body, and a stop string ends the body wherever it begins. So beside the
texts that a match may begin with, those live whose end may be the beginning of a stop string, after a
body that matches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from threading import Lock
from weakref import WeakSet

import torch
from torch import Tensor

from lmppl.lm.tokens.constraints.constraint import (
    Constraint,
    ConstraintState,
    checked_mask,
    checked_state,
)
from lmppl.lm.tokens.vocabulary import Vocabulary

_MOST_BYTES = 512 << 20  # of the masks of texts that are remembered
_MASKS_OF_A_TEXT = 2  # a byte a token: the state's own, and the one with stop strings and EOS
_COUNTED_AFTER = 64  # texts


def first_stop(text: bytes, stops: Sequence[bytes]) -> tuple[int, int] | None:
    """The occurrence that ends first, and of those the longest: its start, and which stop it is."""
    found = [(start, n) for n, stop in enumerate(stops) if (start := text.find(stop)) >= 0]
    return min(found, key=lambda f: (f[0] + len(stops[f[1]]), f[0]), default=None)


class Matching:
    """The texts of sites with one constraint and the same stop strings.

    Args:
        constraint: of the body.
        vocabulary: of the model.
        stops: stop strings, in bytes.

    Raises:
        ValueError: the constraint is broken in itself, or the tokenizer's texts are not its tokens'
            bytes, one after the other.
    """

    def __init__(
        self, constraint: Constraint, vocabulary: Vocabulary, stops: Sequence[bytes]
    ) -> None:
        if not vocabulary.concatenates:
            raise ValueError(
                f"{constraint.name} needs a tokenizer whose texts are the bytes of their tokens, one "
                f"after the other; those of {type(vocabulary.tokenizer).__name__} are not: use a "
                "model with a byte-level tokenizer, or lmppl.require on the text"
            )
        self.constraint, self.vocabulary, self.stops = constraint, vocabulary, tuple(stops)
        state = checked_state(constraint.start(vocabulary), f"{type(constraint).__name__}.start()")
        self.start = TextMatch(self, b"", state)
        self._nodes: dict[bytes, TextMatch] = {}
        with _lock:
            _matchings.add(self)

    def node(self, text: bytes, state: ConstraintState | None) -> TextMatch:
        """The one of a text, whose state is known."""
        found = self._nodes.get(text)
        if found is None:
            if len(self._nodes) % _COUNTED_AFTER == 0:
                _forget_if_many()
            found = self._nodes[text] = TextMatch(self, text, state)
        return found

    @property
    def remembered_bytes(self) -> int:
        """The most that the masks of remembered texts may take."""
        return len(self._nodes) * _MASKS_OF_A_TEXT * self.vocabulary.size

    def forget(self) -> None:
        """Drop the texts that are remembered."""
        self._nodes.clear()

    def is_match(self, body: bytes) -> bool:
        """Whether a body matches."""
        state = self.start.state
        state = state if state is None or not body else state.after(body)
        return state is not None and state.is_complete

    def tail(self, text: bytes) -> bytes:
        """The end of a text, as far as it may belong to a stop string that has not ended."""
        size = max(map(len, self.stops), default=1) - 1
        return text[-size:] if size else b""


_matchings: WeakSet[Matching] = WeakSet()
_lock = Lock()


def _forget_if_many() -> None:
    """Drop all texts, of all constraints, if their masks may take more than ``_MOST_BYTES``."""
    with _lock:
        living = list(_matchings)
    if sum(matching.remembered_bytes for matching in living) > _MOST_BYTES:
        for matching in living:
            matching.forget()


@dataclass(eq=False)
class TextMatch:
    """A text so far, open. It never changes."""

    matching: Matching = field(repr=False)
    text: bytes
    state: ConstraintState | None  # None: no match begins so
    _masks: dict[bool, Tensor] = field(default_factory=dict, repr=False)  # by whether it goes on

    @property
    def is_complete(self) -> bool:
        """Whether the text is a match."""
        return self.state is not None and self.state.is_complete

    @property
    def is_final(self) -> bool:
        """Whether it is a match that nothing extends."""
        return self.state is not None and self.state.is_complete and self.state.is_final

    @cached_property
    def is_alive(self) -> bool:
        """Whether a text that begins so may match."""
        if self.state is not None:
            return True
        matching, text = self.matching, self.text
        return any(
            matching.is_match(text[: len(text) - n]) for n in _begun_stops(text, matching.stops)
        )

    def after(self, token: int) -> TextMatch:
        """The text with a further token, which does not close it."""
        vocabulary = self.matching.vocabulary
        if self.text is _NEVER or not bool(vocabulary.text_tokens[token]):
            return TextMatch(self.matching, _NEVER, None)
        data = vocabulary.token_bytes(token)
        known = self.matching._nodes.get(self.text + data)
        if known is not None:
            return known
        state = None if self.state is None else self.state.after(data)
        state = checked_state(state, f"{type(self.state).__name__}.after()")
        return self.matching.node(self.text + data, state)

    def alive_bytes(self, token: int) -> bytes:
        """As many of a token's bytes as a match may go on with."""
        vocabulary = self.matching.vocabulary
        data = vocabulary.token_bytes(token) if bool(vocabulary.text_tokens[token]) else b""
        state = self.state
        while data and (state is None or state.after(data) is None):
            data = data[:-1]
        return data

    def allows(self, token: int) -> bool:
        """What ``mask`` says of one token, without steering."""
        vocabulary, stops = self.matching.vocabulary, self.matching.stops
        if token in vocabulary.eos_ids:
            return self.is_complete
        if not bool(vocabulary.text_tokens[token]):
            return False
        closes, bodies = _bodies(
            self.matching.tail(self.text), vocabulary.token_bytes(token), stops
        )
        is_match = any(self._is_match(body) for body in bodies)
        return is_match if closes else is_match or self.after(token).state is not None

    def mask(self, left: int, *, steered: bool = False) -> Tensor:
        """(V,) bool: the tokens that may come next.

        Args:
            left: how many tokens may follow the next one.
            steered: leave out those after which a match within ``left`` tokens is known to be
                impossible.
        """
        mask = self._mask(left > 0 or not steered)
        if self.state is None or not steered:
            return mask
        within = self.state.within(left, cut=bool(self.matching.stops))
        if within is None:
            return mask
        steered_mask = mask & within
        if self.is_complete:
            steered_mask[list(self.matching.vocabulary.eos_ids)] = True
        return steered_mask

    @property
    def _stop_tokens(self) -> StopTokens:
        matching = self.matching
        tail = matching.tail(self.text)
        lengths = _begun_stops(tail, matching.stops)
        tail = tail[-max(lengths) :] if lengths else b""
        return _stop_tokens(matching.vocabulary, matching.stops, tail)

    def _mask(self, goes_on: bool) -> Tensor:
        if goes_on not in self._masks:
            vocabulary = self.matching.vocabulary
            if self.state is None:
                mask = torch.zeros(vocabulary.size, dtype=torch.bool)
            else:
                name = f"{type(self.state).__name__}.mask()"
                mask = checked_mask(self.state.mask(), name, vocabulary.size)
                mask = mask & vocabulary.text_tokens
            if self.matching.stops:
                self._judge_stops(mask, goes_on)
            mask[list(vocabulary.eos_ids)] = self.is_complete
            self._masks[goes_on] = mask
        return self._masks[goes_on]

    def _judge_stops(self, mask: Tensor, goes_on: bool) -> None:
        """Let stop strings say what the state can't: of tokens that complete one, and of those that may
        begin one."""
        found, tokens = self._stop_tokens, self.matching.vocabulary.token_of_bytes
        allowed = mask.numpy()
        is_match = torch.tensor(
            [
                # Mostly the mask knows already that the text can't go on so.
                (cut > 0 or not new or bool(allowed[tokens.get(new, -1)]) or new not in tokens)
                and self._is_match((cut, new))
                for cut, new in found.bodies
            ],
            dtype=torch.bool,
        )
        mask[found.closing] = is_match[found.closing_body]
        if goes_on:
            mask[found.beginning[is_match[found.beginning_body]]] = True

    def _is_match(self, body: Body) -> bool:
        """Whether the text, changed so, matches."""
        cut, new = body
        if cut:
            return self.matching.is_match(self.text[:-cut])
        if self.state is None:
            return False
        state = self.state.after(new) if new else self.state
        return state is not None and state.is_complete


Body = tuple[int, bytes]
"""Where a body ends: so many bytes before the end of a text, or after these further bytes."""


def _bodies(tail: bytes, data: bytes, stops: tuple[bytes, ...]) -> tuple[bool, list[Body]]:
    """Whether a token with the bytes ``data`` completes a stop string, after a text that ends in
    ``tail``; and then the body that is left, else those that are left if one begins at the end."""

    def body(length: int) -> Body:
        return (-length, b"") if length < 0 else (0, data[:length])

    text = tail + data
    stop = first_stop(text, stops) if stops else None
    if stop is not None:
        return True, [body(stop[0] - len(tail))]
    return False, [body(len(data) - length) for length in _begun_stops(text, stops)]


@dataclass(frozen=True, eq=False)
class StopTokens:
    """What tokens do to stop strings after a text with a certain end.

    Attributes:
        bodies: what is left of the text.
        closing, closing_body: (n,) tokens that complete a stop string, and the number of the body.
        beginning, beginning_body: (m,) tokens at whose end one may begin, and the number of the body
            if it does; a token may stand here several times.
    """

    bodies: list[Body]
    closing: Tensor
    closing_body: Tensor
    beginning: Tensor
    beginning_body: Tensor


@lru_cache(maxsize=256)
def _stop_tokens(vocabulary: Vocabulary, stops: tuple[bytes, ...], tail: bytes) -> StopTokens:
    """It goes through the whole vocabulary, once for all texts with this end."""
    numbers: dict[Body, int] = {}
    pairs: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    # Most tokens have nothing of a stop string, which is seen at once.
    search = re.compile(b"|".join(map(re.escape, stops))).search
    begins = tuple({stop[:length] for stop in stops for length in range(1, len(stop))})
    following = tuple({
        stop[length : length + 1]
        for length in _begun_stops(tail, stops)
        for stop in stops
        if len(stop) > length and tail.endswith(stop[:length])
    })  # fmt: skip
    for token in vocabulary.text_tokens.nonzero().flatten().tolist() if stops else ():
        data = vocabulary.token_bytes(token)
        if not (data.startswith(following) or data.endswith(begins) or search(data)):
            continue
        closes, bodies = _bodies(tail, data, stops)
        pairs[closes] += [(token, numbers.setdefault(body, len(numbers))) for body in bodies]
    closing, closing_body = torch.tensor(pairs[True], dtype=torch.long).reshape(-1, 2).T
    beginning, beginning_body = torch.tensor(pairs[False], dtype=torch.long).reshape(-1, 2).T
    return StopTokens(list(numbers), closing, closing_body, beginning, beginning_body)


def _begun_stops(text: bytes, stops: tuple[bytes, ...]) -> list[int]:
    """The lengths of the ends of a text that are the beginning of a stop string."""
    longest = max(map(len, stops), default=1) - 1
    return [
        length
        for length in range(1, min(longest, len(text)) + 1)
        if any(len(stop) > length and stop.startswith(text[-length:]) for stop in stops)
    ]


_NEVER = bytes([0xFF, 0xFF])
"""Stands for a text with a special token, or one without bytes: it can't match. It is known by
identity. (Of one byte, Python has one object only.)"""
