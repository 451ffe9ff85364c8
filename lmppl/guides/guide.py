"""What a guide is: a distribution over a program's latent sites that stands in for its posterior."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch

from lmppl.distributions import SiteScore
from lmppl.guides.prompts import Observations, ProgramInput, SiteNames
from lmppl.lm import LM
from lmppl.report.history import History
from lmppl.runtime import ProposerFactory
from lmppl.runtime.arguments import Args
from lmppl.runtime.records import Recaller
from lmppl.runtime.simulation import Simulated


class Guide(Protocol):
    """A proposal with a density: it draws a run's latents, and scores what was drawn."""

    @property
    def reads_observations(self) -> bool:
        """Whether it reads what the program observes; else it reads the program's arguments."""

    def proposer_factory(
        self, args: Args, *, temperature: float = 1.0, observations: Observations | None = None
    ) -> ProposerFactory:
        """What makes the proposer of each particle on one input.

        Args:
            args: the program's arguments.
            temperature: texts are drawn from ``q ** (1 / temperature)`` (automatic guides only);
                ``math.inf``: all is drawn from the model, and remembered for the guide to score.
            observations: what ``observations_of`` found, as training knows it. None: the guide is put
                to use; it finds them, and warns of sites that it was not trained for.
        """

    def recaller(self, args: Args, observations: Observations) -> Recaller:
        """A proposer for a trace whose latents are known, which remembers them as its own draws."""

    def observations_of(self, inputs: Sequence[ProgramInput]) -> list[Observations]:
        """What it reads of inputs, in one batch of runs; by default nothing."""
        return [{} for _ in inputs]

    def observations_of_simulation(
        self, one: Simulated, program: Callable[..., Any]
    ) -> Observations | None:
        """What it reads of a simulated input, which ``program`` observes; None: only runs can tell."""
        return None

    def score(self, proposers: Sequence[Any], *, grad: bool = True) -> list[dict[str, SiteScore]]:
        """log q of what proposers drew, per proposer and site, with gradients if ``grad``, by one
        teacher-forced pass over finished samples."""

    def start_training(self, *, several_inputs: bool) -> None:
        """Begin to note what sites are like in training, and whether it has to tell inputs apart by
        what it reads."""
        return

    def find_parameters(self, args: Args) -> None:
        """Find the parameters of a guide program by runs on an input; raises ``ValueError`` if it has
        none. Those of other guides are made as sites are met."""
        return

    def parts(self) -> dict[str, Any] | None:
        """What its parameters are made from, in JSON's types; None if only runs can make them."""
        return None

    def make_parts(self, parts: Mapping[str, Any]) -> None:
        """Make the parameters of another one's ``parts()``, as far as it has them not."""
        return

    def leave_out(self, names: Collection[str]) -> None:
        """Forget that it has used these parameters, so that ``score`` finds them anew, in order."""
        return

    def adapters(self) -> list[LM]:
        """The language models with trainable parameters, in the order in which it uses them."""

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters that it has used so far, by name."""

    def identity(self) -> dict[str, Any]:
        """What makes it another guide than others, beside its parameters: JSON's values and
        programs, by what they are called in messages."""

    def state_dict(self) -> dict[str, Any]:
        """All that makes it again: a nested dict of tensors and JSON's values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; raises ``ValueError`` for another guide's."""


class TrainableGuide(Guide, Protocol):
    """A guide with the program that it is for, and the record of its training: see ``LMGuide``."""

    model: Callable[..., Any]
    base: LM
    history: History
    notes: list[str]
    tempered_target: float | None

    @property
    def condition_on(self) -> SiteNames: ...

    def prepare(
        self,
        args: Args,
        model: Callable[..., Any] | None = None,
        observations: Observations | None = None,
    ) -> None:
        """Run the guide on an input, so that all its parameters exist and are known."""
