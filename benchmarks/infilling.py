"""How good are proposals on a real language model? Story infilling, prior against trained guide.

    python benchmarks/infilling.py --steps 300

Prints, for the prior and the guide as proposals: the ELBO, the ESS fraction and log Z with its
standard error; whether the two estimates of log Z agree; and the spread of SMC's log Z over seeds
for each twist. The observed ending is chosen so that the prior's ESS fraction is below 5%.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import torch

import lmppl
from lmppl import lm_sample

BEGINNING = "Anna looked everywhere for her keys."
ENDING = " She found them at last inside the fridge, next to the milk."


def infill(beginning: str, ending: str) -> lmppl.Text:
    z = lm_sample("z", beginning, max_tokens=16, stop=".")
    lm_sample("ending", [beginning, z], obs=ending)
    return z


def keyword_twist(text: lmppl.Text) -> float:
    """A twist that a user would write by hand: a kitchen makes the ending likelier."""
    words = ("kitchen", "fridge", "milk", "breakfast", "food", "eat", "found")
    return 2.5 if any(word in text for word in words) else 0.0


def draws(args: argparse.Namespace, lm: lmppl.LM, guide: object, num: int, seed: int) -> dict:
    began = time.perf_counter()
    parts = [
        lmppl.infer(
            infill,
            args.beginning,
            args.ending,
            lm=lm,
            method="importance",
            guide=guide,
            num_samples=min(num - at, 512),
            seed=seed + at,
        ).log_weights
        for at in range(0, num, 512)
    ]
    u = torch.cat(parts)
    weights = torch.softmax(u, 0)
    fraction = float(1 / (weights**2).sum()) / num
    return {
        "samples": num,
        "elbo": float(u.mean()),
        "ess_fraction": fraction,
        "log_z": float(torch.logsumexp(u, 0)) - math.log(num),
        "stderr": math.sqrt((1 / fraction - 1) / num),
        "seconds": time.perf_counter() - began,
    }


def smc(args: argparse.Namespace, lm: lmppl.LM, guide: object, twist: object) -> dict:
    began = time.perf_counter()
    estimates = [
        lmppl.infer(
            infill,
            args.beginning,
            args.ending,
            lm=lm,
            method="smc",
            twist=twist,
            guide=guide,
            num_samples=args.particles,
            seed=seed,
        ).log_evidence
        for seed in range(args.seeds)
    ]
    return {
        "mean": statistics.mean(estimates),
        "sd": statistics.stdev(estimates),
        "log_mean_exp": float(torch.logsumexp(torch.tensor(estimates), 0)) - math.log(args.seeds),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beginning", default=BEGINNING)
    parser.add_argument("--ending", default=ENDING)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--prior-samples", type=int, default=2048)
    parser.add_argument("--guide-samples", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--fit", type=json.loads, default={}, help="options of fit, as JSON")
    parser.add_argument("--seeds", type=int, default=10, help="of SMC; 0: no SMC")
    parser.add_argument("--particles", type=int, default=64)
    args = parser.parse_args()
    lm = lmppl.LM.from_pretrained(args.model, dtype=args.dtype)
    print(lm, "torch", torch.__version__, "threads", torch.get_num_threads(), flush=True)

    prior = draws(args, lm, None, args.prior_samples, seed=1)
    print("prior", json.dumps(prior), flush=True)
    guide = lmppl.LMGuide(infill, lm=lm)
    before = draws(args, lm, guide, 256, seed=2)
    print("untrained guide", json.dumps(before), flush=True)
    began = time.perf_counter()
    guide.fit([(args.beginning, args.ending)], steps=args.steps, seed=0, **args.fit)
    training = time.perf_counter() - began
    for row in guide.history[:: max(1, args.steps // 8)]:
        short = {k: round(float(row[k]), 3) for k in ("step", "loss", "log_z", "elbo", "ess")}
        print("  ", json.dumps(short))
    after = draws(args, lm, guide, args.guide_samples, seed=3)
    print(f"guide after {args.steps} steps, {training:.0f} s", json.dumps(after), flush=True)
    gap = after["log_z"] - prior["log_z"]
    error = math.hypot(after["stderr"], prior["stderr"])
    print(f"log Z: guide - prior = {gap:.3f}, standard error {error:.3f}")
    print("best:", list(_best(args, lm, guide))[:4])
    if args.seeds:
        for name, twist in (("None", None), ("lookahead", "lookahead"), ("keyword", keyword_twist)):
            print(f"smc twist={name}", json.dumps(smc(args, lm, None, twist)), flush=True)
        print("smc guide", json.dumps(smc(args, lm, guide, None)), flush=True)


def _best(args: argparse.Namespace, lm: lmppl.LM, guide: object) -> dict:
    posterior = lmppl.infer(
        infill, args.beginning, args.ending, lm=lm, method="importance", guide=guide, seed=4
    )
    return posterior.probs("z")


if __name__ == "__main__":
    main()
