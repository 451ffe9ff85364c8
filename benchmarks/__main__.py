"""Run the benchmarks.

    python -m benchmarks --quick                        a few minutes on two cores
    python -m benchmarks --full --machine NAME          all sizes; results to be published
    python -m benchmarks --only sampling decode --dtype float32
    python -m benchmarks --only outside --particles 64 512
    python -m benchmarks --smoke                        a minute; shows only that everything works

Each benchmark prints its table when it is done, and leaves a JSON file in
``benchmarks/results/<machine>/`` (by default ``local``, which git ignores). ``python -m
benchmarks.report`` makes docs/performance.md of the results of machines with other names.
Benchmarks against other projects are skipped until ``make bench-peers`` has fetched those.

A machine that does something else meanwhile gives wrong numbers: close everything, and let it run.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

from benchmarks.bench import GENLM_PYTHON, GFN_LM_TUNING, REPEATS, make
from benchmarks.report import table
from benchmarks.results import FOLDER, LOCAL
from benchmarks.suite import BENCHMARKS, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modes = parser.add_mutually_exclusive_group()
    for mode in REPEATS:
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    parser.set_defaults(mode="quick")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, help="of these")
    parser.add_argument("--dtype", help="float32 or bfloat16; by default what suits the machine")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, help="of every measurement")
    parser.add_argument("--particles", nargs="+", type=int, help="instead of the usual numbers")
    parser.add_argument("--machine", default=LOCAL, help="folder for the results")
    parser.add_argument("--genlm-python", type=Path, default=GENLM_PYTHON, metavar="PATH")
    parser.add_argument("--gfn-lm-tuning", type=Path, default=GFN_LM_TUNING, metavar="PATH")
    options = parser.parse_args()
    bench = make(
        options.model,
        options.dtype,
        mode=options.mode,
        repeats=options.repeats or REPEATS[options.mode],
        particles=options.particles,
        genlm_python=options.genlm_python,
        gfn_lm_tuning=options.gfn_lm_tuning,
    )
    engine_bytes = bench.prepare()
    failed, began = [], time.perf_counter()
    for name in options.only or BENCHMARKS:
        print(f"\n--- {name} ({time.perf_counter() - began:.0f} s so far)\n", flush=True)
        try:
            result = run(name, bench, engine_bytes)
        except Exception:  # the others are worth having
            traceback.print_exc()
            failed.append(name)
            continue
        path = result.save(FOLDER / options.machine)
        print(table([result]))
        print(f"\n{result.circumstances['seconds']} s; written to {path}", flush=True)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
