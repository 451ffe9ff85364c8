"""Gradient checkpointing of a model's layers: less memory for one more forward pass.

transformers has its own, which drops the key/value cache, and with it a shared prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointing:
    """A switch of the layers that it has wrapped: ``with checkpointing(True):``

    Passes with gradients then keep only what enters each layer, and compute the rest anew in the
    backward pass (Chen et al. 2016, arXiv 1604.06174). Layers must not write to a cache meanwhile.
    """

    def __init__(self) -> None:
        self._on = False

    @contextmanager
    def __call__(self, on: bool) -> Iterator[None]:
        before, self._on = self._on, on
        try:
            yield
        finally:
            self._on = before

    def wrap(self, model: nn.Module) -> None:
        """Put the layers of ``model``, a clone that nobody else uses, under the switch."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = self._switched(layer.forward)

    def _switched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not (self._on and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            # Nothing in a pass is random: there is no dropout.
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

        return run
