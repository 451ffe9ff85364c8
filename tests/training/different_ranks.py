"""Processes that do not train the same, for ``test_ranks.py``: each prints what it is told."""

from __future__ import annotations

import os
import sys

import lmppl
from lmppl import lm_sample
from lmppl.testing import tiny_lm


def program(x, y):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], obs=y)


def other(x, y):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("y", [x, z], obs=y)


def main() -> None:
    rank = int(os.environ["RANK"])
    data = [("a", "b"), ("b", "ab")]
    same = {"model": program, "weights": 0, "data": data, "seed": 0, "eval_data": data}
    same |= {"parallel": "inputs"}
    kinds = {
        "data": {"data": [("a", "b"), ("b", "aa")]},
        "program": {"model": other},
        "language model": {"weights": 1},
        "seed": {"seed": 1},
        "eval_data": {"eval_data": None},
        "option parallel": {"parallel": "split"},
        "a stream": {"data": [("a", "b"), ("b", "ab"), ("b", "aa")]},
    }
    for what, changed in kinds.items():
        run = same | changed if rank else same
        guide = lmppl.LMGuide(run["model"], lm=tiny_lm("ab.", seed=run["weights"]))
        is_stream = what == "a stream"
        try:
            guide.fit(
                iter(run["data"]) if is_stream else run["data"], steps=2, batch_size=8,
                inputs_per_step=2, seed=run["seed"], eval_data=run["eval_data"], progress=False,
                parallel=run["parallel"],
            )  # fmt: skip
        except ValueError as error:
            print(f"{what}: {error}")
    lm = tiny_lm("ab.", seed=0)
    for parallel in (
        "inputs",
        "none",
    ):  # without seeds all ranks have that of the first, or their own
        guide = lmppl.LMGuide(program, lm=lm)
        guide.fit(data, steps=2, batch_size=8, parallel=parallel, progress=False)
        print(f"{parallel}: {guide.history.column('loss')}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
