"""diagnose: how far the log-probabilities of drawing are from those of scoring."""

import dataclasses
import json
import math

import pytest
import torch

import lmppl
from lmppl import lm_sample
from lmppl.diagnostics import mismatch
from lmppl.lm.batches.rows import Rows
from lmppl.testing import tiny_lm

LM = tiny_lm("abcd.", seed=0)
LM.model.requires_grad_(False)
HALF = tiny_lm("abcd.", seed=0)
HALF.model.requires_grad_(False).bfloat16()


def program(x, y=None):
    z = lm_sample("z", x, max_tokens=6, stop=".")
    if y is not None:
        lm_sample("y", [x, z], obs=y)


def two_texts(x):
    first = lm_sample("first", x, max_tokens=4, stop=".")
    lm_sample("second", [x, first], max_tokens=4, regex="[ab]*", constrain="local")


def run(model=program, *args, lm=LM, **options):
    options = {"num_samples": 64, "seed": 0, "progress": False, **options}
    return lmppl.diagnose(model, *(args or ("ab",)), lm=lm, **options)


def shifted(monkeypatch, by):
    """Let drawing tell each token's log-probability wrongly, by what ``by`` gives for (B,)."""
    for name in ("draw", "draw_among"):
        original = getattr(Rows, name)

        def draw(self, *args, _original=original):
            tokens, log_probs, *rest = _original(self, *args)
            return tokens, log_probs + by(log_probs.shape).to(log_probs), *rest

        monkeypatch.setattr(Rows, name, draw)


@pytest.mark.parametrize("model", [program, two_texts])
@pytest.mark.parametrize("guide", ["prior", "program", "adapter"])
def test_in_float32_they_agree(model, guide):
    guides = {"prior": None, "program": model, "adapter": lmppl.LMGuide(model, lm=LM)}
    found = run(model, guide=guides[guide]).mismatch
    assert list(found) == ["drawn, scored"]
    (agree,) = found.values()
    assert agree.num_texts == (64 if model is program else 128)
    assert agree.largest < 1e-4 and agree.ess_fraction == pytest.approx(1.0, abs=1e-6)


def test_a_gap_that_was_planted_is_found(monkeypatch):
    shifted(monkeypatch, lambda shape: torch.full(shape, 0.03))
    found = run().mismatch["drawn, scored"]
    assert found.per_token == pytest.approx(0.03, abs=1e-4)
    assert found.largest == pytest.approx(0.03, abs=1e-4)
    lengths = torch.tensor([float(len(text.token_ids)) for text in run().samples["z"]])
    assert found.num_tokens == int(lengths.sum()) and lengths.std() > 1
    assert found.per_text_stdev == pytest.approx(0.03 * float(lengths.std()), rel=0.02)


def test_it_is_what_is_left_of_the_ess_where_the_guide_is_the_posterior(monkeypatch):
    """The program observes nothing and is its own guide, so weights differ by nothing else."""
    generator = torch.Generator().manual_seed(0)
    shifted(monkeypatch, lambda shape: 0.25 * torch.randn(shape, generator=generator))
    found = run(guide=program)
    mismatch_ = found.mismatch["drawn, scored"]
    assert 0.5 < found.ess_fraction < 0.95
    assert mismatch_.ess_fraction == pytest.approx(found.ess_fraction, abs=1e-4)
    assert mismatch_.ess_fraction == pytest.approx(
        math.exp(-(mismatch_.per_text_stdev**2)), abs=0.1
    )


