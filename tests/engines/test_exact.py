"""Exact: it agrees with an oracle that shares no code with it, and refuses what it cannot do."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from estimates import joint_of, weighted_values

import lmppl
from lmppl import lm_sample, require
from lmppl.engines import exact
from lmppl.runtime.sites import values_of
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES

FINITE = [case for case in CASES.values() if case.quadrature is None]
CONTINUOUS = [case for case in CASES.values() if case.quadrature is not None]


def run(case, **options):
    return lmppl.infer(case.program, *case.args, lm=case.lm, method="exact", **options)


@pytest.mark.parametrize("case", FINITE, ids=str)
def test_equals_the_oracle(case):
    oracle, posterior = case.enumerate(), run(case)
    assert posterior.log_evidence == pytest.approx(oracle.log_evidence, abs=1e-4)
    found, expected = weighted_values(posterior), joint_of(oracle)
    assert found.keys() == expected.keys()
    for values, joint in expected.items():
        assert math.log(found[values]) == pytest.approx(math.log(joint), abs=1e-4)
    for name in case.text_latents:
        marginal = oracle.posterior(name, text=True)
        probs = posterior.probs(name)
        assert probs.keys() == marginal.keys()
        for text, p in marginal.items():
            assert probs[text] == pytest.approx(p, abs=1e-4)


@pytest.mark.parametrize("case", FINITE, ids=str)
def test_mean_weight_is_the_evidence(case):
    posterior = run(case)
    mean = torch.logsumexp(posterior.log_weights, 0) - math.log(len(posterior))
    assert float(mean) == pytest.approx(case.enumerate().log_evidence, abs=1e-4)


@pytest.mark.parametrize("case", CONTINUOUS, ids=str)
def test_refuses_a_continuous_latent(case):
    with pytest.raises(ValueError, match="'theta'.*no finite support"):
        run(case)


def test_refuses_too_many_traces():
    with pytest.raises(ValueError, match="site 'w' passes max_traces=20"):
        run(CASES["chain"], max_traces=20)
    number = len(run(CASES["chain"]))
    assert len(run(CASES["chain"], max_traces=number)) == number


def test_refuses_too_many_values_of_one_site():
    with pytest.raises(ValueError, match="site 'z' passes max_traces=3"):
        run(CASES["one site"], max_traces=3)


def tokens_read(lm):
    """What a call makes the model read, in tokens."""
    return lm.runner.computed_tokens


LETTERS = [chr(ord("A") + i) for i in range(50)]


@pytest.mark.parametrize(
    "max_tokens, size", [(2, "at most 2,601"), (4, "at most 6,765,201"), (20, r"about 10\^34")]
)
def test_a_free_text_is_refused_after_a_few_passes(max_tokens, size):
    lm = tiny_lm(LETTERS)  # and EOS: 51 tokens

    def program():
        z = lm_sample("z", "AB", max_tokens=max_tokens)
        lm_sample("y", z, obs="B")

    before = tokens_read(lm)
    with pytest.raises(ValueError, match=rf"'z'.*max_traces=150 .*, {size}\. Give .*choices="):
        lmppl.infer(program, lm=lm, method="exact", max_traces=150)
    assert tokens_read(lm) - before < 40  # a search breadth first would read 50 texts


def test_many_choices_are_refused_before_they_are_scored():
    lm = tiny_lm(LETTERS)

    def program():
        pyro.sample("k", dist.Bernoulli(0.5))
        lm_sample("z", "AB", choices=LETTERS)

    before = tokens_read(lm)
    message = "'z' passes max_traces=49 traces: it has 50 choices, beside at least 1 other trace"
    with pytest.raises(ValueError, match=message):
        lmppl.infer(program, lm=lm, method="exact", max_traces=49)
    assert tokens_read(lm) == before


def test_a_later_site_is_refused_when_the_first_runs_come_to_it(monkeypatch):
    monkeypatch.setattr(exact, "_SIDE_BY_SIDE", 8)
    monkeypatch.setattr(exact, "_FIRST", 2)
    lm, scored = tiny_lm(LETTERS), []

    def program():
        z = lm_sample("z", "AB", max_tokens=1)
        scored.append(str(z))
        lm_sample("y", [z, "A"], obs="B")
        lm_sample("w", [z, "AB"], max_tokens=1)

    with pytest.raises(ValueError, match="'w' passes max_traces=100 .*at least 50 other traces"):
        lmppl.infer(program, lm=lm, method="exact", max_traces=100)
    assert len(set(scored)) <= 2, "of 51 values of z"


@pytest.mark.parametrize("case", FINITE, ids=str)
def test_running_a_few_first_changes_nothing(case, monkeypatch):
    whole = run(case)
    monkeypatch.setattr(exact, "_SIDE_BY_SIDE", 3)
    monkeypatch.setattr(exact, "_FIRST", 1)
    parts = run(case)
    torch.testing.assert_close(parts.log_weights, whole.log_weights, atol=1e-4, rtol=0)
    assert joint_of_traces(parts) == joint_of_traces(whole)


def joint_of_traces(posterior):
    return [sorted(map(str, values_of(trace).items())) for trace in posterior.traces]


def test_counts_every_trace_of_a_site_whose_model_excludes_tokens():
    """The count is of texts of positive probability, not of the vocabulary."""
    lm = tiny_lm(LETTERS)
    lm.model.lm_head.weight.data[3:51] = 0.0
    bias = torch.zeros(51).index_fill(0, torch.arange(3, 51), -torch.inf)
    lm.model.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    program = lambda: lm_sample("z", "AB", max_tokens=3)  # noqa: E731
    posterior = lmppl.infer(program, lm=lm, method="exact", max_traces=27)
    assert len(posterior) == 27


def test_refuses_a_guide():
    with pytest.raises(ValueError, match="takes no guide"):
        run(CASES["one site"], guide=lambda x, y: None)


def test_names_the_site_of_a_batch():
    def program():
        lm_sample("z", "a", max_tokens=1)
        pyro.sample("k", dist.Bernoulli(torch.tensor([0.5, 0.5])).to_event(0))

    with pytest.raises(ValueError, match="'k'.*batch shape"):
        lmppl.infer(program, lm=CASES["chain"].lm, method="exact")


def test_all_traces_dead():
    def program():
        z = lm_sample("z", "a", max_tokens=2)
        require("impossible", "a" in z and "a" not in z)

    with pytest.raises(lmppl.ZeroEvidenceError, match="impossible") as caught:
        lmppl.infer(program, lm=CASES["chain"].lm, method="exact")
    assert caught.value.posterior.killed["impossible"] == len(caught.value.posterior)


def test_a_discrete_pyro_latent_is_enumerated():
    def program():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = lm_sample("z", ["a", "b", "."][int(k)], max_tokens=2)
        lm_sample("y", z + "a", obs="b")

    lm = CASES["chain"].lm
    posterior = lmppl.infer(program, lm=lm, method="exact")
    oracle = lmppl.testing.enumerate_program(program, lm=lm)
    assert posterior.log_evidence == pytest.approx(oracle.log_evidence, abs=1e-4)
    probs = posterior.probs("k")
    for k, p in oracle.posterior("k").items():
        assert probs[k] == pytest.approx(p, abs=1e-4)
