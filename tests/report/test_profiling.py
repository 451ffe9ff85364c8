"""profile: where the time went, by kind of work."""

from __future__ import annotations

import pickle

import pytest
import torch

import lmppl
from lmppl import lm_sample, require
from lmppl.lm.meter import roofline, work
from lmppl.report.tables import as_text, profile_blocks
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0, eos=False)
LM.model.requires_grad_(False)
FIT = {"batch_size": 8, "progress": False}


@pytest.fixture(autouse=True)
def _measured_shortly(monkeypatch):
    monkeypatch.setattr(roofline, "_SECONDS", 0.001)
    yield
    assert work._ledger is None  # whatever happened


def infill(x, y):
    z = lm_sample("z", x, max_tokens=3)
    lm_sample("y", [x, z], obs=y)
    return z


def check(p):
    """What holds of every profile."""
    assert 0 < sum(w.seconds for w in p.works) <= p.seconds
    assert p.seconds_outside == pytest.approx(p.seconds - sum(w.seconds for w in p.works))
    assert p.share_outside == pytest.approx(p.seconds_outside / p.seconds)
    assert p.passes == sum(w.passes for w in p.works)
    for w in p.works:
        # A token that several sequences share is computed once, and asked for by each.
        assert w.outputs > 0 and w.positions >= w.rows >= w.passes > 0
        assert w.seconds > 0 and w.flops > 0 and w.roofline > 0
        assert w.roofline == pytest.approx(w.gemm_seconds / w.seconds)
        assert w.mean_batch == w.rows / w.passes
        if w.tokens:
            assert w.tokens_per_second == pytest.approx(w.tokens / w.seconds)
    assert pickle.loads(pickle.dumps(p)).summary() == p.summary()


def kinds(p):
    return [w.kind for w in p.works]


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_of_a_sampler(method):
    posterior = lmppl.infer(
        infill, "ab.", "ab", lm=LM, method=method, num_samples=8, seed=0, profile=True
    )
    p = posterior.profile
    check(p)
    assert kinds(p) == ["sampled", "scored"]
    assert p.sampled.tokens == posterior.info["tokens_sampled"] == 8 * 3
    assert p.scored.tokens == posterior.info["tokens_scored"] == 2 * len(set(posterior["z"]))
    assert p.scored.tokens == p.scored.outputs
    assert p.trained.tokens == p.read.passes == 0 and p.read.roofline is None
    assert posterior.info["seconds"] <= p.seconds
    assert posterior.resample(2).profile is p


def test_of_exact():
    p = lmppl.infer(infill, "ab.", "ab", lm=LM, method="exact", profile=True).profile
    check(p)
    assert kinds(p) == ["scored", "read"]
    assert p.scored.tokens == 2 * 3**3
    assert p.read.tokens == 0 and p.read.tokens_per_second is None
    assert p.read.outputs >= 1 + 3 + 9


def test_of_gflownet_with_its_training():
    posterior = lmppl.infer(
        infill, "ab.", "ab", lm=LM, method="gflownet", steps=2, fit={"batch_size": 8},
        num_samples=4, seed=0, progress=False, profile=True,
    )  # fmt: skip
    p = posterior.profile
    check(p)
    assert kinds(p) == ["sampled", "scored", "trained"]
    for kind in kinds(p):
        assert getattr(p, kind).tokens == posterior.info[f"tokens_{kind}"] > 0
    assert "tokens trained on" in repr(posterior)


def test_of_training():
    before = LM.tokens_trained
    guide = lmppl.LMGuide(infill, lm=LM)
    with lmppl.profile() as p:
        guide.fit([("ab.", "ab")], steps=2, seed=0, **FIT)
    check(p)
    assert kinds(p) == ["sampled", "scored", "trained"]
    assert p.trained.tokens == LM.tokens_trained - before
    assert p.trained.tokens % 3 == 0 and 0 < p.trained.tokens <= 2 * 8 * 3  # equal ones once
    # Forward and backward, on the adapter's own parameters.
    matrices = guide.adapters()[0].runner.matrices
    assert p.trained.flops == 2 * sum(matrices.flops(p.trained.positions, p.trained.outputs))


def test_heads_read_states():
    import pyro
    import pyro.distributions as dist

    def program():
        z = lm_sample("z", "ab", max_tokens=1)
        theta = pyro.sample("theta", dist.Beta(1.0, 2.0))
        pyro.sample("y", dist.Bernoulli(theta), obs=torch.tensor(float(z == "a")))

    guide = lmppl.LMGuide(program, lm=LM)
    with lmppl.profile() as p:
        guide.fit([()], steps=1, seed=0, **FIT)
    check(p)
    assert "read" in kinds(p)


def test_a_lookahead_is_scoring():
    posterior = lmppl.infer(
        infill, "ab.", "ab", lm=tiny_lm("ab.", seed=0), method="smc", twist="lookahead",
        num_samples=8, seed=0, profile=True,
    )  # fmt: skip
    check(posterior.profile)
    assert kinds(posterior.profile) == ["sampled", "scored"]
    assert posterior.profile.scored.tokens == posterior.info["tokens_scored"]
    assert posterior.profile.scored.passes > 1


def test_of_plain_calls():
    with lmppl.profile() as p:
        LM.sample("ab", 5, max_tokens=4, seed=0)
        LM.log_prob("ab", ["ab.", "ba"])
    check(p)
    assert p.sampled.tokens == 5 * 4 and p.scored.tokens == 3 + 2


