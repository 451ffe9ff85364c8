"""Training in several processes that share out the traces of each input: what one process gives, to
rounding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_ranks import launch
from torch.testing import assert_close

import lmppl
from lmppl import lm_sample, losses, require, tool
from lmppl.testing import tiny_lm
from lmppl.training import objectives
from lmppl.training.batch import Batch
from lmppl.training.behaviour import turns_of
from lmppl.training.inputs import Collection, Input
from lmppl.training.options import FitOptions
from lmppl.training.ranks import OneProcess, Ranks
from lmppl.training.samples import RemoteSample
from lmppl.training.sharing import SharedInputs, SplitTraces
from lmppl.training.trainer import Trainer

# --- the gradient of every loss, with threads for processes --------------------------------------


class Thread(Ranks):
    """One of several threads that tell each other what they have."""

    def __init__(self, rank: int, num: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.num, self._board, self._barrier = rank, num, board, barrier

    def gather(self, mine: Sequence[Any]) -> list[Any]:
        self._board[self.rank] = list(mine)
        self._barrier.wait()
        (parts,) = zip(*self._board, strict=True)
        self._barrier.wait()
        return list(parts)

    def of_first(self, value):
        raise NotImplementedError

    sum = copy = agree = of_first


def on_threads(num: int, work: Callable[[SplitTraces], Any]) -> list[Any]:
    """What ``work`` returns on each of ``num`` ranks."""
    board, barrier, found = [None] * num, threading.Barrier(num), [None] * num

    def run(rank: int) -> None:
        try:
            found[rank] = work(SplitTraces(Thread(rank, num, board, barrier)))
        except BaseException as error:
            found[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return found


def some_die(x, y):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    require("no bbb", z != "bbb")
    lm_sample("y", [x, z], obs=y)


LM = tiny_lm("ab.", seed=0)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Traces of one input, dead ones and truncations among them, with a leaf for their log q."""
    guide = lmppl.LMGuide(some_die, lm=LM)
    options = FitOptions(batch_size=32, inputs_per_step=1, prior_fraction=0.25, truncations=9.0)
    one = Input(some_die, (".", "ab"), 0, options)
    with lmppl.use(LM):
        generator = torch.Generator().manual_seed(0)
        guide.prepare(one.args)
        trainer = Trainer(guide, Collection([one], generator), 1, options, 0, generator)
        turns = turns_of([one], 32, seed=0, number=0)
        samples = trainer._draw(turns)
        (found,) = trainer._score(samples, trainer._truncate(turns, samples))
    noise = torch.randn(len(found.log_q), generator=generator)
    log_q = (found.log_q.detach() + 0.3 * noise).double().requires_grad_()
    log_r = [one.log_r for one in (*found.samples, *found.truncations)]
    log_prior = [sample.log_p for sample in found.samples]
    exact = {"log_r": log_q.new_tensor(log_r), "log_prior": log_q.new_tensor(log_prior)}
    return replace(found, log_q=log_q, **exact)


LOSSES = [
    losses.VarGrad(),
    losses.VarGrad(huber=0.3, forward=0.0),
    losses.TB(),
    losses.SubTB(),
    losses.SubTB(lam=0.5),
    losses.ELBO(),
    losses.Wake(),
    losses.PPO(),
]


