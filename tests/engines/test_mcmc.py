"""Chains as an engine: what they draw, where they begin, and what they say of themselves."""

import gc
import itertools
import math
import weakref
from collections import Counter
from types import SimpleNamespace

import moving
import pyro
import pyro.distributions as dist
import pytest
import small
import torch

import lmppl
from lmppl import MCMC, RandomWalk, Redraw, Suffix, lm_sample, require, tool
from lmppl.engines import mcmc, moves
from lmppl.runtime import mixing
from lmppl.testing import enumerate_program, trace_values
from lmppl.testing.programs import CASES

# Chains of a few moves may stay where they began; that they say so has a test of its own.
pytestmark = [
    pytest.mark.usefixtures("remembered"),
    pytest.mark.filterwarnings("ignore:.*never came to another trace"),
]


def run(program, *args, lm=None, **options):
    options = {"num_samples": 16, "num_chains": 4, "warmup": 5, "thin": 2, "seed": 0} | options
    lm = small.small_lm() if lm is None else lm
    return lmppl.infer(program, *args, lm=lm, method="mcmc", progress=False, **options)


# These mix slowly. (That a kernel leaves the posterior invariant is seen exactly in ``test_moves``.)
SLOW = {
    **dict.fromkeys(("choices", "hard constraint"), pytest.mark.slow),
    **dict.fromkeys(("branch", "chain", "scale", "tool"), pytest.mark.long),
}


def distance(posterior, exact, names):
    """Total variation between the draws' joint values of some sites and the exact posterior."""
    found = Counter()
    for trace in posterior.traces:
        values = trace_values(trace)
        at = tuple(values.get(name) for name in names)
        found[at if len(names) > 1 else at[0]] += 1 / len(posterior)
    expected = exact.posterior(*names)
    return sum(abs(found[at] - expected.get(at, 0.0)) for at in {*found, *expected}) / 2


@pytest.mark.parametrize(
    "name", ["one site", *(pytest.param(name, marks=mark) for name, mark in SLOW.items())]
)
def test_chains_find_the_posterior(name):
    case = CASES[name]
    options = {"num_samples": 720, "num_chains": 24, "warmup": 30, "thin": 3, "later": "redraw"}
    options |= {"thin": 12} if name in SLOW else {"num_samples": 480}
    posterior = run(case.program, *case.args, lm=case.lm, **options)
    exact, names = case.enumerate(), case.text_latents
    assert posterior.ess > 50
    # The expected distance of as many independent draws, and half as much again.
    probs = exact.posterior(*names).values()
    floor = sum(math.sqrt(2 * p * (1 - p) / (math.pi * posterior.ess)) for p in probs) / 2
    assert distance(posterior, exact, names) < 1.5 * floor


def test_what_a_posterior_of_chains_says():
    posterior = run(moving.chain, *moving.ARGS, num_samples=22)
    assert len(posterior) == 22  # of six draws a chain the last two are left out
    assert posterior.info["chain"][:6] == [(0, d) for d in range(6)]
    assert posterior.info["chain"][-5:] == [(3, d) for d in range(5)]
    assert posterior.log_evidence is None
    assert posterior.weights.tolist() == [1 / 22] * 22
    chains = posterior.info["chains"]
    assert (chains["num_chains"], chains["num_draws"]) == (4, 5)
    assert set(chains["acceptance"]) == {"z", "w"}
    assert all(0 < share <= 1 for share in chains["acceptance"].values())
    assert set(chains["diagnostics"]) == {"log joint"}
    assert 1 <= posterior.ess <= 22
    assert "Markov chain" in repr(posterior)


def test_a_trace_keeps_its_exact_joint_over_many_moves():
    exact = enumerate_program(moving.branch, *moving.ARGS, lm=small.small_lm())
    joint = {tuple(trace.values.items()): trace.log_joint for trace in exact}
    posterior = run(moving.branch, *moving.ARGS, num_samples=100, warmup=20)
    for trace in posterior.traces:
        found = float(trace.log_prob_sum())
        assert abs(found - joint[tuple(trace_values(trace).items())]) < 1e-4


