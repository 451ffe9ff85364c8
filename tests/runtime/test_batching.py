"""Serving: one batched call for all that wait, equal requests once."""

from __future__ import annotations

import gc
import math

import pyro
import pytest
import torch
from guide_helpers import shaken
from pyro import poutine

import lmppl
from lmppl import lm_sample, require, runtime
from lmppl.primitives import _warned
from lmppl.runtime.waits import ScoreWait
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES


@pytest.fixture(autouse=True)
def lm():
    _warned.clear()
    lm = tiny_lm("ab.", seed=0)
    lm.model.requires_grad_(False)
    with lmppl.use(lm):
        yield lm


def infill(x: str, y: str):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], obs=y)
    return z


def test_one_call_for_all_that_wait(lm, monkeypatch):
    calls = []
    for name in ("draw", "score"):
        method = getattr(lm, name)
        monkeypatch.setattr(
            lm, name, lambda r, n=name, m=method, **k: calls.append((n, len(r))) or m(r, **k)
        )
    particles = runtime.start(infill, ("ab.", "ab"), 16, seed=0)
    runtime.run_to_end(particles)
    assert calls == [("draw", 16), ("score", 16)]
    assert all(particle.finished for particle in particles)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_late_scores_are_those_of_each_site_in_turn(case, monkeypatch):
    calls = []
    score = ScoreWait.answer
    monkeypatch.setattr(ScoreWait, "answer", lambda w, **k: calls.append(len(w)) or score(w, **k))
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
    found, counts = [], []
    with lmppl.use(case.lm), torch.no_grad():
        factory = guide.proposer_factory(case.args)
        for late in (False, True):
            calls.clear()
            particles = runtime.start(
                case.program, case.args, 8, seed=0, proposer=factory,
                score_closing=True, score_late=late,
            )  # fmt: skip
            with runtime.ending(particles):
                runtime.run_to_end(particles)
            found.append(particles)
            counts.append(len(calls))
    assert counts[1] <= min(1, counts[0])
    for one, two in zip(*found, strict=True):
        assert two.finished and one.rejected_by == two.rejected_by
        assert one.log_joint == pytest.approx(two.log_joint, abs=1e-4)
        assert list(one.trace.nodes) == list(two.trace.nodes)
        for name, node in one.sites.items():
            other = two.sites[name]
            assert torch.equal(node["value"], other["value"])
            assert torch.allclose(node["log_prob"], other["log_prob"], atol=1e-5)
            assert type(node.get("scored")) is type(other.get("scored"))


def test_a_run_that_is_rejected_has_its_late_scores(lm):
    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        lm_sample("y", ["a", z], obs="b")
        require("never", False)

    (run,) = runtime.start(program, (), 1, seed=0, score_late=True)
    runtime.run_to_end([run])
    assert run.rejected_by == "never" and run.log_joint == -math.inf
    with torch.no_grad():
        expected = float(run.sites["y"]["fn"].log_prob(run.sites["y"]["value"]))
    assert float(run.sites["y"]["log_prob"]) == pytest.approx(expected, abs=1e-5)


def test_what_the_program_reads_is_not_scored_late(lm):
    """Its own handler reads a text's log-probability, and a branch depends on it."""

    def program():
        trace = poutine.trace(lambda: lm_sample("z", "ab", max_tokens=3)).get_trace()
        log_prob = trace.nodes["z"]["log_prob_sum"]
        lm_sample("y", "ab", obs="a" if log_prob < -3 else "b")
        pyro.factor("f", log_prob)

    guide = shaken(lmppl.LMGuide(program, lm=lm))
    found = []
    for late in (False, True):
        factory = guide.proposer_factory(())
        runs = runtime.start(program, (), 16, seed=0, proposer=factory, score_late=late)
        runtime.run_to_end(runs)
        found.append([run.log_joint for run in runs])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_only_what_is_asked_for_gets_closing_scores(lm):
    (run,) = runtime.start(infill, ("ab.", "ab"), 1, seed=0, score_closing=True, score_late=True)
    with runtime.ending([run]):
        runtime.run_to_end([run])
    assert run.sites["y"]["scored"].closing_log_probs is None


def test_overlapping_runs_leave_the_garbage_collector_as_it_was():
    before = gc.get_threshold()
    one, two = runtime.rare_collections(), runtime.rare_collections()
    one.__enter__()
    two.__enter__()
    assert gc.get_threshold()[0] > before[0]
    one.__exit__(None, None, None)
    two.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_equal_requests_are_scored_once(lm):
    def program():
        z = lm_sample("z", "ab", max_tokens=1)
        lm_sample("same", "ab.", obs="abab")
        lm_sample("other", ["a", z], obs="b")

    particles = runtime.start(program, (), 32, seed=0)
    runtime.run_to_end(particles)
    distinct = len({particle.sites["other"]["fn"].prefix_ids for particle in particles})
    assert lm.tokens_scored == 4 + distinct and distinct <= 4


