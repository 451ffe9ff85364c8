"""Held-out figures, against enumeration."""

import math

import pytest
import torch
from guide_helpers import LM, infill, new_guide, shaken

import lmppl
from lmppl import lm_sample, require
from lmppl.testing import enumerate_program, guide_log_probs
from lmppl.training.data import simulated_inputs, simulations
from lmppl.training.evaluation import evaluate
from lmppl.training.inputs import Input
from lmppl.training.options import FitOptions


@pytest.mark.parametrize("guided", [True, False])
def test_the_eubo_is_that_of_the_simulated_latents(guided):
    guide = shaken(new_guide(condition_on=["y"]), size=0.3) if guided else None
    with lmppl.use(LM):
        pairs = simulations(new_guide(condition_on=["y"]), [("ab.",), ("ba",)], seed=0)
        inputs = list(simulated_inputs(new_guide(), pairs, FitOptions(), 4))
        found = evaluate(guide, inputs, 8, seed=0)
        expected = []
        for each in inputs:
            latents = each.given[0].values["z"].tolist()
            trace = next(
                t
                for t in enumerate_program(each.program, *each.args, lm=LM)
                if t.data["z"].tolist() == latents
            )
            log_q = trace.log_prior
            if guided:
                scores = guide_log_probs(guide, each.program, each.args, [trace], LM)
                log_q = float(scores[0])
            expected.append(trace.log_joint - log_q)
    assert found["eval_eubo"] == pytest.approx(sum(expected) / 4, abs=1e-4)


def test_dead_draws_count_as_weight_zero():
    def program(x):
        z = lm_sample("z", x, max_tokens=1)
        require("b", z == "b")

    one = Input(program, ("ab",), 0, FitOptions())
    with lmppl.use(LM):
        found = evaluate(None, [one], 64, seed=0)
    p = math.exp(float(LM.log_prob("ab", ["b"], max_tokens=1)))
    assert found["eval_alive"] == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 64))
    # Live draws all weigh 1, dead ones nothing.
    assert found["eval_ess"] == pytest.approx(found["eval_alive"])
    assert found["eval_log_z"] == pytest.approx(math.log(found["eval_alive"]), abs=1e-5)
    assert found["eval_elbo"] == pytest.approx(0.0, abs=1e-5)
    assert "eval_eubo" not in found  # there are no exact draws


def test_figures_do_not_depend_on_how_inputs_are_grouped(monkeypatch):
    guide = shaken(new_guide())
    inputs = [Input(infill, ("ab.", y), i, FitOptions()) for i, y in enumerate(["a", "b", "ba"])]
    with lmppl.use(LM), torch.no_grad():
        together = evaluate(guide, inputs, 8, seed=0)
        monkeypatch.setattr("lmppl.training.evaluation._MOST_PARTICLES", 8)
        apart = evaluate(guide, inputs, 8, seed=0)
    assert together == pytest.approx(apart, abs=1e-4)