def test_a_seed_reproduces_the_chains_and_their_number_does_not_matter_to_one():
    texts = [[str(z) for z in run(moving.chain, *moving.ARGS, seed=3)["z"]] for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0] != [str(z) for z in run(moving.chain, *moving.ARGS, seed=4)["z"]]


def test_fewer_samples_than_chains():
    posterior = run(moving.one_text, *moving.ARGS, num_samples=2)
    assert len(posterior) == 2 and posterior.info["chains"]["num_chains"] == 2
    assert math.isnan(posterior.ess)
    assert "4 draws a chain" in posterior.info["notes"][0]


def test_infer_batch_runs_chains_of_many_inputs():
    inputs = [("ab", "a"), ("b", "ab")]
    options = {"num_samples": 8, "num_chains": 4, "warmup": 3, "thin": 2}
    common = {"lm": small.small_lm(), "method": "mcmc", "progress": False}
    batch = list(lmppl.infer_batch(moving.chain, inputs, seed=5, **common, **options))
    for args, posterior in zip(inputs, batch, strict=True):
        seed = posterior.info["seed"]
        alone = lmppl.infer(moving.chain, *args, seed=seed, **common, **options)
        assert [str(z) for z in posterior["z"]] == [str(z) for z in alone["z"]]


def test_what_chains_leave_behind_is_freed(monkeypatch):
    """A proposal knows the trace that it came from; chains do not keep all that they were at."""
    made = []
    propose = moves.propose

    def watched(*args):
        proposals = propose(*args)
        made.extend(weakref.ref(p.state.particle) for p in proposals)
        return proposals

    monkeypatch.setattr(moves, "propose", watched)
    posterior = run(moving.chain, *moving.ARGS, warmup=50)
    gc.collect()
    kept = sum(ref() is not None for ref in made)
    assert len(made) > 200 and kept == 0
    assert len(posterior) == 16


# --- where chains begin ------------------------------------------------------------------------------


def test_chains_begin_at_the_traces_of_a_posterior():
    smc = lmppl.infer(moving.chain, *moving.ARGS, lm=small.small_lm(), method="smc", seed=0)
    posterior = run(moving.chain, *moving.ARGS, initial=smc, warmup=0, thin=1)
    assert posterior.ess > 1
    start = smc.resample(1, seed=0)
    still = run(
        moving.chain, *moving.ARGS, initial=start, warmup=0, thin=1, num_chains=2, num_samples=2
    )
    same = sum(
        z == start["z"][0] or w == start["w"][0]
        for z, w in zip(still["z"], still["w"], strict=True)
    )
    assert same == 2  # one move changes one site


def test_a_start_of_probability_zero_is_refused():
    def picky(x, y, letter):
        z = lm_sample("z", x, max_tokens=1)
        require("letter", letter in z)
        lm_sample("y", [x, z], obs=y)

    start = lmppl.infer(picky, "ab", "a", "a", lm=small.small_lm(), method="importance", seed=0)
    with pytest.raises(ValueError, match="probability zero.*by site 'letter'"):
        run(picky, "ab", "a", "b", initial=start)


def test_a_start_with_other_sites_is_refused():
    start = run(moving.one_text, *moving.ARGS)
    with pytest.raises(ValueError, match="initial= .its trace .*'z' has shape .2,., given .3,."):
        run(moving.chain, *moving.ARGS, initial=start)
    with pytest.raises(ValueError, match="initial= .its trace .* no value for latent site 'k'"):
        run(coin, *moving.ARGS, initial=start)
    with pytest.raises(TypeError, match="initial= takes a posterior"):
        MCMC(initial={"z": "a"})


def test_all_starts_dead_says_what_to_do():
    def never(x):
        z = lm_sample("z", x, max_tokens=1)
        require("impossible", len(z) > 5)

    with pytest.raises(lmppl.ZeroEvidenceError, match="num_starts=.*initial=") as caught:
        run(never, "ab")
    assert "'impossible': 64" in str(caught.value)
    assert len(caught.value.posterior) == 64


def test_a_tool_that_leaves_no_latent_site_on_a_branch():
    results = itertools.cycle([True, False])

    def program():
        if tool("coin", lambda: next(results)):
            lm_sample("z", "a", max_tokens=2)

    with pytest.raises(ValueError, match="begin at a trace without latent sites"):
        run(program)


