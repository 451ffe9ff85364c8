"""The losses that a guide can be trained by: which samples each takes, and what it makes of them.

A loss is a frozen dataclass with its own options. What it learns from is said by its class
attributes; ``of`` computes it on the samples of one input. The formulas are pure functions of
tensors, in ``lmppl.training.objectives``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lmppl.checks import check_choice, check_int, check_number
from lmppl.distributions import LMText
from lmppl.guides.heads import Head
from lmppl.lm import LM
from lmppl.training import objectives
from lmppl.training.batch import Batch
from lmppl.training.samples import Sample


class Loss(ABC):
    """What a guide is trained by.

    Attributes:
        name: by which ``fit(loss=...)`` finds it.
        draws: ``"mixture"``: traces of any behaviour policy; ``"guide"``: the guide's own draws
            only; ``"given"``: latents that the user gave or that were simulated, and no draws.
        truncations: whether it uses truncations of the traces.
        needs_truncations: whether it is nothing without them.
        takes_simulated: whether a loss on the guide's draws learns from simulated latents as well.
        learns_log_z: whether the log evidence of each input is learned beside the guide.
        defended: whether a loss on the guide's draws takes draws of the program as well, for the
            term of dead traces, on inputs that have any.
        updates: of the optimiser on the same draws.
    """

    name: ClassVar[str]
    draws: ClassVar[Literal["mixture", "guide", "given"]]
    truncations: ClassVar[bool] = False
    needs_truncations: ClassVar[bool] = False
    takes_simulated: ClassVar[bool] = False
    learns_log_z: ClassVar[bool] = False
    defended: ClassVar[bool] = False
    updates: int = 1

    @abstractmethod
    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor | None:
        """The loss on the samples of one input, 0-d.

        Args:
            batch: the samples.
            moved: how far an annealed target has come from the program's prior (0) to the
                posterior (1).

        Returns:
            None if there is nothing to learn from them.
        """


@dataclass(frozen=True)
class VarGrad(Loss):
    """Variance of log R - log q over the samples of one input, whoever drew them.

    Richter et al. (2020, arXiv 2010.10436).

    Args:
        huber: beyond this distance from log Z (nats) a trace counts by its distance, not its
            square; ``math.inf``: the variance itself.
    """

    huber: float = 3.0

    name = "vargrad"
    draws = "mixture"
    truncations = True

    def __post_init__(self) -> None:
        if self.huber != math.inf:
            check_number("huber", self.huber, above=0.0)

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor | None:
        if not batch.alive:
            return None
        loss = objectives.vargrad(batch.log_r, batch.log_q, huber=self.huber)
        return loss + _dead_traces(batch)


@dataclass(frozen=True)
class TB(Loss):
    """Trajectory balance, with a learned log Z (Malkin et al., 2022, arXiv 2201.13259)."""

    name = "tb"
    draws = "mixture"
    truncations = True
    learns_log_z = True

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor | None:
        if not batch.alive:
            return None
        assert batch.log_z is not None
        log_z = batch.log_z.to(batch.log_q.device)
        return objectives.tb(batch.log_r, batch.log_q, log_z) + _dead_traces(batch)


@dataclass(frozen=True)
class SubTB(Loss):
    """Pairs of truncations of each trace (Hu et al., 2024, arXiv 2310.04363), and the variance
    between traces.

    Args:
        lam: the weight of a pair falls as ``lam ** distance``, in tokens; in (0, 1].
    """

    lam: float = 1.0

    name = "subtb"
    draws = "mixture"
    truncations = needs_truncations = True

    def __post_init__(self) -> None:
        check_number("lam", self.lam, above=0.0, most=1.0)

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor | None:
        if not batch.alive:
            return None
        terms = []
        for rows, positions in batch.cuts_of_samples():
            log_r, log_q = batch.log_r[rows], batch.log_q[rows]
            terms.append(objectives.subtb(log_r, log_q, self.lam, torch.tensor(positions)))
        # Within samples u is tied together, and between them by the variance of complete traces.
        complete = objectives.vargrad(batch.log_r[: batch.num], batch.log_q[: batch.num])
        return torch.stack(terms).mean() + complete + _dead_traces(batch)


@dataclass(frozen=True)
class ELBO(Loss):
    """Score-function gradient of the ELBO, the reverse KL, on the guide's own draws.

    Args:
        annealing: where the target begins between the program's prior (0) and the posterior (1):
            at ``prior * (R / prior) ** annealing``. A loss that sees the guide's own draws only
            never finds a mode again that the first, noisy steps have lost. 1: it is R throughout.
    """

    annealing: float = 0.25

    name = "elbo"
    draws = "guide"
    defended = True

    def __post_init__(self) -> None:
        check_number("annealing", self.annealing, above=0.0, most=1.0)

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor | None:
        if not batch.alive:
            return None
        weight = self.annealing + (1.0 - self.annealing) * moved
        return objectives.elbo(*_annealed(batch, weight)) + _dead_traces(batch)


@dataclass(frozen=True)
class Wake(Loss):
    """Forward KL, by the guide's own draws weighted by R / q, and by simulated latents, which are
    posterior draws as they are (Bornschein & Bengio, 2015, arXiv 1406.2751).

    Args:
        annealing: as of ``ELBO``.
    """

    annealing: float = 0.25

    name = "wake"
    draws = "guide"
    takes_simulated = True

    def __post_init__(self) -> None:
        check_number("annealing", self.annealing, above=0.0, most=1.0)

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor | None:
        if not batch.alive:
            return None
        weight = self.annealing + (1.0 - self.annealing) * moved
        log_r, log_q = _annealed(batch, weight)
        loss = objectives.wake(log_r - log_q.detach(), log_q)
        given = batch.origin("given")
        if bool(given.any()):
            loss = loss + objectives.sft(batch.log_q[: batch.num][given])
        return loss


@dataclass(frozen=True)
class SFT(Loss):
    """Maximum likelihood on latents that are known: demonstrations, or simulations."""

    name = "sft"
    draws = "given"

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor | None:
        return objectives.sft(batch.log_q[: batch.num][batch.origin("given")])


@dataclass(frozen=True)
class PPO(Loss):
    """Clipped policy gradient on log R, for comparison (Schulman et al., 2017, arXiv 1707.06347).

    Args:
        updates: of the optimiser on the same draws.
        clip: bound on the ratio of new to old density; in (0, 1).
        kl: weight of its penalty, the divergence from the program's prior.
    """

    updates: int = 4
    clip: float = 0.2
    kl: float = 0.02

    name = "ppo"
    draws = "guide"

    def __post_init__(self) -> None:
        check_int("updates", self.updates)
        check_number("kl", self.kl, least=0.0)
        if not check_number("clip", self.clip, above=0.0, most=1.0) < 1.0:
            raise ValueError(f"clip={self.clip}: it must be in (0, 1)")

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor | None:
        if not batch.alive:
            return None
        own = batch.origin("guide")
        log_r, log_q = batch.log_r[: batch.num][own], batch.log_q[: batch.num][own]
        old, prior = batch.old_log_q[own], batch.log_prior[own]
        return objectives.ppo(log_r, log_q, old, prior, clip=self.clip, kl=self.kl)


LOSSES: dict[str, type[Loss]] = {
    loss.name: loss for loss in (VarGrad, TB, SubTB, ELBO, Wake, SFT, PPO)
}
"""By name, for ``fit(loss=...)``."""


def loss_of(loss: str | Loss, options: Mapping[str, Any]) -> Loss:
    """A loss, from its name and its own options.

    Args:
        loss: a name of ``LOSSES``, or a loss, which has its options.
        options: of the loss.

    Raises:
        TypeError: for what is neither, or for options that it has not.
        ValueError: for an unknown name, or an option out of range.
    """
    if isinstance(loss, type) and issubclass(loss, Loss):
        raise TypeError(f"loss={loss.__name__}: give an object, {loss.__name__}()")
    if isinstance(loss, Loss):
        if options:
            name = next(iter(options))
            raise TypeError(
                f"{name}= stands beside a loss that is an object: give it there, "
                f"{type(loss).__name__}({name}=...)"
            )
        return loss
    check_choice("loss", loss, LOSSES)
    kind = LOSSES[loss]
    own = option_names(kind)
    for name in options:
        if name not in own:
            theirs = [other for other, each in LOSSES.items() if name in option_names(each)]
            raise TypeError(
                f"loss={loss!r} has no option {name!r}: it has {', '.join(own) or 'none'}; "
                f"{name}= is of loss={' or '.join(map(repr, theirs))}"
            )
    return kind(**options)


def option_names(kind: type[Loss]) -> list[str]:
    """The options of a loss."""
    return [option.name for option in fields(kind)]  # type: ignore[arg-type]


def _annealed(batch: Batch, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log R and log q of the guide's own draws; log R with so much of log R - log prior."""
    own = batch.origin("guide")
    log_r, log_q = batch.log_r[: batch.num][own], batch.log_q[: batch.num][own]
    if weight < 1.0:
        log_prior = batch.log_prior[own] * batch.beta
        # A trace that the program cannot draw has no prior either.
        annealed = log_prior + weight * (log_r - log_prior)
        log_r = torch.where(log_r > -math.inf, annealed, -math.inf)
    return log_r, log_q


def _dead_traces(batch: Batch) -> torch.Tensor | float:
    """The term of dead traces, from what the guide and the program drew: the program comes to the
    dead traces of a guide that has nearly forgotten them. 0 if the guide drew fewer than two."""
    drawn = batch.origin("guide", "prior")
    by_guide = int(batch.origin("guide").sum())
    if by_guide < 2:
        return 0.0
    log_r, log_q = batch.log_r[: batch.num][drawn], batch.log_q[: batch.num][drawn]
    share = by_guide / len(log_q)
    if share == 1.0:
        return objectives.alive(log_r, log_q)
    log_prior = batch.log_prior[drawn]
    log_drawn = torch.logaddexp(log_q.detach() + math.log(share), log_prior + math.log(1.0 - share))
    return objectives.alive(log_r, log_q, log_drawn)


# --- the learned log Z of TB --------------------------------------------------------------------


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
