"""Training: what it reports, what interrupts it, what it refuses."""

import math
from collections import Counter

import numpy as np
import pyro
import pytest
import torch
from guide_helpers import draw_samples

import lmppl
from lmppl import lm_sample, losses, require
from lmppl.testing import guide_report, tiny_lm
from lmppl.testing.programs import CASES
from lmppl.training import behaviour, objectives
from lmppl.training.behaviour import turns_of
from lmppl.training.inputs import Collection, Input
from lmppl.training.options import FitOptions, moved
from lmppl.training.trainer import Trainer

CASE = CASES["one site"]
LM = CASE.lm
QUICK = {"batch_size": 8, "progress": False}


def weights(guide):
    return [p.detach().clone() for p in guide.parameters()]


def equal(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def trainer_on(guide, args_of, steps=10, **options):
    """A trainer before its first step, and its inputs."""
    options = FitOptions.of(options)
    inputs = [Input(guide.model, args, i, options) for i, args in enumerate(args_of)]
    generator = torch.Generator().manual_seed(0)
    guide.prepare(args_of[0])
    source = Collection(inputs, generator)
    return Trainer(guide, source, steps, options, 0, generator), inputs


def traces_of(trainer, one, number):
    """Of an input alone in a step: a list that holds that of its traces."""
    turns = turns_of([one], trainer.options.batch_size, trainer.seed, number)
    return trainer._behaviour.draw(turns)


def fitted(seed, steps=3, case=CASE, **options):
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    return guide.fit([case.args], steps=steps, seed=seed, **(QUICK | options))


# --- what it does --------------------------------------------------------------------------------


def test_seeds_reproduce():
    one, two, other = fitted(1), fitted(1), fitted(2)
    assert equal(weights(one), weights(two))
    assert [f["loss"] for f in one.history] == [f["loss"] for f in two.history]
    assert not equal(weights(one), weights(other))


@pytest.mark.parametrize("name", ["beta and text", "choices"])
def test_seeds_reproduce_with_heads_and_choices(name):
    assert equal(weights(fitted(1, case=CASES[name])), weights(fitted(1, case=CASES[name])))


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fitted(1)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_seed_pyro_governs():
    pyro.set_rng_seed(3)
    one = fitted(None)
    pyro.set_rng_seed(3)
    assert equal(weights(one), weights(fitted(None)))


def test_the_history():
    seen = []
    guide = fitted(0, steps=4, callback=seen.append)
    assert guide.history == seen and len(seen) == 4
    assert [figures["step"] for figures in seen] == [0, 1, 2, 3]
    for figures in seen:
        assert set(figures) == {
            "step", "loss", "log_z", "elbo", "ess", "alive", "length", "inputs", "samples",
            "truncations", "grad_norm", "learning_rate", "seconds_sampling",
            "seconds_truncations", "seconds_gradient", "mismatch", "mismatch_ess",
        }  # fmt: skip
        assert figures["alive"] == 1.0 and figures["inputs"] == 1 and 0 < figures["ess"] <= 1
        assert figures["samples"] == 8 and figures["elbo"] <= figures["log_z"] + 1e-6
    assert guide.fit([CASE.args], steps=1, seed=0, **QUICK) is guide
    assert guide.history[-1]["step"] == 4


def test_training_pulls_the_guide_to_the_posterior():
    before = guide_report(lmppl.LMGuide(CASE.program, lm=LM), CASE.program, CASE.args, LM)
    after = guide_report(fitted(0, steps=25, batch_size=16), CASE.program, CASE.args, LM)
    assert after.gap < 0.3 * before.gap


@pytest.mark.slow
def test_dead_traces_are_unlearned(monkeypatch):
    """The variance says nothing of them, so there is a term of their own."""
    case = CASES["hard constraint"]
    options = {"batch_size": 16, "loss": losses.VarGrad(forward=0.0)}  # the forward KL does it too
    after = guide_report(fitted(0, 40, case, **options), case.program, case.args, LM)
    monkeypatch.setattr(
        "lmppl.training.objectives.alive", lambda log_r, log_q, *_: log_q.sum() * 0.0
    )
    without = guide_report(fitted(0, 40, case, **options), case.program, case.args, LM)
    assert after.dead_mass < 0.7 * without.dead_mass


def test_the_batch_is_a_mixture_of_policies():
    guide = lmppl.LMGuide(CASE.program, lm=LM)
    with lmppl.use(LM), torch.no_grad():
        trainer, (one,) = trainer_on(guide, [CASE.args], batch_size=16)
        (first,) = traces_of(trainer, one, 0)
        (second,) = traces_of(trainer, one, 1)
    assert len(first) == len(second) == 16
    origins = [Counter(sample.origin for sample in batch) for batch in (first, second)]
    assert origins[0] == {"guide": 12, "tempered": 2, "prior": 2}  # nothing to replay as yet
    assert origins[1] == {"guide": 8, "tempered": 2, "prior": 2, "replay": 4}
    # Two of the program's own traces a step, drawn for eight steps at a time.
    assert len(one.stock) == 8 * 2 - 4


def test_an_inputs_traces_do_not_depend_on_what_else_the_step_draws():
    """Draws, replayed traces and truncations: so a step can be shared out."""
    seen = []
    for alone in (False, True):
        guide = lmppl.LMGuide(CASE.program, lm=LM)
        with lmppl.use(LM), torch.no_grad():
            trainer, inputs = trainer_on(guide, [CASE.args, ("b", "ab")], batch_size=32)
            for number in range(3):
                turns = turns_of(inputs, 32, trainer.seed, number)[alone:]
                samples = trainer._behaviour.draw(turns)
                cuts = trainer._truncate(turns, samples)
        mine = {id(sample): i for i, sample in enumerate(samples[-1])}
        cuts = [(mine[id(t.sample)], t.length) for t in cuts if id(t.sample) in mine]
        seen.append(([(s.origin, s.record.tokens) for s in samples[-1]], cuts))
    assert seen[0] == seen[1]
    assert "replay" in dict(seen[0][0]) and seen[0][1]


def test_a_remembered_trace_is_the_one_that_is_run_again(monkeypatch):
    """A replayed trace that need not be run is what its record gives, in the same place."""
    steps, runs = [], []
    rescore = behaviour.rescore
    monkeypatch.setattr(behaviour, "rescore", lambda *a, **k: runs.append(1) or rescore(*a, **k))
    for forgets in (False, True):
        guide = lmppl.LMGuide(CASE.program, lm=LM)
        with lmppl.use(LM), torch.no_grad():
            trainer, (one,) = trainer_on(guide, [CASE.args], batch_size=16)
            traces_of(trainer, one, 0)
            if forgets:
                trainer.forget()
            steps.append(traces_of(trainer, one, 1)[0])
        assert len(runs) == 6 * forgets  # four of the buffer, two that were drawn ahead
    for remembered, run in zip(*steps, strict=True):
        assert remembered.origin == run.origin
        assert remembered.log_r == pytest.approx(run.log_r, abs=1e-5)
        assert remembered.record.discrete_key == run.record.discrete_key


@pytest.mark.parametrize("loss", ["vargrad", "elbo"])
def test_the_programs_draws_help_to_unlearn_dead_traces(loss, monkeypatch):
    """Each sample counts by its share of the mixture that drew it, nothing else is drawn for it."""
    case = CASES["hard constraint"]
    seen = []
    kept = objectives.alive

    def noted(*terms):
        seen.append(terms)
        return kept(*terms)

    monkeypatch.setattr("lmppl.training.objectives.alive", noted)
    guide = lmppl.LMGuide(case.program, lm=LM)
    with lmppl.use(LM):
        trainer, (one,) = trainer_on(guide, [case.args], loss=loss, batch_size=16)
        with torch.no_grad():
            while not one.rejects:
                traces_of(trainer, one, one.visits)
            batches = traces_of(trainer, one, one.visits)
            while all(sample.log_r > -math.inf for sample in batches[0]):
                batches = traces_of(trainer, one, one.visits)
        (batch,) = trainer._score(batches, [])
        trainer._losses(turns_of([one], 2, 0, 0), [batch], 1)
    origins = Counter(sample.origin for sample in batches[0])
    assert sum(origins.values()) == 16 and origins["prior"] == 2
    ((log_r, log_q, log_drawn),) = seen
    guides, num = origins["guide"], origins["guide"] + 2
    assert len(log_r) == num
    q, p = log_q.detach().exp(), batch.complete("guide", "prior").log_prior.exp()
    torch.testing.assert_close(log_drawn.exp(), guides / num * q + 2 / num * p)


@pytest.mark.parametrize("origins", [{"guide", "prior"}, {"guide"}, {"prior"}])
def test_forward_kl_of_vargrad_is_of_the_guides_and_the_programs_draws(origins):
    """And each of these counts by its share of the mixture that drew them; nothing else has a part in
    it."""
    guide = lmppl.LMGuide(CASE.program, lm=LM)
    with lmppl.use(LM):
        trainer, (one,) = trainer_on(guide, [CASE.args], batch_size=16, prior_fraction=0.25)
        with torch.no_grad():
            (samples,) = traces_of(trainer, one, 0)
        others = {"guide", "prior"} - origins
        samples = [sample for sample in samples if sample.origin not in others]
        (batch,) = trainer._score([samples], [])
        weighted = losses.VarGrad(forward=2.0).of(batch) - losses.VarGrad(forward=0.0).of(batch)
        drawn = batch.complete(*origins)
        (slope,) = torch.autograd.grad(weighted, batch.log_q)
    if origins == {"prior"}:  # there is no law of a guide to learn from
        assert weighted.item() == 0.0 and not slope.any()
        return
    q, p = drawn.log_q.detach().double().exp(), drawn.log_prior.double().exp()
    share = drawn.complete("guide").num / drawn.num
    law = share * q + (1 - share) * p
    of_posterior, of_q = drawn.log_r.double().exp() / law, q / law
    expected = 2.0 * (of_q / of_q.sum() - of_posterior / of_posterior.sum())
    found = {id(sample): float(value) for sample, value in zip(samples, slope, strict=True)}
    wanted = dict(zip(map(id, drawn.samples), expected.tolist(), strict=True))
    assert {key for key, value in found.items() if value} <= wanted.keys()
    assert [found[key] for key in wanted] == pytest.approx(list(wanted.values()), abs=1e-5)


def test_reward_temperature_is_annealed():
    options = FitOptions(reward_temperature=(3.0, 1.0))
    betas = [options.inverse_temperature(number, 10) for number in range(10)]
    assert betas[0] == pytest.approx(1 / 3) and betas[5:] == [1.0] * 5
    assert betas == sorted(betas)
    assert options.tempered_target is None
    assert FitOptions(reward_temperature=(1.0, 2.0)).tempered_target == 2.0


@pytest.mark.parametrize("loss", ["elbo", "wake"])
def test_losses_on_the_guides_own_draws_begin_near_the_prior(loss, monkeypatch):
    """A mode that the first, noisy steps lose is never drawn again."""
    shares = [moved(number, 10) for number in range(10)]
    assert shares[0] == 0.0 and shares[5:] == [1.0] * 5 and shares == sorted(shares)
    seen = []
    kept = getattr(objectives, loss)

    def noted(log_r, log_q):
        seen.append(log_r)
        return kept(log_r, log_q)

    monkeypatch.setattr(f"lmppl.training.objectives.{loss}", noted)
    guide = lmppl.LMGuide(CASE.program, lm=LM)
    with lmppl.use(LM):
        trainer, (one,) = trainer_on(guide, [CASE.args], steps=10, loss=loss, annealing=0.2)
        with torch.no_grad():
            batches = traces_of(trainer, one, 0)
        (batch,) = trainer._score(batches, [])
        trainer._losses(turns_of([one], 2, 0, 0), [batch], 2)
    (log_r,) = seen
    expected = batch.log_prior + (0.2 + 0.8 * 2 / 5) * (batch.log_r - batch.log_prior)
    torch.testing.assert_close(log_r, expected)


def test_log_z_of_tb_is_learned_also_from_zero():
    """Its start is 0, and ``log_z or ...`` would replace it there."""
    guide = lmppl.LMGuide(CASE.program, lm=LM)
    with lmppl.use(LM):
        trainer, (one,) = trainer_on(guide, [CASE.args], loss="tb", batch_size=8)
        assert trainer.log_z.own.item() == 0.0
        trainer.step(0)
        assert trainer.log_z(one.features, 0).item() < 0.0  # the evidence is below 1


def test_every_input_has_its_own_log_z():
    guide = lmppl.LMGuide(CASE.program, lm=LM)
    args_of = [("ab.", "aba"), ("ab.", "b")]
    with lmppl.use(LM):
        trainer, inputs = trainer_on(guide, args_of, loss="tb", batch_size=8)
        for number in range(3):
            trainer.step(number)
        values = [trainer.log_z(each.features, each.index).item() for each in inputs]
    assert values[0] != values[1]
    assert not torch.equal(inputs[0].features, inputs[1].features)  # the prompts differ


def test_inputs_take_turns():
    guide = lmppl.LMGuide(CASE.program, lm=LM)
    args_of = [("ab.", y) for y in ["a", "b", "ab"]]
    with lmppl.use(LM):
        trainer, inputs = trainer_on(guide, args_of, 6, batch_size=8, inputs_per_step=2)
        for number in range(6):
            assert trainer.step(number)["inputs"] == 2
    assert [each.visits for each in inputs] == [4, 4, 4]


def test_variances_never_mix_inputs(monkeypatch):
    """With a constant added to the log R of one input, nothing changes."""

    def program(x, y, bonus):
        z = lm_sample("z", x, max_tokens=2, stop=".")
        lm_sample("y", [x, z], obs=y)
        pyro.factor("bonus", torch.tensor(bonus))

    results = []
    for bonus in (0.0, 8.0):
        guide = lmppl.LMGuide(program, lm=LM)
        guide.fit([("ab.", "a", bonus), ("ba", "b", 0.0)], steps=2, seed=0, batch_size=12)
        results.append(weights(guide))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=0.0)  # a step moves by 3e-3


