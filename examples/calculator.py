"""Sums by a language model that may use a calculator: `regex` on each step, the result by `tool`.

    python examples/calculator.py
    python examples/calculator.py --compare     # with `regex`, and with calls that are rejected

The model writes what is to be computed, as " 12 + 5 =", and the calculator writes the result behind it.
Without `regex` a step that the calculator can't read kills the particle. With it no such step is drawn:
the probability of all the others is missing in the weights instead, so both programs have the same
posterior, and the same evidence, which is the probability that every step can be read. Prints the
ranked steps; with --compare, how many of the particles live. A minute on a laptop's CPU.
"""

from __future__ import annotations

import argparse
import re
from functools import partial

from rich.console import Console
from rich.table import Table

import lmppl
from lmppl import lm_sample, tool
from paper.calculator import calculate

EXAMPLES = [
    """\
Question: Tom has 8 apples, buys 5, eats 3, finds 2 and sells 6. How many are left?
Steps: 8 + 5 = 13; 13 - 3 = 10; 10 + 2 = 12; 12 - 6 = 6; done.

""",
    """\
Question: There were 20 birds, 6 flew away, 9 came, 4 came and 7 left. How many are there?
Steps: 20 - 6 = 14; 14 + 9 = 23; 23 + 4 = 27; 27 - 7 = 20; done.

""",
]
QUESTION = "Anna has 12 pens, finds 7, gives away 4, buys 10 and loses 2. How many does she have?"
STEP = r" \d+ [+-] \d+ ="
NUM_STEPS = 4


def result_of(step: str) -> int:
    """The result of a step.

    Raises:
        ValueError: it is none.
    """
    if re.fullmatch(STEP, step) is None:
        raise ValueError(f"{step!r} is no step")
    return calculate(step)


def solve(question: str, *, constrained: bool = True, examples: int = 2) -> int:
    """The steps of a sum, each of them computed, after so many worked examples."""
    text = ["".join(EXAMPLES[:examples]) + f"Question: {question}\nSteps:"]
    how = {"regex": STEP} if constrained else {"stop": "="}
    result = 0
    for number in range(1, NUM_STEPS + 1):
        step = lm_sample(f"step_{number}", text, max_tokens=12, **how)
        result = tool(f"result_{number}", result_of, step, on_error="reject")
        text = [*text, step, f" {result};"]
    return result


def run(
    lm: lmppl.LM, args: argparse.Namespace, constrained: bool = True, examples: int = 2
) -> lmppl.Posterior:
    """The posterior of the steps; without a live particle, what there is of one."""
    program = partial(solve, constrained=constrained, examples=examples)
    options = {"lm": lm, "method": args.method, "num_samples": args.num_samples, "seed": args.seed}
    try:
        return lmppl.infer(program, args.question, progress=False, **options)
    except lmppl.ZeroEvidenceError as error:
        return error.posterior


def compare(lm: lmppl.LM, args: argparse.Namespace) -> Table:
    """Both programs after two, one and no worked examples."""
    table = Table(title=f"{args.num_samples} particles, {args.method}")
    for column in ("worked examples", "program", "alive", "ESS", "log evidence", "seconds"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for examples in (2, 1, 0):
        for name, constrained in (("regex", True), ("rejected calls", False)):
            posterior = run(lm, args, constrained, examples)
            alive = int(posterior.log_weights.isfinite().sum())
            table.add_row(
                str(examples),
                name,
                f"{alive} ({alive / args.num_samples:.0%})",
                f"{posterior.ess:.0f}" if alive else "",
                f"{posterior.log_evidence:.2f}" if alive else "",
                f"{posterior.info['seconds']:.1f}",
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--method", choices=["importance", "smc"], default="smc")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="any causal LM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="with calls that are rejected")
    args = parser.parse_args()
    lm = lmppl.LM.from_pretrained(args.model)
    print(args.question)
    if args.compare:
        Console().print(compare(lm, args))
    else:
        print(run(lm, args))


if __name__ == "__main__":
    main()
