"""Saved values of ``pyro.param``s that a program comes to late: on another input, on a rare branch.

The constraint of a parameter is known only where the program makes it. So its saved value waits,
and is put in when a run first comes to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger


class SavedParams:
    """Values that wait for their parameters.

    Attributes:
        waiting: unconstrained values, by name.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, torch.Tensor] = {}

    def around(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """``program``, with each value put in where it first comes to its parameter."""

        @functools.wraps(program, updated=())
        def restoring(*args: Any, **kwargs: Any) -> Any:
            with _PutIn(self):
                return program(*args, **kwargs)

        return restoring

    def put_in(self, names: Iterable[str]) -> None:
        """Those of parameters that exist.

        Raises:
            ValueError: if a parameter has another shape.
        """
        store = pyro.get_param_store()
        for name in names:
            if name not in self.waiting or name not in store:
                continue
            value, parameter = self.waiting[name], store._params[name]
            if value.shape != parameter.shape:
                raise ValueError(
                    f"the saved parameter '{name}' has the shape {tuple(value.shape)} "
                    f"(unconstrained), the program's has {tuple(parameter.shape)}: it belongs to "
                    "another program"
                )
            with torch.no_grad():
                parameter.copy_(value)
            del self.waiting[name]


class _PutIn(Messenger):
    def __init__(self, saved: SavedParams) -> None:
        super().__init__()
        self._saved = saved

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self._saved.waiting:
            msg["fn"](*msg["args"], **msg["kwargs"])  # makes it, with its constraint
            self._saved.put_in([msg["name"]])
