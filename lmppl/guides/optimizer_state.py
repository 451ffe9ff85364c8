"""The state of an optimiser as tensors by name, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The state of an optimiser, for each parameter that has had a gradient: ``{name}.{key}``."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    for name, parameter in parameters.items():
        own = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}.") and "." not in key.removeprefix(f"{name}.")
        }
        if own:
            # AdamW counts its steps on the CPU.
            step = {"step": own.pop("step")}
            moved = {k: t.to(parameter.device, parameter.dtype) for k, t in own.items()}
            optimizer.state[parameter] = step | moved
