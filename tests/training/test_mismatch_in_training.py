"""Training tells how far the guide's draws are from their scores, at no cost."""

import math

import pytest
import torch

import lmppl
from lmppl import lm_sample
from lmppl.lm.batches.rows import Rows
from lmppl.testing import tiny_lm
from lmppl.training import trainer as trainer_module

LM = tiny_lm("abcd.", seed=0)
LM.model.requires_grad_(False)
DATA = [("ab", "cd"), ("ba", "d")]


def program(x, y):
    z = lm_sample("z", x, max_tokens=6, stop=".")
    lm_sample("y", [x, z], obs=y)


def two_texts(x, y):
    first = lm_sample("first", x, max_tokens=4, stop=".")
    second = lm_sample("second", [x, first], max_tokens=4, regex="[ab]+")
    lm_sample("y", [x, second], obs=y)


def trained(guide=None, lm=LM, **options):
    guide = lmppl.LMGuide(program, lm=lm) if guide is None else guide
    options = {"steps": 3, "batch_size": 16, "seed": 0, "progress": False, **options}
    return guide.fit(DATA, **options)


@pytest.fixture
def compared(monkeypatch):
    """The numbers of texts that each step compares."""
    nums, original = [], trainer_module.text_mismatches

    def counted(pairs):
        found = original(pairs)
        nums.append(len(found))
        return found

    monkeypatch.setattr(trainer_module, "text_mismatches", counted)
    return nums


def planted(monkeypatch, by=0.03):
    for name in ("draw", "draw_among"):
        original = getattr(Rows, name)

        def draw(self, *args, _original=original):
            tokens, log_probs, *rest = _original(self, *args)
            return tokens, log_probs + by, *rest

        monkeypatch.setattr(Rows, name, draw)


@pytest.mark.parametrize("loss", ["vargrad", "elbo", "ppo"])
def test_in_float32_they_agree(loss):
    history = trained(loss=loss, learning_rate=0.1).history
    assert max(history.column("mismatch")) < 1e-5
    assert history.column("mismatch_ess") == pytest.approx([1.0] * 3, abs=1e-6)


@pytest.mark.parametrize("make", [lambda: lmppl.LMGuide(program, lm=LM), None])
def test_a_gap_that_was_planted_is_found(monkeypatch, make):
    planted(monkeypatch)
    if make is None:
        adapter = LM.adapter()

        def written(x, y):
            lm_sample("z", [x, y], max_tokens=6, stop=".", lm=adapter)

        make = lambda: lmppl.LMGuide(program, lm=LM, program=written)  # noqa: E731
    history = trained(make()).history
    assert history.column("mismatch") == pytest.approx([0.03] * 3, abs=1e-4)
    assert all(0.98 < share < 1 for share in history.column("mismatch_ess"))


def test_it_is_of_the_guides_own_draws_at_their_temperature(compared):
    trained(steps=2)
    # Two inputs have 8 traces each: one of the program, one tempered, none replayed as yet.
    assert compared[0] == 12
    compared.clear()
    trained(lmppl.LMGuide(two_texts, lm=LM), steps=1, prior_fraction=0, tempered_fraction=0)
    assert (
        16 < compared[0] <= 32
    )  # two texts a trace, where it comes to the second and finds a match


def test_half_precision(monkeypatch):
    half = tiny_lm("abcd.", seed=0)
    half.model.requires_grad_(False).bfloat16()
    history = trained(lm=half).history
    assert all(1e-4 < nats < 0.1 for nats in history.column("mismatch"))
    assert all(0.5 < share < 1 for share in history.column("mismatch_ess"))
    assert "log q as drawn and as scored: 0.0" in repr(history)


def test_without_draws_of_the_guide_there_is_none(compared):
    demonstrations = [[{"z": "a."}], [{"z": "b."}]]
    history = trained(loss="sft", demonstrations=demonstrations).history
    assert all(map(math.isnan, history.column("mismatch"))) and set(compared) == {0}


def test_it_costs_no_pass_and_changes_nothing(monkeypatch):
    found = []
    for is_off in (False, True):
        if is_off:
            monkeypatch.setattr("lmppl.lm.model.note_drawn", lambda *_: None)
        lm = tiny_lm("abcd.", seed=0)
        lm.model.requires_grad_(False)
        guide = trained(lm=lm)
        assert all(map(math.isnan, guide.history.column("mismatch"))) == is_off
        weights = torch.cat([p.detach().flatten() for p in guide.parameters()])
        with lmppl.profile() as profile:
            trained(lm=lm)
        found.append((weights, profile.passes, lm.tokens_scored, lm.tokens_trained))
    (first, *counts), (second, *others) = found
    assert torch.equal(first, second) and counts == others


def test_trackers_are_told():
    from accelerate.tracking import GeneralTracker

    logged = []

    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def __init__(self):
            super().__init__(_blank=True)

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None):
            logged.append(values)

    trained(steps=1, log_with=Kept())
    assert logged[0]["mismatch"] < 1e-5 and logged[0]["mismatch_ess"] == pytest.approx(1.0)
