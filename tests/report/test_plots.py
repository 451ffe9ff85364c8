"""Posteriors as pictures."""

from __future__ import annotations

import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import lmppl
from lmppl import lm_sample
from lmppl.report.plots import bars
from lmppl.testing import tiny_lm

matplotlib = pytest.importorskip("matplotlib")

LM = tiny_lm("ab.$", seed=0)


def infill(x, y=None):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    pyro.sample("p", dist.Beta(2.0, 2.0))
    lm_sample("y", [x, z], max_tokens=1, obs=y)
    return "b" in z


@pytest.fixture(scope="module")
def posterior():
    options = {"lm": LM, "method": "importance", "num_samples": 60, "seed": 0}
    return lmppl.infer(infill, "ab", "a", **options), lmppl.infer(infill, "ab", **options)


def widths(axis, name):
    (container,) = [c for c in axis.containers if c.get_label() == name]
    return [float(bar.get_width()) for bar in container]


def test_bars_are_the_probabilities_and_those_of_the_prior(posterior):
    given_ending, prior = posterior
    (axis,) = given_ending.plot("z", prior=prior, rows=4).axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    found = given_ending.probs("z")
    values = list(dict.fromkeys([*found, *prior.probs("z")]))
    assert labels == [*(repr(str(value)) for value in values[:4]), f"{len(values) - 4} more"]
    for name, probs in (("posterior", found), ("prior", prior.probs("z"))):
        shares = [probs.get(value, 0.0) for value in values[:4]]
        assert widths(axis, name) == pytest.approx([*shares, 1 - sum(shares)])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["posterior", "prior"]


def test_what_is_drawn_is_what_probs_takes(posterior):
    given_ending, _ = posterior
    (axis,) = given_ending.plot(returns=True).axes
    assert {label.get_text() for label in axis.get_yticklabels()} == {"True", "False"}
    (axis,) = given_ending.plot(lambda values: len(values["z"]), rows=20).axes
    assert sum(widths(axis, "posterior")) == pytest.approx(1.0)
    assert axis.get_legend() is None, "one distribution needs none"


def test_a_continuous_site_has_a_histogram_of_weighted_draws(posterior):
    given_ending, prior = posterior
    (axis,) = given_ending.plot("p", prior=prior).axes
    assert axis.get_ylabel() == "density" and len(axis.patches) == 2
    values = torch.stack(given_ending["p"]).double()
    both = torch.cat([values, torch.stack(prior["p"]).double()])
    limits = float(both.min()), float(both.max())
    expected, _ = torch.histogram(
        values, 30, range=limits, weight=given_ending.weights, density=True
    )
    assert float(axis.patches[0].get_xy()[:, 1].max()) == pytest.approx(
        float(expected.max()), rel=0.02
    )
    assert axis.get_title(loc="left") == "p"


def test_texts_are_shown_as_they_are(tmp_path):
    path = tmp_path / "new" / "bars.svg"
    probs = {"$a$ <b>\n": 0.5, "x" * 99: 0.25, None: 0.25}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = bars({"posterior": probs}, "$z$", 3, path)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == r"'$a$ <b>\n'" and labels[1].endswith("…") and len(labels[1]) < 50
    assert "$a$ &lt;b&gt;" in path.read_text()
    assert [each.name for each in path.parent.iterdir()] == ["bars.svg"]


def test_bad_input(posterior, monkeypatch):
    given_ending, _ = posterior
    for given, error, message in (
        ({"name_or_fn": "zz"}, KeyError, "site 'zz'"),
        ({}, TypeError, "say of what.*the name of a site"),
        ({"name_or_fn": "z", "returns": True}, TypeError, "say of what.*the name of a site"),
        ({"name_or_fn": "z", "rows": 0}, ValueError, "rows=0"),
        (
            {"name_or_fn": "z", "prior": {"a": 1.0}},
            TypeError,
            "prior= takes a Posterior, given dict",
        ),
    ):
        with pytest.raises(error, match=message):
            given_ending.plot(**given)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install lmppl-pyro\[plot\]"):
        given_ending.plot("z")


def test_numbers_of_more_than_one_dimension_are_refused():
    def program():
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        lm_sample("z", "ab", max_tokens=1)

    posterior = lmppl.infer(program, lm=LM, method="importance", num_samples=4, seed=0)
    with pytest.raises(ValueError, match=r"site 'p' has values of shape \(3,\)"):
        posterior.plot("p")


def test_nothing_alive_is_no_picture():
    def dead():
        lm_sample("z", "ab", max_tokens=1)
        lmppl.require("no", False)

    with pytest.raises(lmppl.ZeroEvidenceError) as error:
        lmppl.infer(dead, lm=LM, method="importance", num_samples=4, seed=0)
    with pytest.raises(lmppl.ZeroEvidenceError):
        error.value.posterior.plot("z")


def test_weights_count_in_histograms():
    def program():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        lm_sample("z", "ab", max_tokens=1)
        pyro.factor("right", torch.where(x > 0, 0.0, -20.0))

    posterior = lmppl.infer(program, lm=LM, method="importance", num_samples=200, seed=0)
    patch = posterior.plot("x").axes[0].patches[0]
    corners = patch.get_xy()
    assert corners[corners[:, 0] < -0.3][:, 1].max() < 1e-3 < corners[:, 1].max()
