"""A run of training: losses that need latents, evaluations, early stops, divergence."""

import inspect
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import LM, QUICK, equal, infill, new_guide, shaken, weights

import lmppl
from lmppl import lm_sample, require
from lmppl.testing import total_variation
from lmppl.testing.programs import CASES
from lmppl.training.callbacks import DivergenceGuard, EarlyStopping
from lmppl.training.options import FitOptions

# --- losses that need latents --------------------------------------------------------------------


def test_sft_learns_the_demonstrations():
    guide = new_guide()
    guide.fit(
        [("ab.", "a"), ("ab.", "b")],
        steps=40,
        loss="sft",
        demonstrations=[{"z": "bb"}, [{"z": "a."}, {"z": "a."}]],
        learning_rate=0.02,
        **QUICK,
    )
    for y, expected in (("a", "bb"), ("b", "a.")):
        drawn = lmppl.infer(
            infill, "ab.", y, lm=LM, method="gflownet", guide=guide, num_samples=50, seed=0,
            correct=False,
        )  # fmt: skip
        assert drawn.probs("z").get(expected, 0.0) > 0.8
    assert math.isnan(guide.history[-1]["ess"])  # nothing is drawn from the guide


def test_sft_on_simulated_latents():
    guide = new_guide().fit([("ab.", "aa")], steps=3, simulate=4, loss="sft", **QUICK)
    assert [figures["samples"] for figures in guide.history] == [4, 4, 4]


def test_sft_without_latents_says_what_would_do():
    with pytest.raises(ValueError, match="demonstrations=.* or simulate=N.*'vargrad'"):
        new_guide().fit([("ab.", "a")], steps=1, loss="sft", **QUICK)


def test_demonstrations_seed_the_replay_buffer(monkeypatch):
    origins = []

    def watch(samples, *args):
        origins.append(sorted(sample.origin for sample in samples[0]))
        return original(samples, *args)

    from lmppl.training import trainer

    original = trainer.batches_of
    monkeypatch.setattr(trainer, "batches_of", watch)
    new_guide().fit([("ab.", "a")], steps=2, demonstrations=[{"z": "ba"}], **QUICK)
    assert "given" in origins[0] and "given" not in origins[1]


@pytest.mark.slow
def test_smc_particles_can_be_distilled():
    """By weight: the guide learns the posterior, not the uniform distribution over its texts."""
    posterior = lmppl.infer(infill, "ab.", "a", lm=LM, method="smc", num_samples=200, seed=0)
    guide = new_guide().fit(
        [("ab.", "a")],
        steps=60,
        loss="sft",
        demonstrations=[posterior],
        **(QUICK | {"batch_size": 64}),
    )
    drawn = lmppl.infer(
        infill, "ab.", "a", lm=LM, method="gflownet", guide=guide, num_samples=400, seed=0,
        correct=False,
    )  # fmt: skip
    assert total_variation(posterior.probs("z"), drawn.probs("z")) < 0.15
    uniform = {z: 1 / len(posterior.probs("z")) for z in posterior.probs("z")}
    assert total_variation(posterior.probs("z"), uniform) > 0.3


@pytest.mark.parametrize(
    "given, message",
    [
        ({"z": "a"}, "a list as long as the data, one entry an input .1., given one"),
        ([{"z": "a"}, None], "given 2$"),
        ([{"w": "a"}], "a demonstration of input 0 has a value for 'w'"),
    ],
)
def test_bad_demonstrations(given, message):
    with pytest.raises(ValueError, match=message):
        new_guide().fit([("ab.", "a")], steps=1, demonstrations=given, **QUICK)


def test_a_demonstration_of_another_type():
    with pytest.raises(TypeError, match="demonstration 0 is a str: give a dict"):
        new_guide().fit([("ab.", "a")], steps=1, demonstrations=["a"], **QUICK)


