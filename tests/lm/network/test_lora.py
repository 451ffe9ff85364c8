from __future__ import annotations

import copy

import pytest
import torch
from architectures import make_model
from peft import LoraConfig

from lmppl.lm.batches.requests import Score
from lmppl.lm.model import LM
from lmppl.lm.network.lora import FusedLora, factors, plain_adapter
from lmppl.lm.network.runner import Runner
from lmppl.testing.tiny import tiny_lm

REQUESTS = [Score((0, 1, 2) * 8, (0, 1, k, 1), 1.0, 2) for k in range(3)]


def adapted(**changes) -> LM:
    options = dict(r=3, lora_alpha=5, lora_dropout=0.0, target_modules="all-linear")
    lm = tiny_lm("ab.").adapter(LoraConfig(**{**options, **changes}, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm


def lora_layers(lm):
    return [m for m in lm.model.modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_equals_the_layer_of_peft_with_all_gradients(shape, dtype):
    layer = copy.deepcopy(lora_layers(adapted())[0])
    layer.get_base_layer().to(dtype)
    fused = FusedLora(layer, plain_adapter(layer))
    down, up, scale = factors(layer, "default")
    assert scale == pytest.approx(5 / 3)
    base = layer.get_base_layer().weight
    x = torch.randn(*shape, base.shape[1], generator=torch.manual_seed(2)).to(dtype)

    def run(module):
        given = x.clone().requires_grad_()
        out = module(given)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        return out.detach(), *torch.autograd.grad((out.float() * weights).sum(), [given, down, up])

    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for got, want in zip(run(fused), run(layer), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert float((got - want).abs().max()) <= tolerance * (1 + float(want.abs().max()))


def test_runners_of_adapters_use_it_and_equal_the_plain_model():
    lm = adapted()
    runner = Runner(lm.model)
    assert runner.fast
    fused = [m for m in runner._fast_model.modules() if isinstance(m, FusedLora)]
    assert len(fused) == len(lora_layers(lm)) > 0
    assert {id(p) for p in runner._fast_model.parameters()} == {
        id(p) for p in lm.model.get_base_model().parameters()
    }
    for request, got in zip(REQUESTS, lm.score(REQUESTS), strict=True):
        ids = torch.tensor([[*request.prefix, *request.continuation]])
        with torch.no_grad():
            logits = lm.model(ids, use_cache=False).logits[0, len(request.prefix) - 1 : -1]
        want = torch.log_softmax(logits, -1).gather(1, torch.tensor([request.continuation]).T)
        torch.testing.assert_close(got.log_probs, want[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [dict(use_dora=True), dict(lora_dropout=0.1)])
def test_other_kinds_of_layers_are_left_to_peft(changes):
    lm = adapted(**changes)
    assert all(plain_adapter(layer) is None for layer in lora_layers(lm))
    runner = Runner(lm.model)
    assert runner.fast
    assert not any(isinstance(m, FusedLora) for m in runner._fast_model.modules())


def test_layers_that_are_trained_themselves_are_left_alone():
    lm = adapted()
    for layer in lora_layers(lm):
        layer.get_base_layer().weight.requires_grad_(True)
    scored = lm.score(REQUESTS, grad=True)
    sum(s.log_probs.sum() for s in scored).backward()
    assert all(layer.get_base_layer().weight.grad.abs().max() > 0 for layer in lora_layers(lm))


def test_conv1d_layers_are_left_to_peft():
    model = make_model("gpt2")
    lm = tiny_lm("ab.")
    lm.model = model
    adapter = lm.adapter()
    assert all(plain_adapter(layer) is None for layer in lora_layers(adapter))


def test_trained_biases_get_their_gradients_and_are_merged():
    lm = tiny_lm("ab.")
    lm.model = make_model("qwen2")  # has biases
    options = dict(r=2, bias="lora_only", target_modules=["q_proj"], task_type="CAUSAL_LM")
    lm = lm.adapter(LoraConfig(**options))
    _ = lm.sampler
    sum(s.log_probs.sum() for s in lm.score(REQUESTS, grad=True)).backward()
    biases = [p for n, p in lm.model.named_parameters() if n.endswith("bias") and p.requires_grad]
    assert biases and all(p.grad is not None for p in biases)
    with torch.no_grad():
        for bias in biases:
            bias.add_(1.0)
    for got, want in zip(lm.sampler.score(REQUESTS), lm.score(REQUESTS), strict=True):
        torch.testing.assert_close(got.log_probs, want.log_probs, atol=1e-4, rtol=0)


def test_embeddings_with_lora_are_merged():
    lm = adapted(target_modules=["embed_tokens", "q_proj"])
    _ = lm.sampler
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    for got, want in zip(lm.sampler.score(REQUESTS), lm.score(REQUESTS), strict=True):
        torch.testing.assert_close(got.log_probs, want.log_probs, atol=1e-4, rtol=0)


def test_autocast_changes_nothing():
    lm = adapted()
    want = lm.score(REQUESTS, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = lm.score(REQUESTS, grad=True)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.log_probs, other.log_probs)


def test_second_derivatives_are_refused():
    lm = adapted()
    loss = lm.score(REQUESTS, grad=True)[0].log_probs.sum()
    parameter = next(p for p in lm.model.parameters() if p.requires_grad)
    (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("changes", [{}, dict(use_rslora=True)])
def test_merging_again_equals_merging_anew(changes):
    lm = adapted(**changes)
    first = lm.sampler
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    again, anew = lm.sampler, lm.merged()
    assert again is first
    for got, want in zip(again.model.parameters(), anew.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
