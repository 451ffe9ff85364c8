"""Particles: one run of a program, what it records, and how it is forked."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.distribution import COERCIONS
from pyro.poutine.util import prune_subsample_sites, site_is_factor

import lmppl
from lmppl import LMText, ReplayError, lm_sample, primitives, require, runtime, tool
from lmppl.primitives import _warned
from lmppl.runtime import Given, Particle
from lmppl.testing import naive_log_prob, tiny_lm

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)
A, B, DOT, EOS = range(4)


@pytest.fixture(autouse=True)
def _fresh_state():
    _warned.clear()
    pyro.clear_param_store()
    with lmppl.use(LM):
        yield
    assert not poutine.runtime._PYRO_STACK


def run(program, *args, seed: int = 0, **options) -> Particle:
    """A particle that has run to its end."""
    particle = Particle(program, args, seed=seed, **options)
    particle.resume()
    runtime.run_to_end([particle])
    return particle


def infill(x: str, y: str):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], obs=y)
    return z


# --- what it records ---


def test_densities_are_written_while_drawing_and_are_those_of_a_plain_forward():
    particle = run(infill, "ab.", "ab")
    assert particle.finished and particle.waiting is None
    for name, node in particle.sites.items():
        fn = node["fn"]
        expected = naive_log_prob(LM, fn.prefix_ids, fn.token_ids(node["value"])).sum()
        assert float(node["log_prob_sum"]) == pytest.approx(float(expected), abs=1e-4), name
    assert particle.log_joint == pytest.approx(float(particle.trace.log_prob_sum()), abs=1e-5)
    assert particle.returned == particle.trace.nodes["_RETURN"]["value"]
    assert list(particle.latents) == ["z"] and list(particle.sites) == ["z", "y"]


def test_drawn_from_the_prior_the_weight_is_the_likelihood():
    particle = run(infill, "ab.", "ab")
    likelihood = float(particle.sites["y"]["log_prob_sum"])
    assert particle.take_log_weight() == pytest.approx(likelihood, abs=1e-6)
    assert particle.take_log_weight() == 0.0  # each site once


def test_scale_and_mask_are_applied_once_and_the_proposal_is_unscaled():
    def program():
        with poutine.scale(scale=0.5):
            z = lm_sample("z", "ab", max_tokens=2)
        with poutine.scale(scale=3.0):
            lm_sample("y", [z, "a"], obs="b")
        with poutine.mask(mask=False):
            lm_sample("x", [z, "a"], obs="b")
        with poutine.mask(mask=True):
            lm_sample("w", "ab", obs="b")

    particle = run(program)
    z, y, x, w = (particle.sites[name] for name in "zyxw")
    assert float(z["log_prob_sum"]) == pytest.approx(0.5 * float(z["unscaled_log_prob"]))
    assert float(z["proposal_log_prob"]) == float(z["unscaled_log_prob"])
    assert float(x["log_prob_sum"]) == 0.0 and float(x["unscaled_log_prob"]) < 0
    weight = -0.5 * float(z["unscaled_log_prob"]) + 3 * float(y["unscaled_log_prob"])
    weight += float(w["unscaled_log_prob"])
    assert particle.take_log_weight() == pytest.approx(weight, abs=1e-5)
    assert particle.log_joint == pytest.approx(float(particle.trace.log_prob_sum()), abs=1e-5)


def test_other_sites_of_every_kind():
    def program():
        scale = pyro.param("scale", torch.tensor(1.5))
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        with pyro.plate("vector", 3):
            many = pyro.sample("many", dist.Bernoulli(0.3))
        z = lm_sample("z", "ab", max_tokens=1)
        pyro.factor("score", theta * len(z))
        pyro.deterministic("total", many.sum())
        for i in pyro.plate("data", 2):
            pyro.sample(f"x{i}", dist.Normal(theta, 1.0), obs=torch.tensor(0.5))

    particle = run(program)
    assert set(particle.latents) == {"theta", "many", "z"}
    assert particle.trace.nodes["scale"]["type"] == "param"
    assert particle.log_joint == pytest.approx(
        float(particle.trace.log_prob_sum().detach()), abs=1e-4
    )
    observed = sum(
        float(particle.sites[name]["log_prob_sum"]) for name in ("score", "x0", "x1", "total")
    )
    assert particle.take_log_weight() == pytest.approx(observed, abs=1e-5)


def test_given_values_cost_nothing_unless_they_were_proposed():
    fn = LMText(LM, "ab.", max_tokens=3, stop=".")
    value = fn.value((B, DOT))
    known = fn.log_prob(value)
    free = run(infill, "ab.", "ab", given={"z": Given(value)})
    assert torch.equal(free.sites["z"]["value"], value)
    assert float(free.sites["z"]["log_prob"]) == pytest.approx(float(known), abs=1e-5)
    y = float(free.sites["y"]["log_prob"])
    assert free.take_log_weight() == pytest.approx(float(known) + y, abs=1e-5)
    proposed = run(
        infill, "ab.", "ab", given={"z": Given(value, proposal_log_prob=torch.tensor(-1.25))}
    )
    assert proposed.take_log_weight() == pytest.approx(float(known) + y + 1.25, abs=1e-5)


def test_a_batch_of_texts_in_a_vectorised_plate_serves_itself():
    def program():
        with pyro.plate("lines", 2):
            return pyro.sample("z", LMText.batch(LM, ["a", "b"], max_tokens=2))

    particle = run(program)
    assert particle.returned.shape == (2, 2)
    assert float(particle.sites["z"]["log_prob_sum"]) == pytest.approx(
        float(particle.trace.log_prob_sum()), abs=1e-5
    )


def test_conditioned_strings_are_observed_within_a_particle():
    particle = run(pyro.condition(infill, data={"z": "ba"}), "ab.", "ab")
    assert particle.sites["z"]["is_observed"] and particle.returned == "ba"
    assert particle.sites["z"]["value"].tolist() == [B, A, EOS] and not particle.latents


# --- random streams ---


def test_a_seed_fixes_the_run_and_nothing_else_does():
    def program():
        first = pyro.sample("u", dist.Normal(0.0, 1.0))
        z = lm_sample("z", "ab", max_tokens=6)
        last = pyro.sample("v", dist.Normal(0.0, 1.0))
        return float(first), z.token_ids, float(last)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    alone = run(program, seed=3).returned
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    together = runtime.start(program, (), 5, seed=8)
    same = Particle(program, (), seed=3)
    same.resume()
    runtime.run_to_end([*together, same])
    assert same.returned == alone
    assert len({particle.returned for particle in together}) == 5


def test_streams_belong_to_slots_and_not_to_ancestors():
    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        lm_sample("w", [z, "a"], max_tokens=8)
        return float(pyro.sample("u", dist.Normal(0.0, 1.0)))

    particles = runtime.start(program, (), 4, seed=0)
    runtime.serve_draws(particles)  # z
    ancestor = particles[0]
    forks = [ancestor.fork(streams=particle) for particle in particles]
    twins = [ancestor.fork(), ancestor.fork()]
    for fork in forks:
        assert torch.equal(fork.sites["z"]["value"], ancestor.sites["z"]["value"])
    runtime.run_to_end([*forks, *twins, ancestor])
    assert len({fork.returned for fork in forks}) == 4  # not one stream four times
    assert [fork.slot for fork in forks] == [0, 1, 2, 3]
    assert forks[0].returned == twins[0].returned == twins[1].returned  # one slot, one stream
    other = particles[1].fork(streams=particles[2])  # another ancestor, the same slot
    runtime.run_to_end([other])
    assert other.returned == forks[2].returned
    for particle in particles:
        particle.close()


# --- forks ---


def test_a_fork_does_not_call_tools_or_score_again():
    calls = itertools.count()

    def program():
        count = tool("count", lambda: next(calls))
        z = lm_sample("z", "ab", max_tokens=2)
        lm_sample("y", [z, "a"], obs="b")
        same = tool("same", lambda: [count, next(calls)])
        w = lm_sample("w", [z, "b"], max_tokens=2)
        return count, same, z, w

    particle = Particle(program, seed=0)
    particle.resume()
    runtime.serve_draws([particle])
    runtime.run_to_draws([particle])
    assert particle.waiting is not None and particle.waiting.name == "w"
    scored = LM.tokens_scored
    forks = [particle.fork() for _ in range(3)]
    assert LM.tokens_scored == scored and next(calls) == 2
    assert all(fork.waiting is not None and fork.waiting.name == "w" for fork in forks)
    runtime.run_to_end([particle, *forks])
    for fork in forks:
        assert fork.returned[:3] == particle.returned[:3] == (0, [0, 1], particle.returned[2])
        assert fork.sites["y"]["log_prob"] is particle.sites["y"]["log_prob"]
        assert fork.take_log_weight() == 0.0  # what was recorded was taken by its ancestor
        assert fork.log_joint == pytest.approx(float(fork.trace.log_prob_sum()), abs=1e-5)


def test_forks_go_on_on_their_own():
    def program():
        z = lm_sample("z", "ab", max_tokens=1)
        return lm_sample("w", [z, "a"], max_tokens=1)

    particle = Particle(program, seed=0)
    particle.resume()
    fn = LMText(LM, "ab", max_tokens=1)
    forks = [particle.fork(given={"z": Given(fn.value((t,)))}) for t in range(3)]
    runtime.run_to_end(forks)
    assert [fork.sites["z"]["value"].tolist() for fork in forks] == [[0], [1], [2]]
    assert [fork.sites["w"]["fn"].prefix_ids for fork in forks] == [(0, A), (1, A), (2, A)]
    assert not particle.finished and "z" not in particle.sites
    particle.close()


OTHER = tiny_lm(["a", "b", "ab", "."], seed=0)
OTHER.model.requires_grad_(False)


def text_of(n):
    """The string "ab", as two tokens or as one."""
    fn = LMText(OTHER, "a", max_tokens=2)
    return fn.text(torch.tensor([[0, 1], [2, 4]][n]))


def diverging(change):
    """A program that is another one on its second run."""
    runs = itertools.count()

    def program():
        change(next(runs))
        lm_sample("last", "ab", max_tokens=1)

    return program


def sites(*names):
    for name in names:
        lm_sample(name, "ab", max_tokens=1)


DIVERGENCES = {
    "another site": (lambda n: sites("z" if n == 0 else "w"), "met site 'w' before .* 'z'"),
    "another order": (
        lambda n: sites(*(("c", "b", "a") if n == 0 else ("b", "c", "a"))),
        None,
    ),
    "an added site": (
        lambda n: sites(*(("z", "w") if n == 0 else ("x", "z", "w"))),
        "met site 'x' before .* 'z'",
    ),
    "another prefix": (lambda n: lm_sample("z", "ab"[n:], max_tokens=1), "at site 'z'"),
    "another length": (lambda n: lm_sample("z", "ab", max_tokens=1 + n), "at site 'z'"),
    "another stop": (lambda n: lm_sample("z", "ab", max_tokens=1, stop=".b"[n]), "at site 'z'"),
    "another temperature": (
        lambda n: lm_sample("z", "ab", max_tokens=1, temperature=1.0 + n),
        "at site 'z'",
    ),
    "other choices": (lambda n: lm_sample("z", "ab", choices=["a", "b."[n:]]), "at site 'z'"),
    "another observation": (lambda n: lm_sample("y", "ab", obs="ab"[n]), "at site 'y'"),
    "a longer observation": (lambda n: lm_sample("y", "ab", obs="ab"[n:]), "at site 'y'"),
    "observed or not": (
        lambda n: lm_sample("z", "ab", max_tokens=1, obs=None if n == 0 else "a"),
        "at site 'z'",
    ),
    "another distribution": (
        lambda n: pyro.sample("u", dist.Normal(0.0, 1.0 + n)),
        "at site 'u'",
    ),
    "another kind": (
        lambda n: pyro.sample("u", dist.Normal(0.0, 1.0)) if n == 0 else tool("u", int),
        "at site 'u'",
    ),
    "another numeric observation": (
        lambda n: pyro.sample("u", dist.Normal(0.0, 1.0), obs=torch.tensor(float(n))),
        "at site 'u'",
    ),
    "another scale": (
        lambda n: poutine.scale(lm_sample, 1.0 + n)("z", "ab", max_tokens=1),
        "at site 'z' .* scale=2.0, and the recorded one had scale=1.0",
    ),
    "another scale of a factor": (
        lambda n: poutine.scale(pyro.factor, torch.tensor(1.0 + n))("f", torch.tensor(1.0)),
        "at site 'f' .* scale=",
    ),
    "another mask": (
        lambda n: poutine.mask(lm_sample, n == 0)("y", "ab", obs="a"),
        "at site 'y' .* mask=False, and the recorded one had mask=True",
    ),
    "another model": (
        lambda n: lm_sample("z", "ab", max_tokens=1, lm=[LM, OTHER][n]),
        "at site 'z'",
    ),
    "the same string in other tokens": (
        lambda n: lm_sample("z", ["a", text_of(n)], max_tokens=1, lm=OTHER),
        "at site 'z'",
    ),
    "an observation in other tokens": (
        lambda n: lm_sample("y", "a", obs=text_of(n), max_tokens=3, lm=OTHER),
        "at site 'y'",
    ),
    "another factor": (lambda n: pyro.factor("f", torch.tensor(float(n))), "at site 'f'"),
}


class Shown(poutine.messenger.Messenger):
    """A handler that the runtime knows nothing of."""

    def _pyro_sample(self, msg):
        msg["infer"]["shown"] = True


HANDLERS = {
    "none": (contextlib.nullcontext, True),
    "scale": (lambda: poutine.scale(scale=0.5), True),
    "mask": (lambda: poutine.mask(mask=True), True),
    "scale by a tensor": (lambda: poutine.scale(scale=torch.tensor(0.5)), False),
    "a handler of the program's own": (Shown, False),
    "condition": (lambda: poutine.condition(data={"w": "ab"}), False),
}


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_fork_gets_the_recorded_texts_of_equal_calls_at_once(handler, monkeypatch):
    make, at_once = HANDLERS[handler]
    visited = []
    site = primitives._site
    monkeypatch.setattr(
        primitives, "_site", lambda name, *a: visited.append(name) or site(name, *a)
    )

    def program(prefix):
        with make():
            z = lm_sample("z", prefix, max_tokens=2, stop=["."])
            for i in pyro.plate("lines", 2):
                prefix.append(lm_sample(f"y{int(i)}", [z + "a", *prefix], obs="ba"))
            w = lm_sample("w", prefix, choices=["ab", "b"], infer={"guide_prompt": "a"})
        return z, w, *prefix, lm_sample("last", [w, z], max_tokens=2)

    particle = runtime.start(program, (["ab."],), 1, seed=0)[0]
    while particle.waiting is not None and particle.waiting.name != "last":
        runtime.serve_draws([particle])
        runtime.run_to_draws([particle])
    visited.clear()
    fork = particle.fork()
    again = fork.fork()
    assert visited == (["last"] if at_once else ["z", "y0", "y1", "w", "last"]) * 2
    runtime.run_to_end([particle, fork, again])
    for run in (fork, again):
        assert run.returned == particle.returned
        assert list(run.trace.nodes) == list(particle.trace.nodes)
        assert run.log_joint == particle.log_joint
        for name, node in particle.sites.items():
            for key in ("value", "log_prob", "scale"):
                assert torch.equal(
                    torch.as_tensor(run.sites[name][key]), torch.as_tensor(node[key])
                )
        assert run.trace.copy().nodes["z"] is particle.sites["z"]
        prune_subsample_sites(run.trace).log_prob_sum()  # the graph has all sites


def test_a_factor_that_is_a_number_has_one_distribution_in_all_runs():
    total = torch.tensor(0.0)
    weights = torch.tensor([0.5, -0.5], requires_grad=True)

    def program():
        total.zero_()
        for i in range(3):
            total.add_(0.25 + i)  # in place: the sites before keep their numbers
            pyro.factor(f"number-{i}", total)
        pyro.factor("double", torch.tensor(0.25, dtype=torch.float64))
        pyro.factor("batch", torch.tensor([0.25, 0.5]))
        pyro.factor("float", 0.25)
        pyro.factor("grad", weights.sum())
        with poutine.scale(scale=2.0):
            pyro.factor("scaled", torch.tensor(0.25))
        unit = dist.Unit(torch.tensor(3.0))
        assert unit.sample((2,)).shape == (2, 0) and unit.expand((2,)).batch_shape == (2,)
        lm_sample("z", "a", max_tokens=2)
        pyro.factor("after", torch.tensor(0.25))

    particle = Particle(program, seed=0)
    particle.resume()
    fork = particle.fork()
    runtime.run_to_end([particle, fork])
    log_probs = {name: node["log_prob_sum"].item() for name, node in fork.sites.items()}
    assert log_probs.pop("z") < 0
    assert log_probs == {
        "number-0": 0.25, "number-1": 1.5, "number-2": 3.75, "double": 0.25, "batch": 0.75,
        "float": 0.25, "grad": 0.0, "scaled": 0.5, "after": 0.25,
    }  # fmt: skip
    assert fork.sites["double"]["log_prob_sum"].dtype == torch.float64
    assert all(site_is_factor(node) for name, node in fork.sites.items() if name != "z")
    assert (
        particle.sites["after"]["fn"] is fork.sites["after"]["fn"] is fork.sites["number-0"]["fn"]
    )
    assert pickle.loads(pickle.dumps(fork.sites["after"]["fn"])).log_factor == 0.25
    assert type(fork.sites["scaled"]["fn"]) is dist.Unit
    assert fork.sites["after"]["fn"].expand((3,)).log_factor.tolist() == [0.25] * 3
    assert not COERCIONS, "outside of a run Pyro is as it was"
    with pytest.raises(ValueError, match="log_factor"):
        run(lambda: pyro.factor("f", torch.tensor(math.nan)))


def test_what_a_call_was_given_may_change_after_it():
    """The list of stop strings, and that of the prefix, are the program's own."""

    def program():
        stops, prefix, choices = ["."], ["ab."], ["ab", "b"]
        z = lm_sample("z", prefix, max_tokens=2, stop=stops)
        stops.append("b")
        prefix.append(z)
        c = lm_sample("c", prefix, choices=choices)
        choices.append("a.")
        prefix.append(c)
        return lm_sample("w", prefix, max_tokens=2, stop=stops)

    particle = runtime.start(program, (), 1, seed=0)[0]
    for _ in range(2):
        runtime.serve_draws([particle])
    fork = particle.fork()
    runtime.run_to_end([particle, fork])
    assert fork.returned == particle.returned and fork.returned.token_ids


