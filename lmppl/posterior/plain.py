"""Python values as the states of ``lmppl.states``, and back: without pickle, so not all of them.

A value is written as a list of its type's name and what it holds. What is no plain value (an object of
a class of its own, a function) is written as its ``repr`` and read as an ``Unsaved`` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmppl.distributions import ToolResult
from lmppl.lm.tokens.text import Text
from lmppl.lm.tokens.vocabulary import Vocabulary

Written = list[Any]
"""A type's name and what a value of it holds."""

_SCALARS: tuple[type, ...] = (type(None), bool, int, float, str)
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset,
}  # fmt: skip


@dataclass(frozen=True)
class Unsaved:
    """Stands for a value that could not be saved: it prints as that did, and equals its like."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


def is_plain(value: Any) -> bool:
    """Whether a value can be written as it is."""
    if isinstance(value, (Text, torch.Tensor)):
        return not isinstance(value, ToolResult)
    if type(value) is dict:
        return all(is_plain(part) for pair in value.items() for part in pair)
    if type(value).__name__ in _SEQUENCES and type(value) in _SEQUENCES.values():
        return all(map(is_plain, value))
    return type(value) in _SCALARS


def write(value: Any, vocabularies: Vocabularies) -> Written:
    """A value as a state: what is plain as it is, all else as its ``repr``."""
    if not is_plain(value):
        return ["unsaved", repr(value)]
    if isinstance(value, Text):
        return ["text", write_text(value, vocabularies)]
    if isinstance(value, torch.Tensor):
        return ["tensor", value.detach().cpu()]
    if isinstance(value, dict):
        pairs = value.items()
        return ["dict", [[write(key, vocabularies), write(v, vocabularies)] for key, v in pairs]]
    if type(value) in _SCALARS:
        return ["scalar", value]
    return [type(value).__name__, [write(part, vocabularies) for part in value]]


def read(written: Written, vocabularies: Sequence[Vocabulary | None]) -> Any:
    """The value that ``write`` was given; ``vocabularies``: see ``read_text``."""
    kind, held = written
    if kind == "unsaved":
        return Unsaved(held)
    if kind == "text":
        return read_text(held, vocabularies)
    if kind == "dict":
        return {read(key, vocabularies): read(value, vocabularies) for key, value in held}
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([read(part, vocabularies) for part in held])
    return held


# --- texts ---------------------------------------------------------------------------------------


class Vocabularies:
    """The vocabularies of the texts that are written, each once.

    Attributes:
        found: in the order in which they came.
    """

    def __init__(self) -> None:
        self.found: list[Vocabulary] = []

    def index(self, vocabulary: Vocabulary) -> int:
        """The number of a vocabulary, which is added if it is new."""
        for i, known in enumerate(self.found):
            if known.same_as(vocabulary):
                return i
        self.found.append(vocabulary)
        return len(self.found) - 1


def write_text(text: str, vocabularies: Vocabularies) -> dict[str, Any]:
    """A text by its tokens, or a string."""
    if not isinstance(text, Text):
        return {"string": str(text)}
    return {
        "string": str(text),
        "body": text.body,
        "parts": [list(part) if isinstance(part, tuple) else part for part in text.parts],
        "ids": None if text._token_ids is None else list(text._token_ids),
        "finish_reason": text.finish_reason,
        "stop": text.stop,
        "vocabulary": vocabularies.index(text.vocabulary),
    }


def read_text(written: dict[str, Any], vocabularies: Sequence[Vocabulary | None]) -> str:
    """The text that was written. Without its vocabulary, a ``str``; ``vocabularies``: those of the
    language models that are there, by the numbers that the texts have, None where there is none."""
    string, number = written["string"], written.get("vocabulary")
    vocabulary = None if number is None else vocabularies[number]
    if vocabulary is None:
        return string
    parts = tuple(part if isinstance(part, str) else tuple(part) for part in written["parts"])
    ids = None if written["ids"] is None else tuple(written["ids"])
    rest = written["body"], written["finish_reason"], written["stop"]
    return Text._make(string, ids, parts, vocabulary, *rest)
