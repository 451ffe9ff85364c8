"""Amortized infilling on a real language model: the guide's losses against each other and the prior.

    python -m benchmarks.amortized --openings sentences.txt --out benchmarks/results/amortized.json

The program is that of ``benchmarks.infilling_task``. 500 pairs of middle and ending are simulated
from it; a guide is trained on them by each loss, with the same default settings and about the same
number of language-model tokens (drawn, scored and trained on; steps are counted out from the tokens
of each loss's first steps). 50 further pairs, on other openings, are held out. Their exact posterior
draws, the simulated middles, bound log Z from above, so that the divergences of guide and posterior
are bracketed:

    log Z - ELBO <= KL(q || p) <= EUBO - ELBO        KL(p || q) <= EUBO - log Z

with log Z the importance-weighted lower bound. ``sft`` needs far fewer tokens a step, and soon knows
the 500 pairs by heart: it stops when the ESS on 16 further simulations on the training openings grows
no more. "sft, endless pairs" never sees one twice. A quarter of an hour a guide on one CPU core; rows
that are in the file already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

import lmppl
from benchmarks.infilling_task import Task
from lmppl import use
from lmppl.report.machine import machine
from lmppl.states import write_text
from lmppl.training.data import simulated_inputs, simulations
from lmppl.training.evaluation import evaluate
from lmppl.training.options import FitOptions

SEED_OF_HELD_OUT = 1_000_003
CALIBRATION_STEPS = 3
_EARLY_STOPPING = {"eval_data": 16, "eval_every": 8, "eval_samples": 32, "patience": 4}
RUNS: dict[str, dict[str, Any]] = {
    "vargrad": {},
    "vargrad, forward=0": {"forward": 0.0},
    "wake": {"loss": "wake"},
    "elbo": {"loss": "elbo"},
    "ppo": {"loss": "ppo"},
    "sft": {"loss": "sft", **_EARLY_STOPPING},
    "sft, endless pairs": {"loss": "sft", "simulate": math.inf},
}
"""What is compared: options of ``fit`` beyond the defaults."""


def tokens(lm: lmppl.LM) -> int:
    return lm.tokens_sampled + lm.tokens_scored + lm.tokens_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openings", type=Path, help="a text file, a sentence a line")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=50)
    Task.add_options(parser)
    parser.add_argument("--samples", type=int, default=128, help="for each held-out input")
    parser.add_argument("--tokens", type=int, default=100_000, help="for each loss")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS, help="which guides")
    parser.add_argument("--most-steps", type=int, default=300, help="of any guide")
    parser.add_argument("--save", type=Path, help="a folder for the guides, one each")
    parser.add_argument("--out", type=Path, help="JSON file of rows; those in it are kept")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    lm = lmppl.LM.from_pretrained(args.model, dtype=args.dtype)
    task = Task.of(args)
    infill = task.program
    openings = task.openings(args.openings, lm, args.pairs + args.held_out)
    data = [(each,) for each in openings]
    training, held_out = data[: -args.held_out], data[-args.held_out :]

    def keep(name: str, **figures: Any) -> None:
        row = {"name": name, **task.key, **figures}
        print(json.dumps(row), flush=True)
        rows.append({**row, "machine": machine(lm.device)})
        if args.out:
            write_text(args.out, json.dumps(rows, indent=1))

    def new_guide() -> lmppl.LMGuide:
        return lmppl.LMGuide(infill, lm=lm, condition_on=["ending"])

    known = {row["name"] for row in rows if task.key.items() <= row.items()}
    with use(lm):
        pairs = simulations(new_guide(), held_out, seed=SEED_OF_HELD_OUT)
        inputs = list(simulated_inputs(new_guide(), pairs, FitOptions(), len(held_out)))
        for name, guide in (("prior", None), ("untrained guide", new_guide())):
            if name not in known:
                keep(name, **evaluate(guide, inputs, args.samples, seed=7))
    for name in args.runs:
        if name in known:
            continue
        common: dict[str, Any] = {"simulate": args.pairs, "seed": 0, **RUNS[name]}
        few = {k: v for k, v in common.items() if k not in _EARLY_STOPPING}
        if math.isfinite(few["simulate"]):
            few["simulate"] = 40  # simulated ahead: they cost the same for 1 step and for 4
        before = tokens(lm)
        new_guide().fit(training, steps=1, **few)
        first = tokens(lm)
        new_guide().fit(training, steps=1 + CALIBRATION_STEPS, **few)
        a_step = (tokens(lm) - first - (first - before)) / CALIBRATION_STEPS
        steps = min(args.most_steps, max(10, round(args.tokens / a_step)))
        guide, began = new_guide(), time.perf_counter()
        guide.fit(training, steps=steps, **common)
        print(guide.history, guide.notes, flush=True)
        with use(lm):
            found = evaluate(guide, inputs, args.samples, seed=7)
        split = guide.history.time_split()
        rate = torch.tensor(guide.history.column("samples_per_second")).nanmedian()
        keep(
            name, **found, steps=len(guide.history), tokens_a_step=a_step,
            tokens=a_step * len(guide.history), seconds=time.perf_counter() - began,
            time_split=split, samples_per_second=float(rate), notes=guide.notes,
        )  # fmt: skip
        if args.save:
            guide.save(args.save / name, overwrite=True)
    print(table([row for row in rows if task.key.items() <= row.items()]))


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| proposal | steps | tokens | ESS fraction | ELBO | log Z >= | EUBO | KL(q‖p) | KL(p‖q) <= |",
        "| --- |" + " ---: |" * 8,
    ]
    for row in rows:
        elbo, log_z, eubo = (row[f"eval_{name}"] for name in ("elbo", "log_z", "eubo"))
        spent = f"{row['tokens'] / 1000:,.0f} k" if "tokens" in row else ""
        lines.append(
            f"| {row['name']} | {row.get('steps', '')} | {spent} | {row['eval_ess']:.1%} | "
            f"{elbo:.2f} | {log_z:.2f} | {eubo:.2f} | {log_z - elbo:.2f} to {eubo - elbo:.2f} | "
            f"{eubo - log_z:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
