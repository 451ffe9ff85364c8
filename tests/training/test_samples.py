"""Truncations against direct scoring of the truncated trace; the replay buffer."""

import math
from dataclasses import replace

import pyro
import pytest
import torch
from guide_helpers import draw_samples, latent_ids, shaken

import lmppl
from lmppl import lm_sample, require
from lmppl.guides.scoring import score_latents
from lmppl.testing import enumerate_program, guide_log_probs, tiny_lm
from lmppl.testing.programs import CASES
from lmppl.training.batch import batches_of
from lmppl.training.samples import truncate

LM = tiny_lm("ab.", seed=0)
PLENTY = 10**9
_CASES = ["one site", "chain", "branch", "observed text", "scale", "factor", "tool", "choices"]


def truncations_of(guide, program, args, samples, budget=PLENTY):
    with lmppl.use(guide.base), torch.no_grad():
        share = budget / sum(sample.num_tokens for sample in samples)
        return truncate([samples], budget=share, generators=[torch.Generator().manual_seed(0)])


def cut_values(truncation):
    """The latents of the truncated trace, by hand."""
    ids = latent_ids(truncation.sample.particle)
    closing = truncation.sample.particle.sites[truncation.name]["fn"].stopping.closing_token
    ids[truncation.name] = (*ids[truncation.name][: truncation.length], closing)
    return ids


