"""Posteriors of independent runs as one: nothing is lost, nothing counts twice, a zero counts."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from weighted_traces import posterior_of

import lmppl
from lmppl import Posterior, ZeroEvidenceError, lm_sample, pool, require
from lmppl.runtime import nth_seed
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)


def infill(x, y):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], obs=y)
    w = lm_sample("w", [x, z], max_tokens=2)
    require("no a", "a" not in w)
    lm_sample("v", [x, w], obs=y)
    return z


def infer(seed=0, *, args=("ab.", "aba"), num_samples=8, **options):
    options = {"method": "smc", "lm": LM, "ess_threshold": 1.0} | options
    if options["method"] != "smc":
        del options["ess_threshold"]
    return lmppl.infer(infill, *args, num_samples=num_samples, seed=seed, **options)


def dead(num=3, seed=99):
    """What ``infer`` raises where all samples have probability zero."""

    def program(x, y):
        z = lm_sample("z", x, max_tokens=1)
        require("impossible", len(z) > 5)

    with pytest.raises(ZeroEvidenceError) as raised:
        lmppl.infer(program, "ab.", "aba", lm=LM, num_samples=num, seed=seed)
    return raised.value


def assert_same(one: Posterior, other: Posterior) -> None:
    """To the bit."""
    assert torch.equal(one.log_weights, other.log_weights)
    assert all(a is b for a, b in zip(one.traces, other.traces, strict=True))
    assert one.returns == other.returns


# --- what a pool is ------------------------------------------------------------------------------


def test_weights_and_evidence_by_hand():
    """Z is (2 * 1 + 4 * 3) / 6; each run has the weight of its size times its evidence."""
    one = posterior_of(["a", "b"], [0.5, 1.5])
    two = posterior_of(["a", "b", "b", "c"], [3.0, 6.0, 3.0, 0.0])
    both = pool([one, two])
    assert both.log_evidence == pytest.approx(math.log(14 / 6))
    assert both.probs("z") == pytest.approx({"b": 10.5 / 14, "a": 3.5 / 14})
    squares = 0.5**2 + 1.5**2 + 3.0**2 + 6.0**2 + 3.0**2
    assert both.ess == pytest.approx(14**2 / squares)
    assert both.returns == ["a", "b", "a", "b", "b", "c"]
    assert pool(iter([one, two])).log_evidence == both.log_evidence


def test_islands_are_what_was_pooled():
    runs = [infer(seed, num_samples=n) for seed, n in enumerate((8, 5, 9))]
    both = pool(runs)
    assert len(both) == 22 and len(both.islands) == 3
    for run, island in zip(runs, both.islands, strict=True):
        assert_same(run, island)
        assert island.log_evidence == run.log_evidence and island.ess == run.ess
        assert dict(island.info) == {**run.info, "killed": dict(run.info["killed"])}
        assert len(island.particles) == len(run.particles) > 1
        assert [s.ancestors for s in island.particles] == [s.ancestors for s in run.particles]
    assert_same(pool(both.islands), both)
    assert pool(both.islands).info == both.info


def test_a_single_run_is_an_island():
    run = infer()
    assert run.islands == [run] and pool([run]) is run
    assert run.summary()["islands"] == 1 and "island" not in repr(run)


def test_pools_are_pooled_by_their_islands():
    runs = [infer(seed) for seed in range(4)]
    whole, parts = pool(runs), pool([pool(runs[:2]), runs[2], pool(runs[3:])])
    assert_same(whole, parts)
    assert whole.info == parts.info and len(parts.islands) == 4
    assert whole.log_evidence_stderr == parts.log_evidence_stderr > 0


def test_what_it_says_of_the_runs():
    runs = [infer(seed) for seed in range(4)]
    runs[1].info["notes"] = ["all", "one"]
    for run in (runs[0], *runs[2:]):
        run.info["notes"] = ["all"]
    both = pool(runs)
    assert both.info["engine"] == "smc" and not both.info["iid"]
    assert both.killed == sum((run.killed for run in runs), Counter()) and both.killed["no a"] > 1
    assert both.info["notes"] == ["all", "in 1 of 4 islands: one"]
    for cost in ("tokens_sampled", "tokens_scored", "seconds", "resamplings"):
        assert both.info[cost] == sum(run.info[cost] for run in runs), cost
    assert "seed" not in both.info and both.islands[2].info["seed"] == 2
    assert repr(both).startswith("Posterior by smc: 32 samples in 4 islands, ESS ")
    assert both.summary()["islands"] == 4


def test_a_pool_of_engines():
    both = pool([infer(0), infer(1, method="importance")])
    assert both.info["engine"] == "smc, importance" and not both.info["iid"]


def test_importance_sampling_stays_independent():
    """Its standard error is that of one run with all samples."""
    runs = [infer(seed, method="importance", num_samples=n) for seed, n in enumerate((10, 20))]
    both = pool(runs)
    assert both.info["iid"]
    weights = torch.cat([run.log_weights for run in runs]).exp()
    expected = float(weights.std() / weights.mean()) / math.sqrt(30)
    assert both.log_evidence_stderr == pytest.approx(expected)


def test_the_standard_error_of_smc_is_by_the_spread_of_four_islands_or_more():
    runs = [infer(seed) for seed in range(6)]
    assert runs[0].log_evidence_stderr is None and pool(runs[:3]).log_evidence_stderr is None
    found = [pool(runs[:k]).log_evidence_stderr for k in (4, 6)]
    for error, k in zip(found, (4, 6), strict=True):
        z = torch.tensor([run.log_evidence for run in runs[:k]]).exp()
        assert error == pytest.approx(float(z.std() / z.mean()) / math.sqrt(k), rel=0.5)
        assert f"(standard error {error:.2g})" in repr(pool(runs[:k]))


def test_one_island_with_most_of_the_weight_is_a_reason_for_doubt():
    runs = [posterior_of(list("abcdefgh"), [1.0] * 8) for _ in range(4)]
    assert pool(runs).summary()["doubts"] == []
    large = posterior_of(list("abcdefghijklmnop"), [30.0] * 16)
    both = pool([*runs, large])
    assert both.summary()["doubts"] == ["one of 5 islands has 94% of the weight"]
    assert "don't trust these figures: one of 5 islands has 94%" in repr(both)


def test_draws_of_equal_weight_keep_what_they_are_worth():
    runs = [infer(seed, num_samples=50).resample(50, seed=seed) for seed in range(2)]
    both = pool(runs)
    shares = torch.tensor([run.log_evidence for run in runs]).softmax(0).tolist()
    expected = 1 / sum(share**2 / run.ess for share, run in zip(shares, runs, strict=True))
    assert both.ess == pytest.approx(expected) and both.ess < 0.9 * len(both)
    assert max(run.ess for run in runs) < both.ess <= sum(run.ess for run in runs) * (1 + 1e-9)


def test_a_guide_is_kept_if_it_is_that_of_all():
    guide = object()
    one, two = (posterior_of(["a"], [1.0], guide=guide) for _ in range(2))
    assert pool([one, two]).guide is guide
    assert pool([one, posterior_of(["a"], [1.0])]).guide is None


# --- runs that have found nothing ----------------------------------------------------------------


@pytest.mark.parametrize("how", ["error", "posterior", "saved"])
def test_a_run_that_found_nothing_is_an_estimate_of_zero(how, tmp_path):
    run, error = infer(num_samples=6), dead(num=3)
    given = error
    if how == "posterior":
        given = error.posterior
    if how == "saved":
        error.posterior.save(tmp_path / "dead")
        given = Posterior.load(tmp_path / "dead", lm=LM)
    both = pool([run, given])
    assert both.log_evidence == pytest.approx(run.log_evidence + math.log(6 / 9))
    assert len(both) == 9 and both.ess == pytest.approx(run.ess)
    assert both.probs("z") == pytest.approx(run.probs("z"))
    assert both.killed["impossible"] == 3 and both.islands[1].log_evidence == -math.inf
    assert pool([given, run]).log_evidence == pytest.approx(both.log_evidence)


def test_zeros_are_in_the_standard_error():
    """Half of the runs found nothing: Z is a half of what the others say."""
    runs = [posterior_of(["a"] * 2, [1.0, 1.0]) for _ in range(4)]
    errors = [dead(num=2, seed=seed).posterior for seed in range(100, 104)]
    both = pool([*runs, *errors])
    assert both.log_evidence == pytest.approx(math.log(0.5))
    assert both.log_evidence_stderr == pytest.approx(1 / math.sqrt(7), rel=0.1)
    alone = pool([runs[0], *errors])
    assert alone.log_evidence_stderr == math.inf and "standard error inf" in repr(alone)


def test_all_of_them():
    """The usual error, with all samples."""
    with pytest.raises(ZeroEvidenceError, match=r"all 5 samples .*'impossible' \(5\)") as raised:
        pool([dead(num=2, seed=3), dead(num=3, seed=4)])
    assert len(raised.value.posterior) == 5 and len(raised.value.posterior.islands) == 2
    with pytest.raises(ZeroEvidenceError):
        pool([dead()])


# --- what is refused -----------------------------------------------------------------------------


def test_no_pool():
    with pytest.raises(ValueError, match="at least one"):
        pool([])
    for wrong in ("runs", [1], [infer().traces]):
        with pytest.raises(TypeError, match="pool\\(\\) takes posteriors, given"):
            pool(wrong)
    with pytest.raises(OSError, match="disk"):
        pool([infer(), OSError("disk")])


def test_an_engine_without_an_estimate_of_the_evidence():
    with pytest.raises(ValueError, match="posterior 1 of the pool, by mcmc, does not estimate"):
        pool([infer(), infer(1, method="mcmc", warmup=1, num_chains=2)])
    exact = infer(1, method="exact")
    with pytest.raises(ValueError, match="posterior 0 of the pool, by exact, is exact"):
        pool([exact, infer()])
    assert len(pool([exact.resample(5, seed=0), infer()])) == 13


def test_runs_of_one_seed():
    """A process that forgot its number would make the error bar too small."""
    with pytest.raises(ValueError, match=r"posteriors 0 and 2 of the pool .* one seed \(7\)"):
        pool([infer(7), infer(8), infer(7, num_samples=4)])
    islands = infer(7, islands=2)
    with pytest.raises(ValueError, match="posteriors 0 and 1 of the pool have runs of one seed"):
        pool([islands, infer(nth_seed(7, 1))])
    pool([islands, infer(7)])  # whose seed only islands derive theirs from
    unknown = posterior_of(["a"], [1.0])
    pool([unknown, posterior_of(["a"], [1.0])])


def test_posteriors_of_other_programs():
    def other(x, y):
        lm_sample("u", x, max_tokens=1)

    u = lmppl.infer(other, "ab.", "aba", lm=LM, num_samples=2, seed=5)
    with pytest.raises(ValueError, match=r"posterior 2 .* other latent sites .*\(u; z, w\)"):
        pool([infer(0), infer(1), u])


# --- what becomes of it --------------------------------------------------------------------------


def test_a_saved_pool(tmp_path):
    runs = [infer(seed) for seed in range(4)]
    runs[0].info["mine"] = object()  # which cannot be saved
    both = pool(runs)
    both.save(tmp_path / "pool")
    again = Posterior.load(tmp_path / "pool", lm=LM)
    assert again.log_evidence_stderr == both.log_evidence_stderr is not None
    assert [one.log_evidence for one in again.islands] == [run.log_evidence for run in runs]
    assert any("mine" in note for note in again.islands[0].info["notes"])
    assert again.islands[1].info == both.islands[1].info
    whole = Posterior.load(tmp_path / "pool", infill, "ab.", "aba", lm=LM)
    assert repr(whole) == repr(both)
    with pytest.raises(ValueError, match="is not saved"):
        again.islands[0].plot_particles()
    later = pool([again, infer(9)])
    assert len(later.islands) == 5 and later.islands[4].particles


def test_saved_runs_make_the_same_pool(tmp_path):
    runs = [infer(seed) for seed in range(3)]
    for k, run in enumerate(runs):
        run.save(tmp_path / str(k))
    loaded = pool(Posterior.load(tmp_path / str(k), lm=LM) for k in range(3))
    both = pool(runs)
    assert torch.equal(loaded.log_weights, both.log_weights) and loaded["z"] == both["z"]
    assert loaded.probs("z") == both.probs("z") and repr(loaded) == repr(both)
    assert loaded.info == both.info


def test_copies_have_islands_and_resampled_draws_have_none():
    both = pool([infer(seed) for seed in range(4)])
    for other in (copy.copy(both), copy.deepcopy(both)):
        assert len(other.islands) == 4 and other.log_evidence_stderr == both.log_evidence_stderr
        assert other.islands[3].particles
    drawn = both.resample(10, seed=0)
    assert drawn.islands == [drawn] and drawn.log_evidence_stderr is None
    assert drawn.log_evidence == pytest.approx(both.log_evidence)


def test_particles_are_asked_of_an_island():
    both = pool([infer(seed) for seed in range(2)])
    for posterior in (both, both.resample(4, seed=0)):
        with pytest.raises(ValueError, match=r"2 islands .* posterior.islands\[0\]"):
            posterior.plot_particles()
    assert both.islands[1].particles[-1].log_evidence == both.islands[1].log_evidence
