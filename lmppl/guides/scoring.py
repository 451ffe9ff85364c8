"""Traces whose latents are given: their density under a program, and under a guide of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmppl import runtime
from lmppl.guides.guide import LMGuide
from lmppl.guides.program import PriorProposer, score_program
from lmppl.guides.records import Recaller, Record, Value, revive
from lmppl.runtime import Particle


@dataclass(frozen=True, eq=False)
class LatentScores:
    """Densities of N traces, nats.

    Attributes:
        runs: the program on their latents.
        log_joint: log R, (N,) float64; ``-inf`` for a trace of probability zero.
        log_prior: the program's own density of the latents, unscaled, (N,) float64.
        log_q: the guide's, (N,) float64. What it leaves to the model has the model's density.
    """

    runs: list[Particle]
    log_joint: torch.Tensor
    log_prior: torch.Tensor
    log_q: torch.Tensor


def score_latents(
    guide: Any,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    latents: Sequence[Mapping[str, Value]],
    *,
    what: str = "latents",
) -> LatentScores:
    """Score traces under a program and a guide; sites use the language model of ``lmppl.use``.

    Args:
        guide: a ``LMGuide``, a guide program, or None: the program's prior.
        model: the program.
        args: its arguments.
        latents: of each trace, a value for every latent site. A trace that a hard condition rejects
            is scored up to there.
        what: they are, for messages.

    Raises:
        ValueError: if they are not the latents of the program; says which and why.
    """
    make, score = _recaller(guide, model, args)
    proposers = [make() for _ in latents]
    with torch.no_grad():
        runs = [
            revive(Record(each), model, args, proposer, what=f"{what}[{i}]", complete=True, slot=i)
            for i, (each, proposer) in enumerate(zip(latents, proposers, strict=True))
        ]
        with runtime.closing(runs):
            runtime.settle(runs)
        scores = score(proposers)
    log_prior, log_q = [], []
    for run, own in zip(runs, scores, strict=True):
        terms = {n: float(node["unscaled_log_prob"].sum()) for n, node in run.latents.items()}
        log_prior.append(math.fsum(terms.values()))
        terms |= {name: float(log_prob) for name, (log_prob, _) in own.items()}
        log_q.append(math.fsum(terms.values()))
    return LatentScores(
        runs,
        torch.tensor([run.log_joint for run in runs], dtype=torch.float64),
        torch.tensor(log_prior, dtype=torch.float64),
        torch.tensor(log_q, dtype=torch.float64),
    )


def _recaller(
    guide: Any, model: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Callable[[], Recaller], Callable[[list[Any]], list[Any]]]:
    """What makes the proposers that remember a trace, and what scores these."""
    if guide is None:
        return lambda: PriorProposer(model, args), lambda proposers: [{} for _ in proposers]
    if not isinstance(guide, LMGuide):
        return (
            lambda: PriorProposer(guide, args),
            lambda proposers: score_program(guide, proposers, grad=False),
        )
    observations = guide.observations(args, model)
    guide.proposer_factory(args, observations=observations)  # a loaded one finds its parameters
    return (
        lambda: guide.recaller(args, observations),
        lambda proposers: guide.score(proposers, grad=False),
    )