def of_rank(batch: Batch, rank: int, owner: Callable[[int], int]) -> tuple[list[Any], Batch]:
    """All traces as a rank knows them, and the batch of its own."""
    samples = [
        one
        if owner(i) == rank
        else RemoteSample(one.origin, one.log_r, one.log_p, one.num_tokens, None)
        for i, one in enumerate(batch.samples)
    ]
    rows = [i for i in range(batch.num) if owner(i) == rank]
    number = {id(sample): i for i, sample in enumerate(batch.samples)}
    cuts = [m for m, cut in enumerate(batch.truncations) if owner(number[id(cut.sample)]) == rank]
    log_q = batch.log_q.detach()[[*rows, *(batch.num + m for m in cuts)]].requires_grad_()
    return samples, replace(
        batch,
        samples=[batch.samples[i] for i in rows],
        truncations=[batch.truncations[m] for m in cuts],
        log_q=log_q,
        is_scored=[batch.is_scored[i] for i in rows],
    )


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("deal", ["2", "3", "by life", "40"])
def test_the_parts_of_the_gradient_are_that_of_one_process(batch, loss, deal):
    """Also where one rank has all dead traces, and where ranks have none."""
    dead = [sample.log_r == -torch.inf for sample in batch.samples]
    assert 3 < sum(dead) < 29 and len(batch.truncations) > 10

    def owner(i: int) -> int:
        return int(dead[i]) if deal == "by life" else i % int(deal)

    log_z = torch.tensor(-6.0, dtype=torch.float64, requires_grad=True)
    whole = loss.of(batch.tempered(0.9, log_z), moved=0.5)
    learned = [batch.log_q, *([log_z] if loss.learns_log_z else [])]
    expected, *of_log_z = torch.autograd.grad(whole, learned)
    whole = float(whole.detach())
    assert float(expected.abs().max()) > 1e-3

    def work(sharing: SplitTraces) -> Any:
        samples, own = of_rank(batch, sharing.ranks.rank, owner)
        (joined,) = sharing.join([samples], [own])
        joined = replace(joined, old_log_q=batch.old_log_q.double())
        log_z = torch.tensor(-6.0, dtype=torch.float64, requires_grad=True)
        value = loss.of(joined.tempered(0.9, sharing.once(log_z)), moved=0.5)
        if value.requires_grad:
            value.backward()
        rows = [i for i in range(batch.num) if owner(i) == sharing.ranks.rank]
        return value.detach(), rows, own, log_z.grad, joined.figures()

    found = on_threads(2 if deal == "by life" else int(deal), work)
    gradient = torch.zeros_like(expected)
    for value, rows, own, _, figures in found:
        assert float(value) == pytest.approx(whole, rel=1e-9, abs=1e-9)
        assert figures == pytest.approx(batch.figures(), nan_ok=True)
        number = {id(cut): batch.num + m for m, cut in enumerate(batch.truncations)}
        at = [*rows, *(number[id(cut)] for cut in own.truncations)]
        if own.log_q.grad is not None:
            gradient[at] += own.log_q.grad
    assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    if of_log_z:  # counted once
        grads = [grad for *_, grad, _ in found if grad is not None]
        assert_close(sum(grads), of_log_z[0])


def test_a_centre_of_each_ranks_own_would_be_seen(batch):
    """What the test above compares differs from a loss of each rank's traces alone."""
    (whole,) = torch.autograd.grad(objectives.vargrad(batch.log_r, batch.log_q, 0.3), [batch.log_q])
    of_parts = torch.zeros_like(whole)
    for rank in range(2):
        part = objectives.vargrad(batch.log_r[rank::2], batch.log_q[rank::2], 0.3) / 2
        of_parts += torch.autograd.grad(part, [batch.log_q])[0]
    assert float((of_parts - whole).abs().max()) > 1e-3


def test_slots_are_dealt_to_all_in_turn():
    dealt, ranks = 0, [SplitTraces(Thread(rank, 3, [], None)) for rank in range(3)]
    shares = [0, 0, 0]
    for num in (7, 0, 2, 1, 1, 30):
        slots = [sharing.slots(dealt, num) for sharing in ranks]
        assert sorted(slot for of_rank in slots for slot in of_rank) == list(range(num))
        shares = [share + len(of_rank) for share, of_rank in zip(shares, slots, strict=True)]
        dealt += num
        assert max(shares) - min(shares) <= 1
    assert list(SharedInputs().slots(5, 4)) == [0, 1, 2, 3]


def test_one_process_is_not_idle_and_others_are_told_what_to_do():
    assert SharedInputs(OneProcess()).idle(1, 8) == ""
    several = Thread(0, 3, [], None)
    assert "2 of them are idle" in (told := SharedInputs(several).idle(1, 8))
    assert "parallel='split'" in told
    assert SplitTraces(several).idle(1, 8) == ""
    assert "a step has 2 traces for 3 processes" in SplitTraces(several).idle(1, 2)


def test_a_result_of_a_tool_that_cannot_be_told_is_refused():
    def program(x):
        z = lm_sample("z", x, max_tokens=2)
        tool("lock", lambda text: threading.Lock(), z)
        lm_sample("y", [x, z], obs="a")

    guide = lmppl.LMGuide(program, lm=LM)
    options = FitOptions(batch_size=4, inputs_per_step=1)

    def work(sharing: SplitTraces) -> None:
        one = Input(program, ("a",), 0, options)
        generator = torch.Generator().manual_seed(0)
        trainer = Trainer(guide, Collection([one], generator), 1, options, 0, generator, sharing)
        trainer._draw(turns_of([one], 4, seed=0, number=0))

    with lmppl.use(LM):
        guide.prepare(("a",))
        alone = SplitTraces(Thread(0, 2, [None], threading.Barrier(1)))
        with pytest.raises(
            ValueError, match="'lock', a lock, cannot be pickled .*parallel='inputs'"
        ):
            work(alone)


# --- in several processes ------------------------------------------------------------------------

