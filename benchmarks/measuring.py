"""Measuring: several ways of doing one thing, in turns, with the time and peak memory of each.

Only torch is needed here, so that a peer's process, in an environment of its own, measures itself
in the same way.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

Work = Callable[[int], int]
"""One repetition: takes its number (0 is the warm-up) and returns how many tokens it handled."""


@dataclass
class Timed:
    """What one contender took.

    Attributes:
        label: who it was.
        seconds: of each repetition.
        tokens: handled in each repetition; 0 where work isn't counted in tokens.
        peak_bytes: of its first repetition, above what was in use before; None if not measured.
    """

    label: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def rate(self) -> float | None:
        """Tokens a second."""
        rates = [n / s for n, s in zip(self.tokens, self.seconds, strict=True)]
        return median(rates) if any(rates) else None

    @property
    def costs(self) -> list[float]:
        """Seconds a token of each repetition; seconds where tokens aren't counted."""
        return [s / (n or 1) for n, s in zip(self.tokens, self.seconds, strict=True)]


class Contender(Protocol):
    """What can be measured: something in this process, or a peer in another one."""

    def warm_up(self) -> int | None:
        """Do repetition 0, untimed. Returns its peak memory in bytes."""

    def repeat(self, number: int) -> tuple[float, int]:
        """Do one repetition. Returns its seconds and its tokens."""


@dataclass
class Local:
    """Work in this process, by a clock in seconds."""

    work: Work
    device: torch.device
    clock: Callable[[], float] = time.perf_counter

    def warm_up(self) -> int | None:
        return with_peak(lambda: self.work(0), self.device)[1]

    def repeat(self, number: int) -> tuple[float, int]:
        synchronize(self.device)
        began = self.clock()
        tokens = self.work(number)
        synchronize(self.device)
        return self.clock() - began, tokens


def in_turns(contenders: Mapping[str, Contender], repeats: int) -> list[Timed]:
    """Warm up each contender, then measure A B A B ...: a slow minute of the machine hits all."""
    timed = [Timed(label, peak_bytes=c.warm_up()) for label, c in contenders.items()]
    for number in range(1, repeats + 1):
        for each, contender in zip(timed, contenders.values(), strict=True):
            gc.collect()
            seconds, tokens = contender.repeat(number)
            each.seconds.append(seconds)
            each.tokens.append(tokens)
    return timed


def ratios(other: Timed, ours: Timed) -> list[float]:
    """How many times the cost of ``ours`` the other's is, in each pair of repetitions."""
    return [b / a for a, b in zip(ours.costs, other.costs, strict=True)]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# Peak memory


def with_peak(run: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Run something. Returns its result, and its peak memory above what was in use before."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return run(), None
    _return_free_memory()
    if _reset_resident_peak():
        before = _status_bytes("VmRSS")
        result = run()
        return result, _status_bytes("VmHWM") - before
    return _sampled_peak(run)


def kept(run: Callable[[], object], device: torch.device) -> int | None:
    """How many bytes more are in use after ``run`` than before."""

    def in_use() -> int | None:
        gc.collect()
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device)
        _return_free_memory()
        return _resident_bytes() if device.type == "cpu" else None

    before = in_use()
    run()
    after = in_use()
    return None if before is None or after is None else after - before


def memory_method(device: torch.device) -> str:
    """How ``with_peak`` measures here, in words."""
    if device.type == "cuda":
        return "the CUDA allocator's peak"
    if device.type != "cpu":
        return "not measured"
    if _reset_resident_peak():
        return "the kernel's record of the peak of resident memory"
    return "resident memory, looked at every 2 ms" if _resident_bytes() else "not measured"


def _reset_resident_peak() -> bool:
    """Linux: let the recorded peak of resident memory start anew (see proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


def _return_free_memory() -> None:
    """Give the heap's free pages back, so that what runs next cannot hide in them."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _resident_bytes() -> int | None:
    if sys.platform == "linux":
        return _status_bytes("VmRSS")
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss


def _sampled_peak(run: Callable[[], T]) -> tuple[T, int | None]:
    before = _resident_bytes()
    if before is None:
        return run(), None
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _resident_bytes() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = run()
    finally:
        done.set()
        watcher.join()
    return result, max(peak, _resident_bytes() or 0) - before