# --- what goes wrong -----------------------------------------------------------------------------


def test_ctrl_c_keeps_a_usable_guide():
    def stop(figures):
        if figures["step"] == 2:
            raise KeyboardInterrupt

    guide = lmppl.LMGuide(CASE.program, lm=LM)
    with pytest.raises(KeyboardInterrupt):
        guide.fit([CASE.args], steps=50, seed=0, callback=stop, **QUICK)
    assert len(guide.history) == 3
    posterior = lmppl.infer(
        *_call(), method="importance", guide=guide, num_samples=16, seed=0, lm=LM
    )
    assert posterior.ess > 1
    guide.fit([CASE.args], steps=1, seed=0, **QUICK)


def _call():
    return CASE.program, *CASE.args


def test_ctrl_c_in_the_middle_of_a_step(monkeypatch):
    guide = fitted(0)
    kept = weights(guide)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lmppl.training.trainer.truncate", stop)
    with pytest.raises(KeyboardInterrupt):
        guide.fit([CASE.args], steps=50, seed=0, **QUICK)
    assert equal(weights(guide), kept) and len(guide.history) == 3
    draw_samples(guide, CASE.program, CASE.args, 2)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite(what, monkeypatch):
    guide = fitted(0)
    kept = weights(guide)
    monkeypatch.setattr(
        "lmppl.training.objectives.vargrad", lambda log_r, log_q, **kw: _broken(what, log_q)
    )
    with pytest.raises(
        FloatingPointError, match=f"the {what} of step 0 is n.*step before are kept"
    ):
        guide.fit([CASE.args], steps=5, seed=0, **QUICK)
    assert equal(weights(guide), kept) and len(guide.history) == 3
    draw_samples(guide, CASE.program, CASE.args, 2)


