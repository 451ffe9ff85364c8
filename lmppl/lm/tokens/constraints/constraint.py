"""Constraint: which texts a site may hold.

A constraint speaks of a text's *body*, without the stop string and the EOS that close it, and of its
UTF-8 bytes: every way to cut a match into tokens is allowed. It is asked through states, each of which
stands for a text so far.
"""

from __future__ import annotations

import codecs
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmppl.lm.tokens.vocabulary import Vocabulary


class Constraint:
    """Which texts a site may hold.

    A constraint of your own is a subclass, in one of two ways:

    - by predicates: define ``allows(prefix)`` and, if not every such text is a match,
      ``complete(text)``. Such a site closes by EOS, stop or length only;
    - by states: define ``start(vocabulary)``, which returns a ``ConstraintState`` for the empty text,
      with a mask over the vocabulary.

    Both must be functions of the text alone. Two constraints are the same if their ``key`` is: by
    default, if they are of one class and their attributes, all hashable, were equal when they were
    first used. (So a program may make its constraint anew in every run.)
    """

    name = "constraint"
    """What it is called in messages: the argument of ``lm_sample`` that made it."""

    @property
    def is_lazy(self) -> bool:
        """Whether it is much cheaper to ask about a few tokens than about all of the vocabulary: by
        default of a constraint by predicates."""
        return type(self).start is Constraint.start

    @property
    def key(self) -> Hashable:
        """Equal for constraints that are the same."""
        known: dict[str, Any] = vars(self)
        owner, key = known.get("_key", (None, None))
        if owner != id(self):  # not known yet, or that of the object of which this is a copy
            key = type(self), tuple(sorted((n, v) for n, v in known.items() if n != "_key"))
            try:
                hash(key)
            except TypeError:  # attributes that may change
                key = type(self), (("id", id(self)),)
            known["_key"] = id(self), key
        return key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constraint) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def allows(self, prefix: str) -> bool:
        """Whether a matching text may begin with ``prefix``, whole characters. It is monotone: False of
        a text means False of every longer one that begins so."""
        raise NotImplementedError

    def complete(self, text: str) -> bool:
        """Whether ``text`` is a match."""
        return self.allows(text)

    def start(self, vocabulary: Vocabulary) -> ConstraintState | None:
        """The state of the empty text, of the tokens of ``vocabulary``; None if there is no match.

        Raises:
            ValueError: the constraint is broken in itself, or the vocabulary can't spell it.
            TypeError: its class defines neither ``allows`` nor ``start``.
        """
        if type(self).allows is Constraint.allows:
            raise TypeError(
                f"{type(self).__name__} defines neither allows(self, prefix) nor start(self, "
                "vocabulary): a Constraint needs one of them"
            )
        return PredicateState(self, vocabulary, b"").checked()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ConstraintState(ABC):
    """The state of a constraint after a text that a match may begin with. It never changes."""

    @abstractmethod
    def after(self, data: bytes) -> ConstraintState | None:
        """The state when ``data`` has followed; None if no match begins so. (A character may be split
        between two calls.)"""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the text so far is a match."""

    @property
    def is_final(self) -> bool:
        """Whether the text so far is a match that no bytes can extend to another one."""
        return False

    @abstractmethod
    def mask(self) -> Tensor:
        """(V,) bool: the tokens after whose bytes a match may still come. (What is said of special
        tokens and of those without bytes does not count.)"""

    def needed(self, *, cut: bool = False) -> float:
        """A lower bound of the number of further tokens to a match; infinite if there is none.

        Args:
            cut: whether a stop string may cut the text, so that one whose beginning matches counts as a
                match too.
        """
        return 0.0 if self.is_complete else 1.0

    def can_match_within(self, left: int, *, cut: bool = False) -> bool:
        """Whether a match within ``left`` further tokens is not ruled out; ``cut`` as in ``needed``."""
        return self.needed(cut=cut) <= left

    def within(self, left: int, *, cut: bool = False) -> Tensor | None:
        """(V,) bool: the tokens after which a match within ``left`` further ones is not ruled out; None:
        nothing is ruled out, beside what ``mask`` does. To rule out too much is an error; ``cut`` as in
        ``needed``."""
        return None


def checked_state(state: object, source: str) -> ConstraintState | None:
    """What a method of a constraint gave as a state, if it is one; ``source`` names the method.
    ``TypeError`` if not."""
    if state is not None and not isinstance(state, ConstraintState):
        raise TypeError(
            f"{source} returned {state!r}, of type {type(state).__name__}: it must return a "
            "lmppl.constraints.ConstraintState, or None where no match begins so"
        )
    return state


def checked_mask(mask: object, source: str, size: int) -> Tensor:
    """What a method of a state gave as a mask, if it is one over ``size`` tokens. ``TypeError`` or
    ``ValueError`` if not."""
    want = f"it must return a bool tensor of shape ({size},), one value for each token"
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        given = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{source} returned {given}: {want}")
    if mask.shape != (size,):
        raise ValueError(f"{source} returned a mask of shape {tuple(mask.shape)}: {want}")
    return mask


class PredicateState(ConstraintState):
    """The state of a constraint by predicates: the text itself."""

    def __init__(self, constraint: Constraint, vocabulary: Vocabulary, data: bytes) -> None:
        self._constraint, self._vocabulary, self._bytes = constraint, vocabulary, data

    def checked(self) -> PredicateState | None:
        """Itself, if a match may begin so."""
        whole, rest = split_characters(self._bytes)
        if whole is None or not self._ask(self._constraint.allows, whole):
            return None
        return self

    def after(self, data: bytes) -> PredicateState | None:
        return PredicateState(self._constraint, self._vocabulary, self._bytes + data).checked()

    @cached_property
    def is_complete(self) -> bool:  # type: ignore[override]
        whole, rest = split_characters(self._bytes)
        return whole is not None and not rest and self._ask(self._constraint.complete, whole)

    @cached_property
    def _mask(self) -> Tensor:
        vocabulary = self._vocabulary
        _warn_of_masks(self._constraint)
        allowed = torch.zeros(vocabulary.size, dtype=torch.bool)
        for token in vocabulary.text_tokens.nonzero().flatten().tolist():
            allowed[token] = self.after(vocabulary.token_bytes(token)) is not None
        return allowed

    def mask(self) -> Tensor:
        return self._mask

    def _ask(self, predicate: Callable[[str], bool], text: str) -> bool:
        what = f"{type(self._constraint).__name__}.{getattr(predicate, '__name__', '?')}({text!r})"
        try:
            answer = predicate(text)
        except Exception as error:
            error.add_note(f"raised by {what}, which must return True or False")
            raise
        if not isinstance(answer, (bool, np.bool_)):
            raise TypeError(
                f"{what} returned {answer!r}, of type {type(answer).__name__}: it must return True "
                "or False (see whether it lacks a return, or take bool(...) of it)"
            )
        return bool(answer)


_warned: set[type] = set()


def _warn_of_masks(constraint: Constraint) -> None:
    if type(constraint) not in _warned:
        _warned.add(type(constraint))
        warnings.warn(
            f"{constraint!r} is asked about every token of the vocabulary at every step, as "
            "constrain='local', method='exact' and 'mcmc', and guides need. That is slow: "
            "method='importance' and 'smc' ask about a few tokens, and a ConstraintState with a "
            "mask of its own can be fast",
            stacklevel=2,
        )


def split_characters(data: bytes) -> tuple[str | None, bytes]:
    """The whole characters that ``data`` begins with and the bytes of one that has begun; None and
    nothing if ``data`` can't be the beginning of UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None, b""
    rest = decoder.getstate()[0]
    if rest[:1] == b"\xed" and rest[1:2] > b"\x9f":  # a surrogate, which Python waits to refuse
        return None, b""
    return text, rest
