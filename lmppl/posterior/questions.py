"""What is asked of a posterior: of one site or function. Who asks of several is told how."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

Self = TypeVar("Self")
P = ParamSpec("P")
T = TypeVar("T")


def of_one(method: Callable[Concatenate[Self, P], T]) -> Callable[Concatenate[Self, P], T]:
    """A method of a posterior whose first argument is the name of one site, or one function.

    Its refusal of several says how they are asked for together; of an option that is given by position,
    what the options are called.
    """
    parameters = list(inspect.signature(method).parameters.values())[1:]
    most = sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)
    options = [f"{each.name}=" for each in parameters if each.kind is each.KEYWORD_ONLY]

    @functools.wraps(method)
    def asked(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0] if args else None
        is_one = first is None or isinstance(first, str) or callable(first)
        if is_one and len(args) <= most:
            return method(self, *args, **kwargs)
        given = list(first) if isinstance(first, list | tuple) else list(args)
        shown = ", ".join(map(_shown, given))
        raise TypeError(
            f"{method.__name__} takes the name of one site, or one function of a sample's values, given "
            f"{shown if given == list(args) else f'[{shown}]'}{_fix(method.__name__, given, options)}"
        )

    return asked


def _fix(method: str, given: Sequence[Any], options: Sequence[str]) -> str:
    """How to ask for what was asked for, as the end of the refusal."""
    if len(given) == 1:
        return ""
    if all(isinstance(each, str) for each in given):
        if not options:  # of numbers
            return ": ask for one after the other"
        values = ", ".join(f"v[{name!r}]" for name in given)
        table = f"posterior.table({', '.join(map(repr, given))}, joint=True)"
        return f": for their joint values, posterior.{method}(lambda v: ({values})), or {table}"
    if not options:
        return ". Several levels are one list: q=[0.05, 0.95]" * (method == "quantile")
    return f". What else it takes has a name: {', '.join(options)}"


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | bool | int | float) else type(value).__name__
