"""What was made of a model's weights is made anew when they change."""

from __future__ import annotations

import pytest
import torch

from lmppl.lm.batches.requests import Draw, Score
from lmppl.lm.tokens.stopping import Stopping
from lmppl.testing.tiny import tiny_lm

PREFIX = (0, 1, 2) * 8  # long enough to be remembered


def naive(lm, continuation):
    ids = torch.tensor([[*PREFIX, *continuation]])
    with torch.no_grad():
        logits = lm.model(ids, use_cache=False).logits[0, len(PREFIX) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor([continuation]).T)[:, 0]


def answers(lm):
    """Tokens and their log-probabilities, scored and drawn; some by a cached prompt."""
    found = []
    requests = [Score(PREFIX, (0, 1, k)) for k in range(3)] * 2
    for request, scored in zip(requests, lm.score(requests), strict=True):
        found.append((request.continuation, scored.log_probs))
    uniforms = torch.rand(4, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    draws = [Draw(PREFIX, Stopping(lm.vocabulary, None, 3), row) for row in uniforms]
    return found + [(drawn.token_ids, drawn.log_probs) for drawn in lm.draw(draws)]


def weight_of(lm):
    return lm.model.get_submodule("model.layers.0.self_attn.v_proj").weight


def head_of(lm):
    return lm.model.lm_head.weight


def write(lm):
    weight_of(lm).mul_(-1.0)


def write_data(lm):
    weight_of(lm).data.mul_(-1.0)


def write_data_of_head(lm):
    head_of(lm).data.neg_()


def replace_data(lm):
    weight_of(lm).data = -weight_of(lm).data


def to_bfloat16(lm):
    lm.model.to(torch.bfloat16)


def train_a_while(lm):
    weight_of(lm).requires_grad_(True)
    weight_of(lm).data.mul_(-1.0)
    weight_of(lm).requires_grad_(False)


def one_number(lm):
    weight_of(lm).data[3, 5] += 50.0
    lm.forget()


def other_module(lm):
    new = torch.nn.Linear(64, head_of(lm).shape[0], bias=False)
    new.weight.data.copy_(-head_of(lm))
    lm.model.lm_head = new.requires_grad_(False)
    lm.forget()


CHANGES = [
    write, write_data, write_data_of_head, replace_data, to_bfloat16, train_a_while, one_number,
    other_module,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    "change, adapted",
    # (An adapter keeps the modules that it was made of.)
    [*((c, False) for c in CHANGES), *((c, True) for c in CHANGES if c is not other_module)],
)
def test_a_change_is_noticed(change, adapted):
    base = tiny_lm("ab.")
    base.model.requires_grad_(False)
    lm = base.adapter() if adapted else base
    before = answers(lm)
    change(base)
    if adapted and change is one_number:
        lm.forget()
    after = answers(lm)
    tolerance = 0.2 if change is to_bfloat16 else 1e-4
    for ids, log_probs in after:
        torch.testing.assert_close(log_probs, naive(lm, ids), atol=tolerance, rtol=0)
    old, new = (torch.cat([log_probs for _, log_probs in found[:6]]) for found in (before, after))
    assert not torch.equal(old, new)


@torch.no_grad()
def test_there_and_back():
    """Of another dtype and of the first again: what is then computed is what it was."""
    lm = tiny_lm("ab.")
    lm.model.requires_grad_(False).to(torch.bfloat16).float()
    want = answers(lm)
    lm.model.to(torch.bfloat16)
    assert lm.score([Score(PREFIX, (0,))])[0].log_probs.dtype == torch.float32
    lm.model.float()
    for (ids, log_probs), (same_ids, same) in zip(answers(lm), want, strict=True):
        assert ids == same_ids
        torch.testing.assert_close(log_probs, same, atol=1e-5, rtol=0)


def test_what_has_not_changed_is_kept():
    lm = tiny_lm("ab.")
    lm.model.requires_grad_(False)
    answers(lm)
    generation, prompts = lm.runner.generation, dict(lm.runner._prompts)
    assert prompts
    answers(lm)
    assert lm.runner.generation == generation and prompts.items() <= lm.runner._prompts.items()
    adapter = lm.adapter()
    answers(adapter)
    sampler = adapter.sampler
    assert adapter.sampler is sampler
