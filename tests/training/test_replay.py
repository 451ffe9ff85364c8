"""The replay buffer."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import draw_samples, new_guide
from rapidfuzz.distance import Levenshtein

from lmppl import lm_sample
from lmppl.runtime.records import Record
from lmppl.training.samples import ReplayBuffer


def record_of(log_r, ids, theta=None):
    values = {"z": torch.tensor(ids)}
    if theta is not None:
        values["theta"] = torch.tensor(theta)
    return Record(values, log_r=log_r, tokens=tuple(ids))


def rewards(buffer):
    return sorted(record.log_r for record in buffer.records)


def test_the_best_distinct_live_traces_are_kept():
    buffer = ReplayBuffer(capacity=3)
    for log_r, ids in [(-5.0, [1]), (-math.inf, [2]), (-1.0, [3]), (-1.0, [3]), (-9.0, [4])]:
        buffer.add(record_of(log_r, ids))
    assert len(buffer) == 3
    buffer.add(record_of(-2.0, [5]))
    buffer.add(record_of(-20.0, [6]))
    drawn = buffer.draw(10, torch.Generator().manual_seed(0))
    assert sorted(record.log_r for record in drawn) == [-5.0, -2.0, -1.0]


def test_records_of_unknown_reward_are_not_kept():
    buffer = ReplayBuffer()
    buffer.add(Record({"z": torch.tensor([1])}))
    assert len(buffer) == 0


def test_equal_texts_with_other_numbers_are_one():
    buffer = ReplayBuffer()
    buffer.add(record_of(-1.0, [1, 2], theta=0.3))
    buffer.add(record_of(-0.5, [1, 2], theta=0.4))
    assert len(buffer) == 1


def test_equal_texts_with_other_discrete_numbers_are_several():
    """Floating-point as a Bernoulli's are, and however alike the texts."""
    text = list(range(12))
    for near in (0.0, 0.25):
        buffer = ReplayBuffer(near_duplicates=near)
        for k in (0.0, 1.0, 1.0):
            values = {"z": torch.tensor(text), "k": torch.tensor(k)}
            buffer.add(Record(values, log_r=k, tokens=tuple(text), counts=frozenset(["k"])))
        assert rewards(buffer) == [0.0, 1.0]


def test_records_know_their_discrete_latents():
    def program(x):
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("j", dist.Categorical(torch.ones(3)))
        pyro.sample("theta", dist.Beta(1.0, 1.0))
        lm_sample("z", x, max_tokens=2)

    (sample,) = draw_samples(new_guide(program), program, ("ab",), 1)
    assert sample.record.counts == {"k", "j"}


def test_of_near_duplicates_the_best_is_kept():
    buffer = ReplayBuffer(near_duplicates=0.25)
    text = list(range(12))
    one_off, two_off = [*text[:-1], 99], [*text[1:-1], 98, 99]
    far = [*range(20, 32)]
    buffer.add(record_of(-5.0, text))
    buffer.add(record_of(-6.0, one_off))  # worse, and one edit away
    assert rewards(buffer) == [-5.0]
    buffer.add(record_of(-4.0, two_off))  # better, three edits away: not below 12 / 4
    assert rewards(buffer) == [-5.0, -4.0]
    buffer.add(record_of(-3.0, [*text[:5], 77, *text[5:]]))  # an insertion, and better
    buffer.add(record_of(-9.0, far))
    assert rewards(buffer) == [-9.0, -4.0, -3.0]
    # A short text has no near duplicates but itself.
    short = ReplayBuffer(near_duplicates=0.25)
    short.add(record_of(-1.0, [1, 2, 3]))
    short.add(record_of(-2.0, [1, 2, 4]))
    assert len(short) == 2


def test_a_full_buffer_with_near_duplicates_keeps_its_size():
    buffer = ReplayBuffer(capacity=2, near_duplicates=0.25)
    text = list(range(12))
    buffer.add(record_of(-5.0, text))
    buffer.add(record_of(-3.0, list(range(20, 32))))
    buffer.add(record_of(-1.0, [*text[:-1], 99]))  # takes the place of its near duplicate
    assert rewards(buffer) == [-3.0, -1.0]
    buffer.add(record_of(-2.0, list(range(40, 52))))
    assert rewards(buffer) == [-2.0, -1.0]


def test_draws_go_by_rank():
    buffer = ReplayBuffer()
    generator = torch.Generator().manual_seed(0)
    assert buffer.draw(2, generator) == []
    for k in range(4):
        buffer.add(record_of(-100.0 * k, [k]))
    counts = [0, 0, 0, 0]
    for _ in range(3000):
        (record,) = buffer.draw(1, generator)
        counts[round(-record.log_r / 100)] += 1
    total = sum(1 / rank for rank in range(1, 5))
    for k, count in enumerate(counts):
        assert count / 3000 == pytest.approx(1 / (k + 1) / total, abs=0.03)


def test_a_trace_that_has_gone_is_not_put_back():
    """Scored anew, after better ones have taken its place in the same step."""
    buffer = ReplayBuffer(capacity=1)
    old = record_of(-3.0, [1, 2])
    buffer.add(old)
    buffer.add(record_of(-1.0, [2, 2]))
    buffer.replace(old, record_of(-2.0, [1, 2]))
    assert rewards(buffer) == [-1.0]
    buffer.replace(old, record_of(-math.inf, [1, 2]))
    assert rewards(buffer) == [-1.0]


def test_near_duplicates_are_those_of_the_edit_distance():
    generator = torch.Generator().manual_seed(0)
    texts = {
        tuple(torch.randint(3, (int(n),), generator=generator).tolist())
        for n in torch.randint(1, 14, (60,), generator=generator)
    }
    for one in texts:
        buffer = ReplayBuffer(near_duplicates=0.4)
        buffer.records = [record_of(0.0, other) for other in texts]
        near = {key[0][1:] for key in buffer._near(record_of(0.0, one))}
        assert near == {
            other
            for other in texts
            if Levenshtein.distance(one, other) < 0.4 * min(len(one), len(other))
        }