def test_particles_share_the_distributions_of_equal_calls_and_no_others():
    def program():
        z = lm_sample("z", "ab", max_tokens=3, temperature=3.0)
        lm_sample("w", ["ab", z], max_tokens=2)

    particles = runtime.start(program, (), 8, seed=0)
    assert len({id(p.waiting.fn) for p in particles}) == 1
    runtime.run_to_end(particles)
    fns = {p.sites["w"]["fn"].prefix_ids: p.sites["w"]["fn"] for p in particles}
    assert len(fns) > 1
    assert all(p.sites["w"]["fn"] is fns[p.sites["w"]["fn"].prefix_ids] for p in particles)

    def equal_strings(n):
        return lm_sample("w", ["a", text_of(n)], max_tokens=1, lm=OTHER)

    shared: dict = {}
    both = [Particle(equal_strings, (n,), seed=0, shared=shared) for n in range(2)]
    for particle in both:
        particle.resume()
    assert both[0].waiting.fn.prefix_ids != both[1].waiting.fn.prefix_ids
    for particle in both:
        particle.close()


def test_a_run_that_has_ended_is_freed_at_once():
    particle = run(infill, "ab.", "ab")
    trace, ended = particle.trace, weakref.ref(particle)
    gc.collect()
    gc.disable()
    try:
        del particle
        assert ended() is None and "z" in trace.nodes
    finally:
        gc.enable()