def test_a_program_without_a_latent_site():
    with pytest.raises(ValueError, match="no latent site"):
        run(lambda x: lm_sample("y", x, obs="a") and None, "ab")


def test_chains_that_never_move_say_so():
    def stuck(x):
        z = lm_sample("z", x, max_tokens=2)
        require("that one", str(z) == "ba")

    with pytest.warns(UserWarning, match="4 of 4 chains never came to another trace in 13 moves"):
        posterior = run(stuck, "ab", num_samples=16)
    assert "never came to another trace" in posterior.info["notes"][-1]
    assert posterior.ess <= 4  # equal draws are worth one a chain


def test_chains_that_stay_where_others_come_to_are_not_warned_of():
    """They may well be where most of the mass is."""

    def at(token):
        return SimpleNamespace(latents={"z": {"value": torch.tensor([token])}})

    chains = SimpleNamespace(has_moved=[False, True, False], states=[at(0), at(1), at(2)])
    draws = [[at(0), at(0), at(2)], [at(0), at(1), at(2)]]
    assert mcmc._stuck(chains, draws) == [2]
    chains.has_moved[1] = False
    assert mcmc._stuck(chains, draws) == [0, 1, 2]


# --- what moves do ---------------------------------------------------------------------------------


def test_tools_after_the_cut_run_anew_and_those_before_do_not():
    calls = Counter()

    def program(x, y):
        z = lm_sample("z", x, max_tokens=1)
        first = tool("first", lambda: calls.update(["first"]) or str(z))
        w = lm_sample("w", [x, first + "a"], max_tokens=1)
        tool("second", lambda: calls.update(["second"]))
        lm_sample("y", [x, w], obs=y)

    posterior = run(program, *moving.ARGS, num_samples=80)
    moves_made = 4 * (5 + 2 * 20)
    assert calls["second"] == 64 + moves_made  # once a start, once a move
    assert 64 + 0.3 * moves_made < calls["first"] < 64 + 0.7 * moves_made
    assert all(first == str(z) for first, z in zip(posterior["first"], posterior["z"], strict=True))


def test_a_tool_before_the_first_latent_is_called_once_a_start_also_with_a_guide():
    calls = Counter()

    def program(x, y):
        tool("first", lambda: calls.update(["first"]) or sum(calls.values()))
        z = lm_sample("z", x, max_tokens=1)
        lm_sample("y", [x, z], obs=y)

    def guide(x, y):
        lm_sample("z", y, max_tokens=1)

    posterior = run(program, *moving.ARGS, num_samples=40, guide=guide)
    assert calls["first"] == 64
    chains = [chain for chain, _ in posterior.info["chain"]]
    assert len(set(zip(chains, posterior["first"], strict=True))) == len(set(chains))


def test_a_block_reaches_back_further_at_every_move_and_then_begins_again():
    fn = lmppl.LMText(small.small_lm(), "ab", max_tokens=7)
    node = {"name": "z", "fn": fn, "value": fn.value([0, 1, 0, 0, 2])}
    cuts = [Suffix(2).cuts(node, turn) for turn in range(6)]
    assert cuts == [range(3, 5), range(1, 5), range(5), range(5), range(3, 5), range(1, 5)]
    assert Suffix().cuts(node, 3) == range(5)
    assert Redraw().cuts(node, 3) == range(1)


def test_blocks_change_all_of_a_text():
    posterior = run(moving.one_text, *moving.ARGS, num_samples=100, block=1)
    assert len({str(z)[:1] for z in posterior["z"]}) > 1


@pytest.mark.slow
def test_numbers_by_a_random_walk():
    case = CASES["beta and text"]
    options = {"num_samples": 480, "num_chains": 24, "warmup": 20, "thin": 3}
    posterior = run(
        case.program, *case.args, lm=case.lm, kernels={"theta": RandomWalk(1.5)}, **options
    )
    expected = case.enumerate().mean(lambda trace: trace.values["theta"])
    assert abs(float(posterior.mean("theta")) - expected) < 0.05
    assert posterior.info["chains"]["acceptance"]["theta"] > 0.2


