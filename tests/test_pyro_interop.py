"""Pyro's own handlers and algorithms on lmppl programs, outside ``infer``."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    EmpiricalMarginal,
    Importance,
    Predictive,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)

import lmppl
from lmppl import Text, lm_sample, require, tool
from lmppl.distributions import PAD
from lmppl.primitives import _warned
from lmppl.testing import enumerate_program, naive_log_prob, tiny_lm

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)
A, B, DOT, EOS = range(4)


@pytest.fixture(autouse=True)
def _fresh_state():
    _warned.clear()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with lmppl.use(LM):
        yield
    assert not poutine.runtime._PYRO_STACK


def infill(x: str, y: str | None = None) -> Text:
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], max_tokens=3, stop=".", obs=y)
    return z


def z_table(y: str) -> tuple[dict[str, float], float]:
    """The exact posterior of z by its string, and log evidence."""
    exact = enumerate_program(infill, "ab.", y, lm=LM)
    return exact.posterior("z", text=True), exact.log_evidence


# --- handlers ---


condition, replay, block, trace = poutine.condition, poutine.replay, poutine.block, poutine.trace
NESTINGS = {
    "condition inside": lambda m, d: trace(condition(m, data=d)),
    "condition outside": lambda m, d: condition(trace(m), data=d),
    "block between": lambda m, d: trace(condition(block(m, hide=["nothing"]), data=d)),
    "replay inside": lambda m, d: trace(condition(replay(m, params={}), data=d)),
    "replay outside": lambda m, d: trace(replay(condition(m, data=d), params={})),
    "mask and scale": lambda m, d: trace(
        poutine.scale(condition(poutine.mask(m, mask=True), data=d), scale=1.0)
    ),
    "twice": lambda m, d: trace(condition(condition(m, data=d), data=d)),
    "trace inside and outside": lambda m, d: trace(condition(trace(m), data=d)),
}


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_strings_condition_at_every_nesting(nest):
    program = nest(infill, {"z": "ba"})
    trace = program.get_trace("ab.", "ab") if hasattr(program, "get_trace") else None
    if trace is None:  # the trace is inside
        with poutine.trace() as outer:
            program("ab.", "ab")
        trace = outer.trace
    node = trace.nodes["z"]
    assert node["is_observed"] and node["value"].tolist() == [B, A, EOS]
    expected = sum(
        float(naive_log_prob(LM, prefix, ids).sum())
        for prefix, ids in [(LM.encode("ab."), (B, A, EOS)), (LM.encode("ab.ba"), (A, B, EOS))]
    )
    assert float(trace.log_prob_sum()) == pytest.approx(expected, abs=1e-3)


def test_a_text_or_a_tensor_conditions_too():
    drawn = poutine.trace(infill).get_trace("ab.", "ab")
    for value in (drawn.nodes["z"]["value"], drawn.nodes["_RETURN"]["value"]):
        trace = poutine.trace(pyro.condition(infill, data={"z": value})).get_trace("ab.", "ab")
        assert torch.equal(trace.nodes["z"]["value"], drawn.nodes["z"]["value"])
        assert trace.nodes["_RETURN"]["value"] == drawn.nodes["_RETURN"]["value"]


def test_condition_with_an_impossible_string_names_the_site():
    with pytest.raises(ValueError, match=r"site 'z'.*runs past its close"):
        pyro.condition(infill, data={"z": "b.b"})("ab.", "ab")


def test_replay_repeats_values_and_density():
    trace = poutine.trace(infill).get_trace("ab.", "ab")
    again = poutine.trace(poutine.replay(infill, trace=trace)).get_trace("ab.", "ab")
    assert again.nodes["_RETURN"]["value"] == trace.nodes["_RETURN"]["value"]
    assert again.nodes["_RETURN"]["value"].token_ids == trace.nodes["_RETURN"]["value"].token_ids
    assert float(again.log_prob_sum()) == pytest.approx(float(trace.log_prob_sum()), abs=1e-5)


def test_block_hides_a_site():
    trace = poutine.trace(poutine.block(infill, hide=["z"])).get_trace("ab.", "ab")
    assert "z" not in trace.nodes and "y" in trace.nodes


def test_do_intervenes_with_tokens():
    value = torch.tensor([B, A, EOS])
    trace = poutine.trace(poutine.do(infill, data={"z": value})).get_trace("ab.", "ab")
    assert trace.nodes["_RETURN"]["value"] == "ba"
    assert trace.nodes["y"]["fn"].prefix_ids == LM.encode("ab.ba")


def with_later_text():
    z = lm_sample("z", "ab", choices=["a", "b", "."])
    return lm_sample("w", ["ab", z], max_tokens=1)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("method", [None, "exact", "importance"])
def test_do_takes_a_string(method, as_tensor):
    given = lmppl.LMText(LM, "ab", choices=["a", "b", "."]).encode("a") if as_tensor else "a"
    program = poutine.do(with_later_text, data={"z": given})
    for _ in range(2):  # the handler is as good as new
        if method is None:
            nodes = poutine.trace(program).get_trace().nodes
            assert nodes["w"]["fn"].prefix_ids == LM.encode("aba")
        else:
            posterior = lmppl.infer(program, lm=LM, method=method, num_samples=64, seed=0)
            # What was drawn is not what the rest of the program sees.
            assert posterior.probs("z")["b"] > 0.5
            assert {t.nodes["w"]["fn"].prefix_ids for t in posterior.traces} == {LM.encode("aba")}
    if method == "exact":
        for token, string in enumerate("ab."):
            expected = naive_log_prob(LM, LM.encode("aba"), [token])
            assert math.log(posterior.probs("w")[string]) == pytest.approx(expected, abs=1e-4)


def test_do_with_an_impossible_string_names_the_site():
    with pytest.raises(ValueError, match="site 'z': 'ab' is none of the choices"):
        poutine.trace(poutine.do(with_later_text, data={"z": "ab"})).get_trace()


def test_scale_tempers_a_whole_sequence():
    plain = poutine.trace(infill).get_trace("ab.", "ab")
    scaled = poutine.trace(
        poutine.scale(poutine.replay(infill, trace=plain), scale=0.25)
    ).get_trace("ab.", "ab")
    assert float(scaled.log_prob_sum()) == pytest.approx(
        0.25 * float(plain.log_prob_sum()), abs=1e-4
    )


@pytest.mark.parametrize("mask", [False, torch.tensor(False)])
def test_a_masked_observation_counts_nothing(mask):
    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        with poutine.mask(mask=mask):
            lm_sample("y", [z, "a"], obs="b")

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    assert float(trace.nodes["y"]["log_prob_sum"]) == 0.0
    assert float(trace.log_prob_sum()) == pytest.approx(float(trace.nodes["z"]["log_prob_sum"]))


def test_a_prefix_likelihood_forward_simulates_exactly_its_tokens():
    """Draws for calibration: as many tokens as were observed, and nothing closes, EOS neither."""

    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        return lm_sample("y", [z, "a"], obs="ab.a")

    for seed in range(8):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(poutine.uncondition(program)).get_trace()
        node = trace.nodes["y"]
        assert not node["is_observed"] and node["value"].shape == (4,)
        assert bool((node["value"] != PAD).all())
        y = trace.nodes["_RETURN"]["value"]
        assert isinstance(y, Text) and len(y.token_ids) == 4 and y.finish_reason is None
        trace.compute_log_prob()
        expected = naive_log_prob(LM, node["fn"].prefix_ids, tuple(node["value"].tolist())).sum()
        assert float(node["log_prob_sum"]) == pytest.approx(float(expected), abs=1e-4)


def test_uncondition_draws_an_observed_text_too():
    trace = poutine.trace(poutine.uncondition(infill)).get_trace("ab.", "ab")
    node = trace.nodes["y"]
    assert not node["is_observed"] and node["fn"].supports(node["value"])


def test_parameters_factors_and_other_sites_between():
    def program():
        bias = pyro.param("bias", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        theta = pyro.sample("theta", dist.Beta(2.0, 2.0))
        z = lm_sample("z", "ab", max_tokens=2)
        pyro.factor("score", theta * len(z) * bias)
        pyro.deterministic("length", torch.tensor(float(len(z))))
        for i in pyro.plate("data", 2):
            pyro.sample(f"x{i}", dist.Bernoulli(theta), obs=torch.tensor(1.0))

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    assert set(trace.nodes) >= {"bias", "theta", "z", "score", "length", "x0", "x1"}
    theta, z = trace.nodes["theta"]["value"], trace.nodes["z"]
    length = len(z["fn"].text(z["value"]))
    expected = (
        dist.Beta(2.0, 2.0).log_prob(theta) + z["log_prob"] + theta * length * 0.5 + 2 * theta.log()
    )
    assert float(trace.log_prob_sum().detach()) == pytest.approx(float(expected.detach()), abs=1e-4)


def test_pyro_says_so_when_a_name_is_used_twice():
    def program():
        lm_sample("z", "a", max_tokens=1)
        lm_sample("z", "b", max_tokens=1)

    with pytest.raises(RuntimeError, match="'z'"):
        poutine.trace(program).get_trace()


# --- algorithms ---


def test_predictive_draws_from_the_prior_with_tools():
    calls = []

    def program():
        z = lm_sample("z", "ab", max_tokens=3, stop=".")
        swapped = tool("swap", lambda text: calls.append(text) or text[::-1], z)
        require("anything", True)
        lm_sample("y", ["a", swapped], max_tokens=2)
        return z

    draws = Predictive(program, num_samples=5)()
    assert draws["z"].shape == (5, 3) and draws["y"].shape == (5, 2) and draws["swap"].shape == (5,)
    assert len(calls) >= 5


def test_predictive_replays_posterior_draws():
    samples = {"z": torch.tensor([[B, A, EOS], [DOT, PAD, PAD]])}
    draws = Predictive(infill, samples, return_sites=["z", "y"])("ab.")
    assert draws["y"].shape == (2, 3) and torch.equal(draws["z"], samples["z"])


def test_decode_gives_the_texts_that_predictive_draws():
    lm, seen = tiny_lm("ab.", contrast=0.5), []

    def program(x):
        z = lm_sample("z", x, max_tokens=3, stop=".", lm=lm)
        w = lm_sample("w", [x, z], max_tokens=2, lm=lm)
        seen.append((z, w))

    def all_of(text):
        return text, text.token_ids, text.body

    draws = Predictive(program, num_samples=6)("ab")
    pairs = list(zip(lm.decode(draws["z"], stop="."), lm.decode(draws["w"]), strict=True))
    assert pairs == seen[-6:] and len(set(pairs)) > 2
    for decoded, drawn in zip(pairs, seen[-6:], strict=True):
        assert list(map(all_of, decoded)) == list(map(all_of, drawn))
    posterior = Importance(program, num_samples=4).run("ab")
    assert lm.decode(EmpiricalMarginal(posterior, sites="z").sample()) in [z for z, _ in seen[6:]]


def test_importance_weighs_by_the_exact_likelihood():
    posterior = Importance(infill, num_samples=20).run("ab.", "ab")
    exact = {trace.values["z"]: trace for trace in enumerate_program(infill, "ab.", "ab", lm=LM)}
    for trace, weight in zip(posterior.exec_traces, posterior.log_weights, strict=True):
        node = trace.nodes["z"]
        ids = node["fn"].text(node["value"]).token_ids
        expected = exact[ids].log_joint - float(naive_log_prob(LM, LM.encode("ab."), ids).sum())
        assert float(weight) == pytest.approx(expected, abs=1e-4)
    assert EmpiricalMarginal(posterior, sites="z")().shape == (3,)


def test_importance_does_not_call_a_tool_again_for_the_model():
    calls = itertools.count()

    def program():
        z = lm_sample("z", "ab", max_tokens=2)
        lm_sample("y", ["a", tool("t", lambda text: f"a{next(calls) % 2}"[:1] + text, z)], obs="b")

    Importance(program, num_samples=10).run()
    assert next(calls) == 10


def short(x: str, y: str | None = None, observations: object = None) -> None:
    z = lm_sample("z", x, max_tokens=1)
    lm_sample("y", [x, z], max_tokens=3, obs=y)


def make_guide():
    torch.manual_seed(0)
    q = LM.adapter()

    def guide(x: str, y: str | None = None, observations: object = None) -> None:
        pyro.module("q", q.model)
        lm_sample("z", [x, "ab"], max_tokens=1, lm=q)  # it looks ahead to what comes

    return q, guide


def exact_loss(q, y: str) -> torch.Tensor:
    """sum_z q (log q - log p) over all texts: what the ELBO estimates, differentiable."""
    values = torch.arange(4)[:, None]
    log_q = lmppl.LMText(q, "ab.ab", max_tokens=1).log_prob(values)
    log_p = [
        poutine.trace(pyro.condition(short, data={"z": z})).get_trace("ab.", y).log_prob_sum()
        for z in values
    ]
    return (log_q.exp() * (log_q - torch.stack(log_p))).sum()


def trainable(q) -> list[torch.Tensor]:
    return [p for p in q.model.parameters() if p.requires_grad]


def gradient(q) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainable(q) if p.grad is not None])


def test_svi_trains_a_user_guide():
    q, guide = make_guide()
    log_evidence = enumerate_program(short, "ab.", "ab", lm=LM).log_evidence
    start = float(exact_loss(q, "ab").detach()) + log_evidence  # KL(q, posterior)
    svi = SVI(short, guide, pyro.optim.Adam({"lr": 0.003}), Trace_ELBO(num_particles=8))
    for _ in range(3):
        assert math.isfinite(svi.step("ab.", "ab"))
    end = float(exact_loss(q, "ab").detach()) + log_evidence
    assert start > 0.5 and -1e-4 < end < start / 2
    assert all(p.grad is None for p in LM.model.parameters())


def test_the_elbo_and_its_gradient_have_the_exact_ones_as_their_means():
    """By enumeration: the estimates at each of the guide's texts, weighed by its probabilities."""
    q, guide = make_guide()
    exact = exact_loss(q, "ab")
    exact.backward()
    expected = gradient(q)
    drawn = poutine.trace(guide).get_trace("ab.", "ab")
    log_q = lmppl.LMText(q, "ab.ab", max_tokens=1).log_prob(torch.arange(4)[:, None]).detach()
    loss, found = 0.0, torch.zeros_like(expected)
    for token, probability in enumerate(log_q.exp().tolist()):
        drawn.nodes["z"]["value"] = torch.tensor([token])
        for p in trainable(q):
            p.grad = None
        at = poutine.replay(guide, trace=drawn)
        loss += probability * Trace_ELBO().loss_and_grads(short, at, "ab.", "ab")
        found += probability * gradient(q)
    assert loss == pytest.approx(float(exact.detach()), abs=1e-4)
    assert float(expected.norm()) > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_reweighted_wake_sleep_reaches_the_guide():
    q, guide = make_guide()
    loss = ReweightedWakeSleep(
        num_particles=4,
        num_sleep_particles=2,
        insomnia=0.5,
        model_has_params=False,
        vectorize_particles=False,
    )
    wake, sleep = loss.loss_and_grads(short, guide, "ab.", "ab")
    assert math.isfinite(float(wake)) and math.isfinite(float(sleep))
    assert float(gradient(q).norm()) > 0


