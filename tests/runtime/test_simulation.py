"""Forward simulation, against enumeration of the joint density of latents and observations."""

import functools
import itertools
import math
import statistics
import warnings
import weakref
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import LMText, Text, lm_sample, require, tool
from lmppl.guides.prompts import find_observations
from lmppl.runtime.simulation import SimulationStream, simulate
from lmppl.testing import enumerate_program, iid_tv_floor, key, tiny_lm, total_variation
from lmppl.testing.programs import CASES

LM = tiny_lm("ab.", seed=0)
NUM = 1500


def run(model, args, num, seed=0, **options):
    with lmppl.use(LM):
        return simulate(model, args, num, seed=seed, **options)


def plain(value):
    if isinstance(value, Text):
        return value.token_ids
    values = value.tolist()
    return tuple(v for v in values if v != -1) if isinstance(values, list) else values


def infill(x, y=None):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("y", [x, z], max_tokens=2, stop=".", obs=y)
    return z


def constrained(x, y=None):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    got = lm_sample("y", [x, z], max_tokens=2, stop=".", obs=y)
    require("they differ", got.body != z.body)
    w = lm_sample("w", [z, got], max_tokens=2)
    require("w is long", len(w) > 1)


def rejecting_tool(x, y=None):
    z = lm_sample("z", x, max_tokens=2)
    # A text that ends in b has no place.
    read = tool("read", lambda text: text[text.index("a") :], str(z), on_error="reject")
    lm_sample("y", [x, read], max_tokens=2, obs=y)


def labels(x, *ys):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    for i in pyro.plate("labels", len(ys)):
        pyro.sample(f"y{i}", dist.Bernoulli(0.8 if "a" in z else 0.3), obs=torch.tensor(ys[i]))


def chosen(x, y=None):
    z = lm_sample("z", x, max_tokens=2)
    lm_sample("y", [z, x], choices=["ab", "ba.", "b."], temperature=2.0, obs=y)


# Programs with arguments, the sites that the arguments leave latent and that are observed, and the
# names of all their random sites. Pyro's own ``uncondition`` gives the joint to be enumerated.
PROGRAMS = {
    "one site": (CASES["one site"].program, ("ab.", "a"), (), ("z", "y")),
    "chain": (CASES["chain"].program, ("b.", "b"), (), ("z", "w", "y")),
    "branch": (CASES["branch"].program, ("ab.", "a"), (), ("z", "w", "v", "y")),
    "tool": (CASES["tool"].program, ("ab.", "a"), (), ("z", "y")),
    "named": (infill, ("ab.",), ("y",), ("z", "y")),
    "observed": (infill, ("ab.", "a."), (), ("z", "y")),
    "labels": (labels, ("ab.", 1.0, 0.0), (), ("z", "y0", "y1")),
    "choices": (chosen, ("ab.", "b."), (), ("z", "y")),
    "require": (constrained, ("ab.",), ("y",), ("z", "y", "w")),
    "rejecting tool": (rejecting_tool, ("ab.",), ("y",), ("z", "y")),
}


def joint(name):
    """Exact p(latents, observations) of the case, given its hard conditions."""
    model, args, named, names = PROGRAMS[name]
    unobserved = model if named else poutine.uncondition(model)
    exact = enumerate_program(unobserved, *args, lm=LM)
    return exact.posterior(*names)


@functools.cache
def simulated(name):
    """The latents and observations of many runs, as keys of ``joint(name)``; and a run."""
    model, args, named, names = PROGRAMS[name]
    runs = run(model, args, NUM, observed=named)
    values = [
        (
            {n: plain(v) for n, v in r.latents.items()},
            {n: plain(v) for n, v in r.observations.items()},
        )
        for r in runs
    ]
    return values, names


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_simulated_pairs_come_from_the_joint(name):
    exact = joint(name)
    values, names = simulated(name)
    counts = Counter(key({**latents, **seen}, names) for latents, seen in values)
    found = {row: count / NUM for row, count in counts.items()}
    assert set(found) <= set(exact)
    floor = iid_tv_floor(exact, NUM)
    # The distance of n draws exceeds its mean by t with probability < exp(-2 n t^2) (McDiarmid).
    assert total_variation(found, exact) < floor + (2 / NUM) ** 0.5
    assert floor < 0.25  # so that the test can fail


