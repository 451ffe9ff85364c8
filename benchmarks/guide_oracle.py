"""Trained guides against the exact posterior: every loss on every small program, three seeds.

    python -m benchmarks.guide_oracle --out benchmarks/results/guide_oracle.json
    python -m benchmarks.guide_oracle --losses "vargrad, forward=0" --steps 1400

A guide's own distribution over all traces is enumerated, so no figure has sampling noise. All runs
have the same settings, the defaults. Expect, with 700 steps, the default loss below a total variation
of 0.005 on every program, and with 1,400 every loss whose optimum is the posterior below 0.01. Half a
minute to two minutes a run on one core; rows that are in the file already are kept. The last lines
are the tables of the docs, one for each number of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import lmppl
from lmppl.testing import guide_report
from lmppl.testing.programs import CASES

STEPS = 700
TARGET_POSTERIOR: dict[str, Any] = {
    "vargrad": "vargrad",
    "vargrad, forward=0": lmppl.losses.VarGrad(forward=0.0),
    **{name: name for name in ("tb", "subtb", "elbo", "wake")},
}
# The posterior of its number is a mixture of two Betas, and the guide's family one Beta.
LEFT_OUT = ("beta mixture",)
# Another latent follows every text, or the last latent is no text: there is nothing to cut.
NO_TRUNCATIONS = ("beta and text",)


def row(loss: str, name: str, seed: int, steps: int) -> dict[str, Any]:
    """One trained guide."""
    case = CASES[name]
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    began = time.perf_counter()
    guide.fit([case.args], steps=steps, seed=seed, loss=TARGET_POSTERIOR[loss], progress=False)
    report = guide_report(guide, case.program, case.args, case.lm)
    return {
        "loss": loss,
        "case": name,
        "seed": seed,
        "steps": steps,
        "tv": report.tv,
        "gap": report.gap,
        "dead_mass": report.dead_mass,
        "seconds": time.perf_counter() - began,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Worst of the seeds of rows with as many steps, as Markdown: total variation, then the gap in
    nats."""
    losses = [loss for loss in TARGET_POSTERIOR if any(r["loss"] == loss for r in rows)]
    lines = [
        "| program | " + " | ".join(f"`{loss}`" for loss in losses) + " |",
        "| --- |" + " --- |" * len(losses),
    ]
    for name in CASES:
        cells = []
        for loss in losses:
            own = [r for r in rows if r["loss"] == loss and r["case"] == name]
            if own:
                tv, gap = (max(r[key] for r in own) for key in ("tv", "gap"))
                cells.append(f"{tv:.4f} / {gap:.4f}")
            else:
                cells.append("")
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--losses", nargs="+", default=[*TARGET_POSTERIOR], choices=TARGET_POSTERIOR
    )
    parser.add_argument("--cases", nargs="+", default=[c for c in CASES if c not in LEFT_OUT])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, help="JSON file of rows; those in it are kept")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    known = {(r["loss"], r["case"], r["seed"], r["steps"]) for r in rows}
    for loss in args.losses:
        for name in args.cases:
            if loss == "subtb" and name in NO_TRUNCATIONS:
                continue
            for seed in args.seeds:
                if (loss, name, seed, args.steps) in known:
                    continue
                rows.append(row(loss, name, seed, args.steps))
                print(json.dumps(rows[-1]), flush=True)
                if args.out:
                    temporary = args.out.with_suffix(".tmp")
                    temporary.write_text(json.dumps(rows, indent=1))
                    os.replace(temporary, args.out)
    for steps in sorted({r["steps"] for r in rows}):
        print(f"\n{steps} steps\n\n{table([r for r in rows if r['steps'] == steps])}")


if __name__ == "__main__":
    main()
