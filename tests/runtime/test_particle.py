"""Particles: one run of a program, what it records, and how it ends."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from particle_helpers import infill, run, sites
from pyro import poutine

import lmppl
from lmppl import LMText, lm_sample, require, runtime, tool
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


def test_at_scale_zero_only_what_is_possible_is_one():
    """0 times -inf: soft factors count as nothing, hard conditions and supports hold. (Pyro refuses 0
    itself, but for a tensor that it does not look into, and scales within scales.)"""

    def program(what, scale):
        with poutine.scale(scale=scale), poutine.scale(scale=scale):
            if what == "factor":
                pyro.factor("f", torch.tensor([-math.inf, 1.0]))
            elif what == "number":
                pyro.sample("n", dist.Uniform(0.0, 1.0), obs=torch.tensor(2.0))
            elif what == "latent":
                pyro.sample("z", dist.Uniform(0.0, 1.0, validate_args=False))
            elif what == "condition":
                require("r", False)
            elif what == "constrained":
                lm_sample("c", "a", max_tokens=2, regex="b", obs="a")
            else:
                lm_sample("t", "a", max_tokens=2, obs="a")

    given = {"z": Given(torch.tensor(2.0))}
    for scale in (1e-200, torch.tensor(0.0)):
        with pyro.validation_enabled(False):
            for what in ("factor", "number", "text"):
                assert run(program, what, scale).log_joint == 0.0, (what, scale)
            for what in ("latent", "condition", "constrained"):
                assert run(program, what, scale, given=given).log_joint == -math.inf, (what, scale)
    assert run(program, "factor", 0.5).log_joint == -math.inf


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