def test_several_models_count_by_their_own_parameters():
    models = [tiny_lm("ab.", seed=0, eos=False, hidden_size=size) for size in (32, 128)]
    for lm in models:
        lm.log_prob("a", ["ab"])  # the probes are behind us
    with lmppl.profile() as p:
        for lm in models:
            lm.log_prob("ab", ["ab", "ba"])
    one = p.scored.positions // 2
    flops = sum(sum(lm.runner.matrices.flops(one, 4)) for lm in models)
    assert p.scored.flops == flops and p.scored.outputs == 8


def test_profiles_nest():
    with lmppl.profile() as outer:
        first = lmppl.infer(infill, "ab.", "ab", lm=LM, num_samples=4, seed=0, profile=True)
        with pytest.raises(KeyError), lmppl.profile() as inner:
            LM.sample("ab", 2, max_tokens=2, seed=0)
            raise KeyError
    check(outer)
    check(inner)
    for kind in ("tokens", "passes", "positions", "outputs", "flops"):
        ours = [getattr(each.sampled, kind) for each in (outer, first.profile, inner)]
        assert ours[0] == ours[1] + ours[2], kind
    assert inner.sampled.tokens == 4
    assert first.profile.seconds + inner.seconds <= outer.seconds
    assert first.profile.sampled.seconds + inner.sampled.seconds <= outer.sampled.seconds


def test_a_profile_within_a_program():
    profiles = []

    def program():
        with lmppl.profile() as p:
            lm_sample("z", "ab", max_tokens=2)
        profiles.append(p)

    lmppl.infer(program, lm=LM, method="importance", num_samples=3, seed=0)
    assert [p.sampled.tokens for p in profiles] == [6] * 3  # drawn side by side


def test_off_by_default():
    assert lmppl.infer(infill, "ab.", "ab", lm=LM, num_samples=2, seed=0).profile is None


def test_profiling_changes_no_result():
    runs = [
        lmppl.infer(infill, "ab.", "ab", lm=LM, num_samples=16, seed=0, profile=profile)
        for profile in (False, True)
    ]
    assert runs[0]["z"] == runs[1]["z"]
    assert runs[0].log_weights.tolist() == runs[1].log_weights.tolist()


def test_dead_samples_have_a_profile():
    def impossible():
        z = lm_sample("z", "ab", max_tokens=2)
        require("is long", len(z) > 9)

    with pytest.raises(lmppl.ZeroEvidenceError) as info:
        lmppl.infer(impossible, lm=LM, num_samples=4, seed=0, profile=True)
    check(info.value.posterior.profile)
    assert info.value.posterior.profile.sampled.tokens == 8


def test_a_profile_without_language_models():
    with lmppl.profile() as p:
        torch.ones(2)
    assert p.works == [] and p.seconds_outside == p.seconds > 0 and p.mean_batch is None
    assert repr(p).splitlines()[0].endswith(", 0 forward passes")


def test_rates_that_cannot_be_measured(monkeypatch):
    def no_memory(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(roofline, "gemm_rate", no_memory)
    with lmppl.profile() as p:
        LM.sample("ab", 2, max_tokens=2, seed=0)
    assert p.sampled.gemm_seconds is p.sampled.roofline is None
    assert p.sampled.flops > 0 and "sampled" in repr(p)


def test_figures_come_at_the_end():
    with lmppl.profile() as p:
        with pytest.raises(RuntimeError, match="when its with block has ended"):
            _ = p.sampled
        assert "not ended" in repr(p) and "not ended" in p._repr_html_()


def test_an_option_that_is_misspelt():
    with pytest.raises(TypeError, match="did you mean 'profile'"):
        lmppl.infer(infill, "ab.", "ab", lm=LM, profil=True)


# --- the table -----------------------------------------------------------------------------------

SUMMARY = {
    "seconds": 20.0,
    "seconds_outside": 0.5,
    "share_outside": 0.025,
    "passes": 1234,
    "mean_batch": 31.26,
    "works": [
        {
            "kind": "sampled", "tokens": 12345, "positions": 13000, "passes": 1200,
            "mean_batch": 10.0, "seconds": 15.0, "tokens_per_second": 823.0, "roofline": 0.25,
        },
        {
            "kind": "read", "tokens": 0, "positions": 50, "passes": 34,
            "mean_batch": 1.5, "seconds": 4.5, "tokens_per_second": None, "roofline": None,
        },
    ],
}  # fmt: skip


def test_the_table_has_a_row_a_kind():
    lines = as_text(profile_blocks(SUMMARY), width=80).splitlines()
    assert lines[0] == "Profile: 20.0 s, 1,234 forward passes of 31.3 rows on average"
    assert lines[1].split() == [
        "tokens", "positions", "passes", "batch", "seconds", "share", "tokens/s", "roofline",
    ]  # fmt: skip
    assert lines[3].split() == [
        "sampled", "12,345", "13,000", "1,200", "10.0", "15.0", "s", "75.0%", "823", "25.0%",
    ]  # fmt: skip
    assert lines[4].split() == ["read", "-", "50", "34", "1.5", "4.500", "s", "22.5%", "-", "-"]
    assert lines[5].split() == ["outside", "0.500", "s", "2.5%"]
    assert max(map(len, lines)) <= 80


def test_the_table_in_html():
    with lmppl.profile() as p:
        LM.sample("ab", 2, max_tokens=2, seed=0)
    page = p._repr_html_()
    assert page.count("<tr>") == page.count("</tr>") == 3
    assert "<td>sampled</td><td>4</td>" in page and "<td>outside</td>" in page