def conditional(exact, names, latents):
    """log p(latents | observations) of every pair."""
    at = [names.index(name) for name in latents]
    seen = [k for k in range(len(names)) if k not in at]
    evidence = Counter()
    for row, p in exact.items():
        evidence[tuple(row[k] for k in seen)] += p
    return {row: math.log(p / evidence[tuple(row[k] for k in seen)]) for row, p in exact.items()}


@pytest.mark.parametrize(
    "name", ["one site", "labels", pytest.param("require", marks=pytest.mark.slow)]
)
def test_latents_are_posterior_draws_for_their_own_observations(name):
    exact = joint(name)
    values, names = simulated(name)
    log_p = conditional(exact, names, tuple(values[0][0]))
    expected = sum(p * log_p[row] for row, p in exact.items())
    own = [log_p[key({**latents, **seen}, names)] for latents, seen in values]
    error = statistics.stdev(own) / NUM**0.5
    assert abs(statistics.mean(own) - expected) < 4 * error
    # Latents that are paired with the observations of another run are told apart.
    others = [
        log_p.get(key({**latents, **seen}, names), -9.0)
        for (latents, _), (_, seen) in itertools.pairwise(values)
    ]
    assert abs(statistics.mean(others) - expected) > 8 * error


def test_log_joint_is_the_density_of_latents_and_observations():
    exact = joint("one site")
    for each in run(CASES["one site"].program, ("ab.", "a"), 5):
        p = exact[plain(each.latents["z"]), plain(each.observations["y"])]
        assert each.log_joint == pytest.approx(math.log(p), abs=1e-4)


# --- the program that observes a simulation ------------------------------------------------------


def exact_of(model, *args):
    return lmppl.infer(model, *args, lm=LM, method="exact")


@pytest.mark.parametrize("args, observed", [(("ab.", "a."), ()), (("ab.",), ("y",))])
def test_the_conditioned_program_has_the_posterior_of_the_simulated_text(args, observed):
    for each in run(infill, args, 4, seed=3, observed=observed):
        text = each.observations["y"]
        assert isinstance(text, Text)
        ours, theirs = exact_of(each.program(infill), *args), exact_of(infill, "ab.", text)
        assert ours.log_evidence == pytest.approx(theirs.log_evidence, abs=1e-5)
        assert total_variation(ours.probs("z"), theirs.probs("z")) < 1e-5
        oracle = enumerate_program(each.program(infill), *args, lm=LM)
        assert oracle.log_evidence == pytest.approx(ours.log_evidence, abs=1e-4)


@pytest.mark.parametrize("method", ["exact", "smc", "importance"])
def test_a_prefix_likelihood_keeps_its_tokens_in_every_engine(method):
    program, args = CASES["one site"].program, ("ab.", "aba")
    runs = run(program, args, 40)
    assert {len(each.observations["y"].token_ids) for each in runs} == {3}
    ended = next(r for r in runs if LM.vocabulary.eos_id in r.observations["y"].token_ids[:2])
    model = ended.program(program)
    posterior = lmppl.infer(model, *args, lm=LM, method=method, num_samples=400, seed=0)
    oracle = enumerate_program(program, "ab.", ended.observations["y"], lm=LM)
    assert total_variation(posterior.probs("z"), oracle.posterior("z", text=True)) < 0.1
    node = posterior.traces[0].nodes["y"]
    assert node["is_observed"]
    assert tuple(node["value"].tolist()) == ended.observations["y"].token_ids


def test_tokens_that_no_string_gives_are_kept():
    lm = tiny_lm(["a", "b", "ab"], seed=0)  # "ab" is one token, but two may be drawn

    def model(y=None):
        z = lm_sample("z", "a", max_tokens=1)
        lm_sample("y", ["b", z], max_tokens=2, obs=y)

    a, b = (*lm.vocabulary.encode("a"), *lm.vocabulary.encode("b"))
    with lmppl.use(lm):
        runs = simulate(model, (), 200, seed=0, observed=["y"])
    each = next(r for r in runs if r.observations["y"].token_ids == (a, b))
    posterior = lmppl.infer(each.program(model), lm=lm, method="exact")
    assert posterior.traces[0].nodes["y"]["value"].tolist() == [a, b]


