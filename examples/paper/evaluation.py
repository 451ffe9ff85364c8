"""A proposal, of a guide or the prior, on held-out inputs, against log Z by other means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import lmppl
from lmppl.runtime import log_mean_exp, nth_seed

from .rows import Column

PROPOSAL_COLUMNS = {
    "ess": Column("ESS", ".1%"),
    "kl_low": Column("KL from", ".2f"),
    "kl_high": Column("KL to", ".2f"),
    "agrees": Column("agrees", ".0%"),
}
"""Of ``held_out``'s figures, those that a table shows."""

LogZ = tuple[float, float]
"""An estimate of the log evidence and its standard error, nats."""

_ERRORS = 3.0  # standard errors within which two estimates agree


def log_z_by_runs(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    lm: lmppl.LM,
    method: Any = "importance",
    num_samples: int = 1024,
    runs: int = 8,
    seed: int = 1000,
    **options: Any,
) -> LogZ:
    """log of the mean evidence over independent runs of an engine, which is unbiased for the evidence.

    Args:
        program, args, lm, method, num_samples, **options: as of ``lmppl.infer``.
        runs: how many; at least 2, as their spread gives the standard error.
        seed: of all of them; another one than the draws have that they are compared with.
    """
    found = []
    for number in range(runs):
        try:
            posterior = lmppl.infer(
                program, *args, lm=lm, method=method, num_samples=num_samples, progress=False,
                seed=nth_seed(seed, number), **options,
            )  # fmt: skip
            found.append(posterior.log_evidence)
        except lmppl.ZeroEvidenceError:
            found.append(-math.inf)
    log_z = torch.tensor(found, dtype=torch.float64)
    if log_z.max() == -math.inf:
        return -math.inf, math.inf
    shares = (log_z - log_z.max()).exp()
    return log_mean_exp(log_z), float(shares.std() / shares.mean()) / math.sqrt(runs)


def of_input(found: lmppl.Diagnosis) -> dict[str, float]:
    """Figures of a proposal on one input, by a diagnosis with ``log_z=`` or ``posterior=``.

    Returns:
        ``ess``: effective samples over draws. ``agrees``: 1 if its estimate of log Z agrees with the
        other one within 3 standard errors, else 0; ``counted``, the ESS where it does, else 0, since a
        lost mode raises the ESS. ``log_z`` and ``log_z_stderr`` by its draws (nats). ``alive``: share
        of its draws with a positive probability. ``kl_low``, ``kl_high``: bracket of KL(q || p) of its
        live draws, nats. Its upper end is by exact draws if there are any, else by the other log Z plus
        3 standard errors.
    """
    assert found.log_z is not None and found.log_z_stderr is not None
    agrees = found.z_score is not None and abs(found.z_score) <= _ERRORS
    low, high = found.kl_alive_posterior
    if high == math.inf and found.elbo_alive > -math.inf:
        high = found.log_z + _ERRORS * found.log_z_stderr - found.elbo_alive
    return {
        "ess": found.ess_fraction,
        "agrees": float(agrees),
        "counted": found.ess_fraction * agrees,
        "log_z": found.iw_bound,
        "log_z_stderr": math.inf if found.iw_bound_stderr is None else found.iw_bound_stderr,
        "alive": 1.0 - found.dead_fraction,
        "kl_low": low,
        "kl_high": high,
    }


def held_out(
    program: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    log_z: Sequence[LogZ],
    *,
    guide: Any,
    lm: lmppl.LM,
    num_samples: int,
    seed: int,
    latents: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
) -> dict[str, float]:
    """Means of ``of_input`` over the inputs.

    Args:
        program, guide, lm: as of ``lmppl.diagnose``; ``guide=None``: the prior.
        inputs: the program's arguments, one tuple an input.
        log_z: of each input, by other means than this proposal.
        num_samples: draws of each.
        seed: of the draws; input i has one of its own.
        latents: exact posterior draws of each input, if they are known (simulated inputs).
    """
    figures = []
    for number, (args, other) in enumerate(zip(inputs, log_z, strict=True)):
        found = lmppl.diagnose(
            program, *args, guide=guide, lm=lm, num_samples=num_samples, log_z=other,
            latents=None if latents is None else latents[number], seed=nth_seed(seed, number),
            progress=False,
        )  # fmt: skip
        figures.append(of_input(found))
    return {name: statistics.fmean(each[name] for each in figures) for name in figures[0]}
