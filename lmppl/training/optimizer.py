"""The optimiser of a guide, and of a program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lmppl.training.options import FitOptions
from lmppl.training.sharing import Sharing

# Learning rates of parameters whose names begin so, in units of the others': heads are small and new
# networks; a learned log Z is far from its start and has few gradients.
_RATES = {"heads": 4.0, "log_z": 25.0}


class Update(NamedTuple):
    """What a step of the optimiser was: the mean loss, the norm of its gradient, and whether there was
    nothing to learn from, so that both are NaN."""

    loss: float
    norm: float
    is_empty: bool = False


class Optimizer:
    """AdamW on parameters that become known one after another; ``rate`` is its highest learning rate.
    All ranks take the same steps.

    Gradients of a variance shrink with it, as those of a likelihood do towards its maximum, so a
    memory of 1,000 steps of their size (0.999) would hold the last steps back.
    """

    def __init__(self, options: FitOptions, rate: float, steps: int, sharing: Sharing) -> None:
        self._options, self._rate, self._steps, self._sharing = options, rate, steps, sharing
        self._ranks = sharing.ranks
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

    def step(self, losses: Sequence[torch.Tensor], number: int) -> Update:
        """Go one step down the mean of all inputs' losses, of which ``losses`` are this rank's. If it or
        its gradient is not finite, the parameters stay."""
        self._adamw.zero_grad(set_to_none=True)
        total = torch.stack(list(losses)).sum() if losses else torch.zeros(())
        of_all, count = self._sharing.total(float(total.detach()), len(losses))
        loss = of_all / count if count else math.nan
        if not math.isfinite(loss):
            return Update(loss, math.nan, is_empty=not count)
        if total.requires_grad:
            with self._ranks.alone(f"the gradient of step {number}"):
                (total / count).backward()
        self._sum_gradients()
        # In one order on all ranks, lest the norm differ in its last bits.
        parameters = [self._named[name] for name in sorted(self._named)]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._options.max_grad_norm)
        if bool(torch.isfinite(norm)):
            for group in self._adamw.param_groups:
                group["lr"] = group["rate"] * self._options.schedule(number, self._steps)
            self._adamw.step()
        return Update(loss, float(norm))

    def _sum_gradients(self) -> None:
        """Over all ranks. A parameter without a gradient on any of them stays so, as AdamW leaves it."""
        if self._ranks.num == 1:
            return
        named = [self._named[name] for name in sorted(self._named)]
        used = torch.tensor([float(p.grad is not None) for p in named])
        self._ranks.sum([used])
        named = [p for p, count in zip(named, used.tolist(), strict=True) if count]
        for parameter in named:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.sum([p.grad for p in named if p.grad is not None])

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
