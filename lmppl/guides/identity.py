"""Which run of training a checkpoint is of: what must be equal for another run to go on with it."""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch

from lmppl.guides.inputs import Input
from lmppl.guides.storage import fingerprint
from lmppl.lm import LM

if TYPE_CHECKING:
    from lmppl.guides.trainer import Trainer


def identity(trainer: Trainer) -> dict[str, Any]:
    """What must be equal for a run to be the same one, in JSON's types."""
    guide = trainer.guide
    own = None if guide.program is None else program_fingerprint(guide.program)
    options = json.loads(json.dumps(dataclasses.asdict(trainer.options)))
    return {
        "program": program_fingerprint(guide.model),
        "guide program": own,
        "condition_on": "all" if guide.condition_on == "all" else sorted(guide.condition_on),
        "adapter_per_site": guide.adapter_per_site,
        "adapters": [_lora(each) for each in guide.adapters()[:1]],
        "language model": fingerprint(guide.base),
        "data": digest_of([_data(each) for each in trainer.source.kept]),
        "arguments to simulate on": digest_of(trainer.source.origin),
        "number of steps": trainer.steps,
        "seed": trainer.seed,
        **{f"option {name}": value for name, value in options.items()},
    }


def _data(each: Input) -> list[Any]:
    """What the user gave of an input. (What was simulated follows from the seed.)"""
    given = [] if each.exact else [record.values for record in each.given]
    return [each.args, given]


def _lora(adapter: LM) -> dict[str, Any]:
    """What makes an adapter the kind that it is (nothing, if all weights are trained)."""
    config = getattr(adapter.model, "peft_config", {}).get("default")
    if config is None:
        return {}
    modules = config.target_modules
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "modules": modules if isinstance(modules, str) else sorted(modules or ()),
    }


def program_fingerprint(program: Callable[..., Any]) -> str:
    """The name of a program and a hash of what it does: its code (comments and line numbers don't
    count), the constants that it closes over or reads, and the functions of its module that it
    calls. What it assigns to itself, as a counter, and objects that can change don't count."""
    program = inspect.unwrap(program)
    fn = inspect.unwrap(getattr(program, "func", program))
    name = getattr(fn, "__qualname__", type(fn).__name__)
    if isinstance(program, functools.partial):
        name += f" with {digest_of([program.args, program.keywords])}"
    if not isinstance(fn, FunctionType):
        fn = vars(type(fn)).get("__call__")
    if not isinstance(fn, FunctionType):
        return name
    version = f"{sys.version_info.major}.{sys.version_info.minor}"  # byte code differs by version
    digest = hashlib.sha256(_function(fn, set())).hexdigest()
    return f"{name} {digest[:16]} (Python {version})"


def _function(fn: FunctionType, seen: set[FunctionType]) -> bytes:
    if fn in seen:
        return b""
    seen.add(fn)
    codes = list(_codes(fn.__code__))
    assigned = {
        instruction.argval
        for code in codes
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("STORE_GLOBAL", "STORE_DEREF")
    }
    read = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    values = {name: _contents(cell) for name, cell in read.items()}
    for name in sorted({name for code in codes for name in code.co_names}):
        value = fn.__globals__.get(name)
        if not isinstance(value, FunctionType) or value.__module__ == fn.__module__:
            values.setdefault(name, value)
    values["keyword defaults"] = tuple((fn.__kwdefaults__ or {}).items())
    found = [_code(fn.__code__)]
    for name, value in values.items():
        if name in assigned:
            continue
        if isinstance(value, FunctionType):
            found.append(name.encode() + _function(value, seen))
        elif _is_constant(value):
            found.append(f"{name} {digest_of(value)}".encode())
    return b"|".join(found)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_constant(value: Any) -> bool:
    """Whether a value cannot change: a number, a string, a tuple of those."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, (str, int, float))


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

    def feed(item: Any) -> None:
        if isinstance(item, (str, int, float, bool, type(None))):
            digest.update(f"{type(item).__name__}:{item!s};".encode())
        elif isinstance(item, Mapping):
            for key, value in item.items():
                feed(key)
                feed(value)
        elif isinstance(item, (list, tuple)):
            digest.update(f"[{len(item)}".encode())
            for each in item:
                feed(each)
        elif torch.is_tensor(item):
            feed(item.tolist())
        else:
            digest.update(type(item).__qualname__.encode())

    feed(data)
    return digest.hexdigest()[:16]
