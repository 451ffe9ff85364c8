"""The record of what language models do: exclusive times, all passes, nothing while nobody asks."""

from __future__ import annotations

import threading

import pytest
import torch

from lmppl.lm.batches.requests import Score
from lmppl.lm.meter import work
from lmppl.lm.meter.work import recording, region
from lmppl.testing.tiny import tiny_lm

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)
SCORES = [Score((0, 1, 2), (0, 1, k)) for k in range(3)]


class Clock:
    """Time passes when it is told to."""

    def __init__(self):
        self.time = 0.0

    def perf_counter(self):
        return self.time

    def work(self, seconds):
        self.time += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(work, "time", clock)
    return clock


def kinds(record):
    return {kind: seconds for kind, seconds in record.kinds.items() if seconds}


def test_an_inner_region_stops_the_clock_of_the_outer(clock):
    with recording() as (_, record):
        clock.work(1)
        with region("sampled"):
            clock.work(2)
            with region("scored"):
                clock.work(4)
                with region("sampled"):
                    clock.work(8)
            clock.work(16)
        clock.work(32)
    assert kinds(record) == {"sampled": 26, "scored": 4} and record.seconds == 63


def test_recordings_nest_and_overlap(clock):
    outer, inner, late = recording(), recording(), recording()
    _, first = outer.__enter__()
    with region("scored"):
        clock.work(1)
    _, second = inner.__enter__()
    with region("scored"):
        clock.work(2)
    _, third = late.__enter__()
    with region("sampled"):
        clock.work(4)
    outer.__exit__(None, None, None)
    with region("sampled"):
        clock.work(8)
    inner.__exit__(None, None, None)
    late.__exit__(None, None, None)
    assert kinds(first) == {"scored": 3, "sampled": 4} and first.seconds == 7
    assert kinds(second) == {"scored": 2, "sampled": 12} and second.seconds == 14
    assert kinds(third) == {"sampled": 12} and third.seconds == 12
    assert work._ledger is None


def test_exceptions_leave_the_clocks_as_they_should_be(clock):
    @region("scored")
    def fail():
        clock.work(4)
        raise KeyError

    with pytest.raises(KeyError), recording() as (ledger, record), region("sampled"):
        clock.work(1)
        with pytest.raises(KeyError):
            fail()
        clock.work(2)
        fail()
    assert kinds(record) == {"sampled": 3, "scored": 8} and record.seconds == 11
    assert not ledger._regions.kinds and work._ledger is None


def test_a_pause_is_nobodys_time(clock):
    with recording() as (_, outer):
        clock.work(1)
        with recording() as (ledger, inner):
            clock.work(2)
            with ledger.pause():
                clock.work(4)
    assert outer.seconds == 3 and inner.seconds == 2


def test_threads_have_regions_of_their_own(clock):
    inside, done = threading.Event(), threading.Event()

    def other():
        with region("scored"):
            inside.set()
            done.wait(10)

    with recording() as (_, record):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
        with region("sampled"):
            clock.work(1)
        done.set()
        thread.join()
    assert kinds(record) == {"sampled": 1, "scored": 1}


def test_nothing_happens_while_nobody_records(monkeypatch):
    def forbidden(*_):
        raise AssertionError("something was measured")

    for name in ("Ledger", "_Regions", "wait_for"):
        monkeypatch.setattr(work, name, forbidden)
    monkeypatch.setattr(torch.Tensor, "register_hook", forbidden)
    adapter = LM.adapter()
    LM.sample("ab", 2, max_tokens=2, seed=0)
    LM.hidden([(0, 1)])
    sum(s.log_probs.sum() for s in adapter.score(SCORES, grad=True)).backward()


def test_devices_are_waited_for_at_the_borders(monkeypatch):
    waits = []
    with recording():
        LM.score(SCORES)  # now the device is known
        monkeypatch.setattr(work, "wait_for", waits.append)
        LM.score(SCORES)
        assert waits == 2 * [torch.device("cpu")]
    assert len(waits) == 3


