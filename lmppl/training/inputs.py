"""The inputs that a guide is trained on: checked against the program's signature, one by one."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from lmppl.guides.guide import Guide
from lmppl.guides.prompts import Observations
from lmppl.runtime.arguments import Args, items_of, positional, signature_of
from lmppl.runtime.records import Record
from lmppl.training.options import FitOptions
from lmppl.training.samples import ReplayBuffer


@dataclass(eq=False)
class Input:
    """One input, and what training keeps of it.

    Attributes:
        program: the model; of a simulated input, the model that observes what was simulated.
        args: its positional arguments.
        index: its number in the data.
        given: latents that the user gave, or that were simulated.
        exact: whether those are exact draws of the posterior, as simulated ones are.
        observations: what the guide reads of it, once that was found.
        features: what the network of a learned log Z reads of it, once that was found.
        visits: how many steps have used it.
        alive: whether any trace of it had a positive probability.
        rejects: whether any trace of it had probability zero.
        buffer: the best traces seen.
        stock: traces of the program itself, drawn ahead and not used yet.
        comes_again: whether later steps may have it, too.
        shared: what all processes of the run know to be kept of it, by name.
    """

    program: Callable[..., Any]
    args: Args
    index: int
    options: InitVar[FitOptions]
    given: list[Record] = field(default_factory=list)
    exact: bool = False
    observations: Observations | None = None
    features: Any = None
    visits: int = 0
    alive: bool = False
    rejects: bool = False
    stock: list[Record] = field(default_factory=list)
    comes_again: bool = True
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self, options: FitOptions) -> None:
        self.buffer = ReplayBuffer(options.replay_capacity, options.near_duplicates)

    def forget_scores(self) -> None:
        """The model has changed: forget what was found out about stored traces."""
        self.buffer.records = [record.forgotten() for record in self.buffer.records]
        self.given = [record.forgotten() for record in self.given]
        self.stock.clear()  # drawn from the model as it was


def observe(guide: Guide, inputs: Sequence[Input]) -> None:
    """Find what the guide reads of inputs for which that is not known yet."""
    new = [input_ for input_ in inputs if input_.observations is None]
    if new:
        found = guide.observations_of([(input_.program, input_.args) for input_ in new])
        for input_, observations in zip(new, found, strict=True):
            input_.observations = observations


def read_inputs(
    program: Callable[..., Any], data: Any, options: FitOptions, what: str = "data"
) -> Iterator[Input]:
    """The inputs that a user gives, checked one by one as they come.

    Args:
        program: the program.
        data: tuples (or lists) of its positional arguments, or dicts of its arguments by name; a
            collection or an iterator.
        options: of the training.
        what: the argument that they are given as, for messages.

    Raises:
        TypeError: an item of another type, or one that does not fit the program; says which.
        ValueError: if there is no item.
    """
    signature = signature_of(program)
    index = -1
    for index, item in enumerate(items_of(data, what)):
        yield Input(program, positional(signature, item, index, what), index, options)
    if index < 0:
        raise ValueError(f"{what} holds no input: give at least one, [(x, y)]")


# --- where the inputs of each step come from -----------------------------------------------------


class Source(ABC):
    """Gives each step its inputs.

    Attributes:
        num_inputs: how many come again and again; 0 for a stream, each of whose inputs comes once.
        kept: the inputs whose buffers matter for the steps to come.
        origin: the arguments that they are simulated on.
    """

    num_inputs: int = 0
    kept: Sequence[Input] = ()
    origin: Sequence[Args] = ()

    @abstractmethod
    def next(self, num: int) -> list[Input]:
        """The inputs of one step: ``num``, or fewer at the end of a stream."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where it is, in JSON's types."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""


class Collection(Source):
    """Inputs in rounds; each round has all of them once, in a random order."""

    def __init__(self, inputs: Sequence[Input], generator: torch.Generator) -> None:
        self.kept, self.num_inputs, self._generator = inputs, len(inputs), generator
        self._queue: list[int] = []

    def next(self, num: int) -> list[Input]:
        num = min(num, self.num_inputs)
        if len(self._queue) < num:
            order = torch.randperm(self.num_inputs, generator=self._generator).tolist()
            # All of them once more; those that still wait come last, so that no step has one twice.
            self._queue += sorted(order, key=lambda i: i in self._queue)
        chosen, self._queue = self._queue[:num], self._queue[num:]
        return [self.kept[i] for i in chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"queue": list(self._queue)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._queue = list(state["queue"])


class Stream(Source):
    """Inputs that come once, made as they are needed.

    Args:
        inputs: makes them; asked again from the beginning when training is resumed.
        skip: leaves out so many that are to come, where that is cheaper than to make them.
        origin: what they are simulated from.
    """

    def __init__(
        self,
        inputs: Iterator[Input],
        skip: Callable[[int], None] | None = None,
        origin: Sequence[Args] = (),
    ) -> None:
        self._inputs, self._skip, self.origin = inputs, skip, origin
        self._taken = 0

    def next(self, num: int) -> list[Input]:
        chosen = list(itertools.islice(self._inputs, num))
        for index, input_ in enumerate(chosen, self._taken):
            input_.index, input_.comes_again = index, False  # what was skipped counts
        self._taken += len(chosen)
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        taken = state["taken"]
        if self._skip is not None:
            self._skip(taken)
            self._taken = taken
        elif (skipped := len(self.next(taken))) < taken:
            raise ValueError(
                f"the data ended after {skipped} inputs, but the run to be resumed had used {taken}: "
                "give the same data again, from its beginning"
            )
