from __future__ import annotations

import pytest
import torch
from architectures import FAST, SIZE, make_model, naive_log_probs

import lmppl.lm.network.output as head
from lmppl.lm.network.runner import Runner

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
AT = torch.tensor([0, 3, 3, 7, 12, 15])
PICKS = torch.tensor([[1, 0], [5, 0], [6, 7], [2, 7], [2, 1], [9, 9]])


def ready(name, *, frozen=True):
    runner = Runner(make_model(name, frozen=frozen))
    _ = runner.fast
    return runner


@pytest.mark.filterwarnings("ignore:.*slow path")
@pytest.mark.parametrize("name", [*FAST, "bloom"])
def test_logits_of_states_are_the_models_own(name):
    runner = ready(name)
    with torch.no_grad():
        states = runner.run_plain(TOKENS, AT)
        got = torch.log_softmax(runner.output(states), -1)
    rows = torch.cat([naive_log_probs(make_model(name), tuple(t)) for t in TOKENS.tolist()])
    torch.testing.assert_close(got, rows[AT], atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperatures", [None, torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7, 3.0])])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_log_probs_and_gradients_equal_the_naive_ones(
    name, frozen, chunk, temperatures, monkeypatch
):
    monkeypatch.setattr(head, "_CPU_CHUNK_BYTES", 4 * SIZE * chunk)
    runner = ready(name, frozen=frozen)
    with torch.no_grad():
        states = runner.run_plain(TOKENS, AT)
    weights = torch.linspace(-1, 1, 12).view(6, 2)

    def naive(given):
        logits = runner.output(given)
        if temperatures is not None:
            logits = logits / temperatures.unsqueeze(-1)
        return torch.log_softmax(logits, -1).gather(1, PICKS)

    def gradients(function):
        given = states.clone().requires_grad_()
        found = function(given)
        weight = runner._head.layer.weight
        wanted = [given] if frozen else [given, weight]
        return found.detach(), torch.autograd.grad((found * weights).sum(), wanted)

    with torch.no_grad():
        plain = runner.output.log_probs(states, PICKS, temperatures)
    got, got_gradients = gradients(lambda s: runner.output.log_probs(s, PICKS, temperatures))
    want, want_gradients = gradients(naive)
    torch.testing.assert_close(plain, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    for one, other in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_impossible_tokens():
    """-inf logits: log-probability -inf, and no NaN in the gradient of the others."""
    layer = torch.nn.Linear(4, 3, bias=True).requires_grad_(False)
    layer.bias.copy_(torch.tensor([0.0, -torch.inf, 0.0]))
    stand_in = head.OutputHead(layer)
    output = head.OutputLayer(None, stand_in)
    output._is_plain = True
    states = torch.randn(2, 4, requires_grad=True)
    found = output.log_probs(states, torch.tensor([[0, 1], [2, 1]]), None)
    assert (found[:, 1] == -torch.inf).all() and torch.isfinite(found[:, 0]).all()
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), states)
    assert torch.isfinite(gradient).all()


def test_an_output_layer_that_cannot_be_had_by_itself(monkeypatch):
    """The pass itself then makes the logits, and all else goes on as before."""
    monkeypatch.setattr(head._HandOn, "forward", lambda *_, **__: 1 / 0)
    runner = ready("gemma2")  # it soft-caps its logits
    assert runner._head.opaque
    with torch.no_grad():
        states = runner.run_plain(TOKENS, AT)
        assert states.shape == (6, SIZE)
        assert runner.hidden.shape == (6, 32)
        got = torch.log_softmax(runner.output(states), -1)
        picked = runner.output.log_probs(states, PICKS, None)
    rows = torch.cat([naive_log_probs(make_model("gemma2"), tuple(t)) for t in TOKENS.tolist()])
    torch.testing.assert_close(got, rows[AT], atol=1e-4, rtol=0)
    torch.testing.assert_close(picked, got.gather(1, PICKS), atol=1e-5, rtol=0)


def test_rows_of_a_chunk():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert head.chunk_rows(10**9, cpu) == 1
    assert 4 * 49152 * head.chunk_rows(49152, cpu) <= head._CPU_CHUNK_BYTES
    assert head.chunk_rows(49152, cuda) > head.chunk_rows(49152, cpu)