def test_passes_are_counted_by_kind_and_model():
    other, adapter = tiny_lm("ab.", seed=0, hidden_size=32), LM.adapter()
    other.model.requires_grad_(False)
    runners = [lm.runner for lm in (LM, other, adapter)]
    assert all(runner.fast for runner in runners)  # the probe is behind us
    before = [runner.computed_tokens for runner in runners]
    with recording() as (_, record):
        for lm in (LM, other):
            lm.score(SCORES)
        LM.hidden([(0, 1), (1, 2)])
        adapter.score(SCORES, grad=True)
        adapter.score(SCORES)
        LM.score(SCORES, grad=True)  # with nothing to train
    computed = [runner.computed_tokens - n for runner, n in zip(runners, before, strict=True)]
    base, small, adapted = (runner.matrices.key for runner in runners)
    assert set(record.passes) == {
        ("scored", base), ("scored", small), ("scored", adapted), ("read", base),
        ("trained", adapted),
    }  # fmt: skip
    for key, positions in zip((base, small, adapted), computed, strict=True):
        assert sum(p.positions for (_, its), p in record.passes.items() if its == key) == positions
    assert record.passes["scored", small].outputs == 9
    assert record.passes["scored", small].passes == 1
    assert record.passes["read", base].outputs == record.passes["read", base].rows == 2
    assert (record.usage.tokens_scored, record.usage.tokens_trained) == (4 * 9, 9)


# --- the backward pass ---------------------------------------------------------------------------


def training_loss(during_backward):
    """Scores of two adapters, whose parameters call a function when their gradient is there."""
    loss = torch.zeros(())
    for adapter in (LM.adapter(), LM.adapter()):
        loss = loss + sum(s.log_probs.sum() for s in adapter.score(SCORES, grad=True))
        weight = next(p for p in adapter.model.parameters() if p.requires_grad)
        weight.register_hook(lambda _: during_backward())
    return loss


def test_whoever_calls_it_the_backward_pass_is_training(clock):
    with recording() as (_, record):
        loss = training_loss(lambda: clock.work(3))
        clock.work(1)
        loss.backward()
        clock.work(1)
    # Two models, and each moment counts once.
    assert kinds(record) == {"trained": 6} and record.seconds == 8


def test_a_backward_pass_that_fails_spoils_nothing(clock):
    def fail():
        raise KeyError("no gradient")

    with recording() as (_, record):
        with pytest.raises(KeyError, match="no gradient"):
            training_loss(fail).backward()
        clock.work(10)
        training_loss(lambda: clock.work(1)).backward()
    assert kinds(record) == {"trained": 2}


def test_a_graph_may_outlive_the_recording(clock):
    with recording() as (_, record):
        loss = training_loss(lambda: clock.work(1))
    loss.backward(retain_graph=True)
    with recording() as (_, later):
        loss.backward()
    assert record.kinds["trained"] == later.kinds["trained"] == 0


@pytest.mark.parametrize("failing", [1, 2])
def test_a_device_that_fails_leaves_no_recording_open(monkeypatch, failing):
    """At the beginning, and at the end: what is waited for raises."""
    reads, read = [], work.Ledger.read

    def fail_once(ledger):
        reads.append(1)
        if len(reads) == failing:
            raise KeyboardInterrupt
        return read(ledger)

    monkeypatch.setattr(work.Ledger, "read", fail_once)
    with pytest.raises(KeyboardInterrupt), work.recording():
        pass
    assert work._ledger is None
    ledger, charges = work.Ledger(), []

    def fail_at_the_end():
        charges.append(1)
        if len(charges) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ledger, "_charge", fail_at_the_end)
    with pytest.raises(KeyboardInterrupt), ledger.region("scored"):
        pass
    assert len(charges) == 2 and ledger._regions.kinds == []
