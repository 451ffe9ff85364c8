"""The processes that train one guide together, by ``torch.distributed``, as torchrun begins them.

    every rank has the whole run: all inputs, the guide, the optimiser, the same random choices
    what of a step's inputs, or of their traces, falls to which rank: see ``sharing``
    gradients are summed over the ranks, and divided by the number of inputs
    what a step has found out about its inputs is told to all

An input and each of its traces has its own random streams, whichever rank it falls to, and a loss
compares traces of one input only. So K ranks take the steps that one process takes, but for the rounding
of sums and batches.
"""

from __future__ import annotations

import itertools
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist

from lmppl.lm.loading import choose_device
from lmppl.processes import this_process
from lmppl.training.messages import pack, unpack

T = TypeVar("T")
V = TypeVar("V")
Parallel = Literal["inputs", "split", "none"]


class Pool(Protocol):
    """Brings together what each process knows of its traces of some inputs."""

    def __call__(
        self, own: Sequence[Mapping[Any, T]], tell: Callable[[T], Any], hear: Callable[[Any], V]
    ) -> list[dict[Any, T | V]]:
        """What is known of all traces of each input.

        Args:
            own: of each input, what this process knows of its traces, by their places.
            tell: what others are sent of it.
            hear: what that becomes where it is heard.

        Returns:
            Of each input, ``own`` and what was heard of the others, in the order of the places.
        """


def alone(
    own: Sequence[Mapping[Any, T]], tell: Callable[[T], Any], hear: Callable[[Any], V]
) -> list[dict[Any, T | V]]:
    """The ``Pool`` of a process that has all traces of its inputs."""
    return [dict(row) for row in own]


class Ranks(ABC):
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: the number of this one, from 0.
        num: how many there are.
    """

    rank: int
    num: int

    @property
    def is_first(self) -> bool:
        """Whether this one shows progress and writes files."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Those that fall to this rank."""
        return items[self.rank :: self.num]

    @abstractmethod
    def gather(self, mine: Sequence[T]) -> list[T]:
        """What all ranks have of the items that ``mine`` dealt out, in the order of these."""

    @abstractmethod
    def of_first(self, value: T) -> T:
        """What the first rank has."""

    @abstractmethod
    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over the ranks; they have the same shapes on all."""

    @abstractmethod
    def copy(self, tensor: torch.Tensor, source: int) -> None:
        """Replace a tensor by that of another rank, of the same shape."""

    @abstractmethod
    def agree(self, words: Iterable[str]) -> bool:
        """Whether all ranks have the same words."""

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Work that each rank does for itself, and without which none can go on.

        Args:
            what: the work, for messages.

        Raises:
            RuntimeError: if it fails on another rank, or another rank is at other work; says which.
        """
        yield

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Work during which the other ranks can't be told of an error: this one is out of step then."""
        yield

    def level(
        self, named: Mapping[str, torch.nn.Parameter], known: Collection[str], owners: Sequence[Any]
    ) -> None:
        """Give all ranks the same values of parameters that are not ``known``: those of the first rank
        that came to them, as the names say that each of the ``owners`` has come to.

        Raises:
            RuntimeError: if there are parameters that not all ranks have.
        """
        if not self.agree(sorted(named)):
            all_names = self.gather([set(named)])
            some = sorted(set[str].union(*all_names) - set[str].intersection(*all_names))
            raise RuntimeError(
                f"{some[0]!r} is trained by some processes, and others have it not: the program or "
                "its guide has other parameters there"
            )
        for name in sorted(named.keys() - set(known)):
            owner = next((rank for rank, names in enumerate(owners) if name in names), 0)
            self.copy(named[name].data, owner)


class OneProcess(Ranks):
    """A run in one process."""

    rank, num = 0, 1

    def gather(self, mine: Sequence[T]) -> list[T]:
        return list(mine)

    def of_first(self, value: T) -> T:
        return value

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        return

    def copy(self, tensor: torch.Tensor, source: int) -> None:
        return

    def agree(self, words: Iterable[str]) -> bool:
        return True


