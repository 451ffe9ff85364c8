"""Sums by a language model that has a calculator, and a guide that learns to use it.

    python examples/arithmetic.py --quick                          # few-shot and guide, in 2 minutes
    python examples/arithmetic.py --method all --out arithmetic.json

The model writes what is to be computed next, "3 + 4 =", a calculator the result behind it, and so on
while the model wants another step; then it writes the answer. In training the answer is observed, so a
good guide draws steps that lead to it. At test time neither the guide nor the model sees it: the steps
are the guide's, the answer is the model's, and the answer of most of 10 such draws counts.

"zero_shot" is the model without worked examples, "prior" with them. "guide" learns from problems and
their answers, by the default loss; "ppo" too, by its own; "sft" by maximum likelihood from
--demonstrations problems with their steps; all three at the same number of language-model tokens.
"mcmc" trains nothing: its chains draw from the model's own p(steps, answer) to the power of --power.
Problems of 3 and 4 operands are trained on, problems of 5 are not. Expect "prior" to lose its way more
often the longer a problem is.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pyro import poutine

import lmppl
from lmppl import lm_sample, tool
from paper.calculator import calculate, calculate_in_words
from paper.command import Run, Task, above_0, positive
from paper.evaluation import PROPOSAL_COLUMNS, LogZ, held_out, log_z_by_runs
from paper.inputs import BadInput, check_fits
from paper.rows import Column, Row
from paper.training import Trainer
from paper.voting import VOTES, Shares, guided_shares, score, shares

WORKED = ("6 + 2 - 3", "9 - 4 + 5 - 2", "8 - 1 + 6", "5 + 7 - 4 + 1")
QUESTION, ANSWER = "Question: What is {problem}?\nSteps:", "\nAnswer:"
STEP = r" -?[0-9]{1,8} [+-] [0-9]{1,8} ="
NEXT, END = ";", "."
MOST_STEPS, MOST_TOKENS = 6, 24
OPERANDS = {"trained": (3, 4), "new": (5,)}

Program = Callable[..., Any]


def work(problem: str, *, examples: int = len(WORKED), errors: str = "reject") -> list[str]:
    """Steps by the model, each computed by the calculator. A step that the calculator refuses has
    probability zero; under ``errors="text"`` the model reads "error" and goes on."""
    text = ["".join(map(worked, WORKED[:examples])) + QUESTION.format(problem=problem)]
    compute = calculate if errors == "reject" else calculate_in_words
    number, more = 0, NEXT
    while more == NEXT and number < MOST_STEPS:
        number, seen = number + 1, {"guide_prompt": text}
        step = lm_sample(f"step_{number}", text, max_tokens=MOST_TOKENS, regex=STEP, infer=seen)
        result = tool(f"result_{number}", compute, step, on_error="reject")
        text = [*text, step, f" {result}"]
        seen = {"guide_prompt": text}
        more = lm_sample(f"more_{number}", text, choices=[NEXT, END], infer=seen)
        text = [*text, more]
    return [*text, ANSWER]


def reply(*text: str, answer: str | None = None) -> str:
    """The answer after some steps."""
    return str(lm_sample("answer", list(text), max_tokens=8, stop="\n", obs=answer)).strip()


def arithmetic(problem: str, answer: str | None = None, **options: Any) -> str:
    """p(steps | problem) p(answer | problem, steps); ``options`` are those of ``work``."""
    return reply(*work(problem, **options), answer=answer)


# --- problems ------------------------------------------------------------------------------------


def steps_of(problem: str) -> list[tuple[str, int]]:
    """The right steps, each with its result."""
    first, *terms = problem.split()
    steps, result = [], int(first)
    for sign, operand in zip(terms[::2], terms[1::2], strict=True):
        step = f" {result} {sign} {operand} ="
        result = calculate(step)
        steps.append((step, result))
    return steps


def worked(problem: str) -> str:
    """A worked example."""
    steps = steps_of(problem)
    written = NEXT.join(f"{step} {result}" for step, result in steps) + END
    return f"{QUESTION.format(problem=problem)}{written}{ANSWER} {steps[-1][1]}\n"


def observed(problem: str) -> tuple[str, str]:
    """The program's arguments in training."""
    return problem, f" {calculate(problem)}\n"


