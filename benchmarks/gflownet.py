"""One optimiser step of a GFlowNet guide, against gfn-lm-tuning's.

    make bench-peers && python -m benchmarks --only gflownet

Both draw 32 continuations of one prompt of 10 tokens, up to the end of the sentence or 16 tokens,
from a LoRA-adapted model (rank 16, every linear layer), compute their rewards under the frozen
model, and take one AdamW step. lmppl once does the same, all on policy, and once with its defaults,
which add tempered and replayed samples and samples of the program itself. Expect a fifth of
gfn-lm-tuning's time.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import torch
from peft import LoraConfig, TaskType

import lmppl
from benchmarks.bench import Bench
from benchmarks.machine import commit_of
from benchmarks.measuring import Timed
from benchmarks.peers import gfn_lm_tuning
from benchmarks.results import Goal, Row, Skipped
from lmppl import lm_sample, use
from lmppl.training.inputs import Collection, Input
from lmppl.training.options import FitOptions
from lmppl.training.trainer import Trainer

GOAL = 5.0
ON_POLICY: dict[str, Any] = {
    "tempered_fraction": 0.0,
    "prior_fraction": 0.0,
    "replay_fraction": 0.0,
}
STEPS = 1000  # that the schedule of the learning rate is made for

Splits = list[dict[str, float]]


def run(bench: Bench) -> list[Row]:
    try:
        utils = gfn_lm_tuning.load_utils(bench.gfn_lm_tuning)
    except FileNotFoundError as error:
        raise Skipped(
            f"gfn-lm-tuning is not there ({error}): `make bench-peers` fetches it"
        ) from None
    prompt = bench.text(bench.choose(smoke=4, quick=10, full=10))
    batch_size = bench.choose(smoke=4, quick=32, full=32)
    max_tokens = bench.choose(smoke=4, quick=16, full=16)
    splits: dict[str, Splits] = {"on policy": [], "defaults": [], "theirs": []}
    on_policy = ours(bench, prompt, batch_size, max_tokens, ON_POLICY, splits["on policy"])
    defaults = ours(bench, prompt, batch_size, max_tokens, {}, splits["defaults"])
    peer = theirs(bench, utils, prompt, batch_size, max_tokens, splits["theirs"])
    # With the defaults, every eighth step draws the program's own samples for eight steps.
    first, second, other = bench.in_turns(
        {"lmppl, on policy": on_policy, "lmppl, defaults": defaults, "gfn-lm-tuning": peer},
        repeats=8 if bench.mode == "full" else None,
    )
    case = f"{batch_size} x {max_tokens} tokens, prompt of {len(bench.lm.encode(prompt))}"
    goal = Goal(GOAL) if bench.mode != "smoke" else None
    other.label += f" {commit_of(bench.gfn_lm_tuning)[:7]}"
    return [
        _row(f"{case}, {name}", side, other, splits[name], splits["theirs"], goal)
        for name, side in (("on policy", first), ("defaults", second))
    ]


def _row(
    case: str, ours: Timed, other: Timed, own: Splits, peers: Splits, goal: Goal | None
) -> Row:
    # A step is a step: lmppl may draw more or fewer tokens for it, and the note says how many.
    values = [b / a for a, b in zip(ours.seconds, other.seconds, strict=True)]
    tokens = [sum(side.tokens) / len(side.tokens) for side in (ours, other)]
    note = (
        f"{tokens[0]:.0f} and {tokens[1]:.0f} tokens drawn a step; median seconds: lmppl "
        f"{_words(own)} (a whole step, in the mean, {fmean(ours.seconds):.2f}); gfn-lm-tuning "
        f"{_words(peers)}"
    )
    figures = {"tokens": tokens[0], "peer_tokens": tokens[1]}
    return Row.of(case, [ours, other], values, unit="x", goal=goal, figures=figures, note=note)


def _words(splits: Splits) -> str:
    measured = splits[1:]  # the first was the warm-up
    return ", ".join(f"{part} {median(s[part] for s in measured):.2f}" for part in measured[0])


def ours(
    bench: Bench,
    prompt: str,
    batch_size: int,
    max_tokens: int,
    options: dict[str, Any],
    splits: Splits,
) -> Callable[[int], int]:
    """lmppl's side. It makes its guide in the warm-up, so that its memory is counted."""
    trainer: Trainer | None = None

    def program(x: str) -> lmppl.Text:
        return lm_sample("z", x, max_tokens=max_tokens, stop=".")

    def work(number: int) -> int:
        nonlocal trainer
        before = bench.lm.tokens_sampled
        with use(bench.lm):
            if trainer is None:
                guide = lmppl.LMGuide(program, lm=bench.lm)
                settings = FitOptions(batch_size=batch_size, **options)
                generator = torch.Generator().manual_seed(0)
                source = Collection([Input(program, (prompt,), 0, settings)], generator)
                guide.prepare((prompt,))
                trainer = Trainer(guide, source, STEPS, settings, 0, generator)
            figures = trainer.step(number)
        assert figures is not None  # the data come again and again
        kinds = ("sampling", "truncations", "gradient")
        splits.append({kind: figures[f"seconds_{kind}"] for kind in kinds})
        return bench.lm.tokens_sampled - before

    return work


def theirs(
    bench: Bench, utils: object, prompt: str, batch_size: int, max_tokens: int, splits: Splits
) -> Callable[[int], int]:
    """gfn-lm-tuning's side, on a model of its own; its adapter too is made in the warm-up."""
    model = bench.load_ordinary()
    steps: gfn_lm_tuning.Steps | None = None
    stop = bench.lm.vocabulary.encode(".")[-1]
    lora = LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
    )

    def work(number: int) -> int:
        nonlocal steps
        torch.manual_seed(number)
        if steps is None:
            ids = torch.tensor(bench.lm.encode(prompt), device=bench.device)
            steps = gfn_lm_tuning.Steps(utils, model, lora, ids, stop, batch_size, max_tokens)
        drawn = steps.step()
        splits.append(steps.split)
        return drawn

    return work
