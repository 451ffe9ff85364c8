"""Training in several processes: how much faster two are than one, and what more would cost.

    python -m benchmarks.ranks            on two idle cores: benchmarks/results/ranks.json, and the page
    python -m benchmarks.ranks --quick    a tiny model; shows only that everything works
    python -m benchmarks.ranks --page     remakes the part of docs/how-to/many_gpus.md from the file

*Two processes against one*, a thread each: ``fit`` on the same inputs with the same seed, in turns. The
first two steps do not count. Samples a second are compared.

*Two that do not talk* train by themselves at the same time, each with half as many inputs a step. What
these do together, in units of one process, is the most that this machine allows: its processors share
caches and memory, and a pass over half as many rows takes more than half the time.

*Four processes* do not fit two cores. So what falls to each, as many inputs a step as each of the two
had, is trained by processes that do not talk, two at a time; the step of four is the slowest of theirs,
and the messages of a step, which four processes send each other without a language model.

*On paper*, up to 1,000 GPUs: from the bytes that were counted, the seconds that were measured here for
what a processor does, and the bandwidths below. Expect twenty minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from benchmarks.machine import PACKAGES, ROOT, revision
from benchmarks.one_rank import PARTS, TINY, Job
from benchmarks.report import DOCS, seconds_in_words, update
from benchmarks.results import FOLDER
from lmppl.report.machine import machine
from lmppl.states import write_text

FILE = FOLDER / "ranks.json"
PAGE, PART = DOCS / "how-to" / "many_gpus.md", "ranks"
SKIPPED = 1  # steps that do not count, beside the first, which has no beginning
GOAL = 1.7
FOUR = 4

# What is assumed of a cluster.
GPUS_PER_NODE = 8
NVLINK = 450e9  # bytes a second and direction, between the GPUs of a node
NETWORK = 50e9  # bytes a second between nodes: 400 Gb/s
TCP = 1.25e9  # bytes a second that a process sends by gloo, over TCP
HOP_NCCL, HOP_TCP = (
    5e-6,
    50e-6,
)  # seconds from one process to the next, for a message of a few bytes
SMALL = 5  # messages of a few numbers a step, by gloo's ring
GPUS = (2, 8, 64, 256, 1000)

STORIES = [
    ("Anna looked everywhere for her keys.", " She found them at last inside the fridge."),
    ("It rained all day in the old town.", " So nobody came to the market that week."),
    (
        "The train stopped in the middle of the night.",
        " In the morning they walked along the rails.",
    ),
    ("Tom had never cooked for so many people.", " In the end they all ate bread and cheese."),
    ("The doctor read the letter twice.", " Then she put it into the fire."),
    ("A boat without a sail came into the harbour.", " The children tied it to the old pier."),
    ("My brother bought a piano that nobody could play.", " Now the cat sleeps on it every day."),
    ("The lights went out during the concert.", " The band played on in the dark."),
]
LETTERS = [("ab.", "aba"), ("b", "aba"), ("a", "bab"), ("ab", "ba")]


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        facts: machine, versions, model and sizes.
        rates: samples a second of one process and of two, of each repetition.
        apart: samples a second of two processes that do not talk, both together, of each repetition.
        waiting: of two processes, the share of a step in which one waits for the other.
        sending: and in which messages are on their way.
        gradient_bytes: of a process, a step.
        told_bytes: what is told of an input, a step, in the mean.
        alone: seconds of the steps of four processes that do not talk, two at a time.
        messages: seconds of a step's messages among four, by what they are.
        taken_in: seconds to take in what was told of an input.
    """

    facts: dict[str, Any]
    rates: list[tuple[float, float]]
    apart: list[float]
    waiting: float
    sending: float
    gradient_bytes: int
    told_bytes: float
    alone: list[list[float]]
    messages: dict[str, float]
    taken_in: float

    @property
    def ratios(self) -> list[float]:
        return [two / one for one, two in self.rates]

    @property
    def ratios_apart(self) -> list[float]:
        return [apart / one for apart, (one, _) in zip(self.apart, self.rates, strict=True)]

    @property
    def share(self) -> float:
        """Seconds of a step of one of four processes, alone."""
        return fmean(map(fmean, self.alone))

    @property
    def slowest(self) -> float:
        """Seconds until the last of four has done its part of a step."""
        return fmean(max(step) for step in zip(*self.alone, strict=True))

    @property
    def of_four(self) -> float:
        """Seconds of a step of four."""
        return self.slowest + sum(self.messages.values())

    @property
    def spread(self) -> float:
        """Standard deviation of a process's part of a step, as a share of its mean."""
        return fmean(stdev(step) for step in zip(*self.alone, strict=True)) / self.share


