"""Islands of SMC: independent runs, whose pool is unbiased, the same wherever they are made."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import textwrap
import warnings

import pyro
import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased, values_of
from pyro import poutine

import lmppl
from lmppl import Posterior, ZeroEvidenceError, infer_island, lm_sample, pool, require
from lmppl.engines import islands
from lmppl.engines.islands import share_of
from lmppl.posterior import pooling
from lmppl.runtime import nth_seed
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES

LM = tiny_lm("ab.", seed=0)
TWO_SITES = CASES["observed text"]  # an observation after each
OBSERVED = [TWO_SITES.program, *TWO_SITES.args]


def infer(program, *args, lm=LM, **options):
    return lmppl.infer(program, *args, lm=lm, method="smc", **options)


def many_bs(text):
    return 1.5 * text.count("b") - 0.5


# --- E[Z-hat * weighted indicator of z] = R(z), summed over all choices of the sampler ------------


def check(monkeypatch, program, **options):
    options = {"num_samples": 3, "islands": 2, "ess_threshold": 1.0, "method": "smc"} | options
    ways = every_way(monkeypatch)
    return check_unbiased(ways, program, small.ARGS, small.small_lm(), **options)


def picked(x, y):
    """Whole strings, of which one kills half of the runs."""
    k = lm_sample("k", x, choices=["a", "b"], temperature=3.0)
    pyro.factor("taste", torch.tensor(1.5 if "a" in k else 0.0))
    z = lm_sample("z", [x, k], choices=["a", "b"], temperature=3.0)
    require("other", k != z)
    lm_sample("y", [x, k, z], obs=y)


@pytest.mark.parametrize(
    "program, options",
    [
        (picked, {}),
        pytest.param(small.constraint, {}, marks=pytest.mark.slow),
        pytest.param(small.early_end, {}, marks=pytest.mark.slow),
        pytest.param(small.longer, {"twist": many_bs}, marks=pytest.mark.slow),
    ],
)
def test_unbiased_by_enumeration(remembered, monkeypatch, program, options):
    """Of two particles on one island, and one on the other; some islands die."""
    assert check(monkeypatch, program, **options) > 50


def leave_out_the_dead(patch):
    """As one would who drops the runs that raised an error: the mean of the others is too large."""
    pooled_runs = pooling.pooled_runs

    def mutant(runs):
        live = [run for run in runs if run.log_evidence > -math.inf]
        return pooled_runs(live or runs)

    patch.setattr("lmppl.engines.base.pooled_runs", mutant)


def weigh_islands_alike(patch):
    """Whatever they have found, as one would who averages their probabilities."""
    pooled_runs = pooling.pooled_runs

    def mutant(runs):
        pooled = pooled_runs(runs)
        log_z = pooled.log_evidence
        alike = [
            run.log_weights - run.log_evidence + log_z
            if run.log_evidence > -math.inf
            else run.log_weights
            for run in runs
        ]
        pooled.log_weights = torch.cat(alike)
        return pooled

    patch.setattr("lmppl.engines.base.pooled_runs", mutant)


@pytest.mark.parametrize("mutate", [leave_out_the_dead, weigh_islands_alike])
def test_mistakes_are_found(remembered, monkeypatch, mutate):
    with monkeypatch.context() as patch:
        mutate(patch)
        with pytest.raises(AssertionError, match=" not "):
            check(monkeypatch, picked)


# --- the same wherever islands are made ----------------------------------------------------------


def guide(x, *observed):
    lm_sample("z", [x, "b"], max_tokens=2, stop=".", temperature=2.0)


OPTIONS = {
    "plain": {},
    "always": {"ess_threshold": 1.0, "resampling": "multinomial"},
    "twist": {"ess_threshold": 0.9, "twist": many_bs},
    "twist by site": {"ess_threshold": 0.9, "twist": {"w": many_bs}},
    "lookahead": {"ess_threshold": 0.9, "twist": "lookahead", "twist_every": 2},
    "moves": {"ess_threshold": 1.0, "rejuvenate": 2},
    "guide": {"ess_threshold": 0.9, "guide": guide},
    "a share of the prior": {"ess_threshold": 0.9, "guide": guide, "prior_fraction": 0.3},
}
EACH = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def assert_same(one: Posterior, other: Posterior, atol=0.0) -> None:
    assert len(one.islands) == len(other.islands)
    for name in ("z", "w"):
        assert [str(text) for text in one[name]] == [str(text) for text in other[name]]
    finite = one.log_weights > -math.inf
    assert torch.equal(finite, other.log_weights > -math.inf)
    difference = (one.log_weights - other.log_weights)[finite].abs().max()
    assert float(difference) <= atol
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=atol, rel=1e-12)
    assert one.log_evidence_stderr == pytest.approx(other.log_evidence_stderr, abs=atol, rel=1e-9)
    for a, b in zip(one.islands, other.islands, strict=True):
        assert a.info["seed"] == b.info["seed"]
        assert a.info["resamplings"] == b.info["resamplings"]
        assert a.info.get("rejuvenation") == b.info.get("rejuvenation")
        assert [s.ancestors for s in a.particles] == [s.ancestors for s in b.particles]


@EACH
def test_a_pool_of_single_runs_is_the_same_to_the_bit(remembered, options):
    """With one answer for one question, whatever the batch: the language model's rounding is its own."""
    options = options | {"num_samples": 20, "seed": 3}
    whole = infer(*OBSERVED, islands=4, **options)
    assert len(whole) == 20 and whole.info["seed"] == 3 and whole.info["resamplings"] >= 0
    alone = [
        infer(*OBSERVED, **options | {"num_samples": 5, "seed": nth_seed(3, k)}) for k in range(4)
    ]
    assert_same(whole, pool(alone))
    parts = [infer_island(*OBSERVED, island=k, islands=4, lm=LM, **options) for k in range(4)]
    assert_same(whole, pool(parts))
    assert len(set(whole.log_weights.tolist())) > 4 and not torch.equal(
        whole.islands[0].log_weights, whole.islands[1].log_weights
    )


