"""Frozen linear layers, laid out for the CPU's matrix kernels and fused where they read one input.

A matrix product with few rows spends much of its time on bringing the weights into the layout that
the kernel wants. Frozen weights can be brought into it once: oneDNN's packed products, which
torch's own compiler uses for frozen models, ran 1.25 times as fast at 64 rows in bfloat16 and 1.9
times in float32 (docs/performance.md). Layers that are given the very same tensor (queries, keys
and values; gate and up) become one product.

The packed weights are a second copy. They are made for a clone of the model, never for the user's.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lmppl.lm.network.modules import version

_MAX_PACKED_BYTES = 4 << 30  # of the second copy, over all layers of a model
_ROWS = 64  # for which the layout is chosen; others use the same


def can_pack(model: nn.Module) -> bool:
    """Whether this machine has the kernels, and the model's layers may have a second copy."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not all(hasattr(ops, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return False
    weights = [layer.weight for layer in packable_layers(model).values()]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return bool(weights) and size <= _MAX_PACKED_BYTES


def packable_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers that can be packed, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, Conv1D) and _is_packable(layer)
    }


def _is_packable(layer: Any) -> bool:
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and (weight.dtype == torch.float32 or _multiplies_bfloat16())
        and not weight.requires_grad
    )


def _multiplies_bfloat16() -> bool:
    """Whether oneDNN packs bfloat16 weights here (else it raises)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class InputLog:
    """Which linear layers of a model read the same input: a context around one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = packable_layers(model)
        self._calls: list[tuple[str, torch.Tensor]] = []  # the tensors, so that ids stay unique
        self._hooks: list[Any] = []

    def __enter__(self) -> InputLog:
        for name, layer in self._layers.items():

            def note(_: nn.Module, args: tuple[torch.Tensor], name: str = name) -> None:
                self._calls.append((name, args[0]))

            self._hooks.append(layer.register_forward_pre_hook(note))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def groups(self) -> list[list[str]]:
        """Names of layers, each in one group; those of a group are called one after another."""
        names = [name for name, _ in self._calls]
        groups: list[list[str]] = []
        last: torch.Tensor | None = None
        for name, given in self._calls:
            if names.count(name) > 1:
                last = None  # called more than once a pass: by itself
            elif given is last:
                groups[-1].append(name)
                continue
            else:
                last = given
            if not any(name in group for group in groups):
                groups.append([name])
        self._calls = []
        return groups


def pack(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Replace linear layers of ``model`` by packed ones, those of a group by one product.

    Args:
        model: a clone that nobody else uses; its parameters stay as they are.
        groups: names of layers, as ``InputLog.groups`` gives them.
    """
    layers = packable_layers(model)
    for names in groups:
        product = PackedProduct([layers[name] for name in names])
        for index, name in enumerate(names):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(product, index))


class PackedProduct:
    """One packed product of all layers that read one input."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._sizes = [_out_in(layer)[0] for layer in layers]
        self._packed: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._input: torch.Tensor | None = None  # what the outputs at hand were made of
        self._version = 0
        self._outputs: tuple[torch.Tensor, ...] = ()

    def __call__(self, given: torch.Tensor, index: int) -> torch.Tensor:
        if index == 0 or self._input is not given or self._version != version(given):
            self._outputs = self.multiply(given).split(self._sizes, -1)
            self._input, self._version = given, version(given)
        output = self._outputs[index]
        if index == len(self._sizes) - 1:
            self._input, self._outputs = None, ()
        return output

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), of all layers together."""
        return sum(self._sizes), _out_in(self.layers[0])[1]

    def multiply(self, given: torch.Tensor) -> torch.Tensor:
        """All layers' outputs, side by side."""
        if self._packed is None:
            self._pack()
        return torch.ops.mkldnn._linear_pointwise(
            given.contiguous(), self._packed, self._bias, "none", [], ""
        )

    def forget(self) -> None:
        """The weights have changed: pack them when they are next needed."""
        self._packed = None

    def _pack(self) -> None:
        with torch.no_grad():
            weights = [_out_in_weight(layer) for layer in self.layers]
            whole = weights[0].contiguous() if len(weights) == 1 else torch.cat(weights)
            self._packed = torch.ops.mkldnn._reorder_linear_weight(whole.detach(), _ROWS)
            biases = [layer.bias for layer in self.layers]
            self._bias = None
            if any(bias is not None for bias in biases):
                self._bias = torch.cat(
                    [
                        whole.new_zeros(size) if bias is None else bias.detach()
                        for bias, size in zip(biases, self._sizes, strict=True)
                    ]
                )


class PackedLinear(nn.Module):
    """A frozen linear layer whose product is computed by a packed copy of its weights.

    Its parameters are those of the layer. The packed copy is made at first use, and whoever knows
    that they have changed tells its product to forget it.

    Attributes:
        layer: the layer that it stands for.
    """

    def __init__(self, product: PackedProduct, index: int) -> None:
        super().__init__()
        self._product, self._index = product, index
        self.layer = product.layers[index]
        self._read = tuple(self.layer.parameters())

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.layer.bias

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if given.requires_grad or any(p.requires_grad for p in self._read):
            return self.layer(given)
        return self._product(given, self._index)


def packed_products(modules: Iterable[nn.Module]) -> list[PackedProduct]:
    """Those that packed layers among the modules are computed by."""
    found = {id(m._product): m._product for m in modules if isinstance(m, PackedLinear)}
    return list(found.values())


def _out_in_weight(layer: Any) -> torch.Tensor:
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def _out_in(layer: Any) -> tuple[int, int]:
    shape = _out_in_weight(layer).shape
    return int(shape[0]), int(shape[1])
