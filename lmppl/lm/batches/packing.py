"""Packing: many sequences as the rows of one forward pass, each shared beginning read once.

Sorted sequences are the leaves of a tree in depth-first order: each adds to the one before only
what follows their common beginning. A row holds some of them, one after another; it is read with
the mask of a tree (``attention.Tree``). Longer rows share more and pad less, and their attention
costs more, so the length is chosen by an estimate of the whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch

from lmppl.lm.network.attention import Tree
from lmppl.lm.network.runner import Costs, Tokens, common_length

T = TypeVar("T")
_Keyed = tuple[Tokens, int]

# Sequences share a prompt of their own if that saves reading so many tokens.
WORTH_A_PROMPT = 64
_MAX_DEPTH = 32  # of prompts within prompts


@dataclass(eq=False)
class Row:
    """Sequences that are read together.

    Attributes:
        tokens: the nodes of their tree, in depth-first order.
        depths: how many ancestors each node has.
        ends: the first slot behind each node's descendants.
        slots: of each sequence, the slots of all its tokens.
        members: which sequence each of them is.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    slots: list[list[int]]
    members: list[int]

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it."""
        return self.ends[-1] == len(self.tokens) and self.depths[-1] == len(self.tokens) - 1


def pack_rows(sequences: Sequence[Tokens], costs: Costs) -> list[Row]:
    """Rows that hold all sequences.

    Args:
        sequences: non-empty.
        costs: to choose the rows' length by.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    lengths = [len(sequences[i]) for i in order]
    shared = [0]
    for one, other in zip(order, order[1:], strict=False):
        shared.append(common_length(sequences[one], sequences[other]))
    longest = max(lengths)
    caps = sorted({round(longest * factor) for factor in (1, 1.25, 1.5, 2, 3, 4, 6, 8)})

    def cost(cap: int) -> float:
        sizes = _row_sizes(lengths, shared, cap)
        return costs.of(len(sizes), max(sizes))

    best = min(caps, key=cost)
    rows: list[Row] = []
    at = 0
    for size in _row_sizes(lengths, shared, best):
        row, at = _build(sequences, order, lengths, shared, at, size)
        rows.append(row)
    return rows


def _row_sizes(lengths: Sequence[int], shared: Sequence[int], cap: int) -> list[int]:
    """Sizes of the rows, when each takes sequences until it would be longer than ``cap``."""
    sizes: list[int] = []
    for length, common in zip(lengths, shared, strict=True):
        more = length - common
        if sizes and sizes[-1] + more <= cap:
            sizes[-1] += more
        else:
            sizes.append(length)
    return sizes


def _build(
    sequences: Sequence[Tokens],
    order: Sequence[int],
    lengths: Sequence[int],
    shared: Sequence[int],
    at: int,
    size: int,
) -> tuple[Row, int]:
    """The row of ``size`` slots that begins with sequence ``order[at]``; where the next begins."""
    row = Row([], [], [], [], [])
    path: list[int] = []  # slots of the last sequence
    while at < len(order):
        common = shared[at] if path else 0
        if len(row.tokens) + lengths[at] - common > size:
            break
        count = len(row.tokens)
        for slot in path[common:]:
            row.ends[slot] = count
        new = sequences[order[at]][common:]
        path = path[:common] + list(range(count, count + len(new)))
        row.tokens.extend(new)
        row.depths.extend(range(common, common + len(new)))
        row.ends.extend([0] * len(new))
        row.slots.append(path)
        row.members.append(order[at])
        at += 1
    for slot in path:
        row.ends[slot] = len(row.tokens)
    return row, at


def group_by_prefix(items: Sequence[T], shared_of: Callable[[T], Tokens]) -> list[list[T]]:
    """Groups to be read together, each of which shares what is worth reading once.

    Args:
        items: what is read.
        shared_of: the tokens of an item that it may share with others.
    """
    keyed = sorted(((shared_of(item), n) for n, item in enumerate(items)), key=lambda k: k[0])
    groups, rest = _split(keyed, 0, 0)
    return [[items[n] for _, n in group] for group in (*groups, rest) if group]


def _split(keyed: list[_Keyed], known: int, depth: int) -> tuple[list[list[_Keyed]], list[_Keyed]]:
    """Split off groups whose common prefix saves a pass beyond the ``known`` first tokens."""
    common = common_length(keyed[0][0], keyed[-1][0]) if keyed else 0
    groups: list[list[_Keyed]] = []
    rest: list[_Keyed] = []
    most = (len(keyed) - 1) * (max((len(k) for k, _ in keyed), default=0) - common)
    if most < WORTH_A_PROMPT or depth == _MAX_DEPTH:
        rest = keyed
    else:
        for goes_on, branch in groupby(keyed, key=lambda k: k[0][common : common + 1]):
            left = list(branch)
            if goes_on:
                more, left = _split(left, common, depth + 1)
                groups += more
            rest += left
    if len(rest) > 1:
        saved = (len(rest) - 1) * (common_length(rest[0][0], rest[-1][0]) - known)
        if saved >= WORTH_A_PROMPT:
            return [*groups, rest], []
    return groups, rest


def batch(rows: Sequence[Row], device: torch.device) -> tuple[torch.Tensor, Tree | None]:
    """The rows' tokens (B, T), padded on the right with token 0, and how they follow each other
    (None: one after another)."""
    width = max(len(row.tokens) for row in rows)
    tokens = torch.tensor([_filled(row.tokens, width) for row in rows], device=device)
    if all(row.is_chain for row in rows):
        return tokens, None
    # Padding sees itself, so that its softmax is one, and nothing sees it.
    depths = torch.tensor([_filled(row.depths, width) for row in rows], device=device)
    ends = [row.ends + list(range(len(row.ends) + 1, width + 1)) for row in rows]
    return tokens, Tree(depths, torch.tensor(ends, device=device))


def _filled(numbers: list[int], width: int) -> list[int]:
    return numbers + [0] * (width - len(numbers))