def test_half_precision_against_float32():
    found = run(lm=HALF, mismatch="float32")
    assert list(found.mismatch) == ["drawn, scored", "drawn, float32", "scored, float32"]
    for name in ("drawn, float32", "scored, float32"):
        pair = found.mismatch[name]
        assert 1e-4 < pair.per_token < 0.1 and 0.5 < pair.ess_fraction < 1
    assert HALF.dtype == torch.bfloat16 and {p.dtype for p in HALF.model.parameters()} == {
        HALF.dtype
    }
    # The reference is what the weights mean, by the plain model.
    exact = tiny_lm("abcd.", seed=0)
    exact.model.bfloat16().float()
    texts = [
        (text, value) for text, value in zip(found.samples["z"], found.samples.traces, strict=True)
    ]
    totals = exact.log_prob("ab", [text for text, _ in texts], max_tokens=6, stop=".")
    drawn = torch.tensor([float(t.nodes["z"]["unscaled_log_prob"]) for _, t in texts])
    stdev = found.mismatch["drawn, float32"].per_text_stdev
    assert stdev == pytest.approx(float((drawn - totals).std()), rel=1e-2)


def test_an_adapter_against_float32():
    guide = lmppl.LMGuide(program, lm=HALF)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0)
            )
    found = run(program, "ab", "cd", lm=HALF, guide=guide, mismatch="float32")
    assert 1e-4 < found.mismatch["scored, float32"].per_token < 0.1
    assert found.mismatch["drawn, float32"].per_token < 0.1


def test_the_figures_do_not_change_what_is_diagnosed():
    guide = lmppl.LMGuide(program, lm=LM)
    with_, without = (run(program, "ab", "cd", guide=guide, mismatch=m) for m in (True, False))
    assert without.mismatch == {} and with_.mismatch
    for field in dataclasses.fields(with_):
        if field.name not in ("mismatch", "samples"):
            assert getattr(with_, field.name) == getattr(without, field.name)


def test_the_cost_is_bounded(monkeypatch):
    bounded(monkeypatch, 40)
    found = run().mismatch["drawn, scored"]
    assert 8 <= found.num_texts < 64 and 20 <= found.num_tokens <= 60
    bounded(monkeypatch, 1)
    before = LM.tokens_scored
    found = run().mismatch["drawn, scored"]
    assert found.num_texts == 8
    assert 0 < LM.tokens_scored - before <= found.num_tokens
    assert (
        len(run(num_samples=3).texts) == 1
        and run(num_samples=3).mismatch["drawn, scored"].num_texts == 3
    )


def test_texts_of_all_sites_are_among_them(monkeypatch):
    bounded(monkeypatch, 40)
    seen = []
    monkeypatch.setattr(
        mismatch, "_scored", lambda texts: seen.extend(texts) or [t.log_probs for t in texts]
    )
    run(two_texts)
    assert {text.draw.name for text in seen} == {"first", "second"} and len(seen) < 40


def test_without_a_text_that_is_drawn_token_by_token_there_is_nothing_to_compare():
    def chosen(x):
        lm_sample("z", x, choices=["a", "b"])

    assert run(chosen, mismatch="float32").mismatch == {}


def test_what_is_shown(monkeypatch):
    assert "log q as drawn" not in repr(run())  # they agree
    found = run(mismatch="float32")
    assert row_of(found, "log q as drawn and in float32").endswith("ESS 100.0%")
    assert json.loads(json.dumps(found.summary()["mismatch"])) == found.summary()["mismatch"]
    generator = torch.Generator().manual_seed(0)
    shifted(monkeypatch, lambda shape: 0.5 * torch.randn(shape, generator=generator))
    assert not any("nats a token apart" in note for note in run().notes)  # the prior's cancel
    found = run(guide=program)
    row = row_of(found, "log q as drawn and as scored")
    assert " a token" in row and row.endswith("%")
    (note,) = [note for note in found.notes if "nats a token apart" in note]
    assert note.startswith("log q as drawn and as scored are 0.") and "dtype='float32'" in note


def bounded(monkeypatch, most_tokens):
    monkeypatch.setattr(mismatch.mismatches, "__defaults__", (most_tokens,))


def row_of(found, label):
    (row,) = [line for line in repr(found).splitlines() if line.startswith(label)]
    return row


@pytest.mark.parametrize("wrong", ["bfloat16", None, 64])
def test_another_option_is_refused(wrong):
    with pytest.raises(ValueError, match="mismatch=.*, allowed: True, False, 'float32'"):
        run(mismatch=wrong)