def test_the_guides_search_for_observations_finds_the_simulated_ones():
    vocabulary = LM.vocabulary
    for each in run(infill, ("ab.", "a."), 3):
        with lmppl.use(LM):
            program = each.program(infill)
            (found,) = find_observations([(program, ("ab.", "a."))], vocabulary, "all", strict=True)
        ids = each.observations["y"].token_ids
        assert found == {"y": tuple(t for t in ids if t != vocabulary.eos_id)} or not ids[1:]


def test_pyros_own_tools_run_the_conditioned_program():
    (each,) = run(infill, ("ab.", "a."), 1)
    with lmppl.use(LM), torch.no_grad():
        again = poutine.condition(each.program(infill), data=each.latents)
        trace = poutine.trace(again).get_trace("ab.", "a.")
        assert float(trace.log_prob_sum()) == pytest.approx(each.log_joint, abs=1e-4)
    assert trace.nodes["y"]["is_observed"]
    assert plain(trace.nodes["y"]["value"]) == each.observations["y"].token_ids


def test_a_branch_that_cannot_produce_the_simulated_text_is_dead():
    def model(x, y="a"):
        z = lm_sample("z", x, max_tokens=1, temperature=2.0)
        lm_sample("y", [x, z], max_tokens=3 if z == "a" else 1, obs=y)

    seen = set()
    for each in run(model, ("ab.",), 6):
        long = len(each.observations["y"].token_ids) > 1
        posterior = lmppl.infer(each.program(model), "ab.", lm=LM, method="exact")
        assert (posterior.probs("z").get("a", 0.0) > 0.999) == long
        seen.add(long)
        # A particle's weight is the likelihood of its branch, zero if that cannot make the text.
        log_joints = (posterior.log_weights - math.log(len(posterior))).tolist()
        exact = dict(zip(map(str, posterior["z"]), log_joints, strict=True))
        drawn = lmppl.infer(
            each.program(model), "ab.", lm=LM, method="importance", num_samples=10, seed=0
        )
        for trace, log_weight in zip(drawn.traces, drawn.log_weights.tolist(), strict=True):
            node = trace.nodes["z"]
            z = str(node["fn"].text(node["value"]))
            prior = float(node["unscaled_log_prob"])
            assert log_weight == pytest.approx(exact.get(z, -math.inf) - prior, abs=1e-4)
    assert seen == {False, True}


def test_observations_of_latents_have_no_conditioned_program():
    def names(x, y):
        z = lm_sample("z", x, max_tokens=1)
        lm_sample("one" if z == "a" else "other", [x, z], max_tokens=2, obs=y)

    (each,) = run(names, ("ab.", "a."), 1)
    with pytest.raises(ValueError, match=r"site '(one|other)', which its simulation"):
        exact_of(each.program(names), "ab.", "a.")

    def ends(x, y):
        z = lm_sample("z", x, max_tokens=1)
        if z == "a":
            lm_sample("y", [x, z], max_tokens=2, obs=y)

    each = next(r for r in run(ends, ("ab.", "a."), 50) if r.observations)
    with pytest.raises(ValueError, match=r"ended without site 'y'"):
        exact_of(each.program(ends), "ab.", "a.")

    def lengths(x, y):
        z = lm_sample("z", x, max_tokens=2)
        lm_sample("y", [x, z], obs=y[: 1 + len(z)])

    (each,) = run(lengths, ("ab.", "aba"), 1)
    with pytest.raises(ValueError, match=r"site 'y' observes the first \d tokens"):
        exact_of(each.program(lengths), "ab.", "aba")


# --- other sites -----------------------------------------------------------------------------------


