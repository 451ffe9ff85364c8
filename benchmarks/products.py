"""The matrix products that a forward pass cannot do without, and nothing else.

Their time, measured in the same run at the same number of rows, is the floor that ``decode`` and
``training_pass`` compare with. It is closer to what a machine can do than peak figures of its
maker, and it knows the shapes of this model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D


class Products:
    """Products with every weight matrix of a model, layer by layer, the output layer last.

    All weights are read once a pass, as in a forward pass, so that none stays in a cache that is
    smaller than the model.

    Attributes:
        size: N, the elements of all these matrices.
    """

    def __init__(self, model: Any) -> None:
        self._weights: list[torch.Tensor] = []
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                self._weights.append(module.weight.detach())
            elif isinstance(module, Conv1D):  # GPT-2 keeps them transposed
                self._weights.append(module.weight.detach().T)
        if not self._weights:
            raise ValueError(f"{type(model).__name__} has no linear layers")
        self.size = sum(weight.numel() for weight in self._weights)

    def flops(self, rows: int) -> int:
        """Of one pass: a multiplication and an addition for each weight and row."""
        return 2 * self.size * rows

    def inputs(self, rows: int) -> dict[int, torch.Tensor]:
        """Contiguous inputs by width, (rows, width)."""
        first = self._weights[0]
        return {
            width: torch.randn(rows, width, dtype=first.dtype, device=first.device)
            for width in {weight.shape[1] for weight in self._weights}
        }

    @torch.no_grad()
    def run(self, inputs: dict[int, torch.Tensor]) -> None:
        """One pass."""
        for weight in self._weights:
            linear(inputs[weight.shape[1]], weight)
