"""Training losses of guides, as pure functions of log-probability tensors.

Notation, for N samples of *one* input: ``log_r`` (N,) is the log joint of complete traces (the reward
R, up to the evidence the posterior; ``-inf`` where R = 0), ``log_q`` (N,) the guide's log-density of
their latents, with gradient, ``u = log_r - log_q``. At the optimum ``q`` is the posterior and
``u = log Z`` for every trace. All are in nats. Every loss is 0-d, and zero where there is nothing to
learn from: no live sample, or too few to be compared.

    loss       samples drawn by          traces with R = 0    value
    vargrad    anyone                    stay out: alive      zero at the optimum
    tb         anyone                    stay out: alive      zero at the optimum
    subtb      anyone                    stay out: alive      zero at the optimum
    alive      q itself, or a mixture    are driven down      means nothing
    elbo       q itself                  stay out: alive      means nothing
    wake       q itself, or a mixture    are driven down      means nothing
    sft        the posterior             cannot occur         cross-entropy
    ppo        q of some steps before    are driven down      means nothing

The optimum is the posterior, but not that of ``ppo``. There ``vargrad``, ``tb``, ``subtb``, ``elbo``
and ``wake`` have no gradient on any samples, so training ends without noise; ``sft`` has none only
in expectation.
"""

from __future__ import annotations

import math

import torch


def vargrad(log_r: torch.Tensor, log_q: torch.Tensor, huber: float = torch.inf) -> torch.Tensor:
    """Variance of u over samples of one input (Richter et al., 2020, arXiv 2010.10436).

    It is zero exactly when q is proportional to R on the samples, whoever drew them, and needs no
    learned log Z. Truncated traces are samples like any other.

    Args:
        log_r: (N,), N >= 2, log joint of the samples, nats.
        log_q: (N,), their log-density under the guide, with gradient.
        huber: beyond this distance from the centre (nats) a sample counts by its distance, not its
            square (Huber, 1964), so that a few improbable traces don't outvote the rest. ``inf``:
            the variance itself.
    """
    live = log_r > -torch.inf
    if int(live.sum()) < 2:
        return _nothing(log_q)
    u = log_r[live] - log_q[live]
    distance = (u - _centre(u.detach(), huber)).abs()
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
        log_r: (N,), log joint of the samples, nats.
        log_q: (N,), their log-density under the guide, with gradient.
        log_z: 0-d, the learned log evidence of the input, with gradient.
    """
    live = log_r > -torch.inf
    if not bool(live.any()):
        return _nothing(log_q) + log_z * 0.0
    return ((log_z + log_q[live] - log_r[live]) ** 2).mean()


def subtb(
    log_r: torch.Tensor,
    log_q: torch.Tensor,
    lam: float = 1.0,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sub-trajectory balance between all pairs of truncations of one sample.

    The modified form for language models of Hu et al. (2024, arXiv 2310.04363, section 3), after
    Madan et al. (2022, arXiv 2209.12782). For a text z and a closing token c it is the mean over
    pairs i < j, with weights ``lam ** (j - i)``, of the square of

        log [R(z_<=i c) q(z_i+1 .. z_j | z_<=i) q(c | z_<=j)]
            - log [R(z_<=j c) q(c | z_<=i)].

    With ``log_r[t]`` and ``log_q[t]`` those of the truncation ``z_<=t c`` this is ``u_i - u_j``.
    (The paper writes a sum. A mean has the same scale for short and long texts.) At ``lam = 1`` it
    is twice the variance over truncations, in O(n); else it is O(n^2).

    Args:
        log_r: (n,), log joint of truncations of one sample, itself among them, nats.
        log_q: (n,), their log-density under the guide, with gradient.
        lam: the weight of a pair decays with its distance; positive.
        positions: (n,), how many tokens each truncation keeps, in any order. None: 0, 1, .. n - 1.

    Raises:
        ValueError: if ``lam`` is not positive.
    """
    if not lam > 0.0:
        raise ValueError(f"lam={lam}: the weight of a pair of truncations must be positive")
    live = log_r > -torch.inf
    if int(live.sum()) < 2:
        return _nothing(log_q)
    u = log_r[live] - log_q[live]
    if lam == 1.0:
        return 2.0 * u.var()
    at = (torch.arange(len(log_r)) if positions is None else positions).to(u)[live]
    i, j = torch.triu_indices(len(u), len(u), offset=1, device=u.device)
    # In logs, as powers of a small lam underflow where truncations are far apart.
    weight = torch.softmax((at[j] - at[i]).abs() * math.log(lam), dim=0)
    return (weight * (u[j] - u[i]) ** 2).sum()


