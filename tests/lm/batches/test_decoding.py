from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppl.constraints import Constraint
from lmppl.lm import begin_draws
from lmppl.lm.batches.decoding import _compact
from lmppl.lm.batches.requests import Draw
from lmppl.lm.tokens.stopping import Stopping
from lmppl.testing.tiny import tiny_lm

LM = tiny_lm("ab.", seed=1, contrast=1.0)
PREFIX = (0, 1, 1, 0)


def draw(lm=LM, prefix=PREFIX, *, seed=0, max_tokens=6, stop=".", temperature=1.0, uniforms=None):
    if uniforms is None:
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(max_tokens, dtype=torch.float64, generator=generator)
    return lm, Draw(prefix, Stopping(lm.vocabulary, stop, max_tokens), uniforms, temperature, "z")


def finish(decoding):
    while not decoding.done:
        decoding.step()
    return decoding.results()


@torch.no_grad()
def naive(lm, request):
    """The same draw, token by token, through the bare model and a plain distribution function."""
    ids, log_probs, state = [], [], request.stopping.start()
    for u in request.uniforms.tolist():
        tokens = torch.tensor([[*request.prefix, *ids]])
        logits = lm.model(tokens, use_cache=False).logits[0, -1].double()
        probs = torch.softmax(logits / request.temperature, -1)
        token = int(torch.searchsorted(probs.cumsum(-1), torch.tensor(u).double(), right=True))
        ids.append(token)
        log_probs.append(float(probs[token].log()))
        reason = state.push(token)
        if reason is not None:
            return tuple(ids), log_probs, reason
    raise AssertionError("open")


def assert_same(drawn, expected):
    ids, log_probs, reason = expected
    assert drawn.token_ids == ids
    assert drawn.reason == reason
    torch.testing.assert_close(drawn.log_probs, torch.tensor(log_probs), atol=1e-4, rtol=0)


def test_draws_are_those_of_a_naive_loop():
    temperatures = itertools.cycle([1.0, 0.7, 1.6])
    prefixes = itertools.cycle([PREFIX, PREFIX, (2,), (*PREFIX, 2, 0, 0, 1, 1)])
    requests = [
        draw(prefix=p, seed=s, temperature=t, max_tokens=3 + s % 5, stop="." if s % 3 else None)
        for s, t, p in zip(range(40), temperatures, prefixes, strict=False)
    ]
    decoding = begin_draws(requests)
    results = finish(decoding)
    assert decoding.num_steps == max(len(d.token_ids) for d in results)
    assert {d.reason for d in results} == {"stop", "eos", "length"}
    for drawn, (lm, request) in zip(results, requests, strict=True):
        assert_same(drawn, naive(lm, request))
        assert drawn.log_probs.dtype == torch.float32


def test_several_models_side_by_side():
    other = tiny_lm("ab.c", seed=2)
    adapter = LM.adapter()
    with torch.no_grad():
        for parameter in adapter.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.ones_like(parameter) * 0.2)
    requests = [draw(lm, seed=s) for s, lm in enumerate([LM, other, adapter] * 6)]
    results = finish(begin_draws(requests))
    for drawn, (lm, request) in zip(results, requests, strict=True):
        assert_same(drawn, naive(lm, request))
    base = finish(begin_draws([draw(LM, seed=s) for s in range(2, 18, 3)]))
    assert all(
        not torch.equal(b.log_probs[:1], d.log_probs[:1])
        for b, d in zip(base, results[2::3], strict=True)
    )


def test_expectation_over_uniforms_is_the_density():
    """Every sequence's interval of uniforms has the width of its probability."""
    stopping = Stopping(LM.vocabulary, ".", 2)
    n = 300
    grid = [(i + 0.5) / n for i in range(n)]
    first = [draw(max_tokens=2, uniforms=torch.tensor([u, 0.5]).double()) for u in grid]
    drawn = finish(begin_draws(first))
    with torch.no_grad():
        probs = torch.softmax(LM.model(torch.tensor([PREFIX])).logits[0, -1], -1)
    counts = torch.bincount(torch.tensor([d.token_ids[0] for d in drawn]), minlength=4) / n
    torch.testing.assert_close(counts, probs, atol=2 / n, rtol=0)
    assert all(stopping.scan(d.token_ids)[0] == len(d.token_ids) for d in drawn)


