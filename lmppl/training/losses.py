"""From the samples of one input to a loss: which samples each objective takes, and how.

The objectives themselves are pure functions of tensors, in ``lmppl.training.objectives``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lmppl import runtime
from lmppl.distributions import LMText, SiteScore
from lmppl.guides.heads import Head
from lmppl.lm import LM
from lmppl.training import objectives
from lmppl.training.options import FitOptions
from lmppl.training.samples import Sample, Truncation


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of one input, with what the guide says of them.

    Attributes:
        samples: N complete traces.
        truncations: M truncations of some of them.
        log_r: (N + M,) untempered log joints, nats; ``-inf`` where R = 0. Traces come first.
        log_q: (N + M,) the guide's log-densities, nats, with gradient.
        old_log_q: (N,) of the guide that drew them: equal to ``log_q`` at the first update.
        log_prior: (N,) the program's own log-density of the latents, nats.
    """

    samples: Sequence[Sample]
    truncations: Sequence[Truncation]
    log_r: torch.Tensor
    log_q: torch.Tensor
    old_log_q: torch.Tensor
    log_prior: torch.Tensor

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        truncations: Sequence[Truncation],
        scores: dict[int, dict[str, SiteScore]],
        old_log_q: torch.Tensor | None = None,
    ) -> Batch:
        """From scores by the samples' ``id``.

        Raises:
            ValueError: if the guide draws no latent of a live trace, or cannot draw one of them.
        """
        # (A dead trace may have ended before its first latent.)
        own = [scores[id(sample)] for sample in samples]
        if not any(own) and any(sample.log_r > -math.inf for sample in samples):
            raise ValueError("the guide has proposed no latent site of the program")
        totals = [_total(sample, score) for sample, score in zip(samples, own, strict=True)]
        home = next((total for total in totals if total.requires_grad), totals[0])
        log_q = torch.stack([total.to(home) for total in totals])
        if bool((log_q.detach() == -math.inf).any()):
            _check_support(samples, scores)
        complete = log_q.detach()
        cut_q = [t.log_q(scores[id(t.sample)]) for t in truncations]
        log_r = [*(s.log_r for s in samples), *(t.log_r for t in truncations)]
        return cls(
            samples,
            truncations,
            log_q.new_tensor(log_r),
            torch.cat([log_q, torch.stack(cut_q).to(log_q)]) if cut_q else log_q,
            complete if old_log_q is None else old_log_q,
            log_q.new_tensor([_log_prior(sample) for sample in samples]),
        )

    def origin(self, *origins: str) -> torch.Tensor:
        """(N,) bool: the complete traces that come from there."""
        return torch.tensor([sample.origin in origins for sample in self.samples])

    @property
    def alive(self) -> bool:
        """Whether any trace has a positive probability."""
        return bool((self.log_r[: len(self.samples)] > -math.inf).any())

    def figures(self) -> dict[str, float]:
        """What the guide's own draws say of it; NaN if there are none."""
        figures = {
            "log_z": math.nan,
            "elbo": math.nan,
            "ess": math.nan,
            "alive": math.nan,
            "length": sum(s.num_tokens for s in self.samples) / len(self.samples),
        }
        own = self.origin("guide")
        if not bool(own.any()):
            return figures
        num = len(self.samples)
        log_r, log_q = self.log_r[:num][own], self.log_q.detach()[:num][own]
        live = log_r > -math.inf
        u = (log_r - log_q)[live]
        if len(u):
            figures["log_z"] = float(torch.logsumexp(u, 0)) - math.log(len(live))
            figures["elbo"] = float(u.mean())
        else:
            figures["log_z"] = -math.inf
        figures["ess"] = runtime.ess(u) / len(live)
        figures["alive"] = len(u) / len(live)
        return figures


def loss_of(
    batch: Batch,
    options: FitOptions,
    *,
    beta: float,
    likelihood_weight: float,
    log_z: torch.Tensor,
) -> torch.Tensor | None:
    """The loss of one input's samples.

    Args:
        batch: the samples.
        options: which loss, and its settings.
        beta: inverse temperature of the reward.
        likelihood_weight: of log R - log prior, for losses whose target is annealed.
        log_z: the learned log evidence of this input, 0-d (used by ``"tb"``).

    Returns:
        0-d; None if there is nothing to learn from them.
    """
    num = len(batch.samples)
    # A tempered -inf stays -inf.
    log_r = torch.where(batch.log_r == -math.inf, -math.inf, batch.log_r * beta)
    log_q = batch.log_q
    if options.loss == "sft":
        return objectives.sft(log_q[:num][batch.origin("given")])
    if not batch.alive:
        return None
    own = batch.origin("guide")
    own_r, own_q = log_r[:num][own], log_q[:num][own]
    if likelihood_weight < 1.0:
        own_prior = batch.log_prior[own] * beta
        # A trace that the program cannot draw has no prior either.
        live = own_r > -math.inf
        annealed = own_prior + likelihood_weight * (own_r - own_prior)
        own_r = torch.where(live, annealed, -math.inf)
    if options.loss == "vargrad":
        loss = objectives.vargrad(log_r, log_q, huber=options.huber)
    elif options.loss == "tb":
        loss = objectives.tb(log_r, log_q, log_z.to(log_q.device))
    elif options.loss == "subtb":
        loss = _subtb(batch, log_r, options.subtb_lambda)
    elif options.loss == "elbo":
        loss = objectives.elbo(own_r, own_q)
    elif options.loss == "wake":
        return _wake(batch, own_r, own_q)
    else:
        old, prior = batch.old_log_q[own], batch.log_prior[own]
        return objectives.ppo(own_r, own_q, old, prior, clip=options.ppo_clip, kl=options.ppo_kl)
    if len(own_q) > 1:
        loss = loss + _alive(batch)
    return loss