def test_ppo_updates_several_times_on_the_same_draws(monkeypatch):
    guide = new_guide()
    updates = []
    monkeypatch.setattr(
        "lmppl.training.objectives.ppo", lambda log_r, log_q, old, prior, **kw: updates.append(
            float((log_q - old).detach().abs().max())
        ) or (log_q - old).sum()
    )  # fmt: skip
    guide.fit([("ab.", "a")], steps=1, loss="ppo", updates=3, learning_rate=0.05, **QUICK)
    assert len(updates) == 3
    assert updates[0] == 0.0 < updates[1] < updates[2]  # the draws' own density stays


def test_subtb_without_truncations_says_what_would_do():
    case = CASES["beta and text"]
    with pytest.raises(ValueError, match="loss='subtb' .*use loss='vargrad' or 'tb'"):
        lmppl.LMGuide(case.program, lm=case.lm).fit([case.args], steps=9, loss="subtb", **QUICK)


def test_truncations_that_are_never_legal_are_given_up_and_reported():
    def program(x):
        lm_sample("z", x, max_tokens=2, stop=".")
        pyro.sample("k", dist.Bernoulli(0.3))

    guide = new_guide(program).fit([("ab",)], steps=9, **QUICK)
    assert guide.notes == [
        "complete traces only: of 64 traces, 0 truncations were legal and within the budget"
    ]


# --- one adapter each ----------------------------------------------------------------------------


def test_an_adapter_for_each_site(tmp_path):
    case = CASES["chain"]
    guide = lmppl.LMGuide(case.program, lm=case.lm, adapter_per_site=True)
    guide.fit([case.args], steps=3, **QUICK)
    assert guide.adapted_sites == ["z", "w"] and len(guide.adapters()) == 2
    one, two = guide.adapters()
    assert not equal(_lora(one), _lora(two))
    guide.save(tmp_path / "guide")
    loaded = lmppl.LMGuide.load(tmp_path / "guide", case.program, lm=case.lm)
    assert equal(weights(loaded), weights(guide)) and loaded.adapted_sites == ["z", "w"]


def _lora(lm):
    return {name: p for name, p in lm.model.named_parameters() if p.requires_grad}


# --- evaluation, early stopping, divergence ------------------------------------------------------


def test_held_out_figures():
    guide = new_guide().fit(
        [("ab.", "a")], steps=5, eval_data=[("ab.", "b"), ("ba", "a")], eval_every=2,
        eval_samples=256, **QUICK,
    )  # fmt: skip
    assert [figures["step"] for figures in guide.history if "eval_ess" in figures] == [1, 3, 4]
    last = guide.history[-1]
    assert 1 / 256 <= last["eval_ess"] <= 1.0 and last["eval_alive"] == 1.0
    assert last["eval_elbo"] <= last["eval_log_z"] + 1e-6
    exact = [
        lmppl.infer(infill, x, y, lm=LM, method="exact").log_evidence
        for x, y in [("ab.", "b"), ("ba", "a")]
    ]
    assert last["eval_log_z"] == pytest.approx(sum(exact) / 2, abs=0.5)


def test_early_stopping_puts_the_best_parameters_back(monkeypatch):
    values = iter([0.2, 0.5, 0.4, 0.3])
    kept = {}

    def evaluate(guide, inputs, num, seed, sharing):
        value = next(values)
        kept[value] = weights(guide)
        return {"eval_ess": value}

    monkeypatch.setattr("lmppl.training.evaluation.evaluate", evaluate)
    guide = new_guide().fit(
        [("ab.", "a")], steps=50, eval_data=[("ab.", "b")], eval_every=2, patience=2, **QUICK
    )
    assert len(guide.history) == 8
    assert equal(weights(guide), kept[0.5])
    assert guide.notes == ["stopped after 8 steps: no better held-out ESS since step 3"]


def test_patience_needs_something_held_out():
    with pytest.raises(ValueError, match="patience=2 needs eval_data="):
        new_guide().fit([("ab.", "a")], steps=2, patience=2, **QUICK)
    with pytest.raises(ValueError, match="patience=0"):
        EarlyStopping(0)


def never():
    raise AssertionError("no ELBO is needed again")