def test_fields_while_it_runs():
    decoding = begin_draws([draw(seed=s) for s in range(8)])
    assert len(decoding) == 8 and not decoding.done and decoding.num_steps == 0
    decoding.step()
    assert [len(ids) for ids in decoding.token_ids] == [1] * 8
    assert [len(lp) for lp in decoding.log_probs] == [1] * 8
    closed = [i for i, reason in enumerate(decoding.reasons) if reason is not None]
    assert closed and not decoding.done
    with pytest.raises(RuntimeError, match="site 'z'.*still open"):
        decoding.results()
    decoding.step()
    assert all(len(decoding.token_ids[i]) == 1 for i in closed)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_select_forks_sequences_and_keeps_uniforms(data):
    """After any resampling, each slot is the naive continuation of its ancestor's tokens under
    its own uniforms."""
    n = data.draw(st.integers(1, 7))
    requests = [
        draw(
            seed=data.draw(st.integers(0, 99)),
            prefix=PREFIX if i % 3 else (*PREFIX, 2, 1),
            max_tokens=7,
            temperature=1.0 + (i % 2),
        )
        for i in range(n)
    ]
    decoding = begin_draws(requests)
    held = [(request, []) for _, request in requests]  # what each slot's sequence is, and tokens
    ancestor = st.lists(st.integers(0, n - 1), min_size=n, max_size=n)
    while not decoding.done:
        decoding.step()
        held = [(r, list(ids)) for (r, _), ids in zip(held, decoding.token_ids, strict=True)]
        if data.draw(st.booleans()):
            ancestors = data.draw(ancestor)
            before = [list(ids) for ids in decoding.token_ids]
            decoding.select(ancestors)
            held = [held[a] for a in ancestors]
            assert decoding.token_ids == [before[a] for a in ancestors]
            assert [decoding.draw_of(i)[1] for i in range(n)] == [r for r, _ in held]
        for slot, (request, ids) in enumerate(held):
            state = request.stopping.start()
            for token in ids:
                reason = state.push(token)
            assert decoding.reasons[slot] == reason
    for drawn, (request, _) in zip(decoding.results(), held, strict=True):
        logits = LM.model(torch.tensor([[*request.prefix, *drawn.token_ids]])).logits[0]
        log_probs = torch.log_softmax(logits / request.temperature, -1)
        at = torch.arange(len(drawn.token_ids)) + len(request.prefix) - 1
        want = log_probs[at, torch.tensor(drawn.token_ids)].detach()
        torch.testing.assert_close(drawn.log_probs, want, atol=1e-4, rtol=0)


def test_select_uses_own_uniforms():
    us = [torch.full((6,), u, dtype=torch.float64) for u in (0.01, 0.99, 0.45)]
    decoding = begin_draws([draw(uniforms=u, stop=None) for u in us])
    decoding.step()
    assert len({ids[0] for ids in decoding.token_ids}) > 1
    open_slot = next(i for i, reason in enumerate(decoding.reasons) if reason is None)
    decoding.select([open_slot] * 3)
    start = decoding.token_ids[0][0]
    decoding.step()
    with torch.no_grad():
        logits = LM.model(torch.tensor([[*PREFIX, start]])).logits[0, -1]
    cdf = torch.softmax(logits.double(), -1).cumsum(-1)
    want = [int(torch.searchsorted(cdf, u[1], right=True)) for u in us]
    assert [ids[1] for ids in decoding.token_ids] == want
    assert len(set(want)) > 1


def test_select_can_revive_and_kill():
    decoding = begin_draws([draw(seed=s, stop="b", max_tokens=8) for s in range(12)])
    decoding.step()
    closed = [i for i, r in enumerate(decoding.reasons) if r is not None]
    alive = [i for i, r in enumerate(decoding.reasons) if r is None]
    assert closed and alive
    decoding.select([alive[0]] * 12)  # all open again
    decoding.step()
    decoding.select([0] * 12)
    if decoding.reasons[0] is None:
        decoding.step()
    fresh = begin_draws([draw(seed=s, stop="b", max_tokens=8) for s in range(12)])
    fresh.step()
    fresh.select([closed[0]] * 12)
    assert fresh.done
    assert len({d.token_ids for d in fresh.results()}) == 1


def test_select_refuses_bad_ancestors():
    decoding = begin_draws([draw(seed=s) for s in range(3)])
    with pytest.raises(ValueError, match="2 ancestors for 3 slots"):
        decoding.select([0, 1])
    with pytest.raises(IndexError, match="not all among"):
        decoding.select([0, 1, 3])


def test_slot_without_uniforms_left():
    long = draw(uniforms=torch.zeros(8, dtype=torch.float64), max_tokens=8, stop=None)  # "aa..."
    decoding = begin_draws([long, draw(max_tokens=1, stop=None)])
    decoding.step()
    decoding.select([0, 0])
    with pytest.raises(ValueError, match="site 'z': slot 1 has 1 uniforms.*token 2"):
        decoding.step()


