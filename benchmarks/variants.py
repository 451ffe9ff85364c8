"""What raises a guide's gain: trainings with other options, judged on inputs that they have not seen.

    python -m benchmarks.variants continuation --steps 200 --out FILE.json
    python -m benchmarks.variants continuation --steps 200 --set forward=3 loss=vargrad --out FILE.json
    python -m benchmarks.variants mentions --lora r=4 lora_alpha=4 --out FILE.json
    python -m benchmarks.variants mentions --demonstrations smc --out FILE.json
    python -m benchmarks.variants infilling --steps 0 --out FILE.json

The inputs are those that a task of ``examples/`` trains on; its held-out ones, on which its results
are reported, are left alone. The last --validate of them judge, the others train. ``--set`` gives
options of ``fit``, ``--lora`` those of the adapter's ``LoraConfig``. With ``--demonstrations`` the
training begins from a posterior of each training input, by that engine. With ``--distil N`` it ends by N
steps of maximum likelihood on posteriors by the guide itself. With 0 steps the prior and the untrained
guide are judged. Tokens are those of all that, but not of judging.

E_q[u], the mean of log R - log q in nats, falls short of log Z by the divergence of the guide from the
posterior, so on the same inputs the larger one is the better, whatever log Z is. Expect a minute of CPU
for every ten to twenty steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lmppl
from benchmarks.tasks import EXAMPLES
from lmppl.lm.network.adapter import default_config
from lmppl.states import write_text

assert str(EXAMPLES) in sys.path  # where the tasks are

import arithmetic  # noqa: E402
import continuation  # noqa: E402
import infilling  # noqa: E402
from paper.command import positive, several  # noqa: E402
from paper.inputs import lines_of  # noqa: E402
from paper.training import tokens  # noqa: E402

JUDGING, DEMONSTRATING = 100, 10_000  # seeds of the draws of the first input


@dataclass(frozen=True)
class Case:
    """A program, inputs of it, its guide's options, and those of SMC for demonstrations."""

    program: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]
    guide: dict[str, Any] = field(default_factory=dict)
    smc: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A training and how its guide is judged, in the mean over the validation inputs.

    Attributes:
        task, label, seed, steps, samples: what was run; ``samples`` draws of each input.
        ess: effective samples as a share of the draws; ``least_ess`` of the worst input.
        mean_u: E_q[log R - log q] of live draws, nats.
        dead: share of draws with R = 0.
        tokens, minutes: of the training.
    """

    task: str
    label: str
    seed: int
    steps: int
    samples: int
    ess: float
    least_ess: float
    mean_u: float
    dead: float
    tokens: int
    minutes: float

    def is_again(self, other: Variant) -> bool:
        """Whether both are of the same settings."""
        names = "task", "label", "seed", "steps", "samples"
        return all(getattr(self, name) == getattr(other, name) for name in names)


def of_continuation() -> Case:
    prompts = lines_of(continuation.OPENINGS)[:-12]
    return Case(continuation.continuation, [(prompt, 0.8, 16) for prompt in prompts])


def of_infilling(file: str = infilling.STORIES.name, max_tokens: int = 20) -> Case:
    stories = infilling.stories_of(infilling.STORIES.with_name(file))[:-12]
    inputs = [(s.beginning, s.ending, max_tokens) for s in stories]
    return Case(infilling.infilling, inputs, smc={"twist": "lookahead"})


def of_mentions() -> Case:
    """Things that the ending mentions again."""
    return of_infilling("mentions.tsv", max_tokens=3)


def of_arithmetic() -> Case:
    train, _ = arithmetic.split(100, 20)
    inputs = list(map(arithmetic.observed, train))
    return Case(arithmetic.arithmetic, inputs, {"condition_on": []})


CASES: dict[str, Callable[[], Case]] = {
    "continuation": of_continuation,
    "infilling": of_infilling,
    "mentions": of_mentions,
    "arithmetic": of_arithmetic,
}


def posteriors_of(
    case: Case, inputs: Sequence[tuple[Any, ...]], lm: lmppl.LM, **options: Any
) -> list[lmppl.Posterior | None]:
    """Of each input; None where no draw is alive."""
    found: list[lmppl.Posterior | None] = []
    for number, args in enumerate(inputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few effective draws, for one
            try:
                found.append(
                    lmppl.infer(
                        case.program, *args, lm=lm, seed=DEMONSTRATING + number, progress=False,
                        **options,
                    )
                )  # fmt: skip
            except lmppl.ZeroEvidenceError:
                found.append(None)
    return found


def judge(
    case: Case, inputs: Sequence[tuple[Any, ...]], guide: Any, lm: lmppl.LM, samples: int
) -> dict[str, float]:
    """A guide, or the prior (None), on inputs."""
    found = [
        lmppl.diagnose(
            case.program, *args, guide=guide, lm=lm, num_samples=samples, seed=JUDGING + number,
            progress=False,
        )
        for number, args in enumerate(inputs)
    ]  # fmt: skip
    return {
        "ess": statistics.fmean(one.ess_fraction for one in found),
        "least_ess": min(one.ess_fraction for one in found),
        "mean_u": statistics.fmean(one.elbo_alive for one in found),
        "dead": statistics.fmean(one.dead_fraction for one in found),
    }


def run(args: argparse.Namespace) -> list[Variant]:
    """Train and judge, or judge what is not trained."""
    case, lm = CASES[args.task](), lmppl.LM.from_pretrained(args.model)
    training, validation = case.inputs[: -args.validate], case.inputs[-args.validate :]
    lora = replace(default_config(lm.model), **dict(args.lora)) if args.lora else None
    guide = lmppl.LMGuide(case.program, lm=lm, lora=lora, **case.guide)
    variant = partial(Variant, args.task, seed=args.seed, steps=args.steps, samples=args.samples)
    judged = partial(judge, case, validation, lm=lm, samples=args.samples)
    if not args.steps:
        return [
            variant(label, **judged(guide=of_label), tokens=0, minutes=0.0)
            for label, of_label in (("prior", None), ("untrained guide", guide))
        ]
    options, before, began = dict(args.set), tokens(lm), time.perf_counter()
    of_training = partial(posteriors_of, case, training, lm, num_samples=args.demonstrated)
    if args.demonstrations:
        smc = case.smc if args.demonstrations == "smc" else {}
        options["demonstrations"] = of_training(method=args.demonstrations, **smc)
    guide.fit(training, args.steps, seed=args.seed, **options)
    if args.distil:
        found = of_training(method="gflownet", guide=guide)
        guide.fit(training, args.distil, seed=args.seed, loss="sft", demonstrations=found)
    spent, minutes = tokens(lm) - before, (time.perf_counter() - began) / 60
    return [variant(label_of(args), **judged(guide=guide), tokens=spent, minutes=minutes)]


def label_of(args: argparse.Namespace) -> str:
    """What is not as it would be by default."""
    labels = [f"{name}={value}" for name, value in args.set]
    if args.lora:
        labels.append(f"lora({', '.join(f'{name}={value}' for name, value in args.lora)})")
    if args.demonstrations:
        labels.append(f"demonstrations={args.demonstrations}({args.demonstrated})")
    if args.distil:
        labels.append(f"then {args.distil} of sft")
    return ", ".join(labels) or "defaults"


def table(variants: Sequence[Variant]) -> str:
    """Markdown."""
    lines = [
        "| task | `fit(...)` | steps | tokens | ESS | of the worst input | E_q[u] | seed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for v in sorted(variants, key=lambda v: (v.task, v.steps, v.seed)):
        figures = f"{v.tokens:,} | {v.ess:.1%} | {v.least_ess:.1%} | {v.mean_u:.2f} | {v.seed}"
        lines.append(f"| {v.task} | {v.label} | {v.steps} | {figures} |")
    return "\n".join(lines)


def option(given: str) -> tuple[str, Any]:
    """``name=value``; a value is JSON, or else text."""
    name, equals, value = given.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{given!r}: give an option and its value, forward=3")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=CASES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", type=option, nargs="*", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--lora", type=option, nargs="*", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--demonstrations", choices=["importance", "smc", "mcmc"])
    parser.add_argument(
        "--demonstrated", type=positive, default=64, help="samples of each posterior of those"
    )
    parser.add_argument("--distil", type=positive, help="steps on posteriors by the guide")
    parser.add_argument("--samples", type=several, default=256, help="of each input")
    parser.add_argument(
        "--validate", type=positive, default=6, help="inputs that are not trained on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, help="JSON file of rows, to which these are added")
    args = parser.parse_args(argv)
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    known, found = [Variant(**row) for row in rows], run(args)
    variants = [v for v in known if not any(v.is_again(new) for new in found)] + found
    if args.out:
        write_text(args.out, json.dumps([asdict(v) for v in variants], indent=1) + "\n")
    print(table(variants))


if __name__ == "__main__":
    main()
