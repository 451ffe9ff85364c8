"""Rows: a batch of sequences, their keys and values, and the next token's logits of each.

A batch is started once and then grows by a token a row; rows can be copied, dropped and reordered
in between. What all of them have in common is held once and never copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from lmppl.lm.attention import BufferedCache, LayerKV, PrefixCache
from lmppl.lm.runner import Prompt, Runner, Tokens, padded, without_grad

_FIRST_CAPACITY = 64  # slots that are allocated before they are needed


class Rows(ABC):
    """A batch of sequences.

    Attributes:
        logits: (B, V) of the model's dtype: the next token's logits of every row.
    """

    logits: torch.Tensor

    @staticmethod
    def start(runner: Runner, prefixes: Sequence[Tokens], max_new: int) -> Rows:
        """Read the prefixes: what they share once, and then each distinct remainder once.

        Args:
            runner: of the model.
            prefixes: one a row, none of them empty.
            max_new: how many tokens a row will get at most.

        Raises:
            ValueError: no prefix, or an empty one.
        """
        if not prefixes or not all(prefixes):
            raise ValueError(
                "a batch needs at least one prefix, and each prefix at least one token (a model "
                "without a BOS token cannot continue an empty text)"
            )
        kind = CachedRows if runner.fast else PlainRows
        return kind(runner, prefixes, max_new)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def extend(self, tokens: torch.Tensor | Sequence[int]) -> None:
        """Append one token to each row: (B,). Updates ``logits``."""

    @abstractmethod
    def select(self, index: torch.Tensor | Sequence[int]) -> None:
        """Row i becomes a copy of row ``index[i]``; there are ``len(index)`` rows then."""


class CachedRows(Rows):
    """Rows whose keys and values are kept."""

    @without_grad
    def __init__(self, runner: Runner, prefixes: Sequence[Tokens], max_new: int) -> None:
        self._runner = runner
        self._prompt: Prompt = runner.shared_prompt(prefixes)
        known = len(self._prompt.tokens)
        distinct: dict[Tokens, int] = {}
        index = [distinct.setdefault(prefix[known:], len(distinct)) for prefix in prefixes]
        rest = list(distinct)
        tokens = padded(rest, runner.device)
        width = tokens.shape[1]
        last = [n * width + len(r) - 1 for n, r in enumerate(rest)]
        cache = PrefixCache(self._prompt.layers, known)
        logits = runner.run_cached(tokens, cache, torch.tensor(last, device=tokens.device))
        at = torch.tensor(index, device=tokens.device)
        self.logits = logits.index_select(0, at)
        self._lengths = [len(rest[i]) for i in index]  # filled slots
        self._most = width + max_new
        self._capacity = min(self._most, width + _FIRST_CAPACITY)
        self._buffers: list[LayerKV] = [
            (self._buffer(k, at, width), self._buffer(v, at, width)) for k, v in cache.suffix
        ]
        self._cache = BufferedCache(self._prompt.layers, known, self._buffers)

    def _buffer(self, old: torch.Tensor, index: torch.Tensor, filled: int) -> torch.Tensor:
        """Rows ``index`` of the filled slots, with room for more: (B, H_kv, capacity, D)."""
        # Zeros, as 0 times whatever stands in unused memory need not be 0.
        new = old.new_zeros(len(index), old.shape[1], self._capacity, old.shape[3])
        new[:, :, :filled] = old[:, :, :filled].index_select(0, index)
        return new

    def __len__(self) -> int:
        return len(self._lengths)

    @without_grad
    def extend(self, tokens: torch.Tensor | Sequence[int]) -> None:
        device = self._runner.device
        filled = max(self._lengths)
        if filled == self._capacity:
            self._gather(list(range(len(self))), min(max(self._most, filled + 1), 2 * filled))
        self._cache.begin(self._lengths, device)
        tokens = torch.as_tensor(tokens, dtype=torch.long, device=device)
        self.logits = self._runner.run_cached(tokens.unsqueeze(1), self._cache)
        self._lengths = [n + 1 for n in self._lengths]

    @without_grad
    def select(self, index: torch.Tensor | Sequence[int]) -> None:
        rows = [int(i) for i in index]
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        # In place if no row is read after it was overwritten: then only what moves is copied.
        written = {new for new, _ in moved}
        if len(rows) > len(self) or any(old in written for _, old in moved):
            self._gather(rows, self._capacity)
            return
        filled = max(self._lengths)
        device = self.logits.device
        if moved:
            new = torch.tensor([n for n, _ in moved], device=device)
            old = torch.tensor([o for _, o in moved], device=device)
            self.logits = self.logits.index_copy(0, new, self.logits.index_select(0, old))
            for layer in self._buffers:
                for buffer in layer:
                    part = buffer[:, :, :filled]
                    part.index_copy_(0, new, part.index_select(0, old))
        if len(rows) < len(self):
            self.logits = self.logits[: len(rows)]
            self._buffers[:] = [(k[: len(rows)], v[: len(rows)]) for k, v in self._buffers]
        self._lengths = [self._lengths[i] for i in rows]

    def _gather(self, rows: list[int], capacity: int) -> None:
        self._capacity = capacity
        filled = max(self._lengths)
        at = torch.tensor(rows, device=self.logits.device)
        self._buffers[:] = [
            (self._buffer(k, at, filled), self._buffer(v, at, filled)) for k, v in self._buffers
        ]
        self.logits = self.logits.index_select(0, at)
        self._lengths = [self._lengths[i] for i in rows]


class PlainRows(Rows):
    """Rows without a cache: every step reads everything anew. For models whose attention cannot
    be reached, and as the reference that ``CachedRows`` must equal."""

    def __init__(self, runner: Runner, prefixes: Sequence[Tokens], max_new: int) -> None:
        self._runner = runner
        self._sequences = list(prefixes)
        self._run()

    @without_grad
    def _run(self) -> None:
        distinct: dict[Tokens, int] = {}
        index = [distinct.setdefault(s, len(distinct)) for s in self._sequences]
        tokens = padded(list(distinct), self._runner.device)
        width = tokens.shape[1]
        last = [n * width + len(s) - 1 for n, s in enumerate(distinct)]
        logits = self._runner.run_plain(tokens, torch.tensor(last, device=tokens.device))
        self.logits = logits.index_select(0, torch.tensor(index, device=tokens.device))

    def __len__(self) -> int:
        return len(self._sequences)

    def extend(self, tokens: torch.Tensor | Sequence[int]) -> None:
        new = [int(t) for t in tokens]
        self._sequences = [(*s, t) for s, t in zip(self._sequences, new, strict=True)]
        self._run()

    def select(self, index: torch.Tensor | Sequence[int]) -> None:
        rows = [int(i) for i in index]
        self._sequences = [self._sequences[i] for i in rows]
        self.logits = self.logits.index_select(0, torch.tensor(rows, device=self.logits.device))
