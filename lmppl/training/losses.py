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
from lmppl.training.samples import AnySample, own_of


class Loss(ABC):
    """What a guide is trained by.

    Attributes:
        draws: ``"mixture"``: traces of any behaviour policy; ``"guide"``: the guide's own draws
            only; ``"given"``: latents that the user gave or that were simulated, and no draws.
    """

    name: ClassVar[str]  # by which fit(loss=...) finds it
    draws: ClassVar[Literal["mixture", "guide", "given"]]
    truncations: ClassVar[bool] = False  # whether it uses truncations of the traces
    needs_truncations: ClassVar[bool] = False  # whether it is nothing without them
    learns_log_z: ClassVar[bool] = False  # whether it needs the log evidence of each input
    # Of a loss on the guide's own draws: whether it learns from simulated latents as well, and, to
    # unlearn dead traces on inputs that have any, from draws of the program.
    takes_simulated: ClassVar[bool] = False
    defended: ClassVar[bool] = False
    updates: int = 1  # of the optimiser on the same draws

    @abstractmethod
    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor:
        """The loss on the samples of one input, 0-d.

        Args:
            batch: the samples; one is alive, at least, if they are not given.
            moved: how far an annealed target has come from the program's prior (0) to the
                posterior (1).
        """


@dataclass(frozen=True)
class VarGrad(Loss):
    """Variance of log R - log q over the samples of one input, whoever drew them (Richter et al.,
    2020, arXiv 2010.10436), and beside it the forward KL.

    Args:
        huber: beyond this distance from log Z (nats) a trace counts by its distance, not its
            square; ``math.inf``: the variance itself.
        forward: weight of the forward KL's estimate from what the guide and the program drew (see
            ``"wake"``); 0: the variance alone, which learns little of texts that the guide hardly
            ever draws, and those make its weights uneven.
    """

    huber: float = 3.0
    forward: float = 3.0
    name, draws = "vargrad", "mixture"
    truncations = True

    def __post_init__(self) -> None:
        if self.huber != math.inf:
            check_number("huber", self.huber, above=0.0)
        check_number("forward", self.forward, least=0.0)

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor:
        loss = objectives.vargrad(batch.log_r, batch.log_q, huber=self.huber)
        loss = loss + _dead_traces(batch)
        drawn = batch.complete("guide", "prior")
        if not self.forward or drawn.num < 2 or not batch.complete("guide").num:
            return loss
        forward = objectives.wake(drawn.log_r, drawn.log_q, _log_drawn(batch, drawn))
        return loss + self.forward * forward


@dataclass(frozen=True)
class TB(Loss):
    """Trajectory balance, with a learned log Z (Malkin et al., 2022, arXiv 2201.13259)."""

    name, draws = "tb", "mixture"
    truncations = learns_log_z = True

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor:
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
    name, draws = "subtb", "mixture"
    truncations = needs_truncations = True

    def __post_init__(self) -> None:
        check_number("lam", self.lam, above=0.0, most=1.0)

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor:
        terms = []
        for i, sample in enumerate(batch.samples):
            rows, lengths = [i], [0]
            for row, cut in enumerate(batch.truncations, batch.num):
                if cut.sample is sample:
                    rows.append(row)
                    lengths.append(cut.length)
                    lengths[0] = cut.full_length
            log_r, log_q = batch.log_r[rows], batch.log_q[rows]
            terms.append(objectives.subtb(log_r, log_q, self.lam, torch.tensor(lengths)))
        # Within samples u is tied together, and between them by the variance of complete traces.
        complete = batch.complete()
        between = objectives.vargrad(complete.log_r, complete.log_q)
        return torch.stack(terms).mean() + between + _dead_traces(batch)


