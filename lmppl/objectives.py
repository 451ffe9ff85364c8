"""Training losses of guides, as pure functions of log-probability tensors.

Notation, for samples of *one* input: ``log_r`` is the log joint of a complete trace (the reward R,
up to the evidence the posterior), ``log_q`` the guide's log-density of its latents (with gradient),
``u = log_r - log_q``. At the optimum ``q`` is the posterior and ``u = log Z`` for every trace.
All are in nats.
"""

from __future__ import annotations

import torch


def vargrad(log_r: torch.Tensor, log_q: torch.Tensor, huber: float = torch.inf) -> torch.Tensor:
    """Variance of u over samples of one input (Richter et al., 2020, arXiv 2010.10436).

    It is zero exactly when q is proportional to R on the samples, whoever drew them, and needs no
    learned log Z. Truncated traces are samples like any other: their u is the same log Z.

    Args:
        log_r: (N,), N >= 2. ``-inf`` entries (R = 0) stay out: see ``alive``.
        log_q: (N,), with gradient.
        huber: beyond this distance from the centre (nats) a sample counts by its distance, not its
            square (Huber, 1964), so that a few improbable traces don't outvote the rest. The
            minimiser with all u equal is the same. ``inf``: the variance itself.

    Returns:
        0-d; zero if fewer than two entries are finite.
    """
    live = log_r > -torch.inf
    if int(live.sum()) < 2:
        return log_q.sum() * 0.0
    u = log_r[live] - log_q[live]
    centre = _centre(u.detach(), huber)
    distance = (u - centre).abs()
    excess = (distance - huber).clamp_min(0.0)  # d^2 - (d - h)^2 = 2 h d - h^2
    return (distance**2 - excess**2).sum() / (len(u) - 1)


def _centre(u: torch.Tensor, huber: float) -> torch.Tensor:
    """Huber's location estimate, by reweighting; the mean for ``inf``."""
    if huber == torch.inf:
        return u.mean()
    centre = u.median()
    for _ in range(20):
        weight = (huber / (u - centre).abs().clamp_min(1e-12)).clamp_max(1.0)
        centre = (weight * u).sum() / weight.sum()
    return centre


def tb(log_r: torch.Tensor, log_q: torch.Tensor, log_z: torch.Tensor) -> torch.Tensor:
    """Trajectory balance with a learned log Z (Malkin et al., 2022, arXiv 2201.13259).

    Args:
        log_r: (N,); ``-inf`` entries stay out.
        log_q: (N,), with gradient.
        log_z: 0-d, the learned log evidence of this input, with gradient.
    """
    live = log_r > -torch.inf
    if not bool(live.any()):
        return (log_q.sum() + log_z) * 0.0
    return ((log_z + log_q[live] - log_r[live]) ** 2).mean()


def subtb(log_r: torch.Tensor, log_q: torch.Tensor, lam: float = 1.0) -> torch.Tensor:
    """Sub-trajectory balance between all pairs of truncations of one sample.

    ``log_r[t]`` and ``log_q[t]`` are those of the sample truncated after t tokens, so that
    ``log_r[t] - log_q[t]`` estimates log Z from every t, and the pair (i, j) of them has the weight
    ``lam ** (j - i)`` (Madan et al., 2022, arXiv 2209.12782; the modified form for language models
    is Hu et al., 2024, section 3). At ``lam = 1`` it is the variance over truncations, in O(n).

    Args:
        log_r: (n,); ``-inf`` entries stay out.
        log_q: (n,), with gradient.
        lam: the weight of a pair decays with its distance.
    """
    live = log_r > -torch.inf
    if int(live.sum()) < 2:
        return log_q.sum() * 0.0
    u = log_r[live] - log_q[live]
    if lam == 1.0:
        return 2.0 * ((u - u.mean()) ** 2).sum() / (len(u) - 1)
    at = torch.nonzero(live).flatten().to(u.dtype)
    distance = (at[None, :] - at[:, None]).abs()
    weight = torch.triu(lam**distance, diagonal=1)
    return (weight * (u[None, :] - u[:, None]) ** 2).sum() / weight.sum()


def alive(log_r: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Score-function estimate of -log q(R > 0), from on-policy samples of one input.

    The variance of u says nothing of traces with R = 0, so their mass must be driven down on its
    own. The value of this surrogate has no meaning; its gradient, with the samples' mean as
    baseline, is in expectation that of the first N - 1 terms of ``-log A = sum_k (1 - A)^k / k``,
    where A is the mass that q gives to live traces.

    Args:
        log_r: (N,), N >= 2, of samples drawn from q itself.
        log_q: (N,), with gradient.

    Returns:
        0-d; zero if all samples are alive, or none.
    """
    live = (log_r > -torch.inf).to(log_q.dtype)
    fraction = live.mean()
    if float(fraction) in (0.0, 1.0):
        return log_q.sum() * 0.0
    return -((live - fraction) / fraction * log_q).mean()
