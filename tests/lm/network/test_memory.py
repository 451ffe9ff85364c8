from __future__ import annotations

import pytest
import torch

import lmppl
from lmppl.lm import begin_draws
from lmppl.lm.batches.requests import Draw, Score
from lmppl.lm.network.memory import Memory
from lmppl.lm.tokens.stopping import Stopping
from lmppl.testing import tiny_lm


@pytest.mark.parametrize("name", ["batch_bytes", "training_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_bounds_are_positive(name, value):
    with pytest.raises(
        (TypeError, ValueError), match=f"{name}={value}: it must be an int of at least 1"
    ):
        Memory(**{name: value})


def test_half_of_what_is_free():
    cpu = torch.device("cpu")
    assert Memory().available(cpu) > 1 << 20
    assert Memory(batch_bytes=123).available(cpu) == 123


def draws(lm, num):
    stopping = Stopping(lm.vocabulary, ".", 6)
    uniforms = torch.rand(num, 6, dtype=torch.float64, generator=torch.manual_seed(3))
    prefixes = [(0, 1, 2) * 4, (2, 1, 0) * 3]
    return [(lm, Draw(prefixes[i % 2], stopping, u)) for i, u in enumerate(uniforms)]


@pytest.mark.parametrize("ancestors", [None, [3, 3, 0, 9, 1, 1, 6, 7, 8, 2]])
def test_a_batch_that_does_not_fit_is_split_and_draws_the_same(ancestors):
    results = []
    for memory in (Memory(), Memory(batch_bytes=1), Memory(batch_bytes=40_000)):
        lm = tiny_lm("ab.")
        lm.memory = memory
        decoding = begin_draws(draws(lm, 10))
        results.append([])
        sizes = [len(batch.slots) for batch in decoding._batches]
        rows = lm.runner.batch_rows(12 + 6)
        assert sum(sizes) == 10 and max(sizes) <= rows
        assert (len(sizes) == 1) == (memory == Memory())
        decoding.step()
        if ancestors:
            decoding.select(ancestors)
        while not decoding.done:
            decoding.step()
        results[-1] = decoding.results()
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.token_ids == two.token_ids and one.reason == two.reason
            torch.testing.assert_close(one.log_probs, two.log_probs, atol=1e-5, rtol=0)


def test_passes_are_bounded():
    lm = tiny_lm("ab.")
    runner = lm.runner
    assert runner.fast
    for size, tokens in ((1, 1), (60 * runner.activation_bytes, 10)):
        runner.memory = Memory(batch_bytes=size)
        assert runner.pass_tokens == tokens
    seen = []
    run = runner.run_cached
    runner.run_cached = lambda tokens, *args: seen.append(tokens.numel()) or run(tokens, *args)
    lm.memory = Memory(batch_bytes=180 * runner.activation_bytes)
    lm.score([Score((0, k, 1), (1, 0, 1, k)) for k in range(3)] * 4)
    lm.score([Score((0, 1, k, k), (1, 0, j, k)) for k in range(3) for j in range(3)])
    assert max(seen) <= 30 and len(seen) > 2


def test_adapters_begin_with_the_memory_of_their_base():
    lm = tiny_lm("ab.")
    lm.memory = lmppl.Memory(training_tokens=100)
    assert lm.adapter().memory == lm.memory
