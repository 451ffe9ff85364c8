"""What processes tell each other of an input: what is new, in few bytes, and nothing is lost."""

from __future__ import annotations

import pickle

import pytest
import torch

from lmppl.distributions import ToolResult
from lmppl.lm.batches.requests import Scored
from lmppl.runtime.records import Record
from lmppl.training.inputs import Input, Stream
from lmppl.training.kept import hear_news, news_of, state_of_input
from lmppl.training.messages import pack, unpack
from lmppl.training.options import FitOptions


def record(number: int, **facts) -> Record:
    terms = Scored(torch.full((3,), -0.5 * number), torch.full((3,), -1.0))
    z = torch.tensor([number, 1, 2, -1])
    known = {"z": (torch.tensor(-1.5), terms), "y": (torch.tensor(-2.0), None)}
    return Record({"z": z}, known=known, log_r=-float(number), tokens=(number, 1, 2), **facts)


def an_input() -> Input:
    return Input(lambda x: None, ("a",), 0, FitOptions(replay_capacity=4))


def same(one: object, two: object) -> bool:
    """Of nested states: also dtype and shape."""
    if torch.is_tensor(one):
        return torch.is_tensor(two) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


def test_a_message_is_what_was_packed():
    value = {
        "numbers": [torch.arange(6).reshape(2, 3), torch.tensor(1.5), torch.zeros(0)],
        "others": (1, "two", None, {3}, torch.tensor([True, False]), float("inf")),
        "a view": torch.arange(10.0)[2:9:3],
        "short": torch.tensor([1.25], dtype=torch.bfloat16),
        "with gradient": torch.ones(2, requires_grad=True).detach(),
    }
    found = unpack(pickle.loads(pickle.dumps(pack(value))))
    assert same(found, value)
    first, second = unpack(pack([torch.ones(3), torch.zeros(3)]))
    first += 1  # each has numbers of its own
    assert not second.any() and first.untyped_storage().nbytes() == 12
    parameter = torch.nn.Parameter(torch.ones(2))
    assert type(unpack(pack(parameter))) is torch.nn.Parameter  # torch's own way


def test_many_small_tensors_are_a_small_message():
    value = [torch.full((5,), float(number)) for number in range(100)]
    assert len(pickle.dumps(pack(value))) < len(pickle.dumps(value)) / 5


def tell(sender: Input, receivers: list[Input]) -> dict:
    news = news_of(sender)
    for receiver in receivers:
        hear_news(receiver, unpack(pack(news)))
    return news


@pytest.mark.parametrize("seed", range(3))
def test_what_is_new_is_enough(seed):
    """An input falls to one process after another; after each turn all have the same of it."""
    ranks = [an_input() for _ in range(3)]
    generator = torch.Generator().manual_seed(seed)
    numbers = iter(torch.randperm(40, generator=generator).tolist())
    for turn in range(8):
        owner = ranks[turn % 3]
        held = [id(r) for r in ranks[0].buffer.records]
        owner.visits, owner.alive = owner.visits + 1, True
        if turn == 2:
            owner.features = torch.ones(2)
        for _ in range(3):
            owner.buffer.add(record(next(numbers)))
        del owner.stock[-1:]
        owner.stock += [record(next(numbers))] if turn % 2 else []
        if turn == 4:  # scored anew: no record that the others have
            old = owner.buffer.records[1]
            owner.buffer.replace(old, record(old.tokens[0], counts=frozenset("k")))
        news = tell(owner, [rank for rank in ranks if rank is not owner])
        whole = state_of_input(owner)
        assert all(same(state_of_input(rank), whole) for rank in ranks)
        assert ("features" in news) == (turn in (0, 2)) and ("alive" in news) == (turn == 0)
        known = [entry for entry in news["buffer"] if isinstance(entry, int)]
        if owner is not ranks[0] and turn != 6:  # records that a process has stay the same objects
            now = [id(r) for r in ranks[0].buffer.records]
            assert len(known) == len(set(held) & set(now))
        if turn == 5:  # the program has learned: all forget
            assert known
            for rank in ranks:
                rank.forget_scores()
        assert turn != 6 or not known
    assert len(whole["buffer"]) == 4


def test_records_that_cannot_be_sent_are_left_out():
    """They stay with the process that has them, until it is told of the input."""
    tools = {"t": ToolResult.wrap(object(), None)}
    first, second = an_input(), an_input()
    for one in (record(1), record(2, tools=tools), record(3)):
        first.buffer.add(one)
    tell(first, [second])
    assert [r.tokens[0] for r in first.buffer.records] == [1, 2, 3]
    assert [r.tokens[0] for r in second.buffer.records] == [1, 3]
    second.buffer.add(record(4))
    assert tell(second, [first])["buffer"][:2] == [0, 1]
    assert [r.tokens[0] for r in first.buffer.records] == [1, 3, 4]


def test_of_an_input_that_does_not_come_again_no_traces_are_told():
    options = FitOptions()
    (first,), (second,) = (
        Stream(iter([Input(lambda x: None, ("a",), 0, options)])).next(1) for _ in range(2)
    )
    first.buffer.add(record(1))
    first.alive, first.visits = True, 1
    news = tell(first, [second])
    assert news == {"visits": 1, "alive": True, "rejects": False, "features": None}
    assert second.alive and second.visits == 1 and not len(second.buffer)
