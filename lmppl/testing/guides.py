"""How good a guide is, exactly: its own distribution over all traces of a program, enumerated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmppl.guides.scoring import score_latents
from lmppl.lm import LM
from lmppl.primitives import use
from lmppl.runtime.sites import is_continuous
from lmppl.testing.oracle import Enumeration, ExactTrace, enumerate_program
from lmppl.training.lm_guide import LMGuide


@dataclass(frozen=True)
class GuideReport:
    """A guide against the exact posterior of a program on one input.

    Attributes:
        tv: the total variation between them, over whole traces, dead ones too.
        gap: ``log Z - E_q[log R - log q]``, nats, of the guide renormalised to live traces: its
            Kullback-Leibler divergence from the posterior; infinite if no mass is alive.
        dead_mass: that the guide gives to traces of probability zero.
        log_evidence: log Z, nats.
        num_traces: live ones (of a continuous site, its quadrature nodes are counted).
    """

    tv: float
    gap: float
    dead_mass: float
    log_evidence: float
    num_traces: int


def guide_report(
    guide: LMGuide,
    program: Callable[..., Any],
    args: Sequence[Any],
    lm: LM,
    *,
    quadrature: int = 48,
    exact: Enumeration | None = None,
) -> GuideReport:
    """Measure a guide exactly: every trace of the program is enumerated, and its latents are scored in
    the pass that training uses. What the guide leaves to the model has the model's density.

    Args:
        guide: what is measured.
        program: the program.
        args: its arguments, of one input.
        lm: the model of sites that name none.
        quadrature: the number of nodes for every continuous latent.
        exact: all traces, if they are known already.

    Raises:
        ValueError: as ``enumerate_program``.
    """
    exact = exact or enumerate_program(program, *args, lm=lm, quadrature=quadrature)
    live = [trace for trace in exact if trace.log_joint > -math.inf]
    log_q = guide_log_probs(guide, program, args, live, lm)
    log_p = torch.tensor([t.log_joint for t in live], dtype=torch.float64) - exact.log_evidence
    alive = float(log_q.exp().sum())
    dead = max(0.0, 1.0 - alive)  # the nodes of a quadrature sum to 1 up to its error
    log_q_alive = log_q - math.log(alive) if alive > 0 else log_q
    terms = log_q_alive.exp() * (log_q_alive - log_p)
    return GuideReport(
        tv=0.5 * (float((log_q.exp() - log_p.exp()).abs().sum()) + dead),
        gap=float(terms[log_q > -math.inf].sum()) if alive > 0 else math.inf,
        dead_mass=dead,
        log_evidence=exact.log_evidence,
        num_traces=len(live),
    )


def guide_log_probs(
    guide: LMGuide,
    program: Callable[..., Any],
    args: Sequence[Any],
    traces: Sequence[ExactTrace],
    lm: LM,
) -> torch.Tensor:
    """log q of whole traces, (N,) float64, nats; of a quadrature node, the log of its mass.

    Dead traces are scored up to where they end, which is their mass under an automatic guide.

    Args:
        guide: whose density it is.
        program: the program.
        args: its arguments, of one input.
        traces: N traces, as ``enumerate_program`` finds them.
        lm: the model of sites that name none.
    """
    with use(lm):
        scores = score_latents(guide, program, tuple(args), [trace.data for trace in traces])
    # Of a quadrature node, the prior's weight over its density there; else nothing.
    nodes = torch.tensor([trace.log_prior for trace in traces], dtype=torch.float64)
    continuous = [any(map(is_continuous, run.latents.values())) for run in scores.runs]
    in_nodes = scores.log_q + nodes - scores.log_prior
    return torch.where(torch.tensor(continuous, dtype=torch.bool), in_nodes, scores.log_q)
