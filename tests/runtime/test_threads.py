"""Threads take turns: what they run gives what it gives one after the other."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine, sample

import lmppl
from lmppl import lm_sample
from lmppl.exclusive import Stack, exclusive
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)


@pytest.fixture(autouse=True)
def busy():
    """Threads that are switched as often as they can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def infill(x: str, y: str):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    with poutine.scale(scale=0.5):
        u = sample("u", dist.Normal(0.0, 1.0))
    lm_sample("y", [x, z], obs=y)
    return z, round(float(u), 4)


def nested(x: str, y: str):
    inner = lmppl.infer(infill, x, y, lm=LM, method="importance", num_samples=4, seed=3)
    z = lm_sample("z", [x, inner.best("z")], max_tokens=2)
    lm_sample("y", [x, z], obs=y)
    return z, inner.best("z")


# Each run gives what must be equal, and numbers that may differ in their last bits: what a model
# has cached depends on what it was asked before.


def infer(program, method, **options):
    def run(seed):
        posterior = lmppl.infer(
            program, "ab.", "ab", lm=LM, method=method, num_samples=6, seed=seed, **options
        )
        return posterior.returns, posterior.log_weights.tolist()

    return run


def batch(seed):
    inputs = [("ab.", "a"), ("b.", "b"), ("a", "ab")]
    posteriors = lmppl.infer_batch(infill, inputs, lm=LM, num_samples=4, seed=seed, at_once=2)
    found = [(posterior.returns, posterior.log_weights.tolist()) for posterior in posteriors]
    return [returns for returns, _ in found], [number for _, weights in found for number in weights]


def plain(seed):
    texts, log_probs = LM.sample("ab.", 8, max_tokens=4, seed=seed)
    return texts, log_probs.tolist() + LM.log_prob("ab.", texts, max_tokens=4).tolist()


def train(seed):
    guide = lmppl.LMGuide(infill, lm=LM)
    guide.fit([("ab.", "ab")], steps=1, batch_size=4, seed=seed)
    return None, [record["loss"] for record in guide.history]


RUNS = {
    "importance": infer(infill, "importance"),
    "smc": infer(infill, "smc", ess_threshold=1.0),
    "infer within a program": infer(nested, "smc"),
    "infer_batch": batch,
    "a language model": plain,
    "fit": train,
}


def test_threads_get_what_they_would_get_one_after_the_other():
    jobs = [(run, seed) for seed in range(2) for run in RUNS.values()]
    expected = [run(seed) for run, seed in jobs]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: job[0](job[1]), jobs))
    for (values, numbers), (expected_values, expected_numbers) in zip(found, expected, strict=True):
        assert values == expected_values
        assert numbers == pytest.approx(expected_numbers, abs=1e-4)
    assert torch.equal(before, torch.get_rng_state()) and not poutine.runtime._PYRO_STACK


def test_a_batch_that_waits_for_its_caller_keeps_nobody_waiting():
    posteriors = lmppl.infer_batch(infill, [("ab.", "a")] * 3, lm=LM, num_samples=4, seed=0)
    first = next(posteriors)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(RUNS["smc"], 0).result(timeout=60)
    assert other[0] == RUNS["smc"](0)[0]
    again = list(lmppl.infer_batch(infill, [("ab.", "a")] * 3, lm=LM, num_samples=4, seed=0))
    assert [p.returns for p in (first, *posteriors)] == [p.returns for p in again]


def test_what_runs_on_a_stack_of_its_own_does_not_take_the_lock():
    """Else one that is suspended would keep it."""

    def free():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: held()).result(timeout=60)

    def held():
        with exclusive():
            return threading.current_thread().name

    def suspended():
        with exclusive():
            stack.parent.switch("waits")

    stack = Stack(suspended)
    assert stack.switch() == "waits" and free()
    with exclusive(), exclusive():  # re-entrant
        stack.switch()
    assert stack.dead and free()
