"""SMC: unbiased by enumeration of its choices, and its laws and edges."""

import math

import pyro
import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased
from proposals import PerfectGuide

import lmppl
from lmppl import lm_sample, require
from lmppl.engines.base import State
from lmppl.runtime import Particle
from lmppl.testing import tiny_lm, total_variation
from lmppl.testing.programs import CASES

ALL = pytest.mark.parametrize("case", CASES.values(), ids=str)
FINITE = [case for case in CASES.values() if case.quadrature is None]
SCHEMES = ["systematic", "stratified", "multinomial", "residual"]


def infer(program, *args, lm=None, **options):
    return lmppl.infer(program, *args, lm=lm or CASES["chain"].lm, method="smc", **options)


def infer_case(case, **options):
    return infer(case.program, *case.args, lm=case.lm, **options)


def twist(text):
    return 1.3 * text.count("b") - 0.4 * text.count("a")


# --- E[Z-hat * weighted indicator of z] = R(z), summed over all choices of the sampler ------------


@pytest.mark.parametrize("resampling", SCHEMES)
@pytest.mark.parametrize("threshold", [pytest.param(0.8, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("program", [small.two_sites, small.early_end, small.constraint])
def test_unbiased_by_enumeration(remembered, monkeypatch, program, threshold, resampling):
    check_unbiased(
        every_way(monkeypatch),
        program,
        small.ARGS,
        small.small_lm(),
        method="smc",
        num_samples=2,
        ess_threshold=threshold,
        resampling=resampling,
    )


@pytest.mark.parametrize(
    "program, guide",
    [
        (small.two_sites, small.two_sites_half),
        (small.three_sites, small.three_sites_backwards),
        (small.scaled, None),
        (small.scaled, small.two_sites_half),
        (small.ended_twice, None),
        (small.chosen, None),
        (small.with_tool, None),
    ],
)
def test_unbiased_by_enumeration_of_other_programs(remembered, monkeypatch, program, guide):
    check_unbiased(
        every_way(monkeypatch),
        program,
        small.ARGS,
        small.small_lm(),
        method="smc",
        guide=guide,
        num_samples=2,
        ess_threshold=1.0,
    )


@pytest.mark.filterwarnings("ignore:twist= names 'z'")  # of runs that all take the other branch
@pytest.mark.parametrize("its", ["lookahead", twist, {"z": twist}], ids=["look", "call", "dict"])
@pytest.mark.parametrize(
    "program, guide",
    [
        (small.longer, None),
        (small.longer, small.longer_guide),
        pytest.param(small.coin, None, marks=pytest.mark.slow),
        (small.unequal, None),
    ],
)
def test_unbiased_by_enumeration_with_a_twist(remembered, monkeypatch, program, guide, its):
    check_unbiased(
        every_way(monkeypatch),
        program,
        small.ARGS,
        small.small_lm(),
        method="smc",
        guide=guide,
        twist=its,
        num_samples=2,
        ess_threshold=1.0,
    )


@pytest.mark.parametrize(
    "resampling",
    [
        SCHEMES[0],
        pytest.param(SCHEMES[1], marks=pytest.mark.slow),
        pytest.param(SCHEMES[2], marks=pytest.mark.long),
        pytest.param(SCHEMES[3], marks=pytest.mark.slow),
    ],
)
def test_unbiased_by_enumeration_at_three_particles(remembered, monkeypatch, resampling):
    check_unbiased(
        every_way(monkeypatch),
        small.long,
        small.ARGS,
        small.small_lm(),
        method="smc",
        twist=twist,
        num_samples=3,
        ess_threshold=1.0,
        resampling=resampling,
    )


def test_a_lookahead_does_not_draw_what_its_particle_will():
    check_lookaheads_draw_apart()


def check_lookaheads_draw_apart():
    """Were they the same numbers, slots would be chosen by what they have yet to draw."""
    seen = []

    def program():
        z = lm_sample("z", "ab", max_tokens=4, temperature=4.0)
        theta = pyro.sample("theta", pyro.distributions.Uniform(0.0, 1.0))
        seen.append(float(theta))
        pyro.factor("taste", theta if "a" in z else -theta)

    posterior = infer(program, num_samples=8, seed=0, twist="lookahead")
    drawn = [float(theta) for theta in posterior["theta"]]
    assert len(seen) > len(set(drawn)) == 8
    assert all(seen.count(theta) == 1 for theta in drawn), "drawn in a lookahead, too"


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FINITE, ids=str)
@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_perfect_guide_gives_the_evidence_exactly(case, num_samples):
    """Of one text, at any threshold. Of several, only without resampling between them: there the
    weights are p / q of the texts so far, and equal the evidence only when all are drawn."""
    exact = case.enumerate()
    one_text = len(exact.latents) == 1
    for threshold in (0.0, 0.5, 1.0) if one_text else (0.0,):
        posterior = infer_case(
            case,
            guide=PerfectGuide(exact),
            num_samples=num_samples,
            ess_threshold=threshold,
            seed=1,
        )
        expected = [exact.log_evidence] * num_samples
        assert posterior.log_weights.tolist() == pytest.approx(expected, abs=1e-4)


@ALL
def test_without_resampling_it_is_importance_sampling(case):
    same = {"num_samples": 12, "seed": 4}
    one = infer_case(case, ess_threshold=0.0, **same)
    other = lmppl.infer(case.program, *case.args, lm=case.lm, method="importance", **same)
    assert torch.equal(one.log_weights, other.log_weights)
    assert one.info["resamplings"] == 0
    assert one.latents == other.latents
    for name in one.latents:
        assert list(map(str, one[name])) == list(map(str, other[name]))


@ALL
@pytest.mark.parametrize("its", [None, "lookahead", twist], ids=["none", "look", "call"])
def test_log_weights_average_to_the_evidence(case, its):
    posterior = infer_case(case, num_samples=16, twist=its, seed=2, ess_threshold=0.8)
    mean = torch.logsumexp(posterior.log_weights, 0) - math.log(16)
    assert posterior.log_evidence == pytest.approx(float(mean), abs=1e-12)


def test_seed_reproduces_a_run():
    options = {"num_samples": 12, "twist": "lookahead"}
    runs = [infer_case(CASES["branch"], seed=seed, **options) for seed in (5, 5, 6)]
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)
    assert not torch.equal(runs[0].log_weights, runs[2].log_weights)


# --- edges ---------------------------------------------------------------------------------------


def narrow(x):
    z = lm_sample("z", x, max_tokens=2, temperature=3.0)
    require("b first", str(z).startswith("b"))
    w = lm_sample("w", [x, z], max_tokens=3, temperature=3.0)
    lm_sample("y", [x, w], obs="a")


@pytest.mark.parametrize("resampling", SCHEMES)
def test_more_slots_than_live_particles(resampling):
    """All slots are filled with copies of the few that live, and go on independently."""
    stages = []
    seed = _seed_with_one_survivor()
    posterior = infer(
        narrow, "ab", num_samples=8, seed=seed, resampling=resampling, callback=stages.append
    )
    assert stages[1]["ess"] == 1.0
    assert set(posterior["z"]) == {posterior["z"][0]} and posterior["z"][0].startswith("b")
    assert bool((posterior.log_weights > -math.inf).all())
    assert len(set(map(str, posterior["w"]))) > 1
    assert posterior.killed == {}


def _seed_with_one_survivor():
    for seed in range(200):
        posterior = infer(narrow, "ab", num_samples=8, seed=seed, ess_threshold=0.0)
        if int((posterior.log_weights > -math.inf).sum()) == 1:
            return seed
    raise AssertionError("no such seed")


def test_the_dead_are_not_revived(remembered):
    for seed in range(30):
        posterior = infer(narrow, "ab", num_samples=8, seed=seed, ess_threshold=1.0)
        for z, log_weight in zip(posterior["z"], posterior.log_weights.tolist(), strict=True):
            assert z.startswith("b") == (log_weight > -math.inf)


@pytest.mark.parametrize("its", [None, "lookahead"])
def test_all_particles_dead_at_the_first_barrier(its):
    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        require("short", len(z) < 2)
        require("long", len(z) >= 2)
        lm_sample("w", "b", max_tokens=2)

    with pytest.raises(lmppl.ZeroEvidenceError, match="'short'|'long'") as caught:
        infer(program, num_samples=20, seed=0, twist=its)
    assert set(caught.value.posterior.killed) == {"short", "long"}
    assert "w" not in caught.value.posterior


def test_all_particles_dead_at_the_last_barrier():
    def program():
        lm_sample("z", "ab", max_tokens=2)
        pyro.factor("taste", torch.tensor(0.5))
        w = lm_sample("w", "b", max_tokens=2)
        pyro.factor("never", torch.tensor(-math.inf if len(w) < 9 else 0.0))

    with pytest.raises(lmppl.ZeroEvidenceError, match="'never'") as caught:
        infer(program, num_samples=6, seed=0, ess_threshold=1.0)
    assert caught.value.posterior.killed == {"never": 6}
    assert caught.value.posterior.log_evidence == -math.inf


@pytest.mark.parametrize("resampling", SCHEMES)
def test_runs_that_end_early_keep_their_mass(resampling):
    """All pay alike at their end, so those that are under way seem better by 40 nats."""

    def program():
        text = ["a"]
        while len(text) < 6 and text[-1] != "b":
            text += [lm_sample(f"z{len(text)}", text, choices=["a", "b"], temperature=20.0)]
        pyro.factor("paid", -40.0 + 0.1 * len(text))
        return len(text)

    lm = CASES["chain"].lm
    exact = lmppl.infer(program, lm=lm, method="exact")
    assert max(exact.probs(returns=True).values()) < 0.6  # of many lengths
    for seed in range(10):
        posterior = infer(
            program, lm=lm, num_samples=64, seed=seed, resampling=resampling, ess_threshold=1.0
        )
        assert posterior.log_evidence == pytest.approx(exact.log_evidence, abs=0.1)
        assert total_variation(exact.probs(returns=True), posterior.probs(returns=True)) < 0.25


def test_slots_of_the_dead_go_to_particles_that_go_on():
    """And those of runs that have ended do not."""

    def program():
        kind = lm_sample("kind", "a", choices=["a", "b"], temperature=20.0)
        if kind == "b":
            return
        if lm_sample("fate", ["a", kind], choices=["a", "b"], temperature=20.0) == "b":
            require("alive", False)
        lm_sample("z", ["a", kind], max_tokens=3)

    for seed in range(10):
        posterior = infer(
            program, lm=CASES["chain"].lm, num_samples=16, seed=seed, ess_threshold=1.0
        )
        assert all(weight > 0 for weight in posterior.weights)
        of_kind = [sum(posterior["kind"][i] == kind for i in range(16)) for kind in ("a", "b")]
        assert min(of_kind) > 0
        weights = {posterior["kind"][i]: float(posterior.weights[i]) for i in range(16)}
        assert weights["a"] < weights["b"]  # half of their mass died


def test_slots_of_a_finished_run_keep_their_own_streams():
    """Two slots take over one finished run, and then a running one: they must draw apart."""

    def program():
        if float(pyro.sample("k", pyro.distributions.Bernoulli(0.5))):
            lm_sample("z", "ab", max_tokens=3)

    with lmppl.use(CASES["chain"].lm):
        state = State("test", program, (), 16, None, 0)
        state.start()
        particles = state.particles
        with lmppl.runtime.ending(particles):
            ended = next(i for i, p in enumerate(particles) if p.finished)
            running = next(i for i, p in enumerate(particles) if not p.finished)
            ancestors = torch.full((16,), ended)
            ancestors[running] = running
            state.select(ancestors.tolist())
            assert sum(p.finished for p in particles) == 15
            assert [p.slot for p in particles] == list(range(16))
            state.select([running] * 16)
            uniforms = {tuple(p.waiting.uniforms.tolist()) for p in particles}
    assert len(uniforms) == 16


def test_texts_of_unequal_length_meet_within_a_barrier(remembered):
    """A slot whose own text could have one token takes over one that may have two."""
    for seed in range(40):
        posterior = infer_case(
            CASES["branch"], num_samples=4, seed=seed, ess_threshold=1.0, twist=twist
        )
        assert len(posterior) == 4


def test_a_tool_is_called_once_a_particle():
    calls = []

    def program():
        z = lm_sample("z", "ab", max_tokens=2, temperature=3.0)
        n = lmppl.tool("count", lambda text: calls.append(text) or text.count("a"), str(z))
        pyro.factor("taste", torch.tensor(3.0 * n))
        w = lm_sample("w", z + "a", max_tokens=2)
        lm_sample("y", w + "a", obs="b")

    posterior = infer(program, num_samples=16, seed=0, ess_threshold=1.0)
    assert posterior.info["resamplings"] > 0 and len(calls) == 16
    assert posterior["count"] == [str(z).count("a") for z in posterior["z"]]


def test_a_twist_may_rule_out_texts_that_cannot_end_here(remembered, monkeypatch):
    """-inf is not taken at its word: a text that may still end well is not lost."""
    check_unbiased(
        every_way(monkeypatch),
        small.longer,
        small.ARGS,
        small.small_lm(),
        method="smc",
        twist=lambda text: -math.inf if text.endswith("a") else 0.9 * len(text) - 5.0,
        num_samples=2,
        ess_threshold=1.0,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_twist_that_is_no_number(value):
    with pytest.raises(ValueError, match=f"'z'.*log psi = {value}"):
        infer_case(CASES["one site"], twist=lambda text: value, num_samples=4, seed=0)


def test_a_twist_for_a_site_that_does_not_exist_is_said():
    twists = {"z": twist, "ww": twist, "k": twist}

    def program():
        lm_sample("k", "ab", choices=["a", "b"])
        z = lm_sample("z", "ab", max_tokens=2)
        w = lm_sample("w", "b", max_tokens=2)
        lm_sample("y", [z, w], obs="a")

    said = (
        "twist= names 'k', 'ww', where no particle drew a text token by token; sites where one did: "
        "w, z"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        posterior = infer(program, twist=twists, num_samples=4, seed=0)
    assert len(caught) == 1
    assert [note for note in posterior.info["notes"] if note.startswith(said)]


def test_a_twist_for_a_site_that_only_dead_particles_come_to():
    def program():
        z = lm_sample("z", "ab", max_tokens=1, temperature=3.0)
        if "b" in z:
            lm_sample("w", "ab", max_tokens=2)
        require("no b", "b" not in z)
        lm_sample("v", "ab", max_tokens=1)
        lm_sample("u", "ab", max_tokens=1)

    posterior = infer(program, twist={"w": twist}, num_samples=16, seed=0, ess_threshold=1.0)
    assert "w" not in posterior and not posterior.info["notes"]


def test_lookahead_needs_a_closing_token():
    def program():
        z = lm_sample("z", "a", max_tokens=3)
        lm_sample("y", z + "a", obs="b")

    with pytest.raises(ValueError, match="'z'.*no EOS"):
        infer(program, lm=tiny_lm("ab", eos=False), twist="lookahead", num_samples=4, seed=0)


def test_options_are_checked():
    with pytest.raises(ValueError, match="ess_threshold=1.5"):
        lmppl.SMC(ess_threshold=1.5)
    with pytest.raises(ValueError, match="resampling='best'.*systematic"):
        lmppl.SMC(resampling="best")
    with pytest.raises(ValueError, match="twist='flows'.*lookahead"):
        lmppl.SMC(twist="flows")


def test_every_program_is_left_closed():
    """Whatever is suspended when an engine leaves has had its ``finally`` blocks run."""
    left = []

    def program():
        try:
            z = lm_sample("z", "ab", max_tokens=2)
            require("no b", "b" not in z)
            w = lm_sample("w", z + "a", max_tokens=2)
            lm_sample("y", w + "a", obs="b")
        finally:
            left.append(1)

    started = []
    start = Particle.resume

    def counted(self, answer=None, **options):
        if answer is None and self.waiting is None:
            started.append(1)
        return start(self, answer, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Particle, "resume", counted)
        infer(program, num_samples=12, seed=0, ess_threshold=1.0, twist="lookahead")
    assert len(left) == len(started) > 12
