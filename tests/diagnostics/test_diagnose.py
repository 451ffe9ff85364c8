"""diagnose: a guide against the exact answer."""

from __future__ import annotations

import functools
import json
import math
import re
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import lm_sample, require
from lmppl.testing import guide_report
from lmppl.testing.guides import guide_log_probs
from lmppl.testing.programs import CASES

ONE, DEAD, BETA = CASES["one site"], CASES["hard constraint"], CASES["beta and text"]


@functools.cache
def shaken_guide(case, size=0.03):
    """A guide with random adapter weights: not the prior, and not the posterior."""
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return guide


@functools.cache
def exact_posterior(case):
    return lmppl.infer(case.program, *case.args, lm=case.lm, method="exact")


@functools.cache
def enumerated(case):
    """log p and log q of every live trace, exactly."""
    traces = [trace for trace in case.enumerate() if trace.log_joint > -math.inf]
    log_z = case.enumerate().log_evidence
    log_p = torch.tensor([t.log_joint for t in traces], dtype=torch.float64) - log_z
    log_q = guide_log_probs(shaken_guide(case), case.program, case.args, traces, case.lm)
    return log_p, log_q


def run(case, **options):
    options = {"guide": shaken_guide(case), "seed": 0, **options}
    return lmppl.diagnose(case.program, *case.args, lm=case.lm, **options)


@functools.cache
def diagnosed(case):
    return run(case, posterior=exact_posterior(case))


def within(value, expected, stderr, slack=1e-3):
    assert stderr is not None and abs(value - expected) < 4 * stderr + slack


# --- against enumeration -------------------------------------------------------------------------


def test_elbo_and_brackets_are_the_enumerated_ones():
    log_p, log_q = enumerated(ONE)
    log_z = ONE.enumerate().log_evidence
    found = diagnosed(ONE)
    report = guide_report(shaken_guide(ONE), ONE.program, ONE.args, ONE.lm, exact=ONE.enumerate())
    assert report.gap > 0.3  # there is something to see
    within(found.elbo, log_z - report.gap, found.elbo_stderr)
    within(found.iw_bound, log_z, found.iw_bound_stderr)
    for end in found.kl_guide_posterior:
        within(end, report.gap, found.kl_guide_posterior_stderr)
    backward = float((log_p.exp() * (log_p - log_q)).sum())
    assert found.kl_posterior_guide == pytest.approx((backward, backward), abs=1e-3)
    assert found.eubo == pytest.approx(log_z + backward, abs=1e-3)
    assert (found.eubo_stderr, found.kl_posterior_guide_stderr) == (0.0, 0.0)
    assert found.log_z == pytest.approx(log_z, abs=1e-3) and found.log_z_source == "exact"
    assert abs(found.z_score) < 4
    sum_of_both = found.kl_guide_posterior[0] + found.kl_posterior_guide[0]
    assert found.eubo - found.elbo == pytest.approx(sum_of_both)
    assert found.dead_fraction == 0 and found.elbo_alive == found.elbo
    assert found.ess_fraction == pytest.approx(found.samples.ess / 256)


def test_dead_mass():
    report = guide_report(
        shaken_guide(DEAD), DEAD.program, DEAD.args, DEAD.lm, exact=DEAD.enumerate()
    )
    found = diagnosed(DEAD)
    deviation = math.sqrt(report.dead_mass * (1 - report.dead_mass) / 256)
    assert report.dead_mass > 0.03
    within(found.dead_fraction, report.dead_mass, deviation)
    assert found.killed == {"mentions b": round(256 * found.dead_fraction)}
    assert found.elbo == -math.inf and found.kl_guide_posterior == (math.inf, math.inf)
    within(found.elbo_alive, report.log_evidence - report.gap, found.elbo_alive_stderr)
    within(found.kl_alive_posterior[0], report.gap, found.kl_alive_posterior_stderr)
    log_p, log_q = enumerated(DEAD)
    backward = float((log_p.exp() * (log_p - log_q)).sum())
    assert found.kl_posterior_guide[0] == pytest.approx(backward, abs=1e-3)


def test_a_continuous_latent():
    guide = shaken_guide(BETA)
    exact = lmppl.testing.enumerate_program(BETA.program, *BETA.args, lm=BETA.lm, quadrature=12)
    report = guide_report(guide, BETA.program, BETA.args, BETA.lm, exact=exact)
    found = run(BETA)
    within(found.elbo, report.log_evidence - report.gap, found.elbo_stderr, 0.02)
    within(found.log_z, report.log_evidence, found.log_z_stderr)
    assert found.log_z_source == "prior"
    assert found.kl_guide_posterior[0] == pytest.approx(found.iw_bound - found.elbo)
    assert found.kl_guide_posterior[1] == math.inf
    assert found.kl_posterior_guide is found.eubo is found.iw_upper_bound is None


