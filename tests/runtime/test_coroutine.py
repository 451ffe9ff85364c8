"""Coroutines: no program sees another's global state."""

from __future__ import annotations

import contextlib
import gc

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions.distribution import COERCIONS
from pyro.poutine import runtime as pyro_runtime
from torch.utils import _device

from lmppl.runtime.coroutine import Abandoned, Coroutine, GlobalState, suspend


def snapshot():
    """All global state that a program can change."""
    return {
        "handlers": list(pyro_runtime._PYRO_STACK),
        "coercions": list(COERCIONS),
        "dims": list(pyro_runtime._DIM_ALLOCATOR._stack),
        "enum": dict(pyro_runtime._ENUM_ALLOCATOR.__dict__),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "cache": torch.is_autocast_cache_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.empty(0).device,
        "current": _device.CURRENT_DEVICE,
        "rng": torch.get_rng_state().tolist(),
    }


@contextlib.contextmanager
def coercion():
    """As Pyro's ``CollapseMessenger`` has one."""
    COERCIONS.append(lambda *_: None)
    yield
    COERCIONS.pop()


def plain(seed: int = 0) -> GlobalState:
    return GlobalState.fresh(seed, grad=True)


CHANGES = {
    "coercions": (coercion, lambda: len(COERCIONS), 1),
    "handlers": (lambda: poutine.trace(), lambda: len(pyro_runtime._PYRO_STACK), 1),
    "plate": (lambda: pyro.plate("p", 3), lambda: len(pyro_runtime._DIM_ALLOCATOR._stack), 1),
    "grad off": (torch.no_grad, torch.is_grad_enabled, False),
    "inference mode": (torch.inference_mode, torch.is_inference_mode_enabled, True),
    "inference mode off": (
        lambda: torch.inference_mode(False), torch.is_inference_mode_enabled, False
    ),
    "autocast": (
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.is_autocast_enabled("cpu"),
        True,
    ),
    "device": (lambda: torch.device("meta"), lambda: torch.empty(0).device.type, "meta"),
    "rng": (torch.random.fork_rng, lambda: True, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_within_one_program_is_seen_there_only(name):
    make, read, changed = CHANGES[name]

    def program():
        with make():
            assert read() == changed
            suspend(1)
            assert read() == changed
            suspend(2)
        return "done"

    before = snapshot()
    two = [Coroutine(program, plain(seed)) for seed in (1, 2)]
    for step in (1, 2):
        for coroutine in two:  # interleaved, so that blocks do not nest
            assert coroutine.resume() == step
            assert snapshot() == before
    for coroutine in reversed(two):
        coroutine.resume()
        assert coroutine.finished and coroutine.result == "done"
        assert snapshot() == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_around_the_driver_is_not_seen_by_what_was_suspended(name):
    make, read, _ = CHANGES[name]
    seen = []

    def program():
        seen.append(read())
        suspend(None)
        seen.append(read())

    before = snapshot()
    coroutine = Coroutine(program, plain())
    coroutine.resume()
    with make():
        inside = snapshot()
        coroutine.resume()
        assert snapshot() == inside
    assert seen[0] == seen[1] and snapshot() == before


def test_default_dtype_is_each_programs_own():
    def program(dtype):
        torch.set_default_dtype(dtype)
        suspend(torch.zeros(1).dtype)
        return torch.zeros(1).dtype

    before = snapshot()
    two = [Coroutine(lambda d=d: program(d), plain()) for d in (torch.float64, torch.float16)]
    assert [c.resume() for c in two] == [torch.float64, torch.float16]
    assert snapshot() == before
    for coroutine in two:
        coroutine.resume()
    assert [c.result for c in two] == [torch.float64, torch.float16] and snapshot() == before


def test_mixed_states_interleave():
    """One with inference mode, one with gradients, one with handlers, in every order."""

    def first():
        with torch.inference_mode():
            assert suspend("a") == 1 and torch.is_inference_mode_enabled()
            assert torch.zeros(1).is_inference()

    def second():
        x = torch.ones(1, requires_grad=True)
        with torch.enable_grad():
            y = x * 2
            suspend("b")
            assert not torch.is_inference_mode_enabled()
            (y * y).backward()
        assert x.grad is not None and float(x.grad) == 8.0

    def third():
        with poutine.trace() as trace, torch.no_grad():
            pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))
            suspend("c")
            pyro.sample("y", pyro.distributions.Normal(0.0, 1.0))
        assert set(trace.trace.nodes) == {"x", "y"}

    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]):
        before = snapshot()
        all_ = [Coroutine(fn, plain(k)) for k, fn in enumerate((first, second, third))]
        for k in order:
            all_[k].resume()
        for k in reversed(order):
            all_[k].resume(1)
        assert all(c.finished for c in all_) and snapshot() == before


