"""infer: one function in front of all engines."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import SMC, LMText, Posterior, Text, lm_sample, require, tool
from lmppl.engines import ENGINES
from lmppl.guides.program import PriorProposer
from lmppl.primitives import _warned, default_lm
from lmppl.runtime import Given
from lmppl.testing import enumerate_program, tiny_lm, total_variation

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)
SAMPLERS = ["importance", "smc"]


@pytest.fixture(autouse=True)
def _fresh_state():
    _warned.clear()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    assert not poutine.runtime._PYRO_STACK


def infill(x: str, y: str | None = None) -> Text:
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], max_tokens=3, obs=y)
    return z


@functools.cache
def exact_infill():
    return enumerate_program(infill, "ab.", "ab", lm=LM)


@pytest.mark.parametrize("method", ["exact", *SAMPLERS])
def test_the_method_is_the_only_word_that_changes(method):
    exact = exact_infill()
    posterior = lmppl.infer(infill, "ab.", "ab", lm=LM, method=method, num_samples=400, seed=1)
    assert isinstance(posterior, Posterior) and posterior.latents == ["z"]
    tolerance = 1e-4 if method == "exact" else 0.3
    assert posterior.log_evidence == pytest.approx(exact.log_evidence, abs=tolerance)
    distance = total_variation(exact.posterior("z", text=True), posterior.probs("z"))
    assert distance < (1e-4 if method == "exact" else 0.25)
    assert posterior.returns == posterior["z"]
    assert posterior.info["engine"] == method


@pytest.mark.parametrize("method", SAMPLERS)
def test_seeds_reproduce(method):
    def tokens(seed):
        posterior = lmppl.infer(infill, "ab.", "ab", lm=LM, method=method, num_samples=8, seed=seed)
        return [z.token_ids for z in posterior["z"]], posterior.log_weights.tolist()

    before = torch.get_rng_state()
    first = tokens(5)
    assert torch.equal(before, torch.get_rng_state())  # a seeded run leaves torch's stream alone
    torch.manual_seed(99)
    assert tokens(5) == first and tokens(6) != first
    pyro.set_rng_seed(3)
    free = tokens(None)
    assert tokens(None) != free
    pyro.set_rng_seed(3)
    assert tokens(None) == free


def test_engine_objects_and_options_are_the_same():
    by_name = lmppl.infer(
        infill, "ab.", "ab", lm=LM, method="smc", ess_threshold=1.0, num_samples=8, seed=0
    )
    by_object = lmppl.infer(
        infill, "ab.", "ab", lm=LM, method=SMC(ess_threshold=1.0), num_samples=8, seed=0
    )
    assert by_name["z"] == by_object["z"]
    assert by_name.log_weights.tolist() == by_object.log_weights.tolist()


def test_engines_run_on_their_own_under_use():
    with lmppl.use(LM):
        posterior = lmppl.Importance().run(infill, "ab.", "ab", num_samples=4, seed=0)
    assert len(posterior) == 4


def test_keyword_arguments_are_bound_with_partial():
    program = functools.partial(infill, y="ab")
    posterior = lmppl.infer(program, "ab.", lm=LM, method="exact")
    assert posterior.log_evidence == pytest.approx(exact_infill().log_evidence, abs=1e-4)


def test_the_model_of_a_site_goes_before_that_of_infer_and_that_before_use():
    other, third = tiny_lm("ab.", seed=3), tiny_lm("ab.", seed=4)

    def program():
        lm_sample("z", "ab", max_tokens=1)
        lm_sample("w", "ab", max_tokens=1, lm=third)

    with lmppl.use(other):
        default = lmppl.infer(program, method="importance", num_samples=1)
        given = lmppl.infer(program, method="importance", num_samples=1, lm=LM)
        assert default_lm() is other
    models = [[p.traces[0].nodes[name]["fn"].lm for name in ("z", "w")] for p in (default, given)]
    assert models == [[other, third], [LM, third]]


def test_a_registered_engine_has_a_name():
    class Mine:
        name = "mine"

        def __init__(self, power: float = 1.0) -> None:
            self.power = power

        def run(self, model, *args, **options):
            assert self.power == 2.0
            return lmppl.Importance().run(model, *args, **options)

    lmppl.register_engine("mine", Mine)
    try:
        posterior = lmppl.infer(infill, "ab.", "ab", lm=LM, method="mine", power=2.0, num_samples=3)
        assert len(posterior) == 3
    finally:
        del ENGINES["mine"]


def test_callback_hears_of_every_stage():
    heard = []
    lmppl.infer(infill, "ab.", "ab", lm=LM, num_samples=4, callback=heard.append, progress=False)
    assert len(heard) == 2 and heard[-1]["finished"] == heard[-1]["of"] == 4
    assert all(each["engine"] == "smc" for each in heard)


@pytest.mark.parametrize("method", SAMPLERS)
def test_the_surroundings_are_as_before(method):
    with torch.enable_grad(), poutine.block(), lmppl.use(tiny_lm(seed=1)) as outer:
        stack = list(poutine.runtime._PYRO_STACK)
        lmppl.infer(infill, "ab.", "ab", lm=LM, method=method, num_samples=4)
        assert stack == poutine.runtime._PYRO_STACK and torch.is_grad_enabled()
        assert default_lm() is outer
    with torch.inference_mode():
        lmppl.infer(infill, "ab.", "ab", lm=LM, method=method, num_samples=4)
        assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_tool_is_called_once_a_particle_whatever_is_resampled(method):
    calls = itertools.count()

    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        shown = tool("show", lambda text: next(calls) and text or text, z)
        lm_sample("y", ["a", shown], obs="ba")
        w = lm_sample("w", ["b", shown], max_tokens=2)
        lm_sample("x", [w, "a"], obs="ba")

    lmppl.infer(program, lm=LM, method=method, num_samples=16, seed=0)
    assert next(calls) == 16


@pytest.mark.parametrize("method", SAMPLERS)
def test_rejected_particles_stop(method):
    after = []

    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        require("has b", "b" in z)
        after.append(z)

    posterior = lmppl.infer(program, lm=LM, method=method, num_samples=32, seed=0)
    assert after and all("b" in z for z in after)
    dead = posterior.killed["has b"]
    assert len(after) == 32 - dead and dead > 0
    assert all("b" in z for z in posterior.probs("z"))


def test_branches_show_none_where_a_site_is_not_reached():
    def program():
        z = lm_sample("z", "ab", max_tokens=1)
        if z == "a":
            lm_sample("w", "b", max_tokens=1)

    posterior = lmppl.infer(program, lm=LM, method="exact")
    reached = {z == "a": w is not None for z, w in zip(posterior["z"], posterior["w"], strict=True)}
    assert reached == {True: True, False: False}
    assert sum(posterior.probs("w").values()) == pytest.approx(1.0)


def test_a_guide_program_is_a_proposal():
    def guide(x, y):
        lm_sample("z", [x, "ab"], max_tokens=3, stop=".")

    exact = exact_infill()
    for method in SAMPLERS:
        posterior = lmppl.infer(
            infill, "ab.", "ab", lm=LM, method=method, guide=guide, num_samples=200, seed=2
        )
        assert posterior.log_evidence == pytest.approx(exact.log_evidence, abs=0.4)
        node = posterior.traces[0].nodes["z"]
        with torch.no_grad():
            proposal = LMText(LM, "ab.ab", max_tokens=3, stop=".").log_prob(node["value"])
        assert float(node["proposal_log_prob"]) == pytest.approx(float(proposal), abs=1e-4)


def test_a_guide_may_leave_latents_to_the_model_and_draw_others():
    def program(y):
        theta = pyro.sample("theta", dist.Bernoulli(0.3))
        z = lm_sample("z", "ab"[int(theta) :], max_tokens=1)
        lm_sample("y", [z, "a"], obs=y)

    def guide(y):
        pyro.sample("theta", dist.Bernoulli(0.8))

    exact = enumerate_program(program, "b", lm=LM)
    posterior = lmppl.infer(
        program, "b", lm=LM, method="importance", guide=guide, num_samples=600, seed=0
    )
    assert posterior.log_evidence == pytest.approx(exact.log_evidence, abs=0.15)
    theta = float(posterior.mean("theta"))
    truth = lmppl.infer(program, "b", lm=LM, method="exact").mean("theta")
    assert theta == pytest.approx(float(truth), abs=0.07)


@pytest.mark.parametrize("method", [*SAMPLERS, "gflownet"])
def test_a_guide_that_proposes_nothing_is_said(method):
    def guide(x, y):
        """It has forgotten its site."""

    with pytest.warns(UserWarning, match="the guide guide proposed nothing") as caught:
        posterior = lmppl.infer(
            infill, "ab.", "ab", lm=LM, method=method, guide=guide, num_samples=8, seed=0
        )
    assert len(caught) == 1
    assert [note for note in posterior.info["notes"] if "proposed nothing" in note]


def test_a_guide_whose_particles_all_died_has_proposed_something():
    def program():
        z = lm_sample("z", "ab", max_tokens=1, temperature=3.0)
        if "b" in z:
            lm_sample("w", "a", max_tokens=1)
        require("no b", "b" not in z)
        lm_sample("v", "a", max_tokens=1)

    class Guide(PriorProposer):
        """It draws ``w``, and leaves all else to the program."""

        draws = ()

        def propose(self, site, trace):
            if site["name"] == "w":
                self.draws = ("w",)
            return Given(site["fn"].encode("b")) if site["name"] == "w" else None

        def fork(self, streams):
            return self

    guide = SimpleNamespace(proposer_factory=lambda args: lambda slot, seed: Guide(program, args))
    posterior = lmppl.infer(program, lm=LM, guide=guide, num_samples=32, seed=0, ess_threshold=1.0)
    assert "w" not in posterior and not posterior.killed and not posterior.info["notes"]
