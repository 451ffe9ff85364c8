"""Checks of what users give, each written once. A refusal says what was given and what is allowed."""

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
    """Raise ``ValueError`` unless a value is one of the allowed strings."""
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        choices = ", ".join(map(repr, names))
        raise ValueError(f"{argument}={value!r}, allowed: {choices}{nearest(value, names)}")


def check_int(argument: str, value: Any, least: int = 1) -> int:
    """A whole number, numpy's among them, as an ``int``.

    Raises:
        TypeError: for another type, ``bool`` among them.
        ValueError: if it is below ``least``.
    """
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
    argument: str,
    value: Any,
    *,
    above: float | None = None,
    least: float = -math.inf,
    most: float = math.inf,
) -> float:
    """A finite number of any type, a tensor's among them, as a ``float``.

    Args:
        argument: its name, for the message.
        value: what was given.
        above: it must be larger than this.
        least, most: it must be within these.

    Raises:
        TypeError: if it is no single number.
        ValueError: if it is not finite, or out of range.
    """
    bounds = [] if above is None else [f"above {above:g}"]
    bounds += [f"at least {least:g}"] * (least > -math.inf)
    bounds += [f"at most {most:g}"] * (most < math.inf)
    allowed = " ".join(["a number", " and ".join(bounds)]).strip()
    try:
        if _is_bool(value) or isinstance(value, (str, bytes)) or getattr(value, "ndim", False):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{argument}={value!r}: it must be {allowed}") from None
    in_range = least <= number <= most and (above is None or number > above)
    if not (in_range and math.isfinite(number)):
        raise ValueError(f"{argument}={value!r}: it must be {allowed}")
    return number


def check_seed(seed: Any) -> int | None:
    """A seed of torch's random streams as an ``int``; None: there is none.

    Raises:
        TypeError: for another type.
        ValueError: if it is negative, or takes more than 64 bits.
    """
    if seed is None:
        return None
    allowed = "it must be an int of at least 0 and below 2**64, or None"
    try:
        number = check_int("seed", seed, least=0)
    except (TypeError, ValueError) as error:
        raise type(error)(f"seed={seed!r}: {allowed}") from None
    if number >= 2**64:
        raise ValueError(f"seed={seed!r}: {allowed}")
    return number


def check_flag(argument: str, value: Any) -> bool:
    """True or False, numpy's among them. Raises ``TypeError`` for anything else."""
    if not _is_bool(value) or getattr(value, "ndim", False):
        raise TypeError(f"{argument}={value!r}: it must be True or False")
    return bool(value)


def check_callable(argument: str, value: Any) -> None:
    """Raise ``TypeError`` unless a value can be called."""
    if not callable(value):
        raise TypeError(f"{argument} must be a function, given {type(value).__name__} ({value!r})")


def _is_bool(value: Any) -> bool:
    """Whether it is a ``bool`` of Python, numpy or torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
