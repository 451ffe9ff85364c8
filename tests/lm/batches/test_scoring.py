from __future__ import annotations

import functools
import math
import random

import pytest
import torch
from architectures import FAST, SIZE, make_model, naive_log_probs
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppl.lm.batches.requests import Score
from lmppl.lm.batches.scoring import hidden, score
from lmppl.lm.network.memory import Memory
from lmppl.lm.network.runner import Runner
from lmppl.testing.tiny import tiny_lm


def runner_of(model, memory=None):
    runner = Runner(model)
    runner.memory = memory or runner.memory
    return runner


def random_tokens(n, seed):
    generator = random.Random(seed)
    return tuple(generator.randrange(SIZE) for _ in range(n))


X = random_tokens(25, 0)


def naive(model, request, temperature=None):
    """(log p of the tokens, log p of the closing token), from one bare forward pass."""
    n, m = len(request.prefix), len(request.continuation)
    logits = naive_log_probs(model, (*request.prefix, *request.continuation))[n - 1 : n - 1 + m]
    log_probs = torch.log_softmax(logits / request.temperature, -1)
    closing = None
    if request.closing_token is not None:
        closing = log_probs[:, request.closing_token]
    return log_probs.gather(1, torch.tensor([request.continuation]).T)[:, 0], closing


def assert_naive(model, requests, scored):
    assert_equal([naive(model, request) for request in requests], scored)


def assert_equal(expected, scored):
    for (want, closing), got in zip(expected, scored, strict=True):
        assert got.log_probs.dtype == torch.float32
        torch.testing.assert_close(got.log_probs.detach(), want, atol=1e-4, rtol=0)
        if closing is None:
            assert got.closing_log_probs is None
        else:
            got_closing = got.closing_log_probs.detach()
            torch.testing.assert_close(got_closing, closing, atol=1e-4, rtol=0)


def mixed_requests():
    y = random_tokens(6, 1)
    other = random_tokens(30, 2)
    return [
        *[Score((*X, *random_tokens(k % 5, k)), y, 1.0, 3) for k in range(12)],  # y after x + z
        *[Score(X, random_tokens(k, k), 0.7) for k in range(1, 9)],
        *[Score(other, random_tokens(4, k)) for k in range(5)],
        *[Score((k, *X[1:]), y) for k in range(3)],  # the same suffix after other first tokens
        Score(X, y, 2.0, 5),
        Score(X, y, 2.0, 6),
        Score(X, y, 1.0),
        Score((7,), (8,)),
        Score(X, y, 1.0),
    ]


@functools.cache
def model_and_expected(name):
    model = make_model(name)
    return model, [naive(model, request) for request in mixed_requests()]


MEMORIES = {
    "plenty": Memory(),
    "small passes": Memory(batch_bytes=20_000, training_tokens=40, gradient_checkpointing=True),
    "a row a pass": Memory(batch_bytes=1, training_tokens=1),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("name", [*FAST, "bloom"])
@pytest.mark.filterwarnings("ignore:.*slow path")
def test_equals_a_naive_forward_pass(name, memory, grad):
    model, expected = model_and_expected(name)
    assert_equal(expected, score(runner_of(model, memory), mixed_requests(), grad=grad))


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)