def alive(
    log_r: torch.Tensor, log_q: torch.Tensor, log_drawn: torch.Tensor | None = None
) -> torch.Tensor:
    """Score-function estimate of -log q(R > 0), from samples of one input.

    The variance of u says nothing of traces with R = 0, so their mass must be driven down on its
    own. For samples of q, the gradient of this surrogate, with their mean as baseline, is in
    expectation that of the first N - 1 terms of ``-log A = sum_k (1 - A)^k / k``, where A is the mass
    that q gives to live traces. If some are drawn from a density that knows the dead better, weights
    ``q / log_drawn`` keep the optimum and make each of them count by what q gives to it.

    Args:
        log_r: (N,), N >= 2, log joint of the samples, nats.
        log_q: (N,), their log-density under the guide, with gradient.
        log_drawn: (N,), log-density of the mixture that drew all samples (the balance heuristic of
            Veach & Guibas, 1995). None: they are samples of q.
    """
    live = (log_r > -torch.inf).to(log_q.dtype)
    is_drawable = log_q.detach() > -torch.inf  # what q cannot draw has no weight
    log_weights = log_q.new_zeros(len(log_q)) if log_drawn is None else log_q.detach() - log_drawn
    weights = torch.softmax(torch.where(is_drawable, log_weights, -torch.inf), dim=0)
    fraction = (weights * live).sum()
    if bool((live == live[0]).all()) or not float(fraction) > 0.0:
        return _nothing(log_q)
    drawable_log_q = torch.where(is_drawable, log_q, 0.0)
    return -(weights * (live - fraction) / fraction * drawable_log_q).sum()