@EACH
def test_a_pool_of_single_runs_is_the_same_but_for_rounding(options):
    options = options | {"num_samples": 22, "seed": 3}
    whole = infer(*OBSERVED, islands=4, **options)
    parts = [infer_island(*OBSERVED, island=k, islands=4, lm=LM, **options) for k in range(4)]
    assert [len(part) for part in parts] == [6, 6, 5, 5]
    assert_same(whole, pool(parts), atol=1e-4)


def test_a_pool_of_a_batch_is_the_same():
    """Input i of a batch has the seed of island i."""
    options = {"lm": LM, "seed": 3, "ess_threshold": 0.9}
    whole = infer(*OBSERVED, islands=4, num_samples=20, **options)
    inputs = [TWO_SITES.args] * 4
    batch = lmppl.infer_batch(
        TWO_SITES.program, inputs, num_samples=5, on_error="return", **options
    )
    assert_same(whole, pool(batch), atol=1e-4)


def test_one_island_is_the_run_itself():
    options = {"num_samples": 12, "seed": 5, "ess_threshold": 0.9}
    run, other = infer(*OBSERVED, **options), infer(*OBSERVED, islands=1, **options)
    assert torch.equal(run.log_weights, other.log_weights) and len(other.islands) == 1
    alone = infer_island(*OBSERVED, island=0, islands=1, lm=LM, **options)
    assert torch.equal(run.log_weights, alone.log_weights)
    assert [s.ancestors for s in run.particles] == [s.ancestors for s in other.particles]
    for posterior in (run, other, alone):
        assert posterior.info["seed"] == 5 and "islands" not in posterior.info


def test_islands_of_importance_sampling_make_a_longer_run():
    options = {"method": "importance", "num_samples": 10, "seed": 5, "lm": LM}
    parts = [infer_island(*OBSERVED, island=k, islands=3, **options) for k in range(3)]
    both = pool(parts)
    assert both.info["iid"] and len(both) == 10 and both.log_evidence_stderr > 0


