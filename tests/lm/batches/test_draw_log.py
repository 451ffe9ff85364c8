"""What is logged of drawn texts, and which scores are compared with it."""

import dataclasses

import pytest
import torch

from lmppl.constraints import Regex
from lmppl.lm.batches.draw_log import logging_draws
from lmppl.lm.batches.requests import Allowed, Draw, Score
from lmppl.lm.tokens.stopping import Stopping
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)
CLOSE = {"atol": 1e-5, "rtol": 0}


def draws(num=4, *, lm=LM, constraint=None, **options):
    stopping = Stopping(lm.vocabulary, ".", 5, constraint)
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand((num, 5), generator=generator, dtype=torch.float64)
    return [Draw((0, 1), stopping, row, **options) for row in uniforms]


def logged(requests, lm=LM):
    with logging_draws() as log:
        lm.draw(requests)
    lm.draw(requests)  # of no concern
    return log.texts


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("way", [None, "masks", "rejection", "model"])
def test_a_texts_request_scores_the_law_that_it_was_drawn_from(way, temperature):
    options = {} if way is None else {"constraint": Regex("b*"), "way": way}
    texts = logged(draws(20, temperature=temperature, **options))
    assert texts and all((text.request.allowed is not None) == (way == "masks") for text in texts)
    for text, scored in zip(texts, LM.score([t.request for t in texts]), strict=True):
        torch.testing.assert_close(scored.log_probs, text.log_probs, **CLOSE)
    if way == "masks":  # it is another law than the model's
        plain = LM.score([dataclasses.replace(t.request, allowed=None) for t in texts])
        assert any(
            float((t.log_probs - p.log_probs).abs().max()) > 1e-3
            for t, p in zip(texts, plain, strict=True)
        )
        for text, scored in zip(texts, plain, strict=True):
            torch.testing.assert_close(text.answer(text.request), text.log_probs)
            wanted = text.answer(dataclasses.replace(text.request, allowed=None))
            torch.testing.assert_close(scored.log_probs, wanted, **CLOSE)


def test_dead_ends_and_texts_that_were_begun_before_are_left_out():
    dead = draws(8, constraint=Regex("b"), way="model")
    assert 0 < len(logged(dead)) < 8
    begun = [dataclasses.replace(draw, begun=(0,)) for draw in draws(2)]
    assert logged(begun) == []


def test_scores_with_gradients_are_compared_by_the_same_model_at_the_same_temperature():
    adapter = LM.adapter()
    with logging_draws() as log:
        adapter.draw(draws(3))
        adapter.draw(draws(3, temperature=2.0))
        LM.draw(draws(3))
        requests = [text.request for text in log.texts if text.lm is adapter]
        warm, hot = requests[:3], requests[3:]
        adapter.score(warm)  # without
        LM.score(warm, grad=True)
        assert len(log.pairs) == 3  # the base's own
        found = adapter.score([*warm, Score((0, 1), (0, 0, 0, 0, 0))], grad=True)
        adapter.score(warm, grad=True)  # once is enough
        assert len(log.pairs) == 6
        adapter.score([dataclasses.replace(request, temperature=1.5) for request in hot], grad=True)
        assert len(log.pairs) == 6
        adapter.score(hot, grad=True)
    assert len(log.pairs) == 9
    adapter.score(hot, grad=True)
    assert found[0].log_probs.requires_grad
    for drawn, scored in log.pairs:
        assert not scored.requires_grad
        torch.testing.assert_close(drawn, scored, **CLOSE)


def test_every_draw_of_a_text_is_compared():
    one = draws(1)
    with logging_draws() as log:
        LM.draw([*one, *one])
        LM.score([log.texts[0].request], grad=True)
    assert len(log.pairs) == 2


def test_drawing_by_rejection_does_not_tell_a_renormalised_law():
    with logging_draws() as log:
        LM.draw(draws(constraint=Regex("b*"), way="rejection"))
        (text, *_) = log.texts
        allowed = Allowed(text.draw.stopping, False)
        LM.score([dataclasses.replace(text.request, allowed=allowed)], grad=True)
    assert log.pairs == [] and log.texts


def test_logs_nest_and_end_with_their_blocks():
    with logging_draws() as outer:
        with pytest.raises(KeyError), logging_draws() as inner:
            LM.draw(draws(1))
            raise KeyError
        LM.draw(draws(2))
    LM.draw(draws(4))
    assert (len(inner.texts), len(outer.texts)) == (1, 3)