@pytest.mark.parametrize("change", DIVERGENCES)
def test_a_replay_that_diverges_names_the_site(change):
    fn, message = DIVERGENCES[change]
    particle = Particle(diverging(fn), seed=0)
    particle.resume()
    while particle.waiting is not None and particle.waiting.name != "last":
        runtime.run_to_draws([particle])
        if particle.waiting.name != "last":
            runtime.serve_draws([particle])
    if message is None:  # the order of sites that do not depend on each other is no matter
        particle.fork().close()
    else:
        with pytest.raises(ReplayError, match=message) as caught:
            particle.fork()
        assert "deterministic" in str(caught.value) and "lmppl.tool" in str(caught.value)
    particle.close()


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (lambda n: lm_sample("w", "ab"[n:], max_tokens=1), "at site 'w'"),
        (lambda n: lm_sample("w", "ab", max_tokens=1 + n), "at site 'w'"),
        (lambda n: lm_sample("wv"[n], "ab", max_tokens=1), "met site 'v' instead of 'w'"),
        (lambda n: n or lm_sample("w", "ab", max_tokens=1), "ended before site 'w'"),
    ],
)
def test_a_fork_that_comes_to_another_site_than_its_ancestor_waits_at(site, message):
    """Else values of one distribution would count as those of another."""
    runs = itertools.count()

    def program():
        lm_sample("z", "ab", max_tokens=1)
        site(next(runs))

    particle = Particle(program, seed=0)
    particle.resume()
    runtime.serve_draws([particle])
    with pytest.raises(ReplayError, match=message):
        particle.fork()
    particle.close()