def test_functions_are_told_of():
    functions = {"length": lambda v: len(v["z"]), "ends": lambda v: v["z"].endswith("b")}
    posterior = run(moving.chain, *moving.ARGS, functions=functions, num_samples=40)
    found = posterior.info["chains"]["diagnostics"]
    assert set(found) == {"length", "ends"}
    assert posterior.ess == pytest.approx(min(40, *(f["ess_bulk"] for f in found.values())))
    with pytest.raises(TypeError, match="'which'.*must give a number.*it gave"):
        run(moving.chain, *moving.ARGS, functions={"which": lambda v: v["z"]})


def test_mixing_of_chains_that_agree_and_of_those_that_do_not():
    noise = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).numpy()
    agreed = mixing.mixing(noise)
    assert agreed["r_hat"] < 1.02 and min(agreed["ess_bulk"], agreed["ess_tail"]) > 500
    apart = mixing.mixing(noise + 5 * torch.arange(4.0)[:, None].numpy())
    assert apart["r_hat"] > 2 and apart["ess_bulk"] < 10
    assert mixing.mixing(noise[:, :3]) == {"r_hat": None, "ess_bulk": None, "ess_tail": None}


def test_without_arviz_stats_the_chains_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(mixing, "is_available", lambda: False)
    posterior = run(moving.chain, *moving.ARGS)
    assert "lmppl-pyro[diagnostics]" in posterior.info["notes"][0]
    assert math.isnan(posterior.ess) and posterior.info["chains"]["diagnostics"] == {}
    assert "ESS" in repr(posterior)


# --- bad input -------------------------------------------------------------------------------------


def coin(x, y):
    k = pyro.sample("k", dist.Bernoulli(0.4))
    pyro.sample("v", dist.ProjectedNormal(torch.ones(2)))  # on a circle
    z = lm_sample("z", x, max_tokens=2)
    lm_sample("y", [x, z] if k else [z, x], obs=y)


def unstopped(x, y):
    """A guide whose texts end otherwise."""
    lm_sample("z", x, max_tokens=2, stop="b")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_chains": 0}, ValueError, "num_chains"),
        ({"warmup": -1}, ValueError, "warmup"),
        ({"thin": 0}, ValueError, "thin"),
        ({"block": 0}, ValueError, "block"),
        ({"proposal_temperature": 0.0}, ValueError, "proposal_temperature"),
        ({"later": "keeps"}, ValueError, "did you mean 'keep'"),
        ({"kernels": [Redraw()]}, TypeError, "a dict of kernels by site"),
        ({"kernels": {"z": "walk"}}, TypeError, "site 'z' 'walk'.*RandomWalk"),
        ({"kernels": {"z": RandomWalk()}}, ValueError, "'z'.*is a text.*Redraw"),
        ({"kernels": {"k": RandomWalk()}}, ValueError, "'k'.*discrete, Bernoulli.*Redraw"),
        ({"kernels": {"k": Suffix()}}, ValueError, "'k'.*is no text.*Redraw"),
        (
            {"kernels": {"v": RandomWalk()}},
            ValueError,
            "'v'.*none for ProjectedNormal, whose support is .*: take .*Redraw.*independent redraws",
        ),
        ({"functions": {}}, TypeError, "functions"),
        ({"functions": {"n": 3}}, TypeError, "functions"),
        ({"guide": unstopped}, ValueError, "'z': the guide draws with max_tokens=2, stop=.'b'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        run(coin, *moving.ARGS, **options)


def test_a_guide_that_draws_in_another_order_is_refused():
    def backwards(x, y):
        lm_sample("w", x, max_tokens=2)
        lm_sample("z", x, max_tokens=2, stop="b")

    with pytest.raises(ValueError, match="the guide draws site 'w' before 'z'"):
        run(moving.chain, *moving.ARGS, guide=backwards)


def test_a_kernel_for_no_site_is_warned_of():
    with pytest.warns(UserWarning, match="names 'zz', where no chain chose to move.*: k, v, z"):
        run(coin, *moving.ARGS, kernels={"zz": Redraw()})
