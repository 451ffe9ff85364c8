"""Amortized inference: train a guide to sample the posterior, then draw from it.

    guide  = LMGuide(model).fit([args])     unless one is given
    z_i ~ guide,  u_i = log R(z_i) - log q(z_i)
    log w_i = u_i

For a perfectly trained guide every u_i is log Z. What training left undone, the weights undo: the
posterior is self-normalised by them, so it is importance sampling with the guide as proposal, and
``mean(w)`` is an unbiased estimate of the evidence. With ``correct=False`` the samples are the
guide's own draws, equally weighted, and no evidence is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lmppl import runtime
from lmppl.engines.base import Meter, finish, proposer_factory
from lmppl.posterior import Posterior
from lmppl.training.lm_guide import LMGuide

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class GFlowNet:
    """A GFlowNet-trained guide as engine (Hu et al., 2024, arXiv 2310.04363).

    Args:
        steps: optimiser steps, if a guide has to be trained.
        correct: weigh the guide's draws by R / q; False: raw draws.
        lora: peft's configuration of the adapter, if a guide has to be trained.
        fit: further options of the training, as of ``LMGuide.fit``: ``{"batch_size": 64}``.
    """

    steps: int = 500
    correct: bool = True
    lora: LoraConfig | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)

    name = "gflownet"

    def run(
        self,
        model: Callable[..., Any],
        *args: Any,
        num_samples: int = 64,
        guide: Any = None,
        seed: int | None = None,
        progress: bool | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Posterior:
        """The posterior of ``model(*args)`` as draws of a guide; ``.guide`` holds a trained one.

        Raises:
            ZeroEvidenceError: if every draw has probability zero; it carries the posterior.
            KeyboardInterrupt: during training; it carries the guide so far, as ``.guide``.
        """
        seed = runtime.fresh_seed(seed)
        # Training shows a bar of its own.
        with Meter(self.name, False if guide is None else progress, callback) as meter:
            notes: list[str] = []
            if guide is None:
                guide = LMGuide(model, lora=self.lora)
                notes.append(f"trained a guide for {self.steps} steps on this input (.guide)")
                try:
                    guide.fit(
                        [args],
                        steps=self.steps,
                        seed=seed,
                        progress=progress,
                        callback=callback,
                        **self.fit,
                    )
                except KeyboardInterrupt as interrupt:
                    interrupt.guide = guide  # type: ignore[attr-defined]
                    interrupt.add_note(
                        f"training was interrupted after {len(guide.history)} steps; the guide so "
                        "far is this exception's .guide"
                    )
                    raise
                notes += guide.notes
            target = getattr(guide, "tempered_target", None)
            if target is not None:
                notes.append(f"the guide's own target is tempered (temperature {target:g})")
            proposer = proposer_factory(guide, args)
            particles = runtime.start(model, args, num_samples, seed=seed, proposer=proposer)
            with runtime.ending(particles):
                runtime.run_to_end(particles)
            log_weights = torch.tensor(
                [particle.take_log_weight() for particle in particles], dtype=torch.float64
            )
            alive = log_weights > -math.inf
            info = {"elbo": float(log_weights[alive].mean()) if bool(alive.any()) else -math.inf}
            if self.correct:
                notes.append("self-normalised by R / q")
            else:
                log_weights = torch.where(alive, 0.0, -math.inf).double()
                notes.append("raw draws of the guide, not corrected by R / q")
            return finish(
                self.name,
                particles,
                log_weights,
                meter,
                iid=self.correct,
                guide=guide,
                claims_evidence=self.correct,
                notes=notes,
                **info,
            )
