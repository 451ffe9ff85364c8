"""What texts were drawn with, kept for a while, to be compared with what scoring finds.

A text is drawn token by token, with a cache of keys and values, among a batch that becomes smaller,
and of an adapter with its weights merged. It is scored in one pass, packed with others, with the
adapter beside the base. Both compute the same log-probabilities, each with a rounding of its own.

    with logging_draws() as log:
        ...                        what language models draw is logged,
        ...                        and compared where it is scored with gradients, by ``log.pairs``
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lmppl.lm.batches.requests import Allowed, Draw, Drawn, Score, Scored


@dataclass(frozen=True, eq=False)
class LoggedText:
    """A text that has closed, with the language model that was asked for it."""

    lm: Any
    draw: Draw
    drawn: Drawn

    @property
    def _is_masked(self) -> bool:
        return self.draw.stopping.constraint is not None and self.draw.way == "masks"

    @property
    def request(self) -> Score:
        """What scores it under the law that it was drawn from (by rejection: under the model)."""
        draw, ids = self.draw, self.drawn.token_ids
        allowed = Allowed(draw.stopping, draw.steered) if self._is_masked else None
        return Score(draw.prefix, ids, draw.temperature, allowed=allowed, name=draw.name)

    @property
    def log_probs(self) -> Tensor:
        """(n,) what its ``request`` asks for, as it was when its tokens were drawn, nats."""
        log_probs, log_masses = self.drawn.log_probs, self.drawn.log_masses
        return log_probs - log_masses if self._is_masked and log_masses is not None else log_probs

    def answer(self, request: Score) -> Tensor | None:
        """The same of another request for its tokens; None if drawing does not tell."""
        if request.allowed is None:
            return self.drawn.log_probs
        return self.log_probs if self._is_masked else None


_Key = tuple[Any, tuple[int, ...], tuple[int, ...], float]


class DrawLog:
    """Texts that were drawn.

    Attributes:
        texts: all of them, as far as they closed, were begun here, and meet their constraint.
        pairs: of those that were scored with gradients afterwards, by the same model at the same
            temperature: the log-probabilities (n,) of the tokens, nats, as drawn and as scored.
    """

    def __init__(self) -> None:
        self.texts: list[LoggedText] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self._unscored: dict[_Key, list[LoggedText]] = {}

    def note_drawn(self, lm: Any, draws: Sequence[Draw], drawn: Sequence[Drawn]) -> None:
        for draw, found in zip(draws, drawn, strict=True):
            if draw.begun or not found.token_ids or not found.matches:
                continue
            text = LoggedText(lm, draw, found)
            self.texts.append(text)
            self._unscored.setdefault(_key(lm, text.request), []).append(text)

    def note_scored(self, lm: Any, requests: Sequence[Score], scored: Sequence[Scored]) -> None:
        for request, found in zip(requests, scored, strict=True):
            for text in self._unscored.pop(_key(lm, request), ()):  # each is compared once
                as_drawn = text.answer(request)
                if as_drawn is not None:
                    self.pairs.append((as_drawn, found.log_probs.detach()))


def _key(lm: Any, request: Score) -> _Key:
    return lm, request.prefix, request.continuation, request.temperature


_logs: list[DrawLog] = []


@contextmanager
def logging_draws() -> Iterator[DrawLog]:
    """In the block, all language models of this process log what they draw."""
    log = DrawLog()
    _logs.append(log)
    try:
        yield log
    finally:
        _logs.remove(log)


def note_drawn(lm: Any, draws: Sequence[Draw], drawn: Sequence[Drawn]) -> None:
    """Tell whoever logs that a language model has drawn texts."""
    for log in _logs:
        log.note_drawn(lm, draws, drawn)


def note_scored(lm: Any, requests: Sequence[Score], scored: Sequence[Scored]) -> None:
    """Tell whoever logs what a language model has found by a pass with gradients."""
    for log in _logs:
        log.note_scored(lm, requests, scored)
