"""Steering: how many constrained draws match, with few tokens for it, and how far estimates scatter.

    python -m benchmarks.steering
    python -m benchmarks.steering --particles 64 --seeds 5

For each regular expression and each ``max_tokens``, from the least that can match, texts are drawn by
the masks of the constraint: with steering, which leaves out tokens after which no match can be reached
within the tokens that are left, and without. A text is weighted by the probability of all that was
allowed at each of its tokens, and by 0 if it does not match; the mean weight estimates the probability
of matching. "scatter" is the standard deviation of its logarithm (nats) over the seeds ("-": some
estimate is 0). "prepared" is the time it took to build the automaton and what tokens do in all of its
states, once for each regular expression. Expect three minutes of one core.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import lmppl
from lmppl.constraints import Regex
from lmppl.lm import embedded
from lmppl.lm.batches.requests import Draw
from lmppl.lm.tokens.constraints.distance import Distance
from lmppl.lm.tokens.stopping import Stopping
from lmppl.runtime import log_mean_exp

CASES = {  # a prompt and what its continuation must match
    "Tom has 8 apples and buys 5. Steps: 8 + 5 =": r" \d+; \d+ [+-] \d+ =",
    "The war ended on": r" \d{1,2} (January|May|August|September|November) \d{4}\.",
    "Write to": r" [a-z]+(\.[a-z]+)?@[a-z]+\.(com|org|net)",
    "Three words:": r" [a-z]+, [a-z]+, [a-z]+\.",
}
MORE_TOKENS = (0, 2, 6)  # than the least that can match


@dataclass(frozen=True)
class Run:
    """What draws came to.

    Args:
        live: the share of texts that match.
        log_evidence: estimates (nats), one for each seed.
    """

    live: float
    log_evidence: list[float]

    @property
    def scatter(self) -> float:
        """Standard deviation of the estimates, nats; NaN if one is -inf."""
        finite = min(self.log_evidence) > -math.inf
        return stdev(self.log_evidence) if finite else math.nan


def run(
    lm: lmppl.LM, prompt: str, stopping: Stopping, *, steered: bool, options: argparse.Namespace
) -> Run:
    """Draw as many texts as there are particles, for each seed."""
    prefix, most = lm.encode(prompt), stopping.max_tokens
    assert most is not None
    live, evidence = [], []
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand((options.particles, most), generator=generator, dtype=torch.float64)
        drawn = lm.draw([Draw(prefix, stopping, row, steered=steered) for row in uniforms])
        log_weights = torch.tensor(
            [float(d.log_masses.sum()) if d.matches else -math.inf for d in drawn],
            dtype=torch.float64,
        )
        live.append(float((log_weights > -math.inf).double().mean()))
        evidence.append(float(log_mean_exp(log_weights)))
    return Run(mean(live), evidence)


def rows(lm: lmppl.LM, prompt: str, pattern: str, options: argparse.Namespace) -> list[list[str]]:
    """Of one regular expression."""
    start = time.perf_counter()
    distance = Distance.of(pattern, lm.vocabulary)
    assert distance is not None
    least = int(distance.needed(distance.start))
    seconds = time.perf_counter() - start
    found = []
    for more in options.more_tokens:
        stopping = Stopping(lm.vocabulary, (), least + more, Regex(pattern))
        both = [run(lm, prompt, stopping, steered=s, options=options) for s in (True, False)]
        row = [escape(f"`{pattern}`".replace("|", "\\|")), f"{least + more}"]
        row += [f"{side.live:.0%}" for side in both]
        row += ["-" if math.isnan(side.scatter) else f"{side.scatter:.2f}" for side in both]
        found.append([*row, f"{seconds * 1e3:.0f} ms"])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=embedded.ALIAS, help="as LM.from_pretrained takes it")
    parser.add_argument("--particles", type=int, default=64, help="texts for each estimate")
    parser.add_argument("--seeds", type=int, default=5, help="estimates for each row")
    parser.add_argument(
        "--more-tokens", type=int, nargs="+", default=MORE_TOKENS, help="beyond the least"
    )
    options = parser.parse_args(argv)
    lm = lmppl.LM.from_pretrained(options.model)

    table = Table(
        "regular expression", "max_tokens", "live", "not steered", "scatter", "not steered", "prepared",
        box=box.MARKDOWN,
    )  # fmt: skip
    for prompt, pattern in CASES.items():
        for row in rows(lm, prompt, pattern, options):
            table.add_row(*row)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
