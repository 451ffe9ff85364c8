"""Islands: independent runs of an engine on one program, each with a part of the samples.

    island k of K has N / K of the samples, and the seed nth_seed(seed, k)
    all run side by side, so that they share the language model's batches; none knows of another
    the posterior is the pool of theirs

(Verge et al., 2015, arXiv 1306.3911, whose islands also resample each other; Whiteley, Lee and Heine,
2016, arXiv 1309.2918, on how little particles need to interact.) Here islands do not interact at all:
their estimates of the evidence are independent, so that their spread is its standard error, and they can
be anywhere. A pool of posteriors that other processes have made is the same, see ``infer_island``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lmppl import runtime
from lmppl.engines.base import State
from lmppl.posterior import Posterior
from lmppl.runtime import Member
from lmppl.runtime.coroutine import GlobalState

T = TypeVar("T")


def share_of(island: int, islands: int, num_samples: int, seed: int) -> tuple[int, int]:
    """How many of the samples one of some islands has, and its seed. (What is left by the division, the
    first ones have. An island alone is the run itself.)

    Raises:
        ValueError: if there are more islands than samples.
    """
    if islands > num_samples:
        raise ValueError(
            f"islands={islands} of num_samples={num_samples}: each island needs a sample at least"
        )
    size = num_samples // islands + (island < num_samples % islands)
    return size, seed if islands == 1 else runtime.nth_seed(seed, island)


def on_islands(state: State, num: int, sample: Callable[[State], T]) -> list[T]:
    """Run an algorithm on ``num`` islands in place of all particles at once.

    Args:
        state: of the whole run, whose posterior is to be the pool of the islands'.
        num: how many islands; 1: the algorithm gets ``state`` itself.
        sample: the algorithm, as ``Engine.sample``.

    Returns:
        What it has returned on each island.

    Raises:
        ValueError: if there are more islands than samples.
        Exception: what an island raises, with a note that names it.
    """
    if num == 1:
        return [sample(state)]
    share_of(0, num, state.num_samples, state.seed)
    fns = [functools.partial(_run, state, k, num, sample) for k in range(num)]
    grad = torch.is_grad_enabled()
    members = [Member(fn, GlobalState.fresh(state.seed, grad=grad)) for fn in fns]
    with runtime.ending(members):
        runtime.run_members(members)
    results, islands, state.islands = map(list, zip(*(m.result for m in members), strict=True))
    state.has_proposed = any(island.has_proposed for island in islands)
    state.log_weights = torch.cat([island.log_weights for island in islands])
    return results


def _run(
    state: State, k: int, num: int, sample: Callable[[State], T]
) -> tuple[T, State, Posterior]:
    """Island k of a run: what the algorithm returns, its state, its posterior."""
    size, seed = share_of(k, num, state.num_samples, state.seed)

    def report(figures: dict[str, Any]) -> None:
        told = {name: figure for name, figure in figures.items() if name != "engine"}
        state.report(island=k, **told)

    common = state.engine, state.model, state.args, size, state.guide, seed
    island = State(*common, callback=report)
    with runtime.ending(island.particles):
        try:
            return sample(island), island, island.unchecked_posterior()
        except Exception as error:
            error.add_note(f"raised in island {k} of {num} (seed={seed})")
            raise
