"""The automatic guide: what it draws, and the density that it gives to it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import draw_samples, latent_ids, latent_values, shaken

import lmppl
from lmppl import lm_sample, require
from lmppl.guides.automatic import HeadDraw, TextDraw
from lmppl.guides.heads import Head
from lmppl.testing import (
    enumerate_program,
    enumerate_site,
    guide_log_probs,
    guide_report,
    tiny_lm,
    total_variation,
)
from lmppl.testing.programs import CASES

LM = tiny_lm("ab.", seed=0)
DISCRETE = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.quadrature is None], ids=str
)


@DISCRETE
def test_a_guide_is_a_distribution(case):
    """Also far from the prior: its mass over all traces, dead ones included, is one."""
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
    log_q = guide_log_probs(guide, case.program, case.args, list(case.enumerate()), case.lm)
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_the_report_counts_dead_mass():
    case = CASES["hard constraint"]
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
    exact = case.enumerate()
    log_q = guide_log_probs(guide, case.program, case.args, list(exact), case.lm)
    log_p = torch.tensor([t.log_joint for t in exact]) - exact.log_evidence
    dead = float(log_q[log_p == -math.inf].exp().sum())
    assert dead > 0.01
    report = guide_report(guide, case.program, case.args, case.lm)
    assert report.dead_mass == pytest.approx(dead, abs=1e-4)
    tv = 0.5 * float((log_q.exp() - log_p.exp()).abs().sum())
    assert report.tv == pytest.approx(tv, abs=1e-4)
    live = log_p > -math.inf
    q = torch.softmax(log_q[live], 0)
    gap = float((q * (q.log() - log_p[live])).sum())
    assert report.gap == pytest.approx(gap, abs=1e-4) and gap > 0
    assert report.log_evidence == exact.log_evidence


def test_the_report_of_a_continuous_latent_is_that_of_its_density():
    """An untrained guide of a program without text observations is the prior."""

    def program(label):
        theta = pyro.sample("theta", dist.Beta(2.0, 3.0))
        lm_sample("z", "ab.", max_tokens=1)
        pyro.sample("y", dist.Bernoulli(theta), obs=torch.tensor(label))

    guide = lmppl.LMGuide(program, lm=LM)
    report = guide_report(guide, program, (1.0,), LM)
    assert report.log_evidence == pytest.approx(math.log(0.4), abs=1e-5)
    assert report.dead_mass == pytest.approx(0.0, abs=1e-4)
    # Beta(2, 3) against Beta(3, 3): E_q[log q - log p] = log 0.4 - E[log theta], and the
    # expectation is digamma(2) - digamma(5).
    e_log = float(torch.digamma(torch.tensor(2.0)) - torch.digamma(torch.tensor(5.0)))
    assert report.gap == pytest.approx(math.log(0.4) - e_log, abs=2e-3)
    # Their densities cross at theta = 0.4; cdf of Beta(2, 3) less that of Beta(3, 3) there.
    assert report.tv == pytest.approx(0.5248 - 0.31744, abs=5e-3)


@DISCRETE
def test_what_is_drawn_has_the_density_that_is_said(case):
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
    samples = draw_samples(guide, case.program, case.args, 8)
    scores = guide.score([sample.proposer for sample in samples], grad=False)
    for sample, score in zip(samples, scores, strict=True):
        for name, node in sample.particle.latents.items():
            assert float(score[name][0]) == pytest.approx(
                float(node["proposal_log_prob"]), abs=1e-4
            )


def test_draws_follow_the_density():
    case = CASES["one site"]
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm), size=0.05)
    exact = case.enumerate()
    log_q = guide_log_probs(guide, case.program, case.args, list(exact), case.lm)
    table = {t.values["z"]: math.exp(q) for t, q in zip(exact, log_q.tolist(), strict=True)}
    counts = dict.fromkeys(table, 0.0)
    for sample in draw_samples(guide, case.program, case.args, 2000):
        counts[latent_ids(sample.particle)["z"]] += 1 / 2000
    assert total_variation(table, counts) < 0.04


def test_gradients_reach_the_adapter_and_the_base_stays():
    case = CASES["chain"]
    before = [p.detach().clone() for p in case.lm.model.parameters()]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    samples = draw_samples(guide, case.program, case.args, 4)
    scores = guide.score([sample.proposer for sample in samples])
    torch.stack([score["w"][0] for score in scores]).sum().backward()
    grads = [p.grad for p in guide.parameters() if p.grad is not None]
    assert grads and any(float(grad.abs().max()) > 0 for grad in grads)
    after = list(case.lm.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)


def test_an_untrained_guide_that_sees_nothing_is_the_prior():
    def program(x):
        z = lm_sample("z", x, max_tokens=3, stop=".", temperature=1.7)
        pyro.factor("f", torch.tensor(0.5 * len(z)))

    guide = lmppl.LMGuide(program, lm=LM)
    exact = list(enumerate_program(program, "ab.", lm=LM))
    log_q = guide_log_probs(guide, program, ("ab.",), exact, LM)
    log_p = torch.tensor([trace.log_prior for trace in exact], dtype=torch.float64)
    torch.testing.assert_close(log_q, log_p, atol=1e-4, rtol=0.0)


def test_the_behaviour_policy():
    """Tempered draws and draws from the model are remembered for the guide itself to score."""
    case = CASES["one site"]
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
    (node,) = [s.particle.latents["z"] for s in draw_samples(guide, case.program, case.args, 1)]
    prior = enumerate_site(case.lm, node["fn"].prefix_ids, max_tokens=3, stop=".")
    for sample in draw_samples(guide, case.program, case.args, 8, temperature=math.inf):
        node = sample.particle.latents["z"]
        ids = latent_ids(sample.particle)["z"]
        assert float(node["proposal_log_prob"]) == pytest.approx(prior[ids], abs=1e-4)
        assert sample.proposer.draws["z"].fn.lm is guide.inner.adapter_for("z")
    plain = draw_samples(guide, case.program, case.args, 8, seed=3)
    same = draw_samples(guide, case.program, case.args, 8, seed=3, temperature=1.0)
    assert list(map(latent_values, plain)) == list(map(latent_values, same))
    for sample in draw_samples(guide, case.program, case.args, 8, temperature=2.0):
        (score,) = guide.score([sample.proposer], grad=False)
        q = float(sample.particle.latents["z"]["proposal_log_prob"])
        assert float(score["z"][0]) != pytest.approx(q, abs=1e-4)


# --- what it leaves to the model -----------------------------------------------------------------


@pytest.mark.parametrize("engine", ["importance", "smc", "gflownet"])
def test_a_guide_draws_for_its_model_loaded_again(engine):
    case = CASES["chain"]
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))

    def log_weights(lm, guide=guide):
        options = {"method": engine, "num_samples": 16, "seed": 0, "guide": guide}
        return lmppl.infer(case.program, *case.args, lm=lm, **options).log_weights

    again = tiny_lm("ab.", seed=0)
    # To rounding: the first run leaves prompts behind that the second does not read again.
    torch.testing.assert_close(log_weights(again), log_weights(case.lm), atol=1e-5, rtol=0)
    if engine != "gflownet":
        assert not torch.allclose(log_weights(again), log_weights(again, guide=None))


def test_for_which_models_a_guide_draws():
    guide = lmppl.LMGuide(CASES["chain"].program, lm=LM).inner
    again = tiny_lm("ab.", seed=0)
    half = tiny_lm("ab.", seed=0)
    half = lmppl.LM(half.model.to(torch.bfloat16), half.tokenizer)
    for same in (LM, LM.adapter(), LM.sampler, again, again.adapter(), half):
        assert guide.draws_for(same)
    for other in (tiny_lm("ab.", seed=1), tiny_lm("ba.", seed=0), tiny_lm("ab.", unused_logits=2)):
        assert not guide.draws_for(other)


def test_sites_of_another_model_and_immovable_families_are_left_to_the_model():
    other = tiny_lm("ab.", seed=5)

    def program(x):
        lm_sample("z", x, max_tokens=2)
        lm_sample("w", x, max_tokens=2, lm=other)
        pyro.sample("u", dist.Uniform(0.0, 1.0))
        pyro.sample("n", dist.Normal(0.0, 1.0))

    guide = lmppl.LMGuide(program, lm=LM)
    (sample,) = draw_samples(guide, program, ("ab",), 1)
    draws = sample.proposer.draws
    assert set(draws) == {"z", "n"}
    assert isinstance(draws["z"], TextDraw) and isinstance(draws["n"], HeadDraw)
    assert set(sample.particle.latents) == {"z", "w", "u", "n"}


def test_a_guide_that_proposes_nothing_cannot_be_trained():
    def program():
        pyro.sample("u", dist.Uniform(0.0, 1.0))

    with pytest.raises(ValueError, match="the guide has proposed no latent site"):
        lmppl.LMGuide(program, lm=LM).fit([()], steps=1, seed=0)


def test_a_latent_that_changes_its_shape():
    def program(x, n):
        lm_sample("z", x, max_tokens=1)
        pyro.sample("k", dist.Normal(torch.zeros(n), 1.0).to_event(1))

    guide = lmppl.LMGuide(program, lm=LM)
    draw_samples(guide, program, ("ab", 2), 1)
    with pytest.raises(ValueError, match="site 'k': its guide was made for 64 features and 4 "):
        draw_samples(guide, program, ("ab", 3), 1)


def test_head_features_hold_the_texts_and_numbers_before():
    def program(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = lm_sample("z", x, max_tokens=2)
        pyro.sample("b", dist.Normal(a + len(z), 1.0))

    guide = lmppl.LMGuide(program, lm=LM)
    (sample,) = draw_samples(guide, program, ("ab",), 1)
    draw = sample.proposer.draws["b"]
    assert list(guide.inner.heads) == ["head-a", "head-b-a"]
    with lmppl.use(LM):
        state = LM.hidden([LM.vocabulary.encode("ab") + latent_ids_of(sample)])[0]
    a = sample.particle.latents["a"]["value"].reshape(1)
    torch.testing.assert_close(draw.features, torch.cat([a, state]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_numbers_of_any_size_and_the_state_are_both_read(size):
    """The normalisation of all features would leave of one number its sign, and of a state beside a
    large number nothing."""
    head = Head(2 + 8, 1, num_numbers=2)
    torch.nn.init.ones_(head.out.weight)
    state = size * torch.randn(8, generator=torch.Generator().manual_seed(0))

    def found(*numbers, state=state):
        return head(torch.cat([torch.tensor(numbers), state])).item()

    values = [found(a, b) for a in (-1e3, 0.5, 1.0) for b in (0.0, 0.1)]
    assert len({round(each, 4) for each in values}) == 6
    if size:
        assert abs(found(1e3, 0.0) - found(1e3, 0.0, state=-state)) > 1e-3


def test_sites_may_be_called_what_a_module_has():
    """``nn.ModuleDict`` refuses names of its own attributes, and dots."""

    def program():
        for name in ("type", "keys", "training", "half", "a.b", "a_b", "a-b"):
            pyro.sample(name, dist.Bernoulli(0.5))
        lm_sample("z", "ab", max_tokens=1)

    guide = lmppl.LMGuide(program, lm=LM)
    draw_samples(guide, program, (), 1)
    assert len(guide.inner.heads) == 7

    def either(first):
        pyro.sample("x-y" if first else "y", dist.Bernoulli(0.5))
        pyro.sample("z" if first else "z-x", dist.Bernoulli(0.5))
        lm_sample("w", "ab", max_tokens=1)

    guide = lmppl.LMGuide(either, lm=LM)
    for first in (True, False):
        draw_samples(guide, either, (first,), 1)
    assert len(guide.inner.heads) == 4


def test_a_head_reads_as_many_features_where_there_is_no_text_to_read():
    """A label that is not known when the guide is used, an empty text, and no token in front."""

    def program(x, y=None):
        pyro.sample("k", dist.Bernoulli(0.5))
        lm_sample("y", x, max_tokens=2, obs=y)

    guide = lmppl.LMGuide(program, lm=LM)
    guide.fit([("ab.", "ab"), ("ab.", "")], steps=2, batch_size=8, seed=0, progress=False)
    for y in ("", "a", None):
        lmppl.infer(program, "ab.", y, lm=LM, method="importance", guide=guide, num_samples=4)


def test_a_head_before_any_text_reads_how_the_first_text_begins():
    def program(x, first, last):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        z = lm_sample("z", [x, "ab"[int(k)]], max_tokens=2, stop=".")
        lm_sample("y1", [x, z], obs=first)
        lm_sample("y2", [x, "ab"[int(k)]], obs=last)

    lm = tiny_lm("ab.\n", seed=0)
    guide = lmppl.LMGuide(program, lm=lm)
    found = []
    for args in (("ab.", "ab", "a"), ("ba", "ab", "a"), ("ab.", "a", "ba")):
        with lmppl.use(lm):
            observations = guide.observations(args)
        assert observations[""][: len(args[0])] == lm.vocabulary.encode(args[0])
        (sample,) = draw_samples(guide, program, args, 1)
        found.append(sample.proposer.draws["k"].features)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_a_rejected_run_does_not_hide_how_the_first_text_begins():
    def program(x, first):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        require("wanted", bool(k == first))
        lm_sample("z", x, max_tokens=2)

    for first in (0.0, 1.0):
        found = lmppl.LMGuide(program, lm=LM).observations(("ab.", first))
        assert found == {"": LM.vocabulary.encode("ab.")}


def latent_ids_of(sample):
    node = sample.particle.latents["z"]
    return node["fn"].token_ids(node["value"])


# --- bad arguments -------------------------------------------------------------------------------


def test_bad_arguments():
    def program(x):
        lm_sample("z", x, max_tokens=2)

    with pytest.raises(ValueError, match="needs a language model: pass lm="):
        lmppl.LMGuide(program)
    with pytest.raises(TypeError, match="model must be a function, given str"):
        lmppl.LMGuide("program", lm=LM)
    with pytest.raises(ValueError, match="lora= and adapter_per_site= are for the automatic guide"):
        lmppl.LMGuide(program, lm=LM, program=program, lora=object())
    with pytest.raises(TypeError, match="a lmppl.LMGuide or a guide program"):
        lmppl.infer(program, "a", lm=LM, method="importance", guide=3)
    assert repr(lmppl.LMGuide(program, lm=LM)).startswith("LMGuide(program, automatic, lm='tiny")
