"""Watching over a run of training: has it diverged, and does it still get better?

Both keep a copy of the parameters at their best, and put it back when they stop the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lmppl.checks import check_int

_WINDOW = 10
_LEAST_FALL = 20.0  # nats

Parameters = Mapping[str, torch.nn.Parameter]


def _copies(parameters: Parameters) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def _put_back(copies: Mapping[str, torch.Tensor], parameters: Parameters) -> None:
    with torch.no_grad():
        for name, tensor in copies.items():
            if name in parameters:  # a resumed run may not have come to all of them yet
                parameters[name].copy_(tensor)


class _Callback:
    """Its state is what is in its public attributes."""

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class DivergenceGuard(_Callback):
    """Stops a run that has become much worse than it was at first.

    Figures of different inputs are not of a size: long observations come late in a sorted stream. So
    where the figure, called ``name`` in messages, has fallen, the best parameters are tried on the
    same inputs first.
    """

    def __init__(self, name: str = "ELBO") -> None:
        self._name = name
        self.first: float | None = None  # mean over the first steps, nats
        self.best = -math.inf  # the highest mean over as many steps in a row
        self.snapshot: dict[str, torch.Tensor] = {}  # the parameters of those
        self.recent: list[float] = []

    def watch(
        self, number: int, figure: float, parameters: Parameters, again: Callable[[], float]
    ) -> None:
        """Take note of the figure (nats) of a step; ``again`` finds it anew, under what is in
        ``parameters`` when it is called.

        Raises:
            FloatingPointError: if training has diverged; the best parameters are put back.
        """
        if not math.isfinite(figure):
            return
        self.recent = [*self.recent, figure]
        if len(self.recent) < _WINDOW:
            return
        mean, self.recent = sum(self.recent) / _WINDOW, []
        if self.first is None:
            self.first = mean
        if mean > self.best:
            self.best, self.snapshot = mean, _copies(parameters)
        elif _fell(self.first, mean):
            present = _copies(parameters)
            _put_back(self.snapshot, parameters)
            if not _fell(again(), figure):
                _put_back(present, parameters)
                return
            raise FloatingPointError(
                f"training has diverged: up to step {number} the {self._name} fell to {mean:.1f} "
                f"nats; it was {self.first:.1f} before training and {self.best:.1f} at its best. The "
                "parameters of the best steps are put back. Lower learning_rate (a half or a "
                "quarter; for a program also model_learning_rate), or raise batch_size"
            )


def _fell(figure: float, to: float) -> bool:
    return to < figure - max(_LEAST_FALL, abs(figure))


class EarlyStopping(_Callback):
    """Stops a run after ``patience`` evaluations on held-out inputs without a new best; None: never."""

    def __init__(self, patience: int | None) -> None:
        self._patience = None if patience is None else check_int("patience", patience)
        self.best, self.best_step, self.waited = -math.inf, -1, 0
        self.snapshot: dict[str, torch.Tensor] = {}

    @property
    def over(self) -> bool:
        """Whether the run is to end, or has ended so before it was resumed."""
        return self._patience is not None and self.waited >= self._patience

    def should_stop(self, number: int, figure: float, parameters: Parameters) -> bool:
        """Take note of an evaluation."""
        if self._patience is None:
            return False
        self.waited += 1
        if figure > self.best:
            self.best, self.best_step, self.waited = figure, number, 0
            self.snapshot = _copies(parameters)
        return self.over

    def finish(self, parameters: Parameters) -> None:
        """Put the best parameters back."""
        _put_back(self.snapshot, parameters)