def _alive(batch: Batch) -> torch.Tensor:
    """From what the guide and the program drew: the program comes to the dead traces of a guide
    that has nearly forgotten them."""
    drawn = batch.origin("guide", "prior")
    num = len(batch.samples)
    log_r, log_q, log_prior = (
        batch.log_r[:num][drawn],
        batch.log_q[:num][drawn],
        batch.log_prior[drawn],
    )
    by_guide = int(batch.origin("guide").sum()) / len(log_q)
    if by_guide == 1.0:
        return objectives.alive(log_r, log_q)
    log_drawn = torch.logaddexp(
        log_q.detach() + math.log(by_guide), log_prior + math.log(1.0 - by_guide)
    )
    return objectives.alive(log_r, log_q, log_drawn)


def _subtb(batch: Batch, log_r: torch.Tensor, lam: float) -> torch.Tensor:
    """Pairs within each sample: its truncations by length, and the complete trace last."""
    num = len(batch.samples)
    cuts: dict[int, list[int]] = {}
    for k in sorted(range(len(batch.truncations)), key=lambda k: batch.truncations[k].length):
        cuts.setdefault(id(batch.truncations[k].sample), []).append(k)
    terms = []
    for i, sample in enumerate(batch.samples):
        own = cuts.get(id(sample), [])
        rows = [*(num + k for k in own), i]
        lengths = [batch.truncations[k].length for k in own]
        end = batch.truncations[own[0]].full_length if own else 0
        positions = torch.tensor([*lengths, end])
        terms.append(objectives.subtb(log_r[rows], batch.log_q[rows], lam, positions))
    # Within samples u is tied together, and between them by the variance of complete traces.
    complete = objectives.vargrad(log_r[:num], batch.log_q[:num])
    return torch.stack(terms).mean() + complete


def _wake(batch: Batch, own_r: torch.Tensor, own_q: torch.Tensor) -> torch.Tensor:
    """Self-normalised draws of the guide; simulated latents are posterior draws as they are."""
    loss = objectives.wake(own_r - own_q.detach(), own_q)
    given = batch.origin("given")
    if bool(given.any()):
        loss = loss + objectives.sft(batch.log_q[: len(batch.samples)][given])
    return loss


class LogZ(nn.Module):
    """The learned log evidence of ``"tb"``: a small network on the LM's state after the prompt of
    the first latent text, and a number of its own for each input that comes again.

    Args:
        num_features: size of the state.
        num_inputs: how many inputs come again; 0 for an endless stream.
    """

    def __init__(self, num_features: int, num_inputs: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(num_inputs))
        self.network = Head(num_features, 1)

    def forward(self, features: torch.Tensor, index: int) -> torch.Tensor:
        value = self.network(features)[0]
        return value + self.own[index] if len(self.own) else value


def prompt_state(lm: LM, samples: Sequence[Sample]) -> torch.Tensor:
    """What ``LogZ`` reads of an input: (hidden_size,) float32 on the CPU."""
    for sample in samples:
        for draw in sample.proposer.draws.values():
            fn = getattr(draw, "fn", None) if not isinstance(draw, dict) else draw["fn"]
            if isinstance(fn, LMText):
                return lm.hidden([fn.prefix_ids])[0].float().cpu()
    return torch.zeros(lm.hidden_size)  # a program without latent texts


def _log_prior(sample: Sample) -> float:
    return sum(float(node["unscaled_log_prob"].sum()) for node in sample.particle.latents.values())


def _check_support(samples: Sequence[Sample], scores: dict[int, dict[str, SiteScore]]) -> None:
    """Raises for a live trace to which the guide gives no density."""
    for sample in samples:
        for name, (score, _) in scores[id(sample)].items():
            if sample.log_r > -math.inf and float(score.detach()) == -math.inf:
                node = sample.particle.sites[name]
                is_text = isinstance(node["fn"], LMText)
                value = str(node["fn"].text(node["value"])) if is_text else node["value"].tolist()
                raise ValueError(
                    f"site '{name}': the guide gives probability zero to {value!r}, which the "
                    "program can draw: give both the same support (stop, max_tokens, choices). Or "
                    "train with loss='elbo', which learns from the guide's own draws only"
                )


def _total(sample: Sample, scores: dict[str, SiteScore]) -> torch.Tensor:
    """log q of a whole trace (0-d, nats)."""
    left = torch.tensor(sample.left_to_model(scores))
    terms = [score for score, _ in scores.values()] or [left]
    total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
    return total + left.to(total) if scores else total