def test_a_run_that_diverges_stops_with_its_best_parameters():
    parameters = {"p": torch.nn.Parameter(torch.zeros(2))}
    guard = DivergenceGuard()
    for number in range(40):
        with torch.no_grad():
            parameters["p"].fill_(number)
        guard.watch(number, -50.0 + number, parameters, never)
    with torch.no_grad():
        parameters["p"].fill_(math.nan)
    for number in range(40, 49):
        guard.watch(number, -400.0, parameters, never)
    with pytest.raises(FloatingPointError, match="diverged: up to step 49 the ELBO fell to -400.0"):
        guard.watch(49, -400.0, parameters, lambda: -50.0 + parameters["p"][0].item())
    assert parameters["p"].tolist() == [39.0, 39.0]


def test_a_guide_that_gets_much_worse_is_noticed():
    guide = new_guide()
    kept = {}

    def catastrophe(figures):
        if figures["step"] == 19:
            kept.update(weights(guide))
        elif figures["step"] > 19:
            figures["elbo"] = -500.0
            shaken(guide, size=1.0)

    with pytest.raises(FloatingPointError, match="diverged.*Lower learning_rate"):
        guide.fit([("ab.", "a")], steps=100, learning_rate=1e-9, callback=catastrophe, **QUICK)
    assert len(guide.history) == 30
    for name, tensor in weights(guide).items():
        torch.testing.assert_close(tensor, kept[name], atol=1e-6, rtol=0.0)


def test_longer_inputs_are_no_divergence():
    def program(y):
        lm_sample("z", "ab", max_tokens=2, stop=".")
        lm_sample("y", "ab", max_tokens=None, obs=y)

    stream = (("ab" * (1 if number < 40 else 20),) for number in itertools.count())
    guide = new_guide(program).fit(stream, steps=20, inputs_per_step=4, **QUICK)
    elbos = guide.history.column("elbo")
    assert max(elbos[10:]) < 3 * min(elbos[:10])  # the guard has to look
    assert len(elbos) == 20


def test_an_input_that_is_dead_before_its_first_latent_is_skipped():
    def program(x):
        require("allowed", x != "b")
        lm_sample("z", x, max_tokens=2, stop=".")

    with pytest.warns(UserWarning, match="inputs .1. of the data were skipped"):
        guide = new_guide(program).fit([("a",), ("b",)], steps=3, **QUICK)
    assert math.isfinite(guide.history[-1]["loss"])


def test_all_demonstrations_come_to_the_replay_buffer(monkeypatch):
    from lmppl.training.trainer import Trainer

    trainers, original = [], Trainer.step

    def step(self, number):
        trainers.append(self)
        return original(self, number)

    monkeypatch.setattr(Trainer, "step", step)
    texts = ["aaaa", "bbbb", "abab", "baba", "aabb", "bbaa", "abba", "baab"]

    def program(x):
        lm_sample("z", x, max_tokens=4, stop=".")

    new_guide(program).fit(
        [("ab",)], steps=3, demonstrations=[[{"z": z} for z in texts]], near_duplicates=0.0, **QUICK
    )
    (kept,) = trainers[-1].source.kept
    assert set(texts) <= {LM.vocabulary.decode(record.tokens) for record in kept.buffer.records}


@pytest.mark.parametrize("loss", ["elbo", "wake", "ppo"])
def test_demonstrations_that_would_not_be_used_are_an_error(loss):
    with pytest.raises(ValueError, match=f"loss='{loss}' .*demonstrations= have no use"):
        new_guide().fit([("ab.", "a")], steps=1, loss=loss, demonstrations=[{"z": "a"}], **QUICK)


def test_sft_does_not_imitate_what_the_guide_drew_itself():
    def program(x):
        lm_sample("z", x, max_tokens=2, stop=".")
        lm_sample("w", x, max_tokens=2, stop=".")

    demonstrations = {"demonstrations": [{"z": "bb"}]}
    with pytest.raises(ValueError, match="demonstration of input 0 has no value for .* 'w'"):
        new_guide(program).fit([("a",)], steps=2, loss="sft", **demonstrations, **QUICK)
    new_guide(program).fit([("a",)], steps=2, **demonstrations, **QUICK)