def test_continuous_values_are_scored_as_they_were_drawn():
    """Scoring a sample's own latents gives back its own u."""
    found = run(BETA, num_samples=8)
    for i in (0, 5):
        values = {name: found.samples[name][i] for name in ("z", "theta")}
        again = run(BETA, num_samples=2, latents=[values])
        assert again.eubo == pytest.approx(float(found.samples.log_weights[i]), abs=1e-4)
        assert again.eubo_stderr is None


def test_latents_that_are_exact_draws():
    draws = exact_posterior(ONE).resample(60, seed=0)["z"]
    found = run(ONE, latents=[{"z": text} for text in draws])
    exact = diagnosed(ONE)
    assert found.exact_source == "latents" and found.log_z_source == "prior"
    within(found.eubo, exact.eubo, found.eubo_stderr)
    log_z = ONE.enumerate().log_evidence
    within(found.iw_upper_bound, log_z, found.iw_upper_bound_stderr)
    assert found.iw_upper_bound < found.eubo
    for name in ("kl_guide_posterior", "kl_posterior_guide"):
        for end in getattr(found, name):
            within(end, getattr(exact, name)[0], getattr(found, f"{name}_stderr"))
    # A str is its canonical tokens, here the only ones; a tensor is a site's value.
    strings = run(ONE, latents=[{"z": str(text)} for text in draws])
    tensors = run(ONE, latents=[{"z": _padded(text, 3)} for text in draws])
    assert found.eubo == pytest.approx(strings.eubo, abs=1e-4)
    assert found.eubo == pytest.approx(tensors.eubo, abs=1e-4)


def _padded(text, width):
    ids = list(text.token_ids)
    return torch.tensor(ids + [-1] * (width - len(ids)))


def heated(x, y):
    lm_sample("z", x, max_tokens=3, stop=".", temperature=2.0)


@pytest.mark.parametrize("kind", ["program", "LMGuide", "prior"])
def test_guide_programs_and_the_prior(kind):
    """log q of every trace is that of the guide program's own distribution."""
    if kind == "LMGuide":
        q = ONE.lm.adapter()

        def adapted(x, y):
            lm_sample("z", x, max_tokens=3, stop=".", temperature=2.0, lm=q)

        guide = lmppl.LMGuide(ONE.program, lm=ONE.lm, program=adapted)
    else:
        guide = heated if kind == "program" else None
    found = run(ONE, guide=guide, posterior=exact_posterior(ONE))
    temperature = 1.0 if kind == "prior" else 2.0

    def alone(x):
        lm_sample("z", x, max_tokens=3, stop=".", temperature=temperature)

    q_table = lmppl.testing.enumerate_program(alone, ONE.args[0], lm=ONE.lm).prior("z")
    p_table = ONE.enumerate().posterior("z")
    log_z = ONE.enumerate().log_evidence
    kl_pq = sum(p * math.log(p / q_table[z]) for z, p in p_table.items() if p)
    kl_qp = sum(q * math.log(q / p_table[z]) for z, q in q_table.items())
    assert found.eubo == pytest.approx(log_z + kl_pq, abs=1e-3)
    within(found.elbo, log_z - kl_qp, found.elbo_stderr)


def test_a_perfect_guide():
    def prior_only(x):
        return lm_sample("z", x, max_tokens=3, stop=".")

    posterior = lmppl.infer(prior_only, "ab.", lm=ONE.lm, method="exact")
    found = lmppl.diagnose(prior_only, "ab.", lm=ONE.lm, posterior=posterior, seed=0)
    assert found.kl_guide_posterior == pytest.approx((0.0, 0.0), abs=1e-4)
    assert found.kl_posterior_guide == pytest.approx((0.0, 0.0), abs=1e-4)
    assert found.ess_fraction == pytest.approx(1.0, abs=1e-4)
    assert abs(found.z_score) < 0.1  # rounding is not a disagreement
    assert found.pareto_k is None and found.pareto_k_threshold is None


