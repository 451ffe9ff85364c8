"""The optimiser of a guide, and of a program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lmppl.training.options import FitOptions

# Learning rates of parameters whose names begin so, in units of the others': heads are small and new
# networks; a learned log Z is far from its start and has few gradients.
_RATES = {"heads": 4.0, "log_z": 25.0}


class Optimizer:
    """AdamW on parameters that become known one after another; ``rate`` is its highest learning rate.

    Gradients of a variance shrink with it, as those of a likelihood do towards its maximum, so a
    memory of 1,000 steps of their size (0.999) would hold the last steps back.
    """

    def __init__(self, options: FitOptions, rate: float, steps: int) -> None:
        self._options, self._rate, self._steps = options, rate, steps
        none_yet: list[dict[str, Any]] = [{"params": [], "rate": rate}]
        self._adamw = torch.optim.AdamW(none_yet, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
        self._named: Mapping[str, torch.nn.Parameter] = {}
        self._late_state: dict[str, Any] = {}  # of a resumed run, which may come late to parameters

    def adopt(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Train these parameters, all that are known by now."""
        known = {id(parameter) for parameter in self._parameters()}
        new = {name: p for name, p in parameters.items() if id(p) not in known}
        by_rate: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in new.items():
            rate = self._rate * _RATES.get(name.partition(".")[0], 1.0)
            by_rate.setdefault(rate, []).append(parameter)
        for rate, members in by_rate.items():
            self._adamw.add_param_group({"params": members, "rate": rate})
        self._named = parameters
        self._restore(new)

    def step(self, loss: torch.Tensor, number: int) -> float:
        """Go one step down. Returns the norm of the gradient; if that or the loss is not finite, the
        norm is not, and the parameters stay."""
        self._adamw.zero_grad(set_to_none=True)
        if not bool(torch.isfinite(loss)):
            return math.nan
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), self._options.max_grad_norm)
        if bool(torch.isfinite(norm)):
            for group in self._adamw.param_groups:
                group["lr"] = group["rate"] * self._options.schedule(number, self._steps)
            self._adamw.step()
        return float(norm)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self._adamw.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Its state of each parameter that has had a gradient, by the parameter's name."""
        state = self._adamw.state
        found = {name: dict(state[p]) for name, p in self._named.items() if p in state}
        return self._late_state | found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave; also with parameters that are not known yet."""
        self._late_state = dict(state)
        self._restore(self._named)

    def _restore(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        for name in parameters.keys() & self._late_state.keys():
            parameter = parameters[name]
            # AdamW counts its steps on the CPU.
            self._adamw.state[parameter] = {
                key: tensor if key == "step" else tensor.to(parameter.device, parameter.dtype)
                for key, tensor in self._late_state[name].items()
            }
