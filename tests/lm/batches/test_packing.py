from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppl.lm.batches.packing import batch, group_by_prefix, pack_rows


def cost(score, prefix):
    """Of rows after a prefix, if attending to a token costs so much of reading one."""
    return lambda num_rows, length: num_rows * length * (1 + score * (prefix + length))


LINEAR = cost(0.0, 0)
sequences = st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple)


@given(st.lists(st.lists(st.integers(0, 2), max_size=150).map(tuple), max_size=15))
@settings(max_examples=60, deadline=None)
def test_groups_are_a_partition(items):
    groups = group_by_prefix(items, lambda item: item)
    assert sorted(item for group in groups for item in group) == sorted(items)
    assert all(groups)


def test_groups_split_what_shares_much():
    x, y = (0,) + (1,) * 100, (0,) + (2,) * 100
    assert sorted(map(len, group_by_prefix([x, y, x, y, x], lambda t: t))) == [2, 3]
    assert len(group_by_prefix([x[:9], y[:9], x[:8]], lambda t: t)) == 1
    deep = [(1,) * n for n in range(1, 2000)]  # every one the prefix of the next
    assert sum(map(len, group_by_prefix(deep, lambda t: t))) == 1999


@given(st.lists(sequences, min_size=1, max_size=12), st.sampled_from([0.0, 0.02, 1.0]))
@settings(max_examples=150, deadline=None)
def test_rows_hold_every_sequence_once_and_each_token_sees_its_own_past(items, score):
    rows = pack_rows(items, cost(score, 5))
    assert sorted(member for row in rows for member in row.members) == list(range(len(items)))
    tokens, tree = batch(rows, torch.device("cpu"))
    width = tokens.shape[1]
    for number, row in enumerate(rows):
        for member, slots in zip(row.members, row.slots, strict=True):
            assert tuple(tokens[number, slots].tolist()) == items[member]
            for n, slot in enumerate(slots):
                seen = _seen(tree, number, slot, width)
                assert seen == slots[: n + 1]
                assert (slot if tree is None else int(tree.depths[number, slot])) == n
        if tree is not None:  # padding: seen by nobody (checked above), and not blind
            for slot in range(len(row.tokens), width):
                assert slot in _seen(tree, number, slot, width)


def _seen(tree, row, slot, width):
    if tree is None:
        return list(range(slot + 1))
    ends = tree.ends[row].tolist()
    return [j for j in range(width) if j <= slot < ends[j]]


def test_what_is_shared_within_a_row_is_read_once():
    z = tuple(range(16))
    items = [z[:t] + (99,) * 24 for t in range(1, 17)]  # y after each token of z
    rows = pack_rows(items, LINEAR)
    assert sum(len(row.tokens) for row in rows) < sum(map(len, items))
    assert sum(len(row.tokens) for row in pack_rows([z, z, z[:5]], LINEAR)) == 16


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_equal_lengths_are_never_padded(score):
    items = [(k, *range(39)) for k in range(64)]
    rows = pack_rows(items, cost(score, 128))
    assert len({len(row.tokens) for row in rows}) == 1


def test_rows_are_short_where_attention_is_dear():
    items = [(k, *range(39)) for k in range(64)]
    assert max(len(row.tokens) for row in pack_rows(items, cost(1.0, 0))) == 40


def test_chains_need_no_mask():
    rows = pack_rows([(1, 2, 3), (2, 3, 4)], cost(1e6, 0))
    tokens, tree = batch(rows, torch.device("cpu"))
    assert tree is None and tokens.tolist() == [[1, 2, 3], [2, 3, 4]]
