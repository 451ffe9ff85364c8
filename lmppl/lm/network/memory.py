"""Memory: what a language model's batches may take, and how large a pass is for the best speed."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

import torch

from lmppl.checks import check_flag, check_int

_FREE_SHARE = 0.5  # of the free memory, for one batch


@dataclass(frozen=True)
class Memory:
    """What a language model's batches may take in memory. Results do not depend on it, beyond rounding.

    Args:
        batch_bytes: bound on the memory of one batch: caches, activations, logits. Larger ones are
            split. (A single sequence may exceed it, and so may a part whose sequences are
            resampled in place of another part's.) None: half of what is free.
        gradient_checkpointing: in training, keep only what enters each layer, and compute the
            rest anew in the backward pass: about a third more time, for memory that does not grow
            with all of a layer's activations.
        training_tokens: in training, read at most so many tokens (padding included) a pass, and
            each pass anew in the backward pass: the gradient is that of the whole batch, in the
            memory of one pass. None: the whole batch at once.

    Raises:
        TypeError, ValueError: what is no whole number, or below 1.
    """

    batch_bytes: int | None = None
    gradient_checkpointing: bool = False
    training_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_bytes", "training_tokens"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check_int(name, value))
        check_flag("gradient_checkpointing", self.gradient_checkpointing)

    def available(self, device: torch.device) -> int:
        """Bytes that one batch may take on ``device``."""
        if self.batch_bytes is not None:
            return self.batch_bytes
        return int(_FREE_SHARE * _free_bytes(device))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved  # what torch holds, but does not use, is free as well
    with suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):  # Windows
        return 4 << 30
