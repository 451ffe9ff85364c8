"""What processes send each other: Python objects by pickle, with their tensors in one piece.

By itself torch pickles each tensor with a storage of its own, in some 300 bytes and 50 microseconds; a
trace has a dozen tensors of a few numbers each.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from typing import Any

import torch

Packed = tuple[bytes, dict[torch.dtype, torch.Tensor]]
"""A pickled object with a place instead of each tensor, and the numbers of all tensors of a dtype."""


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and keeps their numbers in ``parts``."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.parts: defaultdict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        self._sizes: defaultdict[torch.dtype, int] = defaultdict(int)

    def persistent_id(self, value: Any) -> tuple[torch.dtype, int, tuple[int, ...]] | None:
        if type(value) is not torch.Tensor or value.layout is not torch.strided:
            return None
        place = self._sizes[value.dtype]
        self.parts[value.dtype].append(value.detach().cpu().reshape(-1))
        self._sizes[value.dtype] += value.numel()
        return value.dtype, place, tuple(value.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, flat: dict[torch.dtype, torch.Tensor]) -> None:
        super().__init__(file)
        self._flat = flat

    def persistent_load(self, place: Any) -> torch.Tensor:
        dtype, begin, shape = place
        size = torch.Size(shape)
        # (A view would keep the numbers of all tensors in memory.)
        return self._flat[dtype][begin : begin + size.numel()].reshape(size).clone()


def pack(value: Any) -> Packed:
    """A value that pickle can take; its tensors, of whatever device, are those of the CPU then."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), {dtype: torch.cat(parts) for dtype, parts in pickler.parts.items()}


def unpack(packed: Packed) -> Any:
    """The value that ``pack`` was given. What it is read from comes from a process of the same run."""
    body, flat = packed
    return _Unpickler(io.BytesIO(body), flat).load()
