"""Training by several losses at equal language-model tokens (drawn, scored or trained on)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lmppl

LOSSES = {
    "guide": "vargrad",
    "sft": "sft",
    "ppo": "ppo",
    "elbo": "elbo",
    "wake": "wake",
}
"""The losses of the methods that train a guide, by the methods' names."""

_SHARE = 20  # a step's tokens are counted by runs of a 20th and a 10th of the steps
_MOST_OF_SFT = 4  # times the guide's steps
_MOST_SIMULATED = 40  # for these steps: simulations are made ahead, and are no part of a step
_EVALUATION = ("eval_data", "eval_every", "eval_samples", "patience")


@dataclass
class Trainer:
    """Trains guides of one program, each method for as many tokens as ``"guide"`` spends; ``"sft"`` for
    4 times its steps at most, as a few known texts would be read hundreds of times.

    Args:
        new_guide: makes an untrained guide.
        data: the inputs, as ``fit`` takes them.
        options: of ``fit``, for each method of ``LOSSES`` that is used, without ``loss`` and ``steps``;
            ``data`` among them are other inputs for this method.
        steps: of ``"guide"``.
        prepare: makes further options for ``"guide"`` from its seed; the tokens that this takes are
            tokens of the training.
    """

    new_guide: Callable[[], lmppl.LMGuide]
    data: Sequence[Any]
    options: Mapping[str, Mapping[str, Any]]
    steps: int
    prepare: Callable[[int], Mapping[str, Any]] | None = None
    _costs: dict[str, float] = field(default_factory=dict)

    def train(self, method: str, seed: int, **run: Any) -> tuple[lmppl.LMGuide, dict[str, Any]]:
        """A trained guide, and what it cost: ``steps``, ``tokens``, ``training_minutes``.

        Args:
            method: of ``LOSSES``.
            seed: of the training.
            **run: further options of ``fit`` for this run (``callback=``, ``progress=``).
        """
        steps = self.steps
        if method != "guide":
            steps = max(1, round(self._budget / self._tokens_a_step(method)))
        if method == "sft":
            steps = min(steps, _MOST_OF_SFT * self.steps)
        guide, options = self.new_guide(), self._options(method)
        before, began = tokens(guide.base), time.perf_counter()
        if method == "guide" and self.prepare is not None:
            options |= self.prepare(seed)
        guide.fit(steps=steps, seed=seed, **options, **run)
        spent = tokens(guide.base) - before
        minutes = (time.perf_counter() - began) / 60
        return guide, {"steps": len(guide.history), "tokens": spent, "training_minutes": minutes}

    def _options(self, method: str) -> dict[str, Any]:
        return {"data": self.data, "loss": LOSSES[method], **self.options[method]}

    @functools.cached_property
    def _budget(self) -> float:
        """The tokens of ``"guide"``."""
        lm = self.new_guide().base
        before = tokens(lm)
        if self.prepare is not None:
            self.prepare(0)
        return tokens(lm) - before + self.steps * self._tokens_a_step("guide")

    def _tokens_a_step(self, method: str) -> float:
        """Counted once, by two short runs, whose difference is all of steps."""
        if method not in self._costs:
            options = {k: v for k, v in self._options(method).items() if k not in _EVALUATION}
            if "simulate" in options:
                options["simulate"] = min(options["simulate"], _MOST_SIMULATED)
            spent, few = [], max(2, self.steps // _SHARE)
            for steps in (few, 2 * few):
                guide = self.new_guide()
                before = tokens(guide.base)
                guide.fit(steps=steps, seed=0, progress=False, **options)
                spent.append(tokens(guide.base) - before)
            self._costs[method] = max(1.0, (spent[1] - spent[0]) / few)
        return self._costs[method]


def tokens(lm: lmppl.LM) -> int:
    """What a language model and its adapters have drawn, scored and trained on so far."""
    return lm.tokens_sampled + lm.tokens_scored + lm.tokens_trained