@dataclass(frozen=True)
class _Annealed(Loss):
    """A loss on the guide's own draws, whose target moves from the program's prior to the posterior: a
    loss that sees nothing else never finds a mode again that the first, noisy steps have lost."""

    annealing: float = 0.25
    draws = "guide"

    def __post_init__(self) -> None:
        check_number("annealing", self.annealing, above=0.0, most=1.0)

    def _drawn(self, batch: Batch, moved: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log R, annealed, and log q of the guide's own draws."""
        drawn = batch.complete("guide")
        weight = self.annealing + (1.0 - self.annealing) * moved
        if weight == 1.0:
            return drawn.log_r, drawn.log_q
        log_prior = drawn.log_prior * batch.beta
        log_r = log_prior + weight * (drawn.log_r - log_prior)
        # A trace that the program cannot draw has no prior either.
        return torch.where(drawn.log_r > -math.inf, log_r, -math.inf), drawn.log_q


@dataclass(frozen=True)
class ELBO(_Annealed):
    """Score-function gradient of the ELBO, the reverse KL, on the guide's own draws.

    Args:
        annealing: the target moves from the program's prior to the posterior over the first half
            of the steps, and begins at ``prior * (R / prior) ** annealing``; in (0, 1]. 1: it is R
            throughout.
    """

    name = "elbo"
    defended = True

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor:
        return objectives.elbo(*self._drawn(batch, moved)) + _dead_traces(batch)


@dataclass(frozen=True)
class Wake(_Annealed):
    """Forward KL, by the guide's own draws weighted by R / q, and by simulated latents, which are
    posterior draws as they are (Bornschein & Bengio, 2015, arXiv 1406.2751).

    Args:
        annealing: as of ``ELBO``.
    """

    name = "wake"
    takes_simulated = True

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor:
        log_r, log_q = self._drawn(batch, moved)
        loss = objectives.wake(log_r, log_q)
        given = batch.complete("given")
        return loss + objectives.sft(given.log_q) if given.num else loss


@dataclass(frozen=True)
class SFT(Loss):
    """Maximum likelihood on latents that are known: demonstrations, or simulations."""

    name, draws = "sft", "given"

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor:
        return objectives.sft(batch.complete("given").log_q)


@dataclass(frozen=True)
class PPO(Loss):
    """Clipped policy gradient on log R, for comparison (Schulman et al., 2017, arXiv 1707.06347).

    Args:
        updates: of the optimiser on the same draws.
        clip: bound on the ratio of new to old density; in (0, 1).
        kl: weight of its penalty, the divergence from the program's prior.

    Raises:
        ValueError: for an option out of range.
    """

    updates: int = 4
    clip: float = 0.2
    kl: float = 0.02
    name, draws = "ppo", "guide"

    def __post_init__(self) -> None:
        check_int("updates", self.updates)
        check_number("kl", self.kl, least=0.0)
        if not check_number("clip", self.clip, above=0.0, most=1.0) < 1.0:
            raise ValueError(f"clip={self.clip}: it must be in (0, 1)")

    def of(self, batch: Batch, *, moved: float = 1.0) -> torch.Tensor:
        drawn = batch.complete("guide")
        densities = drawn.log_q, drawn.old_log_q, drawn.log_prior
        return objectives.ppo(drawn.log_r, *densities, clip=self.clip, kl=self.kl)


def _dead_traces(batch: Batch) -> torch.Tensor | float:
    """The term of dead traces, from what the guide and the program drew: the program comes to the
    dead traces of a guide that has nearly forgotten them. 0 if the guide drew fewer than two."""
    drawn = batch.complete("guide", "prior")
    if batch.complete("guide").num < 2:
        return 0.0
    # Where none is dead the term is 0, and the law of the program's draws may take a pass to know.
    if not bool((drawn.log_r == -math.inf).any()):
        return 0.0
    return objectives.alive(drawn.log_r, drawn.log_q, _log_drawn(batch, drawn))


def _log_drawn(batch: Batch, drawn: Batch) -> torch.Tensor | None:
    """(N,) the log-density of the mixture that drew those traces of a batch that the guide and the
    program drew; None: the guide drew all."""
    share = batch.complete("guide").num / drawn.num
    if share == 1.0:
        return None
    by_program = drawn.log_own() + math.log(1.0 - share)
    return torch.logaddexp(drawn.log_q.detach() + math.log(share), by_program)


LOSSES: dict[str, type[Loss]] = {
    loss.name: loss for loss in (VarGrad, TB, SubTB, ELBO, Wake, SFT, PPO)
}
"""By name, for ``fit(loss=...)``."""


def loss_of(loss: str | Loss, options: Mapping[str, Any]) -> Loss:
    """A loss, from its name and its own options, or as it is. Raises ``TypeError`` for what is
    neither, or for options that it has not, ``ValueError`` for an unknown name or a bad option."""
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
    allowed = option_names(LOSSES[loss])
    for name in options:
        if name not in allowed:
            others = [other for other, kind in LOSSES.items() if name in option_names(kind)]
            raise TypeError(
                f"loss={loss!r} has no option {name!r}: it has {', '.join(allowed) or 'none'}; "
                f"{name}= is of loss={' or '.join(map(repr, others))}"
            )
    return LOSSES[loss](**options)


def option_names(kind: type[Loss]) -> list[str]:
    """The options of a loss."""
    return [option.name for option in fields(kind)]  # type: ignore[arg-type]


# --- the learned log Z of TB --------------------------------------------------------------------


class LogZ(nn.Module):
    """The learned log evidence of ``"tb"``: a small network on ``num_features`` numbers, see
    ``prompt_state``, and a number of its own for each of ``num_inputs`` inputs that come again."""

    def __init__(self, num_features: int, num_inputs: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(num_inputs))
        self.network = Head(num_features, 1)

    def forward(self, features: torch.Tensor, index: int) -> torch.Tensor:
        value = self.network(features)[0]
        return value + self.own[index] if len(self.own) else value


def first_prompts(samples: Sequence[AnySample]) -> dict[int, tuple[int, ...]]:
    """The prompt of the first latent text, of the first trace of this process that has one, by the place
    of the trace."""
    for i, sample in own_of(samples).items():
        for draw in sample.proposer.draws.values():
            fn = getattr(draw, "fn", None) if not isinstance(draw, dict) else draw["fn"]
            if isinstance(fn, LMText):
                return {i: fn.prefix_ids}
    return {}


def prompt_state(lm: LM, prompts: Mapping[int, tuple[int, ...]]) -> torch.Tensor:
    """What ``LogZ`` reads of an input, the LM's state after the first of these prompts: (hidden_size,)
    float32 on the CPU. It is zero for a program without latent texts."""
    for prompt in prompts.values():
        return lm.hidden([prompt])[0].float().cpu()
    return torch.zeros(lm.hidden_size)
