"""What can be trained in a program: the adapters that it draws from or scores by, its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch

from lmppl import runtime
from lmppl.distributions import LMText
from lmppl.lm import LM
from lmppl.runtime import Particle


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
        """Add what two runs of the program use."""
        runs = runtime.start(program, args, 2, seed=0)
        with runtime.closing(runs):
            runtime.complete(runs)
        for run in runs:
            for name, node in run.trace.nodes.items():
                self.param_names += [name] if self._is_new_param(name, node) else []
                self.adapters += [node["fn"].lm] if self._has_new_adapter(node) else []

    def check(self, runs: Iterable[Particle]) -> None:
        """Raises ``ValueError`` if runs use what ``find`` has not found: nobody would train it."""
        for run in runs:
            for name, node in run.trace.nodes.items():
                is_param = self._is_new_param(name, node)
                if is_param or self._has_new_adapter(node):
                    what = f"pyro.param '{name}'" if is_param else f"the adapter of site '{name}'"
                    raise ValueError(
                        f"{what} was not used by the first runs of the program, on the first input, "
                        "so it would not be trained: use it before any branch, on every input (call "
                        "pyro.param at the beginning; draw other sites from the adapter too)"
                    )

    def _is_new_param(self, name: str, node: Any) -> bool:
        return node["type"] == "param" and name not in self.param_names

    def _has_new_adapter(self, node: Any) -> bool:
        fn = node.get("fn")
        known = [self._base, *self.adapters]
        return isinstance(fn, LMText) and fn.lm not in known and bool(trainable(fn.lm))

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
