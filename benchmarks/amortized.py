"""Amortized infilling on a real language model: the guide's losses against each other and the prior.

    python -m benchmarks.amortized --openings sentences.txt --out benchmarks/results/amortized.json

The program draws a middle after an opening, and then an ending of fixed length. Openings are the
lines of a file, or, without one, sentences that the model writes. 500 pairs of middle and ending
are simulated from the program; a guide is trained on them by each loss, with the same default
settings and about the same number of language-model tokens (drawn, scored and trained on; steps are
counted out from the tokens of each loss's first steps). 50 further pairs are held out. Their exact
posterior draws, the simulated middles, bound log Z from above, so that the divergences of guide and
posterior are bracketed:

    log Z - ELBO <= KL(q || p) <= EUBO - ELBO        KL(p || q) <= EUBO - log Z

with log Z the importance-weighted lower bound. ``sft`` needs far fewer tokens a step: it stops early
when the ESS on 16 further simulations on the training openings grows no more. About a quarter of an
hour a loss on one CPU core; rows that are in the file already are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lmppl
from benchmarks.machine import machine
from lmppl import lm_sample, use
from lmppl.guides.data import simulated_inputs, simulations
from lmppl.guides.evaluation import evaluate
from lmppl.guides.options import FitOptions

SEED_OF_OPENINGS = "Here is a sentence from the news:"
SEED_OF_HELD_OUT = 1_000_003
CALIBRATION_STEPS = 3


def infilling(middle: int, ending_tokens: int) -> Callable[..., lmppl.Text]:
    """The program, for a middle of at most, and an ending of exactly, so many tokens."""

    def infill(opening: str, ending: str | None = None) -> lmppl.Text:
        z = lm_sample("z", opening, max_tokens=middle, stop=".")
        lm_sample("ending", [opening, z], max_tokens=ending_tokens, obs=ending)
        return z

    return infill


def add_lengths(parser: argparse.ArgumentParser) -> None:
    """The options that say which program."""
    parser.add_argument("--middle", type=int, default=4, help="tokens of the middle, at most")
    parser.add_argument("--ending", type=int, default=8, help="tokens of the ending")


def openings(path: Path | None, lm: lmppl.LM, num: int) -> list[str]:
    """Sentences of 6 to 14 words."""
    if path is None:
        texts, _ = lm.sample(SEED_OF_OPENINGS, 4 * num, max_tokens=24, stop=".", seed=0)
        lines = [str(text).strip() for text in texts]
    else:
        lines = [line.strip() for line in path.read_text().splitlines()]
    fitting = [line for line in lines if 6 <= len(line.split()) <= 14]
    random.Random(0).shuffle(fitting)
    return fitting[:num]


def tokens(lm: lmppl.LM) -> int:
    return lm.tokens_sampled + lm.tokens_scored + lm.tokens_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openings", type=Path, help="a text file, a sentence a line")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=50)
    add_lengths(parser)
    parser.add_argument("--samples", type=int, default=128, help="for each held-out input")
    parser.add_argument("--tokens", type=int, default=100_000, help="for each loss")
    parser.add_argument("--losses", nargs="+", default=["vargrad", "sft", "wake", "elbo", "ppo"])
    parser.add_argument("--most-steps", type=int, default=300, help="of any loss")
    parser.add_argument("--save", type=Path, help="a folder for the default loss's guide")
    parser.add_argument("--out", type=Path, help="JSON file of rows; those in it are kept")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    lm = lmppl.LM.from_pretrained(args.model, dtype=args.dtype)
    infill = infilling(args.middle, args.ending)
    lengths = {"middle": args.middle, "ending": args.ending}
    data = [(each,) for each in openings(args.openings, lm, args.pairs + args.held_out)]
    training, held_out = data[: -args.held_out], data[-args.held_out :]

    def keep(name: str, **figures: Any) -> None:
        row = {"name": name, **lengths, **figures}
        print(json.dumps(row), flush=True)
        rows.append({**row, "machine": machine(lm.device)})
        if args.out:
            temporary = args.out.with_suffix(".tmp")
            temporary.write_text(json.dumps(rows, indent=1))
            os.replace(temporary, args.out)

    def new_guide() -> lmppl.LMGuide:
        return lmppl.LMGuide(infill, lm=lm, condition_on=["ending"])

    known = {row["name"] for row in rows if lengths.items() <= row.items()}
    with use(lm):
        pairs = simulations(new_guide(), held_out, seed=SEED_OF_HELD_OUT)
        inputs = list(simulated_inputs(new_guide(), pairs, FitOptions(), len(held_out)))
        for name, guide in (("prior", None), ("untrained guide", new_guide())):
            if name not in known:
                keep(name, **evaluate(guide, inputs, args.samples, seed=7))
    for loss in args.losses:
        if loss in known:
            continue
        common: dict[str, Any] = {"simulate": args.pairs, "loss": loss, "seed": 0}
        before = tokens(lm)
        new_guide().fit(training, steps=1, **{**common, "simulate": 40})
        first = tokens(lm)
        new_guide().fit(training, steps=1 + CALIBRATION_STEPS, **{**common, "simulate": 40})
        a_step = (tokens(lm) - first - (first - before)) / CALIBRATION_STEPS
        steps = min(args.most_steps, max(10, round(args.tokens / a_step)))
        guide, began, before = new_guide(), time.perf_counter(), tokens(lm)
        if loss == "sft":
            common |= {"eval_data": 16, "eval_every": 25, "eval_samples": 32, "patience": 2}
        guide.fit(training, steps=steps, **common)
        print(guide.history, guide.notes, flush=True)
        with use(lm):
            found = evaluate(guide, inputs, args.samples, seed=7)
        split = guide.history.time_split()
        rate = torch.tensor(guide.history.column("samples_per_second")).nanmedian()
        keep(
            loss, **found, steps=len(guide.history), tokens_a_step=a_step,
            tokens=a_step * len(guide.history), seconds=time.perf_counter() - began,
            time_split=split, samples_per_second=float(rate), notes=guide.notes,
        )  # fmt: skip
        if args.save and loss == "vargrad":
            guide.save(args.save)
    print(table([row for row in rows if lengths.items() <= row.items()]))


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
