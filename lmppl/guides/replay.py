"""The replay buffer: the best distinct traces of one input, drawn again by rank.

Rewards are stored as they are, untempered, and nothing in here depends on the guide. Traces that
differ from a kept one in a few tokens would crowd out the others, so of near duplicates only the
best is kept (as in the code of Hu et al., 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein

from lmppl.guides.records import Record


class ReplayBuffer:
    """Records of one input.

    Args:
        capacity: how many it keeps; beyond it the worst goes.
        near_duplicates: two traces are near duplicates if the edit distance of their latent
            tokens is below this fraction of the shorter one's length, and their other discrete
            latents are equal.
    """

    def __init__(self, capacity: int = 64, near_duplicates: float = 0.0) -> None:
        self._capacity, self._near = capacity, near_duplicates
        self._records: dict[tuple[Any, ...], Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> list[Record]:
        """Those kept, in the order in which they came."""
        return list(self._records.values())

    @records.setter
    def records(self, records: Sequence[Record]) -> None:
        self._records = {record.discrete_key: record for record in records}

    def add(self, record: Record) -> None:
        """Keep a live trace, unless it or a better near duplicate is kept, or it is the worst."""
        if not record.log_r > -math.inf:
            return
        key = record.discrete_key
        if key in self._records:
            return
        if len(self._records) >= self._capacity:
            worst = min(self._records, key=lambda k: self._records[k].log_r)
            if self._records[worst].log_r >= record.log_r:
                return
        near = self._near_duplicates_of(record)
        if any(self._records[k].log_r >= record.log_r for k in near):
            return
        for k in near:
            del self._records[k]
        self._records[key] = record
        if len(self._records) > self._capacity:
            del self._records[worst]

    def replace(self, old: Record, new: Record) -> None:
        """Put the same trace, scored anew, in the place of a kept one (if it still is)."""
        if old.discrete_key not in self._records:
            return
        if new.log_r > -math.inf:
            self._records[old.discrete_key] = new
        else:
            del self._records[old.discrete_key]

    def _near_duplicates_of(self, record: Record) -> list[tuple[Any, ...]]:
        if not self._near:
            return []
        found = []
        for key, other in self._records.items():
            if not record.tokens or not other.tokens or record.counts_key != other.counts_key:
                continue
            bound = self._near * min(len(record.tokens), len(other.tokens))
            # Distances above the cutoff are not computed to their end.
            distance = Levenshtein.distance(
                record.tokens, other.tokens, score_cutoff=math.ceil(bound)
            )
            if distance < bound:
                found.append(key)
        return found

    def draw(self, num: int, generator: torch.Generator) -> list[Record]:
        """``num`` distinct traces (or all there are); the r-th best with weight 1 / r."""
        ranked = sorted(self._records.values(), key=lambda record: -record.log_r)
        num = min(num, len(ranked))
        if not num:
            return []
        weights = 1.0 / torch.arange(1, len(ranked) + 1, dtype=torch.float64)
        picks = torch.multinomial(weights, num, replacement=False, generator=generator)
        return [ranked[k] for k in picks.tolist()]
