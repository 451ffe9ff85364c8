"""Attention to a shared prefix, on transformers' own extension points.

Sequences that share a prefix read one copy of its keys and values: attention to the prefix is one
matrix product for the whole batch, and attention to each row's own suffix one small product a row
(Hydragen, Juravsky et al. 2024, arXiv 2402.05099; here both score blocks meet in one softmax, so
that soft-capping, sinks and sliding windows need no special merging).

A model whose configuration names ``ATTENTION`` calls ``attend`` in every layer; the cache that it
needs comes with the keyword ``lmppl_cache``. Nothing is registered for masks on purpose:
transformers then builds none, and the cache makes the mask from the rows' lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Cache

ATTENTION = "lmppl_shared_prefix"

# Scores of one product, in floats: queries of a long prompt are taken in blocks of this size.
_MAX_SCORES = 1 << 26

LayerKV = tuple[torch.Tensor, torch.Tensor]


class PrefixCache(Cache):
    """Keys and values of one forward pass: a prefix that all rows share, then each row's suffix.

    Slot j of a suffix has position ``prefix_length + j``. A new token t of row b goes to slot
    ``starts[b] + t`` and sees the prefix and the slots up to its own. What lies in later slots
    (padding of ragged batches) is never seen.

    Args:
        prefix: per layer, keys and values (H_kv, P, D); empty if there is no shared prefix.
        prefix_length: P.
    """

    def __init__(self, prefix: Sequence[LayerKV], prefix_length: int) -> None:
        super().__init__(layers=[])
        self.prefix = prefix
        self.prefix_length = prefix_length
        self.suffix: list[LayerKV] = []  # per layer (B, H_kv, S, D)
        self.calls = 0  # of ``attend``, for the probe
        self.windows: list[int | None] = []  # sliding window of each call, for the probe
        self._starts: int | torch.Tensor = 0
        self._masks: dict[Any, torch.Tensor | None] = {}

    def positions(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Positions of the new tokens: (B or 1, T)."""
        steps = torch.arange(num_tokens, device=device) + self.prefix_length
        if isinstance(self._starts, int):
            return (steps + self._starts).unsqueeze(0)
        return steps + self._starts.unsqueeze(1)

    @property
    def is_fresh(self) -> bool:
        """Whether the suffixes consist of the new tokens alone."""
        return isinstance(self._starts, int) and self._starts == 0

    def update(  # type: ignore[override]
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> LayerKV:
        """Keep the new keys and values (B, H_kv, T, D); return those of all suffix slots."""
        if layer_idx != len(self.suffix):
            raise NotImplementedError("layers that share or reorder their keys and values")
        self.suffix.append((key_states, value_states))
        return key_states, value_states

    def hidden_bias(
        self, window: int | None, num_tokens: int, num_slots: int, device: torch.device
    ) -> torch.Tensor | None:
        """What to add to the scores: (B or 1, 1, T, P + S) of 0 and -inf, or None for zeros."""
        key = (window, num_tokens, num_slots)
        if key not in self._masks:
            self._masks[key] = self._make_bias(window, num_tokens, num_slots, device)
        return self._masks[key]

    def _make_bias(
        self, window: int | None, num_tokens: int, num_slots: int, device: torch.device
    ) -> torch.Tensor | None:
        starts, size = self._starts, self.prefix_length + num_slots
        if isinstance(starts, int) and num_tokens == 1 and (window is None or size <= window):
            assert num_slots == starts + 1
            return None
        queries = self.positions(num_tokens, device).unsqueeze(-1)  # (B or 1, T, 1)
        keys = torch.arange(size, device=device)  # (P + S)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        bias = torch.zeros(hidden.shape, device=device)
        return bias.masked_fill_(hidden, float("-inf")).unsqueeze(1)

    # What transformers may ask of a cache besides. It sees no more than the length.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix_length + (self._starts if isinstance(self._starts, int) else 0)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return []


class BufferedCache(PrefixCache):
    """A ``PrefixCache`` whose suffixes grow in preallocated buffers, one token a row at a time.

    Args:
        buffers: per layer, keys and values (B, H_kv, capacity, D).
    """

    def __init__(
        self, prefix: Sequence[LayerKV], prefix_length: int, buffers: list[LayerKV]
    ) -> None:
        super().__init__(prefix, prefix_length)
        self.suffix = buffers
        self._num_slots = 0
        self._slots: dict[int, torch.Tensor] = {}

    def begin(self, lengths: Sequence[int], device: torch.device) -> None:
        """Prepare for one more token in each row; ``lengths``: slots that each row has filled."""
        first = lengths[0]
        even = all(n == first for n in lengths)
        self._starts = first if even else torch.tensor(lengths, device=device)
        self._num_slots = max(lengths) + 1
        self._masks, self._slots = {}, {}

    def update(  # type: ignore[override]
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> LayerKV:
        """Write the new keys and values (B, H_kv, 1, D); return the filled slots."""
        keys, values = self.suffix[layer_idx]
        if isinstance(self._starts, int):
            keys[:, :, self._starts] = key_states[:, :, 0]
            values[:, :, self._starts] = value_states[:, :, 0]
        else:
            heads, capacity = keys.shape[1], keys.shape[2]
            if heads not in self._slots:  # of the buffers seen as (B * H_kv * capacity, D)
                lanes = torch.arange(keys.shape[0] * heads, device=keys.device) * capacity
                self._slots[heads] = lanes + self._starts.repeat_interleave(heads)
            slots = self._slots[heads]
            for buffer, new in ((keys, key_states), (values, value_states)):
                width = new.shape[-1]
                buffer.view(-1, width).index_copy_(0, slots, new.reshape(-1, width))
        n = self._num_slots
        return keys[:, :, :n], values[:, :, :n]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, H, T, D)
    key: torch.Tensor,  # (B, H_kv, S, D), of the suffixes: what PrefixCache.update returned
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    lmppl_cache: PrefixCache | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. Returns (B, T, H, D) and no weights."""
    cache = lmppl_cache
    if cache is None or attention_mask is not None or position_bias is not None or dropout:
        raise NotImplementedError("attention that the shared-prefix path does not know")
    cache.calls += 1
    cache.windows.append(sliding_window)
    heads, num_tokens, width = query.shape[1:]
    scaling = width**-0.5 if scaling is None else scaling
    num_slots, shared = key.shape[2], cache.prefix_length
    plain = softcap is None and s_aux is None
    short = sliding_window is None or num_tokens <= sliding_window
    if num_tokens > 1 and not shared and cache.is_fresh and plain and short:
        # Plain causal attention. (Right padding can't be seen by what stands before it.)
        groups = heads // key.shape[1]
        if groups > 1:
            key = key.repeat_interleave(groups, 1)
            value = value.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    prefix = cache.prefix[module.layer_idx] if shared else None  # type: ignore[call-overload]
    bias = cache.hidden_bias(sliding_window, num_tokens, num_slots, query.device)
    block = max(1, _MAX_SCORES // (query.shape[0] * heads * (shared + num_slots)))
    outs = [
        _attend_block(
            query[:, :, t : t + block],
            key,
            value,
            prefix,
            None if bias is None else bias[:, :, t : t + block],
            scaling,
            softcap,
            s_aux,
        )
        for t in range(0, num_tokens, block)
    ]
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 1)), None


def _attend_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: LayerKV | None,
    bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, num_tokens, width = query.shape
    kv_heads, rows = key.shape[1], heads // key.shape[1] * num_tokens
    query = query.reshape(batch, kv_heads, rows, width)
    scores = query @ key.transpose(-1, -2)  # (B, H_kv, G T, S)
    shared = 0
    if prefix is not None:
        shared = prefix[0].shape[1]
        lanes = query.transpose(0, 1).reshape(kv_heads, batch * rows, width)
        common = lanes @ prefix[0].transpose(-1, -2)  # (H_kv, B G T, P): one product for all rows
        common = common.view(kv_heads, batch, rows, shared).transpose(0, 1)
        scores = torch.cat([common, scores], -1)
    size = scores.shape[-1]
    scores = scores.view(batch, heads, num_tokens, size).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if sinks is not None:
        column = sinks.float().view(1, heads, 1, 1).expand(batch, heads, num_tokens, 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., :size].to(value.dtype)
    weights = weights.reshape(batch, kv_heads, rows, size)
    out = weights[..., shared:] @ value  # (B, H_kv, G T, D_v)
    if prefix is not None:
        lanes = weights[..., :shared].transpose(0, 1).reshape(kv_heads, batch * rows, shared)
        common = (lanes @ prefix[1]).view(kv_heads, batch, rows, -1)
        out = out + common.transpose(0, 1)
    return out.reshape(batch, heads, num_tokens, -1).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, attend)
