"""Which process this is, where torchrun or another launcher has begun several: for messages."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


def this_process() -> str:
    """``"rank 1 of 4 (machine node-7)"``; empty if this process is alone."""
    if dist.is_available() and dist.is_initialized():
        rank, num = dist.get_rank(), dist.get_world_size()
    else:
        rank, num = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    return f"rank {rank} of {num} (machine {socket.gethostname()})" if num > 1 else ""


@contextmanager
def naming_this_process(needed: str = "") -> Iterator[None]:
    """Let an error say which process has met it, as all write to one terminal.

    Args:
        needed: what every process needs, and this one may not have.
    """
    try:
        yield
    except Exception as error:
        where, notes = this_process(), getattr(error, "__notes__", [])
        if where and not any(where in note for note in notes):
            error.add_note(f"raised in {where}{needed and f'; {needed}'}")
        raise
