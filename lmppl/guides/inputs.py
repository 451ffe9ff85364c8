"""The inputs that a guide is trained on, checked against the program's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def read_inputs(program: Callable[..., Any], data: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Inputs as tuples of positional arguments.

    Args:
        program: the program.
        data: tuples (or lists) of positional arguments, or dicts of arguments by name.

    Raises:
        TypeError: an item of another type, or one that does not fit the program; says which.
        ValueError: if there is no item.
    """
    if isinstance(data, (str, Mapping)):
        raise TypeError(
            f"data must be a list of inputs, given one {type(data).__name__}: put it in a list, "
            "[(x, y)] or [{'x': x, 'y': y}]"
        )
    signature = inspect.signature(program)
    inputs = [_positional(signature, item, i) for i, item in enumerate(data)]
    if not inputs:
        raise ValueError("data holds no input: give at least one, [(x, y)]")
    return inputs


def _positional(signature: inspect.Signature, item: Any, index: int) -> tuple[Any, ...]:
    try:
        if isinstance(item, Mapping):
            bound = signature.bind(**item)
        elif isinstance(item, (tuple, list)):
            bound = signature.bind(*item)
        else:
            raise TypeError(
                f"it is a {type(item).__name__}; an input is a tuple of positional arguments, "
                "(x,), or a dict of arguments by name"
            )
    except TypeError as error:
        raise TypeError(
            f"item {index} of the data does not fit the program {signature}: {error}"
        ) from None
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"item {index} of the data: the program's keyword-only arguments "
            f"{sorted(bound.kwargs)} are bound with functools.partial, not given with the inputs"
        )
    return bound.args
