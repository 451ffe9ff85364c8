"""Texts that match a pattern, against genlm-control: live particles, evidence, tokens, seconds.

    make bench-peers
    python -m benchmarks.patterns --patterns patterns.csv --out rows.json
    python -m benchmarks.patterns --patterns patterns.csv --out rows.json --kind predicate

The patterns are those of genlm-eval (``pattern_set.py`` says where to get the file), its prompt, the
model's chat template. "regex" takes those of them that are regular expressions of the plain kind:
lmppl's masks (``lm_sample(..., regex=...)``), and genlm-control's automaton ``BoolFSA`` under its
sampler by masks and under AWRS. "predicate" takes all that the package ``regex`` reads, which is asked
about one text at a time: ``lm_sample(..., constraint=...)``, and AWRS with genlm-eval's potential.

Both sides target the same: texts of fewer than ``--max-tokens`` tokens that match, with the probability
that the model gives them *and* the EOS behind them. (lmppl closes a text that nothing can extend, or
that is as long as it may be, without EOS, so a second site observes it.) So one long run is the
reference for all: importance sampling with ``--reference`` particles. genlm-control is asked as
``peers/genlm.py`` says, and resamples as lmppl does: systematically, below an ESS of a half.

For each pattern every method runs once untimed (then automata are built, on either side), then once
for each seed, in turns. Rows that are in the file already are kept, so a run can go on where another
has stopped. Expect half a minute or more for a pattern, nearly all of it genlm-control's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import regex
import torch

import lmppl
from benchmarks.bench import GENLM_PYTHON
from benchmarks.machine import revision
from benchmarks.pattern_set import Pattern, messages, plain, read
from benchmarks.peers.process import PeerError, PeerProcess
from lmppl import chat, lm_sample
from lmppl.constraints import Constraint
from lmppl.engines import Engine
from lmppl.lm import embedded
from lmppl.report.machine import machine
from lmppl.runtime import log_mean_exp
from lmppl.states import write_text

WARM_UP = 1_000_000  # a seed that no measured run has
PEER = "genlm-control"


@dataclass(frozen=True)
class Task:
    """One pattern to be matched.

    Attributes:
        pattern: as the prompt shows it.
        kind: ``"regex"`` or ``"predicate"``.
        particles: of each run.
        max_tokens: of a text and its EOS.
    """

    pattern: str
    kind: str
    particles: int
    max_tokens: int

    @property
    def language(self) -> str:
        """What has to match."""
        return plain(self.pattern) if self.kind == "regex" else self.pattern


@dataclass
class Run:
    """What one run found. ``log_evidence`` is None where no particle lives."""

    log_evidence: float | None
    live: int
    tokens: int
    seconds: float


# --- the two sides -------------------------------------------------------------------------------


class Matching(Constraint):
    """Texts that match a pattern, by predicates."""

    def __init__(self, pattern: str) -> None:
        self._pattern = Pattern(pattern)

    def allows(self, prefix: str) -> bool:
        return self._pattern.allows(prefix)

    def complete(self, text: str) -> bool:
        return self._pattern.complete(text)


def constraint_of(task: Task) -> dict[str, Any]:
    """The arguments of ``lm_sample`` that say what matches."""
    if task.kind == "regex":
        return {"regex": task.language}
    return {"constraint": Matching(task.language)}


def prompt_of(lm: lmppl.LM, pattern: str) -> lmppl.Text:
    """genlm-eval's prompt, by the model's chat template."""
    return chat(messages(pattern), lm=lm)


def program(prompt: lmppl.Text, length: int, constraint: dict[str, Any]) -> lmppl.Text:
    """A text of at most ``length`` tokens that matches, and its EOS."""
    z = lm_sample("z", prompt, max_tokens=length, **constraint)
    if z.finish_reason != "eos":
        lm_sample("end", [prompt, z], max_tokens=1, obs="")
    return z


def ours(lm: lmppl.LM, task: Task) -> Callable[[Engine, int, int], Run]:
    """lmppl's side: a run by engine, number of particles and seed."""
    constraint, prompt = constraint_of(task), prompt_of(lm, task.pattern)

    def run(method: Engine, particles: int, seed: int) -> Run:
        began = time.perf_counter()
        try:
            posterior = lmppl.infer(
                program, prompt, task.max_tokens - 1, constraint, lm=lm, method=method,
                num_samples=particles, seed=seed, progress=False,
            )  # fmt: skip
        except lmppl.ZeroEvidenceError as error:
            posterior = error.posterior
        seconds = time.perf_counter() - began
        live = int(posterior.log_weights.isfinite().sum())
        return Run(
            posterior.log_evidence if live else None,
            live,
            posterior.info["tokens_sampled"] + posterior.info["tokens_scored"],
            seconds,
        )

    return run