def test_what_is_masked_out_keeps_its_value_and_the_rest_is_simulated():
    seen = torch.tensor([True, False, True])

    def model(ys, y):
        theta = pyro.sample("theta", dist.Beta(1.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=seen):
            pyro.sample("ys", dist.Normal(theta, 0.1), obs=ys)
        with poutine.mask(mask=False):
            lm_sample("y", "ab.", max_tokens=2, obs=y)

    args = torch.tensor([7.0, 8.0, 9.0]), "a."
    (each,) = run(model, args, 1)
    assert set(each.observations) == {"ys"} and set(each.latents) == {"theta"}
    ys = each.observations["ys"]
    assert float(ys[1]) == 8.0 and float(ys[[0, 2]].max()) < 2.0
    densities = dist.Normal(each.latents["theta"], 0.1).log_prob(ys)
    assert each.log_joint == pytest.approx(float(densities[seen].sum()), abs=1e-4)
    with lmppl.use(LM):
        trace = poutine.trace(each.program(model)).get_trace(*args)
    assert torch.equal(trace.nodes["ys"]["value"], ys)


def test_as_many_values_are_drawn_as_were_observed_at_once():
    def model(ys):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("ys", dist.Normal(theta, 1.0), obs=ys)  # no plate: Pyro broadcasts

    for each in run(model, (torch.zeros(4),), 3):
        assert each.observations["ys"].unique().shape == (4,)


def test_a_language_model_as_a_distribution_is_simulated_too():
    def model(y):
        z = lm_sample("z", "ab.", max_tokens=2)
        pyro.sample("y", LMText(LM, ["ab.", z], max_tokens=2), obs=y)
        both = LMText.batch(LM, ["a", "b"], max_tokens=2)
        pyro.sample("both", both.to_event(1), obs=both.sample())

    fn = LMText(LM, "a", max_tokens=2)
    args = (fn.encode("ab"),)
    (each,) = run(model, args, 1)
    assert isinstance(each.observations["y"], Text)
    assert each.observations["both"].shape == (2, 2)
    assert math.isfinite(exact_of(each.program(model), *args).log_evidence)


def test_deterministic_sites_and_tools_are_no_observations():
    calls = []

    def model(x, y):
        z = lm_sample("z", x, max_tokens=2)
        pyro.deterministic("size", torch.tensor(float(len(z))))
        tool("read", calls.append, str(z))
        require("always", True)
        lm_sample("y", [x, z], max_tokens=2, obs=y)

    runs = run(model, ("ab.", "a."), 5)
    assert [set(r.observations) | set(r.latents) for r in runs] == [{"y", "z"}] * 5
    assert len(calls) == 5


def test_a_simulated_observation_in_a_plain_string_is_no_surprise():
    def model(x, y):
        got = lm_sample("y", x, max_tokens=4, obs=y)
        lm_sample("w", f"{x}{got}", max_tokens=1)

    with warnings.catch_warnings():  # of texts that are tokenised anew: a given y would be, too
        warnings.simplefilter("error")
        run(model, ("ab.", "abab"), 8)


# --- what cannot be simulated ----------------------------------------------------------------------


def scaled_latent(x):
    with poutine.scale(scale=0.5):
        lm_sample("z", x, max_tokens=1)


def subsampled(x):
    for i in pyro.plate("data", 4, subsample_size=2):
        pyro.sample(f"y{int(i)}", dist.Bernoulli(0.5), obs=torch.tensor(1.0))


def tilted(x):
    z = lm_sample("z", x, max_tokens=1)
    fn = dist.Delta(torch.tensor(1.0), log_density=1.0 + z.count("a"))
    pyro.sample("tilt", fn, obs=torch.tensor(1.0))


def masked_distribution(x):
    pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1), obs=torch.zeros(2))


@pytest.mark.parametrize(
    "program, args, message",
    [
        (CASES["factor"].program, CASES["factor"].args, r"'score' is a factor"),
        (CASES["scale"].program, CASES["scale"].args, r"'z' is scaled by 0.5"),
        (scaled_latent, ("a",), r"'z' is scaled by 0.5"),
        (subsampled, ("a",), r"'y\d' is scaled by 2.0"),
        (masked_distribution, ("a",), r"'y' has a distribution with a mask"),
        (tilted, ("a",), r"'tilt' is a Delta with a log_density"),
    ],
)
def test_programs_whose_simulated_latents_are_no_posterior_draws_are_refused(
    program, args, message
):
    with pytest.raises(ValueError, match=message):
        run(program, args, 4)


def test_conditions_that_are_never_met_are_an_error_after_so_many_runs():
    calls = []

    def never(x):
        z = lm_sample("z", x, max_tokens=1)
        calls.append(z)
        require("a miracle", z == "abab")

    with pytest.raises(ValueError, match=r"7 forward runs .*'a miracle' \(7\)"):
        run(never, ("a",), 1, max_attempts=7)
    assert len(calls) == 7


