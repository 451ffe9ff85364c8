"""Engines side by side: one call for all of them, and otherwise each as if it were alone."""

from __future__ import annotations

import contextvars

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import lm_sample, runtime
from lmppl.lm.meter.work import total_usage
from lmppl.primitives import _warned
from lmppl.runtime import Member, Particle, advance, own_usage
from lmppl.runtime.coroutine import GlobalState
from lmppl.testing import tiny_lm


@pytest.fixture(autouse=True)
def lm():
    _warned.clear()
    lm = tiny_lm("ab.", seed=0)
    lm.model.requires_grad_(False)
    with lmppl.use(lm):
        yield lm


@pytest.fixture
def calls(lm, monkeypatch):
    """What the language model was asked for: (kind, number of requests)."""
    calls = []
    for name in ("draw", "score", "hidden"):
        method = getattr(lm, name)
        monkeypatch.setattr(
            lm, name, lambda r, n=name, m=method, **k: calls.append((n, len(r))) or m(r, **k)
        )
    return calls


def infill(x: str, y: str):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], obs=y)
    return z


def engine(program, *args, num=4, seed=0):
    """A function that runs ``num`` particles to their ends, and returns them."""

    def run():
        particles = runtime.start(program, args, num, seed=seed)
        with runtime.ending(particles):
            runtime.run_to_end(particles)
        return particles

    return run


def together(*functions, seed=0):
    """All of them run as members to their ends."""
    members = [Member(fn, GlobalState.fresh(seed + i)) for i, fn in enumerate(functions)]
    with runtime.ending(members):
        for member in members:
            member.go_on()
        while any(not member.finished for member in members):
            advance(members)
    return members


def outcomes(particles):
    return [(str(p.returned), pytest.approx(p.log_joint, abs=1e-4)) for p in particles]


def test_one_call_for_all_members(calls):
    members = together(*(engine(infill, "ab.", "ab", seed=seed) for seed in range(3)))
    assert calls == [("draw", 12), ("score", 12)]
    for seed, member in enumerate(members):
        alone = engine(infill, "ab.", "ab", seed=seed)()
        assert outcomes(member.result) == outcomes(alone)


def test_an_engine_alone_asks_at_once(calls):
    engine(infill, "ab.", "ab")()
    assert calls == [("draw", 4), ("score", 4)]


def test_members_that_came_apart_meet_at_the_next_draw(calls):
    def program(n: int):
        for i in range(n):
            lm_sample(f"y{i}", ["ab", "b" * i], obs="b")
        infill("ab.", "ab")

    together(*(engine(program, n, num=2) for n in (0, 1, 3)))
    assert [size for kind, size in calls if kind == "draw"] == [6]
    assert [kind for kind, _ in calls] == ["score", "score", "score", "draw", "score"]


def test_states_are_asked_for_together(lm, calls):
    def run(prefix):
        def program():
            return runtime.suspend(runtime.HiddenWait("h", lm, prefix))

        return engine(program, num=1)

    prefixes = [lm.encode(text) for text in ("ab", "b", "ab.")]
    members = together(*map(run, prefixes))
    assert calls == [("hidden", 3)]
    for prefix, member in zip(prefixes, members, strict=True):
        torch.testing.assert_close(
            member.result[0].returned, lm.hidden([prefix])[0], atol=1e-4, rtol=0
        )


def test_several_language_models(lm):
    other = tiny_lm("ab.", seed=3)

    def run(lm):
        def inner():
            with lmppl.use(lm):  # a block of its own for each, open while it waits
                return engine(infill, "ab.", "ab")()

        return inner

    members = together(run(lm), run(other), run(lm))
    assert outcomes(members[0].result) == outcomes(members[2].result) == outcomes(run(lm)())
    assert outcomes(members[1].result) == outcomes(run(other)())