def theirs(peer: PeerProcess, prompt: Sequence[int], task: Task, sampler: str, seed: int) -> Run:
    """genlm-control's side: a run by sampler and seed."""
    answer = peer.ask(
        prompt=list(prompt), kind=task.kind, pattern=task.language, sampler=sampler, seed=seed,
        particles=task.particles, max_tokens=task.max_tokens, ess_threshold=0.5, peak=False,
    )  # fmt: skip
    return Run(**{name: answer[name] for name in ("log_evidence", "live", "tokens", "seconds")})


def methods(lm: lmppl.LM, peer: PeerProcess | None, task: Task) -> dict[str, Callable[[int], Run]]:
    """What runs on a task, by name: a run by its seed."""
    run = ours(lm, task)
    found: dict[str, Callable[[int], Run]] = {
        "lmppl, importance": partial(run, lmppl.Importance(), task.particles),
        "lmppl, SMC": partial(run, lmppl.SMC(), task.particles),
    }
    if peer is not None:
        prompt = lm.encode(prompt_of(lm, task.pattern))
        if task.kind == "regex":
            found[f"{PEER}, masks"] = partial(theirs, peer, prompt, task, "masks")
        found[f"{PEER}, AWRS"] = partial(theirs, peer, prompt, task, "awrs")
    return found


# --- measuring -----------------------------------------------------------------------------------


def measure(
    lm: lmppl.LM, peer: PeerProcess | None, task: Task, seeds: int, reference: int
) -> dict[str, Any]:
    """One pattern: the runs of each method and the reference. Where no text can match,
    ``"skipped"`` says why, and ``"failed"`` what a peer raised, by method."""
    try:
        long_run = ours(lm, task)(lmppl.Importance(), reference, WARM_UP)
    except ValueError as error:
        return {"skipped": str(error)}
    if long_run.log_evidence is None:
        return {"skipped": f"none of {reference} particles lives"}
    contenders = methods(lm, peer, task)
    failed: dict[str, str] = {}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for seed in (WARM_UP, *range(seeds)):
        for name, run in contenders.items():
            if name in failed:
                continue
            try:
                runs[name].append(asdict(run(seed)))
            except PeerError as error:
                failed[name] = str(error)
    runs = {name: made for name, made in runs.items() if name not in failed}
    return {
        "reference": asdict(long_run),
        "first_seconds": {name: made[0]["seconds"] for name, made in runs.items()},
        "runs": {name: made[1:] for name, made in runs.items()},
        "failed": failed,
    }


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """The tasks of a sample of the patterns, those left out that the kind does not take."""
    usable = plain if options.kind == "regex" else regex.compile
    found = []
    for pattern in read(options.patterns):
        try:
            usable(pattern)
        except (ValueError, regex.error):
            continue
        found.append(pattern)
    random.Random(options.sample_seed).shuffle(found)
    print(f"{len(found)} patterns for kind={options.kind!r}", file=sys.stderr)
    for pattern in found[: options.num_patterns]:
        yield Task(pattern, options.kind, options.particles, options.max_tokens)


# --- the table -----------------------------------------------------------------------------------


def spread(runs: Sequence[dict[str, Any]]) -> float:
    """Standard deviation of the log evidence; infinite where a run has no live particle."""
    found = [run["log_evidence"] for run in runs]
    return math.inf if None in found else stdev(found)


def relative_error(runs: Sequence[dict[str, Any]], reference: float) -> float:
    """Root of the mean square of Z-hat / Z - 1."""
    found = [run["log_evidence"] for run in runs]
    ratios = [0.0 if each is None else math.exp(each - reference) for each in found]
    return math.sqrt(mean((ratio - 1) ** 2 for ratio in ratios))