def check_scores(guide, program, args, samples, truncations):
    """log R and log q of every truncation are those of the truncated trace, scored on its own."""
    exact = enumerate_program(program, *args, lm=guide.base)
    by_values = {tuple(sorted(trace.values.items())): trace for trace in exact}
    scores = guide.score([sample.proposer for sample in samples], grad=False)
    (batch,) = batches_of([samples], truncations, scores)
    assert batch.truncations == truncations
    traces = [by_values[tuple(sorted(cut_values(t).items()))] for t in truncations]
    log_q = guide_log_probs(guide, program, args, traces, guide.base)
    expected = torch.tensor([trace.log_joint for trace in traces])
    num = len(samples)
    torch.testing.assert_close(batch.log_r[num:], expected, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(batch.log_q[num:], log_q.float(), atol=1e-4, rtol=0.0)
    return traces


@pytest.mark.parametrize("name", _CASES)
def test_a_truncation_is_scored_as_the_truncated_trace(name):
    case = CASES[name]
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
    samples = draw_samples(guide, case.program, case.args, 12)
    truncations = truncations_of(guide, case.program, case.args, samples)
    assert truncations
    assert len({t.length for t in truncations}) > 1
    check_scores(guide, case.program, case.args, samples, truncations)


def test_equal_texts_after_other_numbers_have_rewards_of_their_own():
    """Runs of equal truncations are shared, but a continuous latent before the text makes two."""
    case = CASES["beta mixture"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    samples = draw_samples(guide, case.program, case.args, 12)
    truncations = truncations_of(guide, case.program, case.args, samples)
    by_text = {}
    for t in truncations:
        nodes = t.sample.particle.sites
        # What stands before the text keeps its density; after it only y | z is scored anew.
        before = sum(float(nodes[name]["log_prob_sum"]) for name in ("theta", "k"))
        fn = nodes[t.name]["fn"]
        kept = fn.token_ids(nodes[t.name]["value"])[: t.length]
        text = (float(nodes["k"]["value"]), kept)
        by_text.setdefault(text, []).append((before, t.log_r - before))
    shared = [pairs for pairs in by_text.values() if len(pairs) > 1]
    assert any(len({before for before, _ in pairs}) > 1 for pairs in shared)
    for pairs in shared:
        rest = [each for _, each in pairs]
        assert rest == pytest.approx([rest[0]] * len(rest), abs=1e-4)


@pytest.mark.parametrize("name", ["one site", "factor", "observed text"])
def test_every_cut_of_every_sample_is_there_once(name):
    case = CASES[name]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    samples = draw_samples(guide, case.program, case.args, 10)
    truncations = truncations_of(guide, case.program, case.args, samples)
    last = case.text_latents[-1]
    for sample in samples:
        ids = latent_ids(sample.particle)[last]
        closing = sample.particle.sites[last]["fn"].stopping.closing_token
        # Cut where c itself stands it would be the complete trace.
        lengths = [t for t in range(len(ids)) if (*ids[:t], closing) != ids]
        assert sorted(t.length for t in truncations if t.sample is sample) == lengths


def test_a_cut_after_which_a_latent_follows_is_not_legal():
    def program(x):
        z = lm_sample("z", x, max_tokens=3, stop=".")
        if "b" not in z:
            lm_sample("w", [x, z], max_tokens=2)

    guide = lmppl.LMGuide(program, lm=LM)
    samples = draw_samples(guide, program, ("ab",), 24)
    truncations = truncations_of(guide, program, ("ab",), samples)
    # Of traces that end with z, only those cut after their first b.
    cut_z = [t for t in truncations if t.name == "z"]
    ids = [latent_ids(t.sample.particle)["z"][: t.length] for t in cut_z]
    b = LM.vocabulary.encode("b")[0]
    assert ids and all(b in each for each in ids)
    assert any(t.name == "w" for t in truncations)
    check_scores(guide, program, ("ab",), samples, truncations)


def test_a_cut_that_fails_a_hard_condition_has_no_reward():
    def program(x):
        z = lm_sample("z", x, max_tokens=3, stop=".")
        require("b", "b" in z)

    guide = lmppl.LMGuide(program, lm=LM)
    samples = draw_samples(guide, program, ("ab",), 16)
    assert any(sample.log_r == -math.inf for sample in samples)
    truncations = truncations_of(guide, program, ("ab",), samples)
    assert all(t.sample.log_r > -math.inf for t in truncations)  # dead traces are not cut
    dead = [t for t in truncations if t.log_r == -math.inf]
    assert dead and len(dead) < len(truncations)
    check_scores(guide, program, ("ab",), samples, truncations)


def test_the_last_latent_must_be_a_text():
    def program(x):
        lm_sample("z", x, max_tokens=3)
        pyro.sample("k", pyro.distributions.Bernoulli(0.3))

    guide = lmppl.LMGuide(program, lm=LM)
    samples = draw_samples(guide, program, ("ab",), 8)
    assert truncations_of(guide, program, ("ab",), samples) == []


def test_free_truncations_are_taken_whatever_the_budget():
    case = CASES["factor"]  # nothing is observed, so no language model is asked
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    samples = draw_samples(guide, case.program, case.args, 10)
    scored = case.lm.usage.tokens_scored
    nothing = truncations_of(guide, case.program, case.args, samples, budget=0)
    assert case.lm.usage.tokens_scored == scored
    assert len(nothing) == len(truncations_of(guide, case.program, case.args, samples)) > 0


@pytest.mark.parametrize("budget", [0, 20, 60])
def test_the_token_budget_is_kept(budget):
    case = CASES["one site"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    samples = draw_samples(guide, case.program, case.args, 16)
    scored = case.lm.usage.tokens_scored
    some = truncations_of(guide, case.program, case.args, samples, budget=budget)
    assert case.lm.usage.tokens_scored - scored <= budget
    every = truncations_of(guide, case.program, case.args, samples)
    observed = len(case.lm.vocabulary.encode("aba"))
    assert sum(observed + t.length for t in some) <= budget
    assert len(some) < len(every)
    assert (len(some) > 0) == (budget > 0)


def test_equal_truncations_are_run_once():
    case = CASES["one site"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    samples = draw_samples(guide, case.program, case.args, 40)
    scored = case.lm.usage.tokens_scored
    truncations = truncations_of(guide, case.program, case.args, samples)
    distinct = {cut_values(t)["z"] for t in truncations}
    assert len(distinct) < len(truncations)
    assert case.lm.usage.tokens_scored - scored <= 3 * len(distinct)


def test_a_latent_that_is_left_to_the_model_has_the_models_density():
    """Text of another vocabulary is drawn from the program, and u = log R - log q must not depend
    on how probable it is there."""
    other = tiny_lm("abc.", seed=1)

    def program(x):
        w = lm_sample("w", "a", max_tokens=2, stop=".", lm=other)
        z = lm_sample("z", x, max_tokens=2, stop=".")
        pyro.factor("f", -0.5 * torch.tensor(float(len(w) + len(z))))

    guide = shaken(lmppl.LMGuide(program, lm=LM))
    samples = draw_samples(guide, program, ("a.",), 6)
    cuts = truncations_of(guide, program, ("a.",), samples)
    scores = guide.score([sample.proposer for sample in samples], grad=False)
    (batch,) = batches_of([samples], cuts, scores)
    values = [{n: node["value"] for n, node in s.particle.latents.items()} for s in samples]
    for cut in cuts:
        site = cut.sample.particle.sites["w"]
        z = cut.sample.particle.sites["z"]["fn"].value(cut_values(cut)["z"])
        values.append({"w": site["value"], "z": z})
    with lmppl.use(LM):
        expected = score_latents(guide, program, ("a.",), values)
    assert cuts and scores[0].keys() == {"z"}
    torch.testing.assert_close(batch.log_q.double(), expected.log_q, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(batch.log_r.double(), expected.log_joint, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", [*_CASES, "beta and text", "hard constraint"])
def test_a_batch_of_inputs_is_what_each_trace_and_cut_gives_alone(name):
    """log R and log q as tensors over the batch, against sums trace by trace, with their gradients."""
    case = CASES[name]
    guide = shaken(lmppl.LMGuide(case.program, lm=case.lm))
    drawn = draw_samples(guide, case.program, case.args, 10)
    inputs = [drawn[:4], drawn[4:]]
    cuts = truncations_of(guide, case.program, case.args, drawn)
    scores = guide.score([sample.proposer for sample in drawn])
    found = torch.cat([batch.log_q for batch in batches_of(inputs, cuts, scores)])
    score_of = {id(sample): score for sample, score in zip(drawn, scores, strict=True)}
    naive = []
    for samples in inputs:
        naive += [sum(log_q for log_q, _ in score_of[id(sample)].values()) for sample in samples]
        for cut in (cut for cut in cuts if cut.sample in samples):
            score = score_of[id(cut.sample)]
            terms = score[cut.name][1]
            others = sum(log_q for other, (log_q, _) in score.items() if other != cut.name)
            tokens = terms.log_probs[: cut.length].sum()
            naive.append(others + tokens + terms.closing_log_probs[cut.length])
    live = [k for k, value in enumerate(naive) if torch.is_tensor(value)]  # others died at once
    naive = torch.stack([naive[k] for k in live])
    torch.testing.assert_close(found[live], naive, atol=1e-5, rtol=0.0)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    weights = torch.linspace(-1.0, 1.0, len(live))
    slopes = [
        torch.autograd.grad(
            (weights * log_q).sum(), parameters, retain_graph=True, allow_unused=True
        )
        for log_q in (found[live], naive)
    ]
    for one, two in zip(*slopes, strict=True):
        if one is not None or two is not None:
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_rewards_of_truncations_are_found_once():
    """A trace that comes again brings those of its truncations; which are chosen is the same."""
    case = CASES["one site"]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    samples = draw_samples(guide, case.program, case.args, 12)
    fresh = [replace(sample, cut_rewards={}) for sample in samples]
    first = truncations_of(guide, case.program, case.args, samples, budget=60)
    scored = case.lm.usage.tokens_scored
    again = truncations_of(guide, case.program, case.args, samples, budget=60)
    assert case.lm.usage.tokens_scored == scored
    other = truncations_of(guide, case.program, case.args, fresh, budget=60)
    for cuts in (again, other):
        assert [(t.length, t.log_r) for t in cuts] == [(t.length, t.log_r) for t in first]
