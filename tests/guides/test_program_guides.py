"""Guides that the user wrote as programs."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import draw_samples

import lmppl
from lmppl import lm_sample, require
from lmppl.guides.parameters import SavedParams
from lmppl.testing import enumerate_program, guide_report, tiny_lm
from lmppl.testing.programs import CASES
from lmppl.training.inputs import Collection, Input
from lmppl.training.losses import ELBO, TB, SubTB, VarGrad, Wake
from lmppl.training.options import FitOptions
from lmppl.training.trainer import Trainer

LM = tiny_lm("ab.", seed=0)


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def model(x, y):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    lm_sample("y", x + "ab."[int(k)], obs=y)


def categorical_guide(x, y):
    pyro.sample("k", dist.Categorical(logits=pyro.param("logits", torch.zeros(3))))


def posterior_logits(*args):
    table = enumerate_program(model, *args, lm=LM).posterior("k")
    return torch.tensor([math.log(table[k]) for k in range(3)])


@pytest.mark.slow
def test_params_are_trained_to_the_posterior():
    guide = lmppl.LMGuide(model, lm=LM, program=categorical_guide)
    guide.fit([("ab", "ba")], steps=150, seed=0, learning_rate=0.1, batch_size=12)
    report = guide_report(guide, model, ("ab", "ba"), LM)
    assert report.tv < 0.01 and report.gap < 1e-3


def test_the_exact_posterior_has_no_loss_and_no_gradient():
    """Of a whole training step: whatever was drawn, by whichever policy."""
    args = ("ab", "ba")
    guide = lmppl.LMGuide(model, lm=LM, program=categorical_guide)
    log_z = enumerate_program(model, *args, lm=LM).log_evidence
    with lmppl.use(LM):
        guide.prepare(args)
        (logits,) = guide.parameters()
        with torch.no_grad():
            logits.copy_(posterior_logits(*args))
        kept = logits.detach().clone()
        no_value = VarGrad(), ELBO(annealing=1.0), Wake(annealing=1.0)  # theirs means nothing
        for kind in (VarGrad(forward=0.0), TB(), SubTB(), *no_value):
            loss, options = kind.name, FitOptions(loss=kind, batch_size=16)
            generator = torch.Generator()
            source = Collection([Input(model, args, 0, options)], generator)
            trainer = Trainer(guide, source, 5, options, 0, generator)
            for number in range(3):
                with torch.no_grad():
                    # Adam divides by the gradient's size, be it rounding
                    logits.copy_(kept)
                    if loss == "tb":
                        trainer.log_z.own.fill_(log_z)
                        trainer.log_z.network.out.bias.zero_()
                        trainer.log_z.network.out.weight.zero_()
                gradients = []
                hook = logits.register_hook(gradients.append)
                figures = trainer.step(number)
                hook.remove()
                if kind not in no_value:
                    assert figures["loss"] == pytest.approx(0.0, abs=1e-9)
                assert float(gradients[-1].abs().max()) < 1e-4


@pytest.mark.slow
def test_a_guide_with_an_adapter_and_another_order():
    case = CASES["chain"]
    q = case.lm.adapter()

    def guide_program(x, y):
        w = lm_sample("w", [y, x], max_tokens=3, stop=".", temperature=1.5, lm=q)
        lm_sample("z", [w, x], max_tokens=2, stop=".", lm=q)

    guide = lmppl.LMGuide(case.program, lm=case.lm, program=guide_program)
    before = guide_report(guide, case.program, case.args, case.lm)
    guide.fit([case.args], steps=25, seed=0, batch_size=16)
    after = guide_report(guide, case.program, case.args, case.lm)
    assert before.dead_mass == pytest.approx(0.0, abs=1e-4)  # it is a distribution over the traces
    assert after.gap < 0.5 * before.gap
    assert len(guide.adapters()) == 1 and guide.inner.param_names == []


def test_a_latent_that_the_guide_lacks_is_left_to_the_model():
    def program(x, y):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        z = lm_sample("z", x, max_tokens=1)
        lm_sample("y", [x, z, "ab."[int(k)]], obs=y)

    guide = lmppl.LMGuide(program, lm=LM, program=categorical_guide)
    guide.fit([("ab", "ba")], steps=3, seed=0, batch_size=8)
    report = guide_report(guide, program, ("ab", "ba"), LM)
    assert report.dead_mass == pytest.approx(0.0, abs=1e-4)


def test_errors():
    def nothing(x, y):
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    guide = lmppl.LMGuide(model, lm=LM, program=nothing)
    with pytest.raises(ValueError, match="nothing to train: draw its texts from an adapter"):
        guide.fit([("ab", "ba")], steps=1, seed=0)

    def another_site(x, y):
        categorical_guide(x, y)
        pyro.sample("j", dist.Bernoulli(0.5))

    guide = lmppl.LMGuide(model, lm=LM, program=another_site)
    with pytest.raises(ValueError, match="proposes site 'j', which the model has not"):
        guide.fit([("ab", "ba")], steps=1, seed=0)

    def rejecting(x, y):
        categorical_guide(x, y)
        require("never", False)

    guide = lmppl.LMGuide(model, lm=LM, program=rejecting)
    with pytest.raises(ValueError, match="guide rejects its own draw at site 'never'"):
        guide.fit([("ab", "ba")], steps=1, seed=0)

    def wrong_shape(x, y):
        pyro.sample("k", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    guide = lmppl.LMGuide(model, lm=LM, program=wrong_shape)
    with pytest.raises(ValueError, match=r"site 'k': the guide draws a value of shape \(2,\)"):
        guide.fit([("ab", "ba")], steps=1, seed=0)


def test_text_sites_must_fit():
    case = CASES["one site"]

    def longer(x, y):
        lm_sample("z", x, max_tokens=6)

    def unclosed(x, y):
        lm_sample("z", "ab", max_tokens=3, temperature=9.0)

    def number(x, y):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    other = tiny_lm("ab", seed=1)

    def other_tokens(x, y):
        lm_sample("z", "ab", max_tokens=3, lm=other)

    for program, message in [
        (longer, "site 'z': the guide draws up to 6 tokens, the model's site holds 3"),
        (unclosed, "site 'z': the guide draws '.*model's site ends after token 1 of it.*stop"),
        (number, "site 'z': the guide draws from Normal, the model from LMText"),
        (other_tokens, "site 'z': the guide's model 'tiny-ab-1' has another tokenizer"),
    ]:
        guide = lmppl.LMGuide(case.program, lm=case.lm, program=program)
        with pytest.raises(ValueError, match=message):
            for seed in range(20):
                draw_samples(guide, case.program, case.args, 4, seed=seed)


@pytest.mark.parametrize("loss", ["vargrad", "elbo", "wake"])
def test_a_choice_that_the_model_has_not_is_a_dead_trace(loss):
    q = LM.adapter()

    def program(x, y):
        z = lm_sample("z", x, choices=["ab", "ba."])
        lm_sample("y", [x, z], obs=y)

    def wider(x, y):
        lm_sample("z", x, choices=["ab", "ba.", "bb"], lm=q)

    guide = lmppl.LMGuide(program, lm=LM, program=wider)
    guide.fit([("ab.", "a")], steps=40, loss=loss, seed=0, batch_size=16, progress=False)
    assert min(guide.history.column("alive")) < 1.0
    assert guide.history[-1]["alive"] > guide.history[0]["alive"]


# --- traces that end early, other orders, other supports -----------------------------------------

SMALL = {"batch_size": 16, "seed": 0, "progress": False}


def fit_and_watch(guide, monkeypatch, *args, **options):
    """The batches of a short training run."""
    from lmppl.training import trainer

    batches, original = [], trainer.batches_of

    def watch(*args):
        batches.extend(original(*args))
        return batches[-1:]

    monkeypatch.setattr(trainer, "batches_of", watch)
    guide.fit(*args, **(SMALL | options))
    return batches


def test_a_hard_condition_before_the_guides_last_site(monkeypatch):
    q = LM.adapter()

    def program(x):
        z = lm_sample("z", x, max_tokens=2, stop=".")
        require("long", len(z) > 1)
        lm_sample("w", [x, z], max_tokens=2, stop=".")

    def guide_program(x):
        z = lm_sample("z", x, max_tokens=2, stop=".", lm=q)
        lm_sample("w", [x, z], max_tokens=2, stop=".", lm=q)

    guide = lmppl.LMGuide(program, lm=LM, program=guide_program)
    batches = fit_and_watch(guide, monkeypatch, [("a.",)], steps=3, learning_rate=1e-9)
    dead = [
        (batch, i)
        for batch in batches
        for i, sample in enumerate(batch.samples)
        if sample.log_r == -math.inf
    ]
    assert dead and guide.history[-1]["truncations"] > 0
    for batch, i in dead:  # log q of what was drawn up to there; the adapter is still the model
        assert float(batch.log_q[i].detach()) == pytest.approx(float(batch.log_prior[i]), abs=1e-4)


def test_a_text_that_other_draws_of_the_guide_have_read_is_not_cut(monkeypatch):
    """The guide draws w after z, so a cut of z would change the density of w."""
    q = LM.adapter()

    def program(x):
        w = lm_sample("w", x, max_tokens=2, stop=".")
        lm_sample("z", [x, w], max_tokens=3, stop=".")

    def guide_program(x):
        z = lm_sample("z", x, max_tokens=3, stop=".", lm=q)
        lm_sample("w", [x, z], max_tokens=2, stop=".", lm=q)

    guide = lmppl.LMGuide(program, lm=LM, program=guide_program)
    batches = fit_and_watch(guide, monkeypatch, [("ab",)], steps=9)
    assert not any(batch.truncations for batch in batches)
    (note,) = guide.notes
    assert note.startswith("complete traces only: of 128 traces, 0 truncations")


def test_what_the_guide_draws_by_choice_is_not_cut(monkeypatch):
    q = LM.adapter()

    def program(x):
        lm_sample("z", x, max_tokens=3, stop=".")

    def guide_program(x):
        lm_sample("z", x, choices=["a.", "b.", "ab."], lm=q)

    guide = lmppl.LMGuide(program, lm=LM, program=guide_program)
    only_own = {"prior_fraction": 0.0, "tempered_fraction": 0.0}
    batches = fit_and_watch(guide, monkeypatch, [("ab",)], steps=2, **only_own)
    assert not any(batch.truncations for batch in batches)
    with pytest.raises(ValueError, match="the guide gives probability zero to .*same support"):
        guide.fit([("ab",)], steps=2, **SMALL)
    guide.fit([("ab",)], steps=2, loss="elbo", **SMALL)


def test_parameters_that_only_later_inputs_use_are_trained():
    def program(x, y):
        k = pyro.sample("k", dist.Normal(0.0, 1.0))
        pyro.factor("f", -((k - y) ** 2))

    def guide_program(x, y):
        pyro.sample("k", dist.Normal(pyro.param(f"mean_{x}", torch.tensor(0.0)), 1.0))

    guide = lmppl.LMGuide(program, lm=LM, program=guide_program)
    guide.fit([("a", 1.0), ("b", -1.0)], steps=20, learning_rate=0.05, **SMALL)
    assert pyro.param("mean_a") > 0.2 and pyro.param("mean_b") < -0.2
    assert guide.inner.param_names == ["mean_a", "mean_b"]


def test_a_guide_program_cannot_see_simulated_observations():
    guide = lmppl.LMGuide(model, lm=LM, program=categorical_guide)
    with pytest.raises(ValueError, match="a guide program reads its arguments.*simulated"):
        guide.fit([("ab", "ba")], steps=1, simulate=3, **SMALL)


# --- parameters of some inputs only --------------------------------------------------------------


def by_input(x, y):
    k = pyro.sample("k", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(k, 0.5), obs=torch.tensor(y))
    lm_sample("z", x, max_tokens=1)


def guide_by_input(x, y):
    loc = pyro.param(f"loc_{x}", torch.tensor(0.0))
    scale = pyro.param(f"scale_{x}", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("k", dist.Normal(loc, scale))


BY_INPUT = [("ab.", 2.0), ("ba", -1.0)]


def fitted_by_input(**options):
    pyro.clear_param_store()
    guide = lmppl.LMGuide(by_input, lm=LM, program=guide_by_input)
    settings = {"learning_rate": 0.05, "inputs_per_step": 1, **SMALL}
    return guide.fit(BY_INPUT, steps=8, **(settings | options))


def values_by_input():
    names = sorted(pyro.get_param_store().keys())
    return {name: pyro.param(name).detach().clone() for name in names}


def test_a_saved_guide_with_parameters_of_each_input_works_on_all(tmp_path):
    fitted_by_input().save(tmp_path / "guide")
    trained = values_by_input()
    assert len(trained) == 4 and trained["scale_ba"] != 1.0
    for order in (BY_INPUT, BY_INPUT[::-1]):
        pyro.clear_param_store()
        again = lmppl.LMGuide.load(tmp_path / "guide", by_input, lm=LM, program=guide_by_input)
        for i, args in enumerate(order):
            lmppl.infer(
                by_input, *args, lm=LM, method="importance", guide=again, num_samples=4, seed=0
            )
            assert len(values_by_input()) == 2 * (i + 1)
            if i == 0:
                again.save(tmp_path / f"half-{args[0]}")  # with what it has not come to yet
        assert values_by_input() == trained
    pyro.clear_param_store()
    half = lmppl.LMGuide.load(tmp_path / "half-ba", by_input, lm=LM, program=guide_by_input)
    draw_samples(half, by_input, BY_INPUT[0], 1)
    draw_samples(half, by_input, BY_INPUT[1], 1)
    assert values_by_input() == trained
    half.fit(BY_INPUT, steps=2, learning_rate=0.05, **SMALL)
    further = values_by_input()
    draw_samples(half, by_input, BY_INPUT[0], 1)
    assert values_by_input() == further != trained

    def other_shape(x, y):
        loc = pyro.param(f"loc_{x}", torch.zeros(2))
        pyro.sample("k", dist.Normal(loc.sum(), 1.0))

    pyro.clear_param_store()
    other = lmppl.LMGuide.load(tmp_path / "guide", by_input, lm=LM, program=other_shape)
    for _ in range(2):  # it is not forgotten that it could not be restored
        pyro.clear_param_store()
        with pytest.raises(ValueError, match=r"parameter 'loc_ab.' has the shape \(\).*\(2,\)"):
            draw_samples(other, by_input, BY_INPUT[0], 1)


def test_a_loaded_guide_program_keeps_its_decorators(tmp_path):
    def swapped(program):
        @functools.wraps(program)
        def wrapper(x, y):
            return program({"ab.": "ba", "ba": "ab."}[x], y)

        return wrapper

    fitted_by_input().save(tmp_path / "guide")
    trained = values_by_input()
    pyro.clear_param_store()
    program = swapped(guide_by_input)
    again = lmppl.LMGuide.load(tmp_path / "guide", by_input, lm=LM, program=program)
    (sample,) = draw_samples(again, by_input, BY_INPUT[0], 1)
    q = sample.proposer.draws["k"]["fn"]
    assert q.loc.item() == trained["loc_ba"] != trained["loc_ab."]


def test_a_resumed_run_comes_late_to_parameters(tmp_path):
    class Stop(Exception):
        pass

    def stop(figures):
        if figures["step"] == 4:
            raise Stop

    options = {"checkpoint_every": 3}
    fitted_by_input(checkpoint=tmp_path / "whole", **options)
    whole = values_by_input()
    with pytest.raises(Stop):
        fitted_by_input(checkpoint=tmp_path / "broken", callback=stop, **options)
    resumed = fitted_by_input(checkpoint=tmp_path / "broken", resume=True, **options)
    assert values_by_input() == whole and len(resumed.history) == 8


def test_a_program_with_saved_params_may_call_itself():
    def program(n):
        return restoring(n - 1) if n else 0

    restoring = SavedParams().around(program)
    assert restoring(2) == 0
