"""2,000 inputs, answered by Ray Data on all processors; stopped, it goes on where it was.

    pip install 'lmppl-pyro[ray]'
    python examples/many_inputs.py --out answers             # makes the inputs itself; some minutes
    python examples/many_inputs.py --out answers             # after Ctrl-C: answers the rest
    python examples/many_inputs.py --inputs my.jsonl --out answers --actors 8
    python examples/many_inputs.py --quick --out few         # 40 inputs, in half a minute

An input is a line of JSON, {"key": "...", "beginning": "...", "ending": "..."}: somebody bought
something, and then something happened with it. Its answer is a row in the folder's Parquet files: log
evidence, effective sample size, and what was bought, with probabilities. It depends on the input, its
key and --seed, and not on the number of actors. Where Ray runs on a cluster (RAY_ADDRESS says so), so
do the actors; --out has to be on a file system that all machines share, then.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import ray

import lmppl.ray
from lmppl import lm_sample

THINGS = {
    " dog.": "It barked all the way home.",
    " knife.": "It was too dull to cut the bread.",
    " pie.": "It tasted of apples.",
    " hat.": "It flew off in the wind.",
    " lamp.": "It lit the whole room.",
    " book.": "It had four hundred pages.",
    " bicycle.": "It had a flat tyre.",
    " guitar.": "Its strings were new.",
    " coat.": "It kept out the cold.",
    " clock.": "It ticked loudly all night.",
}
PLACES = [
    "At the market", "In a shop by the river", "On Monday", "In the old town", "At the station",
    "At the fair", "On the last day of the sale", "From a neighbour", "At an auction", "In the village",
]  # fmt: skip
NAMES = [
    "Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack",
    "Kate", "Leo", "Maria", "Noah", "Olga", "Paul", "Rose", "Sam", "Tina", "Will",
]  # fmt: skip


def bought(beginning: str, ending: str) -> lmppl.Text:
    """p(thing | beginning) p(ending | beginning, thing)."""
    thing = lm_sample("thing", beginning, choices=list(THINGS))
    lm_sample("ending", [beginning, thing], obs=ending)
    return thing


def inputs() -> list[dict[str, str]]:
    """2,000 of them, each with a key of its own."""
    return [
        {
            "key": f"{name}-{i}-{j}",
            "beginning": f"{place}, {name} bought a",
            "ending": f" {ending}",
        }
        for name, (i, place), (j, ending) in product(
            NAMES, enumerate(PLACES), enumerate(THINGS.values())
        )
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--inputs", type=Path, help="a file of lines of JSON; by default 2,000 inputs"
    )
    parser.add_argument("--out", required=True, help="folder of the answers: a path, or s3://...")
    parser.add_argument("--actors", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--cpus", type=float, default=1, help="processors, and threads, of an actor"
    )
    parser.add_argument("--gpus", type=float, default=0, help="of an actor")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="any causal LM")
    parser.add_argument("--dtype", help="float32 or bfloat16; by default what suits the machine")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=20, help="inputs of a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the first 40 only")
    args = parser.parse_args(argv)

    infer = lmppl.ray.Infer(
        bought, lm=args.model, dtype=args.dtype, num_samples=args.num_samples, seed=args.seed,
        on_error="return",
    )  # fmt: skip
    if args.inputs is None:
        rows = ray.data.from_items(inputs(), override_num_blocks=1)
    else:
        rows = ray.data.read_json(str(args.inputs))
    began = time.perf_counter()
    answers = lmppl.ray.run(
        infer, rows.limit(40) if args.quick else rows, folder=args.out, concurrency=args.actors,
        batch_size=args.batch_size, num_cpus=args.cpus, num_gpus=args.gpus,
    ).to_pandas()  # fmt: skip
    failed = answers["error"].notna()
    print(f"{len(answers)} answers in {args.out}, {failed.sum()} of them errors")
    print(f"this run took {time.perf_counter() - began:.0f} s")
    for _, row in answers[~failed].sort_values("key").head(3).iterrows():
        share, text = row["weights"][0], str(row["texts"][0]).strip()
        print(f"{row['beginning']} [{share:.0%}: {text}]{row['ending']}")


if __name__ == "__main__":
    main()