def test_a_rejected_run_is_drawn_again_from_other_random_numbers():
    for seed in range(8):  # of which some are rejected at first
        run(constrained, ("ab.",), 1, seed=seed, observed=["y"], max_attempts=60)


@pytest.mark.parametrize("name", ["no such site", "rare"])
def test_every_run_must_have_the_named_sites(name):
    def model(x):
        z = lm_sample("z", x, max_tokens=1)
        if z == "a":
            lm_sample("rare", x, max_tokens=1)

    with pytest.raises(ValueError, match=f"observed names '{name}'"):
        run(model, ("a",), 20, observed=[name])


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"\['y'\]"):
        run(infill, ("ab.",), 2, observed="y")
    with pytest.raises(ValueError, match="num=0"):
        run(infill, ("ab.",), 0)
    with pytest.raises(ValueError, match="max_attempts=0"):
        run(infill, ("ab.",), 1, max_attempts=0)
    with pytest.raises(ValueError, match="no input"):
        SimulationStream(infill, [])
    with pytest.raises(ValueError, match="block=0"):
        SimulationStream(infill, [("a",)], block=0)


# --- how it runs -----------------------------------------------------------------------------------


def rows(runs):
    return [
        [(n, plain(v)) for n, v in {**r.latents, **r.observations}.items()] + [r.log_joint]
        for r in runs
    ]


def test_all_runs_share_their_draws(monkeypatch):
    rounds = []
    draw = lmppl.LM.draw
    monkeypatch.setattr(
        lmppl.LM,
        "draw",
        lambda self, requests: rounds.append(len(requests)) or draw(self, requests),
    )
    for num in (1, 30):
        rounds.clear()
        run(CASES["chain"].program, ("b.", "bb"), num)
        assert rounds == [num] * 3


def test_seeds_reproduce_and_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    first, second, third = (
        run(constrained, ("ab.",), 8, seed=seed, observed=["y"]) for seed in (5, 5, 6)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert rows(first) == rows(second) != rows(third)
    torch.manual_seed(0)
    one = run(infill, ("ab.", "a."), 8, seed=None)
    torch.manual_seed(0)
    assert rows(one) == rows(run(infill, ("ab.", "a."), 8, seed=None))


# --- streams ---------------------------------------------------------------------------------------

INPUTS = [("a", "b."), ("ab", "a."), ("ba", "bb"), ("b", "a"), ("aa", "b")]


def take(stream, num):
    with lmppl.use(LM):
        found = list(itertools.islice(stream, num))
    return [(args, *rows([each])) for args, each in found]


def test_a_stream_goes_round_the_inputs_each_time_in_another_order():
    found = take(SimulationStream(infill, INPUTS, seed=0, block=4), 30)
    order = [args for args, _ in found]
    rounds = [tuple(order[i : i + 5]) for i in range(0, 30, 5)]
    assert all(sorted(each) == sorted(INPUTS) for each in rounds)
    assert len(set(rounds)) > 3
    assert len({str(row) for _, row in found}) > 10  # an input is simulated anew every time


def test_every_block_is_simulated_anew():
    found = take(SimulationStream(infill, INPUTS[:1], seed=0, block=8), 16)
    assert found[:8] != found[8:]


def test_a_stream_that_skips_goes_on_bit_by_bit():
    options = {"observed": ["y"], "block": 4}
    inputs = [(x,) for x, _ in INPUTS]
    whole = take(SimulationStream(constrained, inputs, seed=3, **options), 13)
    for split in (0, 6):
        before = SimulationStream(constrained, inputs, seed=3, **options)
        assert take(before, split) == whole[:split]
        after = SimulationStream(constrained, inputs, seed=3, **options)
        take(after, 2)
        after.skip(split - 2)
        assert take(after, 13 - split) == whole[split:]
        after.skip(-3)
        after.forget()
        assert take(after, 3) == whole[10:]
    assert take(SimulationStream(constrained, inputs, seed=4, **options), 13) != whole


def test_a_program_keeps_its_observations_and_not_the_run():
    (one,) = run(infill, ("a", "b"), 1)
    program, whole = one.program(infill), weakref.ref(one)
    del one
    assert whole() is None
    with lmppl.use(LM):
        assert list(lmppl.infer(program, "a", "b", method="exact").latents) == ["z"]
