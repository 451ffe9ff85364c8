"""How a guide is trained: the options that ``fit`` has for every loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lmppl.checks import check_flag, check_int, check_number, did_you_mean
from lmppl.lm.network.memory import Memory
from lmppl.training.losses import LOSSES, Loss, VarGrad, loss_of, option_names


@dataclass(frozen=True)
class FitOptions:
    """How to train; the defaults are meant for every program.

    Args:
        batch_size: complete traces a step, over all its inputs.
        inputs_per_step: how many inputs share a step (at most).
        learning_rate: AdamW's; it warms up over 5% of the steps and decays along a cosine. None:
            3e-3 for a hidden size of 64 or less, and falling with the square root of the size
            (1e-3 at 576, 4e-4 at 4096).
        loss: what is minimised, with its own options; see ``lmppl.losses``.
        tempered_fraction: of the traces, drawn from the guide at a temperature in [0.5, 2].
        prior_fraction: of the traces, drawn from the program itself. Its support holds every mode
            of the posterior, also one that the guide has lost. (``"elbo"`` takes them where traces
            may be dead, for the term that unlearns those.)
        replay_fraction: of the traces, drawn again from the best seen.
        replay_capacity: how many distinct traces are kept for each input.
        near_duplicates: of two kept traces whose edit distance, in tokens, is below this fraction
            of the shorter one's length, only the better is kept. 0: only equal ones count as one.
        truncations: how many tokens the rewards of truncations may cost, as a multiple of the
            complete traces'; 0: none.
        reward_temperature: first and last: the reward is ``R ** (1 / temperature)``. If the last
            is not 1, the guide's target is a *tempered* posterior.
        max_grad_norm: gradients are clipped to it.
        gradient_checkpointing: keep only what enters each layer of the language model for the
            backward pass, and compute the rest anew there (see ``lmppl.Memory``).
        training_tokens: read at most so many tokens a pass, one pass after another: the gradient
            of the whole batch in the memory of a pass. None: the batch at once.

    Raises:
        TypeError: for an option of another type.
        ValueError: for one out of range.
    """

    batch_size: int = 32
    inputs_per_step: int = 4
    learning_rate: float | None = None
    loss: Loss = VarGrad()
    tempered_fraction: float = 0.125
    prior_fraction: float = 0.125
    replay_fraction: float = 0.25
    replay_capacity: int = 64
    near_duplicates: float = 0.25
    truncations: float = 1.0
    reward_temperature: tuple[float, float] = (1.0, 1.0)
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    training_tokens: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], beside: Sequence[str] = ()) -> FitOptions:
        """From keywords; those of a loss may stand beside its name. ``beside``: other keywords that
        are allowed, for messages.

        Raises:
            TypeError: an unknown one (names the nearest), one of another loss or of another type.
            ValueError: one out of range.
        """
        shared = [option.name for option in fields(cls)]
        of_losses = dict.fromkeys(name for kind in LOSSES.values() for name in option_names(kind))
        for name in options:
            if name not in shared and name not in of_losses:
                allowed = dict.fromkeys([*beside, *shared, *of_losses])
                raise TypeError(f"no option {name!r}{did_you_mean(name, allowed)}")
        of_loss = {name: value for name, value in options.items() if name in of_losses}
        loss = loss_of(options.get("loss", VarGrad.name), of_loss)
        return cls(**{n: v for n, v in options.items() if n in shared} | {"loss": loss})

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 2), ("inputs_per_step", 1), ("replay_capacity", 1)):
            self._set(name, check_int(name, getattr(self, name), least))
        fractions = "tempered_fraction", "prior_fraction", "replay_fraction"
        for name in (*fractions, "truncations"):
            check_number(name, getattr(self, name), least=0.0)
        if sum(getattr(self, name) for name in fractions) > 1:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in fractions)
            raise ValueError(f"{given}: they must be together at most 1")
        if not check_number("near_duplicates", self.near_duplicates, least=0.0) < 1:
            raise ValueError(f"near_duplicates={self.near_duplicates}: it must be in [0, 1)")
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, above=0.0)
        check_number("max_grad_norm", self.max_grad_norm, above=0.0)
        self._set("loss", loss_of(self.loss, {}))
        if self.loss.needs_truncations and self.truncations == 0:
            raise ValueError(
                f"loss={self.loss.name!r} compares truncations of a trace: truncations=0 has none"
            )
        temperatures = self.reward_temperature
        if not (isinstance(temperatures, Sequence) and len(temperatures) == 2):
            raise TypeError(
                f"reward_temperature={temperatures!r}: give the first and the last, (4, 1)"
            )
        for temperature in temperatures:
            check_number("reward_temperature", temperature, least=1.0)
        check_flag("gradient_checkpointing", self.gradient_checkpointing)
        if self.training_tokens is not None:
            self._set("training_tokens", check_int("training_tokens", self.training_tokens))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def plain(self) -> dict[str, Any]:
        """All options, those of the loss beside the others, in JSON's types."""
        options = asdict(self)
        return {**options, **options["loss"], "loss": self.loss.name}

    def rate(self, hidden_size: int) -> float:
        """The learning rate for a language model of this width."""
        if self.learning_rate is not None:
            return float(self.learning_rate)
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
        return 1.0 / (first + (last - first) * moved(number, steps))

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


def moved(number: int, steps: int) -> float:
    """How far a schedule over the first half of the steps has come, in [0, 1]."""
    return min(1.0, number / max(1, steps // 2))
