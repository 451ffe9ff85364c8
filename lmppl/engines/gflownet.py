"""Amortized inference: train a guide to sample the posterior, then draw from it.

    guide  = LMGuide(model).fit([args])     unless one is given
    z_i ~ guide,  w_i = R(z_i) / q(z_i)     importance sampling with the guide

For a perfectly trained guide every w_i is Z. Else the posterior is self-normalised by the weights, and
``mean(w)`` is an unbiased estimate of the evidence. With ``correct=False`` the samples are the guide's
own draws, equally weighted, and no evidence is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lmppl.checks import check_flag, check_int
from lmppl.engines.base import Engine, State
from lmppl.engines.importance import Importance
from lmppl.guides.mixture import check_prior_fraction
from lmppl.training.lm_guide import LMGuide

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class GFlowNet(Engine):
    """A GFlowNet-trained guide as engine (Hu et al., 2024, arXiv 2310.04363).

    Args:
        steps: optimiser steps, if a guide has to be trained.
        correct: weigh the guide's draws by R / q; False: raw draws.
        lora: peft's configuration of the adapter, if a guide has to be trained.
        fit: further options of the training, as of ``LMGuide.fit``: ``{"batch_size": 64}``.
        prior_fraction: as of ``Importance``; only with ``correct=True``.

    Raises:
        TypeError: for an option of another type, or ``steps`` within ``fit``.
        ValueError: for one out of range, and for ``prior_fraction`` with ``correct=False``.
    """

    steps: int = 500
    correct: bool = True
    lora: LoraConfig | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    prior_fraction: float = 0.0

    name = "gflownet"

    def __post_init__(self) -> None:
        check_int("steps", self.steps)
        check_flag("correct", self.correct)
        if not isinstance(self.fit, Mapping) or "steps" in self.fit:
            raise TypeError(
                f"fit={self.fit!r}: it takes a dict of options of LMGuide.fit, not steps="
            )
        if check_prior_fraction(self.prior_fraction) and not self.correct:
            raise ValueError(
                "correct=False gives the guide's own draws, prior_fraction= mixes others into them that "
                "only weights can tell apart: leave out one of the two"
            )

    def sample(self, state: State) -> None:
        if state.guide is None:
            state.guide = self._train(state)
        state.trained = state.guide
        target = getattr(state.guide, "tempered_target", None)
        if target is not None:
            state.notes.append(f"the guide's own target is tempered (temperature {target:g})")
        Importance(self.prior_fraction).sample(state)
        alive = state.log_weights > -math.inf
        elbo = float(state.log_weights[alive].mean())
        state.info["elbo"] = -math.inf if math.isnan(elbo) else elbo
        if self.correct:
            state.notes.append("self-normalised by R / q")
        else:
            state.log_weights = torch.where(alive, 0.0, -math.inf).double()
            state.iid = state.claims_evidence = False
            state.notes.append("raw draws of the guide, not corrected by R / q")

    def _train(self, state: State) -> LMGuide:
        """A guide for this one input. A ``KeyboardInterrupt`` carries what there is, as ``.guide``."""
        guide = LMGuide(state.model, lora=self.lora)
        state.notes.append(f"trained a guide for {self.steps} steps on this input (.guide)")
        options = {"progress": state.progress, "callback": state.callback, **self.fit}
        try:
            guide.fit([state.args], steps=self.steps, seed=state.seed, **options)
        except KeyboardInterrupt as interrupt:
            interrupt.guide = guide  # type: ignore[attr-defined]
            interrupt.add_note(
                f"training was interrupted after {len(guide.history)} steps; the guide so far is "
                "this exception's .guide"
            )
            raise
        state.notes += guide.notes
        return guide
