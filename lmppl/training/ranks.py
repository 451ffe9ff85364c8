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

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist

from lmppl.lm.loading import choose_device
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

    _objects: Any = None  # made once, as groups stay for the life of the process

    def __init__(self) -> None:
        self.rank, self.num = dist.get_rank(), dist.get_world_size()
        if ProcessGroup._objects is None:
            ProcessGroup._objects = dist.new_group(backend="gloo")

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
        digest = zlib.crc32("\n".join(words).encode())
        ends = torch.tensor([digest, -digest])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._objects)
        return int(ends[0]) == -int(ends[1])


def ranks_of(parallel: Parallel) -> Ranks:
    """The processes of a run: the default group, which is begun if torchrun or ``accelerate launch`` has
    started several."""
    if parallel == "none" or not dist.is_available():
        return OneProcess()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join()
    return ProcessGroup() if dist.is_initialized() and dist.get_world_size() > 1 else OneProcess()


def _join() -> None:
    """Begin the default group. When torchrun starts all again, its store still has the addresses of
    the processes that are gone, so each attempt has a part of the store for itself."""
    store, rank, num = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if torch.cuda.is_available():
        torch.cuda.set_device(choose_device(None))
    dist.init_process_group(
        store=dist.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=num
    )
