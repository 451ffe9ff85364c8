"""Checks of what users give. A refusal says what was given and what is allowed.

Numbers may be of any library (numpy's, a tensor of one element), and come back as Python's. The wrong
type, ``bool`` among the numbers, is a ``TypeError``; what is out of range is a ``ValueError``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# What other libraries call it, by what it is called here.
_ELSEWHERE = {
    "prefix": ("prompt",),
    "max_tokens": ("max_new_tokens", "max_length"),
    "num_samples": (
        "num_return_sequences",
        "n",
        "num_particles",
        "particles",
        "draws",
        "num_draws",
    ),
    "stop": ("stop_strings", "stop_sequences", "until"),
    "steps": (
        "step",
        "num_steps",
        "max_steps",
        "num_iterations",
        "iterations",
        "num_epochs",
        "epochs",
    ),
    "learning_rate": ("lr",),
    "batch_size": ("batch", "per_device_train_batch_size"),
    "eval_data": ("eval_dataset", "valid_data"),
    "obs": ("observed", "value"),
    "warmup": ("warmup_steps", "burn_in", "num_burnin_steps"),
    "num_chains": ("chains",),
}
_CANONICAL = {other: name for name, others in _ELSEWHERE.items() for other in others}
_BELONGS = {"max_tokens": "lm_sample", "stop": "lm_sample", "num_samples": "infer", "steps": "fit"}
_CUTS = "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"


def nearest(name: object, allowed: Iterable[str], cutoff: float = 0.4) -> str:
    """``"; did you mean 'smc'?"``, or nothing if none of the allowed names is like ``name``, whatever
    the case of its letters and the spaces around it."""
    plain = {other.strip().lower(): other for other in reversed(list(allowed))}
    near = difflib.get_close_matches(str(name).strip().lower(), plain, n=1, cutoff=cutoff)
    return f"; did you mean {plain[near[0]]!r}?" if near else ""


def did_you_mean(name: object, allowed: Iterable[str], what: str = "Allowed") -> str:
    """The end of a refusal of an unknown name: the allowed one that other libraries call so, or else the
    nearest, and all of them."""
    names = list(allowed)
    if what != "Allowed":  # names of the user's own
        return f"{nearest(name, names) or '.'} {what}: {', '.join(names)}"
    here = _CANONICAL.get(str(name), str(name))
    if name in _CUTS:
        hint = (
            f": {name} would make it another distribution than the model's. For likelier texts give a "
            "site temperature=, or weight the whole text by poutine.scale."
        )
    elif here in names:
        hint = f"; it is called {here!r} here."
    elif here in _BELONGS:
        hint = f"; that is {_BELONGS[here]}({here}=...)."
    else:
        hint = nearest(name, names, cutoff=0.55) or "."
    return f"{hint} {what}: {', '.join(names)}"


def with_known_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """The function, but its refusal of an unknown keyword says which one could be meant."""
    names = list(inspect.signature(function).parameters)
    known = frozenset(names)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if not known.issuperset(kwargs):
            name = next(name for name in kwargs if name not in known)
            raise TypeError(
                f"{function.__name__} has no option {name!r}{did_you_mean(name, names)}"
            )
        return function(*args, **kwargs)

    return checked


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