# Where several updates are made of the same draws, clipped ratios have kinks.
SCENARIOS = {
    "vargrad": 1e-3,
    "huber": 1e-3,
    "tb": 1e-3,
    "subtb": 1e-3,
    "elbo": 1e-3,
    "wake": 1e-3,
    "ppo": 2e-2,
    "sft": 1e-3,
    "wake on simulations": 1e-3,
    "demonstrations": 1e-3,
    "dead traces": 1e-3,
    "few live traces": 1e-3,
    "two traces": 1e-3,
    "a match": 1e-3,
    "numbers": 1e-3,
    "a tool": 1e-3,
    "truncations": 1e-3,
    "a guide program": 1e-3,
    "adapters of sites": 1e-3,
    "a stream": 1e-3,
    "less memory": 1e-3,
    "learn": 1e-3,
    "learn branches": 1e-3,
    "dreams": 1e-3,
    "resumed": 1e-3,
}


def run(num: int, folder: Any, *names: str) -> list[dict[str, Any]]:
    """What each of so many processes has found."""
    launch("split_ranks.py", num, folder, *names)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(num)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What three processes have found."""
    return run(3, tmp_path_factory.mktemp("split"))


def check_training(ranks: list[dict[str, Any]], name: str) -> None:
    """The gradients of the first step, the figures of all steps and the guide of one process."""
    alone, found = ranks[0][name]["none"], [rank[name]["split"] for rank in ranks]
    assert alone["history"] and (alone["gradients"] or name == "resumed")
    near = {"rtol": 0.0, "atol": SCENARIOS[name], "equal_nan": True}
    for rank in found:
        assert_close(rank["gradients"], alone["gradients"], rtol=0.0, atol=1e-5)
        for what in ("history", "parameters", "params", "model"):
            assert_close(rank.get(what), alone.get(what), **near)
        assert_close(rank["parameters"], found[0]["parameters"], rtol=0.0, atol=0.0)
        assert rank["notes"] == alone["notes"]


def check_traces(ranks: list[dict[str, Any]], name: str) -> None:
    """Those of one process, each on one rank."""
    alone, found = (
        ranks[0][name]["none"]["traces"],
        [rank[name]["split"]["traces"] for rank in ranks],
    )
    assert any(row for step in alone for row in step)
    for step, of_ranks in zip(alone, zip(*found, strict=True), strict=True):
        shares = [0] * len(ranks)
        for row, rows in zip(step, zip(*of_ranks, strict=True), strict=True):
            for trace, copies in zip(row, zip(*rows, strict=True), strict=True):
                (owner,) = (k for k, (*_, tokens) in enumerate(copies) if tokens is not None)
                shares[owner] += 1
                assert copies[owner][-1] == trace[-1]
                for origin, length, log_r, _ in copies:
                    assert [origin, length] == trace[:2]
                    assert log_r == pytest.approx(trace[2], abs=1e-3)
        assert max(shares) - min(shares) <= 1


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    names = ("dead traces", "tb")
    ranks = run(2, tmp_path, *names)
    for name in names:
        check_training(ranks, name)
        check_traces(ranks, name)


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_three_processes_train_as_one_does(ranks, name):
    check_training(ranks, name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "ppo"])
def test_each_slot_has_the_trace_that_it_has_in_one_process(ranks, name):
    check_traces(ranks, name)


@pytest.mark.long
def test_steps_had_dead_traces_on_one_rank_only_and_ranks_without_a_live_one(ranks):
    def live(name: str) -> list[list[list[bool]]]:
        """Of each step and rank whether its traces are alive."""
        found = zip(*(rank[name]["split"]["traces"] for rank in ranks), strict=True)
        return [
            [[trace[2] > -torch.inf for trace in row if trace[3] is not None] for (row,) in step]
            for step in found
        ]

    assert any(sum(not all(own) for own in step) == 1 for step in live("dead traces"))
    assert any(0 < sum(any(own) for own in step) < 3 for step in live("few live traces"))


@pytest.mark.long
def test_a_run_that_was_interrupted_ends_at_the_same_bits(ranks):
    """With as many processes; in one process but for rounding."""
    for rank in (rank["resumed"]["split"] for rank in ranks):
        assert_close(rank["parameters"], rank["unbroken"], rtol=0.0, atol=0.0)
    first = ranks[0]["resumed"]["split"]
    assert_close(first["alone"], first["parameters"], rtol=0.0, atol=1e-3)
    assert not first["told"]
    (told,) = first["told_alone"]
    assert "was written by a run of 3 processes, parallel='split', this one has 1 process:" in told


@pytest.mark.long
def test_idle_processes_are_said_once(ranks):
    first, *others = (rank["two traces"]["split"]["told"] for rank in ranks)
    assert len(first) == 1 and "a step has 2 traces for 3 processes, so 1 of" in first[0]
    assert not any(others) and not ranks[0]["tb"]["split"]["told"]
