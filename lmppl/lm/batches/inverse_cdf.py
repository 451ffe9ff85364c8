"""Sampling by inverting the distribution function.

A draw is a deterministic function of one uniform, which belongs to whoever holds it. Two levels
(sums of blocks, then the inside of one) cost a fraction of ``multinomial`` on a large vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 256
_FAINT = 1e-20  # far above the least number that float32 holds, 1e-38


def invert(
    logits: Tensor, uniforms: Tensor, temperature: float | Sequence[float] | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """The tokens at which each row's distribution function passes its uniform.

    Args:
        logits: (B, V), any floating dtype.
        uniforms: (B,) float64 in [0, 1).
        temperature: one for all rows, or (B,).

    Returns:
        tokens (B,), never one of probability zero, and their log-probabilities (B,) float32, in
        nats, under ``softmax(logits / temperature)``. Of a row that defines no distribution (NaN or
        +inf, or every token has probability zero) the log-probability is NaN, and the token is
        arbitrary but within the vocabulary: to check would be to wait for the device.
    """
    # To float32 first: softmax with dtype= took 6 times as long from bfloat16 on a CPU.
    probs = torch.softmax(tempered(logits, temperature).float(), -1)
    tokens, mass, total = _invert(probs, uniforms)
    return tokens, (mass / total).log().float().to(logits.device)


def invert_among(
    allowed: Tensor,
    logits: Tensor,
    uniforms: Tensor,
    temperature: float | Sequence[float] | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``invert`` of the distributions over the ``allowed`` tokens, (B, V) bool, alone.

    Returns:
        tokens (B,); their log-probabilities (B,) among *all* tokens; and the logarithm of the
        probability of all that are allowed, (B,): ``-inf`` where there is none, and then the token
        is arbitrary. Both float32, in nats. Of a row that defines no distribution, the former is NaN.
    """
    logits = tempered(logits, temperature).float()
    probs = torch.softmax(logits, -1)
    whole = probs.sum(-1)  # float32, as MPS has no other; what it divides is float64
    # A product, as a choice by a mask (torch.where, masked_fill) takes a CPU ten times as long.
    tokens, mass, total = _invert(probs.mul_(allowed), uniforms)
    log_prob = (mass / whole.to(mass.device)).log().float().to(logits.device)
    log_mass = (total / whole.to(total.device)).log().float().to(logits.device)
    # float32 holds too few digits of what is allowed if that has next to no probability.
    faint = (total < _FAINT).to(logits.device)
    if bool(faint.any()):
        found = _invert_faint(allowed[faint], logits[faint], uniforms[faint.to(uniforms.device)])
        for column, values in zip((tokens, log_prob, log_mass), found, strict=True):
            column[faint] = values
    return tokens, log_prob, log_mass.masked_fill(log_mass.isnan(), -torch.inf)


def _invert_faint(
    allowed: Tensor, logits: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``invert_among``, however little probability is allowed: by a softmax over that alone."""
    log_probs = torch.log_softmax(logits, -1)  # of all tokens
    tokens, mass, total = _invert(
        torch.softmax(log_probs.masked_fill(~allowed, -torch.inf), -1), uniforms
    )
    log_prob = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    # A softmax over nothing is NaN; where the logits are, so is ``log_prob``.
    return tokens, log_prob, log_prob - (mass / total).log().float().to(logits.device)


def _invert(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of unnormalised distributions (B, V): the tokens (B,), their weights and the sums of all, (B,)
    float64."""
    batch, size = probs.shape
    num_blocks = -(-size // _BLOCK)
    if size % _BLOCK:
        probs = F.pad(probs, (0, num_blocks * _BLOCK - size))
    blocks = probs.view(batch, num_blocks, _BLOCK)
    # Few numbers, in float64; MPS has none.
    home = torch.device("cpu") if probs.device.type == "mps" else probs.device
    cdf = blocks.sum(-1).to(home).double().cumsum(-1)  # (B, number of blocks)
    total = cdf[:, -1:]
    target = uniforms.to(home, torch.float64).unsqueeze(-1) * total
    block = _first_above(cdf, target)  # (B, 1)
    below = torch.where(block > 0, cdf.gather(1, (block - 1).clamp_(min=0)), 0.0)
    lane = block.to(probs.device).unsqueeze(-1).expand(-1, -1, _BLOCK)
    inside = blocks.gather(1, lane).squeeze(1).to(home).double()  # (B, _BLOCK)
    offset = _first_above(inside.cumsum(-1), target - below)
    tokens = (block * _BLOCK + offset).clamp_(max=size - 1)  # the clamp matters for NaN only
    mass = inside.gather(1, offset)
    return tokens.to(probs.device).squeeze(-1), mass.squeeze(-1), total.squeeze(-1)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The indices at which the cumulative weights first exceed their sum times each uniform.

    Args:
        weights: (N,), of any positive scale; summed in float64.
        uniforms: (M,) float64 in [0, 1).

    Returns:
        (M,) indices, never one of weight zero.
    """
    cdf = weights.double().cumsum(0)
    return _first_above(cdf.unsqueeze(0), (uniforms * cdf[-1]).unsqueeze(0)).squeeze(0)


def tempered(logits: Tensor, temperature: float | Sequence[float] | Tensor) -> Tensor:
    """``logits / temperature`` row by row, in float32; the very same if every temperature is 1."""
    if isinstance(temperature, Sequence):
        if all(t == 1.0 for t in temperature):
            return logits
        temperature = torch.tensor(temperature, device=logits.device)
    if isinstance(temperature, Tensor):
        return logits.float() / temperature.float().to(logits.device).unsqueeze(-1)
    return logits if temperature == 1.0 else logits.float() / temperature


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """The first index whose value exceeds ``target``: its own mass is positive. A target that
    rounding has pushed to the top of ``cdf``, where no index would be left, is taken just below."""
    top = cdf[:, -1:]
    target = torch.minimum(target, torch.nextafter(top, torch.zeros_like(top)))
    return torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[-1] - 1)