def test_a_guide_that_misses_the_posterior():
    """It looks good by its own draws. Exact draws, and the prior's estimate, show what it misses."""

    def program(x):
        z = lm_sample("z", x, choices=["a", "b.", "bb"])
        pyro.factor("likes bb", torch.tensor(6.0 if z == "bb" else 0.0))

    def blind(x):
        lm_sample("z", x, choices=["a", "b."])

    posterior = lmppl.infer(program, "ab.", lm=ONE.lm, method="exact")
    found = lmppl.diagnose(program, "ab.", guide=blind, lm=ONE.lm, posterior=posterior, seed=0)
    assert found.eubo == math.inf and found.kl_posterior_guide == (math.inf, math.inf)
    assert found.z_score < -3 and any("disagree" in note for note in found.notes)
    assert "disagree" in repr(found)
    by_prior = lmppl.diagnose(program, "ab.", guide=blind, lm=ONE.lm, seed=0)
    assert by_prior.log_z_source == "prior" and by_prior.z_score < -3


def test_an_estimate_of_log_z_that_is_given_stands_in_for_the_priors():
    log_z = exact_posterior(ONE).log_evidence
    found = run(ONE, log_z=(log_z, 0.05))
    assert (found.log_z, found.log_z_stderr, found.log_z_source) == (log_z, 0.05, "given")
    assert abs(found.z_score) < 4 and "log Z, given" in repr(found)
    assert found.iw_bound == run(ONE).iw_bound, "the guide's draws are the same"
    far = run(ONE, log_z=(log_z + 5, 0.05))
    assert far.z_score < -3 and any("and the one given disagree" in note for note in far.notes)


@pytest.mark.parametrize(
    "log_z, error, message",
    [
        (-3.0, TypeError, "an estimate and its standard error"),
        ((-3.0, -0.1), ValueError, "at least 0"),
        ((-3.0, 0.1), ValueError, "not both"),
    ],
)
def test_a_wrong_estimate_of_log_z_is_refused(log_z, error, message):
    posterior = exact_posterior(ONE) if message == "not both" else None
    with pytest.raises(error, match=message):
        run(ONE, log_z=log_z, posterior=posterior)


def test_all_dead():
    def impossible(x):
        require("never", lm_sample("z", x, max_tokens=2) == "?")

    found = lmppl.diagnose(impossible, "ab.", guide=None, lm=ONE.lm, num_samples=5, seed=0)
    assert found.dead_fraction == 1.0 and found.ess_fraction == 0.0
    assert found.elbo == found.elbo_alive == found.iw_bound == -math.inf
    assert found.kl_alive_posterior == (math.inf, math.inf)
    assert found.texts["z"].num_draws == 5 and found.texts["z"].weighted_mean_length is None
    assert "100.0% with probability zero (by never)" in repr(found)


def test_latents_that_cannot_be_posterior_draws_are_noted():
    live = [trace for trace in ONE.enumerate() if trace.log_joint > -math.inf]
    worst = min(live, key=lambda trace: trace.log_joint - trace.log_prior)
    for latents, noted in (
        ([worst.data] * 3, True),
        ([{"z": text} for text in exact_posterior(ONE).resample(20, seed=0)["z"]], False),
    ):
        found = run(ONE, guide=None, latents=latents)
        assert any("are the latents exact" in note for note in found.notes) == noted


def test_estimates_by_a_few_samples_are_doubted():
    """The standard error is harmless, being computed from these few samples."""
    few, many = run(ONE, num_samples=8), run(ONE, num_samples=400)
    reason = f"ESS {few.samples.ess:.1f} is below 10"
    assert few.doubts["iw_bound"] == [reason]
    assert f"don't trust the log mean weight and its standard error: {reason}" in few.notes
    (row,) = [line for line in repr(few).splitlines() if line.startswith("log Z >=, log mean")]
    assert row.endswith("(see note)")
    assert "iw_bound" not in many.doubts and many.samples.ess > 10
    prior = many.doubts.get("log_z", [])
    assert bool(prior) == any("by the prior's draws" in note for note in many.notes)
    assert "log_z" in few.doubts, "so are those by as many draws of the prior"


def test_seeds_reproduce():
    assert run(ONE, num_samples=20).summary() == run(ONE, num_samples=20).summary()
    assert run(ONE, num_samples=20, seed=1).elbo != run(ONE, num_samples=20).elbo
    assert not poutine.runtime._PYRO_STACK


# --- tables --------------------------------------------------------------------------------------


def test_summary_is_plain():
    summary = diagnosed(DEAD).summary()
    assert json.loads(json.dumps(summary))["dead_fraction"] == summary["dead_fraction"]
    assert set(summary["texts"]) == {"z", "w"}


