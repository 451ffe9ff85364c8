"""Frozen linear layers, laid out for the CPU's matrix kernels and fused where they read one input.

A matrix product with few rows spends much of its time on bringing the weights into the layout that
the kernel wants. Frozen weights are brought into it once, by oneDNN (measured in
docs/performance.md). Layers that are given the very same tensor (queries, keys and values; gate and
up) become one product. The packed weights are a second copy, made for a clone of the model.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmppl.lm.meter.roofline import Product
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
    size = sum(layer.weight.nbytes for layer in packable_layers(model).values())
    return 0 < size <= _MAX_PACKED_BYTES


def packable_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers that can be packed, by name."""
    dtypes = [torch.float32]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # else oneDNN raises
        dtypes.append(torch.bfloat16)
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, Conv1D)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in dtypes
        and not layer.weight.requires_grad
    }


def input_groups(model: nn.Module, run: Callable[[], Any]) -> list[list[str]]:
    """Names of packable layers, in groups that read the same input one after another in the forward
    pass that ``run`` makes. A layer that is called more than once is a group by itself."""
    calls: list[tuple[str, Tensor]] = []  # the tensors, so that ids stay unique
    with ExitStack() as hooks:
        for name, layer in packable_layers(model).items():

            def note(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                calls.append((name, args[0]))

            hooks.callback(layer.register_forward_pre_hook(note).remove)
        run()
    counts = Counter(name for name, _ in calls)
    once = [(name, given) for name, given in calls if counts[name] == 1]
    groups = [[name for name, _ in same] for _, same in groupby(once, lambda call: id(call[1]))]
    return groups + [[name] for name, count in counts.items() if count > 1]


def pack(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Replace linear layers of ``model``, a clone that nobody else uses, by packed ones: those of
    each of the groups that ``input_groups`` gives by one product."""
    layers = packable_layers(model)
    for names in groups:
        product = PackedProduct([layers[name] for name in names])
        for index, name in enumerate(names):
            model.set_submodule(name, PackedLinear(product, index))


class PackedProduct:
    """One packed product of all layers that read one input."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._sizes = [len(_out_in_weight(layer)) for layer in layers]
        self._packed: Tensor | None = None
        self._bias: Tensor | None = None
        self._input: Tensor | None = None  # what the outputs at hand were made of
        self._version = 0
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, given: Tensor, index: int) -> Tensor:
        if index == 0 or self._input is not given or self._version != version(given):
            self._outputs = self.multiply(given).split(self._sizes, -1)
            self._input, self._version = given, version(given)
        output = self._outputs[index]
        if index == len(self._sizes) - 1:
            self._input, self._outputs = None, ()
        return output

    @property
    def product(self) -> Product:
        """The product of all layers together."""
        width = int(_out_in_weight(self.layers[0]).shape[1])
        return Product((sum(self._sizes), width), self.multiply)

    def multiply(self, given: Tensor) -> Tensor:
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
                both = zip(biases, self._sizes, strict=True)
                parts = [whole.new_zeros(n) if bias is None else bias.detach() for bias, n in both]
                self._bias = torch.cat(parts)


class PackedLinear(nn.Module):
    """Stands for a frozen linear ``layer``, and computes its product by a packed copy of its
    weights.

    The packed copy is made at first use. Whoever knows that the layer's parameters have changed
    tells the product to forget it.
    """

    def __init__(self, product: PackedProduct, index: int) -> None:
        super().__init__()
        self._product, self._index = product, index
        self.layer = product.layers[index]
        self._read = tuple(self.layer.parameters())

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, given: Tensor) -> Tensor:
        if given.requires_grad or any(p.requires_grad for p in self._read):
            return self.layer(given)
        return self._product(given, self._index)


def packed_products(modules: Iterable[nn.Module]) -> list[PackedProduct]:
    """Those that packed layers among the modules are computed by."""
    return list(dict.fromkeys(m._product for m in modules if isinstance(m, PackedLinear)))


def _out_in_weight(layer: Any) -> Tensor:
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight
