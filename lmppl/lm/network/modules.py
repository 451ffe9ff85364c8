"""What is asked of any model: copies on the same parameters, whether it changed, checkpointing."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint


def clone(model: torch.nn.Module, replaced: Mapping[Any, Tensor] = MappingProxyType({})) -> Any:
    """A copy of the module tree and its configuration on the same parameters and buffers, but for
    what ``replaced`` puts in the place of some."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo.update((id(old), new) for old, new in replaced.items())
    return copy.deepcopy(model, memo=memo)


def text_config(model: Any) -> Any:
    """The configuration of the part that writes text (some models have several parts)."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: Any) -> int | None:
    """The most tokens of a prefix and its continuation; None if the model has no such limit."""
    config = text_config(model)
    for field in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        length = getattr(config, field, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def plain_logits(model: Any, tokens: Tensor) -> Tensor:
    """The model's own logits (B, T, V) after each of ``tokens`` (B, T)."""
    return model(input_ids=tokens, use_cache=False, return_dict=True).logits


def logits_agree(got: Tensor, want: Tensor, *, exact: bool) -> bool:
    """Whether logits are the same on average, up to rounding (``exact``: that of 32 bits). Those
    that are not finite agree with any: whoever draws from them reports them."""
    want = want.float()
    tolerance = (1e-3 if exact else 0.1) * want.std() + 1e-6
    error = (got.float() - want).abs().mean()
    return not torch.isfinite(want).all() or bool(error <= tolerance)


class WeightWatch:
    """Notices that weights have changed since it was last asked, or which are frozen.

    Writes count a tensor's version up; those through ``.data`` do not, so a few numbers of every
    tensor are compared as well: a change of a single number may go unnoticed. (A step of an
    optimiser writes to all numbers of a tensor that has a gradient.)
    """

    def __init__(self, weights: Iterable[Parameter]) -> None:
        self._weights = tuple(weights)
        self._places: list[Any] = []
        self._versions: list[Any] = []
        self._views: list[list[Tensor]] = []  # of numbers in their places, by device and dtype
        self._numbers: list[Tensor] = []

    def kinds(self) -> list[tuple[torch.dtype, torch.device]]:
        """What the tensors are, whatever stands in them."""
        return [(p.dtype, p.device) for p in self._weights]

    @torch.no_grad()
    def changed(self) -> bool:
        """Whether any of them has; also when it is first asked."""
        places = [(p.data_ptr(), p.requires_grad) for p in self._weights]
        moved = places != self._places
        if moved:
            self._places = places
            views = defaultdict(list)
            for p in self._weights:
                if p.device.type != "meta":
                    views[p.device, p.dtype].append(_some_of(p.detach()))
            self._views = list(views.values())
        versions = [version(p) for p in self._weights]
        numbers = [torch.cat(views) for views in self._views]
        same = versions == self._versions and all(
            torch.equal(new.view(torch.uint8), old.view(torch.uint8))  # by bits, for NaN
            for new, old in zip(numbers, self._numbers, strict=False)
        )
        self._versions, self._numbers = versions, numbers
        return moved or not same


def _some_of(weight: Tensor) -> Tensor:
    """About 8 of its numbers (n,), as a view of its memory if it is contiguous."""
    if weight.is_contiguous():
        return weight.view(-1)[:: max(1, weight.numel() // 8)]
    return weight[tuple(slice(None, None, max(1, -(-n // 3))) for n in weight.shape)].reshape(-1)


def version(tensor: Tensor) -> int:
    """How often it was written to, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version  # the former can't be written to


# What a function returns, computed anew in the backward pass. (Nothing in a pass is random.)
recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


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

    def wrap(self, model: torch.nn.Module) -> None:
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
            return recomputed(forward, *args, **kwargs)

        return run
