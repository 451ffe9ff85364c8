"""Forks: a run that repeats what another recorded, and says where it does not."""

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
from particle_helpers import infill, run, sites
from pyro import poutine
from pyro.distributions.distribution import COERCIONS
from pyro.poutine.util import prune_subsample_sites, site_is_factor

import lmppl
from lmppl import LMText, ReplayError, lm_sample, primitives, runtime, tool
from lmppl.constraints import Constraint
from lmppl.primitives import _warned
from lmppl.runtime import Given, Particle
from lmppl.testing import tiny_lm

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
    for repeated in (fork, again):
        assert repeated.returned == particle.returned
        assert list(repeated.trace.nodes) == list(particle.trace.nodes)
        assert repeated.log_joint == particle.log_joint
        for name, node in particle.sites.items():
            for key in ("value", "log_prob", "scale"):
                assert torch.equal(
                    torch.as_tensor(repeated.sites[name][key]), torch.as_tensor(node[key])
                )
        assert repeated.trace.copy().nodes["z"] is particle.sites["z"]
        prune_subsample_sites(repeated.trace).log_prob_sum()  # the graph has all sites


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


class Anything(Constraint):
    def __init__(self):
        self.seen = []  # by which it equals itself alone

    def allows(self, prefix):
        return True


@pytest.mark.filterwarnings("ignore:.*asked about every token")
def test_a_constraint_that_every_run_makes_anew_is_another_one():
    def program(x):
        z = lm_sample("z", x, max_tokens=2, constraint=Anything())
        lm_sample("w", [x, z], max_tokens=1)

    with pytest.raises(ReplayError, match="'z'.* another constraint .* equals only itself: make"):
        lmppl.infer(program, "a", method="exact")