def test_branches_of_different_lengths_meet():
    def program(n):
        for i in range(n):
            lm_sample(f"z{i}", "ab", max_tokens=2)
            lm_sample(f"y{i}", "ab", obs="b")
        return n

    particles = [runtime.Particle(program, (n,), seed=n) for n in range(5)]
    for particle in particles:
        particle.resume()
    runtime.run_to_end(particles)
    assert [particle.returned for particle in particles] == [0, 1, 2, 3, 4]


def test_several_language_models_at_one_barrier(lm):
    other = tiny_lm("ab.", seed=3)

    def program(first):
        z = lm_sample("z", "ab", max_tokens=2, lm=lm if first else other)
        lm_sample("y", [z, "a"], obs="b", lm=other if first else lm)

    particles = [runtime.Particle(program, (k % 2,), seed=k) for k in range(6)]
    for particle in particles:
        particle.resume()
    runtime.run_to_end(particles)
    for particle in particles:
        for node in particle.sites.values():
            with torch.no_grad():
                expected = float(node["fn"].log_prob(node["value"]))
            assert float(node["log_prob"]) == pytest.approx(expected, abs=1e-5)


def test_programs_keep_their_handlers_apart_while_they_wait():
    """Every other particle stands under another scale when it waits."""

    def program(k):
        with poutine.scale(scale=float(k + 1)), pyro.plate("p", 2) as _:
            pass
        with poutine.scale(scale=float(k + 1)):
            lm_sample("z", "ab", max_tokens=2)
            lm_sample("y", "ab", obs="b")

    particles = [runtime.Particle(program, (k,), seed=k) for k in range(4)]
    for particle in particles:
        particle.resume()
    runtime.run_to_end(particles[::-1])
    for k, particle in enumerate(particles):
        for name in ("z", "y"):
            assert float(particle.sites[name]["scale"]) == k + 1
    assert not poutine.runtime._PYRO_STACK and not poutine.runtime._DIM_ALLOCATOR._stack


def test_slot_seeds_are_distinct_and_reproducible():
    seeds = runtime.slot_seeds(5, 100)
    assert seeds == runtime.slot_seeds(5, 100) and len(set(seeds)) == 100
    assert seeds[:10] == runtime.slot_seeds(5, 10)
    assert not set(seeds) & set(runtime.slot_seeds(6, 100))


def test_a_fresh_seed_comes_from_torch():
    torch.manual_seed(0)
    first, second = runtime.fresh_seed(None), runtime.fresh_seed(None)
    torch.manual_seed(0)
    assert runtime.fresh_seed(None) == first != second
    assert runtime.fresh_seed(3) == 3 and runtime.fresh_seed(0) == 0


def test_an_error_of_the_model_names_the_site_and_ends_all(lm):
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(float("nan"))
    particles = runtime.start(infill, ("ab.", "ab"), 3, seed=0)
    with pytest.raises(ValueError, match="site 'z'.*NaN"), runtime.ending(particles):
        runtime.run_to_end(particles)
    assert all(particle.finished for particle in particles)


def test_a_program_that_fails_at_once_leaves_none_suspended():
    begun, ended = [], []

    def program():
        begun.append(len(begun))
        try:
            if len(begun) == 3:
                raise ZeroDivisionError
            lm_sample("z", "ab", max_tokens=1)
        finally:
            ended.append(begun[-1])

    with pytest.raises(ZeroDivisionError):
        runtime.start(program, (), 4, seed=0)
    assert len(begun) == len(ended) == 3  # the fourth never began


def test_streams_of_seeds_are_independent_of_their_number():
    seeds = [runtime.nth_seed(5, i) for i in range(100)]
    assert len(set(seeds)) == 100 and seeds[7] == runtime.nth_seed(5, 7)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert not set(seeds) & {runtime.nth_seed(6, i) for i in range(100)}


def test_garbage_is_collected_seldom_while_runs_live():
    """Also when it ends by an exception, and not where the user has switched it off."""
    before = gc.get_threshold()
    assert before[0] < 10_000
    with pytest.raises(KeyError), runtime.ending([]):
        assert gc.get_threshold() == (10_000, *before[1:])
        with runtime.ending([]):
            assert gc.get_threshold() == (10_000, *before[1:])
        raise KeyError
    assert gc.get_threshold() == before
    gc.set_threshold(0)
    try:
        with runtime.ending([]):
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
