"""Stopping: when the sequence of a site ends.

A sequence closes at the first token that is an EOS, or that completes an occurrence of a stop
string in the site's own text, or after which nothing can extend a match of its constraint, or that is
the last of ``max_tokens``. Stop strings are searched in UTF-8 bytes: the encoding is
self-synchronising, so an occurrence in the bytes is one in the text, even where a stop string spans
tokens or a character is split between two of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from lmppl.checks import check_int
from lmppl.lm.tokens.constraints.constraint import Constraint
from lmppl.lm.tokens.matching import Matching, TextMatch, first_stop
from lmppl.lm.tokens.text import FinishReason, Text
from lmppl.lm.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Stopping:
    """What closes a sequence, and which closed ones there are.

    With neither ``stop``, ``max_tokens`` nor ``constraint`` nothing closes it, not even EOS: a prefix
    likelihood.

    Args:
        vocabulary: the tokens of the model.
        stop: strings that close it (one string, several, or None).
        max_tokens: the most tokens it may have, the closing one included; None for no limit.
        constraint: what its body must match; None: nothing.

    Raises:
        ValueError: an empty stop string, ``max_tokens`` below 1 or too small for any match, a
            constraint that is broken in itself.
        TypeError: one of another type.
    """

    vocabulary: Vocabulary
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_stop(self.stop))
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", check_int("max_tokens", self.max_tokens))
        if self.constraint is not None:
            self._check_length()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stopping):
            return NotImplemented
        return (
            (self.stop, self.max_tokens, self.constraint)
            == (other.stop, other.max_tokens, other.constraint)
            and self.vocabulary.eos_ids == other.vocabulary.eos_ids
            and self.vocabulary.same_as(other.vocabulary)
        )

    def __hash__(self) -> int:
        return hash((self.stop, self.max_tokens, self.constraint))

    @property
    def closes(self) -> bool:
        """Whether anything closes the sequence; False for a prefix likelihood."""
        return bool(self.stop) or self.max_tokens is not None or self.constraint is not None

    @cached_property
    def matching(self) -> Matching | None:
        """What knows which texts match the constraint; None without one."""
        if self.constraint is None:
            return None
        return matching_of(self.constraint, self.vocabulary, tuple(self._stop_bytes))

    @property
    def least_tokens(self) -> int:
        """A lower bound of the number of tokens of a match; 0 without a constraint, or if there is no
        match."""
        state = None if self.matching is None else self.matching.start.state
        least = 0.0 if state is None else state.needed(cut=bool(self.stop))
        return int(least) if least < math.inf else 0

    def _check_length(self) -> None:
        assert self.matching is not None
        state, most = self.matching.start.state, self.max_tokens
        if state is None or most is None or state.can_match_within(most, cut=bool(self.stop)):
            return
        if least := self.least_tokens:
            raise ValueError(
                f"max_tokens={most} is too small for any match of {self.constraint!r}: it needs at "
                f"least {least} tokens"
            )

    @cached_property
    def closing_token(self) -> int | None:
        """One token that closes the site from any open state: a stop string that is one token, else
        EOS; or None."""
        if not self.closes:
            return None
        if self.vocabulary.concatenates:
            for stop in self.stop:
                ids = self.vocabulary.encode(stop)
                if len(ids) == 1 and stop.encode() in self.vocabulary.token_bytes(ids[0]):
                    return ids[0]
        return self.vocabulary.eos_id

    def start(self) -> StoppingState:
        """The state before the first token."""
        return StoppingState(self)

    def scan(self, ids: Iterable[int]) -> tuple[int, FinishReason, str | None] | None:
        """Where ``ids`` close: number of tokens up to there, the reason, the stop string.

        None if they are still open. At one token EOS goes before stop, stop before the constraint, and
        that before length.
        """
        state = self.start()
        for token in ids:
            reason = state.push(token)
            if reason is not None:
                return state.length, reason, state.stop
        return None

    def is_value(self, ids: Sequence[int]) -> bool:
        """Whether ``ids`` close with the last of them, and match the constraint."""
        state = self.start()
        for token in ids:
            if state.reason is not None:
                return False
            state.push(token)
        return state.reason is not None and state.matches

    def is_dead_end(self, ids: Sequence[int], *, steered: bool) -> bool:
        """Whether a draw under the constraint (there must be one) can come to ``ids`` and end there
        without a match: no further token is allowed, or ``max_tokens`` are reached."""
        state = self.start()
        for token in ids:
            if state.reason is not None or not state.mask(steered=steered)[token]:
                return False
            state.push(token)
        if state.reason is not None:
            return not state.matches
        return not bool(state.mask(steered=steered).any())

    def masks(self, ids: Sequence[int], *, steered: bool) -> Tensor:
        """(n, V) bool: of each of n tokens, those that the constraint (there must be one) allowed in its
        place; see ``TextMatch.mask``."""
        state, masks = self.start(), []
        for token in ids:
            masks.append(state.mask(steered=steered))
            state.push(token)
        return torch.stack(masks) if masks else torch.zeros(0, self.vocabulary.size).bool()

    def mismatch(self, ids: Sequence[int]) -> str:
        """Where a sequence fails to match the constraint, in words; empty if it does not fail."""
        assert self.matching is not None
        constraint, state, eos_ids = self.constraint, self.start(), self.vocabulary.eos_ids
        text = self.vocabulary.bytes_of([token for token in ids if token not in eos_ids])
        if self.matching.start.state is None:
            return f"nothing matches {constraint!r}"
        for token in ids:
            match = state._match
            state.push(token)
            assert match is not None and state._match is not None
            if not state._match.is_alive:
                before = match.text + match.alive_bytes(token)
                number = len(before.decode(errors="ignore")) + 1
                rest = text[len(before) :].decode(errors="replace")
                return (
                    f"the text stops matching {constraint!r} at character {number}: after "
                    f"{_shown(before)} comes {rest[:_MOST_SHOWN]!r}"
                )
            if state.reason is not None:
                break
        if state.length < len(ids):
            return f"{_shown(text)} goes on after a match of {constraint!r} that nothing extends"
        if state.reason is None or not state.matches:
            return f"the text ends before it matches {constraint!r}: {_shown(text)}"
        return ""

    def dead_end(self, ids: Sequence[int]) -> str:
        """What a text under way that might have matched lacked to match, in words; empty if it did not
        come to its end by a dead end."""
        state = self.start()
        for token in ids:
            if state.reason is not None:
                return ""
            state.push(token)
        if state.reason == "length" and not state.matches:
            return f"max_tokens={self.max_tokens} ended it: raise max_tokens"
        if state.reason is not None or not state.is_alive or self.max_tokens is None:
            return ""
        return (
            f"no token leads on to a match within the {self.max_tokens - state.length} that "
            f"max_tokens={self.max_tokens} leaves: raise max_tokens, or see whether the model's tokens "
            "can spell a match"
        )

    def text(self, ids: Iterable[int]) -> Text:
        """The value of a site whose tokens are ``ids``, open or closed by the last of them;
        ``ValueError`` if they go on after they closed."""
        ids = tuple(int(t) for t in ids)
        closed = self.scan(ids)
        vocabulary = self.vocabulary
        string = vocabulary.decode([t for t in ids if t not in vocabulary.eos_ids])
        length, reason, stop = closed or (len(ids), None, None)
        if reason == "constraint" and length < len(ids):  # observed, with probability zero
            length, reason = len(ids), None
        if length < len(ids):
            raise ValueError(
                f"{len(ids)} tokens for a sequence that closes at token {length} ({reason}): "
                f"{string!r}"
            )
        body = string
        if stop is not None:
            # In bytes, as it was found: a half character before it decodes to a longer U+FFFD.
            text = vocabulary.bytes_of(ids)
            found = first_stop(text, self._stop_bytes)
            assert found is not None
            body = text[: found[0]].decode("utf-8", errors="replace")
        return Text(string, ids, vocabulary, body=body, finish_reason=reason, stop=stop)

    @cached_property
    def _stop_bytes(self) -> list[bytes]:
        return [stop.encode() for stop in self.stop]


class StoppingState:
    """How far one sequence is from stopping. ``push`` takes its tokens one by one."""

    __slots__ = ("_stopping", "_ids", "_tail", "_match", "length", "reason", "stop", "matches")

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping
        self._tail = b""  # the text's last bytes, one fewer than the longest stop string
        self._ids: list[int] = []  # only where text is not the concatenation of its tokens
        self.length = 0  # tokens pushed
        self.reason: FinishReason | None = None  # what closed it; None while it is open
        self.stop: str | None = None  # the stop string that closed it, if one did
        # Its text, if there is a constraint; and when it has closed, whether the body matches.
        self._match: TextMatch | None = None
        if stopping.constraint is not None:
            assert stopping.matching is not None
            self._match = stopping.matching.start
        self.matches = True

    def push(self, token: int) -> FinishReason | None:
        """Add a token. Returns why the sequence closed at it, or None while it is open;
        ``ValueError`` if it is closed already."""
        if self.reason is not None:
            raise ValueError(f"the sequence has closed ({self.reason}) at token {self.length}")
        stopping = self._stopping
        self.length += 1
        if not stopping.closes:
            return None
        if self._match is not None:
            self._push_match(token)
        elif token in stopping.vocabulary.eos_ids:
            self.reason = "eos"
        elif stopping.stop and self._find_stop(token):
            self.reason = "stop"
        elif self.length == stopping.max_tokens:
            self.reason = "length"
        return self.reason

    def _push_match(self, token: int) -> None:
        """``push`` of a site with a constraint."""
        match, stopping = self._match, self._stopping
        assert match is not None
        if token in stopping.vocabulary.eos_ids:
            self.reason, self.matches = "eos", match.is_complete
        elif stopping.stop and self._find_stop(token):
            # What the mask says of a token that completes a stop string is whether the body matches.
            self.reason, self.matches = "stop", match.allows(token)
        else:
            self._match = match = match.after(token)
            if match.is_final:
                self.reason = "constraint"
            elif self.length == stopping.max_tokens:
                self.reason, self.matches = "length", match.is_complete

    @property
    def is_alive(self) -> bool:
        """Whether it matches the constraint, or may yet (True without one)."""
        if self.reason is not None:
            return self.matches
        return self._match is None or self._match.is_alive

    def mask(self, *, steered: bool = False) -> Tensor:
        """(V,) bool: the tokens that the constraint (there must be one) allows next; see
        ``TextMatch.mask``."""
        assert self._match is not None
        return self._match.mask(self._left, steered=steered)

    def allows(self, token: int) -> bool:
        """Whether the constraint (there must be one) allows a token next: what ``mask`` says of it,
        without steering."""
        assert self._match is not None
        return self._match.allows(token)

    @property
    def _left(self) -> int:
        """How many tokens may follow the next one."""
        most = self._stopping.max_tokens
        return _ENDLESS if most is None else most - self.length - 1

    def copy(self) -> StoppingState:
        """An independent copy."""
        other = StoppingState(self._stopping)
        other._tail, other._ids = self._tail, list(self._ids)
        other.length, other.reason, other.stop = self.length, self.reason, self.stop
        other._match, other.matches = self._match, self.matches
        return other

    def _find_stop(self, token: int) -> bool:
        stopping = self._stopping
        vocabulary, stops = stopping.vocabulary, stopping._stop_bytes
        if vocabulary.concatenates:
            text = self._tail + vocabulary.token_bytes(token)
            keep = max(map(len, stops)) - 1
            self._tail = text[-keep:] if keep else b""
        else:
            self._ids.append(int(token))
            text = vocabulary.bytes_of(self._ids)
        found = first_stop(text, stops)
        if found is None:
            return False
        self.stop = stopping.stop[found[1]]
        return True


def _shown(text: bytes) -> str:
    """The end of a text, in a message."""
    characters = text.decode(errors="replace")
    if len(characters) <= _MOST_SHOWN:
        return repr(characters)
    return f"...{characters[-_MOST_SHOWN:]!r}"


_MOST_SHOWN = 60  # characters
_ENDLESS = 1 << 30  # tokens, where nothing limits them


@lru_cache(maxsize=256)
def matching_of(
    constraint: Constraint, vocabulary: Vocabulary, stops: tuple[bytes, ...]
) -> Matching:
    """The ``Matching`` of all sites with this constraint, which share what it finds out."""
    return Matching(constraint, vocabulary, stops)


def _as_stop(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise TypeError(f"stop={stop!r}: it must be a string or a list of strings")
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop={stop!r}: {string!r} is not a string")
        if not string:
            raise ValueError(
                f"stop={stop!r}: a stop string must not be empty; leave stop out to have none"
            )
    return tuple(dict.fromkeys(str(string) for string in strings))


def encode_observed(obs: str, stopping: Stopping, site: str = "") -> tuple[int, ...]:
    """See :meth:`lmppl.lm.LM.encode_observed`; ``site`` begins every message."""
    if not isinstance(obs, str):
        raise TypeError(f"{site}an observed text is a str or a Text, not {type(obs).__name__}")
    vocabulary = stopping.vocabulary
    try:
        ids = obs.token_ids if isinstance(obs, Text) else vocabulary.encode(obs)
    except ValueError as error:
        raise ValueError(f"{site}{error}") from error
    if not stopping.closes:
        if not ids:
            raise ValueError(
                f"{site}the observed text is empty, so without stop or max_tokens it says nothing"
            )
        return ids
    closed = stopping.scan(ids)
    if closed is not None and closed[1] == "constraint":
        return ids  # also where it goes on after a match: that has probability zero
    if closed is None:
        if vocabulary.eos_id is not None:
            return (*ids, vocabulary.eos_id)
        matching = stopping.matching
        if matching is not None and not matching.is_match(vocabulary.bytes_of(ids)):
            return ids  # which has probability zero
        closers = {"stop": list(stopping.stop) or None, "max_tokens": stopping.max_tokens}
        closing = ", ".join(f"{name}={value!r}" for name, value in closers.items() if value)
        advice = (
            "leave out stop and max_tokens to score it as the beginning of a text"
            if matching is None
            else f"say max_tokens={len(ids)}, which it has, or give a constraint of which nothing "
            "longer is a match"
        )
        raise ValueError(
            f"{site}the observed text {str(obs)!r} does not close the site ({closing}), and the "
            f"model has no EOS token that could be appended. Let it end as the site would"
            f"{', by a stop string' if stopping.stop else ''}; or {advice}."
        )
    length, reason, stop = closed
    if length == len(ids):
        return ids
    where = f"at token {length} (character {len(vocabulary.decode(ids[:length]))})"
    if reason == "length":
        raise ValueError(
            f"{site}the observed text has {len(ids)} tokens, but max_tokens={stopping.max_tokens} "
            f"closes the site {where}: {str(obs)!r}. Raise max_tokens or shorten the text."
        )
    what = f"stop string {stop!r}" if reason == "stop" else "an EOS token"
    rest = vocabulary.decode(ids[length:])
    raise ValueError(
        f"{site}the observed text {str(obs)!r} runs past its close: {what} closes it {where}, but "
        f"{rest!r} follows. Cut the text there, or change the site's stop."
    )
