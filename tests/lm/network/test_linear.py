from __future__ import annotations

import pytest
import torch
from architectures import FAST, SIZE, make_model

from lmppl.lm.network.linear import PackedLinear, can_pack, input_groups, pack, packed_products
from lmppl.lm.network.runner import Runner

HAS_KERNELS = can_pack(torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4).requires_grad_(False)}))


class Block(torch.nn.Module):
    """Three layers that read one input, one that reads theirs, one that is called twice."""

    def __init__(self, bias: bool):
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(8, 5, bias=bias)
        self.b = torch.nn.Linear(8, 7, bias=False)
        self.c = torch.nn.Linear(8, 5, bias=bias)
        self.d = torch.nn.Linear(17, 8)
        self.e = torch.nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, x):
        y = self.d(torch.cat([self.a(x), self.b(x), self.c(x)], -1))
        return self.e(torch.tanh(self.e(y)))


def packed(bias=True):
    if not HAS_KERNELS:
        pytest.skip("this machine has no packed products")
    block = Block(bias)
    groups = input_groups(block, lambda: block(torch.randn(2, 8)))
    pack(block, groups)
    return block, groups


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (64, 8), (3, 5, 8), (0, 8)])
def test_equals_plain_layers(shape, bias):
    block, groups = packed(bias)
    assert groups == [["a", "b", "c"], ["d"], ["e"]]
    assert isinstance(block.a, PackedLinear)
    x = torch.randn(*shape)
    torch.testing.assert_close(block(x), Block(bias)(x), atol=1e-6, rtol=1e-5)


def test_layers_may_be_called_in_any_order_and_by_themselves():
    block, _ = packed()
    plain = Block(True)
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    for name, given in [("b", x), ("b", y), ("c", x), ("a", x), ("a", y), ("c", y), ("b", y)]:
        got, want = getattr(block, name)(given), getattr(plain, name)(given)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_an_input_that_is_changed_in_place_is_another_input():
    block, _ = packed()
    x = torch.randn(3, 8)
    block.a(x)
    x.mul_(2)
    torch.testing.assert_close(block.b(x), Block(True).b(x), atol=1e-6, rtol=1e-5)


def test_weights_are_packed_anew_when_they_are_forgotten():
    block, _ = packed()
    x = torch.randn(3, 8)
    before = block.a(x).clone()
    block.a.weight.mul_(2.0)
    for product in packed_products(block.modules()):
        product.forget()
    torch.testing.assert_close(block.a(x.clone()), block.a.layer(x), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(block.a(x.clone()), before)


def test_trainable_weights_are_not_packed():
    block, _ = packed()
    x = torch.randn(3, 8)
    block.b.weight.requires_grad_(True)
    assert block.a(x) is not None and block.b(x).requires_grad


def test_gradients_pass_through_to_the_input():
    block, _ = packed()
    x = torch.randn(3, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    block(x).sum().backward()
    Block(True)(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAST)
def test_models_are_packed_and_equal_their_plain_selves(name, dtype):
    """Or left alone, where the machine has no such products of that dtype."""
    model = make_model(name).to(dtype)
    runner = Runner(model)
    assert runner.fast, runner.slow_reason
    layers = [m for m in runner._fast_model.modules() if isinstance(m, PackedLinear)]
    assert bool(layers) == can_pack(model)
    if layers and name != "gpt2":  # its queries, keys and values are one layer already
        assert any(len(m._product.layers) == 3 for m in layers)
    assert runner._compare() is None
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_trainable_models_are_left_alone():
    runner = Runner(make_model("llama", frozen=False))
    assert runner.fast
    assert not any(isinstance(m, PackedLinear) for m in runner._fast_model.modules())


def test_too_large_a_model_is_left_alone(monkeypatch):
    monkeypatch.setattr("lmppl.lm.network.linear._MAX_PACKED_BYTES", 1000)
    runner = Runner(make_model("llama"))
    assert runner.fast
    assert not any(isinstance(m, PackedLinear) for m in runner._fast_model.modules())
    assert runner.size == SIZE