def bias(runs: Sequence[dict[str, Any]], reference: float) -> float:
    """log of the mean of Z-hat / Z; its own error is the spread by the root of the number of runs."""
    found = [run["log_evidence"] for run in runs]
    logs = torch.tensor([-math.inf if each is None else each for each in found])
    return log_mean_exp(logs.double()) - reference


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown, a line for each method. Live particles, tokens and seconds are means of all runs;
    what is said of log Z-hat is the median of the patterns. Those on which a method failed are left out
    of its line, and counted below."""
    kept = [row for row in rows if "runs" in row]
    lines = [
        "| method | live particles | runs without one | log Ẑ - log Z | sd of log Ẑ | "
        f"error of Ẑ / Z | tokens | seconds | share of {PEER}'s seconds |",
        "| --- |" + " ---: |" * 8,
    ]
    for method in dict.fromkeys(name for row in kept for name in row["runs"]):
        by_pattern = [
            (row["runs"][method], row["reference"]["log_evidence"])
            for row in kept
            if method in row["runs"]
        ]
        every = [run for runs, _ in by_pattern for run in runs]
        cells = [
            method,
            f"{mean(run['live'] for run in every) / kept[0]['particles']:.0%}",
            f"{sum(not run['live'] for run in every)} of {len(every)}",
            f"{median(bias(runs, z) for runs, z in by_pattern):+.3f}",
            f"{median(spread(runs) for runs, _ in by_pattern):.3f}",
            f"{median(relative_error(runs, z) for runs, z in by_pattern):.3f}",
            f"{mean(run['tokens'] for run in every):.0f}",
            f"{mean(run['seconds'] for run in every):.2f}",
            _of_peer(method, kept),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    failures = Counter(name for row in kept for name in row.get("failed", ()))
    failed = "; ".join(f"{name} failed on {number}" for name, number in failures.items())
    counted = (
        f"{len(kept)} patterns, and {len(rows) - len(kept)} that no text of the length matches"
    )
    return "\n".join([*lines, "", f"({counted}{'; ' * bool(failed)}{failed})"])


def _of_peer(method: str, rows: Sequence[dict[str, Any]]) -> str:
    """Median, smallest and largest share of the seconds of the peer's faster way on the same pattern."""
    shares = []
    for row in rows:
        seconds = {name: _seconds(runs) for name, runs in row["runs"].items()}
        of_peer = [value for name, value in seconds.items() if name.startswith(PEER)]
        if of_peer and method in seconds:
            shares.append(seconds[method] / min(of_peer))
    return f"{median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})" if shares else ""


def _seconds(runs: Sequence[dict[str, Any]]) -> float:
    return median(run["seconds"] for run in runs)


def peer_command(options: argparse.Namespace, lm: lmppl.LM) -> list[str]:
    """What starts genlm-control with the same model."""
    source = options.model
    if source.lower() == embedded.ALIAS:
        source = str(embedded.model_dir())
    return [
        str(options.genlm_python), "-m", "benchmarks.peers.genlm_patterns",
        "--model", source,
        "--dtype", str(lm.dtype).removeprefix("torch."),
        "--device", lm.device.type,
        "--threads", str(torch.get_num_threads()),
        "--eos", *lm.tokenizer.convert_ids_to_tokens(sorted(lm.vocabulary.eos_ids)),
    ]  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", type=Path, required=True, help="genlm-eval's patterns.csv")
    parser.add_argument("--kind", choices=["regex", "predicate"], default="regex")
    parser.add_argument("--num-patterns", type=int, help="a sample; by default all")
    parser.add_argument("--sample-seed", type=int, default=0)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32, help="with EOS")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--reference", type=int, default=1024, help="particles of the long run")
    parser.add_argument("--genlm-python", type=Path, default=GENLM_PYTHON, metavar="PATH")
    parser.add_argument("--model", default=embedded.ALIAS)
    parser.add_argument("--dtype", default="float32", help="of both sides")
    parser.add_argument("--threads", type=int, default=1, help="of either side")
    parser.add_argument("--out", type=Path, help="JSON file of rows; those in it are kept")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: a spread needs at least 2")
    return options


def main() -> None:
    options = parse()
    rows = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    torch.set_num_threads(options.threads)
    lm = lmppl.LM.from_pretrained(options.model, dtype=options.dtype)
    versions: dict[str, str] = {}
    with ExitStack() as stack:
        peer = None
        if options.genlm_python.exists():
            peer = stack.enter_context(PeerProcess(peer_command(options, lm)))
            versions = peer.hello
        else:
            print(f"without {PEER}, which `make bench-peers` gets", file=sys.stderr)
        chosen = [asdict(task) for task in tasks(options)]
        for case in chosen:
            if any(case.items() <= row.items() for row in rows):
                continue
            found = measure(lm, peer, Task(**case), options.seeds, options.reference)
            circumstances = {
                "model": lm.name,
                "dtype": options.dtype,
                "threads": options.threads,
                "machine": machine(lm.device),
                "revision": revision(),
                "versions": versions,
            }
            rows.append({**case, **found, **circumstances})
            print(f"{case['pattern']!r} {found.get('skipped', '')}", file=sys.stderr, flush=True)
            if options.out:
                write_text(options.out, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    own = [row for row in rows if any(case.items() <= row.items() for case in chosen)]
    print(table(own))


if __name__ == "__main__":
    main()
