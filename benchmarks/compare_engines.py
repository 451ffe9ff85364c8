"""What each engine makes of its tokens: the error of log Z, and of an expectation, against tokens.

    python -m benchmarks.compare_engines --task random_number --out FILE.json --plot FILE.svg
    python -m benchmarks.compare_engines --task infilling --steps 150 --seeds 20 --out FILE.json

Every engine answers the same held-out inputs of one program, the first --inputs of them, with more and
more samples, many seeds each. Its error is the median, over seeds and inputs, of the distance to the
truth; the spread of its evidence is sd(Z) / mean(Z) over the seeds, in the mean over the inputs. A guide
is trained once; its tokens are counted whole, then shared by 10 and by 100 inputs. Rows that are in the
file are kept, and so are the guide and the truth in ``--guides``, so an interrupted run goes on;
``--plot`` draws what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lmppl
from benchmarks.tasks import EXAMPLES
from lmppl.runtime import nth_seed
from lmppl.states import write_text

assert str(EXAMPLES) in sys.path  # where the tasks are

import arithmetic  # noqa: E402
import infilling  # noqa: E402
import random_number  # noqa: E402
import subjectivity  # noqa: E402
from paper.command import positive, several  # noqa: E402
from paper.training import tokens  # noqa: E402

SHARED_BY = (1, 10, 100)
"""Inputs that share the cost of a guide's training."""

REFERENCE_SEED = 1 << 20


@dataclass(frozen=True)
class Truth:
    """What estimates are compared with: log Z (nats) and the expectation."""

    log_z: float
    expectation: float


@dataclass(frozen=True)
class Comparison:
    """A program with inputs to learn from and held-out ones, and a number of which the posterior
    expectation is asked.

    Args:
        program: of a task.
        training, held_out: its arguments.
        number: of a trace, from its values by site.
        described: that number, for the picture.
        truth: of an input, if it is known; else that of a long run, which draws by the trained guide.
        reference: draws of that run.
        fit: options of the guide's training.
        smc: options of SMC without a guide.
    """

    program: Callable[..., Any]
    training: Sequence[tuple[Any, ...]]
    held_out: Sequence[tuple[Any, ...]]
    number: Callable[[Mapping[str, Any]], float]
    described: str
    fit: Mapping[str, Any]
    smc: Mapping[str, Any] = field(default_factory=dict)
    truth: Truth | None = None
    reference: int = 8192


def of_random_number() -> Comparison:
    """Its posterior is uniform on 0..100."""
    return Comparison(
        random_number.random_number, [(100,)], [(100,)],
        number=lambda values: int(str(values["z"]).rstrip(".")) / 100,
        described="the number / 100",
        fit={"batch_size": 64},
        truth=Truth(math.log(101), 0.5),
    )  # fmt: skip


def of_infilling() -> Comparison:
    """Things that the ending mentions again."""
    stories = infilling.stories_of(infilling.STORIES.with_name("mentions.tsv"))
    inputs = [(story.beginning, story.ending, 3) for story in stories]
    return Comparison(
        infilling.infilling, inputs[:-12], inputs[-12:],
        number=lambda values: len(str(values["z"])) / 10,
        described="the length of the middle / 10 characters",
        fit={"batch_size": 32},
        smc={"twist": "lookahead", "twist_every": 1},
    )  # fmt: skip


def of_arithmetic() -> Comparison:
    """The first held-out problem of each length. The guide does not see the answer."""
    train, test = arithmetic.split(num_train=100, num_test=1)
    return Comparison(
        arithmetic.arithmetic,
        list(map(arithmetic.observed, train)),
        [arithmetic.observed(problem) for problems in test.values() for problem in problems],
        number=lambda values: sum(name.startswith("step_") for name in values),
        described="the number of steps",
        fit={"batch_size": 32},
        reference=2048,  # a fifth of the model's draws are effective ones
    )


def of_subjectivity() -> Comparison:
    """The first three held-out sentences of those that come with the task. The guide does not see the
    label."""
    train, test = subjectivity.load(subjectivity.SENTENCES, num_labels=50, num_test=3)
    return Comparison(
        subjectivity.subjectivity,
        list(map(subjectivity.observed, train)),
        list(map(subjectivity.observed, test)),
        number=lambda values: len(str(values["reason"])) / 10,
        described="the length of the reason / 10 characters",
        fit={"batch_size": 32},
        reference=1024,  # most of the model's draws are effective ones
    )


COMPARISONS: dict[str, Callable[[], Comparison]] = {
    "random_number": of_random_number,
    "infilling": of_infilling,
    "arithmetic": of_arithmetic,
    "subjectivity": of_subjectivity,
}


ENGINES = ("importance", "SMC", "MCMC", "guide", "SMC with guide")
"""By their names in the picture; those with "guide" in the name get the guide."""