def demonstration(problem: str) -> dict[str, str]:
    """The right steps as latents."""
    steps = steps_of(problem)
    latents = {f"step_{number}": step for number, (step, _) in enumerate(steps, 1)}
    signs = [NEXT] * (len(steps) - 1) + [END]
    return latents | {f"more_{number}": sign for number, sign in enumerate(signs, 1)}


def problems(operands: int) -> Iterator[str]:
    """Distinct problems with so many one-digit operands and no result below 0, none of them a worked
    example; the same ones, in the same order, each time."""
    rng, seen = random.Random(operands), set(WORKED)
    for _ in range(100_000):
        terms = [f"{rng.choice('+-')} {rng.randint(1, 9)}" for _ in range(operands - 1)]
        problem = " ".join([str(rng.randint(1, 9)), *terms])
        if problem not in seen and all(result >= 0 for _, result in steps_of(problem)):
            seen.add(problem)
            yield problem


def split(num_train: int, num_test: int) -> tuple[list[str], dict[int, list[str]]]:
    """Problems to train on, and to test on by number of operands. They are the beginning and what
    comes next of one sequence without repetition, so no problem is in both.

    Raises:
        BadInput: if there are not so many.
    """
    train, test = [], {}
    for operands in (*OPERANDS["trained"], *OPERANDS["new"]):
        count = num_train if operands in OPERANDS["trained"] else 0
        found = list(itertools.islice(problems(operands), num_test + count))
        if len(found) < num_test + count:
            raise BadInput(
                f"there are {len(found)} problems of {operands} operands, and --problems {num_train} "
                f"with --held-out {num_test} need {num_test + count}: take fewer"
            )
        test[operands], more = found[:num_test], found[num_test:]
        train += more
    random.Random(0).shuffle(train)
    return train, test


# --- methods -------------------------------------------------------------------------------------


def trainer(run: Run, program: Program, train: Sequence[str]) -> Trainer:
    """Few problems with their steps for "sft", all problems with their answers for the others."""
    few, batch = train[: run.args.demonstrations], {"batch_size": run.args.batch_size}
    options: dict[str, dict[str, Any]] = dict.fromkeys(("guide", "ppo"), batch)
    demonstrations = list(map(demonstration, few))
    options["sft"] = {**batch, "data": list(map(observed, few)), "demonstrations": demonstrations}
    new_guide = lambda: lmppl.LMGuide(program, lm=run.lm, condition_on=[])  # noqa: E731
    return Trainer(new_guide, list(map(observed, train)), options, run.args.steps)


def answers(run: Run, options: dict[str, Any], test: Sequence[str], guide: Any) -> list[Shares]:
    """The votes of a method on problems whose answers nobody sees."""
    inputs = [(problem,) for problem in test]
    of_run = {"lm": run.lm, "seed": run.seed}
    if guide is not None:
        return guided_shares(partial(work, **options), reply, inputs, guide=guide, **of_run)
    program: Program = partial(arithmetic, **options)
    if run.method != "mcmc":
        return shares(program, inputs, method="importance", **of_run)
    chains = {"num_chains": VOTES, "num_starts": VOTES, "warmup": run.args.moves, "thin": 1}
    sharper = poutine.scale(program, scale=run.args.power)
    return shares(sharper, inputs, method="mcmc", **chains, **of_run)


