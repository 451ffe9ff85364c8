"""Packing: many sequences as the rows of one forward pass, each shared beginning read once.

Sorted sequences are the leaves of a tree in depth-first order: each adds to the one before only
what follows their common beginning. A row holds some of them, one after another; it is read with
the mask of a tree (``attention.Tree``). Longer rows share more and pad less, and their attention
costs more, so the length is chosen by an estimate of the whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeVar

import torch

from lmppl.lm.network.attention import Tree
from lmppl.lm.network.runner import Tokens, common_length, padded

T = TypeVar("T")
_Keyed = tuple[Tokens, int]

# Sequences share a prompt of their own if that saves reading so many tokens.
WORTH_A_PROMPT = 64
_MAX_DEPTH = 32  # of prompts within prompts


@dataclass(eq=False)
class Row:
    """Sequences that are read together."""

    tokens: list[int]  # the nodes of their tree, in depth-first order
    depths: list[int]  # how many ancestors each node has
    ends: list[int]  # the first slot behind each node's descendants
    slots: list[list[int]]  # of each sequence, the slots of all its tokens
    members: list[int]  # which sequence each of them is


def pack_rows(sequences: Sequence[Tokens], cost: Callable[[int, int], float]) -> list[Row]:
    """Rows that hold all of the non-empty sequences, of the length at which they cost least, where
    ``cost`` is that of a pass by the number of its rows and their length."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    lengths = [len(sequences[i]) for i in order]
    shared = [0]
    for one, other in zip(order, order[1:], strict=False):
        shared.append(common_length(sequences[one], sequences[other]))
    caps = sorted({round(max(lengths) * factor) for factor in (1, 1.25, 1.5, 2, 3, 4, 6, 8)})
    divisions = [_divide(lengths, shared, cap) for cap in caps]
    starts, _ = min(divisions, key=lambda division: cost(len(division[0]), division[1]))
    return [
        _build(sequences, order[start:end], shared[start:end])
        for start, end in pairwise([*starts, len(order)])
    ]


def _divide(lengths: Sequence[int], shared: Sequence[int], cap: int) -> tuple[list[int], int]:
    """Where rows begin if each takes sequences until it would be longer than ``cap``, and the
    length of the longest row."""
    starts: list[int] = []
    size = longest = 0
    for at, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        if starts and size + length - common <= cap:
            size += length - common
        else:
            starts.append(at)
            size = length
        longest = max(longest, size)
    return starts, longest


def _build(sequences: Sequence[Tokens], members: Sequence[int], shared: Sequence[int]) -> Row:
    """The row of some sequences, of which each but the first shares so much with the one before."""
    row = Row([], [], [], [], [])
    path: list[int] = []  # slots of the last sequence
    for member, common in zip(members, shared, strict=True):
        common = common if path else 0
        count = len(row.tokens)
        for slot in path[common:]:
            row.ends[slot] = count
        new = sequences[member][common:]
        path = path[:common] + list(range(count, count + len(new)))
        row.tokens.extend(new)
        row.depths.extend(range(common, common + len(new)))
        row.ends.extend([0] * len(new))
        row.slots.append(path)
        row.members.append(member)
    for slot in path:
        row.ends[slot] = len(row.tokens)
    return row


def group_by_prefix(items: Sequence[T], shared_of: Callable[[T], Tokens]) -> list[list[T]]:
    """Groups to be read together, each of which shares what is worth reading once. ``shared_of`` an
    item are the tokens that it may share."""
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
    tokens = padded([row.tokens for row in rows], device)
    if all(row.depths[-1] == len(row.tokens) - 1 for row in rows):  # a chain, with no branch
        return tokens, None
    # Padding sees itself, so that its softmax is one, and nothing sees it.
    width = tokens.shape[1]
    ends = [row.ends + list(range(len(row.ends) + 1, width + 1)) for row in rows]
    depths = padded([row.depths for row in rows], device)
    return tokens, Tree(depths, torch.tensor(ends, device=device))