def test_usage_counts_tokens():
    lm = tiny_lm("ab.", seed=3)
    results = finish(begin_draws([draw(lm, seed=s) for s in range(9)]))
    assert lm.usage.tokens_sampled == sum(len(d.token_ids) for d in results)


def test_finished_rows_leave_the_batch():
    decoding = begin_draws([draw(seed=s, max_tokens=12) for s in range(20)])
    while not decoding.done:
        still_open = sum(reason is None for reason in decoding.reasons)
        assert sum(len(batch.rows) for batch in decoding._batches) == still_open
        decoding.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"prefix": ()}, "no BOS token"),
        ({"uniforms": torch.zeros(3, dtype=torch.float64)}, "3 uniforms for max_tokens=6"),
        ({"max_tokens": None, "uniforms": torch.zeros(3, dtype=torch.float64)}, "max_tokens"),
    ],
)
def test_bad_draws(change, message):
    with pytest.raises(ValueError, match=f"site 'z': .*{message}"):
        begin_draws([draw(**change)])


def test_invalid_logits_name_the_site():
    lm = tiny_lm("ab.", seed=0)
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(math.nan)
    decoding = begin_draws([draw(lm)])
    with pytest.raises(
        ValueError, match="site 'z', token 1: the model's logits after '' define no"
    ):
        decoding.step()


@given(st.sets(st.integers(0, 12), min_size=1))
def test_compact(rows):
    rows = sorted(rows)
    order = _compact(rows)
    assert sorted(order) == rows
    assert all(order[row] == row for row in rows if row < len(rows))


def test_closing_log_probs_are_those_of_a_bare_forward_and_change_no_draw():
    def requests():
        return [
            draw(seed=0),
            draw(seed=1, temperature=1.7, stop=None),
            draw(prefix=(2,), seed=2, max_tokens=2),
            draw(tiny_lm("ab", seed=2, eos=False), (0, 1), seed=3, stop=None),
        ]

    expected = finish(begin_draws(requests()))
    decoding, compared = begin_draws(requests()), 0
    while not decoding.done:
        decoding.step()
        found = decoding.closing_log_probs()
        assert found == decoding.closing_log_probs()
        for slot, (lm, request) in enumerate(requests()):
            if decoding.reasons[slot] is not None:
                assert math.isnan(found[slot])
            elif slot == 3:
                assert found[slot] == -math.inf
            else:
                tokens = torch.tensor([[*request.prefix, *decoding.token_ids[slot]]])
                with torch.no_grad():
                    logits = lm.model(tokens, use_cache=False).logits[0, -1].double()
                log_probs = torch.log_softmax(logits / request.temperature, -1)
                c = request.stopping.closing_token
                assert found[slot] == pytest.approx(float(log_probs[c]), abs=1e-4)
                compared += 1
    assert compared > 2
    assert [d.token_ids for d in decoding.results()] == [d.token_ids for d in expected]


def test_closing_log_probs_follow_a_selection():
    decoding = begin_draws([draw(seed=seed, stop=None) for seed in range(6)])
    decoding.step()
    before = decoding.closing_log_probs()
    ancestors = [3, 3, 0, 1, 1, 5]
    decoding.select(ancestors)
    assert decoding.closing_log_probs() == pytest.approx(
        [before[a] for a in ancestors], abs=1e-5, nan_ok=True
    )


class TwoAs(Constraint):
    """``aa``; that ``b`` leads nowhere is found out when it has been drawn."""

    def allows(self, prefix):
        return prefix in ("", "a", "b", "aa")

    def complete(self, text):
        return text == "aa"


@pytest.mark.filterwarnings("ignore:.*asked about every token")
def test_a_sequence_that_nothing_may_follow_cannot_close():
    stopping = Stopping(LM.vocabulary, max_tokens=3, constraint=TwoAs())
    uniforms = torch.tensor([[0.01, 0.5, 0.5], [0.99, 0.5, 0.5]], dtype=torch.float64)
    decoding = begin_draws([(LM, Draw(PREFIX, stopping, row)) for row in uniforms])
    decoding.step()
    assert decoding.token_ids == [[0], [1]]
    assert decoding.closing_log_probs() == [-math.inf, -math.inf]
    decoding.step()
    assert decoding.is_dead(1) and not decoding.is_dead(0)
    (log_prob, _) = decoding.closing_log_probs()
    assert log_prob == pytest.approx(0.0, abs=1e-5)  # EOS is all that is allowed
