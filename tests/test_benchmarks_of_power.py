"""The benchmark of power sampling measures what it says."""

import math

import pytest

from benchmarks import power


@pytest.fixture(scope="module")
def task():
    return power.Task(alpha=4.0, max_tokens=3, model_seed=0, contrast=1.0)


def test_the_target_is_the_power_of_whole_texts(task):
    assert math.isclose(sum(task.target.values()), 1.0)
    one, two = list(task.target)[:2]
    texts = [task.lm.vocabulary.decode(ids) for ids in (one, two)]
    assert len(set(texts)) == 2
    assert task.limit > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mcmc, prior", "mcmc, cold, block 2"])
def test_chains_come_nearer_than_low_temperature_can(task, name):
    found, tokens, accepted = power.METHODS[name](task, 640, 0)
    assert power.distance(found, task.target) < 0.7 * task.limit
    assert tokens > 640 and 0.1 < accepted < 1
    low, _, _ = power.low_temperature(task, 640, 0)
    assert abs(power.distance(low, task.target) - task.limit) < 0.06
