"""Attention to shared prefixes, on transformers' own extension points.

Rows that share a prefix read one copy of its keys and values: attention to the prefix is one
matrix product for all of them, and attention to each row's own suffix one small product a row
(Hydragen, Juravsky et al. 2024, arXiv 2402.05099; here both score blocks meet in one softmax, so
that soft-capping, sinks and sliding windows need no special merging). The rows of one batch may
have several prefixes, and a row's suffix may be a tree.

A model that was given to ``use_attention`` calls ``attend`` in every layer, with the cache as the
keyword ``lmppl_cache``. No masks are registered, so that transformers builds none: the cache does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

ATTENTION = "lmppl_shared_prefix"

# Scores (float32) of one product: what a block of queries and rows may have, so that its passes
# over them stay in the processor's cache. (Unblocked, 80 x 128 tokens took 4 times as long.)
_MAX_SCORES = 1 << 21

LayerKV = tuple[Tensor, Tensor]


class Group(NamedTuple):
    """Consecutive rows of a batch that share a prefix."""

    layers: Sequence[LayerKV]  # its keys and values, (H_kv, P, D) a layer; empty if P is 0
    length: int  # P
    num_rows: int


@dataclass(frozen=True, eq=False)
class Tree:
    """Rows whose tokens are the nodes of trees, in depth-first order.

    A token sees its prefix, its ancestors and itself. (A sequence is a tree without branches.)
    """

    depths: Tensor  # (B, T): how many ancestors a token has
    ends: Tensor  # (B, T): its descendants are the slots after its own and before this one


class PrefixCache(Cache):
    """Keys and values of one forward pass: prefixes that rows share, then each row's suffix.

    Without a tree, slot j of a suffix stands at position j after its prefix. A new token t of row b
    goes to slot ``starts[b] + t`` and sees the prefix and the slots up to its own. What lies in
    later slots (padding of ragged batches) is never seen. ``keep``: whether the suffixes are wanted
    after the pass.
    """

    def __init__(
        self, groups: Sequence[Group], *, tree: Tree | None = None, keep: bool = True
    ) -> None:
        super().__init__(layers=[])
        self.groups = groups  # in the order of their rows
        self.tree = tree  # how the new tokens follow each other, if not one after another
        self.suffix: list[LayerKV] = []  # per layer (B, H_kv, S, D), if they are kept
        self.calls = 0  # of ``attend``, for the probe
        self.windows: list[int | None] = []  # sliding window of each call, for the probe
        self._keep = keep
        self._starts: int | Tensor = 0
        self._offsets: int | Tensor | None = None  # positions of the first slots
        self._biases: dict[Any, Tensor | None] = {}

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Positions of the new tokens: (B or 1, T)."""
        if self._offsets is None:
            self.prepare(device)
        assert self._offsets is not None
        return self.slots(num_tokens, device) + self._offsets

    def prepare(self, device: torch.device) -> None:
        """Bring what depends on the groups alone to the device; again when they have changed."""
        lengths = [group.length for group in self.groups]
        if len(set(lengths)) == 1:
            self._offsets = lengths[0]
        else:
            of_rows = [group.length for group in self.groups for _ in range(group.num_rows)]
            self._offsets = torch.tensor(of_rows, device=device).unsqueeze(1)  # (B, 1)

    def slots(self, num_tokens: int, device: torch.device) -> Tensor:
        """How far behind their prefixes the new tokens stand: (B or 1, T)."""
        if self.tree is not None:
            return self.tree.depths
        steps = torch.arange(num_tokens, device=device)
        if isinstance(self._starts, int):
            return (steps + self._starts).unsqueeze(0)
        return steps + self._starts.unsqueeze(1)

    @property
    def is_causal(self) -> bool:
        """Whether the suffixes consist of the new tokens alone, one after another."""
        return self.tree is None and isinstance(self._starts, int) and self._starts == 0

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> LayerKV:
        """Keep the new keys and values (B, H_kv, T, D); return those of all suffix slots."""
        if self._keep:
            if layer_idx != len(self.suffix):
                raise NotImplementedError("layers that share or reorder their keys and values")
            self.suffix.append((key_states, value_states))
        return key_states, value_states

    def bias(
        self, group: int, rows: slice, window: int | None, query: Tensor, key: Tensor
    ) -> Tensor | None:
        """What to add to a group's scores: (R or 1, 1, T, P + S) of 0 and -inf; None for zeros.

        Args:
            group, rows: which one, and its R rows.
            window: how many tokens a token sees, with itself; None for all.
            query, key: (B, H, T, D) of the new tokens, (B, H_kv, S, D) of the suffixes.
        """
        num_tokens, num_slots, device = query.shape[2], key.shape[2], query.device
        kind = (group, window, num_tokens, num_slots)
        if kind in self._biases:
            return self._biases[kind]
        prefix, starts = self.groups[group].length, self._starts
        even = self.tree is None and isinstance(starts, int)
        if even and num_tokens == 1 and (window is None or prefix + num_slots <= window):
            assert num_slots == starts + 1  # type: ignore[operator]
            return None
        at = self.slots(num_tokens, device)  # (B or 1, T)
        at = (at if len(at) == 1 else at[rows]).unsqueeze(-1)  # (R or 1, T, 1)
        slots = torch.arange(num_slots, device=device)
        if self.tree is None:
            hidden = slots > at
            stands = slots.expand(1, 1, -1)
        else:
            nodes = torch.arange(num_tokens, device=device).unsqueeze(-1)
            hidden = (slots > nodes) | (self.tree.ends[rows].unsqueeze(1) <= nodes)
            stands = self.tree.depths[rows].unsqueeze(1)  # (R, 1, S)
        before = torch.zeros(*hidden.shape[:-1], prefix, dtype=torch.bool, device=device)
        if window is not None:
            hidden = hidden | (stands <= at - window)
            before = before | (torch.arange(prefix, device=device) - prefix <= at - window)
        hidden = torch.cat([before, hidden], -1).unsqueeze(1)
        bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
        self._biases[kind] = bias
        return bias

    # What transformers may ask of a cache besides.
    is_compileable = False
    is_sliding = ()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.groups[0].length + (self._starts if isinstance(self._starts, int) else 0)


