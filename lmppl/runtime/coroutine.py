"""Suspend a plain Python function in the middle, and run others meanwhile.

A program is ordinary code that calls ``lm_sample`` deep in its stack. To batch the model calls of
many programs, each must wait at its call while the others reach theirs. A greenlet gives every
run a stack of its own. What a stack does not hold, the *global_state* state that Pyro and torch keep in
globals (handlers, plates, grad mode, autocast, default device, the random stream), is swapped at
every switch, so that no program sees another's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from pyro.poutine import runtime as pyro_runtime
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _device

_DEVICES = ("cpu", "cuda")


class GlobalState:
    """The global state that belongs to one run, taken off when it is suspended."""

    _guard: Any = None
    _cuda_rng: list[torch.Tensor] | None = None

    def __init__(self) -> None:
        self._handlers = list(pyro_runtime._PYRO_STACK)
        self._dims = list(pyro_runtime._DIM_ALLOCATOR._stack)
        self._enum = dict(pyro_runtime._ENUM_ALLOCATOR.__dict__)
        self._grad = torch.is_grad_enabled()
        self._autocast = _autocast_state()
        self._dtype = torch.get_default_dtype()
        self._modes = _get_current_function_mode_stack()
        self._device = _device.CURRENT_DEVICE
        self.rng = torch.get_rng_state()
        """State of torch's default CPU generator."""
        if torch.cuda.is_initialized():
            self._cuda_rng = torch.cuda.get_rng_state_all()

    @classmethod
    def suspend(cls) -> GlobalState:
        """Take the present state, to be put back by ``install``."""
        self = cls()
        if torch.is_inference_mode_enabled():
            # Such a guard sets the mode when made and restores it when deleted, so it can be held
            # open across a switch.
            self._guard = torch._C._InferenceMode(False)
        return self

    @classmethod
    def fresh(cls, seed: int, *, grad: bool = False) -> GlobalState:
        """A state for a new run: no handlers, no plates, a random stream of its own."""
        self = cls()
        self._handlers, self._dims, self._enum, self._grad = [], [], {}, grad
        self.rng = torch.Generator().manual_seed(seed % 2**63).get_state()
        if self._cuda_rng is not None:
            streams = [torch.Generator(f"cuda:{i}") for i in range(len(self._cuda_rng))]
            self._cuda_rng = [stream.manual_seed(seed % 2**63).get_state() for stream in streams]
        return self

    def take_streams(self, other: GlobalState) -> None:
        """Go on with the random streams of another run."""
        self.rng, self._cuda_rng = other.rng, other._cuda_rng

    def install(self) -> None:
        """Make this the present state."""
        # In place: Pyro's modules hold references to these very objects.
        pyro_runtime._PYRO_STACK[:] = self._handlers
        pyro_runtime._DIM_ALLOCATOR._stack[:] = self._dims
        pyro_runtime._ENUM_ALLOCATOR.__dict__.clear()
        pyro_runtime._ENUM_ALLOCATOR.__dict__.update(self._enum)
        self._guard = None
        torch.set_grad_enabled(self._grad)
        if self._autocast != _autocast_state():
            _set_autocast(self._autocast)
        if self._dtype != torch.get_default_dtype():
            torch.set_default_dtype(self._dtype)
        present = _get_current_function_mode_stack()
        if self._modes != present:
            for _ in present:
                _pop_mode()
            for mode in self._modes:
                _push_mode(mode)
        _device.CURRENT_DEVICE = self._device
        torch.set_rng_state(self.rng)
        if self._cuda_rng is not None:
            torch.cuda.set_rng_state_all(self._cuda_rng)


def _autocast_state() -> tuple[Any, ...]:
    per_device = [
        (torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in _DEVICES
    ]
    return (*per_device, torch.is_autocast_cache_enabled())


def _set_autocast(state: tuple[Any, ...]) -> None:
    for each, (enabled, dtype) in zip(_DEVICES, state[:-1], strict=True):
        torch.set_autocast_enabled(each, enabled)
        torch.set_autocast_dtype(each, dtype)
    torch.set_autocast_cache_enabled(state[-1])


class Abandoned(BaseException):
    """Thrown into a run that nobody will resume, so that its ``finally`` blocks run in its state."""


class Coroutine:
    """A function that can be suspended by ``suspend(value)`` and resumed with an answer.

    Args:
        fn: the function.
        global_state: the global state that it begins in.
        stack: the class of the greenlet that it runs on.

    Attributes:
        global_state: its global state, while it does not run.
        finished: whether it returned or raised.
        result: what it returned.
    """

    def __init__(
        self, fn: Callable[[], Any], global_state: GlobalState, stack: type[greenlet] = greenlet
    ) -> None:
        self.global_state = global_state
        self.finished = False
        self.result: Any = None
        self._greenlet = stack(fn)
        self._greenlet.gr_context = copy_context()

    def resume(self, answer: Any = None) -> Any:
        """Run until it suspends, and return what it suspended with (None when it finished).

        An exception of the function is raised here.
        """
        go = self._greenlet.switch
        return self._switch(lambda: go(answer) if self._started else go())

    @property
    def _started(self) -> bool:
        return bool(self._greenlet)

    def close(self) -> None:
        """End it: its ``with`` and ``finally`` blocks run now, in its own state.

        Raises:
            RuntimeError: if it swallows the exception that ends it.
        """
        if self.finished:
            return
        if not self._started:
            self.finished = True
            return
        try:
            self._switch(lambda: self._greenlet.throw(Abandoned()))
        except Abandoned:
            return
        if not self.finished:
            raise RuntimeError(
                "an abandoned program went on to another site: it must not catch BaseException "
                "around a site (catch Exception instead)"
            )

    def _switch(self, go: Callable[[], Any]) -> Any:
        outer = GlobalState.suspend()
        self._greenlet.parent = getcurrent()
        self.global_state.install()
        try:
            value = go()
        finally:
            self.global_state = GlobalState.suspend()
            self.finished = self._greenlet.dead
            outer.install()
        if self.finished:
            self.result = value
            return None
        return value


def suspend(value: Any) -> Any:
    """Called inside a coroutine: hand ``value`` to whoever resumed it, wait for the answer."""
    return getcurrent().parent.switch(value)
