"""The inputs that a guide is trained on: checked against the program's signature, one by one."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lmppl.guides.guide import Guide
from lmppl.guides.prompts import Observations
from lmppl.runtime.arguments import Args, items_of, positional, signature_of
from lmppl.runtime.records import Record
from lmppl.training.options import FitOptions
from lmppl.training.samples import ReplayBuffer


class Input:
    """One input, and what training keeps of it.

    Args:
        program: the model; of a simulated input, the model that observes what was simulated.
        args: its positional arguments.
        index: its number in the data.
        options: of the training.
        given: latents that the user gave, or that were simulated.
        exact: whether those are exact draws of the posterior, as simulated ones are.

    Attributes:
        buffer: the best traces seen.
        stock: traces of the program itself, drawn ahead and not used yet.
        observations: what the guide reads of it, once that was found.
        features: what the network of a learned log Z reads of it, once that was found.
        visits: how many steps have used it.
        alive: whether any trace of it had a positive probability.
        rejects: whether any trace of it had probability zero.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        args: Args,
        index: int,
        options: FitOptions,
        given: Sequence[Record] = (),
        *,
        exact: bool = False,
    ) -> None:
        self.program, self.args, self.index = program, args, index
        self.given, self.exact = list(given), exact
        self.buffer = ReplayBuffer(options.replay_capacity, options.near_duplicates)
        self.stock: list[Record] = []
        self.observations: Observations | None = None
        self.features: Any = None
        self.visits = 0
        self.alive = self.rejects = False

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
        origin: what they are simulated from.
    """

    num_inputs: int = 0
    origin: Sequence[Args] = ()

    @abstractmethod
    def next(self, num: int) -> list[Input]:
        """The inputs of one step: ``num``, or fewer at the end of a stream."""

    @property
    @abstractmethod
    def kept(self) -> list[Input]:
        """The inputs whose buffers matter for the steps to come."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where it is, in JSON's types."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""


class Collection(Source):
    """Inputs in rounds; each round has all of them once, in a random order."""

    def __init__(self, inputs: Sequence[Input], generator: torch.Generator) -> None:
        self._inputs, self._generator = list(inputs), generator
        self._queue: list[int] = []
        self.num_inputs = len(self._inputs)

    def next(self, num: int) -> list[Input]:
        num = min(num, len(self._inputs))
        if len(self._queue) < num:
            order = torch.randperm(len(self._inputs), generator=self._generator).tolist()
            # All of them once more; those that still wait come last, so that no step has one twice.
            self._queue += sorted(order, key=lambda i: i in self._queue)
        chosen, self._queue = self._queue[:num], self._queue[num:]
        return [self._inputs[i] for i in chosen]

    @property
    def kept(self) -> list[Input]:
        return self._inputs

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
            input_.index = index  # what was skipped counts
        self._taken += len(chosen)
        return chosen

    @property
    def kept(self) -> list[Input]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._skip is not None:
            self._skip(state["taken"])
            self._taken = state["taken"]
            return
        skipped = len(self.next(state["taken"]))
        if skipped < state["taken"]:
            raise ValueError(
                f"the data ended after {skipped} inputs, but the run to be resumed had used "
                f"{state['taken']}: give the same data again, from its beginning"
            )