def _broken(what, log_q):
    if what == "loss":
        return log_q.sum() * math.nan
    return (log_q.sum() * 0.0).sqrt()  # 0 with an infinite slope


def test_a_factor_that_is_no_number():
    def program(x):
        lm_sample("z", x, max_tokens=2)
        pyro.factor("f", torch.tensor(math.nan))

    with pytest.raises(ValueError, match="log_factor.*nan"):
        lmppl.LMGuide(program, lm=LM).fit([("ab",)], steps=2, seed=0, **QUICK)


def impossible(x, possible):
    z = lm_sample("z", x, max_tokens=1)
    require("r", possible)
    lm_sample("y", [x, z], obs="a")


def test_an_input_without_a_live_trace_is_skipped_and_reported():
    guide = lmppl.LMGuide(impossible, lm=LM)
    with pytest.warns(UserWarning, match=r"inputs \[1\] of the data were skipped"):
        guide.fit([("ab", True), ("ab", False)], steps=2, seed=0, **QUICK)
    guide = lmppl.LMGuide(impossible, lm=LM)
    with pytest.raises(ValueError, match="no trace of any input had a positive probability"):
        guide.fit([("ab", False)], steps=2, seed=0, **QUICK)
    assert guide.history[-1]["alive"] == 0.0


@pytest.mark.parametrize(
    "data, message",
    [
        ("ab.", r"data must be a list of inputs, given one str"),
        ({"x": "ab."}, r"data must be a list of inputs, given one dict"),
        ([("ab.", "a"), "ab."], r"item 1 of the data .*it is a str; an input is a tuple"),
        ([("ab.",)], r"item 0 of the data does not fit the program \(x: .*missing.*'y'"),
        ([("ab.", "a", "b")], r"item 0 .*too many positional arguments"),
        ([("ab.", "a"), {"x": "ab.", "z": "a"}], r"item 1 .*"),
    ],
)
def test_bad_data(data, message):
    with pytest.raises(TypeError, match=message):
        lmppl.LMGuide(CASE.program, lm=LM).fit(data, steps=1)


