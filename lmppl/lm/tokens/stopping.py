"""Stopping: when the sequence of a site ends.

A sequence closes at the first token that is an EOS, or that completes an occurrence of a stop
string in the site's own text, or that is the last of ``max_tokens``. Stop strings are searched in
UTF-8 bytes: the encoding is self-synchronising, so an occurrence in the bytes is one in the text,
even where a stop string spans tokens or a character is split between two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lmppl.checks import check_int
from lmppl.lm.tokens.text import FinishReason, Text
from lmppl.lm.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Stopping:
    """What closes a sequence.

    With neither ``stop`` nor ``max_tokens`` nothing does, not even EOS: a prefix likelihood.

    Args:
        vocabulary: the tokens of the model.
        stop: strings that close it (one string, several, or None).
        max_tokens: the most tokens it may have, the closing one included; None for no limit.

    Raises:
        ValueError: an empty stop string, or ``max_tokens`` below 1.
        TypeError: one of another type.
    """

    vocabulary: Vocabulary
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_stop(self.stop))
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", check_int("max_tokens", self.max_tokens))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stopping):
            return NotImplemented
        return (
            (self.stop, self.max_tokens) == (other.stop, other.max_tokens)
            and self.vocabulary.eos_ids == other.vocabulary.eos_ids
            and self.vocabulary.same_as(other.vocabulary)
        )

    def __hash__(self) -> int:
        return hash((self.stop, self.max_tokens))

    @property
    def closes(self) -> bool:
        """Whether anything closes the sequence; False for a prefix likelihood."""
        return bool(self.stop) or self.max_tokens is not None

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

        None if they are still open. At one token EOS goes before stop, and stop before length.
        """
        state = self.start()
        for token in ids:
            reason = state.push(token)
            if reason is not None:
                return state.length, reason, state.stop
        return None

    def text(self, ids: Iterable[int]) -> Text:
        """The value of a site whose tokens are ``ids``, open or closed by the last of them;
        ``ValueError`` if they go on after they closed."""
        ids = tuple(int(t) for t in ids)
        closed = self.scan(ids)
        vocabulary = self.vocabulary
        string = vocabulary.decode([t for t in ids if t not in vocabulary.eos_ids])
        length, reason, stop = closed or (len(ids), None, None)
        if length < len(ids):
            raise ValueError(
                f"{len(ids)} tokens for a sequence that closes at token {length} ({reason}): "
                f"{string!r}"
            )
        body = string
        if stop is not None:
            # In bytes, as it was found: a half character before it decodes to a longer U+FFFD.
            text = vocabulary.bytes_of(ids)
            found = _first_stop(text, self._stop_bytes)
            assert found is not None
            body = text[: found[0]].decode("utf-8", errors="replace")
        return Text(string, ids, vocabulary, body=body, finish_reason=reason, stop=stop)

    @cached_property
    def _stop_bytes(self) -> list[bytes]:
        return [stop.encode() for stop in self.stop]


class StoppingState:
    """How far one sequence is from stopping. ``push`` takes its tokens one by one."""

    __slots__ = ("_stopping", "_ids", "_tail", "length", "reason", "stop")

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping
        self._tail = b""  # the text's last bytes, one fewer than the longest stop string
        self._ids: list[int] = []  # only where text is not the concatenation of its tokens
        self.length = 0  # tokens pushed
        self.reason: FinishReason | None = None  # what closed it; None while it is open
        self.stop: str | None = None  # the stop string that closed it, if one did

    def push(self, token: int) -> FinishReason | None:
        """Add a token. Returns why the sequence closed at it, or None while it is open;
        ``ValueError`` if it is closed already."""
        if self.reason is not None:
            raise ValueError(f"the sequence has closed ({self.reason}) at token {self.length}")
        stopping = self._stopping
        self.length += 1
        if not stopping.closes:
            return None
        if token in stopping.vocabulary.eos_ids:
            self.reason = "eos"
        elif stopping.stop and self._find_stop(token):
            self.reason = "stop"
        elif self.length == stopping.max_tokens:
            self.reason = "length"
        return self.reason

    def copy(self) -> StoppingState:
        """An independent copy."""
        other = StoppingState(self._stopping)
        other._tail, other._ids = self._tail, list(self._ids)
        other.length, other.reason, other.stop = self.length, self.reason, self.stop
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
        found = _first_stop(text, stops)
        if found is None:
            return False
        self.stop = stopping.stop[found[1]]
        return True


def _first_stop(text: bytes, stops: list[bytes]) -> tuple[int, int] | None:
    """The occurrence that ends first, and of those the longest: its start, and which stop it is."""
    found = [(start, n) for n, stop in enumerate(stops) if (start := text.find(stop)) >= 0]
    return min(found, key=lambda f: (f[0] + len(stops[f[1]]), f[0]), default=None)


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
    if closed is None:
        if vocabulary.eos_id is not None:
            return (*ids, vocabulary.eos_id)
        closers = {"stop": list(stopping.stop) or None, "max_tokens": stopping.max_tokens}
        closing = ", ".join(f"{name}={value!r}" for name, value in closers.items() if value)
        raise ValueError(
            f"{site}the observed text {str(obs)!r} does not close the site ({closing}), and the "
            "model has no EOS token that could be appended. Let it end as the site would, or leave "
            "out stop and max_tokens to score it as the beginning of a text."
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
