"""Checks of what users give. A refusal says what was given and what is allowed.

Numbers may be of any library (numpy's, a tensor of one element), and come back as Python's. The wrong
type, ``bool`` among the numbers, is a ``TypeError``; what is out of range is a ``ValueError``.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from typing import Any


def nearest(name: object, allowed: Iterable[str], cutoff: float = 0.4) -> str:
    """``"; did you mean 'smc'?"``, or nothing if none of the allowed names is like ``name``."""
    near = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def did_you_mean(name: object, allowed: Iterable[str], what: str = "Allowed") -> str:
    """The end of a refusal of an unknown name: the nearest of the allowed ones, and all of them."""
    names = list(allowed)
    return f"{nearest(name, names) or '.'} {what}: {', '.join(names)}"


def check_choice(argument: str, value: object, allowed: Iterable[str]) -> None:
    """Check that a value is one of the allowed strings."""
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        choices = ", ".join(map(repr, names))
        raise ValueError(f"{argument}={value!r}, allowed: {choices}{nearest(value, names)}")


def check_int(argument: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``."""
    try:
        if _is_bool(value):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}={value!r}: it must be an int of at least {least}") from None
    if number < least:
        raise ValueError(f"{argument}={value!r}: it must be an int of at least {least}")
    return number


def check_number(
    argument: str, value: Any, *, above: float = -math.inf, least: float = -math.inf,
    most: float = math.inf,
) -> float:  # fmt: skip
    """A finite number above ``above``, and from ``least`` to ``most``."""
    limits = ("above", above), ("at least", least), ("at most", most)
    bounds = [f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit)]
    message = f"{argument}={value!r}: it must be a number {' and '.join(bounds)}".rstrip()
    try:
        if _is_bool(value) or isinstance(value, (str, bytes)) or getattr(value, "ndim", False):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(message) from None
    if not (above < number and least <= number <= most and math.isfinite(number)):
        raise ValueError(message)
    return number


def check_seed(seed: Any) -> int | None:
    """A seed of torch's random streams, an int of at most 64 bits; None: there is none."""
    if seed is None:
        return None
    number = check_int("seed", seed, least=0)
    if number >= 2**64:
        raise ValueError(f"seed={seed!r}: it must be below 2**64")
    return number


def check_flag(argument: str, value: Any) -> bool:
    """True or False."""
    if not _is_bool(value) or getattr(value, "ndim", False):
        raise TypeError(f"{argument}={value!r}: it must be True or False")
    return bool(value)


def check_callable(argument: str, value: Any) -> None:
    """Check that a value can be called."""
    if not callable(value):
        raise TypeError(f"{argument} must be a function, given {type(value).__name__} ({value!r})")


def _is_bool(value: Any) -> bool:
    """Whether it is a ``bool`` of Python, numpy or torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
