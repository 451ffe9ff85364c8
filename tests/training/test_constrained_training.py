"""Training guides of constrained programs: truncations, dead ends, records, checkpoints."""

import functools
import itertools
import math

import pytest
import torch
from constrained_programs import CASES, LM, TWO_BS, exact_joint
from guide_helpers import QUICK, draw_samples, equal, latent_ids, shaken, weights

import lmppl
from lmppl import lm_sample
from lmppl.constraints import Regex
from lmppl.guides.scoring import score_latents
from lmppl.runtime.records import rescore
from lmppl.testing import tiny_lm
from lmppl.training import objectives
from lmppl.training import samples as samples_module
from lmppl.training.batch import batches_of
from lmppl.training.fingerprints import digest_of, program_fingerprint
from lmppl.training.inputs import Collection, Input
from lmppl.training.losses import ELBO, TB, SubTB, VarGrad, Wake
from lmppl.training.options import FitOptions
from lmppl.training.samples import truncate
from lmppl.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*asked about every token")
BY_NAME = {str(case): case for case in CASES}


def truncations_of(samples, budget=10**9):
    with lmppl.use(LM), torch.no_grad():
        share = budget / sum(sample.num_tokens for sample in samples)
        return truncate([samples], budget=share, generators=[torch.Generator().manual_seed(0)])


# --- truncations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first_word", "before_stop", "local", "brackets", "two_bs"])
def test_a_truncation_is_legal_where_the_body_matches_and_scored_as_the_truncated_trace(name):
    case = BY_NAME[name]
    guide = shaken(lmppl.LMGuide(case.program, lm=LM))
    samples = draw_samples(guide, case.program, case.args, 24, temperature=1.5)
    samples += draw_samples(guide, case.program, case.args, 24, temperature=math.inf)
    cuts = truncations_of(samples)
    legal = []
    for sample in samples:
        fn, ids = sample.sites["z"]["fn"], latent_ids(sample.particle)["z"]
        lengths = [
            t
            for t in range(len(ids))
            if (*ids[:t], fn.stopping.closing_token) != ids
            and fn.supports(fn.value((*ids[:t], fn.stopping.closing_token)))
        ]
        lengths = lengths if sample.log_r > -math.inf else []
        assert sorted(cut.length for cut in cuts if cut.sample is sample) == lengths
        legal += lengths
    assert bool(legal) == (name != "brackets")  # a match there is final
    scores = guide.score([sample.proposer for sample in samples], grad=False)
    (batch,) = batches_of([samples], cuts, scores)
    assert batch.truncations == cuts
    values = []
    for cut in cuts:
        fn, ids = cut.sample.sites["z"]["fn"], latent_ids(cut.sample.particle)["z"]
        values.append({"z": fn.value((*ids[: cut.length], fn.stopping.closing_token))})
    if values:
        with lmppl.use(LM):
            found = score_latents(guide, case.program, case.args, values)
        num = len(samples)
        torch.testing.assert_close(batch.log_r[num:].double(), found.log_joint, atol=1e-4, rtol=0)
        torch.testing.assert_close(batch.log_q[num:].double(), found.log_q, atol=1e-4, rtol=0)
        joint = exact_joint(case)
        for cut, value in zip(cuts, values, strict=True):
            key = (("z", *(t for t in value["z"].tolist() if t >= 0)),)
            assert cut.log_r == pytest.approx(joint[key], abs=1e-4)


def test_truncations_that_do_not_match_cost_nothing_and_take_no_budget():
    case = BY_NAME["first_word"]  # of its texts only "ab" and "b" can be closed early
    guide = lmppl.LMGuide(case.program, lm=LM)
    samples = draw_samples(guide, case.program, case.args, 12, temperature=2.0)
    scored = LM.usage.tokens_scored
    cuts = truncations_of(samples, budget=10)
    assert cuts and {cut.length for cut in cuts} <= {1, 2}
    # One of the few that are legal is within the budget; the observation has three tokens.
    assert LM.usage.tokens_scored - scored <= 10


# --- the exact posterior -------------------------------------------------------------------------


def solved(case, forbidden=3.0):
    """An LM which after the program's prefix has the posterior of "z" as its masked law. Tokens that
    no match goes on with have logits of ``forbidden``, so its law without masks is another."""
    joint = exact_joint(case)
    log_z = math.log(math.fsum(map(math.exp, joint.values())))
    mass, size = {}, LM.vocabulary.size
    for ((_, *ids),), log_r in joint.items():
        for n, token in enumerate(ids):
            row = mass.setdefault(tuple(ids[:n]), [0.0] * size)
            row[token] += math.exp(log_r - log_z)
    table = torch.tensor(list(mass.values()), dtype=torch.float64)
    logits = (table / table.sum(1, keepdim=True)).log()
    logits = torch.where(table > 0, logits, forbidden)
    start = LM.encode(case.args[0])
    states = tiny_lm("ab.", seed=9).hidden([(*start, *ids) for ids in mass]).double()
    assert len(states) <= states.shape[1]
    lm = tiny_lm("ab.", seed=9)
    with torch.no_grad():
        lm.model.lm_head.weight.copy_((torch.linalg.pinv(states) @ logits).T)
    return lm, log_z


