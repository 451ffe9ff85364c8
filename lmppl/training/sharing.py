"""How the work of a step is shared out to the processes of a run.

A step's work is a table, with a row for each input and a cell for each of its traces.

    SharedInputs: a process has some rows, whole
    SplitTraces:  a process has some cells of every row
        slot i of a step falls to rank i mod K, with the random stream of the slot
        each rank draws its traces, and all are told of them, so all fill the same replay buffers
        each rank scores its traces, and all are told log q
        all compute the loss of the whole row, in which other ranks' log q are constants
        so what reaches a rank's parameters is its traces' part of the gradient, and the sum of
        these is the gradient of the loss: of its centre and its counts over all traces

Many inputs are shared out by rows, with little to tell; few, which have many traces each, by cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lmppl.runtime.records import Record
from lmppl.training.batch import Batch, Cell, cells_of, log_own_of, spliced, whole_batch
from lmppl.training.inputs import Input
from lmppl.training.kept import hear_news, news_of, record_of_state, record_state
from lmppl.training.ranks import OneProcess, Parallel, Ranks, alone, ranks_of
from lmppl.training.samples import AnySample, own_of

T = TypeVar("T")
V = TypeVar("V")


class Sharing(ABC):
    """What of each step is this process's, and how the parts come together.

    Attributes:
        ranks: the processes.
        parallel: by which option it is chosen.
    """

    parallel: Parallel

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = OneProcess() if ranks is None else ranks

    def __str__(self) -> str:
        num = self.ranks.num
        return "1 process" if num == 1 else f"{num} processes, parallel={self.parallel!r}"

    @abstractmethod
    def idle(self, num_inputs: int, num_traces: int) -> str:
        """What to say of processes that have nothing to do in steps of that size; empty if none."""

    # --- what is this process's ------------------------------------------------------------------

    @abstractmethod
    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Those of a step's inputs of which this process has traces."""

    @abstractmethod
    def slots(self, begin: int, num: int) -> range:
        """Which of ``num`` traces of such an input this process draws; ``begin`` were dealt before."""

    @abstractmethod
    def work(self, what: str) -> AbstractContextManager[None]:
        """Around this process's part of a step. Where it sends no messages meanwhile, an error of one
        process is raised in all."""

    # --- what is told ----------------------------------------------------------------------------

    @abstractmethod
    def pool(
        self,
        own: Sequence[Mapping[Any, T]],
        tell: Callable[[T], Any],
        hear: Callable[[Any], V],
    ) -> list[dict[Any, T | V]]:
        """See ``Pool``: of each of ``mine(inputs)``, what is known of all its traces."""

    @abstractmethod
    def of_all(self, values: Sequence[T]) -> list[T]:
        """Of all inputs of a step what each of ``mine(inputs)`` has, where all its traces are known."""

    @abstractmethod
    def tell_inputs(self, inputs: Sequence[Input], values: Sequence[T]) -> list[T]:
        """``of_all``, where also what training keeps of the inputs is made equal on all processes."""

    def records(self, own: Sequence[Mapping[int, Record]]) -> list[list[Record]]:
        """Those of all traces of a step's inputs, from those of this process's by their places."""
        states = [{i: record_state(record) for i, record in row.items()} for row in own]
        rows = self.pool(states, tell=dict, hear=dict)
        heard = self.of_all([list(row.values()) for row in rows])
        return [list(map(record_of_state, row)) for row in heard]

    # --- the loss --------------------------------------------------------------------------------

    @abstractmethod
    def join(self, samples: Sequence[Sequence[AnySample]], batches: Sequence[Batch]) -> list[Batch]:
        """The batches of all of an input's ``samples``, from those of this process's."""

    @abstractmethod
    def vectors(
        self, places: Sequence[Sequence[int]], own: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Of each input a number for each of its traces, from those of this process's traces, at these
        places, which alone have a gradient."""

    @abstractmethod
    def once(self, tensor: torch.Tensor) -> torch.Tensor:
        """What enters an input's loss beside its traces: with gradient in one process."""

    @abstractmethod
    def total(self, loss: float, num: int) -> tuple[float, int]:
        """Sum of the losses of all inputs of a step, and their number, from those of this process."""


class SharedInputs(Sharing):
    """A process has some inputs of each step, with all their traces. Also of a run in one process."""

    parallel = "inputs"

    def idle(self, num_inputs: int, num_traces: int) -> str:
        num = self.ranks.num
        if num <= num_inputs:
            return ""
        return (
            f"a step has {num_inputs} inputs for {num} processes, so {num - num_inputs} of them are "
            "idle: start fewer, raise inputs_per_step and batch_size (each input has two traces at "
            "least), or share out the traces of each input, parallel='split'"
        )

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        return self.ranks.mine(items)

    def slots(self, begin: int, num: int) -> range:
        return range(num)

    def work(self, what: str) -> AbstractContextManager[None]:
        return self.ranks.together(what)

    def pool(
        self,
        own: Sequence[Mapping[Any, T]],
        tell: Callable[[T], Any],
        hear: Callable[[Any], V],
    ) -> list[dict[Any, T | V]]:
        return alone(own, tell, hear)

    def of_all(self, values: Sequence[T]) -> list[T]:
        return self.ranks.gather(values)

    def tell_inputs(self, inputs: Sequence[Input], values: Sequence[T]) -> list[T]:
        mine = self.mine(inputs)
        several = self.ranks.num > 1
        told = [news_of(input_) if several else {} for input_ in mine]
        heard = self.ranks.gather(list(zip(values, told, strict=True)))
        for input_, (_, news) in zip(inputs, heard, strict=True):
            if input_ not in mine:
                hear_news(input_, news)
        return [value for value, _ in heard]

    def join(self, samples: Sequence[Sequence[AnySample]], batches: Sequence[Batch]) -> list[Batch]:
        return list(batches)

    def vectors(
        self, places: Sequence[Sequence[int]], own: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        return list(own)

    def once(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def total(self, loss: float, num: int) -> tuple[float, int]:
        sums = torch.tensor([loss, num], dtype=torch.float64)
        self.ranks.sum([sums])
        return float(sums[0]), int(sums[1])


class SplitTraces(Sharing):
    """A process has some traces of every input of a step."""

    parallel = "split"

    def idle(self, num_inputs: int, num_traces: int) -> str:
        num = self.ranks.num
        if num <= num_traces:
            return ""
        return (
            f"a step has {num_traces} traces for {num} processes, so {num - num_traces} of them are "
            "idle: start fewer, or raise batch_size"
        )

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        return items

    def slots(self, begin: int, num: int) -> range:
        return range((self.ranks.rank - begin) % self.ranks.num, num, self.ranks.num)

    def work(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()  # the others are told of traces on the way, and would wait for them

    def pool(
        self,
        own: Sequence[Mapping[Any, T]],
        tell: Callable[[T], Any],
        hear: Callable[[Any], V],
    ) -> list[dict[Any, T | V]]:
        told = [{place: tell(value) for place, value in row.items()} for row in own]
        heard = self.ranks.gather([told])
        del heard[self.ranks.rank]
        rows: list[dict[Any, T | V]] = []
        for k, row in enumerate(own):
            cells: dict[Any, T | V] = dict(row)
            for others in heard:
                cells |= {place: hear(value) for place, value in others[k].items()}
            rows.append({place: cells[place] for place in sorted(cells)})
        return rows

    def of_all(self, values: Sequence[T]) -> list[T]:
        return list(values)

    def tell_inputs(self, inputs: Sequence[Input], values: Sequence[T]) -> list[T]:
        return list(values)  # all have kept the same, as they were told of all traces

    def join(self, samples: Sequence[Sequence[AnySample]], batches: Sequence[Batch]) -> list[Batch]:
        own = [cells_of(*pair) for pair in zip(samples, batches, strict=True)]
        rows = self.pool(own, tell=tuple, hear=lambda told: Cell(*told))
        wholes = map(whole_batch, samples, rows, own, batches)
        return [replace(whole, log_own_of=self._log_own_of) for whole in wholes]

    def _log_own_of(self, samples: Sequence[AnySample]) -> list[float]:
        """Each process finds those of its own traces, which may take a pass of the language model."""
        found = dict(zip(own_of(samples), log_own_of(samples), strict=True))
        (log_own,) = self.pool([found], tell=float, hear=float)
        return list(log_own.values())

    def vectors(
        self, places: Sequence[Sequence[int]], own: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        found = [
            dict(zip(at, vector.tolist(), strict=True))
            for at, vector in zip(places, own, strict=True)
        ]
        return list(map(spliced, self.pool(found, tell=float, hear=float), places, own))

    def once(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.ranks.is_first else tensor.detach()

    def total(self, loss: float, num: int) -> tuple[float, int]:
        # All have the same, but for the last bits where their processors differ.
        total = torch.tensor([loss], dtype=torch.float64)
        self.ranks.sum([total])
        return float(total) / self.ranks.num, num


def sharing_of(parallel: Parallel) -> Sharing:
    """How the processes of this run share its work out; see ``ranks_of``."""
    ranks = ranks_of(parallel)
    return SplitTraces(ranks) if parallel == "split" and ranks.num > 1 else SharedInputs(ranks)
