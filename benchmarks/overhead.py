"""What the runtime costs: the share of the time that many particles spend outside the LM.

    python benchmarks/overhead.py --particles 256

A three-site program (latent, latent, observed) is run by importance sampling. "outside the LM" is
everything but the LM's own batched calls (drawing and scoring of token sequences); the second
figure counts only its forward passes as LM, so also sampling and bookkeeping per token as overhead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import lmppl
from lmppl import lm_sample
from lmppl.lm.runner import Runner


def story(x: str, y: str) -> lmppl.Text:
    z = lm_sample("z", x, max_tokens=16, stop=".")
    w = lm_sample("w", [x, z], max_tokens=16, stop=".")
    lm_sample("y", [x, z, w], obs=y)
    return w


class Clock:
    """Seconds spent inside wrapped functions (not counted twice when they nest)."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def wrap(self, owner: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    lm = lmppl.LM.from_pretrained(args.model)
    calls, passes = Clock(), Clock()
    calls.wrap(lmppl.LM, "draw")
    calls.wrap(lmppl.LM, "score")
    passes.wrap(Runner, "run_cached")
    passes.wrap(Runner, "run_plain")
    x, y = "Anna looked everywhere for her keys.", " They were in the fridge."
    lmppl.infer(story, x, y, lm=lm, method="importance", num_samples=8, seed=0)
    print(lm, "threads", torch.get_num_threads())
    for repeat in range(args.repeats):
        calls.seconds = passes.seconds = 0.0
        began = time.perf_counter()
        lmppl.infer(
            story, x, y, lm=lm, method="importance", num_samples=args.particles, seed=repeat
        )
        total = time.perf_counter() - began
        print(
            f"{args.particles} particles, three sites: {total:.2f} s, outside LM calls "
            f"{100 * (1 - calls.seconds / total):.1f}%, outside forward passes "
            f"{100 * (1 - passes.seconds / total):.1f}%"
        )


if __name__ == "__main__":
    main()
