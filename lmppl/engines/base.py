"""What the engines share: how they meter their work, and how they end it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch

from lmppl.guides.guide import proposer_factory
from lmppl.lm.meter.usage import Usage
from lmppl.posterior import Posterior
from lmppl.report.progress import progress_bar
from lmppl.runtime import Particle, own_usage

__all__ = ["Engine", "Meter", "finish", "proposer_factory"]


class Engine(Protocol):
    """An inference algorithm: options in its constructor, one program a ``run``."""

    name: str

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
        """The posterior of ``model(*args)``."""


class Meter:
    """Counts seconds and LM tokens of a run, and tells a progress bar and a callback."""

    def __init__(
        self,
        engine: str,
        progress: bool | None,
        callback: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._engine, self._callback = engine, callback
        self._bar = progress_bar(engine, show=progress)

    def __enter__(self) -> Meter:
        self._began, self._usage = time.perf_counter(), own_usage()
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.__exit__(exc_type, exc, traceback)

    def report(self, **figures: Any) -> None:
        """One stage of the work is done; ``figures`` go to the bar and the callback."""
        self._bar.advance(**figures)
        if self._callback is not None:
            self._callback({"engine": self._engine, **figures})

    def info(self) -> dict[str, Any]:
        usage: Usage = own_usage() - self._usage
        return {
            "tokens_sampled": usage.tokens_sampled,
            "tokens_scored": usage.tokens_scored,
            "tokens_trained": usage.tokens_trained,
            "seconds": time.perf_counter() - self._began,
        }


def finish(
    engine: str,
    particles: Sequence[Particle],
    log_weights: torch.Tensor,
    meter: Meter,
    *,
    iid: bool,
    guide: Any = None,
    claims_evidence: bool = True,
    notes: Sequence[str] = (),
    **info: Any,
) -> Posterior:
    """The posterior of finished particles.

    Raises:
        ValueError: for a program without a latent site.
        ZeroEvidenceError: if all weights are zero.
    """
    killed = Counter(
        particle.killed_by or "unknown"
        for particle, log_weight in zip(particles, log_weights.tolist(), strict=True)
        if log_weight == -math.inf
    )
    if not killed and not any(particle.latents for particle in particles):
        raise ValueError(
            "the program has no latent site, so there is nothing to infer: leave out obs= at the "
            "site that you want the posterior of"
        )
    posterior = Posterior(
        [particle.trace for particle in particles],
        log_weights,
        [particle.returned for particle in particles],
        guide=guide,
        info={
            "engine": engine,
            "iid": iid,
            "killed": killed,
            "notes": list(notes),
            **meter.info(),
            **info,
        },
        claims_evidence=claims_evidence,
    )
    posterior.check_alive()
    return posterior