def test_a_demonstration_of_probability_zero_is_an_error():
    def program(x):
        z = lm_sample("z", x, max_tokens=2, stop=".")
        require("long", len(z) > 1)

    message = "a demonstration of input 0 has probability zero .* by site 'long'"
    for loss in ("sft", "vargrad"):
        with pytest.raises(ValueError, match=message):
            new_guide(program).fit(
                [("a",)], steps=2, loss=loss, demonstrations=[{"z": "."}], **QUICK
            )


def test_simulated_inputs_are_not_kept_by_a_warning():
    from lmppl.guides import prompts

    def program(x):
        lm_sample("z", x, max_tokens=2, stop=".")
        pyro.sample("k", dist.Bernoulli(0.5), obs=torch.tensor(1.0))

    before = len(prompts._warned)
    with pytest.warns(UserWarning, match="cannot see the observations"):
        new_guide(program).fit([("a.",)], steps=3, simulate=math.inf, **QUICK)
    assert len(prompts._warned) == before + 1


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batchsize": 8}, TypeError, "no option 'batchsize'; did you mean 'batch_size'"),
        ({"eval_sample": 8}, TypeError, "did you mean 'eval_samples'"),
        ({"simulate": 0}, ValueError, "simulate=0: it must be an int of at least 1, or math.inf"),
        ({"simulate": 2, "demonstrations": [None]}, ValueError, "leave out demonstrations="),
        ({"eval_data": 3}, ValueError, "eval_data=3: a number is for simulate="),
        ({"eval_every": 0}, ValueError, "eval_every=0"),
        ({"loss": "ppo", "clip": 2.0}, ValueError, "clip=2.0"),
        ({"near_duplicates": 1.0}, ValueError, "near_duplicates=1.0"),
        ({"replay_capacity": 0}, ValueError, "replay_capacity=0"),
        ({"loss": "subtb", "lam": 0.0}, ValueError, "lam=0.0"),
        ({"loss": "subtb", "truncations": 0}, ValueError, "truncations=0 has none"),
        ({"inputs_per_step": 2.0}, TypeError, "inputs_per_step=2.0: it must be an int"),
        ({"reward_temperature": 2}, TypeError, "reward_temperature=2: give the first and the last"),
        ({"eval_data": ["ab."]}, TypeError, "item 0 of eval_data does not fit"),
        ({"eval_data": "ab."}, TypeError, "eval_data must be a list of inputs, given one str"),
        ({"demonstrations": iter([None])}, ValueError, "given one list_iterator"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        new_guide().fit([("ab.", "a")], **({"steps": 1, "progress": False} | options))


def test_a_tuned_guide_is_a_proposal_of_shaken_ones():
    """The figures of a bad guide and a good one differ as they should."""
    guide = shaken(new_guide(), size=0.5)
    bad = guide.fit([("ab.", "a")], steps=1, learning_rate=1e-9, **QUICK).history[-1]["elbo"]
    good = guide.fit([("ab.", "a")], steps=60, **QUICK).history[-1]["elbo"]
    assert good > bad


def test_signatures_show_all_options():
    """To ``help`` and completion; what is shown as default is what is taken."""
    of_fit = inspect.signature(lmppl.LMGuide.fit).parameters
    of_learn = inspect.signature(lmppl.learn).parameters
    for name in ("simulate", "eval_every", "batch_size", "loss"):
        assert of_fit[name].kind is of_fit[name].KEYWORD_ONLY
    assert of_fit["batch_size"].default == FitOptions().batch_size
    assert (of_fit["eval_every"].default, of_learn["eval_every"].default) == (50, 20)
    assert "simulate" not in of_learn and list(of_learn)[-1] == "loss_options"
    shown = {n: p.default for n, p in of_fit.items() if p.kind is p.KEYWORD_ONLY}
    new_guide().fit([("ab.", "a")], steps=1, **{**shown, **QUICK})
