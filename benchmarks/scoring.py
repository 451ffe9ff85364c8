"""Scoring pairs: log p(z | x) and log p(y | x, z) for many z and y, against plain forward passes.

    python -m benchmarks --only scoring

The alternatives run the whole sequences x z y through an ordinarily loaded model, in batches of 16
(in full: of a few sizes that fit, the fastest). "plain" takes the log-softmax of all logits, as most
code does; "careful" only at the positions that are scored. Expect 4 times the speed of the plain
one and a fifth of its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.bench import Bench
from benchmarks.measuring import Timed, ratios, synchronize
from benchmarks.results import Goal, Row
from lmppl.lm.batches.requests import Score

GOAL, MEMORY_GOAL = 4.0, 5.0
PREFIX, LATENT, OBSERVED = 128, 16, 24  # tokens of x, z and y
LogProbs = Callable[[torch.Tensor, int], torch.Tensor]


def run(bench: Bench) -> list[Row]:
    pairs = bench.choose(smoke=3, quick=32, full=256)
    prefix, latent, observed = bench.choose(
        smoke=(8, 2, 3),
        quick=(PREFIX, LATENT, OBSERVED),
        full=(PREFIX, LATENT, OBSERVED),
    )
    batches = bench.choose(smoke=[2], quick=[16], full=[16, 32, 64])
    return compare(bench, pairs, prefix, latent, observed, batches)


def compare(
    bench: Bench, pairs: int, prefix: int, latent: int, observed: int, batches: list[int]
) -> list[Row]:
    """Rows against the plain and the careful alternative."""
    zs = bench.random_tokens(pairs, latent, 1)
    ys = bench.random_tokens(pairs, observed, 2)

    def ours(number: int) -> int:
        x = bench.tokens(prefix, number)
        after = [Score(x, z) for z in zs]
        after += [Score((*x, *z), y) for z, y in zip(zs, ys, strict=True)]
        return sum(s.log_probs.numel() for s in bench.lm.score(after))

    def sequences(number: int, num: int) -> torch.Tensor:
        x = bench.tokens(prefix, number)
        rows = [(*x, *z, *y) for z, y in zip(zs[:num], ys[:num], strict=True)]
        return torch.tensor(rows, device=bench.device)

    def passes(log_probs: LogProbs, batch: int, num: int) -> Callable[[int], int]:
        @torch.no_grad()
        def work(number: int) -> int:
            parts = [log_probs(part, prefix) for part in sequences(number, num).split(batch)]
            found = torch.cat(parts)
            sums = found[:, :latent].sum(1), found[:, latent:].sum(1)
            assert len(sums[0]) == len(sums[1]) == num
            return found.numel()

        return work

    contenders: dict[str, Callable[[int], int]] = {"lmppl": ours}
    for name, log_probs in (("plain pass", _plain(bench)), ("careful pass", _careful(bench))):
        cost = {
            batch: _seconds(bench, passes(log_probs, batch, batch)) / batch
            for batch in (batches if len(batches) > 1 else ())
        }
        best = min(cost, key=cost.__getitem__, default=batches[0])
        contenders[f"{name}, batches of {best}"] = passes(log_probs, best, pairs)
    sides = bench.in_turns(contenders)
    case = f"{pairs} pairs of {latent} and {observed} tokens after {prefix}"
    goals = (GOAL if pairs == 256 else None, None)
    return [_row(case, sides[0], other, goal) for other, goal in zip(sides[1:], goals, strict=True)]


def _row(case: str, ours: Timed, other: Timed, goal: float | None) -> Row:
    note, figures = "", {}
    if ours.peak_bytes and other.peak_bytes:
        times = other.peak_bytes / ours.peak_bytes
        figures["memory_ratio"] = times
        note = f"{other.label}: {times:.1f} times lmppl's peak memory"
        if goal is not None:
            note += f" (goal: at least {MEMORY_GOAL:g} times)"
    return Row.of(
        case,
        [ours, other],
        ratios(other, ours),
        unit="x",
        goal=None if goal is None else Goal(goal),
        figures=figures,
        note=note,
    )


def _plain(bench: Bench) -> LogProbs:
    def log_probs(ids: torch.Tensor, prefix: int) -> torch.Tensor:
        logits = bench.ordinary(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        every = logits[:, :-1].float().log_softmax(-1)
        return every.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, prefix - 1 :]

    return log_probs


def _careful(bench: Bench) -> LogProbs:
    def log_probs(ids: torch.Tensor, prefix: int) -> torch.Tensor:
        kept = ids.shape[1] - prefix + 1
        logits = bench.ordinary(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=kept
        ).logits
        some = logits[:, :-1].float().log_softmax(-1)
        return some.gather(-1, ids[:, prefix:, None]).squeeze(-1)

    return log_probs


def _seconds(bench: Bench, work: Callable[[int], int]) -> float:
    """One run of ``work`` after another that warms it up."""
    work(0)
    synchronize(bench.device)
    began = time.perf_counter()
    work(0)
    synchronize(bench.device)
    return time.perf_counter() - began
