"""Constrained sites by definition: which texts match is known from elsewhere, and the rest is counted.

Nothing here knows of masks, grammars or automata. A ``Language`` says which texts match; a
``ConstrainedSite`` enumerates the values of a site that is held to it.
"""

from __future__ import annotations

import codecs
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import decoders

from lmppl.testing.naive import Ids, NaiveLM
from lmppl.testing.tiny import byte_alphabet


@dataclass(frozen=True)
class Language:
    """Which texts match a constraint. Texts are UTF-8 bytes, as a token may end within a character.

    Args:
        matches: whether a text is a match.
        begins: whether a text is a match or the beginning of one.
        extends: whether a text is the beginning of a longer match.
    """

    matches: Callable[[bytes], bool]
    begins: Callable[[bytes], bool]
    extends: Callable[[bytes], bool]

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Language:
        """``texts`` match, and no others.

        Of an infinite language, give all up to a length at which every text that a site can write has
        come to an end, or is seen to go on.
        """
        bodies = {text.encode() for text in texts}
        begun = {body[:length] for body in bodies for length in range(len(body))}
        return cls(bodies.__contains__, (bodies | begun).__contains__, begun.__contains__)

    @classmethod
    def of_pieces(
        cls, matches: Callable[[str], bool], pieces: Sequence[str], longest: int
    ) -> Language:
        """The matches among all strings of at most ``longest`` of some ``pieces`` (characters, or
        longer); ``matches`` is for instance Python's ``re.compile(pattern).fullmatch``."""
        return cls.of_texts(
            text
            for length in range(longest + 1)
            for text in map("".join, itertools.product(pieces, repeat=length))
            if matches(text)
        )

    @classmethod
    def of_predicates(
        cls, allows: Callable[[str], bool], complete: Callable[[str], bool] | None = None
    ) -> Language:
        """What a ``Constraint`` by predicates says: ``allows`` whether a match may begin with a text,
        ``complete`` whether it is one (None: ``allows`` again). They are asked on whole characters, and
        nothing is known to be the end."""
        decode = codecs.getincrementaldecoder("utf-8")

        def begins(data: bytes) -> bool:
            try:
                return bool(allows(decode().decode(data)))  # less a character that has but begun
            except UnicodeDecodeError:
                return False

        def matches(data: bytes) -> bool:
            try:
                text = data.decode()
            except UnicodeDecodeError:
                return False
            return bool(allows(text)) and bool((complete or allows)(text))

        return cls(matches, begins, lambda data: True)


Outcome = Literal["open", "match", "cut", "dead"]


@dataclass(frozen=True)
class ConstrainedSite:
    """The values of a text site with a constraint, and their densities, token by token.

    EOS, or a stop string, closes the text, and what stands before it must match. So does a match that
    nothing extends, and one of ``max_tokens`` tokens. A special token, or one without bytes, never
    belongs to a match.

    Args:
        lm: the language model.
        language: which bodies match.
        prefix: the tokens that the text follows.
        max_tokens: the most tokens it has.
        stop: stop strings.
        temperature: of every next-token distribution.
        is_local: renormalise every next-token distribution over the tokens that are allowed: after
            which the text is closed and matches, or begins a match, or is a match and the beginning
            of a stop string. ``max_tokens`` is not looked at: what it cuts is lost.
    """

    lm: NaiveLM
    language: Language
    prefix: Ids
    max_tokens: int
    stop: tuple[str, ...]
    temperature: float
    is_local: bool

    def enumerate(self) -> dict[Ids, float]:
        """Every value that matches, with its log-density in nats."""
        values: dict[Ids, float] = {}
        open_: dict[Ids, float] = {(): 0.0}
        while open_:
            longer: dict[Ids, float] = {}
            for tokens, log_prob in open_.items():
                for token, term in enumerate(self.next_log_probs(tokens)):
                    outcome = self.outcome((*tokens, token))
                    if outcome in ("match", "open"):
                        found = values if outcome == "match" else longer
                        found[(*tokens, token)] = log_prob + term
            open_ = longer
        return values

    def log_prob(self, tokens: Ids) -> float:
        """The log-density of ``tokens``, nats; ``-inf`` if they are no value that matches."""
        outcomes = [self.outcome(tokens[:length]) for length in range(1, len(tokens) + 1)]
        if outcomes[-1:] != ["match"] or any(outcome != "open" for outcome in outcomes[:-1]):
            return -math.inf
        return math.fsum(self.next_log_probs(tokens[:n])[t] for n, t in enumerate(tokens))

    def next_log_probs(self, tokens: Ids) -> list[float]:
        """Of every token after an open text, ``tokens``, in nats."""
        log_probs = self.lm.next_log_probs((*self.prefix, *tokens), self.temperature)
        if self.is_local:
            dead = [self.outcome((*tokens, token)) == "dead" for token in range(len(log_probs))]
            log_probs = log_probs.masked_fill(torch.tensor(dead), -math.inf)
            if not all(dead):
                log_probs = torch.log_softmax(log_probs, -1)
        return log_probs.tolist()

    def outcome(self, tokens: Ids) -> Outcome:
        """What ``tokens`` have come to, which were open before the last: they are still open, or closed
        with a match, or cut at ``max_tokens`` without one, or can't match any more."""
        matches = self.language.matches
        if tokens[-1] in self.lm.eos_ids:
            return "match" if matches(self._bytes(tokens[:-1])) else "dead"
        text = self._bytes(tokens)
        if not self._bytes(tokens[-1:]) or tokens[-1] in self.lm.tokenizer.all_special_ids:
            return "dead"
        body = self._body(text)
        if body is not None:
            return "match" if matches(body) else "dead"
        if matches(text) and not self.language.extends(text):
            return "match"
        if not self.language.begins(text) and not self._is_before_stop(text):
            return "dead"
        if len(tokens) == self.max_tokens:
            return "match" if matches(text) else "cut"
        return "open"

    def _body(self, text: bytes) -> bytes | None:
        """What stands before the stop string that is complete first; None if there is none."""
        for end in range(len(text) + 1):
            ends = [s for s in map(str.encode, self.stop) if text[:end].endswith(s)]
            if ends:
                return text[: end - max(map(len, ends))]
        return None

    def _is_before_stop(self, text: bytes) -> bool:
        """Whether it is a match, and after it the beginning of a stop string."""
        begun = [s[:length] for s in map(str.encode, self.stop) for length in range(1, len(s))]
        return any(text.endswith(s) and self.language.matches(text[: -len(s)]) for s in begun)

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(_token_bytes(self.lm.tokenizer, token) for token in tokens)


def _token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token of a byte-level tokenizer, or of ``tiny_lm``, adds to a text."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:
        return b""
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        byte_of = {character: byte for byte, character in byte_alphabet().items()}
        return bytes(byte_of[character] for character in name if character in byte_of)
    return name.encode()