def elbo(log_r: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Score-function estimate of the reverse KL: the ELBO of variational inference.

    The gradient of this surrogate, with the mean of the *other* samples as the baseline of each
    (Kool et al., 2019), is in expectation that of ``-E_q[log R - log q]``, and half that of
    ``vargrad`` on the same samples (Richter et al., 2020, arXiv 2010.10436).

    Where q gives mass to traces with R = 0 the ELBO is ``-inf``. They stay out, and the gradient
    is that of ``-E_qA[log R - log qA]`` times the probability of at least two live samples, where
    ``qA`` is q renormalised to live traces. Their mass is left to ``alive``.

    Args:
        log_r: (N,), N >= 2, log joint of samples of q, nats.
        log_q: (N,), their log-density under the guide, with gradient.
    """
    live = log_r > -torch.inf
    if int(live.sum()) < 2:
        return _nothing(log_q)
    u = (log_r - log_q)[live].detach()
    # u_i less the mean of the others is (u_i - mean of all) n / (n - 1); the estimate is a mean over n.
    return -((u - u.mean()) * log_q[live]).sum() / (len(u) - 1)


def wake(
    log_r: torch.Tensor, log_q: torch.Tensor, log_drawn: torch.Tensor | None = None
) -> torch.Tensor:
    """Self-normalised estimate of the forward KL: the wake phase of reweighted wake-sleep.

    Bornschein & Bengio (2015, arXiv 1406.2751); Le et al. (2019, arXiv 1805.10469). With weights
    ``w = softmax(log R - log_drawn)`` and ``v = softmax(log q - log_drawn)`` it is
    ``-sum_i (w_i - v_i) log q_i``. Its gradient tends to that of ``-E_posterior[log q]``, with a bias
    of order 1/N from normalising. The second weights are a control variate, as E_q[grad log q] = 0:
    where q is proportional to R the gradient is zero on every set of samples, and the mass of dead
    ones is driven down without ``alive``.

    Args:
        log_r: (N,), N >= 2, log joint of the samples, nats.
        log_q: (N,), their log-density under the guide, with gradient.
        log_drawn: (N,), log-density of the mixture that drew all samples (the balance heuristic of
            Veach & Guibas, 1995). None: they are samples of q, so that all v are 1/N.
    """
    if not bool((log_r > -torch.inf).any()):
        return _nothing(log_q)
    known_q = log_q.detach()
    log_drawn = known_q if log_drawn is None else log_drawn
    of_posterior, of_q = torch.softmax(log_r - log_drawn, 0), torch.softmax(known_q - log_drawn, 0)
    return -((of_posterior - of_q) * torch.where(known_q > -torch.inf, log_q, 0.0)).sum()


def _nothing(log_q: torch.Tensor) -> torch.Tensor:
    """0 with a gradient of 0, whatever q cannot draw among the samples."""
    return torch.where(log_q.detach() > -torch.inf, log_q, 0.0).sum() * 0.0


def sft(log_q: torch.Tensor) -> torch.Tensor:
    """Maximum likelihood on given latents (supervised fine-tuning): minus the mean of log q.

    On draws from the posterior it estimates the forward KL up to a constant.

    Args:
        log_q: (N,), log-density of the latents under the guide, nats, with gradient.
    """
    return -log_q.mean()


def ppo(
    log_r: torch.Tensor,
    log_q: torch.Tensor,
    log_q_old: torch.Tensor,
    log_q_ref: torch.Tensor,
    *,
    clip: float = 0.2,
    kl: float = 0.02,
) -> torch.Tensor:
    """Clipped policy gradient on log R (Schulman et al., 2017, arXiv 1707.06347), for comparison.

    A whole trace is one action. The reward is ``log_r - kl * (log_q_old - log_q_ref)``, with the KL
    penalty of Ziegler et al. (2019, arXiv 1909.08593) and its usual size (Ouyang et al., 2022,
    arXiv 2203.02155); the advantage is the reward, centred and divided by its standard deviation.
    A dead trace gets the reward of the worst live one of the batch, less 1 nat: not by so much
    less that the scaled advantages of the live become all alike.

    Its optimum is *not* the posterior but ``q_ref * R ** (1 / kl)``, normalised: for a small ``kl``
    nearly all mass is on the most probable trace, which is often the shortest.

    Args:
        log_r: (N,), N >= 2, log joint of the samples, nats.
        log_q: (N,), their log-density under the guide as it is now, with gradient.
        log_q_old: (N,), of the guide that drew the samples.
        log_q_ref: (N,), of the untrained guide.
        clip: a ratio q / q_old has no gradient further than this from 1 on the side to which its
            advantage pushes it; between 0 and 1.
        kl: nats of reward for a nat of divergence from the untrained guide.

    Raises:
        ValueError: if ``clip`` is not between 0 and 1.
    """
    if not 0.0 < clip < 1.0:
        raise ValueError(f"clip={clip}: the ratio's largest change must be between 0 and 1")
    live = log_r > -torch.inf
    if len(log_r) < 2 or not bool(live.any()):
        return _nothing(log_q)
    reward = (log_r - kl * (log_q_old - log_q_ref)).detach()
    reward = torch.where(live, reward, reward[live].min() - 1.0)
    # Differences below 1e-4 nats are rounding: they must not be scaled up.
    advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
    # The smaller of the plain and the clipped term, in logs: the ratio of long texts overflows.
    log_ratio = log_q - log_q_old.detach()
    above, below = math.log1p(clip), math.log1p(-clip)
    bounded = torch.where(advantage > 0.0, log_ratio.clamp(max=above), log_ratio.clamp(min=below))
    return -(bounded.exp() * advantage).mean()