class BufferedCache(PrefixCache):
    """A ``PrefixCache`` whose suffixes grow in preallocated buffers, one token a row at a time. The
    buffers are keys and values per layer, (B, H_kv, capacity, D)."""

    def __init__(self, groups: Sequence[Group], buffers: list[LayerKV]) -> None:
        super().__init__(groups)
        self.suffix = buffers
        self._num_slots = 0
        self._slots: dict[int, Tensor] = {}

    def begin(self, lengths: Sequence[int], device: torch.device) -> None:
        """Prepare for one more token in each row; ``lengths``: slots that each row has filled."""
        first = lengths[0]
        even = all(n == first for n in lengths)
        self.begin_at(first if even else torch.tensor(lengths, device=device), max(lengths) + 1)

    def begin_at(self, starts: int | Tensor, num_slots: int) -> None:
        """The same from where the rows' new slots are, one for all or (B,), and how many slots of
        the buffers are looked at. With a tensor, nothing is read back from the device."""
        self._starts = starts
        self._num_slots = num_slots
        self._biases, self._slots = {}, {}

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
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
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, H_kv, S, D), of the suffixes: what PrefixCache.update returned
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    lmppl_cache: PrefixCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. Returns (B, T, H, D) and no weights."""
    cache = lmppl_cache
    if cache is None or attention_mask is not None or position_bias is not None or dropout:
        raise NotImplementedError("attention that the shared-prefix path does not know")
    cache.calls += 1
    cache.windows.append(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain, num_tokens = softcap is None and s_aux is None, query.shape[2]
    is_causal = plain and num_tokens > 1 and cache.is_causal
    is_causal = is_causal and (sliding_window is None or num_tokens <= sliding_window)
    # torch's fused kernel beats the products below, by measurement (docs/design.md), but for a
    # single token a row, and for 16-bit numbers on a CPU.
    is_fast = query.device.type != "cpu" or query.dtype == torch.float32
    is_fused = plain and num_tokens > 1 and is_fast
    outs = []
    first = 0
    for number, group in enumerate(cache.groups):
        rows = slice(first, first + group.num_rows)
        first = rows.stop
        prefix = group.layers[module.layer_idx] if group.length else None  # type: ignore[call-overload]
        block = _Block(query[rows], key[rows], value[rows], prefix, None, scale, softcap, s_aux)
        if is_causal and prefix is None:  # (nothing sees the padding on its right)
            outs.append(_fused(block, is_causal=True))
            continue
        block = block._replace(bias=cache.bias(number, rows, sliding_window, query, key))
        outs.append(_fused(block) if is_fused else _in_blocks(block))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)), None


class _Block(NamedTuple):
    """Queries of some tokens of some rows, and what they attend to."""

    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, H_kv, S, D)
    value: Tensor
    prefix: LayerKV | None
    bias: Tensor | None  # (B or 1, 1, T, P + S)
    scale: float
    softcap: float | None
    sinks: Tensor | None


def _fused(block: _Block, *, is_causal: bool = False) -> Tensor:
    """With a copy of the prefix for every row, which is small beside scores of many tokens."""
    query, key, value, prefix, bias, scale, *_ = block
    if prefix is not None:
        rows = key.shape[0]
        key = torch.cat([prefix[0].expand(rows, -1, -1, -1), key], 2)
        value = torch.cat([prefix[1].expand(rows, -1, -1, -1), value], 2)
    mask = None if bias is None else bias.to(query.dtype)
    num_sharing = query.shape[1] // key.shape[1]  # heads with the same keys and values
    if is_causal and num_sharing > 1:  # not every fast kernel, of every torch, can share them
        key, value = (t.repeat_interleave(num_sharing, 1) for t in (key, value))
        num_sharing = 1
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=num_sharing > 1
    )
    return out.transpose(1, 2).contiguous()


def _in_blocks(block: _Block) -> Tensor:
    """``_attend_block`` of some rows, and of some tokens if one row is too much, at a time."""
    query, key, value, prefix, bias, *_ = block
    batch, heads, num_tokens, _ = query.shape
    size = key.shape[2] + (0 if prefix is None else prefix[0].shape[1])
    rows = max(1, _MAX_SCORES // (heads * num_tokens * size))
    tokens = max(1, _MAX_SCORES // (heads * size)) if rows == 1 else num_tokens
    outs = []
    for part in (slice(b, b + rows) for b in range(0, batch, rows)):
        blocks = []
        of_part = block._replace(key=key[part], value=value[part])
        for span in (slice(t, t + tokens) for t in range(0, num_tokens, tokens)):
            some = None
            if bias is not None:
                some = (bias if len(bias) == 1 else bias[part])[:, :, span]
            blocks.append(_attend_block(of_part._replace(query=query[part, :, span], bias=some)))
        outs.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_block(block: _Block) -> Tensor:
    query, key, value, prefix, bias, scale, softcap, sinks = block
    batch, heads, num_tokens, width = query.shape
    kv_heads, rows = key.shape[1], heads // key.shape[1] * num_tokens
    query = query.reshape(batch, kv_heads, rows, width)
    if num_tokens == 1:
        # The long side first: 2-3 times as fast in bfloat16 on a CPU.
        scores = (key @ query.transpose(-1, -2)).transpose(-1, -2)
    else:
        scores = query @ key.transpose(-1, -2)  # (B, H_kv, G T, S)
    shared = 0
    if prefix is not None:
        shared = prefix[0].shape[1]
        lanes = query.transpose(0, 1).reshape(kv_heads, batch * rows, width)
        common = lanes @ prefix[0].transpose(-1, -2)  # (H_kv, B G T, P): one product for all rows
        common = common.view(kv_heads, batch, rows, shared).transpose(0, 1)
        scores = torch.cat([common, scores], -1)
    size = scores.shape[-1]
    scores = scores.reshape(batch, heads, num_tokens, size).float() * scale
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


def use_attention(model: Any) -> None:
    """Let every layer of a model, a clone that nobody else uses, call ``attend``."""
    # Not at the top: it imports all of transformers' modelling, which takes seconds.
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    model.config._attn_implementation = ATTENTION