def test_the_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = diagnosed(DEAD)
    lines = repr(found).splitlines()
    assert max(map(len, lines)) <= 80
    table = {
        match[1].strip(): (match[2], match[3].strip())
        for line in lines
        if (match := re.match(r"(.{2,}?)\s{2,}(\S+)(.*)$", line))
    }
    assert table["ELBO"] == ("-inf", "-")
    assert table["ELBO of the live part"][0] == f"{found.elbo_alive:.3f}"
    assert table["log Z, exact"] == (f"{found.log_z:.3f}", "exact")
    assert table["KL(posterior || guide)"][0] == f"{found.kl_posterior_guide[0]:.3f}"
    bare = repr(run(ONE, num_samples=2))
    assert ">= " in bare and "EUBO" not in bare and "live part" not in bare


def test_names_reach_html_as_text():
    def program(x):
        lm_sample("<b>z", x, max_tokens=1)
        require("<i>", True)

    def guide(x):
        lm_sample("<b>z", x, max_tokens=1)

    guide.__name__ = "<script>\n"
    found = lmppl.diagnose(program, "ab.", lm=ONE.lm, guide=guide, num_samples=3, seed=0)
    shown = found._repr_html_()
    assert "&lt;b&gt;z" in shown and "&lt;script&gt;\\n" in shown and "<table>" in shown
    assert (
        "<b>" not in shown and "<script>" not in shown and "\n" not in repr(found).split("draws")[0]
    )


def test_without_arviz_stats(monkeypatch):
    for name in [each for each in sys.modules if each.split(".")[0] == "arviz_stats"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "arviz_stats", None)
    found = run(ONE, num_samples=30)
    assert found.pareto_k is None and any("lmppl-pyro[diagnostics]" in each for each in found.notes)


# --- the picture ---------------------------------------------------------------------------------


def rows_of(axis):
    """Name of each row to its point and its interval, None where there is none."""
    names = [label.get_text() for label in axis.get_yticklabels()]
    points = {}
    for point, _, (bars,) in axis.containers:
        ((left, _), (right, _)) = bars.get_segments()[0]
        points[names[round(point.get_ydata()[0])]] = (point.get_xdata()[0], left, right)
    return {name: points.get(name) for name in names}