def test_a_bad_request_is_its_own_engines(lm, calls):
    """One prompt does not fit the context: its engine hears of it, and no other."""
    members = together(
        engine(infill, "ab.", "ab"),
        engine(infill, "ab" * 200, "ab"),
        engine(infill, "ab.", "ab", seed=1),
    )
    assert [member.error is None for member in members] == [True, False, True]
    assert isinstance(members[1].error, ValueError) and "context" in str(members[1].error)
    for seed, member in ((0, members[0]), (1, members[2])):
        assert outcomes(member.result) == outcomes(engine(infill, "ab.", "ab", seed=seed)())


def test_an_engine_may_answer_for_a_request_that_failed(lm):
    """The exception is raised where the request was made, so it can be caught there."""

    def run():
        with pytest.raises(ValueError, match="context"):
            engine(infill, "ab" * 200, "ab")()
        return engine(infill, "ab.", "ab")()

    careful, other = together(run, engine(infill, "ab.", "ab", seed=1))
    assert careful.error is None and len(careful.result) == 4 and other.error is None


def test_scores_with_a_graph_are_computed_where_they_were_asked_for():
    lm = tiny_lm("ab.", seed=1)
    lm.model.requires_grad_(True)

    def run():
        with lmppl.use(lm), torch.enable_grad():
            particles = runtime.start(observed, (), 2, seed=0, grad=True)
            with runtime.ending(particles):
                runtime.run_to_draws(particles, grad=True)
            total = sum(particle.sites["y"]["log_prob_sum"] for particle in particles)
            total.backward()
        return float(total)

    def observed():
        lm_sample("y", "ab", obs="b.")

    first, second = together(run, run)
    assert first.error is second.error is None
    assert first.result == second.result
    assert any(each.grad is not None for each in lm.model.parameters())


def test_tokens_are_counted_for_whoever_asked(lm):
    def choose():
        k = lm_sample("k", "ab", choices=["ab", "ba.", "b."])
        lm_sample("y", ["ab", k], obs="ab")
        lm_sample("z", ["b", k], max_tokens=2)

    def counted(fn):
        def run():
            before = own_usage()
            fn()
            return own_usage() - before

        return run

    functions = [
        counted(engine(infill, "ab.", "ab", num=8)),
        counted(engine(choose, num=3)),
        counted(engine(infill, "ab.", "ab", num=8)),  # the very same requests
        counted(lambda: lm.sample("ab", 3, max_tokens=1, seed=0)),  # served while it runs
        counted(lambda: None),
    ]
    before = total_usage()
    members = together(*functions)
    shared = total_usage() - before
    alone = [fn() for fn in functions]
    assert [member.result for member in members] == alone
    assert alone[3].tokens_sampled == 3 and alone[4].tokens_sampled == 0
    # The equal requests were computed once, and each is charged for them.
    assert shared.tokens_scored == sum(u.tokens_scored for u in alone) - alone[0].tokens_scored
    assert shared.tokens_sampled == sum(u.tokens_sampled for u in alone)


def test_an_inference_within_a_program_is_no_engine_of_the_batch(calls):
    def inner(y):
        return str(lmppl.infer(infill, "ab.", y, method="importance", num_samples=2, seed=0)["z"])

    def program():
        before = len(calls)
        lmppl.tool("inner", inner, "ab")
        assert calls[before:] == [("draw", 2), ("score", 2)]
        infill("ab.", "ab")

    members = together(engine(program, num=1), engine(program, num=1, seed=1))
    assert [member.error for member in members] == [None, None]
    assert calls[-2:] == [("draw", 2), ("score", 2)]  # of both programs