def references(run: Run, program: Program, problems: Sequence[str]) -> list[LogZ]:
    """log Z of problems with their answers, by four times as many draws of the model. (SMC would compare
    draws that have given their answer with longer ones that have not, to the latter's advantage.)

    Raises:
        BadInput: if no draw is alive.
    """
    options = {"lm": run.lm, "num_samples": run.args.samples, "runs": 4}
    found = [log_z_by_runs(program, observed(problem), **options) for problem in problems]
    for problem, (log_z, _) in zip(problems, found, strict=True):
        if log_z == -math.inf:
            raise BadInput(f"no draw for {problem!r} is alive: raise --samples")
    return found


def measure(run: Run) -> dict[str, Any]:
    """Accuracy by number of operands; the ESS on some of the same problems with their answers."""
    train, test = run.once("problems", lambda: split(run.args.problems, run.args.held_out))
    examples = 0 if run.method == "zero_shot" else len(WORKED)
    options = {"examples": examples, "errors": run.args.errors}
    program = partial(arithmetic, **options)
    longest = "".join(map(worked, WORKED)) + worked(train[0])
    check_fits(run.lm, [longest], MOST_STEPS * MOST_TOKENS)
    guide = None
    if run.method in ("guide", "sft", "ppo"):
        guide = run.train(lambda: trainer(run, program, train))
    figures: dict[str, Any] = {"answers": []}
    for operands, problems in test.items():
        found = answers(run, options, problems, guide)
        scores = score(found, [str(calculate(problem)) for problem in problems])
        figures |= {f"{name}_{operands}": value for name, value in scores.items()}
        figures["answers"].append((problems[0], list(found[0].items())[:3]))
    figures["share"] = statistics.fmean(figures[f"share_{operands}"] for operands in test)
    if run.method in ("zero_shot", "mcmc"):
        return figures
    few = [problem for problems in test.values() for problem in problems[: run.args.inputs]]
    log_z = run.log_z(
        lambda: references(run, program, few), "problems held_out inputs samples errors"
    )
    return figures | held_out(
        program, list(map(observed, few)), log_z, guide=guide, lm=run.lm,
        num_samples=run.args.samples, seed=run.seed,
    )  # fmt: skip


def show(row: Row) -> None:
    """What was answered to one problem of each length."""
    print(f"\n{row.method}:")
    for problem, found in row.figures["answers"]:
        votes = ", ".join(f"{answer!r} {share:.0%}" for answer, share in found)
        print(f"  {problem} = {calculate(problem)}: {votes or 'no answer'}")


TASK = Task(
    name="arithmetic",
    title="Sums, with a calculator: accuracy by the number of operands",
    methods=("zero_shot", "prior", "guide", "sft", "ppo", "mcmc"),
    columns={
        "accuracy_3": Column("of 3", ".0%"),
        "accuracy_4": Column("of 4", ".0%"),
        "accuracy_5": Column("of 5", ".0%"),
        "share": Column("right draws", ".0%"),
        **PROPOSAL_COLUMNS,
    },
    measure=measure,
    quick={"steps": 4, "batch_size": 8, "samples": 16, "held_out": 2, "inputs": 1},
    show=show,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = TASK.parser(__doc__)
    parser.set_defaults(steps=60, batch_size=32, samples=256)
    parser.add_argument("--problems", type=positive, default=100, help="to train on, a length")
    parser.add_argument(
        "--held-out", type=positive, default=20, help="problems to test on, a length"
    )
    parser.add_argument("--inputs", type=positive, default=2, help="of them for the ESS")
    parser.add_argument("--demonstrations", type=positive, default=50, help='that "sft" sees')
    parser.add_argument(
        "--errors", choices=["reject", "text"], default="reject",
        help="what the calculator says to a step that it refuses: nothing (probability 0), or so",
    )  # fmt: skip
    parser.add_argument("--power", type=above_0, default=4.0, help="of p, in mcmc")
    parser.add_argument("--moves", type=positive, default=30, help="of a chain, in mcmc")
    TASK.main(parser, argv)


if __name__ == "__main__":
    main()
