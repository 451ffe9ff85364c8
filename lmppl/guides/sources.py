"""Where the inputs of each training step come from: a fixed collection, or an endless stream."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from lmppl.guides.inputs import Args, Input, positional, signature_of
from lmppl.guides.options import FitOptions


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
    def state(self) -> dict[str, Any]:
        """Where it is, in JSON's types."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""


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

    def state(self) -> dict[str, Any]:
        return {"queue": list(self._queue)}

    def restore(self, state: dict[str, Any]) -> None:
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
        for index, each in enumerate(chosen, self._taken):
            each.index = index  # what was skipped counts
        self._taken += len(chosen)
        return chosen

    @property
    def kept(self) -> list[Input]:
        return []

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
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


def read_stream(
    program: Callable[..., Any], data: Iterable[Any], options: FitOptions
) -> Iterator[Input]:
    """The inputs of an iterator, checked one by one as they come."""
    signature = signature_of(program)
    for index, item in enumerate(data):
        args: Args = positional(signature, item, index)
        yield Input(program, args, index, options)
