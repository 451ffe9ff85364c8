"""LoRA layers as one operation: y = x W' + b + s (x A') B', with a backward pass of its own.

peft computes the low-rank part with some twenty small operations a layer, in float32. Here it is
added to the frozen product in place, in the model's dtype (as under autocast), and so are the
gradients of the adapter's parameters, which stay float32.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def plain_adapter(layer: Any) -> str | None:
    """The adapter of a layer that computes exactly the formula above; None for any other (DoRA,
    dropout, several adapters, trained biases, layers of other kinds)."""
    if "peft" not in sys.modules:  # nobody has made an adapter, so it need not be imported
        return None
    from peft.tuners import lora

    if type(layer) is not lora.Linear or type(layer.get_base_layer()) is not nn.Linear:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or layer.fan_in_fan_out:
        return None
    (name,) = names
    special = name in getattr(layer, "lora_variant", {}) or layer.lora_bias.get(name, False)
    dropout = layer.lora_dropout[name]
    drops = not isinstance(dropout, nn.Identity) and dropout.p > 0
    return None if special or drops else name


def factors(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """A (r, in), B (out, r) and s of a plain adapter."""
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def fuse(model: nn.Module) -> None:
    """Replace the plain LoRA layers of ``model``, a clone that nobody else uses."""
    for name, layer in list(model.named_modules()):
        adapter = plain_adapter(layer)
        if adapter is not None:
            model.set_submodule(name, FusedLora(layer, adapter))


class FusedLora(nn.Module):
    """Stands for a plain LoRA ``layer``, and computes it in one operation."""

    def __init__(self, layer: Any, adapter: str) -> None:
        super().__init__()
        self.layer, self._adapter = layer, adapter

    @property
    def weight(self) -> Tensor:
        return self.layer.get_base_layer().weight

    def forward(self, given: Tensor) -> Tensor:
        base = self.layer.get_base_layer()
        if any(p.requires_grad for p in base.parameters()):
            return self.layer(given)  # its own gradients are wanted too
        down, up, scale = factors(self.layer, self._adapter)
        return _Lora.apply(given, base.weight, base.bias, down, up, scale)


class _Lora(torch.autograd.Function):
    """Gradients of x, A and B; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        rows = given.reshape(-1, given.shape[-1])  # (M, in)
        down_cast, up_cast = down.to(rows.dtype), up.to(rows.dtype)
        out = F.linear(rows, weight, bias)
        inner = rows @ down_cast.T  # (M, r)
        out.addmm_(inner, up_cast.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, down_cast, up_cast)
        ctx.scale, ctx.dtypes = scale, (down.dtype, up.dtype)
        return out.view(*given.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, inner, weight, down, up = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(-1, shape[-1])  # (M, out)
        lifted = (grad @ up).mul_(ctx.scale)  # (M, r)
        grad_given = None
        if ctx.needs_input_grad[0]:
            grad_given = torch.mm(grad, weight).addmm_(lifted, down).view(*shape[:-1], -1)
        grad_down = (lifted.T @ rows).to(ctx.dtypes[0])
        grad_up = (grad.T @ inner).mul_(ctx.scale).to(ctx.dtypes[1])
        return grad_given, None, None, grad_down, grad_up, None
