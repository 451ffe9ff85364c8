"""Exhaustive replay, on programs whose answer is known otherwise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from lmppl import primitives
from lmppl.primitives import lm_sample, require, tool
from lmppl.testing import enumerate_program, enumerate_site, key, tiny_lm, trace_values

LM = tiny_lm("ab.", seed=1)


def test_a_coin_with_a_beta_prior():
    def program(heads):
        theta = pyro.sample("theta", dist.Beta(2.0, 3.0))
        for i in range(len(heads)):
            pyro.sample(f"x{i}", dist.Bernoulli(theta), obs=torch.tensor(heads[i]))

    exact = enumerate_program(program, [1.0, 1.0, 0.0], quadrature=6)
    # B(4, 4) / B(2, 3)
    beta = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)  # noqa: E731
    assert exact.log_evidence == pytest.approx(beta(4, 4) - beta(2, 3), abs=1e-6)
    assert exact.mean(lambda trace: trace.values["theta"]) == pytest.approx(0.5, abs=1e-6)


def test_a_scaled_continuous_site():
    def program():
        with poutine.scale(scale=2.0):
            pyro.sample("theta", dist.Beta(2.0, 2.0))

    exact = enumerate_program(program, quadrature=8)
    integral = 36 * math.exp(2 * math.lgamma(3) - math.lgamma(6))  # of (6 x (1 - x))^2
    assert exact.log_evidence == pytest.approx(math.log(integral), abs=1e-6)


def test_discrete_sites_batches_and_control_flow():
    def program():
        n = int(pyro.sample("n", dist.Categorical(torch.tensor([0.2, 0.3, 0.5]))))
        if n:
            with pyro.plate("coins", n):
                flips = pyro.sample("flips", dist.Bernoulli(0.25))
            pyro.factor("all", torch.log(flips.mean() + 0.5))

    exact = enumerate_program(program)
    assert len(exact) == 1 + 2 + 4
    assert exact.latents == ("n", "flips")
    assert sum(exact.prior().values()) == pytest.approx(1.0)
    assert exact.prior()[2, (1.0, 0.0)] == pytest.approx(0.5 * 0.25 * 0.75)
    assert math.exp(exact.log_evidence) == pytest.approx(0.2 + 0.8 * 0.75)
    assert exact.posterior("n")[0] == pytest.approx(0.25)


def test_masked_sites_and_deterministic_sites():
    def program():
        x = pyro.sample("x", dist.Bernoulli(0.25).mask(False))
        pyro.deterministic("twice", 2 * x)
        with poutine.mask(mask=False):
            pyro.sample("y", dist.Bernoulli(0.5), obs=x)

    exact = enumerate_program(program)
    assert exact.latents == ("x",)
    assert math.exp(exact.log_evidence) == pytest.approx(2.0)  # a masked latent has density 1


def test_text_enters_by_its_tokens():
    def program(x):
        return lm_sample("z", x, max_tokens=3, stop=["ba", "."], temperature=0.7)

    exact = enumerate_program(program, "a", lm=LM)
    site = enumerate_site(LM, (0,), 3, ["ba", "."], 0.7)
    assert exact.prior("z") == pytest.approx({ids: math.exp(lp) for ids, lp in site.items()})
    assert exact.log_evidence == pytest.approx(0.0, abs=1e-9)
    for trace in exact:
        assert str(trace.returns) == trace.texts["z"]
        assert trace.returns.token_ids == trace.values["z"]


def test_texts_of_several_tokenisations_are_summed():
    lm = tiny_lm(["a", "aa"], eos=False, seed=2)

    def program():
        lm_sample("z", "a", max_tokens=2)

    exact = enumerate_program(program, lm=lm)
    tokens, texts = exact.prior("z"), exact.prior("z", text=True)
    assert texts["aaa"] == pytest.approx(tokens[0, 1] + tokens[1, 0])
    assert sum(texts.values()) == pytest.approx(1.0)


def test_a_failed_requirement_ends_the_path():
    ran = []

    def program():
        z = lm_sample("z", "a", max_tokens=1)
        require("is b", z == "b")
        ran.append(z)
        lm_sample("w", ["a", z], max_tokens=1)

    exact = enumerate_program(program, lm=LM)
    assert set(ran) == {"b"}
    assert len(exact) == 3 + 4
    assert sum(exact.prior().values()) == pytest.approx(1.0)
    assert exact.log_evidence == pytest.approx(enumerate_site(LM, (0,), 1)[1,])


def test_a_posterior_of_nothing_is_refused():
    exact = enumerate_program(
        lambda: (lm_sample("z", "a", max_tokens=1), require("no", False)), lm=LM
    )
    assert exact.log_evidence == -math.inf
    with pytest.raises(ValueError, match="positive density"):
        exact.posterior("z")


def test_handlers_around_the_program_apply():
    def program():
        z = lm_sample("z", "a", max_tokens=1)
        pyro.sample("n", dist.Bernoulli(0.3 if z == "b" else 0.6))

    conditioned = poutine.condition(program, data={"n": torch.tensor(1.0)})
    exact = enumerate_program(conditioned, lm=LM)
    site = {ids: math.exp(lp) for ids, lp in enumerate_site(LM, (0,), 1).items()}
    evidence = 0.6 - 0.3 * site[1,]
    assert exact.latents == ("z",)
    assert math.exp(exact.log_evidence) == pytest.approx(evidence)


def test_tools_are_no_choice():
    def program():
        z = lm_sample("z", "a", max_tokens=1)
        return tool("length", len, z)

    exact = enumerate_program(program, lm=LM)
    assert exact.latents == ("z",)
    assert {trace.returns for trace in exact} == {0, 1}


def test_trace_values_reads_a_pyro_trace_in_the_same_form():
    def program():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        with pyro.plate("full", 2):
            pyro.sample("flips", dist.Bernoulli(0.5))
        z = lm_sample("z", "a", max_tokens=3, stop=".")
        tool("length", len, z)
        lm_sample("y", ["a", z], obs="b")
        return k

    exact = enumerate_program(program, lm=LM)
    pyro.set_rng_seed(0)
    with primitives.use(LM):
        for _ in range(5):
            values = trace_values(poutine.trace(program).get_trace())
            assert key(values, exact.latents) in exact.prior()


def diverging():
    count = iter(range(100))

    def program():
        pyro.sample(f"x{next(count)}", dist.Bernoulli(0.5))

    return program


def repeating():
    pyro.sample("x", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Bernoulli(0.5))


def subsampling():
    with pyro.plate("data", 4, subsample_size=2):
        pyro.sample("x", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    "program, options, message",
    [
        (lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), {}, "site 'x'.*quadrature="),
        (lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0)), {"quadrature": 4}, "site 'x'.*Beta"),
        (lambda: lm_sample("z", "a", max_tokens=3), {"max_traces": 10}, "max_traces=10"),
        (diverging(), {}, "diverged.*'x0'.*'x1'"),
        (repeating, {}, "'x' occurs twice"),
        (subsampling, {}, "subsampled plate"),
    ],
    ids=["continuous", "no quadrature", "many", "diverges", "twice", "subsample"],
)
def test_what_cannot_be_enumerated_is_refused(program, options, message):
    with pytest.raises(ValueError, match=message):
        enumerate_program(program, lm=LM, **options)


def test_an_unknown_name_is_refused():
    exact = enumerate_program(lambda: pyro.sample("x", dist.Bernoulli(0.5)))
    with pytest.raises(ValueError, match="'y'.*x"):
        exact.posterior("y")
