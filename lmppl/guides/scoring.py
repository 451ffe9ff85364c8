"""Traces whose latents are given: their density under a program, and under a guide of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from lmppl import runtime
from lmppl.distributions import score_texts
from lmppl.guides.guide import Guide
from lmppl.guides.program import PriorProposer, as_guide
from lmppl.guides.prompts import Observations
from lmppl.runtime import Particle
from lmppl.runtime.arguments import Args
from lmppl.runtime.records import Record, Value, rescore
from lmppl.runtime.sites import is_text


@dataclass(frozen=True, eq=False)
class LatentScores:
    """Densities of N traces, nats.

    Attributes:
        runs: the program on their latents.
        log_joint: log R, (N,) float64; ``-inf`` for a trace of probability zero.
        log_prior: the program's own density of the latents, unscaled, (N,) float64.
        log_q: the guide's, (N,) float64. What it leaves to the model has the density of the model's
            draws.
    """

    runs: list[Particle]
    log_joint: torch.Tensor
    log_prior: torch.Tensor
    log_q: torch.Tensor


def own_draw_log_probs(nodes: Sequence[Any]) -> list[float]:
    """The log-densities (unscaled, nats, without gradient) of latent sites as the program draws them
    itself: their own, but of a text with a constraint that of ``LMText.proposal``."""
    found = [float(node["unscaled_log_prob"].sum()) for node in nodes]
    own = [i for i, node in enumerate(nodes) if is_constrained(node)]
    laws = [nodes[i]["fn"].proposal() for i in own]
    names, values = [nodes[i]["name"] for i in own], [nodes[i]["value"] for i in own]
    for i, (log_prob, _) in zip(own, score_texts(laws, values, names), strict=True):
        found[i] = float(log_prob)
    return found


def is_constrained(node: Any) -> bool:
    """Whether a site is a text with a constraint."""
    return is_text(node["fn"]) and node["fn"].is_constrained


GivenTrace = tuple[Callable[..., Any], Args, Mapping[str, Value]]
"""A program, its arguments, and a value for every latent site."""


def score_latents(
    guide: Any,
    model: Callable[..., Any],
    args: Args,
    latents: Sequence[Mapping[str, Value]],
    *,
    what: str = "latents",
) -> LatentScores:
    """Score traces of one input under a program and what was given as ``guide=``; see
    ``score_traces``."""
    found = as_guide(guide)
    seen = [] if found is None else found.observations_of([(model, args)]) * len(latents)
    traces = [(model, args, values) for values in latents]
    return score_traces(found, traces, seen, what=what)


def score_traces(
    guide: Guide | None,
    traces: Sequence[GivenTrace],
    observations: Sequence[Observations] = (),
    *,
    what: str = "latents",
) -> LatentScores:
    """Score N traces of any inputs together; sites use the language model of ``lmppl.use``.

    Args:
        guide: the guide; None: the programs' priors.
        traces: one that a hard condition rejects is scored up to there.
        observations: what the guide reads of each trace's input; none without a guide.
        what: they are, for messages.

    Raises:
        ValueError: if they are not the latents of the program; says which and why.
    """
    proposers: list[Any]
    if guide is None:
        proposers = [PriorProposer(program, args) for program, args, _ in traces]
    else:
        given = zip(traces, observations, strict=True)
        proposers = [guide.recaller(args, seen) for (_, args, _), seen in given]
    runs: list[Particle] = []
    with torch.no_grad(), runtime.ending(runs):
        for i, (program, args, latents) in enumerate(traces):
            options: Any = {"what": f"{what}[{i}]", "complete": True, "slot": i}
            runs.append(rescore(Record(latents), program, args, proposers[i], **options))
        runtime.run_to_draws(runs)
        scores = [{} for _ in traces] if guide is None else guide.score(proposers, grad=False)
        left = [
            [node for name, node in run.latents.items() if name not in score]
            for run, score in zip(runs, scores, strict=True)
        ]
        of_left = iter(own_draw_log_probs([node for of_run in left for node in of_run]))
    log_prior, log_q = [], []
    for run, score, nodes in zip(runs, scores, left, strict=True):
        terms = [float(node["unscaled_log_prob"].sum()) for node in run.latents.values()]
        log_prior.append(math.fsum(terms))
        terms = [float(log_prob) for log_prob, _ in score.values()]
        log_q.append(math.fsum([*terms, *islice(of_left, len(nodes))]))
    densities = [run.log_joint for run in runs], log_prior, log_q
    return LatentScores(runs, *(torch.tensor(found, dtype=torch.float64) for found in densities))
