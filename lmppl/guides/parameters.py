"""What can be trained in a program: the adapters that it draws from or scores by, its parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger

from lmppl import runtime
from lmppl.distributions import LMText
from lmppl.lm import LM
from lmppl.runtime import Particle

_RUNS = 16  # a branch may have parameters of its own


class Trainables:
    """The trainable parts of a program, found by running it.

    Args:
        base: the language model that guide and program share; it is never trained.

    Attributes:
        adapters: language models with parameters that need a gradient, in the order of their use.
        param_names: of ``pyro.param``s.
    """

    def __init__(self, base: LM) -> None:
        self._base = base
        self.adapters: list[LM] = []
        self.param_names: list[str] = []

    def find(self, program: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Add what some runs of the program use."""
        runs = runtime.start(program, args, _RUNS, seed=0)
        with runtime.ending(runs):
            runtime.run_to_end(runs)
        self.add(runs)

    def add(self, runs: Iterable[Particle]) -> None:
        """Add what these runs use."""
        for run in runs:
            for name, node in run.trace.nodes.items():
                if node["type"] == "param" and name not in self.param_names:
                    self.param_names.append(name)
                fn = node.get("fn")
                if isinstance(fn, LMText) and fn.lm not in [self._base, *self.adapters]:
                    self.adapters += [fn.lm] if trainable(fn.lm) else []

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """All of them, unconstrained, each once."""
        store = pyro.get_param_store()
        named: dict[str, Any] = {f"params.{name}": store._params[name] for name in self.param_names}
        for i, adapter in enumerate(self.adapters):
            named |= {f"adapter-{i}.{name}": p for name, p in trainable(adapter).items()}
        unique: dict[int, str] = {}  # a parameter may be an adapter's and pyro's
        for name, parameter in named.items():
            unique.setdefault(id(parameter), name)
        return {name: named[name] for name in unique.values()}


def trainable(lm: LM) -> dict[str, torch.nn.Parameter]:
    """The parameters of a language model that need a gradient, by name."""
    return {name: p for name, p in lm.model.named_parameters() if p.requires_grad}


# --- saved values of ``pyro.param``s that a program comes to late: on another input, on a rare branch


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