@pytest.mark.parametrize("name", ["before_stop", "local"])
def test_the_exact_posterior_has_no_loss_and_no_gradient(name):
    """Of a whole training step, truncations included. (A guide whose masks are forgotten in scoring, or
    in truncations, has a large one.)"""
    case = BY_NAME[name]
    lm, log_z = solved(case)
    q = lm.adapter()

    def guide_program(x, y):
        lm_sample("z", x, max_tokens=4, stop=".", regex="(ab?)+", lm=q)

    guide = lmppl.LMGuide(case.program, lm=LM, program=guide_program)
    with lmppl.use(LM):
        guide.prepare(case.args)
        no_value = VarGrad(), ELBO(annealing=1.0), Wake(annealing=1.0)  # theirs means nothing
        for kind in (VarGrad(forward=0.0), TB(), SubTB(), *no_value):
            options = FitOptions(loss=kind, batch_size=24, learning_rate=1e-12)
            generator = torch.Generator()
            source = Collection([Input(case.program, case.args, 0, options)], generator)
            trainer = Trainer(guide, source, 5, options, 0, generator)
            if kind.name == "tb":
                with torch.no_grad():
                    trainer.log_z.own.fill_(log_z)
                    trainer.log_z.network.out.bias.zero_()
                    trainer.log_z.network.out.weight.zero_()
            figures = trainer.step(0)
            assert figures["alive"] == 1.0
            if kind.truncations:
                assert figures["truncations"] > 0
            if kind not in no_value:
                assert figures["loss"] == pytest.approx(0.0, abs=1e-5)
            # LoRA's gradient of a nat; an untrained guide's is above 10.
            assert figures["grad_norm"] < 0.05
            assert figures["log_z"] == pytest.approx(log_z, abs=1e-3)


# --- dead ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["vargrad", "elbo", "wake"])
def test_the_mass_of_dead_ends_is_driven_down(loss):
    case = BY_NAME["brackets"]
    guide = shaken(lmppl.LMGuide(case.program, lm=LM), size=0.25)
    guide.fit([case.args], steps=6, loss=loss, batch_size=16, seed=0, progress=False)
    alive = guide.history.column("alive")
    assert alive[0] < 0.3 and alive[-1] > 0.9


def test_the_program_weighs_dead_traces_by_how_it_draws(monkeypatch):
    """In the mixture with the guide, whose term of dead traces would else have infinite weights. So
    does the forward KL's."""
    case = BY_NAME["two_bs"]
    guide = shaken(lmppl.LMGuide(case.program, lm=LM))
    samples = [
        *draw_samples(guide, case.program, case.args, 16),
        *(
            samples_module.Sample.of(sample.particle, "prior")
            for sample in draw_samples(guide, case.program, case.args, 16, temperature=math.inf)
        ),
    ]
    scores = guide.score([sample.proposer for sample in samples])
    (batch,) = batches_of([samples], [], scores)
    own = batch.log_own()
    assert bool((batch.log_prior == -math.inf).any()) and bool((own > -math.inf).all())
    for sample, log_p in zip(samples, own.tolist(), strict=True):
        node = sample.sites["z"]
        with torch.no_grad():
            assert log_p == pytest.approx(
                float(node["fn"].proposal().log_prob(node["value"])), abs=1e-4
            )
    given = {}
    for name in ("alive", "wake"):
        kept = getattr(objectives, name)
        noted = functools.partial(
            lambda name, kept, *terms: given.update({name: terms}) or kept(*terms), name, kept
        )
        monkeypatch.setattr(objectives, name, noted)
    loss = VarGrad(forward=2.0).of(batch)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    mixture = 0.5 * batch.log_q.detach().exp() + 0.5 * own.exp()
    assert given.keys() == {"alive", "wake"}
    for _, _, log_drawn in given.values():
        torch.testing.assert_close(log_drawn.exp(), mixture)


# --- records, demonstrations, buffers ------------------------------------------------------------


def test_demonstrations_are_read_through_the_constraint():
    case = BY_NAME["before_stop"]
    guide = lmppl.LMGuide(case.program, lm=LM)
    given = [[{"z": "ab"}, {"z": "a."}, {"z": "abab"}]]
    guide.fit([case.args], demonstrations=given, loss="sft", steps=2, **QUICK)
    with pytest.raises(
        ValueError,
        match=r"a demonstration of input 0 has probability zero .* by site 'z', where the text stops "
        r"matching Regex\('\(ab\?\)\+'\) at character 3",
    ):
        guide.fit([case.args], demonstrations=[[{"z": "abb"}]], loss="sft", steps=1, **QUICK)


