"""What SMC remembers of its particles is what happened to them."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import small
import torch

import lmppl
from lmppl import lm_sample, require
from lmppl.engines.genealogy import Genealogy, _Tokens
from lmppl.report.particles import ParticleStep, survivors
from lmppl.runtime import log_mean_exp
from lmppl.testing import tiny_byte_lm, tiny_lm
from lmppl.testing.programs import CASES

LM = tiny_lm("ab.", seed=0)
CHAIN = CASES["observed text"]  # two texts, and an observation after each


def story(x):
    """Three texts, a number and a condition."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    z = lm_sample("z", x, max_tokens=4, stop=".")
    pyro.factor("taste", p * 2.0 * z.count("b"))
    w = lm_sample("w", [x, z], max_tokens=4, stop=".")
    require("an a", "a" in z or "a" in w)
    if "b" in w:
        v = lm_sample("v", [x, w], max_tokens=4, stop=".")
        pyro.factor("more taste", torch.tensor(1.0 * v.count("b")))


def infill(x, y):
    z = lm_sample("z", x, max_tokens=8, stop=".")
    lm_sample("y", [x, z], obs=y)
    return z


def infill_guide(x, y):
    lm_sample("z", x, max_tokens=8, stop=".", temperature=2.0)


def form(x):
    return lm_sample("z", x, max_tokens=8, regex=r"[ab]{3}\.[ab]\.?a")


def two_twisted(x):
    z = lm_sample("z", x, max_tokens=5, stop=".")
    lm_sample("w", [x, z], max_tokens=5, stop=".")


def many_bs(text):
    return 1.5 * text.count("b")