def test_a_replay_that_ends_early_names_the_first_site_that_is_missing():
    runs = itertools.count()

    def program():
        if next(runs) == 0:
            sites("z", "a")

    particle = Particle(program, seed=0)
    particle.resume()
    runtime.run_to_end([particle])
    again = Particle(program, seed=0, replay=runtime.Replay(particle.sites, particle.calls))
    with pytest.raises(ReplayError, match="ended before site 'z'"):
        again.resume()


def test_a_finished_run_is_shared_and_not_run_again():
    particle = run(lambda: sites("z"))
    fork = particle.fork()
    assert fork.finished and fork.sites["z"] is particle.sites["z"]


# --- hard conditions ---


def test_nothing_after_a_failed_require_runs():
    after = []

    def program(ok):
        try:
            require("before", True)
            z = lm_sample("z", "ab", max_tokens=2)
            require("wanted", ok)
            after.append(z)
            lm_sample("w", [z, "b"], max_tokens=2)
        except Exception:  # a program's own handler does not swallow it
            after.append("swallowed")

    particle = run(program, False)
    assert particle.finished and particle.rejected_by == particle.killed_by == "wanted"
    assert after == [] and particle.take_log_weight() == -math.inf
    assert list(particle.sites) == ["before", "z", "wanted"]
    assert run(program, True).rejected_by is None and len(after) == 1


