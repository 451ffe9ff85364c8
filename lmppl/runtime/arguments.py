"""A program's arguments: bound to its signature, and copied for each of its runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pyro.poutine.messenger import _context_wrap

from lmppl.checks import check_callable

Args = tuple[Any, ...]
"""A program's positional arguments."""


def name_of(program: Callable[..., Any]) -> str:
    """A program's name, for messages."""
    written = _written(program)
    return getattr(written, "__name__", type(written).__name__)


def _written(program: Any) -> Any:
    """What somebody wrote, without decorators, Pyro's handlers and ``functools.partial``."""
    inner = inspect.unwrap(program)
    if isinstance(inner, functools.partial):
        inner = inner.args[1] if inner.func is _context_wrap else inner.func
    return inner if inner is program else _written(inner)


def check_program(program: Any, what: str = "model") -> None:
    """Raise ``TypeError`` unless a program is a function that runs when it is called: no ``async def``
    and no generator. ``what``: the argument that it was given as, for messages."""
    check_callable(what, program)
    function = _written(program)
    for code in (function, type(function).__call__):
        if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
            raise TypeError(
                f"{what}: {name_of(program)} is an 'async def', which does not run when it is called: "
                "write it as a plain def. (Particles wait for language models side by side as it is; "
                "what must be awaited goes in lmppl.tool(name, lambda: asyncio.run(...)).)"
            )
        if inspect.isgeneratorfunction(code):
            raise TypeError(
                f"{what}: {name_of(program)} is a generator function (it has a yield), which does not "
                "run when it is called: write it as a plain def that returns its result"
            )


def bind(
    program: Callable[..., Any], args: Args, kwargs: Mapping[str, Any] | None = None
) -> tuple[Callable[..., Any], Args]:
    """Bind arguments to a program: the program and the positional arguments to call it with.

    Arguments by name that can be positional become so, as guides take positional arguments only; the
    others are bound to the program. Without ``kwargs``, a single dict holds the arguments by name if
    it can: if its keys are names of the program's parameters, all that it needs among them. (With
    ``kwargs={}`` it is an argument like any other.)

    Raises:
        TypeError: if the program does not take these arguments.
    """
    check_program(program)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs= takes a dict of arguments by name, given {kwargs!r}")
    try:
        signature = inspect.signature(program)
    except (TypeError, ValueError):  # some callables have none
        return (functools.partial(program, **kwargs) if kwargs else program), args
    if kwargs is None and len(args) == 1:
        (only,) = args
        if _is_by_name(signature, only):
            args, kwargs = (), only
    try:
        bound = signature.bind(*args, **(kwargs or {}))
    except TypeError as error:
        named = f" and {sorted(kwargs)}" if kwargs else ""
        raise TypeError(
            f"the program {name_of(program)}{signature} was given {len(args)} positional "
            f"argument{'s' * (len(args) != 1)}{named}: {error}"
        ) from None
    if not kwargs:
        return program, args
    bound.apply_defaults()
    rest = {name: value for name, value in bound.kwargs.items() if name in kwargs}
    return (functools.partial(program, **rest) if rest else program), bound.args


def _is_by_name(signature: inspect.Signature, value: Any) -> bool:
    """Whether a value is a dict whose keys are parameters of the program, all required ones included."""
    if not isinstance(value, Mapping) or not value:
        return False
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {name for name, p in signature.parameters.items() if p.kind not in variadic}
    if not all(key in names for key in value):
        return False
    try:
        signature.bind(**value)
    except TypeError:
        return False
    return True


def signature_of(program: Callable[..., Any]) -> inspect.Signature:
    """What inputs are to fit: all but what ``functools.partial`` or a default has bound by name.
    Raises ``TypeError`` for what is no program."""
    check_program(program)
    signature = inspect.signature(program)
    parameters = signature.parameters.values()
    free = [p for p in parameters if p.kind is not p.KEYWORD_ONLY or p.default is p.empty]
    return signature.replace(parameters=free)


def items_of(data: Any, what: str = "data") -> Iterable[Any]:
    """The items of a collection. (A map-style ``torch.utils.data.Dataset`` has a length and an item
    for each index, and nothing to iterate.)

    Raises:
        TypeError: for what is one input and not a collection of them.
    """
    if isinstance(data, (str, bytes, Mapping)):
        indexed = False
    elif isinstance(data, Iterable):
        return data
    else:
        indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not indexed:
        raise TypeError(
            f"{what} must be a list of inputs, given one {type(data).__name__}: put it in a list, "
            "[(x, y)] or [{'x': x, 'y': y}]"
        )
    return (data[index] for index in range(len(data)))


def by_kind(item: Any) -> tuple[Args, Mapping[str, Any]]:
    """The positional arguments and the arguments by name of one item of the data, a tuple or a dict.
    Raises ``TypeError`` for anything else."""
    if isinstance(item, Mapping):
        return (), item
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    raise TypeError(
        f"it is a {type(item).__name__}; an input is a tuple of positional arguments, "
        "(x,), or a dict of arguments by name"
    )


def positional(signature: inspect.Signature, item: Any, index: int, what: str = "data") -> Args:
    """One item of the data, a tuple or a dict, as positional arguments for ``signature_of(program)``.
    Raises ``TypeError`` if it does not fit; says which item."""
    where = f"item {index} of {'the data' if what == 'data' else what}"
    try:
        args, by_name = by_kind(item)
        bound = signature.bind(*args, **by_name)
    except TypeError as error:
        raise TypeError(f"{where} does not fit the program {signature}: {error}") from None
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"{where}: the program's keyword-only arguments {sorted(bound.kwargs)} are bound with "
            "functools.partial, not given with the inputs"
        )
    return bound.args


def call(program: Callable[..., Any], args: Args) -> Any:
    """Run a program on its own copies of the lists, dicts and sets among its arguments.

    So a program may append to its argument without another run's seeing it. Copied is what the
    containers hold, too, if it is a list, dict, set or tuple, and what ``functools.partial`` has
    bound (of a program that is a partial itself, and not within a handler). Shared are objects of
    all other types (tensors, models, subclasses of ``dict``), and what the program reaches
    otherwise: its globals, its defaults, the variables that it closes over.
    """
    copies: dict[int, Any] = {}
    if type(program) is functools.partial:  # a subclass, as Pyro's, may be more than that
        bound, keywords = _copied((program.args, program.keywords), copies)
        program = functools.partial(program.func, *bound, **keywords)
    return program(*_copied(args, copies))


_CONTAINERS = (list, dict, set, tuple)


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of nested containers; what stood in two places, or in itself, does so in the copy."""
    if type(value) not in _CONTAINERS:
        return value
    if id(value) in copies:
        return copies[id(value)]
    if type(value) is tuple:
        parts = [_copied(part, copies) for part in value]
        changed = any(new is not old for new, old in zip(parts, value, strict=True))
        return tuple(parts) if changed else value
    new = copies[id(value)] = value.copy()
    if type(value) is list:
        new[:] = [_copied(part, copies) if type(part) in _CONTAINERS else part for part in new]
    elif type(value) is dict:
        new.update((key, _copied(part, copies)) for key, part in value.items())
    return new