def test_no_data():
    with pytest.raises(ValueError, match=r"data holds no input: give at least one, \[\(x, y\)\]"):
        lmppl.LMGuide(CASE.program, lm=LM).fit([], steps=1)


def test_dicts_and_defaults_are_inputs():
    def program(x, y="a"):
        z = lm_sample("z", x, max_tokens=1)
        lm_sample("y", [x, z], obs=y)

    results = []
    for item in [("ab", "a"), ["ab"], {"x": "ab"}, {"y": "a", "x": "ab"}]:
        guide = lmppl.LMGuide(program, lm=LM)
        results.append(weights(guide.fit([item], steps=2, seed=0, **QUICK)))
    assert all(equal(each, results[0]) for each in results)


def test_keyword_only_arguments_are_bound_otherwise():
    def program(x, *, y):
        lm_sample("z", x, max_tokens=1)

    with pytest.raises(TypeError, match=r"keyword-only arguments \['y'\] are bound with functools"):
        lmppl.LMGuide(program, lm=LM).fit([{"x": "ab", "y": "a"}], steps=1)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batch_size": 1}, ValueError, "batch_size=1: it must be an int of at least 2"),
        ({"inputs_per_step": 0}, ValueError, "inputs_per_step=0"),
        ({"inputs_per_step": True}, TypeError, "inputs_per_step=True: it must be an int"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0: it must be a number above 0"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate=nan"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate='fast'"),
        ({"loss": "mse"}, ValueError, "loss='mse', allowed: 'vargrad', 'tb', 'subtb', 'elbo'"),
        ({"loss": losses.VarGrad}, TypeError, r"loss=VarGrad: give an object, VarGrad\(\)"),
        ({"loss": None}, ValueError, "loss=None, allowed"),
        ({"loss": losses.TB(), "huber": 2.0}, TypeError, r"give it there, TB\(huber=...\)"),
        ({"loss": "tb", "huber": 2.0}, TypeError, "loss='tb' has no option 'huber': it has none; "),
        ({"clip": 0.1}, TypeError, "'vargrad' has no .* 'clip': it has huber, forward; .*"),
        ({"hubber": 0.1}, TypeError, "no option 'hubber'; did you mean 'huber'"),
        ({"replay_fraction": 0.9}, ValueError, "together at most 1"),
        ({"prior_fraction": -0.1}, ValueError, "prior_fraction=-0.1: .* at least 0"),
        ({"truncations": -1.0}, ValueError, "truncations=-1.0"),
        ({"reward_temperature": (0.5, 1.0)}, ValueError, "reward_temperature=0.5: .* at least 1"),
        (
            {"loss": "elbo", "annealing": 0.0},
            ValueError,
            "annealing=0.0: it must be a number above",
        ),
        ({"loss": "ppo", "updates": 0}, ValueError, "updates=0"),
        ({"huber": 0}, ValueError, "huber=0: it must be a number above 0"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm=0: it must be a number above 0"),
        ({"training_tokens": 0}, ValueError, "training_tokens=0: it must be an int of at least 1"),
        ({"gradient_checkpointing": "no"}, TypeError, "gradient_checkpointing='no'"),
        ({"steps": 0}, ValueError, "steps=0: it must be an int of at least 1"),
        ({"steps": 2.5}, TypeError, "steps=2.5"),
        ({"steps": True}, TypeError, "steps=True"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        lmppl.LMGuide(CASE.program, lm=LM).fit([CASE.args], **({"steps": 1} | options))


def test_a_loss_by_its_name_is_the_object():
    """Its options stand beside its name, or in the object; numpy's integers are integers."""
    assert FitOptions.of({"huber": 2.0}).loss == losses.VarGrad(huber=2.0)
    of_object = FitOptions.of({"loss": losses.PPO(updates=np.int64(3)), "batch_size": np.int64(8)})
    assert of_object == FitOptions.of({"loss": "ppo", "updates": 3, "batch_size": 8})
    assert FitOptions().loss == losses.VarGrad(huber=3.0)
    named = [fitted(0, loss="elbo", annealing=0.5), fitted(0, loss=losses.ELBO(annealing=0.5))]
    assert equal(*map(weights, named))
    assert of_object.plain()["loss"] == "ppo" and of_object.plain()["updates"] == 3


def test_an_exception_of_the_program_names_its_site():
    def program(x):
        z = lm_sample("z", x, max_tokens=1)
        lm_sample("y", [x, z], max_tokens=1, obs=z + "ab")

    with pytest.raises(ValueError, match="site 'y'"):
        lmppl.LMGuide(program, lm=tiny_lm("ab.", seed=0)).fit([("ab",)], steps=1, seed=0)


@pytest.mark.parametrize("options", [dict(training_tokens=8), dict(gradient_checkpointing=True)])
def test_saving_memory_changes_no_step(options):
    case = CASES["observed text"]
    histories = []
    for each in ({}, options):
        guide = lmppl.LMGuide(case.program, lm=case.lm)
        guide.fit([case.args], steps=3, seed=0, **each)
        histories.append([row["loss"] for row in guide.history])
        for lm in guide.adapters():
            assert lm.memory.training_tokens == each.get("training_tokens")
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)
