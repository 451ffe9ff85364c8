"""What the language models of this process do, and how long it takes: recorded while somebody asks.

A *region* is a stretch of work of one kind; regions do not overlap, as an inner one stops the clock
of the outer. While nobody records, a region or a pass costs next to nothing. How many tokens
were drawn and scored is counted always.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lmppl.lm.meter.roofline import Matrices, wait_for

Kind = Literal["sampled", "scored", "trained", "read"]
"""Kinds of work: drawing; scoring; scoring with a gradient, and the backward pass; reading the next
token's distribution or a state for something else (enumeration, heads of guides)."""

KINDS: tuple[Kind, ...] = ("sampled", "scored", "trained", "read")

_ledger: Ledger | None = None  # there while somebody records
_recordings = threading.Lock()
_watchers: list[Callable[[], None]] = []


@dataclass
class Usage:
    """Tokens that went through a model and its adapters. Set the numbers to 0 to count anew."""

    tokens_sampled: int = 0
    tokens_scored: int = 0  # without a gradient
    tokens_trained: int = 0  # scored with a gradient to parameters that are trained

    def count(self, *, sampled: int = 0, scored: int = 0, trained: int = 0) -> None:
        for usage in (self, _total):
            usage.tokens_sampled += sampled
            usage.tokens_scored += scored
            usage.tokens_trained += trained

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*map(operator.sub, astuple(self), astuple(other)))


_total = Usage()  # over all models, for reports of a whole run


def total_usage() -> Usage:
    """Tokens of all models together since the process began."""
    return replace(_total)


@dataclass(frozen=True)
class Stretch:
    """How far a piece of work has come whose length is known."""

    unit: str  # what is counted, in the singular
    done: int
    total: int  # a bound: texts may close earlier


_stretch: Stretch | None = None


def stretch() -> Stretch | None:
    """How far the present work has come; None: not known."""
    return _stretch


@contextmanager
def counting(unit: str, done: int, total: int) -> Iterator[None]:
    """What is done in the block comes after ``done`` of at most ``total`` such units of work."""
    global _stretch
    before, _stretch = _stretch, Stretch(unit, done, total)
    try:
        yield
    finally:
        _stretch = before


@dataclass
class PassCounts:
    """Forward passes of one kind of work through models of one shape."""

    matrices: Matrices  # of one of the models
    passes: int = 0
    rows: int = 0  # of their batches, summed
    positions: int = 0  # rows times length, summed: padding included
    outputs: int = 0  # positions that went through the output layer

    def plus(self, other: PassCounts, times: int = 1) -> PassCounts:
        """The sum with so many times another's."""
        names = ("passes", "rows", "positions", "outputs")
        numbers = (getattr(self, name) + times * getattr(other, name) for name in names)
        return PassCounts(self.matrices, *numbers)


@dataclass
class WorkRecord:
    """What was done in a time, in seconds; those of ``kinds`` are added over threads."""

    seconds: float = 0.0  # of the wall clock, but for what measuring itself took
    usage: Usage = field(default_factory=Usage)
    kinds: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    passes: dict[tuple[Kind, Any], PassCounts] = field(default_factory=dict)  # by matrices' key

    def fill(self, before: WorkRecord, after: WorkRecord) -> None:
        """Become the difference of two readings of one ledger."""
        self.seconds = after.seconds - before.seconds
        self.usage = after.usage - before.usage
        self.kinds = {kind: after.kinds[kind] - before.kinds[kind] for kind in KINDS}
        for key, passes in after.passes.items():
            new = passes.plus(before.passes[key], -1) if key in before.passes else passes
            if new.passes:
                self.passes[key] = new


class _Regions(threading.local):
    """What one thread is doing: the kinds of its open regions, the innermost last, since when."""

    def __init__(self) -> None:
        self.kinds: list[Kind] = []
        self.since = 0.0