def test_a_rejecting_tool_stops_the_particle():
    def program():
        tool("parse", lambda: int("x"), on_error="reject")
        pytest.fail("it went on")

    particle = run(program)
    assert particle.rejected_by == "parse" and particle.log_joint == -math.inf
    assert isinstance(particle.sites["parse"]["value"].error, ValueError)


def test_an_infinite_factor_does_not_stop_the_program():
    def program():
        pyro.factor("no", torch.tensor(-math.inf))
        return "here"

    particle = run(program)
    assert particle.returned == "here" and particle.killed_by == "no"
    assert particle.rejected_by is None and particle.take_log_weight() == -math.inf


# --- errors ---


def test_an_exception_keeps_its_type_and_tells_site_and_text():
    class Mine(Exception):
        pass

    def program():
        z = lm_sample("z", "ab", max_tokens=2, stop=".")
        pyro.sample("u", dist.Delta(torch.tensor(2.5)))
        raise Mine(z)

    with pytest.raises(Mine) as caught:
        run(program, slot=7)
    (note,) = caught.value.__notes__
    z = str(caught.value.args[0])
    assert (
        note == f"raised in particle 7 of program(), at or after site 'u'; so far: z={z!r}, u=2.5"
    )


def test_an_exception_before_the_first_site_and_in_a_tool():
    with pytest.raises(ZeroDivisionError) as caught:
        run(lambda: 1 / 0)
    assert "before its first site" in caught.value.__notes__[0]

    def program():
        z = lm_sample("z", "ab", max_tokens=1)
        tool("broken", {}.__getitem__, z)

    with pytest.raises(KeyError) as caught:
        run(program)
    assert "site 'broken'" in caught.value.__notes__[0] and "z=" in caught.value.__notes__[0]


