"""How a guide is trained: the options of ``fit``, and what each loss needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal

from lmppl.checks import did_you_mean
from lmppl.lm.network.memory import Memory

LossName = Literal["vargrad", "tb", "subtb", "elbo", "wake", "sft", "ppo"]


@dataclass(frozen=True)
class LossKind:
    """What a loss learns from.

    Attributes:
        draws: ``"mixture"``: traces of any behaviour policy; ``"guide"``: the guide's own draws
            only; ``"given"``: latents that the user gave or that were simulated, and no draws.
        truncations: whether it uses them.
        repeats: whether the same draws serve for several updates.
        annealed: whether its target moves from the program's prior to the posterior. A loss that
            sees the guide's own draws only never finds a mode again that the first, noisy steps
            have lost.
        defended: whether a loss on the guide's own draws takes draws of the program as well, for
            the term of dead traces, on inputs that have any.
    """

    draws: Literal["mixture", "guide", "given"]
    truncations: bool = False
    repeats: bool = False
    annealed: bool = False
    defended: bool = False


LOSSES: dict[str, LossKind] = {
    "vargrad": LossKind("mixture", truncations=True),
    "tb": LossKind("mixture", truncations=True),
    "subtb": LossKind("mixture", truncations=True),
    "elbo": LossKind("guide", annealed=True, defended=True),
    "wake": LossKind("guide", annealed=True),
    "sft": LossKind("given"),
    "ppo": LossKind("guide", repeats=True),
}


@dataclass(frozen=True)
class FitOptions:
    """How to train; the defaults are meant for every program.

    Args:
        batch_size: complete traces a step, over all its inputs.
        inputs_per_step: how many inputs share a step (at most).
        learning_rate: AdamW's; it warms up over 5% of the steps and decays along a cosine. None:
            3e-3 for a hidden size of 64 or less, and falling with the square root of the size
            (1e-3 at 576, 4e-4 at 4096).
        loss: ``"vargrad"``, ``"tb"``, ``"subtb"``, ``"elbo"``, ``"wake"``; or what they are
            compared with, ``"sft"`` and ``"ppo"`` (see ``lmppl.training.objectives``).
        subtb_lambda: weight of a pair of truncations decays as ``lambda ** distance``.
        tempered_fraction: of the traces, drawn from the guide at a temperature in [0.5, 2].
        prior_fraction: of the traces, drawn from the program itself. Its support holds every mode
            of the posterior, also one that the guide has lost. (``"elbo"`` takes them where traces
            may be dead, for the term that unlearns those.)
        replay_fraction: of the traces, drawn again from the best seen.
        replay_capacity: how many distinct traces are kept for each input.
        near_duplicates: of two kept traces whose edit distance, in tokens, is below this fraction
            of the shorter one's length, only the better is kept. 0: only equal ones count as one.
        huber: beyond this distance from log Z (nats) a trace counts linearly in ``"vargrad"``.
        truncations: how many tokens the rewards of truncations may cost, as a multiple of the
            complete traces'; 0: none.
        reward_temperature: first and last: the reward is ``R ** (1 / temperature)``. If the last
            is not 1, the guide's target is a *tempered* posterior.
        annealing: where the target of ``"elbo"`` and ``"wake"`` begins between the program's prior (0)
            and the posterior (1): at ``prior * (R / prior) ** annealing``. It reaches R after half
            of the steps. 1: it is R throughout.
        ppo_updates: updates on the same draws, for ``"ppo"``.
        ppo_clip: bound on the ratio of new to old density, for ``"ppo"``.
        ppo_kl: weight of its penalty, the divergence from the program's prior.
        max_grad_norm: gradients are clipped to it.
        gradient_checkpointing: keep only what enters each layer of the language model for the
            backward pass, and compute the rest anew there (see ``lmppl.Memory``).
        training_tokens: read at most so many tokens a pass, one pass after another: the gradient
            of the whole batch in the memory of a pass. None: the batch at once.
    """

    batch_size: int = 32
    inputs_per_step: int = 4
    learning_rate: float | None = None
    loss: LossName = "vargrad"
    subtb_lambda: float = 1.0
    tempered_fraction: float = 0.125
    prior_fraction: float = 0.125
    replay_fraction: float = 0.25
    replay_capacity: int = 64
    near_duplicates: float = 0.25
    huber: float = 3.0
    truncations: float = 1.0
    reward_temperature: tuple[float, float] = (1.0, 1.0)
    annealing: float = 0.25
    ppo_updates: int = 4
    ppo_clip: float = 0.2
    ppo_kl: float = 0.02
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    training_tokens: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], others: Sequence[str] = ()) -> FitOptions:
        """From keywords.

        Args:
            options: the keywords.
            others: what else is allowed beside them, for messages.

        Raises:
            TypeError: an unknown one (names the nearest), or one of another type.
            ValueError: one out of range.
        """
        names = [each.name for each in fields(cls)]
        for name in options:
            if name not in names:
                allowed = [*others, *names]
                raise TypeError(f"no option {name!r}{did_you_mean(name, allowed)}")
        return cls(**options)

    def __post_init__(self) -> None:
        for name in ("batch_size", "inputs_per_step", "replay_capacity", "ppo_updates"):
            if not isinstance(getattr(self, name), Integral):
                raise TypeError(f"{name}={getattr(self, name)!r}: it must be an int")
        if not (
            isinstance(self.reward_temperature, Sequence) and len(self.reward_temperature) == 2
        ):
            raise TypeError(
                f"reward_temperature={self.reward_temperature!r}: give the first and the last, (4, 1)"
            )
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: the variance needs at least 2 traces")
        if self.inputs_per_step < 1:
            raise ValueError(f"inputs_per_step={self.inputs_per_step}: it must be at least 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: it must be positive")
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r}, allowed: {', '.join(LOSSES)}")
        fractions = (self.tempered_fraction, self.prior_fraction, self.replay_fraction)
        if min(fractions) < 0 or sum(fractions) > 1:
            raise ValueError(
                f"tempered_fraction, prior_fraction and replay_fraction are {fractions}: they must "
                "not be negative, and together at most 1"
            )
        if self.replay_capacity < 1:
            raise ValueError(f"replay_capacity={self.replay_capacity}: it must be at least 1")
        if not 0 <= self.near_duplicates < 1:
            raise ValueError(f"near_duplicates={self.near_duplicates}: it must be in [0, 1)")
        if not 0 < self.subtb_lambda <= 1:
            raise ValueError(f"subtb_lambda={self.subtb_lambda}: it must be in (0, 1]")
        if self.truncations < 0:
            raise ValueError(f"truncations={self.truncations}: it must not be negative")
        if self.loss == "subtb" and self.truncations == 0:
            raise ValueError("loss='subtb' compares truncations of a trace: truncations=0 has none")
        if not 0 < self.annealing <= 1:
            raise ValueError(f"annealing={self.annealing}: it must be in (0, 1]")
        if self.ppo_updates < 1 or not 0 < self.ppo_clip < 1 or self.ppo_kl < 0:
            raise ValueError(
                f"ppo_updates={self.ppo_updates}, ppo_clip={self.ppo_clip}, ppo_kl={self.ppo_kl}: "
                "at least one update, a clip between 0 and 1, a penalty that is not negative"
            )
        if not (self.huber > 0 and self.max_grad_norm > 0):
            raise ValueError(
                f"huber={self.huber}, max_grad_norm={self.max_grad_norm}: they must be positive"
            )
        self.memory(Memory())  # checks training_tokens
        if min(self.reward_temperature) < 1.0:
            raise ValueError(f"reward_temperature={self.reward_temperature}: at least 1 each")

    @property
    def kind(self) -> LossKind:
        """What the loss learns from."""
        return LOSSES[self.loss]

    def rate(self, hidden_size: int) -> float:
        """The learning rate for a language model of this width."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-3 * min(1.0, math.sqrt(64 / hidden_size))

    def schedule(self, number: int, steps: int) -> float:
        """Factor of the learning rate: warm-up over 5% of the steps, then a cosine to 2%."""
        warmup = max(1, steps // 20)
        if number < warmup:
            return (number + 1) / warmup
        done = (number - warmup) / max(1, steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done))

    def inverse_temperature(self, number: int, steps: int) -> float:
        """Of the reward, at a step: it moves along a line over the first half of them."""
        first, last = self.reward_temperature
        return 1.0 / (first + (last - first) * _moved(number, steps))

    def likelihood_weight(self, number: int, steps: int) -> float:
        """Of log R - log prior, at a step: it moves along a line over the first half of them."""
        if not self.kind.annealed:
            return 1.0
        return self.annealing + (1.0 - self.annealing) * _moved(number, steps)

    def memory(self, usual: Memory) -> Memory:
        """What a trained language model's passes may take."""
        return replace(
            usual,
            gradient_checkpointing=self.gradient_checkpointing or usual.gradient_checkpointing,
            training_tokens=self.training_tokens or usual.training_tokens,
        )

    @property
    def tempered_target(self) -> float | None:
        """The temperature of the posterior that the guide ends at, or None if it is untempered."""
        last = self.reward_temperature[1]
        return None if last == 1.0 else last


def _moved(number: int, steps: int) -> float:
    """How far a schedule over the first half of the steps has come, in [0, 1]."""
    return min(1.0, number / max(1, steps // 2))