class Ledger:
    """Adds up the work while anybody records. A recording is a difference of two readings, so
    recordings may nest or overlap in any way."""

    def __init__(self) -> None:
        self.num_recordings = 0
        self._kinds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        self._passes: dict[tuple[Kind, Any], PassCounts] = {}
        self._paused = 0.0
        self._devices: set[torch.device] = set()
        self._regions = _Regions()
        self._lock = threading.Lock()
        self._backward: tuple[int, float] = (-1, 0.0)  # the last one's number, and when it began

    def now(self) -> float:
        """Seconds, when the devices have done what they were given."""
        for device in tuple(self._devices):
            with suppress(RuntimeError):  # its errors are for whoever uses it next
                wait_for(device)
        return time.perf_counter()

    @contextmanager
    def region(self, kind: Kind) -> Iterator[None]:
        """What happens here is work of that kind."""
        self._charge()
        self._regions.kinds.append(kind)
        try:
            yield
        finally:
            try:
                self._charge()
            finally:
                self._regions.kinds.pop()

    def _charge(self) -> None:
        """Add the time since a region of this thread began or ended to the innermost open one."""
        now, regions = self.now(), self._regions
        if regions.kinds:
            with self._lock:
                self._kinds[regions.kinds[-1]] += now - regions.since
        regions.since = now

    def count(self, matrices: Matrices, tokens: Tensor, outputs: int) -> None:
        """One forward pass of the present region's kind. (Outside regions nobody asked for it.)"""
        if not self._regions.kinds:
            return
        one = PassCounts(matrices, 1, len(tokens), tokens.numel(), outputs)
        key = (self._regions.kinds[-1], matrices.key)
        with self._lock:
            self._devices.add(tokens.device)
            known = self._passes.get(key)
            self._passes[key] = one if known is None else one.plus(known)

    def read(self) -> WorkRecord:
        """All that was done since the ledger was opened."""
        now = self.now()
        with self._lock:
            kinds, passes = dict(self._kinds), dict(self._passes)
        return WorkRecord(now - self._paused, total_usage(), kinds, passes)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens here is nobody's time."""
        began = self.now()
        try:
            yield
        finally:
            self._paused += self.now() - began

    # The backward pass belongs to whoever calls it, so it is found by the gradients that reach a
    # language model's output. The engine numbers its runs: one that failed never says so.

    def gradient_arrived(self, _: Tensor) -> None:
        if _ledger is not self:
            return
        number = torch._C._current_graph_task_id()
        if number != self._backward[0]:
            self._backward = (number, self.now())
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        seconds = self.now() - self._backward[1]
        with self._lock:
            self._kinds["trained"] += seconds


@contextmanager
def region(kind: Kind) -> Iterator[None]:
    """What is done in the block, or in a function that it decorates, is work of that kind."""
    ledger = _ledger
    if ledger is None:
        yield
    else:
        with ledger.region(kind):
            yield


def count_pass(matrices: Callable[[], Matrices], tokens: Tensor, outputs: Tensor | None) -> None:
    """A forward pass of (B, T) ``tokens``, of which the positions ``outputs`` (None: all) go
    through the output layer. (``matrices`` is asked for only while somebody records.)"""
    for seen in tuple(_watchers):
        seen()
    if (ledger := _ledger) is not None:
        ledger.count(matrices(), tokens, tokens.numel() if outputs is None else outputs.numel())


@contextmanager
def watching(seen: Callable[[], None]) -> Iterator[None]:
    """In the block, call ``seen`` at each forward pass of a language model of this process."""
    _watchers.append(seen)
    try:
        yield
    finally:
        _watchers.remove(seen)


def watch_backward(outputs: Iterable[Tensor]) -> None:
    """A backward pass through these log-probabilities is work of the kind ``"trained"``."""
    if (ledger := _ledger) is not None:
        for output in outputs:
            if output.requires_grad:
                output.register_hook(ledger.gradient_arrived)


@contextmanager
def recording() -> Iterator[tuple[Ledger, WorkRecord]]:
    """Record what all language models of the process do in the block. Yields the ledger, and a
    record that is filled when the block ends, however it ends."""
    global _ledger
    record = WorkRecord()
    with _recordings:  # one ledger for all who record at the same time
        ledger = _ledger = _ledger or Ledger()
        ledger.num_recordings += 1
    try:
        before = ledger.read()
        try:
            yield ledger, record
        finally:
            record.fill(before, ledger.read())
    finally:  # also if a device fails while it is waited for
        with _recordings:
            ledger.num_recordings -= 1
            if not ledger.num_recordings:
                _ledger = None