def trained(
    comparison: Comparison, lm: lmppl.LM, steps: int, folder: Path | None
) -> tuple[lmppl.LMGuide, int]:
    """A guide and the tokens of its training: from ``folder``, or made, and written there if given."""
    if folder is not None and (folder / "training.json").exists():
        spent = json.loads((folder / "training.json").read_text(encoding="utf-8"))["tokens"]
        return lmppl.LMGuide.load(folder / "guide", comparison.program, lm=lm), spent
    guide, before = lmppl.LMGuide(comparison.program, lm=lm), tokens(lm)
    guide.fit(comparison.training, steps=steps, seed=0, **comparison.fit)
    spent = tokens(lm) - before
    if folder is not None:
        guide.save(folder / "guide", overwrite=True)
        write_text(folder / "training.json", json.dumps({"tokens": spent}) + "\n")
    return guide, spent


def truths_of(
    comparison: Comparison, lm: lmppl.LM, guide: lmppl.LMGuide, folder: Path | None
) -> list[Truth]:
    """Of each held-out input: what is known, or else a long run, which is kept in ``folder``. Half of
    its draws are the guide's, half the model's own, so that no weight is more than twice what the
    model's draw would have."""
    wanted = len(comparison.held_out)
    if comparison.truth is not None:
        return [comparison.truth] * wanted
    path = None if folder is None else folder / "truths.json"
    found: list[Truth] = []
    if path is not None and path.exists():
        found = [Truth(**truth) for truth in json.loads(path.read_text(encoding="utf-8"))]
    for args in comparison.held_out[len(found) :]:
        posterior = lmppl.infer(
            comparison.program, *args, method="importance", guide=guide, prior_fraction=0.5, lm=lm,
            num_samples=comparison.reference, seed=REFERENCE_SEED, progress=False,
        )  # fmt: skip
        found.append(Truth(posterior.log_evidence, float(posterior.mean(comparison.number))))
        if path is not None:
            write_text(path, json.dumps([asdict(truth) for truth in found]) + "\n")
    return found[:wanted]


@dataclass(frozen=True)
class Point:
    """An engine at one number of samples.

    Attributes:
        engine: by its name in the picture.
        num_samples: of a run.
        settings: all that the point depends on beside those.
        tokens: drawn and scored, in the mean of the runs.
        training_tokens: of its guide; 0 without one.
        log_z_error: median distance to log Z, nats; infinite where most runs have no live sample, None
            for an engine that claims no evidence.
        expectation_error: median distance to the expectation.
        runs: how many.
        z_spread: standard deviation of the evidence over the seeds, as a share of its mean; None for
            an engine that claims none, and with a single seed.
    """

    engine: str
    num_samples: int
    settings: dict[str, Any]
    tokens: float
    training_tokens: int
    log_z_error: float | None
    expectation_error: float
    runs: int
    z_spread: float | None = None


