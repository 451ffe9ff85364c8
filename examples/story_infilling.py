"""Story infilling: a beginning and an ending are given, what happened in between?

    python examples/story_infilling.py --method smc
    python examples/story_infilling.py --method all

Prints the ranked middles of one engine, or of three engines side by side. On a laptop's CPU the
three take about three minutes; expect `gflownet`, which learns to propose, to end with a larger
share of effective samples than `importance`, which proposes blindly from the language model.
"""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

import lmppl
from lmppl import lm_sample

BEGINNING = "Anna looked everywhere for her keys."
ENDING = " She found them at last inside the fridge, next to the milk."


def infill(beginning: str, ending: str | None = None) -> lmppl.Text:
    """p(z | beginning) p(ending | beginning, z): one sentence, and then the ending."""
    z = lm_sample("z", beginning, max_tokens=16, stop=".")
    lm_sample("ending", [beginning, z], max_tokens=None if ending else 24, obs=ending)
    return z


def run(method: str, lm: lmppl.LM, args: argparse.Namespace) -> lmppl.Posterior:
    """One engine on the story; only the word and its options differ."""
    options = {
        "importance": {},
        "smc": {},
        "gflownet": {"steps": args.steps, "fit": {"batch_size": args.batch_size}},
    }
    return lmppl.infer(
        infill,
        args.beginning,
        args.ending,
        lm=lm,
        method=method,
        num_samples=args.num_samples[method],
        seed=args.seed,
        **options[method],
    )


def side_by_side(posteriors: dict[str, lmppl.Posterior]) -> Table:
    table = Table(title="What happened in between?", show_lines=True)
    table.add_column("")
    for method in posteriors:
        table.add_column(method, overflow="fold")
    rows = {
        "log evidence (nats)": lambda p: f"{p.log_evidence:.2f}",
        "samples": lambda p: f"{len(p)}",
        "ESS": lambda p: f"{p.ess:.1f} ({100 * p.ess / len(p):.1f}%)",
        "LM tokens drawn": lambda p: f"{p.info['tokens_sampled']:,}",
        "LM tokens scored": lambda p: f"{p.info['tokens_scored']:,}",
        "seconds": lambda p: f"{p.info['seconds']:.0f}",
    }
    for title, show in rows.items():
        table.add_row(title, *(show(p) for p in posteriors.values()))
    for rank in range(4):
        cells = []
        for posterior in posteriors.values():
            ranked = list(posterior.probs("z").items())
            text, weight = ranked[rank] if rank < len(ranked) else ("", 0.0)
            cells.append(f"{100 * weight:.0f}% {text.strip()}" if weight else "")
        table.add_row(f"middle {rank + 1}", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["importance", "smc", "gflownet", "all"], default="smc")
    parser.add_argument("--beginning", default=BEGINNING)
    parser.add_argument("--ending", default=ENDING)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="any causal LM")
    parser.add_argument("--num-samples", type=int, help="for the one engine that is run")
    parser.add_argument("--steps", type=int, default=20, help="training steps of gflownet")
    parser.add_argument("--batch-size", type=int, default=24, help="traces a training step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    defaults = {"importance": 256, "smc": 128, "gflownet": 64}
    args.num_samples = {name: args.num_samples or number for name, number in defaults.items()}

    console = Console()
    began = time.perf_counter()
    lm = lmppl.LM.from_pretrained(args.model)
    console.print(f"{lm} loaded in {time.perf_counter() - began:.1f} s", highlight=False)
    console.print(f"{args.beginning} [dim]...[/dim]{args.ending}\n", highlight=False)
    if args.method != "all":
        print(run(args.method, lm, args))
        return
    posteriors = {}
    for method in ("importance", "smc", "gflownet"):
        posteriors[method] = run(method, lm, args)
        console.print(f"{method}: {posteriors[method].info['seconds']:.0f} s", highlight=False)
    console.print(side_by_side(posteriors))


if __name__ == "__main__":
    main()
