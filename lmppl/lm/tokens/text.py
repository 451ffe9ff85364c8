"""Text: a string that remembers the tokens it was made of.

A language model defines a density over *token sequences*, not over strings: ``"ab"`` may be one
token or two. So a value drawn from a model keeps its tokens, also within a later prefix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from lmppl.lm.tokens.vocabulary import Vocabulary

FinishReason = Literal["stop", "eos", "length", "constraint"]


class Text(str):
    """An immutable ``str`` with its tokens.

    Only ``+`` keeps tokens: ``x + z`` is a ``Text`` whose parts are those of ``x`` and ``z``. All
    other ``str`` operations (f-strings, slices, ``strip``, ...) return a plain ``str``, which is
    tokenised anew when it becomes a prefix.

    Attributes:
        token_ids: the tokens, the closing one included; of a concatenation, the tokens it
            contributes to a prefix.
        body: the text without the stop string that closed it.
        finish_reason: what closed it: ``"stop"``, ``"eos"``, ``"length"``, or ``"constraint"``: it is a
            match that nothing can extend. None if nothing did.
        stop: the stop string that closed it, or None.
        parts: what it contributes to a prefix: token tuples (EOS removed), and ``str`` to tokenise.
        vocabulary: the vocabulary that its tokens belong to.
    """

    __slots__ = ("_token_ids", "body", "finish_reason", "parts", "stop", "vocabulary")

    _token_ids: tuple[int, ...] | None
    body: str
    finish_reason: FinishReason | None
    parts: tuple[str | tuple[int, ...], ...]
    stop: str | None
    vocabulary: Vocabulary

    def __new__(
        cls,
        string: str,
        token_ids: Iterable[int],
        vocabulary: Vocabulary,
        *,
        body: str | None = None,
        finish_reason: FinishReason | None = None,
        stop: str | None = None,
    ) -> Text:
        ids = tuple(token_ids)
        parts = (tuple(t for t in ids if t not in vocabulary.eos_ids),)
        body = string if body is None else body
        return cls._make(string, ids, parts, vocabulary, body, finish_reason, stop)

    @classmethod
    def _make(
        cls, string: str, ids: Any, parts: tuple[Any, ...], vocabulary: Vocabulary, *rest: Any
    ) -> Text:
        self = super().__new__(cls, string)
        names = ("_token_ids", "parts", "vocabulary", "body", "finish_reason", "stop")
        for name, value in zip(names, (ids, parts, vocabulary, *rest), strict=True):
            object.__setattr__(self, name, value)
        return self

    def __setattr__(self, name: str, value: Any = None) -> None:
        # Particles and traces share texts.
        raise AttributeError(f"a Text is immutable: its {name!r} cannot be changed")

    __delattr__ = __setattr__

    @property
    def token_ids(self) -> tuple[int, ...]:
        if self._token_ids is not None:
            return self._token_ids
        ids: list[int] = []
        for part in self.parts:
            ids.extend(self.vocabulary.encode(part) if isinstance(part, str) else part)
        return tuple(ids)

    def __add__(self, other: str) -> Text:  # type: ignore[override]
        return self._join(self, other)

    def __radd__(self, other: str) -> Text:
        return self._join(other, self)

    def _join(self, first: Any, second: Any) -> Text:
        other = second if first is self else first
        if not isinstance(other, str):
            raise TypeError(
                f"cannot join {str(self)!r} and {other!r}: only strings are joined with +; a prefix "
                "of several parts is one list, [before, z, after]"
            )
        if isinstance(other, Text) and not self.vocabulary.same_as(other.vocabulary):
            raise ValueError(
                f"cannot join {str(self)!r} and {str(other)!r}: their tokens belong to different "
                "tokenizers. Join str(z) instead of z to tokenise one of them anew."
            )
        string, parts = str(first) + str(second), (*_parts(first), *_parts(second))
        return Text._make(string, None, parts, self.vocabulary, string, None, None)

    # Equality and hash are those of the string (inherited): caches must key on token_ids.

    def __repr__(self) -> str:
        return f"Text({str(self)!r})"

    def __getnewargs_ex__(self) -> Any:  # pragma: no cover - copying shares, pickling is refused
        raise TypeError("a Text holds a tokenizer and is not pickled: store str(z) and z.token_ids")

    def __copy__(self) -> Text:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Text:
        return self


def _parts(value: str) -> tuple[Any, ...]:
    return value.parts if isinstance(value, Text) else (str(value),)