def test_a_name_used_twice():
    with pytest.raises(ValueError, match=r"site 'z' is used twice.*f'z_\{i\}'"):
        run(lambda: sites("z", "z"))


@pytest.mark.parametrize("mask", [False, torch.tensor(False)])
def test_a_masked_latent_is_refused(mask):
    def program():
        with poutine.mask(mask=mask):
            lm_sample("z", "ab", max_tokens=1)

    with pytest.raises(ValueError, match="site 'z' is latent and masked out"):
        run(program)


def test_a_latent_in_a_subsampled_plate_is_refused():
    def program(size):
        for i in pyro.plate("lines", 3, subsample_size=size):
            lm_sample(f"z{int(i)}", "ab", max_tokens=1)

    with pytest.raises(ValueError, match=r"subsampled plate 'lines' \(2 of 3\)"):
        run(program, 2)
    assert len(run(program, 3).latents) == 3


def test_observations_in_a_subsampled_plate_are_scaled():
    def program():
        for i in pyro.plate("data", 4, subsample_size=2):
            lm_sample(f"y{int(i)}", "ab", obs="a")

    one = float(naive_log_prob(LM, LM.encode("ab"), (A,)).sum())
    assert run(program).take_log_weight() == pytest.approx(4 * one, abs=1e-4)


