"""What is asked of any model's modules: copies that share parameters, its configuration, its logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import Parameter


def clone(
    model: torch.nn.Module, parameters: Mapping[Parameter, Parameter] = MappingProxyType({})
) -> Any:
    """A copy of the module tree and its configuration on the same parameters and buffers.

    Args:
        model: any module; it is not changed.
        parameters: what stands in the copy for some of the model's parameters.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo.update((id(old), new) for old, new in parameters.items())
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


def plain_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The model's own logits (B, T, V) after each of ``tokens`` (B, T)."""
    return model(input_ids=tokens, use_cache=False, return_dict=True).logits


def logits_agree(got: torch.Tensor, want: torch.Tensor, *, exact: bool) -> bool:
    """Whether logits are the same on average, up to rounding (``exact``: that of 32 bits).

    Logits that are not finite agree with any: whoever draws from them reports them.
    """
    want = want.float()
    tolerance = (1e-3 if exact else 0.1) * want.std() + 1e-6
    finite = bool(torch.isfinite(want).all())
    return not finite or bool((got.float() - want).abs().mean() <= tolerance)
