"""Independent runs of one program as one posterior.

    K runs, with N_k samples of log-weights log w_ki each, so that logmeanexp_i(log w_ki) = log Z_k
    the pool has all samples, with the weights that they have

So its evidence is the mean of the Z_k by their sizes, sum_k N_k Z_k / sum_k N_k, unbiased as each of
them is, and the samples of run k have a share of the weight in proportion to N_k Z_k: they are properly
weighted. A run that has found nothing has Z_k = 0, and counts: without it the mean would be too large.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lmppl.posterior.posterior import Posterior
from lmppl.posterior.weighted import ZeroEvidenceError

_COSTS = "tokens_sampled", "tokens_scored", "tokens_trained", "seconds", "resamplings"


def pool(posteriors: Iterable[Posterior | Exception]) -> Posterior:
    """One posterior of independent runs of a program on the same arguments: its evidence is the mean of
    theirs (by numbers of samples), and each run has a share of the weight in proportion to its evidence.

    ```python
    parts = [lmppl.Posterior.load(f"runs/{k}") for k in range(8)]     # of 8 processes
    posterior = lmppl.pool(parts)
    ```

    The runs are the pool's *islands*: ``posterior.islands`` gives them back, and at four or more the
    evidence has a standard error by their spread, also that of ``"smc"``, which has none of one run. The
    islands of a pool are taken one by one, so that pools can be pooled. A run in which all samples have
    probability zero is an estimate of 0, and must not be left out: give the ``ZeroEvidenceError`` that
    ``infer`` raises, or its posterior.

    Args:
        posteriors: the runs, each with a seed of its own. An exception in place of one
            (``infer_batch(on_error="return")``) is raised, unless it is a ``ZeroEvidenceError``.

    Returns:
        A posterior of all samples, in this order. Its ``info`` has the sum of what the runs have cost;
        what else an engine says of a run, its island has.

    Raises:
        TypeError: for anything else.
        ValueError: for no posterior, for one that claims no evidence (``"mcmc"``) or is exact, for
            two runs of one seed, and for posteriors that have no latent site in common.
        ZeroEvidenceError: if all samples of all runs have probability zero; it carries the pool.
    """
    given = [_posterior(one) for one in posteriors]
    if not given:
        raise ValueError("pool() needs at least one posterior")
    _check(given)
    pooled = pooled_runs([island for posterior in given for island in posterior.islands])
    pooled.check_alive()
    return pooled


def pooled_runs(runs: Sequence[Posterior]) -> Posterior:
    """What ``pool`` gives, without its checks: each of the posteriors is one run. A single one is given
    back as it is."""
    if len(runs) == 1:
        return runs[0]
    guides = {id(run.guide): run.guide for run in runs}
    pooled = Posterior(
        [trace for run in runs for trace in run.traces],
        torch.cat([run.log_weights for run in runs]),
        [value for run in runs for value in run.returns],
        guide=next(iter(guides.values())) if len(guides) == 1 else None,
        info=_pooled_info(runs),
    )
    pooled.genealogies = [run.genealogies[0] for run in runs]
    return pooled


def _posterior(given: Any) -> Posterior:
    if isinstance(given, ZeroEvidenceError):
        given = given.posterior
    if isinstance(given, Exception):
        raise given
    if not isinstance(given, Posterior):
        raise TypeError(f"pool() takes posteriors, given {type(given).__name__}")
    return given


def _check(posteriors: Sequence[Posterior]) -> None:
    for i, posterior in enumerate(posteriors):
        who = f"posterior {i} of the pool, by {posterior.info.get('engine')},"
        if posterior.log_evidence is None:
            raise ValueError(
                f"{who} does not estimate the evidence, by which the runs of a pool are weighed"
            )
        if posterior.info.get("exact"):
            raise ValueError(f"{who} is exact: there is nothing to add to it")
    islands = [(i, one) for i, posterior in enumerate(posteriors) for one in posterior.islands]
    seen: dict[int, int] = {}
    for i, island in islands:
        if (seed := island.info.get("seed")) is None:
            continue
        if seed in seen:
            raise ValueError(
                f"posteriors {seen[seed]} and {i} of the pool have runs of one seed ({seed}), so their "
                "samples are not independent: give each run its own, such as "
                "lmppl.runtime.nth_seed(seed, k)"
            )
        seen[seed] = i
    first = set(posteriors[0].latents)
    for i, posterior in enumerate(posteriors):
        if not first & set(posterior.latents) and first and posterior.latents:
            raise ValueError(
                f"posterior {i} of the pool has other latent sites than the first "
                f"({', '.join(posterior.latents)}; {', '.join(posteriors[0].latents)}): a pool is of "
                "runs of one program on the same arguments"
            )


def _pooled_info(runs: Sequence[Posterior]) -> dict[str, Any]:
    """What a pool has to say of its runs."""
    infos = [run.info for run in runs]
    engines = [str(info["engine"]) for info in infos if info.get("engine")]
    pooled: dict[str, Any] = {
        "engine": ", ".join(dict.fromkeys(engines)) or None,
        "iid": all(info.get("iid") for info in infos),
        "has_guide": any(info.get("has_guide") for info in infos),
        "killed": sum((run.killed for run in runs), Counter()),
        "reasons": {name: why for run in reversed(runs) for name, why in run.reasons.items()},
        "notes": _pooled_notes([list(info.get("notes", ())) for info in infos]),
    }
    for cost in _COSTS:
        if all(info.get(cost) is not None for info in infos):
            pooled[cost] = sum(info[cost] for info in infos)
    if any(info.get("ess") is not None for info in infos):
        pooled["ess"] = _pooled_ess(runs)
    pooled["islands"] = [{"num_samples": len(run), **_plain(run.info)} for run in runs]
    return pooled


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """With a dict in place of a ``Counter``, so that it can be saved."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in info.items()}


def _pooled_notes(notes: Sequence[Sequence[str]]) -> list[str]:
    """Each note once, with the number of runs that have it, unless all have."""
    counts = Counter(note for own in notes for note in dict.fromkeys(own))
    return [
        note if count == len(notes) else f"in {count} of {len(notes)} islands: {note}"
        for note, count in counts.items()
    ]


def _pooled_ess(runs: Sequence[Posterior]) -> float:
    """The effective sample size where that of the weights is not it: of independent estimates, weighted
    by shares s_k of variance 1 / ess_k each, 1 / sum(s_k^2 / ess_k)."""
    totals = torch.tensor([math.log(len(run)) + (run.log_evidence or 0.0) for run in runs])
    if not bool((totals > -math.inf).any()):
        return 0.0
    shares = torch.softmax(totals.double(), 0).tolist()
    terms = [share**2 / run.ess for share, run in zip(shares, runs, strict=True) if share]
    return 1.0 / math.fsum(terms)