# --- ends ---


def test_an_abandoned_particle_cleans_up_in_its_own_state():
    seen = []

    def program():
        with poutine.scale(scale=2.0):
            try:
                lm_sample("z", "ab", max_tokens=2)
            finally:
                seen.append(len(poutine.runtime._PYRO_STACK))

    with torch.enable_grad():
        particle = Particle(program, seed=0)
        particle.resume()
        particle.close()
        assert seen == [2] and torch.is_grad_enabled()
    assert particle.finished and not poutine.runtime._PYRO_STACK


def test_all_are_closed_when_an_engine_leaves_even_if_one_fails_to():
    closed = []

    def program(k):
        try:
            lm_sample("z", "ab", max_tokens=2)
        finally:
            closed.append(k)
            if k == 0:
                raise OSError("disk full")

    particles = [Particle(program, (k,), seed=k) for k in range(3)]
    for particle in particles:
        particle.resume()
    with pytest.raises(OSError, match="disk full"), runtime.ending(particles):
        raise KeyboardInterrupt
    assert closed == [0, 1, 2] and all(particle.finished for particle in particles)


def test_an_interrupt_is_not_masked_by_closing():
    particles = [Particle(lambda: sites("z"), seed=0)]
    particles[0].resume()
    with pytest.raises(KeyboardInterrupt), runtime.ending(particles):
        raise KeyboardInterrupt
    assert particles[0].finished
