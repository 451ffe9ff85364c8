"""A trained guide in SMC against the prior, at equal language-model tokens: the spread of log Z.

    python -m benchmarks.amortized --openings sentences.txt --save guides
    python -m benchmarks.smc_guide --guide guides/vargrad --openings sentences.txt --out smc_guide.json

The program is that of ``benchmarks.amortized``, and so are the held-out simulations. On each of the
first few, every method gets as many particles as ``--tokens`` tokens pay for (drawn and scored, as
runs aside have counted them; a prompt is read once, and not counted), and runs with the same seeds.
"guide" is SMC with the guide as proposal; "flow" takes the guide as twist too, and compares
texts each time that they have grown by 2 or 4 tokens. A comparison scores the ending for every text,
so that these get fewer particles.

The program has one latent text, so without a twist nothing is resampled before the end: "prior" is
importance sampling, and "guide" gives the same numbers as "guide, importance".

Expect log of the mean Z-hat to agree where the standard deviations of log Z-hat are small, and mean
log Z-hat to be below it, by about half the variance. A method with a large deviation finds too little:
most of its runs miss what holds the mass, and then the mean over the seeds does too. Deviations are
themselves uncertain by a sixth with 20 seeds. ESS is of the last weights: after resampling within the
text, copies count as if they were draws. Rows that are in the file already are kept; without
``--guide`` one is trained first. By default 4 million tokens in all: some hours on a CPU core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import lmppl
from benchmarks.amortized import SEED_OF_HELD_OUT
from benchmarks.infilling_task import Task
from lmppl import use
from lmppl.engines import Engine
from lmppl.report.machine import machine
from lmppl.runtime import log_mean_exp
from lmppl.states import write_text
from lmppl.training.data import simulations

METHODS: dict[str, Engine] = {
    "prior": lmppl.SMC(),
    "guide, importance": lmppl.Importance(),
    "guide": lmppl.SMC(),
    "guide, flow every 4": lmppl.SMC(twist="flow", twist_every=4),
    "guide, flow every 2": lmppl.SMC(twist="flow", twist_every=2),
}
SEEDS_OF_CALIBRATION = range(1_000_000, 1_000_003)  # none of those that count
FIRST_PARTICLES = 16


def spent(posterior: lmppl.Posterior) -> int:
    return posterior.info["tokens_sampled"] + posterior.info["tokens_scored"]


def measure(
    method: str, given: tuple[Any, ...], guide: lmppl.LMGuide, lm: lmppl.LM, tokens: int, seeds: int
) -> dict[str, Any]:
    """One method on one input.

    Args:
        given: the program's arguments.
        tokens: about how many a run may spend.
        seeds: how many runs; at least 2.
    """

    def run(particles: int, seed: int) -> lmppl.Posterior:
        return lmppl.infer(
            guide.model, *given, method=METHODS[method], lm=lm, num_samples=particles, seed=seed,
            guide=None if method == "prior" else guide, progress=False,
        )  # fmt: skip

    particles = FIRST_PARTICLES
    for _ in range(2):  # equal requests are served once: tokens grow a little slower than particles
        aside = statistics.mean(spent(run(particles, seed)) for seed in SEEDS_OF_CALIBRATION)
        particles = max(2, round(particles * tokens / aside))
    runs = [run(particles, seed) for seed in range(seeds)]
    log_z = [each.log_evidence for each in runs]
    return {
        "particles": particles,
        "tokens_a_run": statistics.mean(map(spent, runs)),
        "log_mean_z": log_mean_exp(torch.tensor(log_z, dtype=torch.float64)),
        "mean_log_z": statistics.mean(log_z),
        "sd_log_z": statistics.stdev(log_z),
        "ess": statistics.mean(each.ess for each in runs) / particles,
        "log_z": log_z,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| input | method | particles | tokens a run | log of mean Ẑ | mean log Ẑ | sd of log Ẑ | "
        "ESS fraction |",
        "| ---: | --- |" + " ---: |" * 6,
    ]
    for row in sorted(rows, key=lambda row: row["input"]):  # stable
        lines.append(
            f"| {row['input']} | {row['method']} | {row['particles']:,} | "
            f"{row['tokens_a_run']:,.0f} | {row['log_mean_z']:.2f} | {row['mean_log_z']:.2f} | "
            f"{row['sd_log_z']:.2f} | {row['ess']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guide", type=Path, help="a folder; without, a guide is trained")
    parser.add_argument("--openings", type=Path, help="a text file, a sentence a line")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--pairs", type=int, default=500, help="as the guide was trained on")
    parser.add_argument("--held-out", type=int, default=50, help="openings left out of training")
    parser.add_argument("--inputs", type=int, default=3, help="held-out simulations to run on")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=12_000, help="a run")
    parser.add_argument("--steps", type=int, default=100, help="of training, without --guide")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, help="JSON file of rows; those in it are kept")
    Task.add_options(parser)
    args = parser.parse_args()
    task = Task.of(args)
    infill = task.program
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: a spread needs at least 2")
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    lm = lmppl.LM.from_pretrained(args.model, dtype=args.dtype)
    openings = task.openings(args.openings, lm, args.pairs + args.held_out)
    data = [(each,) for each in openings]
    training, held_out = data[: -args.held_out], data[-args.held_out :]
    if args.guide:
        guide = lmppl.LMGuide.load(args.guide, infill, lm=lm)
    else:
        guide = lmppl.LMGuide(infill, lm=lm, condition_on=["ending"])
        guide.fit(training, steps=args.steps, simulate=args.pairs, seed=0)
    with use(lm):
        pairs = simulations(guide, held_out, seed=SEED_OF_HELD_OUT)
        inputs = [
            (*given, one.observations["ending"])
            for given, one in itertools.islice(pairs, args.inputs)
        ]
    names = ("input", "method", "tokens", "seeds", "guide_steps", *task.key)
    known = {tuple(row.get(name) for name in names) for row in rows}
    for (number, given), method in itertools.product(enumerate(inputs), args.methods):
        steps = 0 if method == "prior" else len(guide.history)
        case = (number, method, args.tokens, args.seeds, steps, *task.key.values())
        if case in known:
            continue
        row = dict(zip(names, case, strict=True))
        row |= {"texts": [str(given[0]), str(given[1])]}
        row |= measure(method, given, guide, lm, args.tokens, args.seeds)
        print(json.dumps(row), flush=True)
        rows.append({**row, "model": lm.name, "machine": machine(lm.device)})
        if args.out:
            write_text(args.out, json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