@given(
    st.lists(
        st.builds(
            Score,
            tokens.map(lambda t: X * 3 + t),
            tokens,
            st.sampled_from([1.0, 0.5]),
            st.sampled_from([None, 2]),
        ),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_any_batch_equals_a_naive_forward_pass(requests):
    assert_naive(MODEL, requests, score(RUNNER, requests))


MODEL = make_model("qwen2")
RUNNER = Runner(MODEL)


def test_equal_requests_are_computed_once():
    runner = Runner(make_model("llama"))
    assert runner.fast
    request = Score(X, (1, 2, 3), name="y")
    before = runner.computed_tokens
    scored = score(runner, [request, Score(X, (1, 2, 3), 0.5), request] * 10)
    assert runner.computed_tokens - before <= len(X) + 3
    assert runner.usage.tokens_scored == 3
    assert torch.equal(scored[0].log_probs, scored[2].log_probs)
    assert not torch.equal(scored[0].log_probs, scored[1].log_probs)


def test_prefix_is_read_once_for_all_particles():
    runner = Runner(make_model("llama"))
    assert runner.fast
    before = runner.computed_tokens
    requests = [Score((*X, k, k), (1, 2, 3)) for k in range(40)]
    score(runner, requests)
    assert runner.computed_tokens - before <= len(X) + 40 * 5


def test_each_input_is_read_once():
    """Requests about several long prefixes, as in a training batch."""
    model = make_model("llama")
    runner = Runner(model)
    assert runner.fast
    inputs = [random_tokens(30, seed) for seed in range(4)]
    requests = [Score(x, random_tokens(4, k)) for x in inputs for k in range(16)]
    for grad in (False, True):
        before = runner.computed_tokens
        scored = score(runner, requests, grad=grad)
        assert runner.computed_tokens - before <= 4 * 30 + 64 * 5
        assert_naive(model, requests, scored)


def test_what_several_inputs_begin_with_is_read_once():
    """As worked examples before the questions of a training batch."""
    model = make_model("llama")
    inputs = [(*random_tokens(80, 9), *random_tokens(30, seed)) for seed in range(4)]
    requests = [Score(x, random_tokens(4, k)) for x in inputs for k in range(16)]
    for grad in (False, True):
        runner = Runner(model)
        assert runner.fast
        before = runner.computed_tokens
        scored = score(runner, requests, grad=grad)
        assert runner.computed_tokens - before <= 80 + 4 * 30 + 64 * 5
        assert_naive(model, requests, scored)


def test_no_requests_and_empty_continuations():
    runner = Runner(make_model("llama"))
    assert score(runner, []) == []
    scored = score(runner, [Score(X, ()), Score(X, (1,)), Score(X, (), 1.0, 3)])
    assert [len(s.log_probs) for s in scored] == [0, 1, 0]
    assert scored[0].closing_log_probs is None and len(scored[2].closing_log_probs) == 0


def test_empty_prefix_names_the_site():
    with pytest.raises(ValueError, match="site 'y': the prefix has no tokens"):
        score(RUNNER, [Score((), (1,), name="y")])


def test_zero_probability_is_minus_infinity():
    lm = tiny_lm("ab.")
    lm.model.lm_head.bias = torch.nn.Parameter(torch.tensor([0.0, -math.inf, 0.0, 0.0]))
    scored = score(lm.runner, [Score((0, 1), (1, 0))])[0]
    assert scored.log_probs[0] == -math.inf and torch.isfinite(scored.log_probs[1])


def test_invalid_logits_name_the_site():
    lm = tiny_lm("ab.")
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="site 'y': the model's logits define no distribution"):
        score(lm.runner, [Score((0, 1), (1, 0), name="y")])


def test_without_grad_nothing_needs_one():
    runner = Runner(make_model("llama", frozen=False))
    with torch.enable_grad():
        scored = score(runner, [Score(X, (1, 2), 1.0, 3)])[0]
    assert not scored.log_probs.requires_grad and not scored.closing_log_probs.requires_grad


PREAMBLE = random_tokens(70, 5)  # long enough to be a prompt by itself
PREFIXES = {
    "one": [X] * 12,
    "short": [X[:3], random_tokens(5, 3)],
    "behind a preamble": [(*PREAMBLE, *random_tokens(24, k)) for k in range(3)] * 4,
}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES)
def test_gradients_equal_those_of_a_naive_pass(name, prefixes, memory):
    model = make_model(name, frozen=False).train()
    requests = [Score(p, random_tokens(3 + k % 4, k), 0.8, 2) for k, p in enumerate(prefixes)]
    weights = [k % 3 - 0.7 for k in range(len(requests))]

    def gradient(scored):
        loss = sum(
            w * (s.log_probs.sum() + s.closing_log_probs[0])
            for w, s in zip(weights, scored, strict=True)
        )
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return loss.detach(), grads

    loss, got = gradient(score(runner_of(model, memory), requests, grad=True))
    model.eval()
    naive_scored = []
    for r in requests:
        ids = torch.tensor([[*r.prefix, *r.continuation]])
        logits = model(ids, use_cache=False).logits[0, len(r.prefix) - 1 : -1]
        log_probs = torch.log_softmax(logits / r.temperature, -1)
        picked = log_probs.gather(1, torch.tensor([r.continuation]).T)[:, 0]
        naive_scored.append(
            type("S", (), {"log_probs": picked, "closing_log_probs": log_probs[:, 2]})
        )
    want_loss, want = gradient(naive_scored)
    torch.testing.assert_close(loss, want_loss, atol=1e-3, rtol=1e-5)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4 * (1 + float(w.abs().max())), rtol=0)


def test_gradient_pass_has_no_dropout_and_remembers_nothing():
    lm = tiny_lm("ab.")
    adapter = lm.adapter()
    adapter.model.train()
    prefix = (0, 1, 2) * 10
    requests = [Score(prefix, (0, 1, k)) for k in range(3)]
    first = [s.log_probs for s in score(adapter.runner, requests, grad=True)]
    second = [s.log_probs for s in score(adapter.runner, requests, grad=True)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].requires_grad and first[0].grad_fn is not None


def test_after_an_optimiser_step_scores_are_new():
    lm = tiny_lm("ab.")
    adapter = lm.adapter()
    prefix = (0, 1, 2) * 10
    requests = [Score(prefix, (0, 1, k)) for k in range(4)]
    optimiser = torch.optim.Adam(
        [p for p in adapter.model.parameters() if p.requires_grad], lr=0.05
    )
    base = score(lm.runner, requests)
    for _ in range(3):
        loss = -sum(s.log_probs.sum() for s in score(adapter.runner, requests, grad=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        scored = score(adapter.runner, requests)
        for request, got in zip(requests, scored, strict=True):
            want = naive(adapter.model, request)[0]
            torch.testing.assert_close(got.log_probs, want, atol=1e-4, rtol=0)
    assert not torch.allclose(scored[0].log_probs, base[0].log_probs, atol=1e-2)
    after = score(lm.runner, requests)
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(base, after, strict=True))


@pytest.mark.filterwarnings("ignore:.*slow path")
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_hidden_states(name):
    model = make_model(name)
    prefixes = [X, X[:4], X, random_tokens(9, 4), (3,), *[(*X, k) for k in range(20)]]
    states = hidden(Runner(model), prefixes)
    assert states.dtype == torch.float32 and not states.requires_grad
    for prefix, state in zip(prefixes, states, strict=True):
        with torch.no_grad():
            out = model(torch.tensor([prefix]), output_hidden_states=True, use_cache=False)
        torch.testing.assert_close(state, out.hidden_states[-1][0, -1], atol=1e-4, rtol=0)


def test_hidden_of_nothing():
    for prefixes in ([], [()], [(1,), ()]):
        with pytest.raises(ValueError, match="no prefix is given|the prefix has no tokens"):
            hidden(RUNNER, prefixes)
