"""Which run of training a checkpoint is of: what must be equal for another run to go on with it."""

from __future__ import annotations

import dis
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from lmppl.guides.guide import TrainableGuide
from lmppl.guides.parameters import adapter_config, base_state
from lmppl.lm.tokens.constraints.constraint import Constraint
from lmppl.lm.tokens.constraints.guidance import is_schema_class
from lmppl.training.inputs import Source
from lmppl.training.options import FitOptions


def identity(
    guide: TrainableGuide, source: Source, options: FitOptions, steps: int, seed: int
) -> dict[str, Any]:
    """What must be equal for a run to be the same one, by what it is called in messages."""
    kind = guide.identity().items()
    loras = [adapter_config(adapter) or {} for adapter in guide.adapters()[:1]]
    of_lora = ("r", "lora_alpha", "target_modules")  # none of them, if all weights are trained
    # Of an input, what the user gave: what was simulated follows from the seed.
    data = [[i.args, [] if i.exact else [r.values for r in i.given]] for i in source.kept]
    plain = json.loads(json.dumps(options.plain(), default=float))
    return {
        "program": program_fingerprint(guide.model),
        **{k: program_fingerprint(value) if callable(value) else value for k, value in kind},
        "adapters": [{key: lora[key] for key in of_lora if key in lora} for lora in loras],
        "language model": base_state(guide.base),
        "data": digest_of(data),
        "arguments to simulate on": digest_of(source.origin),
        "number of steps": steps,
        "seed": seed,
        **{f"option {name}": value for name, value in plain.items()},
    }


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on, by package."""
    names = {"lmppl": "lmppl-pyro"} | {name: name for name in ("torch", "transformers", "peft")}
    return {name: metadata.version(package) for name, package in names.items()}


def program_fingerprint(program: Callable[..., Any]) -> str:
    """The name of a program and a hash of what it does: its code (comments and line numbers don't
    count), the constants that it closes over or reads, and the functions of its module that it
    calls. What these assign themselves, as a counter, and objects that can change don't count."""
    layers, bound = _layers(program)
    named = layers[-1] if layers else program
    name = getattr(named, "__qualname__", type(named).__name__)
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
        fn, inner = _function_of(program), getattr(program, "__wrapped__", None)
        module = fn.__globals__.get("__name__", "") if fn is not None else ""
        if fn is not None and (inner is None or not module.startswith(("lmppl.", "pyro."))):
            functions.append(fn)
        program = inner
    return functions, bound


def _function_of(value: Any) -> FunctionType | None:
    """The Python function behind a callable."""
    if isinstance(value, MethodType):
        return _function_of(value.__func__)
    if not isinstance(value, (FunctionType, type)) and callable(value):
        value = type(value).forward if isinstance(value, torch.nn.Module) else type(value).__call__
    return value if isinstance(value, FunctionType) else None


def _digest_of_functions(roots: Sequence[FunctionType]) -> str:
    """Of functions and those of their modules that they reach."""
    reached: dict[FunctionType, dict[tuple[str, Any], Any]] = {}
    assigned: set[Any] = set()
    waiting = list(roots)
    while waiting:
        if (fn := waiting.pop()) not in reached:
            reached[fn], places = _reads(fn)
            assigned |= places
            waiting += [value for value in reached[fn].values() if isinstance(value, FunctionType)]
    digest = hashlib.sha256()
    for fn, values in reached.items():
        digest.update(f"{fn.__qualname__}:".encode())
        for code in _codes(fn.__code__):
            constants = [_constant(c) for c in code.co_consts if not isinstance(c, CodeType)]
            digest.update(b"|".join([code.co_code, repr(code.co_names).encode(), *constants]))
        for (name, place), value in values.items():
            if place not in assigned and _is_constant(value):
                digest.update(f"{name} {digest_of(value)}".encode())
    return digest.hexdigest()


def _reads(fn: FunctionType) -> tuple[dict[tuple[str, Any], Any], set[Any]]:
    """What a function reads from outside, by name and place, and the places that it assigns to."""
    codes = _codes(fn.__code__)
    steps = [(i.opname, i.argval) for code in codes for i in dis.get_instructions(code)]
    module = id(fn.__globals__)
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    values: dict[tuple[str, Any], Any] = {}
    for name, cell in cells.items():
        with suppress(ValueError):  # nothing is assigned to it yet
            values[name, id(cell)] = cell.cell_contents
    for name in sorted({name for op, name in steps if op in ("LOAD_GLOBAL", "LOAD_NAME")}):
        values[name, (module, name)] = fn.__globals__.get(name)
    defaults = [*(fn.__kwdefaults__ or {}).items(), *enumerate(fn.__defaults__ or ())]
    values |= {(f"default {name}", None): value for name, value in defaults}
    for place, value in values.items():
        called = _function_of(getattr(value, "__wrapped__", value))
        if called is not None and called.__globals__ is fn.__globals__:
            values[place] = called
    assigned: set[Any] = {(module, name) for op, name in steps if op == "STORE_GLOBAL"}
    assigned |= {id(cells[name]) for op, name in steps if op == "STORE_DEREF" and name in cells}
    return values, assigned


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _is_constant(value: Any) -> bool:
    """Whether a value cannot change: a number, a string, a constraint, a pydantic class (which
    ``json_schema=`` takes), a tuple of those."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    is_plain = isinstance(value, (str, bytes, int, float, type(None), Constraint))
    return is_plain or is_schema_class(value)


def _schema_text(schema_class: Any) -> str:
    """The schema of a pydantic class; of one that has none, its name."""
    try:
        return json.dumps(schema_class.model_json_schema())
    except Exception:  # its fields are of types that JSON has not, so it is no constraint
        return schema_class.__qualname__


def _constant(value: Any) -> bytes:
    """Sets (of ``x in {"a", "b"}``) have another order in every process."""
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value).encode()


def digest_of(data: Any) -> str:
    """A hash of the texts, numbers, constraints and pydantic classes in the data; of other objects only
    the type counts."""
    digest = hashlib.sha256()

    def feed(item: Any, within: tuple[int, ...] = ()) -> None:
        if id(item) in within:
            return  # it holds itself
        inside = (*within, id(item))
        if isinstance(item, (str, bytes, int, float, type(None))):
            digest.update(f"{type(item).__name__}:{item!s};".encode())
        elif isinstance(item, Constraint):
            digest.update(repr(item).encode())
        elif is_schema_class(item):
            digest.update(_schema_text(item).encode())
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
