"""Texts that match a pattern by genlm-control, one run for each line of standard input.

    .venv-peers/genlm-control/bin/python -m benchmarks.peers.genlm_patterns --model FOLDER

(``benchmarks/patterns.py`` starts it, in an environment that has genlm-control.) Two ways: ``"masks"``,
its sampler of one token from the product of model and automaton, and ``"awrs"``, adaptive weighted
rejection sampling. A pattern is a regular expression, which becomes its automaton ``BoolFSA``, or is
asked through the package ``regex``, as in genlm-eval. What a pattern has been made into is kept for
later runs.
"""

from __future__ import annotations

import random
import string
from typing import Any

import numpy as np
from genlm.control import AWRS, BoolFSA, Potential, PromptedLLM, direct_token_sampler

from benchmarks.pattern_set import Pattern
from benchmarks.peers.genlm import begin, serve


class PatternPotential(Potential):
    """1 for texts that match, or may yet; else 0 (genlm-eval's class of this name)."""

    def __init__(self, pattern: str) -> None:
        super().__init__(list(map(ord, string.printable)))
        self._pattern = Pattern(pattern)

    async def prefix(self, context: list[int]) -> float:
        return 0.0 if self._pattern.allows(bytes(context).decode()) else float("-inf")

    async def complete(self, context: list[int]) -> float:
        return 0.0 if self._pattern.complete(bytes(context).decode()) else float("-inf")


_potentials: dict[tuple[str, str], Potential] = {}


def potential_of(llm: PromptedLLM, request: dict[str, Any]) -> Potential:
    """The pattern as a potential over the model's tokens."""
    key = (request["kind"], request["pattern"])
    if key not in _potentials:
        _potentials.clear()  # patterns come one after the other
        make = BoolFSA.from_regex if request["kind"] == "regex" else PatternPotential
        _potentials[key] = make(request["pattern"]).coerce(llm, f=b"".join)
    return _potentials[key]


async def smc(llm: PromptedLLM, request: dict[str, Any]) -> dict[str, Any]:
    """One run. Returns the log evidence, how many particles have a positive weight, and the number of
    tokens of all particles, their EOS included."""
    begin(llm, request)
    random.seed(request["seed"])
    np.random.seed(request["seed"])  # it resamples by this
    condition = potential_of(llm, request)
    if request["sampler"] == "masks":
        sampler = direct_token_sampler(llm * condition)
    else:
        sampler = AWRS(llm, condition, seed=request["seed"])
    sequences = await sampler.smc(
        n_particles=request["particles"],
        ess_threshold=request["ess_threshold"],
        max_tokens=request["max_tokens"],
        resampling_method="systematic",
    )
    live = np.isfinite(sequences.log_weights)
    return {
        "log_evidence": float(sequences.log_ml) if live.any() else None,
        "live": int(live.sum()),
        "tokens": sum(len(context) for context in sequences.contexts),
    }


if __name__ == "__main__":
    serve(str(__doc__).splitlines()[0], smc)
