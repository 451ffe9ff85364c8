"""Every engine on one program whose answer is known; prints the table of docs/engines.md.

    python benchmarks/engine_table.py [--runs 100] [--num-samples 32] [--case "observed text"]

For each engine, over many seeds: the mean of the evidence estimate divided by the true evidence
(1 if unbiased; with its standard error), the spread of its logarithm, the ESS, the total variation
between the average of the weighted posteriors and the truth, and the language model's work.
A few minutes on a laptop.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from statistics import fmean, stdev
from typing import Any

import lmppl
from lmppl.testing import iid_tv_floor, total_variation
from lmppl.testing.programs import CASES, Case


def engines(guide: lmppl.LMGuide) -> dict[str, tuple[Any, Any]]:
    """Label to engine and guide."""
    return {
        "importance": (lmppl.Importance(), None),
        "smc": (lmppl.SMC(), None),
        'smc, twist="lookahead"': (lmppl.SMC(twist="lookahead"), None),
        "importance, guide": (lmppl.Importance(), guide),
        "smc, guide": (lmppl.SMC(), guide),
        "gflownet": (lmppl.GFlowNet(), guide),
        "gflownet, correct=False": (lmppl.GFlowNet(correct=False), guide),
    }


def measure(case: Case, method: Any, guide: Any, runs: int, num_samples: int) -> list[str]:
    """The cells of one row of the table."""
    exact = case.enumerate()
    names = case.text_latents
    truth = exact.posterior(*names, text=True)
    ratios, logs, sizes, tokens = [], [], [], []
    average: Counter[Any] = Counter()
    began = time.perf_counter()
    for seed in range(runs):
        posterior = lmppl.infer(
            case.program, *case.args, method=method, lm=case.lm, guide=guide,
            num_samples=num_samples, seed=seed, progress=False,
        )  # fmt: skip
        if posterior.log_evidence is not None:
            logs.append(posterior.log_evidence)
            ratios.append(math.exp(posterior.log_evidence - exact.log_evidence))
        sizes.append(posterior.ess / num_samples)
        columns = [map(str, posterior[name]) for name in names]
        for values, weight in zip(
            zip(*columns, strict=True), posterior.weights.tolist(), strict=True
        ):
            average[values if len(names) > 1 else values[0]] += weight / runs
        tokens.append(posterior.info["tokens_sampled"] + posterior.info["tokens_scored"])
    seconds = (time.perf_counter() - began) / runs
    evidence, spread = "no claim", "no claim"
    if ratios:
        evidence = f"{fmean(ratios):.3f} ± {stdev(ratios) / math.sqrt(runs):.3f}"
        spread = f"{stdev(logs):.2f}"
    return [
        evidence,
        spread,
        f"{fmean(sizes):.0%}",
        f"{total_variation(truth, average):.3f}",
        f"{fmean(tokens):.0f}",
        f"{1000 * seconds:.0f} ms",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--case", default="observed text", choices=CASES)
    parser.add_argument("--steps", type=int, default=300, help="of the guide's training")
    options = parser.parse_args()
    case = CASES[options.case]
    began = time.perf_counter()
    guide = lmppl.LMGuide(case.program, lm=case.lm)
    guide.fit([case.args], steps=options.steps, seed=0)
    truth = case.enumerate().posterior(*case.text_latents, text=True)
    floor = iid_tv_floor(truth, options.runs * options.num_samples)
    print(f"expected TV of as many independent draws from the posterior: {floor:.3f}")
    print(f"guide: {options.steps} steps, {time.perf_counter() - began:.0f} s", flush=True)
    print("| engine | mean of estimate / evidence | sd of log | ESS | TV | LM tokens | time |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for label, (method, own) in engines(guide).items():
        cells = measure(case, method, own, options.runs, options.num_samples)
        print(f"| `{label}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