class ProcessGroup(Ranks):
    """The default group of ``torch.distributed``. Objects go by a group of their own, over the CPU, as
    torch sends them, by pickle: only between the processes of one run, and never from a file."""

    _default: Any = None  # the default group, beside which that of the objects was made, once
    _objects: Any = None
    _left = ""  # work with the others that this process has left by an error

    def __init__(self) -> None:
        self.rank, self.num = dist.get_rank(), dist.get_world_size()
        if ProcessGroup._default is not dist.group.WORLD:
            ProcessGroup._default, ProcessGroup._left = dist.group.WORLD, ""
            ProcessGroup._objects = dist.new_group(backend="gloo")
        if ProcessGroup._left:
            raise RuntimeError(
                f"this process ({this_process()}) can't train together with the others: it has left "
                f"{ProcessGroup._left}, where they wait for it. End it: torchrun ends them, and "
                "starts all again"
            )
        self._place = ""  # the last work that was done together

    def gather(self, mine: Sequence[T]) -> list[T]:
        packed: list[Any] = [None] * self.num
        dist.all_gather_object(packed, pack(list(mine)), group=self._objects)
        parts = list(map(unpack, packed))
        longest = max(map(len, parts))
        return [part[place] for place in range(longest) for part in parts if place < len(part)]

    def of_first(self, value: T) -> T:
        held: list[Any] = [pack(value) if self.is_first else None]
        dist.broadcast_object_list(held, src=0, group=self._objects)
        return unpack(held[0])

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        # One message for each dtype and device: a LoRA adapter has hundreds of small tensors.
        kinds: dict[Any, list[torch.Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            dist.all_reduce(flat, group=self._group(flat))
            sizes = [tensor.numel() for tensor in alike]
            for tensor, part in zip(alike, flat.split(sizes), strict=True):
                tensor.copy_(part.reshape(tensor.shape))

    def copy(self, tensor: torch.Tensor, source: int) -> None:
        dist.broadcast(tensor, source, group=self._group(tensor))

    def _group(self, tensor: torch.Tensor) -> Any:
        """By which a tensor goes: NCCL takes none of the CPU."""
        return self._objects if tensor.device.type == "cpu" else None

    def agree(self, words: Iterable[str]) -> bool:
        return self._compare(f"what follows {self._place}", words)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        failure = None
        with self.alone(what):  # from which Ctrl-C leads
            try:
                yield
            except Exception as error:
                failure = error
        self._place = what
        self._compare(what, failure=failure)

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            ProcessGroup._left = f"{what} ({type(error).__name__}: {error})"
            raise

    def _compare(
        self, place: str, words: Iterable[str] = (), failure: Exception | None = None
    ) -> bool:
        """Whether all ranks have the same words.

        Raises:
            Exception: ``failure``, what this rank has failed by.
            RuntimeError: if another has failed, or is at another place.
        """
        here, digest = (zlib.crc32(text.encode()) for text in (place, "\n".join(words)))
        most = torch.tensor([here, -here, digest, -digest, int(failure is not None)])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._objects)
        highest, lowest, last, first, some_failed = most.tolist()
        if not some_failed and highest == -lowest:
            return bool(last == -first)
        error = f"{type(failure).__name__}: {failure}" if failure is not None else ""
        told = self.gather([(this_process(), place, error)])
        if failure is not None:
            raise failure
        for who, where, error in told:
            if error:
                raise RuntimeError(f"{who} has failed in {where}, so all processes end it: {error}")
        (_, one, _), *others = told
        who, another = next((who, where) for who, where, _ in others if where != one)
        raise RuntimeError(
            f"the processes of this run are not at the same work: rank 0 is at {one}, {who} at "
            f"{another}. One has gone on after an error or an interruption that it met alone: end "
            "all, and start them again"
        )


def ranks_of(parallel: Parallel) -> Ranks:
    """The processes of a run: the default group, which is begun if torchrun or ``accelerate launch`` has
    started several."""
    if parallel == "none" or not dist.is_available():
        return OneProcess()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join()
    return ProcessGroup() if dist.is_initialized() and dist.get_world_size() > 1 else OneProcess()


def check_group(ranks: Ranks, parallel: Parallel) -> None:
    """``RuntimeError`` if there is a group by now that the processes of a run did not know of."""
    late = ranks.num == 1 and parallel != "none" and dist.is_available() and dist.is_initialized()
    if late and dist.get_world_size() > 1:
        raise RuntimeError(
            f"a process group of {dist.get_world_size()} was begun after this run, in which each "
            "process would train by itself: call torch.distributed.init_process_group before fit or "
            "learn, or give parallel='none'"
        )


_joined = itertools.count()


def _join() -> None:
    """Begin the default group. When torchrun starts all again, its store still has the addresses of
    the processes that are gone, so each attempt has a part of the store for itself; likewise where a
    program has destroyed the group."""
    store, rank, num = next(dist.rendezvous("env://"))
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_joined)}"
    if torch.cuda.is_available():
        torch.cuda.set_device(choose_device(None))
    dist.init_process_group(
        store=dist.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=num
    )