def engines(comparison: Comparison, num_samples: int) -> dict[str, dict[str, Any]]:
    """What ``infer`` is called with, by each of ``ENGINES``."""
    chains = max(2, min(num_samples // 8, 16))
    return {
        "importance": {"method": "importance", "num_samples": num_samples},
        "SMC": {"method": "smc", "num_samples": num_samples, **comparison.smc},
        "MCMC": {
            "method": "mcmc", "num_samples": num_samples // chains * chains, "num_chains": chains,
            "warmup": num_samples // chains // 2,
        },
        "guide": {"method": "gflownet", "num_samples": num_samples},
        "SMC with guide": {"method": "smc", "num_samples": num_samples, "twist": "flow"},
    }  # fmt: skip


def measure(
    comparison: Comparison,
    truths: Sequence[Truth],
    lm: lmppl.LM,
    engine: str,
    num_samples: int,
    seeds: int,
    guide: lmppl.LMGuide | None,
) -> dict[str, Any]:
    """The figures of a ``Point``, over all inputs and seeds."""
    spent, log_z_errors, expectation_errors, spreads = [], [], [], []
    options = engines(comparison, num_samples)[engine]
    for args, truth in zip(comparison.held_out, truths, strict=True):
        of_input: list[float] = []
        for seed in range(seeds):
            before = tokens(lm)
            log_z: float | None = -math.inf
            expectation = math.nan
            with warnings.catch_warnings(), suppress(lmppl.ZeroEvidenceError):
                # That a run can't be trusted is what the errors say.
                warnings.simplefilter("ignore", UserWarning)
                posterior = lmppl.infer(
                    comparison.program, *args, lm=lm, guide=guide, progress=False,
                    seed=nth_seed(seed, num_samples), **options,
                )  # fmt: skip
                log_z = posterior.log_evidence
                expectation = float(posterior.mean(comparison.number))
            spent.append(tokens(lm) - before)
            if log_z is not None:
                of_input.append(log_z - truth.log_z)
            error = abs(expectation - truth.expectation)
            expectation_errors.append(math.inf if math.isnan(error) else error)
        log_z_errors += map(abs, of_input)
        if len(of_input) > 1:
            shares = [math.exp(error) for error in of_input]
            mean = statistics.fmean(shares)
            spreads.append(statistics.stdev(shares) / mean if mean else math.inf)
    return {
        "tokens": statistics.fmean(spent),
        "log_z_error": statistics.median(log_z_errors) if log_z_errors else None,
        "expectation_error": statistics.median(expectation_errors),
        "runs": len(spent),
        "z_spread": statistics.fmean(spreads) if spreads else None,
    }


def table(points: Sequence[Point]) -> str:
    """Markdown."""
    lines = [
        "| engine | samples | tokens | of training | log Z error | expectation error | sd / mean of Z |",
        "| --- |" + " ---: |" * 6,
    ]
    for p in points:
        error, spread = ("" if x is None else f"{x:.3f}" for x in (p.log_z_error, p.z_spread))
        lines.append(
            f"| {p.engine} | {p.num_samples} | {p.tokens:,.0f} | {p.training_tokens:,} | {error} | "
            f"{p.expectation_error:.3f} | {spread} |"
        )
    return "\n".join(lines)


def points_of(args: argparse.Namespace, lm: lmppl.LM, kept: list[Point]) -> list[Point]:
    """All points of a task; those that are kept are not measured again. Each is written when it is
    there."""
    whole = COMPARISONS[args.task]()
    comparison = replace(whole, held_out=whole.held_out[: args.inputs])
    settings = {
        "task": args.task, "model": lm.name, "steps": args.steps, "seeds": args.seeds,
        "inputs": len(comparison.held_out),
    }  # fmt: skip
    points = [point for point in kept if point.settings == settings]
    wanted = [(engine, size) for size in args.sizes for engine in args.engines]
    known = {(point.engine, point.num_samples) for point in points}
    missing = [pair for pair in wanted if pair not in known]
    if not missing:
        return points
    folder = None if args.guides is None else args.guides / f"{args.task}-{args.steps}"
    guide, training_tokens = trained(comparison, lm, args.steps, folder)
    truths = truths_of(comparison, lm, guide, folder)
    for engine, size in missing:
        has_guide = "guide" in engine
        proposal = guide if has_guide else None
        figures = measure(comparison, truths, lm, engine, size, args.seeds, proposal)
        cost = training_tokens if has_guide else 0
        points.append(Point(engine, size, settings, training_tokens=cost, **figures))
        print(points[-1], file=sys.stderr, flush=True)
        if args.out is not None:
            others = [point for point in kept if point.settings != settings]
            rows = [asdict(point) for point in [*others, *points]]
            write_text(args.out, json.dumps(rows, indent=1) + "\n")
    return points


def plot(points: Sequence[Point], described: str) -> Any:
    """Both errors against tokens, log-log, a line an engine; three for each that has a guide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 8.4), layout="constrained")
    names = list(dict.fromkeys(point.engine for point in points))
    titles = {
        "log_z_error": "error of log Z (nats)",
        "expectation_error": f"error of the expectation of\n{described}",
    }
    for axes, (name, title) in zip(figure.subplots(2), titles.items(), strict=True):
        for number, engine in enumerate(names):
            own = sorted(
                (point for point in points if point.engine == engine), key=lambda p: p.tokens
            )
            drawn = [(p, getattr(p, name)) for p in own]
            drawn = [(p, error) for p, error in drawn if error is not None and error < math.inf]
            for inputs in SHARED_BY if any(p.training_tokens for p, _ in drawn) else (None,):
                shared = 0 if inputs is None else 1 / inputs
                label = engine if inputs is None else f"{engine}, trained for {inputs}"
                axes.plot(
                    [p.tokens + shared * p.training_tokens for p, _ in drawn],
                    [error for _, error in drawn],
                    marker="o", markersize=4, color=f"C{number}", label=label,
                    linestyle={None: "-", 1: ":", 10: "--", 100: "-"}[inputs],
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="language-model tokens an input", title=title)
        axes.grid(alpha=0.25)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9
    )
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--task", choices=COMPARISONS, default="random_number")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="any causal LM")
    parser.add_argument("--sizes", type=several, nargs="+", default=[16, 64, 256])
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=ENGINES)
    parser.add_argument("--inputs", type=positive, default=3, help="held-out ones, at most")
    parser.add_argument("--seeds", type=positive, default=10)
    parser.add_argument("--steps", type=positive, default=100, help="of the guide's training")
    parser.add_argument("--out", type=Path, help="JSON file of points; those in it are kept")
    parser.add_argument("--guides", type=Path, help="folder where guides are kept, one a task")
    parser.add_argument("--plot", type=Path, help="draw them (needs matplotlib)")
    args = parser.parse_args(argv)
    kept = []
    if args.out is not None and args.out.exists():
        kept = [Point(**row) for row in json.loads(args.out.read_text(encoding="utf-8"))]
    points = points_of(args, lmppl.LM.from_pretrained(args.model), kept)
    print(table(points))
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        import matplotlib

        figure = plot(points, COMPARISONS[args.task]().described)
        with matplotlib.rc_context({"svg.hashsalt": "lmppl", "svg.fonttype": "none"}):
            figure.savefig(args.plot, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
