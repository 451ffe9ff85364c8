"""``infer_island``: one of the islands of a run, alone, for a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lmppl.checks import check_int, check_seed
from lmppl.engines import MCMC, EngineLike, Exact
from lmppl.engines.dispatch import infer, prepare
from lmppl.engines.islands import share_of
from lmppl.lm import LM
from lmppl.posterior import Posterior, ZeroEvidenceError


def infer_island(
    model: Callable[..., Any],
    *args: Any,
    island: int,
    islands: int,
    seed: int,
    method: str | EngineLike = "smc",
    lm: LM | None = None,
    num_samples: int = 64,
    guide: Any = None,
    progress: bool | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Posterior:
    """One island of a run, to be put together with the others by ``lmppl.pool``, wherever they are made.

    ```python
    options = dict(lm=lm, num_samples=800, seed=0)

    # in process k of 8, or in an actor, on any machine
    part = lmppl.infer_island(infill, x, y, island=k, islands=8, **options)
    part.save(f"runs/{k}")

    # in one of them, when all have ended
    posterior = lmppl.pool(lmppl.Posterior.load(f"runs/{k}") for k in range(8))
    # is lmppl.infer(infill, x, y, method="smc", islands=8, **options)
    ```

    That is so up to rounding, as batches have other shapes. Other engines whose estimate of the evidence
    is unbiased have islands in this sense, too: those of ``"importance"`` make up a longer run.

    Args:
        model: the program, as of ``infer``.
        *args: as of ``infer``.
        island: which one, from 0 to ``islands`` - 1.
        islands: how many there are.
        seed: of the whole run, the same for all islands, each of which derives its own from it.
        method: as of ``infer``, without islands of its own; neither ``"mcmc"`` nor ``"exact"``.
        lm: as of ``infer``.
        num_samples: of all islands together; this one has its share.
        guide: as of ``infer``.
        progress: as of ``infer``.
        callback: as of ``infer``.
        kwargs: as of ``infer``.
        **options: of the engine, as of ``infer``.

    Returns:
        The island's posterior; also where all its particles have probability zero, which is an estimate
        of 0 that the pool must not miss.

    Raises:
        ValueError: as ``infer``; for an island that there is not, more islands than samples, or an
            engine that a pool cannot be made of.
        TypeError: as ``infer``; without a seed.
    """
    engine = prepare(model, method, lm, callback, options)
    if isinstance(engine, MCMC | Exact):
        raise ValueError(
            f"method={engine.name!r} has no islands, as no pool can be made of its posteriors: take an "
            "engine that estimates the evidence, 'smc', 'importance' or 'gflownet'"
        )
    if getattr(engine, "islands", 1) != 1:
        raise ValueError(
            "infer_island: islands= is its own, give it no engine that has islands, too"
        )
    num_samples, islands = check_int("num_samples", num_samples), check_int("islands", islands)
    if check_int("island", island, least=0) >= islands:
        raise ValueError(
            f"island={island} of islands={islands}: it is a number from 0 to {islands - 1}"
        )
    if (given := check_seed(seed)) is None:
        raise TypeError("seed=None: islands need the same seed in all processes, give a number")
    share, own_seed = share_of(island, islands, num_samples, given)
    common: dict[str, Any] = {"lm": lm, "num_samples": share, "seed": own_seed, "guide": guide}
    common |= {"progress": progress, "callback": callback, "kwargs": kwargs}
    try:
        return infer(model, *args, method=engine, **common)
    except ZeroEvidenceError as error:
        return error.posterior