def test_the_shares_of_islands():
    for num, count in ((10, 3), (7, 7), (12, 4), (5, 1)):
        shares = [share_of(k, count, num, 0) for k in range(count)]
        assert sum(size for size, _ in shares) == num
        assert max(shares)[0] - min(shares)[0] <= 1
        assert len({seed for _, seed in shares}) == count
    assert share_of(1, 2, 10, 0)[1] == share_of(1, 3, 10, 0)[1] == nth_seed(0, 1)
    assert share_of(0, 1, 10, 7) == (10, 7)


def fitted():
    guide = lmppl.LMGuide(TWO_SITES.program, lm=LM)
    return guide.fit([TWO_SITES.args], steps=2, batch_size=4, seed=0, progress=False)


@pytest.mark.slow
def test_with_a_trained_guide_and_its_flow():
    options = {"guide": fitted(), "num_samples": 12, "seed": 0, "ess_threshold": 1.0}
    for twist in (None, "flow"):
        whole = infer(*OBSERVED, islands=4, twist=twist, **options)
        parts = [
            infer_island(*OBSERVED, island=k, islands=4, lm=LM, twist=twist, **options)
            for k in range(4)
        ]
        assert_same(whole, pool(parts), atol=1e-3)


PART = """
    import sys
    import lmppl
    from lmppl.testing import tiny_lm
    from lmppl.testing.programs import CASES

    worker, num_workers, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    case, lm = CASES["observed text"], tiny_lm("ab.", seed=0)
    for k in range(worker, 5, num_workers):
        part = lmppl.infer_island(
            case.program, *case.args, island=k, islands=5, lm=lm, num_samples=23, seed=4,
            ess_threshold=0.9, twist="lookahead",
        )
        part.save(f"{out}/{k}")
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each makes some of the islands and saves them; the pool of what is read is that of one process."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PART)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [subprocess.Popen([*command, str(w), "2", str(tmp_path)], env=env) for w in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    loaded = [Posterior.load(tmp_path / str(k), lm=LM) for k in range(5)]
    together = pool(loaded)
    options = {"num_samples": 23, "seed": 4, "ess_threshold": 0.9, "twist": "lookahead"}
    whole = infer(*OBSERVED, islands=5, **options)
    assert [len(island) for island in loaded] == [5, 5, 5, 4, 4]
    for name in ("z", "w"):
        assert [str(t) for t in together[name]] == [str(t) for t in whole[name]]
    torch.testing.assert_close(together.log_weights, whole.log_weights, atol=1e-4, rtol=0)
    error = whole.log_evidence_stderr
    assert together.log_evidence_stderr == pytest.approx(error, abs=1e-4) and error > 0


# --- estimates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["observed text", "branch", "hard constraint"])
def test_the_posterior_is_found(name):
    case = CASES[name]
    exact = case.enumerate()
    run = infer(case.program, *case.args, lm=case.lm, islands=8, num_samples=1600, seed=0)
    assert abs(run.log_evidence - exact.log_evidence) < 4 * run.log_evidence_stderr
    assert 0 < run.log_evidence_stderr < 0.15
    assert run.ess > 20 and run.ess == pytest.approx(1 / float((run.weights**2).sum()))
    found = run.probs(lambda v: values_of({k: str(t) for k, t in v.items() if k in exact.latents}))
    expected = {}
    for trace in exact:
        key = values_of({name: str(text) for name, text in trace.texts.items()})
        expected[key] = expected.get(key, 0.0) + math.exp(trace.log_joint - exact.log_evidence)
    distance = sum(abs(found.get(k, 0.0) - expected.get(k, 0.0)) for k in {**found, **expected}) / 2
    assert distance < 0.12


@pytest.mark.slow
def test_how_often_two_standard_errors_hold_the_truth():
    """Islands of four particles that are always resampled: copies of copies, whose weights say little.
    Taken as independent, they are off in a third of all runs."""
    truth = TWO_SITES.enumerate().log_evidence
    inputs, options = [TWO_SITES.args] * 640, {"num_samples": 4, "ess_threshold": 1.0}
    runs = list(lmppl.infer_batch(TWO_SITES.program, inputs, lm=LM, seed=0, **options))
    pools = [pool(runs[i : i + 8]) for i in range(0, 640, 8)]
    ratios = torch.tensor([run.log_evidence - truth for run in runs]).exp()
    assert abs(ratios.mean() - 1) < 3 * ratios.std() / math.sqrt(640)
    assert 0.8 < ratios.std() < 1.4  # far from normal

    def share(error):
        return sum(abs(p.log_evidence - truth) < 2 * error(p) for p in pools) / len(pools)

    def as_if_independent(posterior):
        relative = len(posterior) * float((posterior.weights**2).sum()) - 1
        return math.sqrt(relative / (len(posterior) - 1))

    by_islands = share(lambda p: p.log_evidence_stderr)
    assert by_islands > 0.8 and share(as_if_independent) < by_islands - 0.1


# --- edges ---------------------------------------------------------------------------------------


def seldom(x):
    z = lm_sample("z", x, max_tokens=1, temperature=2.0)
    require("a", "a" in z)
    w = lm_sample("w", [x, z], max_tokens=1)
    lm_sample("y", [x, w], obs="b")


def test_an_island_that_dies_is_an_estimate_of_zero():
    """Of one particle each, some die."""
    run = infer(seldom, "ab.", islands=8, num_samples=8, seed=0)
    found = [island.log_evidence for island in run.islands]
    dead = found.count(-math.inf)
    assert 0 < dead < 8 and run.killed == {"a": dead}
    expected = torch.tensor(found).exp().mean().log()
    assert run.log_evidence == pytest.approx(float(expected))
    parts = [
        infer_island(seldom, "ab.", island=k, islands=8, lm=LM, num_samples=8, seed=0)
        for k in range(8)
    ]
    assert [part.log_evidence for part in parts].count(-math.inf) == dead
    assert pool(parts).log_evidence == pytest.approx(run.log_evidence, abs=1e-4)


def test_all_islands_dead():
    def never(x):
        z = lm_sample("z", x, max_tokens=1)
        require("impossible", len(z) > 3)

    with pytest.raises(ZeroEvidenceError, match=r"all 12 samples .*'impossible' \(12\)") as raised:
        infer(never, "ab.", islands=3, num_samples=12, seed=0)
    posterior = raised.value.posterior
    assert len(posterior.islands) == 3 and posterior.log_evidence == -math.inf
    alone = infer_island(never, "ab.", island=0, islands=3, lm=LM, num_samples=12, seed=0)
    assert len(alone) == 4 and alone.log_evidence == -math.inf


def test_islands_share_the_calls_of_the_language_model(monkeypatch):
    lm, calls = tiny_lm("ab.", seed=0), []
    for name in ("draw", "score"):
        method = getattr(lm, name)
        monkeypatch.setattr(
            lm, name, lambda r, n=name, m=method, **k: calls.append((n, len(r))) or m(r, **k)
        )

    def infill(x, y):
        z = lm_sample("z", x, max_tokens=3, stop=".")
        lm_sample("y", [x, z], obs=y)

    run = infer(infill, "ab.", "aba", lm=lm, islands=5, num_samples=20, seed=0)
    assert calls == [("draw", 20), ("score", 20)]
    calls.clear()
    inputs = [("ab.", "aba"), ("b.", "ab"), ("ab.", "bb")]
    batch = list(
        lmppl.infer_batch(infill, inputs, lm=lm, method="smc", islands=5, num_samples=20, seed=0)
    )
    assert calls == [("draw", 60), ("score", 60)]
    for args, posterior in zip(inputs, batch, strict=True):
        alone = infer(infill, *args, lm=lm, islands=5, num_samples=20, seed=posterior.info["seed"])
        torch.testing.assert_close(posterior.log_weights, alone.log_weights, atol=1e-4, rtol=0)
        for cost in ("tokens_sampled", "tokens_scored", "resamplings"):
            assert posterior.info[cost] == alone.info[cost]
    # What islands share was computed once; alone, each would have paid for it.
    assert run.info["tokens_scored"] < sum(one.info["tokens_scored"] for one in run.islands)
    assert run.info["tokens_sampled"] == sum(one.info["tokens_sampled"] for one in run.islands) > 0


def test_each_island_has_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    run = infer(*OBSERVED, islands=2, num_samples=8, seed=0)
    with pytest.raises(ValueError, match="posterior.islands\\[0\\].plot_particles"):
        run.plot_particles()
    with pytest.raises(ValueError, match="2 islands"):
        run.particles_html()
    run.islands[1].plot_particles(tmp_path / "particles.png")
    assert (tmp_path / "particles.png").stat().st_size > 1000
    assert "4 particles" in run.islands[1].particles_html()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_callbacks_and_bars_are_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    infer(*OBSERVED, islands=3, num_samples=7, seed=0, callback=told.append, progress=True)
    assert {figures["island"] for figures in told} == {0, 1, 2}
    for k, size in enumerate((3, 2, 2)):
        own = [figures for figures in told if figures["island"] == k]
        assert [figures["stage"] for figures in own] == [0, 1, 2]
        assert all(figures["engine"] == "smc" and figures["of"] == size for figures in own)
    assert "smc" in terminal.getvalue() and "tokens" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    infer(*OBSERVED, islands=3, num_samples=7, seed=0, progress=False)
    assert terminal.getvalue() == ""


class KnowsW:
    """A guide, and its proposer, that says of no site but ``w`` that it has drawn it."""

    def __init__(self) -> None:
        self.draws = set()

    def proposer_factory(self, args):
        return lambda slot, seed: KnowsW()

    def propose(self, site, trace):
        self.draws |= {site["name"]} & {"w"}

    def finish(self, trace):
        pass

    def fork(self, streams):
        return KnowsW()

    def close(self):
        pass


def test_warnings_are_of_what_holds_on_all_islands():
    """On single islands the branch with the twisted text is not met."""

    def branches(x):
        z = lm_sample("z", x, max_tokens=1, temperature=2.0)
        if "a" in z:
            lm_sample("w", [x, z], max_tokens=2)
        lm_sample("y", [x, z], obs="b")

    options = {"islands": 8, "num_samples": 8, "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = infer(branches, "ab.", twist={"w": many_bs}, **options)
    assert not run.info["notes"] and 0 < run["w"].count(None) < 8
    with pytest.warns(UserWarning, match="twist= names 'v'"):
        run = infer(branches, "ab.", twist={"v": many_bs, "w": many_bs}, **options)
    assert [note[:15] for note in run.info["notes"]] == ["twist= names 'v'"[:15]]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infer(branches, "ab.", guide=KnowsW(), **options)

    def knows_nothing(x):
        return

    with pytest.warns(UserWarning, match="knows_nothing proposed nothing") as warned:
        run = infer(branches, "ab.", guide=knows_nothing, **options)
    assert len(warned) == 1 and len(run.info["notes"]) == 1
    assert warned[0].filename == __file__


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_an_exception_on_an_island_ends_all(how, particles):
    """It says where, and nothing stays suspended."""
    error = KeyboardInterrupt if how == "interrupt" else ZeroDivisionError

    def program(x):
        z = lm_sample("z", x, max_tokens=1)
        lm_sample("w", [x, z], max_tokens=2)
        if "b" in z:
            raise error("here")

    with pytest.raises(error, match="here") as raised:
        infer(program, "ab.", islands=4, num_samples=8, seed=0)
    if how == "error":
        notes = " ".join(raised.value.__notes__)
        assert "of 4 (seed=" in notes and "raised in particle" in notes
    assert len(particles) == 8 and all(particle.finished for particle in particles)
    assert not poutine.runtime._PYRO_STACK


def test_the_state_around_a_run_stays(particles):
    """Handlers, random streams and grad mode; islands begin with none of them but grad mode."""
    seen = []

    def program(x):
        seen.append(torch.is_grad_enabled())
        lm_sample("z", x, max_tokens=1)
        pyro.sample("n", pyro.distributions.Normal(0.0, 1.0))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    with poutine.scale(scale=0.5), poutine.trace() as tr:
        run = infer(program, "ab.", islands=3, num_samples=6, seed=0)
    assert torch.equal(torch.get_rng_state(), before) and not tr.trace.nodes.keys() & {"z", "n"}
    assert run.log_evidence == pytest.approx(0.0) and set(seen) == {False}
    assert len({float(n) for n in run["n"]}) == 6


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"islands": 0}, ValueError, "islands=0: it must be an int of at least 1"),
        ({"islands": 2.5}, TypeError, "islands=2.5"),
        ({"islands": True}, TypeError, "islands=True"),
        ({"islands": 9}, ValueError, "islands=9 of num_samples=8"),
        ({"islands": 2, "method": "importance"}, TypeError, "'importance' has no option 'islands'"),
        ({"islands": 2, "method": "mcmc"}, TypeError, "'mcmc' has no option 'islands'"),
        ({"islands": 2, "method": "exact"}, TypeError, "'exact' has no option 'islands'"),
        ({"island": 2}, TypeError, "no option 'island'; did you mean 'islands'"),
    ],
)
def test_wrong_options(wrong, error, message):
    with pytest.raises(error, match=message):
        lmppl.infer(*OBSERVED, **{"lm": LM, "num_samples": 8, "method": "smc"} | wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"island": 2}, ValueError, "island=2 of islands=2: it is a number from 0 to 1"),
        ({"island": -1}, ValueError, "island=-1: it must be an int of at least 0"),
        ({"islands": 0}, ValueError, "islands=0"),
        ({"islands": 9}, ValueError, "islands=9 of num_samples=8"),
        ({"seed": None}, TypeError, "seed=None: islands need the same seed in all processes"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"method": "mcmc"}, ValueError, "method='mcmc' has no islands"),
        ({"method": lmppl.Exact()}, ValueError, "method='exact' has no islands"),
        ({"method": lmppl.SMC(islands=2)}, ValueError, "no engine that has islands"),
        ({"twits": None}, TypeError, "did you mean 'twist'"),
        ({"model": "infill"}, TypeError, "model must be a function"),
    ],
)
def test_wrong_calls_of_one_island(wrong, error, message):
    call = {
        "model": TWO_SITES.program,
        "island": 0,
        "islands": 2,
        "seed": 0,
        "num_samples": 8,
    } | wrong
    with pytest.raises(error, match=message):
        infer_island(call.pop("model"), *TWO_SITES.args, lm=LM, **call)


def test_an_engine_of_ones_own_has_islands():
    """By the same function, which gives it a state for each."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Plain(lmppl.Engine):
        islands: int = 1
        name = "plain"

        def sample(self, state):
            islands.on_islands(state, self.islands, self._on_island)

        def _on_island(self, state):
            state.start()
            while state.extend():
                state.draw()
            state.notes.append("done")

    run = lmppl.infer(*OBSERVED, lm=LM, method=Plain(islands=4), num_samples=12, seed=0)
    assert len(run.islands) == 4 and run.info["notes"] == ["done"]
    assert run.log_evidence_stderr > 0 and run.info["engine"] == "plain"


def test_a_trace_is_in_one_island():
    run = infer(*OBSERVED, islands=3, num_samples=9, seed=1)
    own = [trace for island in run.islands for trace in island.traces]
    assert all(a is b for a, b in zip(own, run.traces, strict=True))
    assert len({id(trace) for trace in own}) == 9