def test_members_do_not_see_each_others_state():
    variable = contextvars.ContextVar("variable", default=0)
    seen = []

    def run(k):
        def inner():
            variable.set(k)
            with torch.set_grad_enabled(k % 2 == 0), poutine.scale(scale=float(k)):
                torch.manual_seed(k)
                engine(infill, "ab.", "ab", num=1)()
                seen.append((k, variable.get(), torch.is_grad_enabled(), torch.rand(()).item()))
                with poutine.trace() as tr:
                    pyro.sample("x", dist.Normal(0.0, 1.0))
                assert float(tr.trace.nodes["x"]["scale"]) == float(k)

        return inner

    grad, rng = torch.is_grad_enabled(), torch.get_rng_state()
    members = together(*(run(k) for k in (1, 2, 3)))
    assert [member.error for member in members] == [None] * 3
    for k, value, enabled, number in seen:
        expected = torch.rand((), generator=torch.Generator().manual_seed(k)).item()
        assert (value, enabled, number) == (k, k % 2 == 0, expected)
    assert len(seen) == 3 and torch.is_grad_enabled() == grad and variable.get() == 0
    assert torch.equal(torch.get_rng_state(), rng) and not poutine.runtime._PYRO_STACK


def nested(*functions, seed=0):
    """A function that runs members of its own, and returns their results and what it has spent."""

    def run():
        before = own_usage()
        members = [Member(fn, GlobalState.fresh(seed + i)) for i, fn in enumerate(functions)]
        with runtime.ending(members):
            runtime.run_members(members)
        return [member.result for member in members], own_usage() - before

    return run


def test_members_within_members_share_the_calls(calls):
    """Also of members that run beside them, within another one or not."""
    engines = [engine(infill, "ab.", "ab", seed=seed) for seed in range(5)]
    members = together(nested(*engines[:2]), nested(*engines[2:4]), engines[4])
    assert calls == [("draw", 20), ("score", 20)]
    found = [*members[0].result[0], *members[1].result[0], members[2].result]
    for particles, fn in zip(found, engines, strict=True):
        assert outcomes(particles) == outcomes(fn())


def test_tokens_of_members_within_a_member_are_its_own():
    same = engine(infill, "ab.", "ab", num=8)  # the very same requests
    run, other = nested(same, same), engine(infill, "ab.", "ab", num=8, seed=1)
    members = together(run, other)
    assert members[0].result[1] == run()[1]  # alone
    assert members[0].result[1].tokens_scored == nested(same)()[1].tokens_scored > 0
    assert members[0].result[1].tokens_sampled == 2 * nested(same)()[1].tokens_sampled


def test_an_exception_of_a_member_within_a_member(lm):
    """It ends the outer one with all its members, and nobody else."""
    ended = []

    def program():
        try:
            infill("ab.", "ab")
            infill("ab.", "ab")
        finally:
            ended.append(True)

    too_long = engine(infill, "ab" * 200, "ab")
    members = together(nested(engine(program, num=2), too_long), engine(infill, "ab.", "ab"))
    assert isinstance(members[0].error, ValueError) and "context" in str(members[0].error)
    assert ended == [True] * 2
    assert outcomes(members[1].result) == outcomes(engine(infill, "ab.", "ab")())


def test_members_run_under_inference_mode():
    with torch.inference_mode():
        (member,) = together(engine(infill, "ab.", "ab"))
        assert torch.is_inference_mode_enabled()
    assert outcomes(member.result) == outcomes(engine(infill, "ab.", "ab")())


def test_closing_ends_particles_in_their_own_state():
    ended = []

    def program(k):
        try:
            with poutine.scale(scale=2.0):
                infill("ab.", "ab")
        finally:
            ended.append((k, len(poutine.runtime._PYRO_STACK)))

    made: list[list[Particle]] = []

    def run(k):
        def inner():
            made.append(runtime.start(program, (k,), 3, seed=k))
            with runtime.ending(made[-1]):
                runtime.run_to_end(made[-1])

        return inner

    members = [Member(run(k), GlobalState.fresh(k)) for k in range(2)]
    with runtime.ending(members):
        for member in members:
            member.go_on()
        advance(members)
        assert all(isinstance(m.waiting[0], runtime.ScoreWait) for m in members) and not ended
    assert all(member.finished and not member.waiting for member in members)
    assert all(particle.finished for particles in made for particle in particles)
    assert sorted(ended) == [(k, 1) for k in (0, 0, 0, 1, 1, 1)]  # the recorder's, alone
    assert not poutine.runtime._PYRO_STACK