def test_a_demonstration_gets_eos_only_where_the_match_goes_on():
    case = BY_NAME["first_word"]
    guide = lmppl.LMGuide(case.program, lm=LM)
    texts = ["b", "ab", "aba"]
    with lmppl.use(LM):
        scores = score_latents(guide, case.program, case.args, [{"z": text} for text in texts])
    eos = LM.vocabulary.eos_id
    found = [latent_ids(run)["z"] for run in scores.runs]
    assert found == [LM.encode("b"), (*LM.encode("ab"), eos), LM.encode("aba")]
    joint = exact_joint(case)
    expected = [joint[(("z", *ids),)] for ids in found]
    assert scores.log_joint.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_record_of_a_constrained_trace_is_run_again_without_a_model():
    case = BY_NAME["second_of_three"]
    guide = shaken(lmppl.LMGuide(case.program, lm=LM))
    samples = draw_samples(guide, case.program, case.args, 6)
    (seen,) = guide.observations_of([(case.program, case.args)])
    with lmppl.use(LM), torch.no_grad():
        for sample in samples:
            recaller, scored = guide.recaller(case.args, seen), LM.usage.tokens_scored
            particle = rescore(sample.record, case.program, case.args, recaller)
            assert particle.finished and LM.usage.tokens_scored == scored
            assert particle.log_joint == pytest.approx(sample.log_r, abs=1e-5)
            assert samples_module.Sample.of(particle, "replay").discrete_key == sample.discrete_key
            log_q = guide.score([recaller], grad=False)
            before = guide.score([sample.proposer], grad=False)
            for name, (value, _) in before[0].items():
                assert float(log_q[0][name][0]) == pytest.approx(float(value), abs=1e-5)


# --- runs ----------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["before_stop", "two_bs"])
def test_a_resumed_run_of_a_constrained_program_ends_as_an_unbroken_one(name, tmp_path):
    case = BY_NAME[name]

    def run(path, **options):
        guide = lmppl.LMGuide(case.program, lm=LM)
        options = {"checkpoint": tmp_path / path, "checkpoint_every": 3, **QUICK, **options}
        return guide.fit([case.args], steps=8, **options)

    def stop(figures):
        if figures["step"] == 6:
            raise _Stop

    whole = run("whole")
    with pytest.raises(_Stop):
        run("broken", callback=stop)
    resumed = run("broken", resume=True)
    assert equal(weights(resumed), weights(whole))
    assert resumed.inner.sites.laws == whole.inner.sites.laws


def test_another_constraint_makes_another_program():
    def of(constraint):
        def program(x):
            return lm_sample("z", x, max_tokens=3, constraint=constraint)

        return program_fingerprint(program)

    assert of(Regex("a+")) == of(Regex("a+")) != of(Regex("b+"))
    assert digest_of(Regex("a+")) != digest_of(TWO_BS)


def test_another_schema_makes_another_program():
    pydantic = pytest.importorskip("pydantic")

    def made(**fields):
        given = {name: (kind, ...) for name, kind in fields.items()}
        return pydantic.create_model("Answer", **given)

    def closing_over(schema):
        def program(x):
            return lm_sample("z", x, max_tokens=3, json_schema=schema)

        return program

    def bound(schema):
        return functools.partial(lambda schema, x: None, schema)

    unwritable = made(a=type("Odd", (), {"__get_pydantic_core_schema__": any_schema}))
    for of in (closing_over, bound):
        one, other, turned, odd = (
            program_fingerprint(of(schema))
            for schema in (made(a=int), made(a=str), made(b=int, a=int), unwritable)
        )
        assert one == program_fingerprint(of(made(a=int)))
        assert len({one, other, turned, odd, program_fingerprint(of(made(a=int, b=int)))}) == 5


def any_schema(*_):
    from pydantic_core import core_schema

    return core_schema.is_instance_schema(object)


def test_learning_a_constrained_program_estimates_its_evidence():
    """The weights of the M-step are R over the mixture, to which the program's own draws, masked as
    they are, belong."""
    model, case = LM.adapter(), BY_NAME["before_stop"]

    def program(x, y):
        z = lm_sample("z", x, max_tokens=4, stop=".", regex="(ab?)+", lm=model)
        lm_sample("y", [x, z], obs=y, lm=model)

    guide = lmppl.LMGuide(program, lm=LM)
    options = {"guide_steps": 1, "prior_fraction": 0.5, "replay_fraction": 0.0}
    history = lmppl.learn(
        guide, [case.args], steps=2, num_samples=128, model_learning_rate=1e-9, seed=0,
        learning_rate=1e-9, progress=False, **options,
    )  # fmt: skip
    log_z = math.log(math.fsum(map(math.exp, exact_joint(case).values())))
    for figures in itertools.islice(history, 3):
        assert figures["log_evidence"] == pytest.approx(log_z, abs=0.15)
