"""Matching: whether the text of a constrained site matches, and which tokens it may go on with.

A constraint speaks of the body, and a stop string ends the body wherever it begins. So beside the
texts that a match may begin with, those live whose end may be the beginning of a stop string, after a
body that matches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from lmppl.lm.tokens.constraints.constraint import Constraint, ConstraintState
from lmppl.lm.tokens.vocabulary import Vocabulary

_MOST_NODES = 4096  # texts that are remembered


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
        self.constraint, self.vocabulary, self.stops = constraint, vocabulary, list(stops)
        self.start = TextMatch(self, b"", constraint.start(vocabulary))
        self._nodes: dict[bytes, TextMatch] = {}

    def node(self, text: bytes, state: ConstraintState | None) -> TextMatch:
        """The one of a text, whose state is known."""
        found = self._nodes.get(text)
        if found is None:
            if len(self._nodes) >= _MOST_NODES:
                self._nodes.clear()
            found = self._nodes[text] = TextMatch(self, text, state)
        return found

    def is_match(self, body: bytes) -> bool:
        """Whether a body matches."""
        state = self.start.state
        state = state if state is None or not body else state.after(body)
        return state is not None and state.is_complete

    def length_of_tail(self) -> int:
        """How many bytes at a text's end may belong to a stop string."""
        return max(map(len, self.stops), default=1) - 1

    def begun_stops(self, text: bytes) -> list[int]:
        """The lengths of the ends of a text that are the beginning of a stop string."""
        return [
            length
            for length in range(1, min(self.length_of_tail(), len(text)) + 1)
            if any(len(stop) > length and stop.startswith(text[-length:]) for stop in self.stops)
        ]

    def stop_tokens(self, tail: bytes) -> list[int]:
        """The tokens which after a text with this end complete a stop string, or may begin one."""
        return self._stop_tokens(tail if self.begun_stops(tail) else b"")

    @cached_property
    def _stop_tokens(self):  # type: ignore[no-untyped-def]
        tokens = self.vocabulary.text_tokens.nonzero().flatten().tolist()
        data = {token: self.vocabulary.token_bytes(token) for token in tokens}

        @lru_cache(maxsize=64)
        def find(tail: bytes) -> list[int]:
            found = []
            for token, new in data.items():
                text = tail + new
                if first_stop(text, self.stops) is not None or self.begun_stops(text):
                    found.append(token)
            return found

        return find


@dataclass(eq=False)
class TextMatch:
    """A text so far, open. It never changes."""

    matching: Matching = field(repr=False)
    text: bytes
    state: ConstraintState | None  # None: no match begins so

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
        return any(matching.is_match(text[: len(text) - n]) for n in matching.begun_stops(text))

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
        return self.matching.node(self.text + data, state)

    def allows(self, token: int, left: int) -> bool:
        """What ``mask`` says of one token."""
        vocabulary = self.matching.vocabulary
        if token in vocabulary.eos_ids:
            return self.is_complete
        if not bool(vocabulary.text_tokens[token]):
            return False
        verdict = self._stop_verdict(vocabulary.token_bytes(token), left)
        return self.after(token).state is not None if verdict is None else verdict

    def mask(self, left: int, *, steered: bool = False) -> Tensor:
        """(V,) bool: the tokens that may come next, of which ``left`` may follow it.

        Args:
            left: how many tokens may follow the next one.
            steered: leave out those after which a match within ``left`` tokens is impossible.
        """
        if not steered:
            return self._mask(left > 0)
        mask = self._mask(left > 0)
        within = None if self.state is None else self.state.within(left)
        if within is None:
            return mask
        steered_mask = mask & within
        for token in [*self.matching.vocabulary.eos_ids, *self._verdicts(left > 0)]:
            steered_mask[token] = mask[token]
        return steered_mask

    def _mask(self, goes_on: bool) -> Tensor:
        known = self.__dict__.setdefault("_masks", {})
        if goes_on not in known:
            vocabulary = self.matching.vocabulary
            if self.state is None:
                mask = torch.zeros(vocabulary.size, dtype=torch.bool)
            else:
                mask = self.state.mask() & vocabulary.text_tokens
            for token, verdict in self._verdicts(goes_on).items():
                mask[token] = verdict
            mask[list(vocabulary.eos_ids)] = self.is_complete
            known[goes_on] = mask
        return known[goes_on]

    def _verdicts(self, goes_on: bool) -> dict[int, bool]:
        """What is said of tokens by the stop strings, and not by the state."""
        matching = self.matching
        if not matching.stops:
            return {}
        known = self.__dict__.setdefault("_known_verdicts", {})
        if goes_on not in known:
            size = matching.length_of_tail()
            tail = self.text[-size:] if size else b""
            token_bytes = matching.vocabulary.token_bytes
            by_bytes = {t: token_bytes(t) for t in matching.stop_tokens(tail)}
            found = {t: self._stop_verdict(data, int(goes_on)) for t, data in by_bytes.items()}
            known[goes_on] = {t: verdict for t, verdict in found.items() if verdict is not None}
        return known[goes_on]

    def _stop_verdict(self, data: bytes, left: int) -> bool | None:
        """Whether the text may go on with the bytes of a token, as far as stop strings decide it: where
        they complete one, or where only one that has begun can save the text; else None."""
        matching = self.matching
        if not matching.stops:
            return None
        size = matching.length_of_tail()
        tail = self.text[-size:] if size else b""
        stop = first_stop(tail + data, matching.stops)
        if stop is not None:
            return self._is_match_until(stop[0] - len(tail), data)
        text = tail + data
        begun = matching.begun_stops(text)
        if not left or not begun:
            return None
        if any(self._is_match_until(len(data) - length, data) for length in begun):
            return True
        return None

    def _is_match_until(self, length: int, data: bytes) -> bool:
        """Whether the text with the first ``length`` bytes of ``data`` matches; negative: without its
        own last."""
        if length < 0:
            return self.matching.is_match(self.text[:length])
        if self.state is None:
            return False
        if not length:
            return self.state.is_complete
        heads = self.__dict__.setdefault("_heads", {})
        head = data[:length]
        if head not in heads:
            state = self.state.after(head)
            heads[head] = state is not None and state.is_complete
        return heads[head]


_NEVER = bytes(
    [0xFF]
)  # stands for a text with a special token, or one without bytes: it can't match