# --- enumeration ---

CHOICES = ["a", "b", "."]


def chosen(mark=None):
    z = lm_sample("z", "ab", choices=CHOICES, infer=mark and {"enumerate": mark})
    lm_sample("y", [z, "b"], obs="a")


def chosen_guide(mark=None):
    lm_sample("z", "b", choices=CHOICES, infer=mark and {"enumerate": mark})


@pytest.mark.parametrize(
    "guide",
    [
        lambda: chosen_guide("sequential"),
        config_enumerate(chosen_guide, default="sequential"),
    ],
    ids=["marked", "configured"],
)
def test_traceenum_elbo_enumerates_choices_one_after_another(guide):
    q, p = (lmppl.LMText(LM, prefix, choices=CHOICES) for prefix in ("b", "ab"))
    elbo = 0.0
    for choice in CHOICES:
        log_q, log_p = q.log_prob(q.encode(choice)), p.log_prob(p.encode(choice))
        log_p = log_p + naive_log_prob(LM, LM.encode([choice, "b"]), [A])
        elbo += float(log_q.exp() * (log_p - log_q))
    for _ in range(2):  # no chance in it
        loss = TraceEnum_ELBO(max_plate_nesting=0).loss(chosen, guide)
        assert loss == pytest.approx(-elbo, abs=1e-4)


@pytest.mark.parametrize("where", ["guide", "model"])
def test_parallel_enumeration_of_texts_says_how_to_enumerate_them(where):
    model, guide = chosen, chosen_guide
    if where == "guide":
        guide = config_enumerate(chosen_guide, default="parallel")
    else:
        model, guide = config_enumerate(chosen, default="parallel"), lambda: None
    with pytest.raises(ValueError, match=r"site 'z' is given a batch.*'enumerate': 'sequential'"):
        TraceEnum_ELBO(max_plate_nesting=0).loss(model, guide)


def test_nuts_beside_a_text():
    def program():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        chosen()
        pyro.factor("score", -((x - 1.0) ** 2))

    def sample(model):
        mcmc = MCMC(NUTS(model), num_samples=2, warmup_steps=1, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples()

    with pytest.raises(ValueError, match="site 'z' .*HMC and NUTS .*condition on the text"):
        sample(program)
    assert sample(pyro.condition(program, data={"z": "b"})).keys() == {"x"}