RUNS = {
    "chain": (CHAIN.program, CHAIN.args, {"ess_threshold": 1.0}),
    "never resampled": (CHAIN.program, CHAIN.args, {"ess_threshold": 0.0}),
    "story": (story, ("ab.",), {}),
    "some end early": (small.early_end, small.ARGS, {"ess_threshold": 1.0}),
    "choices": (small.three_sites, small.ARGS, {"ess_threshold": 1.0}),
    "twist": (infill, ("ab.", "aba"), {"twist": many_bs, "ess_threshold": 0.9}),
    "two twisted": (two_twisted, ("ab.",), {"twist": many_bs, "ess_threshold": 0.9}),
    "constraint": (form, ("ab.",), {"ess_threshold": 0.9}),
    "twisted guide": (
        infill, ("ab.", "aba"), {"twist": many_bs, "ess_threshold": 0.9, "guide": infill_guide}
    ),
    "guide": (
        small.three_sites, small.ARGS, {"guide": small.three_sites_backwards, "ess_threshold": 1.0}
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("run", RUNS)


def infer(run, seed=0, **options):
    program, args, own = RUNS[run]
    lm = small.small_lm() if args is small.ARGS else LM
    options = {"num_samples": 24, "lm": lm, "method": "smc", "seed": seed} | own | options
    return lmppl.infer(program, *args, **options)


def check(posterior):
    """Raises an ``AssertionError`` if the record contradicts itself, or the posterior."""
    steps, num = posterior.particles, len(posterior)
    last = steps[-1]
    assert torch.equal(last.log_weights, posterior.log_weights)
    assert last.log_evidence == pytest.approx(posterior.log_evidence)
    assert not last.is_resampled and last.ess == pytest.approx(posterior.ess)
    for i, trace in enumerate(posterior.traces):
        expected = {name: posterior[name][i] for name in posterior.latents if name in trace.nodes}
        assert dict(last.values[i]) == expected
    assert sum(step.is_resampled for step in steps) == posterior.info["resamplings"]
    for step in steps:
        assert len(step.values) == len(step.ancestors) == num
        assert float(step.weights.sum()) == pytest.approx(1.0)
        assert step.is_resampled or step.ancestors == tuple(range(num))
        assert 0 < step.ess <= step.num_compared <= num
        assert step.ess < step.num_compared or not step.is_resampled
        # No copy of what has no weight, but that whose own slot is taken by nobody.
        lost = {slot for slot in range(num) if not step.weights[slot]}
        assert not step.is_resampled or not lost.intersection(step.ancestors)
    for slot in range(num):
        now = last.values[slot]
        for step in reversed(steps[:-1]):
            slot = step.ancestors[slot]
            before = step.values[slot]
            assert before.keys() <= now.keys()
            for name, value in before.items():
                if isinstance(value, str):
                    assert now[name].startswith(value), (name, value, now[name])
                else:
                    assert torch.equal(now[name], value)
            now = before
    sites = dict.fromkeys(name for step in steps for name in step.sites)
    assert sorted(sites) == sorted(posterior.latents)


@EACH
def test_the_record_agrees_with_itself_and_the_posterior(run):
    posterior = infer(run)
    check(posterior)
    if run != "never resampled":
        assert posterior.info["resamplings"] > 0
    tokens = [step.num_tokens for step in posterior.particles]
    assert any(tokens) == ("twist" in run or run == "constraint")


def test_what_particles_weigh_is_what_their_lineages_observed():
    """By the log-probabilities of the final traces, which SMC did not compute from the record."""
    posterior = infer("chain", num_samples=40)
    first, last = posterior.particles
    assert first.is_resampled and (first.sites, last.sites) == (("z",), ("w",))
    names = [name for name in posterior.sites if name not in posterior.latents]
    assert len(names) == 2
    for i, trace in enumerate(posterior.traces):
        at_first, at_last = (float(trace.nodes[name]["log_prob_sum"]) for name in names)
        assert float(first.log_weights[first.ancestors[i]]) == pytest.approx(at_first, abs=1e-5)
        increment = float(last.log_weights[i]) - log_mean_exp(first.log_weights)
        assert increment == pytest.approx(at_last, abs=1e-5)
    increments = [first.log_evidence, last.log_evidence - first.log_evidence]
    assert sum(increments) == pytest.approx(posterior.log_evidence)
    assert first.ess == pytest.approx(float(1 / (first.weights**2).sum()))


@EACH
def test_nothing_depends_on_the_record(run, monkeypatch):
    """Neither the samples, nor their weights, nor a random stream."""
    torch.manual_seed(0)
    recorded, after = infer(run), torch.rand(())
    monkeypatch.setattr(Genealogy, "at_barrier", lambda *args: None)
    monkeypatch.setattr(Genealogy, "within_texts", lambda *args: None)
    torch.manual_seed(0)
    plain = infer(run)
    assert torch.equal(recorded.log_weights, plain.log_weights) and torch.equal(
        after, torch.rand(())
    )
    for name in plain.latents:
        values = zip(recorded[name], plain[name], strict=True)
        assert all(a is b is None or bool((torch.as_tensor(a == b)).all()) for a, b in values)


# --- mutants: a wrong record is found -------------------------------------------------------------


def forget_ancestors(patch):
    def mutant(self, *args):
        whole(self, *args[:-1], None if args[-1] is None else range(len(args[4])))

    whole = Genealogy._add
    patch.setattr(Genealogy, "_add", mutant)


def turn_ancestors_round(patch):
    def mutant(self, *args):
        whole(self, *args[:-1], None if args[-1] is None else args[-1][::-1])

    whole = Genealogy._add
    patch.setattr(Genealogy, "_add", mutant)


def deny_resamplings(patch):
    init = ParticleStep.__init__

    def mutant(self, **facts):
        init(self, **facts | {"is_resampled": False})

    patch.setattr(ParticleStep, "__init__", mutant)


def follow_nobody(patch):
    """What is known of a slot stays there when its particle has become another."""
    whole = Genealogy._add

    def mutant(self, *args):
        before = self._seen
        whole(self, *args)
        self._seen = before

    patch.setattr(Genealogy, "_add", mutant)


def begin_texts_anew(patch):
    init = _Tokens.__init__
    patch.setattr(
        _Tokens,
        "__init__",
        lambda self, vocabulary, ids, is_more=False: init(self, vocabulary, ids),
    )


def weigh_alike(patch):
    init = ParticleStep.__init__

    def mutant(self, log_weights, **facts):
        alike = torch.full_like(log_weights, log_mean_exp(log_weights))
        init(self, log_weights=alike, **facts)

    patch.setattr(ParticleStep, "__init__", mutant)


def leave_out_the_end(patch):
    whole = Genealogy.steps
    patch.setattr(Genealogy, "steps", lambda self: whole(self)[:-1])


@pytest.mark.parametrize(
    "mutate, run",
    [
        (forget_ancestors, "chain"),
        (forget_ancestors, "twist"),
        (turn_ancestors_round, "chain"),
        (deny_resamplings, "chain"),
        (follow_nobody, "twist"),
        (begin_texts_anew, "twist"),
        (weigh_alike, "chain"),
        (leave_out_the_end, "chain"),
    ],
)
def test_a_wrong_record_is_found(mutate, run, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        check(infer(run))


# --- what it costs --------------------------------------------------------------------------------


def held(value, seen):
    """All objects that one holds, but for vocabularies."""
    if id(value) in seen or isinstance(value, (type(LM.vocabulary), str, int, float, type(None))):
        return
    seen[id(value)] = value
    parts = vars(value).values() if hasattr(value, "__dict__") else ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    for part in [] if torch.is_tensor(value) else parts:
        held(part, seen)


@pytest.mark.parametrize("run", ["twist", "two twisted", "chain", "story"])
def test_it_holds_tokens_and_numbers_and_no_more_than_were_drawn(run):
    posterior = infer(run, ess_threshold=1.0)
    genealogy = posterior.genealogies[0].__self__
    held(genealogy, found := {})
    kinds = {type(value) for value in found.values()}
    assert kinds == {Genealogy, ParticleStep, _Tokens, list, tuple, dict, torch.Tensor}
    count = sum(len(value.ids) for value in found.values() if isinstance(value, _Tokens))
    assert 0 < count <= posterior.info["tokens_sampled"]


# --- edges ----------------------------------------------------------------------------------------


def test_moves_change_what_particles_have():
    posterior = infer("chain", rejuvenate=3)
    first, last = posterior.particles
    kept = [last.values[i]["z"] == first.values[a]["z"] for i, a in enumerate(first.ancestors)]
    assert not all(kept), "no move was accepted"
    for i in range(len(posterior)):
        assert last.values[i] == {name: posterior[name][i] for name in ("z", "w")}


def test_a_character_that_a_token_cuts_is_whole_in_the_end():
    lm = tiny_byte_lm(seed=1)

    def program():
        lm_sample("z", "a", max_tokens=6)

    options = {"lm": lm, "method": "smc", "num_samples": 24, "seed": 0, "ess_threshold": 1.0}
    posterior = lmppl.infer(program, **options, twist=lambda text: 0.7 * len(text))
    steps = posterior.particles
    cut = [value["z"] for step in steps[:-1] for value in step.values if "\ufffd" in value["z"]]
    assert cut
    assert [value["z"] for value in steps[-1].values] == posterior["z"]


def test_nothing_is_recorded_before_anything_has_happened():
    steps = infer("chain").particles
    assert steps[0].sites == ("z",)
    assert repr(steps[0]).startswith("ParticleStep(z: 24 particles, ESS ")


def test_a_number_that_is_drawn_first_is_a_step():
    first = infer("story").particles[0]
    assert first.sites == ("p",) and first.ess == first.num_compared == 24


def test_all_dead():
    def program(x):
        z = lm_sample("z", x, max_tokens=2)
        require("impossible", z == "nothing")

    with pytest.raises(lmppl.ZeroEvidenceError) as error:
        lmppl.infer(program, "ab.", lm=LM, method="smc", num_samples=6, seed=0)
    posterior = error.value.posterior
    (step,) = posterior.particles
    assert step.ess == 0.0 and not step.weights.any() and step.log_evidence == -math.inf
    assert survivors([step]) == [set()]
    assert [value["z"] for value in step.values] == posterior["z"]


def test_copies_and_draws_of_a_posterior_have_it_too():
    posterior = infer("chain")
    for other in (copy.copy(posterior), copy.deepcopy(posterior), posterior.resample(5, seed=0)):
        assert [step.ancestors for step in other.particles] == [
            step.ancestors for step in posterior.particles
        ]


def test_posteriors_of_a_batch_have_their_own():
    inputs = [("ab.", "aba"), ("b.", "ab")]
    options = {"lm": LM, "method": "smc", "twist": many_bs, "num_samples": 8, "seed": 0}
    for posterior in lmppl.infer_batch(infill, inputs, **options):
        check(posterior)


def test_others_say_why_they_have_none(tmp_path):
    posterior = lmppl.infer(infill, "ab.", "aba", lm=LM, method="importance", num_samples=4, seed=0)
    with pytest.raises(ValueError, match=r"by importance has no record .* method='smc'"):
        posterior.particles  # noqa: B018
    infer("chain").save(tmp_path / "chain")
    loaded = lmppl.Posterior.load(tmp_path / "chain")
    assert not loaded.info["notes"], "it is no part of info, that would miss it"
    for ask in (lambda: loaded.particles, loaded.plot_particles, loaded.particles_html):
        with pytest.raises(ValueError, match=r"particles_html\(path\) before posterior.save"):
            ask()
