"""Which run of training a checkpoint is of: what must be equal for another run to go on with it."""

from __future__ import annotations

import dis
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from lmppl.guides.guide import TrainableGuide
from lmppl.guides.parameters import adapter_config, base_state
from lmppl.training.inputs import Input, Source
from lmppl.training.options import FitOptions


def identity(
    guide: TrainableGuide, source: Source, options: FitOptions, steps: int, seed: int
) -> dict[str, Any]:
    """What must be equal for a run to be the same one, by what it is called in messages."""
    given = json.loads(json.dumps(options.plain(), default=float))
    kind = guide.identity().items()
    return {
        "program": program_fingerprint(guide.model),
        **{k: program_fingerprint(value) if callable(value) else value for k, value in kind},
        "adapters": [_lora(adapter_config(adapter)) for adapter in guide.adapters()[:1]],
        "language model": base_state(guide.base),
        "data": digest_of([_data(input_) for input_ in source.kept]),
        "arguments to simulate on": digest_of(source.origin),
        "number of steps": steps,
        "seed": seed,
        **{f"option {name}": value for name, value in given.items()},
    }


def _data(input_: Input) -> list[Any]:
    """What the user gave of an input. (What was simulated follows from the seed.)"""
    given = [] if input_.exact else [record.values for record in input_.given]
    return [input_.args, given]


def _lora(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What makes an adapter the kind that it is (nothing, if all weights are trained)."""
    kept = ("r", "lora_alpha", "target_modules")
    return {} if config is None else {key: config[key] for key in kept}


def program_fingerprint(program: Callable[..., Any]) -> str:
    """The name of a program and a hash of what it does: its code (comments and line numbers don't
    count), the constants that it closes over or reads, and the functions of its module that it
    calls. What these assign themselves, as a counter, and objects that can change don't count."""
    layers, bound = _layers(program)
    name = getattr(program, "__qualname__", type(program).__name__)
    if layers:
        name = layers[-1].__qualname__
    if bound:
        name += f" with {digest_of(bound)}"
    if not layers:
        return name
    version = f"{sys.version_info.major}.{sys.version_info.minor}"  # byte code differs by version
    return f"{name} {_digest_of_functions(layers)[:16]} (Python {version})"


def _layers(program: Any) -> tuple[list[FunctionType], list[Any]]:
    """The functions that a program is made of, from its decorators to itself, and the arguments that
    ``functools.partial`` has bound. (Decorators of lmppl and Pyro don't count.)"""
    functions: list[FunctionType] = []
    bound: list[Any] = []
    seen: list[Any] = []
    while program is not None and all(program is not outer for outer in seen):
        seen.append(program)
        if isinstance(program, functools.partial):
            bound += [program.args, program.keywords]
            program = program.func
            continue
        fn = _function_of(program)
        inner = getattr(program, "__wrapped__", None)
        ours = fn is not None and fn.__globals__.get("__name__", "").startswith(("lmppl.", "pyro."))
        if fn is not None and not (ours and inner is not None):
            functions.append(fn)
        program = inner
    return functions, bound


def _function_of(value: Any) -> FunctionType | None:
    """The Python function behind a callable."""
    if isinstance(value, FunctionType):
        return value
    if isinstance(value, MethodType):
        return _function_of(value.__func__)
    if isinstance(value, type) or not callable(value):
        return None
    call = type(value).forward if isinstance(value, torch.nn.Module) else type(value).__call__
    return call if isinstance(call, FunctionType) else None


def _digest_of_functions(roots: Sequence[FunctionType]) -> str:
    """Of functions and those of their modules that they reach."""
    reached = {fn: _Reads.of(fn) for fn in roots}
    waiting = list(roots)
    while waiting:
        for value in reached[waiting.pop()].values.values():
            if isinstance(value, FunctionType) and value not in reached:
                reached[value] = _Reads.of(value)
                waiting.append(value)
    assigned = {key for reads in reached.values() for key in reads.assigned}
    digest = hashlib.sha256()
    for fn, reads in reached.items():
        digest.update(f"{fn.__qualname__}:".encode() + _code(fn.__code__))
        for (name, key), value in reads.values.items():
            if key not in assigned and _is_constant(value):
                digest.update(f"{name} {digest_of(value)}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Reads:
    """What a function reads from outside, by name and place, and the places that it assigns to."""

    values: dict[tuple[str, Any], Any]
    assigned: set[Any]

    @classmethod
    def of(cls, fn: FunctionType) -> _Reads:
        codes = list(_codes(fn.__code__))
        steps = [(i.opname, i.argval) for code in codes for i in dis.get_instructions(code)]
        cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        module = id(fn.__globals__)
        values: dict[tuple[str, Any], Any] = {
            (name, id(cell)): _contents(cell) for name, cell in cells.items()
        }
        for name in sorted({name for op, name in steps if op in ("LOAD_GLOBAL", "LOAD_NAME")}):
            values[name, (module, name)] = fn.__globals__.get(name)
        defaults: dict[Any, Any] = dict(fn.__kwdefaults__ or {})
        defaults |= enumerate(fn.__defaults__ or ())
        values |= {(f"default {name}", None): value for name, value in defaults.items()}
        assigned: set[Any] = {(module, name) for op, name in steps if op == "STORE_GLOBAL"}
        assigned |= {id(cells[name]) for op, name in steps if op == "STORE_DEREF" and name in cells}
        for place, value in values.items():
            called = _function_of(getattr(value, "__wrapped__", value))
            if called is not None and called.__globals__ is fn.__globals__:
                values[place] = called
        return cls(values, assigned)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_constant(value: Any) -> bool:
    """Whether a value cannot change: a number, a string, a tuple of those."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    return isinstance(value, (str, bytes, int, float, type(None)))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _code(code: CodeType) -> bytes:
    inner = [_code(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    return b"|".join([code.co_code, repr(code.co_names).encode(), *inner])


def _constant(value: Any) -> bytes:
    """Sets (of ``x in {"a", "b"}``) have another order in every process."""
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value).encode()


def digest_of(data: Any) -> str:
    """A hash of the texts and numbers in the data; of other objects only the type counts."""
    digest = hashlib.sha256()

    def feed(item: Any, within: tuple[int, ...] = ()) -> None:
        if id(item) in within:
            return  # it holds itself
        inside = (*within, id(item))
        if isinstance(item, (str, bytes, int, float, type(None))):
            digest.update(f"{type(item).__name__}:{item!s};".encode())
        elif isinstance(item, Mapping):
            for key, value in item.items():
                feed(key, inside)
                feed(value, inside)
        elif isinstance(item, (list, tuple)):
            digest.update(f"[{len(item)}".encode())
            for element in item:
                feed(element, inside)
        elif isinstance(item, frozenset):
            digest.update(_constant(item))
        elif torch.is_tensor(item) and item.layout is torch.strided:
            digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
            flat = item.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray) and item.dtype != object:
            digest.update(f"{item.dtype}{item.shape}".encode() + item.tobytes())
        else:
            digest.update(type(item).__qualname__.encode())

    feed(data)
    return digest.hexdigest()[:16]
