"""Suspend a plain Python function in the middle, and run others meanwhile.

A program is ordinary code that calls ``lm_sample`` deep in its stack. To batch the model calls of
many programs, each must wait at its call while the others reach theirs. A greenlet gives every
run a stack of its own. What a stack does not hold, the state that Pyro and torch keep in
globals (handlers, plates, grad mode, autocast, default device, the random stream), is swapped at
every switch, so that no program sees another's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import torch
from greenlet import getcurrent
from pyro.distributions.distribution import COERCIONS
from pyro.poutine.runtime import _DIM_ALLOCATOR, _ENUM_ALLOCATOR, _PYRO_STACK
from torch import default_generator
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _device

from lmppl.exclusive import Stack


class GlobalState:
    """The present global state, taken off a run that is suspended, to be put back by ``install``.

    There are some switches for every site, so what is rarely set is compared before it is set. With a
    ``seed`` the random streams begin with it, when the state is first installed.
    """

    __slots__ = (
        "_autocast", "_coercions", "_cuda_rng", "_device", "_dims", "_dtype", "_enum", "_grad", "_guard",
        "_handlers", "_modes", "_rng",
    )  # fmt: skip

    def __init__(self, seed: int | None = None) -> None:
        self._handlers, self._coercions = _PYRO_STACK[:], COERCIONS[:]
        self._dims = _DIM_ALLOCATOR._stack[:]
        self._enum = _ENUM_ALLOCATOR.__dict__.copy()
        self._grad = torch.is_grad_enabled()
        self._autocast = _autocast_state()
        self._dtype = torch.get_default_dtype()
        self._modes = _modes()
        self._device = _device.CURRENT_DEVICE
        self._guard: Any = None
        if seed is None and torch.is_inference_mode_enabled():
            # Such a guard sets the mode when made and restores it when deleted, so it can be held
            # open across a switch.
            self._guard = torch._C._InferenceMode(False)
        self._rng = default_generator.get_state() if seed is None else seed
        streams = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        self._cuda_rng = [stream.get_state() if seed is None else seed for stream in streams]

    @classmethod
    def fresh(cls, seed: int, *, grad: bool = False) -> GlobalState:
        """A state for a new run: no handlers, no plates, a random stream of its own."""
        self = cls(seed % 2**63)
        self._handlers, self._coercions, self._dims, self._enum = [], [], [], {}
        self._grad = grad
        return self

    def take_streams(self, other: GlobalState) -> None:
        """Go on with the random streams of another run."""
        self._rng, self._cuda_rng = other._rng, other._cuda_rng

    def install(self) -> None:
        """Make this the present state."""
        # In place: Pyro's modules hold references to these very objects.
        _PYRO_STACK[:] = self._handlers
        COERCIONS[:] = self._coercions
        _DIM_ALLOCATOR._stack[:] = self._dims
        _ENUM_ALLOCATOR.__dict__.clear()
        _ENUM_ALLOCATOR.__dict__.update(self._enum)
        self._guard = None
        torch._C._set_grad_enabled(self._grad)
        if self._autocast != _autocast_state():
            _set_autocast(self._autocast)
        if self._dtype != torch.get_default_dtype():
            torch.set_default_dtype(self._dtype)
        present = _modes()
        if self._modes != present:
            for _ in present:
                _pop_mode()
            for mode in self._modes:
                _push_mode(mode)
        _device.CURRENT_DEVICE = self._device
        _set_stream(default_generator, self._rng)
        for stream, state in zip(torch.cuda.default_generators, self._cuda_rng, strict=False):
            _set_stream(stream, state)


def _set_stream(generator: torch.Generator, state: torch.Tensor | int) -> None:
    """Let a generator go on from a state, or begin with a seed."""
    if isinstance(state, int):
        generator.manual_seed(state)
    else:
        generator.set_state(state)


def _modes() -> list[Any]:
    return _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []


def _autocast_state() -> tuple[Any, ...]:
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    cached = torch.is_autocast_cache_enabled()
    return enabled("cpu"), dtype("cpu"), enabled("cuda"), dtype("cuda"), cached


def _set_autocast(state: tuple[Any, ...]) -> None:
    for device, enabled, dtype in (("cpu", *state[:2]), ("cuda", *state[2:4])):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(state[-1])


class Abandoned(BaseException):
    """Thrown into a run that nobody will resume, so that its ``finally`` blocks run in its state."""


class Coroutine:
    """A function that can be suspended by ``suspend(value)`` and resumed with an answer.

    Args:
        fn: the function.
        global_state: that it begins in; as an attribute, that of the run while it is suspended.
        stack: the class of what it runs on.

    Attributes:
        finished: whether it returned or raised.
        result: what it returned.
    """

    def __init__(
        self, fn: Callable[[], Any], global_state: GlobalState, stack: type[Stack] = Stack
    ) -> None:
        self.global_state = global_state
        self.finished = False
        self.result: Any = None
        self._greenlet = stack(lambda _: fn())
        self._greenlet.gr_context = copy_context()

    def resume(self, answer: Any = None, *, restore: bool = True) -> Any:
        """Run until it suspends, and return what it suspended with (None when it finished).

        An exception of the function is raised here.

        Args:
            answer: what it waits for.
            restore: whether to put the present global state back afterwards. (Who resumes many
                takes it off once before them, and puts it back after the last.)
        """
        return self._switch(self._greenlet.switch, answer, restore)

    def close(self) -> None:
        """End it: its ``with`` and ``finally`` blocks run now, in its own state.

        Raises:
            RuntimeError: if it swallows the exception that ends it.
        """
        if not self._greenlet:  # it has not begun, or has ended
            self.finished = True
            return
        with suppress(Abandoned):
            self._switch(self._greenlet.throw, Abandoned())
        if not self.finished:
            raise RuntimeError(
                "an abandoned program went on to another site: it must not catch BaseException "
                "around a site (catch Exception instead)"
            )

    def _switch(self, go: Callable[[Any], Any], given: Any, restore: bool = True) -> Any:
        outer = GlobalState() if restore else None
        self._greenlet.parent = getcurrent()
        self.global_state.install()
        try:
            value = go(given)
        finally:
            self.global_state = GlobalState()
            self.finished = self._greenlet.dead
            if outer is not None:
                outer.install()
        if self.finished:
            self.result = value
            return None
        return value


def suspend(value: Any) -> Any:
    """Called inside a coroutine: hand ``value`` to whoever resumed it, wait for the answer."""
    return getcurrent().parent.switch(value)