# --- measuring -----------------------------------------------------------------------------------


def launch(
    what: str, num: int, job: Job, told: bytes | None = None
) -> tuple[list[dict[str, Any]], bytes]:
    """Processes of ``benchmarks.one_rank``, a thread each. Returns what each has found, and what the
    first has told the others."""
    begin = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    memory = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job.write(folder)
        if told is not None:
            (folder / "told.pickle").write_bytes(told)
        subprocess.run(
            [
                sys.executable,
                *(begin if num > 1 else ()),
                "-m",
                "benchmarks.one_rank",
                what,
                folder,
            ],
            env={**memory, **os.environ, **own},
            check=True,
        )
        found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num)]
        return found, (folder / "told.pickle").read_bytes()


def train_apart(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Trainings at the same time, each in a process that knows of no other."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [found for ((found,), _) in pool.map(lambda job: launch("train", 1, job), jobs)]


def rate(found: dict[str, Any]) -> float:
    """Samples a second."""
    return float(sum(found["samples"][SKIPPED:]) / sum(found["seconds"][SKIPPED:]))


def shares(ranks: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Of the time of processes that train together: waiting for another, and sending. Whoever comes last
    to a message does not wait for it."""
    sending = waiting = 0.0
    for step in zip(*(found["messages"][SKIPPED:] for found in ranks), strict=True):
        for message in zip(*step, strict=True):
            times = [seconds for _, seconds, _ in message]
            sending += min(times)
            waiting += fmean(times) - min(times)
    whole = fmean(sum(found["seconds"][SKIPPED:]) for found in ranks)
    return waiting / whole, sending / whole


def measure(job: Job, repeats: int) -> Measured:
    """All that takes time."""
    half = replace(job, inputs_per_step=job.inputs_per_step // 2, batch_size=job.batch_size // 2)
    halves = [
        replace(half, inputs=job.inputs[rank:] + job.inputs[:rank], seed=rank)
        for rank in range(FOUR)
    ]
    rates, apart, of_two, told = [], [], [], b""
    alone: list[list[float]] = [[] for _ in halves]
    for number in range(repeats):
        (one,), _ = launch("train", 1, job)
        two, told = launch("train", 2, job)
        rates.append((rate(one), rate(two[0])))
        of_two.append(shares(two))
        pair = (0, 1) if number % 2 == 0 else (2, 3)
        found = train_apart([halves[rank] for rank in pair])
        apart.append(sum(map(rate, found)))
        for rank, of_rank in zip(pair, found, strict=True):
            alone[rank] = of_rank["seconds"][SKIPPED:]
        print(
            f"samples a second: {rates[-1][0]:.2f}, {rates[-1][1]:.2f}; apart {apart[-1]:.2f}",
            flush=True,
        )
    told_bytes = [
        max(size for kind, _, size in step if kind == "all_gather_object")
        for step in two[0]["messages"][SKIPPED:]
    ]
    sent, _ = launch("send", FOUR, replace(job, shapes=two[0]["shapes"]), told)
    slowest = {
        name: median(max(step) for step in zip(*(found[name] for found in sent), strict=True))
        for name in PARTS
    }
    of_input = job.inputs_per_step // 2
    return Measured(
        facts={**facts(job), "dtype": one["dtype"], "repeats": repeats},
        rates=rates,
        apart=apart,
        waiting=median(share for share, _ in of_two),
        sending=median(share for _, share in of_two),
        gradient_bytes=two[0]["gradient_bytes"],
        told_bytes=fmean(told_bytes) / of_input,
        alone=alone,
        messages=slowest,
        taken_in=slowest["taken in"] / (FOUR * of_input),
    )


def facts(job: Job) -> dict[str, Any]:
    """What a reader needs in order to judge the figures, or to find them again."""
    return {
        "machine": machine(torch.device("cpu")),
        "model": job.model,
        **{name: getattr(job, name) for name in ("steps", "inputs_per_step", "batch_size")},
        "max_tokens": job.max_tokens,
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(),
    }


# --- on paper ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnPaper:
    """A step of ``gpus`` GPUs, each with as many inputs as one of the two processes had: seconds of what
    comes beside its work, and how long it waits for the slowest, as a share of the work.

    The gradient goes round a ring, 2 (K - 1) / K times its size through each link, of which the slowest
    counts. What is told of inputs goes round too, and grows with K; so does the time to take it in. A
    message of a few numbers takes as many hops as the ring has.
    """

    gpus: int
    gradient: float
    told_bytes: float
    told: float
    taken_in: float
    small: float
    slowest: float

    @classmethod
    def of(cls, found: Measured, gpus: int) -> OnPaper:
        link = NVLINK if gpus <= GPUS_PER_NODE else NETWORK
        inputs = found.facts["inputs_per_step"] // 2
        told_bytes = gpus * inputs * found.told_bytes
        hops = 2 * (gpus - 1)
        return cls(
            gpus,
            gradient=hops / gpus * found.gradient_bytes / link + hops * HOP_NCCL,
            told_bytes=told_bytes,
            told=told_bytes / TCP + hops * HOP_TCP,
            taken_in=gpus * inputs * found.taken_in,
            small=SMALL * hops * HOP_TCP,
            slowest=math.sqrt(2 * math.log(gpus)) * found.spread,
        )

    @property
    def seconds(self) -> float:
        return self.gradient + self.told + self.taken_in + self.small


def most_gpus(found: Measured, seconds: float) -> int:
    """The most GPUs whose messages take at most so many seconds a step."""
    gpus = 1
    while OnPaper.of(found, 2 * gpus).seconds <= seconds:
        gpus *= 2
    step = gpus
    while step := step // 2:
        gpus += step if OnPaper.of(found, gpus + step).seconds <= seconds else 0
    return gpus


# --- the page ------------------------------------------------------------------------------------


def report(found: Measured) -> str:
    """Markdown."""
    return "\n\n".join([_of_two(found), _of_four(found), _of_many(found)])


def _of_two(found: Measured) -> str:
    given = found.facts
    one, two = (median(rates) for rates in zip(*found.rates, strict=True))
    versions = ", ".join(f"{name} {version}" for name, version in given["versions"].items())
    return f"""\
{given["machine"]}; `{given["model"]}` in {given["dtype"]}, `batch_size={given["batch_size"]}`,
`inputs_per_step={given["inputs_per_step"]}`, texts of at most {given["max_tokens"]} tokens; steps 3 to
{given["steps"]} of a training, {given["repeats"]} times in turns. {given["date"][:10]}, revision
{given["revision"]}, {versions}.

| processes, a thread each | samples a second | times as many as one |
| ---: | ---: | ---: |
| 1 | {one:.2f} | |
| 2 | {two:.2f} | {_spread(found.ratios)} |
| 2 that do not talk | {median(found.apart):.2f} | {_spread(found.ratios_apart)} |

The last row is two trainings at the same time, each with half as many inputs a step, that know nothing
of each other: as much as this machine allows. Each of the two waits for the other {found.waiting:.1%}
of the time, and messages are on their way for {found.sending:.1%} of it:
{found.gradient_bytes / 1e6:.1f} MB of gradient a step, and {found.told_bytes / 1e3:.1f} KB for each
input."""


def _spread(ratios: Sequence[float]) -> str:
    """Median, smallest and largest."""
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _of_four(found: Measured) -> str:
    inputs = found.facts["inputs_per_step"] // 2
    parts = ", ".join(f"{name} {seconds_in_words(s)}" for name, s in found.messages.items())
    sent = seconds_in_words(sum(found.messages.values()))
    return f"""\
*Four processes*, with {inputs} inputs a step each, as each of the two had. A process that does not
talk takes {found.share:.2f} s a step, and the slowest of four {found.slowest:.2f} s. The messages of a
step, sent by four processes without a language model, take {sent}
({parts}).
So a step of four takes {found.of_four:.2f} s, in which each does {found.share / found.of_four:.0%}
of what it does alone."""


def _of_many(found: Measured) -> str:
    inputs, taken_in = found.facts["inputs_per_step"] // 2, seconds_in_words(found.taken_in)
    nvlink, network, tcp = (f"{speed / 1e9:g} GB/s" for speed in (NVLINK, NETWORK, TCP))
    hops = " and ".join(f"{hop * 1e6:.0f}" for hop in (HOP_NCCL, HOP_TCP))
    rows = []
    for row in (OnPaper.of(found, gpus) for gpus in GPUS):
        times = row.gradient, row.told, row.taken_in, row.small, row.seconds
        gradient, *others = map(seconds_in_words, times)
        cells = f"{row.gpus:,}", gradient, f"{row.told_bytes / 1e6:.2f} MB", *others
        rows.append(f"| {' | '.join(cells)} | {row.slowest:.0%} |")
    table = "\n".join(rows)
    return f"""\
*On paper*, with {inputs} inputs a step for each GPU: what comes beside a GPU's own work. Assumed are
links of {nvlink} within a node of {GPUS_PER_NODE} GPUs, of {network} (400 Gb/s) between nodes, and of
{tcp} for a process by TCP; {hops} microseconds from one process to the next, by NCCL and by TCP. To
take in what is told of an input takes {taken_in}, as here.

| GPUs | gradient | told of inputs | its time | taken in | small messages | in all | waits |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{table}

The last column is how long the others wait for the slowest process, as a share of its work, if the
times of processes are normal with the standard deviation seen here, {found.spread:.0%}. Where a GPU
works a second a step, messages take a tenth of that with {most_gpus(found, 0.1):,} GPUs, and as long
with {most_gpus(found, 1.0):,}."""


def load(path: Path = FILE) -> Measured:
    """What ``main`` wrote."""
    return Measured(**json.loads(path.read_text()))


def update_page(found: Measured) -> None:
    """Show it in the documentation."""
    write_text(PAGE, update(PAGE.read_text(), report(found), PART))
    print(f"written: {PAGE}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model; nothing is written")
    parser.add_argument("--page", action="store_true", help="only remake it from the file")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", help="float32 or bfloat16; by default what suits the machine")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=2, help="at least 2")
    parser.add_argument("--inputs-per-step", type=int, default=8, help="an even number")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=FILE, help="JSON file, which is replaced")
    args = parser.parse_args(argv)
    if args.inputs_per_step % 2 or args.steps < 4 or args.repeats < 2:
        parser.error(
            "--inputs-per-step must be even, for two processes, --steps at least 4 and --repeats 2"
        )
    if args.page:
        update_page(load(args.out))
        return
    job = Job(
        args.model, args.dtype, STORIES, args.steps, args.inputs_per_step, args.batch_size,
        args.max_tokens,
    )  # fmt: skip
    if args.quick:
        job = Job(TINY, None, LETTERS, 4, 4, 16, 3)
    found = measure(job, 2 if args.quick else args.repeats)
    print(report(found))
    ratio = median(found.ratios)
    print(f"\n{ratio:.2f}, at least {GOAL}: {'met' if ratio >= GOAL else 'MISSED'}")
    if not args.quick:
        write_text(args.out, json.dumps(asdict(found), indent=1) + "\n")
        print(f"written: {args.out}")
        update_page(found)


if __name__ == "__main__":
    main()
