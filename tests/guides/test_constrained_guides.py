"""Guides of constrained programs: masked, renormalised, and with a density that is that of draws."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from constrained_programs import CASES, LM, TWO_BS, exact_joint, naive_masked, sequences
from guide_helpers import draw_samples, shaken

import lmppl
from lmppl import lm_sample, runtime
from lmppl.constraints import Regex
from lmppl.distributions import LMText, draw_texts, score_texts
from lmppl.guides.automatic import AutomaticProposer
from lmppl.guides.program import _warned_of_no_end
from lmppl.guides.scoring import score_latents

pytestmark = pytest.mark.filterwarnings("ignore:.*asked about every token")

VALUES = sequences(3, LM.vocabulary.size)
LAWS = [
    (constraint, constrain, stop)
    for constraint, stop in ((TWO_BS, None), (Regex("b|ab|ab[ab.]"), None), (Regex("(ab?)+"), "."))
    for constrain in ("global", "local")
]


def density(law, value):
    with torch.no_grad():
        return law.log_prob(value)


def text_of(constraint, constrain, stop):
    return LMText(
        LM, "ab", max_tokens=3, stop=stop, constraint=constraint, constrain=constrain,
        temperature=1.3,
    )  # fmt: skip


# --- the law of draws ----------------------------------------------------------------------------


@pytest.mark.parametrize("constraint, constrain, stop", LAWS, ids=str)
def test_the_law_of_draws_sums_to_one_dead_ends_included(constraint, constrain, stop):
    fn = text_of(constraint, constrain, stop)
    values = torch.stack([fn.value(ids) for ids in VALUES])
    matches = density(fn, values) > -math.inf
    for law in (fn.proposal(), fn.guided()):
        log_q = density(law, values)
        assert float(log_q.double().exp().sum()) == pytest.approx(1.0, abs=1e-6)
        assert bool((log_q[matches] > -math.inf).all())
        has_dead_ends = bool((log_q[~matches] > -math.inf).any())
        assert has_dead_ends == (constraint is TWO_BS)  # regular expressions are steered


def test_the_law_of_draws_is_renormalised_token_by_token():
    fn = text_of(TWO_BS, "global", None)
    law = fn.proposal()
    a, b, _, eos = range(4)

    def allowed(before):
        if before.count(b) == 2:
            return [a, eos]
        return [a, b]

    for ids in VALUES:
        dead_or_match = law.supports(fn.value(ids))
        expected = (
            naive_masked(LM, law.prefix_ids, ids, allowed, 1.3) if dead_or_match else -math.inf
        )
        assert float(density(law, fn.value(ids))) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("constraint, constrain, stop", LAWS, ids=str)
def test_a_draw_has_the_density_that_scoring_it_finds(constraint, constrain, stop):
    fn = text_of(constraint, constrain, stop)
    for law in (fn, fn.proposal(), fn.guided()):
        uniforms = list(torch.rand(24, 3, generator=torch.Generator().manual_seed(0)).double())
        drawn = draw_texts([law] * 24, uniforms)
        values = [d.value for d in drawn]
        of_draws = fn.guided() if law.law != "local" and law.steered else fn.proposal()
        for d, (log_q, _), (log_prob, _) in zip(
            drawn,
            score_texts([of_draws] * 24, values),
            score_texts([law] * 24, values),
            strict=True,
        ):
            assert float(d.log_q) == pytest.approx(float(log_q), abs=1e-4)
            assert float(d.log_prob) == pytest.approx(float(log_prob), abs=1e-4)


# --- the automatic guide -------------------------------------------------------------------------


@functools.cache
def guide_of(case):
    return shaken(lmppl.LMGuide(case.program, lm=LM), size=0.3)


def joint_and_log_q(guide, case):
    """log R and log q of every trace of positive probability."""
    joint = exact_joint(case)
    values = [{name: torch.tensor(ids) for name, *ids in key} for key in joint]
    widths = {"u": 1, "w": 1, "z": 4 if str(case) in WIDE else 3}
    latents = [
        {n: torch.nn.functional.pad(v, (0, widths[n] - len(v)), value=-1) for n, v in each.items()}
        for each in values
    ]
    with lmppl.use(LM):
        scores = score_latents(guide, case.program, case.args, latents)
    torch.testing.assert_close(
        scores.log_joint, torch.tensor(list(joint.values())).double(), atol=1e-4, rtol=0
    )
    return scores


WIDE = {"local", "brackets", "before_stop"}
DIES = {"two_bs", "two_bs_local", "brackets"}  # steering does not know their dead ends


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_automatic_guide_is_a_distribution_over_what_matches(case):
    scores = joint_and_log_q(guide_of(case), case)
    mass = float(scores.log_q.exp().sum())
    if str(case) in DIES:
        assert 0.001 < mass < 0.999
    else:
        assert mass == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    "case, temperature",
    [(CASES[3], 1.0), (CASES[3], 1.7), (CASES[5], 1.0), (CASES[4], math.inf), (CASES[5], math.inf)],
    ids=str,
)
def test_draws_of_the_automatic_guide_are_scored_as_they_were_drawn(case, temperature):
    guide = guide_of(case)
    samples = draw_samples(guide, case.program, case.args, 24, temperature=temperature)
    scores = guide.score([sample.proposer for sample in samples], grad=False)
    num_dead = sum(sample.log_r == -math.inf for sample in samples)
    assert (0 < num_dead < 24) if str(case) in DIES else not num_dead
    for sample, score in zip(samples, scores, strict=True):
        drawn = {n: float(sample.sites[n]["proposal_log_prob"]) for n in sample.log_priors}
        for name, (log_q, _) in score.items():
            assert float(log_q) > -math.inf  # also of dead ends, so that it can be driven down
            if temperature == 1.0:
                assert drawn[name] == pytest.approx(float(log_q), abs=1e-4)
        if temperature == math.inf:  # the program's own draws
            assert sample.log_own() == pytest.approx(sum(drawn.values()), abs=1e-4)


def test_scores_of_the_automatic_guide_have_the_gradient_of_the_masked_law():
    case = CASES[1]
    guide = guide_of(case)
    (sample,) = draw_samples(guide, case.program, case.args, 1)
    (score,) = guide.score([sample.proposer])
    draw = sample.proposer.draws["z"]
    ids = draw.fn.token_ids(draw.value)
    logits = draw.fn.lm.model(torch.tensor([[*draw.fn.prefix_ids, *ids]])).logits[0]
    masks = draw.fn.stopping.masks(ids, steered=True)
    steps = logits[len(draw.fn.prefix_ids) - 1 : -1].masked_fill(~masks, -math.inf)
    naive = torch.log_softmax(steps, -1)[range(len(ids)), list(ids)].sum()
    for grad, expected in zip(
        torch.autograd.grad(score["z"][0], guide.parameters()),
        torch.autograd.grad(naive, guide.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected, atol=1e-3, rtol=1e-3)
    assert not bool(masks.all())


def test_condition_is_the_density_of_the_guide():
    case = CASES[0]
    guide = guide_of(case)
    (seen,) = guide.observations_of([(case.program, case.args)])
    found = {}

    class Conditioned(AutomaticProposer):
        def propose(self, site, trace):
            value = site["fn"].encode("ab")
            found["log_q"] = self.condition(site, trace, value)
            found["drawn"] = density(self.draws[site["name"]].fn, value)
            return runtime.Given(value)

    with lmppl.use(LM), torch.no_grad():
        runs = runtime.start(
            case.program,
            case.args,
            1,
            seed=0,
            proposer=lambda slot, seed: Conditioned(guide.inner, seen),
        )
        with runtime.ending(runs):
            runtime.run_to_end(runs)
    assert float(found["log_q"]) == pytest.approx(float(found["drawn"]), abs=1e-5)
    law = found["drawn"]
    assert -20 < float(law) < 0


def test_a_guide_says_for_which_constraint_it_was_trained(tmp_path):
    def program(x, y, pattern="(ab?)+", constrain="global"):
        z = lm_sample("z", x, max_tokens=3, stop=".", regex=pattern, constrain=constrain)
        lm_sample("y", [x, z], obs=y)

    guide = lmppl.LMGuide(program, lm=LM)
    guide.fit([("ab", "a")], steps=2, batch_size=8, seed=0, progress=False)
    assert guide.inner.sites.laws["z"]["constraint"] == "Regex('(ab?)+')"
    assert guide.inner.sites.laws["z"]["constrain"] == "global"
    guide.save(tmp_path / "guide")

    def use_with(*more):
        loaded = lmppl.LMGuide.load(tmp_path / "guide", program, lm=LM)
        args = ("ab", "a", *more)
        lmppl.infer(program, *args, lm=LM, method="importance", guide=loaded, num_samples=4, seed=0)

    use_with()
    with pytest.warns(UserWarning, match=r"trained with constraint=\"Regex\('\(ab\?\)\+'\)\", and"):
        use_with("b+")
    with pytest.warns(UserWarning, match="trained with constrain='global', and the program has "):
        use_with("(ab?)+", "local")


# --- guide programs ------------------------------------------------------------------------------


@pytest.mark.parametrize("constrain", ["global", "local"])
def test_a_guide_program_draws_by_the_masked_law_and_scores_by_it(constrain):
    case, q = CASES[0], LM.adapter()

    def guide_program(x, y):
        regex = "b|ab|ab[ab.]"
        lm_sample("z", [y, x], max_tokens=3, lm=q, regex=regex, constrain=constrain)

    guide = lmppl.LMGuide(case.program, lm=LM, program=guide_program)
    samples = draw_samples(guide, case.program, case.args, 12)
    assert all(sample.log_r > -math.inf for sample in samples)
    scores = guide.score([sample.proposer for sample in samples], grad=True)
    for sample, score in zip(samples, scores, strict=True):
        log_q, node = score["z"][0], sample.sites["z"]
        assert float(node["proposal_log_prob"]) == pytest.approx(float(log_q.detach()), abs=1e-4)
        assert log_q.requires_grad
    scores = joint_and_log_q(guide, case)
    assert float(scores.log_q.exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_dead_ends_of_a_guide_program_are_dead_traces_with_a_density():
    case, q = CASES[4], LM.adapter()

    def guide_program(x, y):
        lm_sample("z", x, max_tokens=3, constraint=TWO_BS, lm=q, temperature=3.0)

    guide = lmppl.LMGuide(case.program, lm=LM, program=guide_program)
    samples = draw_samples(guide, case.program, case.args, 24)
    dead = [sample for sample in samples if sample.log_r == -math.inf]
    assert 0 < len(dead) < 24
    for sample, score in zip(
        samples, guide.score([s.proposer for s in samples], grad=False), strict=True
    ):
        drawn = float(sample.sites["z"]["proposal_log_prob"])
        assert float(score["z"][0]) == pytest.approx(drawn, abs=1e-4)


def test_draws_of_a_guide_program_without_the_constraint_may_be_dead():
    """Also those that go on after a match that nothing extends."""
    case, q = CASES[0], LM.adapter()

    def guide_program(x, y):
        lm_sample("z", [y, x], max_tokens=3, lm=q, temperature=4.0)

    guide = lmppl.LMGuide(case.program, lm=LM, program=guide_program)
    _warned_of_no_end.clear()
    message = "site 'z': the guide's text goes on after a match of Regex.*the same constraint"
    with pytest.warns(UserWarning, match=message) as warned:
        samples = draw_samples(guide, case.program, case.args, 60)
    assert len(warned) == 1
    joint = exact_joint(case)
    by_ids = {key[0][1:]: log_r for key, log_r in joint.items()}
    texts = [s.sites["z"]["fn"].token_ids(s.sites["z"]["value"]) for s in samples]
    assert len(set(texts) & set(by_ids)) > 1 and set(texts) - set(by_ids)
    for sample, ids in zip(samples, texts, strict=True):
        expected = by_ids.get(ids, -math.inf)
        assert sample.log_r == pytest.approx(expected, abs=1e-4)


def test_the_parameters_after_a_dead_end_of_a_guide_program_are_found():
    """No draw of a guide ends its run."""

    def program(x):
        z = lm_sample("z", x, max_tokens=1, constraint=TWO_BS)
        pyro.sample("k", dist.Normal(float("b" in z), 1.0))

    def guide_program(x):
        lm_sample("z", x, max_tokens=1, constraint=TWO_BS)
        pyro.sample("k", dist.Normal(pyro.param("late", torch.tensor(0.3)), 1.0))

    pyro.clear_param_store()
    guide = lmppl.LMGuide(program, lm=LM, program=guide_program)
    guide.inner.find_parameters(("a",))
    assert list(guide.inner.named_parameters()) == ["params.late"]


def test_a_guide_program_that_goes_on_after_a_move_draws_by_the_masked_law():
    def program(x):
        u = lm_sample("u", x, max_tokens=1)
        lm_sample("z", [x, u], max_tokens=3, regex="b|ab|ab[ab.]")

    with lmppl.use(LM):
        proposer = lmppl.guides.program.as_guide(program).proposer_factory(("a",))(0, 0)
        moved = runtime.Particle(program, ("a",), seed=1)
        with runtime.ending([moved]):
            runtime.resume([moved])
            runtime.run_to_draws([moved])
            runtime.serve_draws([moved])  # it waits for "z"
            goes_on = proposer.resumed(moved.latents, proposer)
            run = moved.rerun(moved.sites, {}, seed=0, proposer=goes_on)
            with runtime.ending([run]):
                runtime.run_to_end([run])
        node = run.sites["z"]
        ((log_q, _),) = score_texts([node["fn"].guided()], [node["value"]])
    assert float(node["proposal_log_prob"]) == pytest.approx(float(log_q), abs=1e-5)
    assert float(node["proposal_log_prob"]) > float(node["unscaled_log_prob"]) + 0.01


def test_what_a_guide_leaves_to_the_program_has_the_density_of_its_draws():
    """So that u = log R - log q holds the mass that the masks have lost."""
    case, q = CASES[3], LM.adapter()

    def guide_program(x, y):
        lm_sample("w", x, max_tokens=1, lm=q)

    guide = lmppl.LMGuide(case.program, lm=LM, program=guide_program)
    scores = joint_and_log_q(guide, case)
    assert float(scores.log_q.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    samples = draw_samples(guide, case.program, case.args, 8)
    for sample, score in zip(
        samples, guide.score([s.proposer for s in samples], grad=False), strict=True
    ):
        assert set(score) == {"w"}
        drawn = sum(float(sample.sites[n]["proposal_log_prob"]) for n in sample.log_priors)
        assert sample.log_q(score) == pytest.approx(drawn, abs=1e-4)