def heights(axis):
    """Shares of the bins of each histogram."""
    outlines = {patch.get_label(): patch.get_xy() for patch in axis.patches}
    return {name: [y for _, y in xy[1 : len(xy) // 2 : 2]] for name, xy in outlines.items()}


def test_the_picture_has_the_figures():
    pytest.importorskip("matplotlib")
    found = diagnosed(ONE)
    above, below = found.plot().axes
    rows = rows_of(below)
    assert list(rows) == ["ELBO", "log mean weight", "log Z, exact", "EUBO"]
    for name, key in (("ELBO", "elbo"), ("log mean weight", "iw_bound"), ("EUBO", "eubo")):
        value, stderr = getattr(found, key), getattr(found, f"{key}_stderr")
        assert rows[name] == pytest.approx((value, value - 2 * stderr, value + 2 * stderr))
    words = [text.get_text() for text in below.texts]
    assert words[0] == f"KL(guide || posterior) {found.kl_guide_posterior[0]:.2f}"
    assert words[1] == f"KL(posterior || guide) {found.kl_posterior_guide[0]:.2f}"
    shares = heights(above)
    u = found.samples.log_weights
    for name, weights in (("draws", None), ("weight", found.samples.weights)):
        expected, _ = torch.histogram(u, 30, weight=weights)
        drawn = shares[f"share of the {name}"]
        assert drawn == pytest.approx((expected / expected.sum()).tolist(), abs=1e-6)
    lines = [line for axis in (above, below) for line in axis.lines]
    dashed = [line.get_xdata()[0] for line in lines if line.get_linestyle() == "--"]
    assert dashed == [found.log_z] * 2
    dotted = [line.get_xdata() for line in lines if line.get_linestyle() == ":"]
    assert dotted == [
        pytest.approx((found.elbo, found.log_z)),
        pytest.approx((found.eubo, found.log_z)),
    ]


def test_the_picture_of_a_guide_with_dead_draws_is_of_the_live_ones():
    pytest.importorskip("matplotlib")
    found = run(DEAD)
    above, below = found.plot().axes
    rows = rows_of(below)
    assert list(rows) == ["ELBO of the live", "log mean weight", "log Z, by the prior"]
    assert rows["ELBO of the live"][0] == pytest.approx(found.elbo_alive)
    assert below.texts[0].get_text().startswith("KL(guide || posterior) >= ")
    assert above.get_title(loc="left").endswith("dead")
    assert all(sum(shares) == pytest.approx(1.0) for shares in heights(above).values())


def test_the_picture_of_a_guide_that_cannot_draw_the_posterior(tmp_path):
    pytest.importorskip("matplotlib")

    def program(x):
        lm_sample("z", x, choices=["a", "b"])

    def blind(x):
        lm_sample("z", x, choices=["a"])

    posterior = lmppl.infer(program, "ab.", lm=ONE.lm, method="exact")
    found = lmppl.diagnose(program, "ab.", guide=blind, lm=ONE.lm, posterior=posterior, seed=0)
    _, below = found.plot(tmp_path / "blind.svg").axes
    assert rows_of(below)["EUBO"] is None
    assert below.texts[-1].get_text() == "KL(posterior || guide) inf"
    assert (tmp_path / "blind.svg").stat().st_size > 1000


def test_no_picture_of_dead_draws_alone():
    def impossible(x):
        require("never", lm_sample("z", x, max_tokens=2) == "?")

    found = lmppl.diagnose(impossible, "ab.", lm=ONE.lm, num_samples=5, seed=0)
    with pytest.raises(ValueError, match="every draw has probability zero"):
        found.plot()


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 0])
def test_too_few_samples(num):
    with pytest.raises(ValueError, match="at least 2"):
        run(ONE, num_samples=num)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ([], "holds no draw"),
        ([{"z": "b."}, {}], r"latents\[1\] has no value for latent site 'z'"),
        ([{"z": "b.", "v": "a"}], r"latents\[0\] has a value for 'v', which is no latent"),
        ([{"z": "b.", "y": "aba"}], r"has a value for 'y', which is no latent"),
        ([{"z": "b.b"}], r"latents\[0\]: site 'z': "),
        ([{"z": torch.zeros(2, dtype=torch.long)}], r"shape \(3,\), given \(2,\)"),
        ([{"z": torch.tensor([0, -1, -1])}], r"latents\[0\] has probability zero"),
    ],
)
def test_bad_latents(latents, message):
    with pytest.raises(ValueError, match=message):
        run(ONE, latents=latents, num_samples=2)


def test_bad_posteriors():
    with pytest.raises(ValueError, match="not both"):
        run(ONE, posterior=exact_posterior(ONE), latents=[{"z": "b."}])
    sampled = lmppl.infer(ONE.program, *ONE.args, lm=ONE.lm, method="importance", num_samples=4)
    with pytest.raises(ValueError, match="by 'importance'"):
        run(ONE, posterior=sampled)
    with pytest.raises(ValueError, match="does not belong to this program"):
        run(ONE, posterior=exact_posterior(ONE).resample(10, seed=0), num_samples=2)
    other_input = lmppl.infer(ONE.program, "ab.", "bb", lm=ONE.lm, method="exact")
    with pytest.raises(ValueError, match="does not belong to this program"):
        run(ONE, posterior=other_input, num_samples=2)

    def longer(x):
        lm_sample("z", x, max_tokens=3, stop=".")
        lm_sample("w", x, max_tokens=1)

    other_program = lmppl.infer(longer, "ab.", lm=ONE.lm, method="exact")
    with pytest.raises(ValueError, match=r"posterior's trace \[0\] has a value for 'w'"):
        run(ONE, posterior=other_program, num_samples=2)


def test_a_number_is_no_text():
    def mixed(x):
        pyro.sample("theta", dist.Beta(1.0, 1.0))
        lm_sample("z", x, max_tokens=1)

    with pytest.raises(ValueError, match="site 'theta' is no text"):
        latents = [{"theta": "half", "z": "a"}]
        lmppl.diagnose(mixed, "ab.", lm=ONE.lm, latents=latents, num_samples=2)


def test_a_guide_site_that_the_given_trace_lacks():
    def program(x):
        if lm_sample("z", x, max_tokens=1) == "a":
            lm_sample("w", x, max_tokens=1)

    def guide(x):  # leaves z to the model, and fails only on the other branch
        if lm_sample("z", x, choices=["a", "b"]) == "b":
            lm_sample("w", x, max_tokens=1)

    with pytest.raises(ValueError, match="site 'w'"):
        lmppl.diagnose(program, "ab.", guide=guide, lm=ONE.lm, latents=[{"z": "b"}], num_samples=2)