def test_random_streams_are_their_own_and_go_on_where_they_were():
    def program():
        first = torch.rand(3)
        suspend(None)
        return torch.cat([first, torch.rand(3)])

    expected = [torch.rand(6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    torch.manual_seed(7)
    two = [Coroutine(program, plain(seed)) for seed in (1, 2)]
    for coroutine in two:
        coroutine.resume()
    own = torch.rand(2)
    for coroutine in reversed(two):
        coroutine.resume()
    torch.manual_seed(7)
    assert torch.equal(own, torch.rand(2))  # the outer stream was left alone
    for coroutine, numbers in zip(two, expected, strict=True):
        assert torch.equal(coroutine.result[:3], numbers[:3])
        torch.testing.assert_close(coroutine.result, numbers)


def test_a_fresh_state_has_no_handlers_and_the_grad_mode_that_was_asked_for():
    seen = []
    with poutine.trace(), torch.enable_grad():
        for grad in (False, True):
            fn = lambda: seen.append((len(pyro_runtime._PYRO_STACK), torch.is_grad_enabled()))  # noqa: E731
            Coroutine(fn, GlobalState.fresh(0, grad=grad)).resume()
    assert seen == [(0, False), (0, True)]


def test_answers_and_results():
    def program():
        return suspend("first") + suspend("second")

    coroutine = Coroutine(program, plain())
    assert coroutine.resume() == "first" and not coroutine.finished
    assert coroutine.resume(1) == "second"
    assert coroutine.resume(2) is None
    assert coroutine.finished and coroutine.result == 3


@pytest.mark.parametrize("steps", [0, 1])
def test_an_exception_surfaces_and_leaves_the_outer_state_intact(steps):
    def program():
        with torch.inference_mode(), poutine.trace(), torch.device("meta"):
            for _ in range(steps):
                suspend(None)
            raise KeyError("mine")

    before = snapshot()
    coroutine = Coroutine(program, plain())
    for _ in range(steps):
        coroutine.resume()
    with pytest.raises(KeyError, match="mine"):
        coroutine.resume()
    assert coroutine.finished and snapshot() == before
    coroutine.close()  # does nothing any more


def test_closing_runs_finally_blocks_in_the_programs_own_state():
    seen = []

    def program():
        with poutine.trace() as handler, torch.no_grad(), torch.device("meta"):
            try:
                suspend(None)
            finally:
                seen.append(
                    (
                        [handler] == pyro_runtime._PYRO_STACK,
                        torch.is_grad_enabled(),
                        torch.empty(0).device.type,
                        float(torch.rand(1, device="cpu")),
                    )
                )

    expected = float(torch.rand(1, generator=torch.Generator().manual_seed(5)))
    coroutine = Coroutine(program, plain(5))
    coroutine.resume()
    with poutine.block(), torch.enable_grad():
        before = snapshot()
        coroutine.close()
        assert snapshot() == before
    assert seen == [(True, False, "meta", pytest.approx(expected))]
    assert coroutine.finished
    coroutine.close()
    assert len(seen) == 1


def test_closing_before_the_first_step_runs_nothing():
    coroutine = Coroutine(lambda: pytest.fail("it ran"), plain())
    coroutine.close()
    assert coroutine.finished


def test_exceptions_of_the_program_do_not_catch_the_end():
    seen = []

    def program():
        try:
            suspend(None)
        except Exception:
            seen.append("caught")
        seen.append("went on")

    coroutine = Coroutine(program, plain())
    coroutine.resume()
    coroutine.close()
    assert seen == [] and coroutine.finished and issubclass(Abandoned, BaseException)


def test_a_program_that_swallows_its_end_and_goes_on_is_an_error():
    def program():
        try:
            suspend(1)
        except BaseException:
            suspend(2)

    before = snapshot()
    coroutine = Coroutine(program, plain())
    coroutine.resume()
    with pytest.raises(RuntimeError, match="must not catch BaseException"):
        coroutine.close()
    assert snapshot() == before


def test_an_exception_in_a_finally_block_surfaces_from_close():
    def program():
        try:
            suspend(1)
        finally:
            raise OSError("disk full")

    coroutine = Coroutine(program, plain())
    coroutine.resume()
    before = snapshot()
    with pytest.raises(OSError, match="disk full"):
        coroutine.close()
    assert coroutine.finished and snapshot() == before


def test_coroutines_nest():
    """A guide runs inside the model's run."""

    def inner():
        with torch.no_grad():
            answer = suspend("inner asks")
            assert not torch.is_grad_enabled()
        return answer * 2

    def outer():
        child = Coroutine(inner, plain(1))
        asked = child.resume()
        assert torch.is_grad_enabled()
        child.resume(suspend(asked))
        return child.result

    before = snapshot()
    coroutine = Coroutine(outer, plain())
    assert coroutine.resume() == "inner asks"
    coroutine.resume(21)
    assert coroutine.result == 42 and snapshot() == before


def test_garbage_collection_after_closing_changes_nothing():
    def program():
        with poutine.trace(), torch.inference_mode():
            suspend(None)

    coroutines = [Coroutine(program, plain(k)) for k in range(5)]
    for coroutine in coroutines:
        coroutine.resume()
    for coroutine in coroutines:
        coroutine.close()
    before = snapshot()
    del coroutine, coroutines
    gc.collect()
    assert snapshot() == before
