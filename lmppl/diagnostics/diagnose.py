"""``diagnose``: how far a guide is from the posterior of a program on one input.

With u = log R - log q of a trace (R its joint density, q the guide's), two averages enclose log Z:

    ELBO = E_q[u] = log Z - KL(q || p)     traces drawn from the guide
    EUBO = E_p[u] = log Z + KL(p || q)     traces drawn from the posterior

so any bounds L <= log Z <= U make brackets of both divergences,

    L - ELBO <= KL(q || p) <= U - ELBO     EUBO - U <= KL(p || q) <= EUBO - L

(Grosse et al., 2015, arXiv 1511.02543; of language models, Zhao et al., 2024, arXiv 2404.17546).
L is the log of the mean weight of N draws of the guide (Burda et al., 2016, arXiv 1509.00519); U is
the same with one exact posterior draw among them. Both hold in expectation.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lmppl import runtime
from lmppl.checks import check_int, check_number
from lmppl.diagnostics.diversity import TextDiversity, text_diversity
from lmppl.diagnostics.mismatch import MismatchOption, check_mismatch, mismatch_notes, mismatches
from lmppl.distributions import check_lm
from lmppl.engines.dispatch import infer
from lmppl.exclusive import exclusive
from lmppl.guides.scoring import LatentScores, score_latents
from lmppl.lm import LM
from lmppl.lm.batches.draw_log import logging_draws
from lmppl.posterior import Posterior, ZeroEvidenceError
from lmppl.primitives import use
from lmppl.report.diagnoses import diagnosis_figure
from lmppl.report.tables import Block, Report, diagnosis_blocks
from lmppl.runtime import estimates
from lmppl.runtime.arguments import bind
from lmppl.runtime.estimates import Bracket
from lmppl.runtime.mismatch import Mismatch
from lmppl.training.lm_guide import LMGuide

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Diagnosis", "TextDiversity", "diagnose"]

_SAME_DENSITY = 0.5  # nats; a half-precision model scores a trace so differently


@dataclass(frozen=True, repr=False, eq=False)
class Diagnosis(Report):
    """How good a guide is on one input; what ``diagnose`` returns. All in nats.

    ``elbo_stderr``, ``elbo_alive_stderr``, ``iw_bound_stderr``, ``eubo_stderr``,
    ``iw_upper_bound_stderr``, ``log_z_stderr``, ``kl_guide_posterior_stderr``,
    ``kl_alive_posterior_stderr`` and ``kl_posterior_guide_stderr`` are standard errors (of a bracket:
    the larger of its ends', as if ELBO and bounds were independent): 0 of an exact figure, None where
    it is not known. With a ``pareto_k`` above its threshold, don't trust those of the importance
    bounds.

    Attributes:
        guide: what was diagnosed, in words.
        num_samples: draws of the guide.
        dead_fraction: share of them that has probability zero under the program.
        killed: site to the number of draws that it ended.
        elbo: mean of u = log R - log q over the draws; ``-inf`` if any is dead.
        elbo_alive: ELBO of the guide conditioned on being alive, q(trace) / q(alive): the mean of
            u over the live draws plus the log of their share. A lower bound of log Z.
        iw_bound: log of the mean of exp(u): a lower bound of log Z, and an estimate of it.
        eubo: mean of u over exact posterior draws, an upper bound of log Z; None without these;
            ``inf`` if the guide cannot draw one of them.
        iw_upper_bound: log of the mean of exp(u) over all draws of the guide and one exact draw,
            averaged over the exact draws: a tighter upper bound than ``eubo``.
        exact_source: ``"posterior"``, ``"latents"`` or None: where exact draws came from.
        log_z: a second estimate of log Z, independent of the guide; None if there is none.
        log_z_source: ``"exact"``, ``"prior"`` (importance sampling from the prior), ``"given"`` or
            None.
        z_score: ``iw_bound`` less ``log_z`` in standard errors (and 0.001 nats for rounding).
        kl_guide_posterior: bracket of KL(q || p); infinite if a draw is dead.
        kl_alive_posterior: the same of the guide conditioned on being alive.
        kl_posterior_guide: bracket of KL(p || q); None without exact draws.
        ess_fraction: Kish's effective sample size of the weights over ``num_samples``.
        pareto_k: shape of the weights' upper tail (Vehtari et al., 2024, arXiv 1507.02646); above
            0.5 the weights have no variance, above 1 no mean. None: no fit (``notes`` say why).
        pareto_k_threshold: min(1 - 1 / log10(live draws), 0.7), above which it is bad.
        texts: diversity of the texts drawn, by latent site.
        mismatch: how far log-probabilities of the guide's texts are apart: ``"drawn, scored"``, as they
            were drawn and as a scoring pass finds them; and, if asked for, ``"drawn, float32"`` and
            ``"scored, float32"``. Empty where no text was drawn token by token.
        doubts: figure (``iw_bound``, ``log_z``) to sentences, why it and its standard error are not
            to be trusted: an ESS below 10, a Pareto k above 0.7. ``notes`` repeat them.
        notes: what to beware of.
        samples: the weighted draws themselves.
    """

    guide: str
    num_samples: int
    dead_fraction: float
    killed: dict[str, int]
    elbo: float
    elbo_stderr: float | None
    elbo_alive: float
    elbo_alive_stderr: float | None
    iw_bound: float
    iw_bound_stderr: float | None
    eubo: float | None
    eubo_stderr: float | None
    iw_upper_bound: float | None
    iw_upper_bound_stderr: float | None
    exact_source: str | None
    log_z: float | None
    log_z_stderr: float | None
    log_z_source: str | None
    z_score: float | None
    kl_guide_posterior: Bracket
    kl_guide_posterior_stderr: float | None
    kl_alive_posterior: Bracket
    kl_alive_posterior_stderr: float | None
    kl_posterior_guide: Bracket | None
    kl_posterior_guide_stderr: float | None
    ess_fraction: float
    pareto_k: float | None
    pareto_k_threshold: float | None
    texts: dict[str, TextDiversity]
    mismatch: dict[str, Mismatch]
    doubts: dict[str, list[str]]
    notes: tuple[str, ...]
    samples: Posterior

    def summary(self) -> dict[str, Any]:
        """All figures in plain Python values, as the table shows them."""
        texts = {name: dataclasses.asdict(text) for name, text in self.texts.items()}
        mismatch = {pair: dataclasses.asdict(found) for pair, found in self.mismatch.items()}
        summary = vars(self) | {"texts": texts, "mismatch": mismatch, "notes": list(self.notes)}
        del summary["samples"]
        return summary

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw what the draws say of log Z, on one axis of nats: above, the log-weights of the live
        draws as two histograms, by number and by weight, which are alike where the guide is the
        posterior; below, the estimates and bounds of log Z, with two standard errors to each side, and
        the divergences that separate them from it. The dashed line is ``log_z`` (``iw_bound``, where
        that is not known). The matplotlib ``Figure`` is shown by notebooks; pyplot does not know it.

        ```python
        lmppl.diagnose(infill, x, y, guide=guide, lm=lm).plot("guide.png")
        ```

        Args:
            path: also write it to this file; its ending says the format (none: PNG). The file is
                there either whole or not at all.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if every draw has probability zero.
        """
        return diagnosis_figure(self.summary(), self.samples.log_weights.tolist(), path)

    def _blocks(self) -> list[Block]:
        return diagnosis_blocks(self.summary())


@exclusive()
def diagnose(
    model: Callable[..., Any],
    *args: Any,
    guide: Any = None,
    lm: LM | None = None,
    num_samples: int = 256,
    posterior: Posterior | None = None,
    latents: Sequence[Mapping[str, Any]] | None = None,
    log_z: tuple[float, float] | None = None,
    mismatch: MismatchOption = True,
    seed: int | None = None,
    progress: bool | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """How good a guide is as an approximation of the posterior on one input.

    ```python
    exact = lmppl.infer(infill, x, y, lm=lm, method="exact")
    print(lmppl.diagnose(infill, x, y, guide=guide, lm=lm, posterior=exact))
    ```

    Draws alone bound KL(guide || posterior) only from below. Exact posterior draws (``posterior=`` or
    ``latents=``) bound it from above, and KL(posterior || guide) from both sides.

    Args:
        model: the program, as of ``infer``.
        *args: its positional arguments.
        guide: what is judged, an ``LMGuide`` or a guide program; None: the prior.
        lm: as of ``infer``.
        num_samples: draws of the guide (and as many of the prior, without ``posterior`` or ``log_z``).
        posterior: of ``infer(model, *args, method="exact")``: makes log Z and EUBO exact.
        latents: exact posterior draws, each a dict from every latent site to its text or tensor,
            say those that the observation was simulated with. A ``str`` stands for its canonical
            tokens; a ``Text`` keeps its own.
        log_z: an estimate of log Z and its standard error (nats) by other means, such as a long run
            of another engine; without it the prior's draws make one.
        mismatch: score some of the guide's texts anew, about 1,024 tokens (and eight texts at least),
            and report how far their log-probabilities are from those that they were drawn with;
            ``"float32"``: also by a copy of their language model in float32, which takes 4 bytes a
            parameter while it is there; False: neither.
        seed: as of ``infer``.
        progress: as of ``infer``.
        kwargs: the program's arguments by name, as of ``infer``.

    Raises:
        TypeError: ``log_z`` that is not two numbers.
        ValueError: ``num_samples`` below 2; a posterior that is not exact or of another program or
            input; latents that are no complete, possible trace of the program; ``log_z`` beside an
            exact posterior, or with a negative standard error; another ``mismatch``, or quantised
            weights, of which there is no copy in float32.
    """
    num_samples = check_int("num_samples", num_samples, least=2)
    _check_exact(posterior, latents)
    check_mismatch(mismatch)
    given = _given_log_z(log_z, posterior)
    model, args = bind(model, args, kwargs)
    seeds = runtime.slot_seeds(runtime.fresh_seed(seed), 2)
    common: dict[str, Any] = {"num_samples": num_samples, "progress": progress, "kwargs": {}}

    def draws(proposal: Any, seed: int) -> Posterior:
        try:
            return infer(model, *args, method="importance", guide=proposal, seed=seed, **common)
        except ZeroEvidenceError as error:
            return error.posterior  # that all are dead is a finding

    second: _Estimate = (None, None)
    exact = source = None
    doubts: dict[str, list[str]] = {}
    with nullcontext() if lm is None else use(check_lm("diagnose", lm)):
        with logging_draws() as log:
            samples = draws(guide, seeds[0])
        if latents is not None:
            exact = _of_draws(score_latents(guide, model, args, latents))
        if posterior is not None:
            exact = _of_posterior(posterior, partial(score_latents, guide, model, args))
            second, source = (posterior.log_evidence, 0.0), "exact"
        elif given is not None:
            second, source = given, "given"
        elif guide is not None:
            prior = draws(None, seeds[1])
            second, source = (prior.log_evidence, prior.log_evidence_stderr), "prior"
            doubts["log_z"] = _doubts(prior)
        found = mismatches(log.texts, guide, mismatch)
    figures = _figures(samples.log_weights, samples.log_evidence_stderr, exact, posterior, second)
    z_score = estimates.z_score(*figures["iw_bound"], *second)
    pareto_k, threshold, tail_notes = _tail(samples)
    doubts["iw_bound"] = _doubts(samples)
    return Diagnosis(
        guide=_name(guide),
        num_samples=num_samples,
        dead_fraction=1.0 - len(_live(samples)) / num_samples,
        killed=dict(samples.killed.most_common()),
        exact_source=None if exact is None else "latents" if posterior is None else "posterior",
        log_z_source=source,
        z_score=z_score,
        ess_fraction=samples.ess / num_samples,
        pareto_k=pareto_k,
        pareto_k_threshold=threshold,
        texts=text_diversity(samples),
        mismatch=found,
        doubts={figure: reasons for figure, reasons in doubts.items() if reasons},
        notes=(
            *_notes(figures, source, z_score, doubts),
            *tail_notes,
            *mismatch_notes(found, guide),
        ),
        samples=samples,
        **{name: figure[0] for name, figure in figures.items()},
        **{f"{name}_stderr": figure[1] for name, figure in figures.items()},
    )


def _name(guide: Any) -> str:
    """What was given as ``guide=``, in words."""
    if isinstance(guide, LMGuide):
        return repr(guide)
    return "the prior" if guide is None else getattr(guide, "__name__", "a program")


_Estimate = tuple[Any, Any]
"""A figure (None: unknown) and its standard error."""


def _figures(
    u: torch.Tensor,
    iw_stderr: float | None,
    exact: torch.Tensor | None,
    posterior: Posterior | None,
    log_z: _Estimate,
) -> dict[str, _Estimate]:
    """Bounds of log Z, and the brackets of divergences that follow, by their names in ``Diagnosis``.

    Args:
        u: of the guide's draws, (N,) float64.
        iw_stderr: standard error of the log of their mean weight.
        exact: u of exact draws, (K,) float64: of all traces, weighted by ``posterior`` if given.
        log_z: estimated without the guide.
    """
    elbo, elbo_alive = estimates.mean_of(u), estimates.elbo_alive(u)
    iw_bound = lower = (runtime.log_mean_exp(u), iw_stderr)
    upper: _Estimate = math.inf, iw_stderr  # no upper bound: errors are those of the lower
    eubo: _Estimate = None, None
    if exact is not None and posterior is not None:
        lower = upper = log_z
        eubo = float(posterior.weights[posterior.weights > 0] @ exact), 0.0
    elif exact is not None:
        eubo, upper = estimates.mean_of(exact), estimates.iw_upper_bound(exact, u, iw_stderr)
    (low, low_stderr), (high, high_stderr) = lower, upper
    known = low_stderr is not None and high_stderr is not None
    bounds_stderr = max(low_stderr, high_stderr) if known else None

    def divergence(low: float, high: float, bound: _Estimate) -> _Estimate:
        return estimates.less(low, high, bound[0]), estimates.combined(bound[1], bounds_stderr)

    found = {"elbo": elbo, "elbo_alive": elbo_alive, "iw_bound": iw_bound, "log_z": log_z}
    found["kl_guide_posterior"] = divergence(low, high, elbo)
    found["kl_alive_posterior"] = divergence(low, high, elbo_alive)
    found |= dict.fromkeys(("eubo", "iw_upper_bound", "kl_posterior_guide"), (None, None))
    if exact is not None:
        found |= {"eubo": eubo, "iw_upper_bound": upper}
        found["kl_posterior_guide"] = divergence(-high, -low, (-eubo[0], eubo[1]))
    return found


def _doubts(draws: Posterior) -> list[str]:
    """Why an estimate of log Z by weighted draws is not to be trusted."""
    if not len(live := _live(draws)):
        return []  # which the table says as it is
    return estimates.doubts(draws.ess, estimates.pareto_k(live.numpy())[0])


def _notes(
    figures: Mapping[str, _Estimate],
    source: str | None,
    z_score: float | None,
    doubts: Mapping[str, list[str]],
) -> Iterator[str]:
    """What to beware of in the estimates of log Z."""
    figure_names = {"iw_bound": "the log mean weight", "log_z": "log Z by the prior's draws"}
    for figure, reasons in doubts.items():
        if reasons:
            name = figure_names[figure]
            yield f"don't trust {name} and its standard error: {', and '.join(reasons)}"
    (iw_bound, iw_stderr), (eubo, eubo_stderr) = figures["iw_bound"], figures["eubo"]
    error = estimates.combined(eubo_stderr, iw_stderr, estimates.ROUNDING)
    if eubo is not None and source != "exact" and error is not None and iw_bound - eubo > 3 * error:
        yield "EUBO is below log Z: are the latents exact posterior draws?"
    if z_score is not None and abs(z_score) > 3:
        by = f"{abs(z_score):.1f} standard errors"
        other = "the one given" if source == "given" else f"that of the {source}"
        yield f"the guide's estimate of log Z and {other} disagree by {by}"
    if source == "prior" and figures["log_z"][0] == -math.inf:
        yield "every draw of the prior is dead, so it estimates no log Z"


def _check_exact(posterior: Posterior | None, latents: Sequence[Mapping[str, Any]] | None) -> None:
    if posterior is not None and latents is not None:
        raise ValueError("give posterior= or latents=, not both: an exact posterior needs no draws")
    if posterior is not None:
        if not isinstance(posterior, Posterior):
            raise TypeError(f"posterior takes a lmppl.Posterior, given {type(posterior).__name__}")
        if (engine := posterior.info.get("engine")) != "exact":
            raise ValueError(
                f"posterior= takes an exact one, infer(..., method='exact'); this is by {engine!r}. "
                "Draws that are known to be exact go into latents=[{site: value}, ...]"
            )
    if latents is not None:
        is_list = isinstance(latents, Sequence)
        if not is_list or not all(isinstance(draw, Mapping) for draw in latents):
            takes = "latents takes a list of dicts, [{site: text or tensor}, ...]"
            raise TypeError(f"{takes}, given {latents!r}")
        if not latents:
            raise ValueError("latents=[] holds no draw: give at least one, or leave it out")


def _given_log_z(log_z: Any, posterior: Posterior | None) -> tuple[float, float] | None:
    """What was given as ``log_z``, checked."""
    if log_z is None:
        return None
    if posterior is not None:
        raise ValueError("give posterior= or log_z=, not both: an exact posterior knows log Z")
    if not isinstance(log_z, Sequence) or len(log_z) != 2:
        raise TypeError(f"log_z={log_z!r}: give an estimate and its standard error, (-12.3, 0.1)")
    estimate = check_number("log_z, the estimate", log_z[0])
    return estimate, check_number("log_z, the standard error", log_z[1], least=0.0)


def _live(draws: Posterior) -> torch.Tensor:
    """The log-weights of draws of positive probability, (n,) float64."""
    return draws.log_weights[draws.log_weights > -math.inf]


def _tail(draws: Posterior) -> tuple[float | None, float | None, list[str]]:
    """Pareto k of draws' log-weights, what it should be below, and notes on it."""
    live = _live(draws)
    pareto_k, why_not = estimates.pareto_k(live.numpy())
    if pareto_k is None:
        return None, None, [f"no Pareto k: {why_not}"]
    threshold = min(1 - 1 / math.log10(len(live)), 0.7)
    heavy = (
        f"Pareto k is above {threshold:.2f}: the weights' tail is heavy, and the importance "
        "bounds and their standard errors are too optimistic"
    )
    return pareto_k, threshold, [heavy] * (pareto_k > threshold)


def _of_draws(scores: LatentScores) -> torch.Tensor:
    """u of given latents, (K,) float64."""
    if dead := torch.nonzero(scores.log_joint == -math.inf).flatten().tolist():
        raise ValueError(
            f"latents[{dead[0]}] has probability zero under the program on this input, so it "
            "is no draw from its posterior"
        )
    return scores.log_joint - scores.log_q


def _of_posterior(posterior: Posterior, score: Callable[..., LatentScores]) -> torch.Tensor:
    """u of every live trace of the exact posterior, (K,) float64."""
    live = posterior.weights > 0
    latents = [runtime.latents_of(trace) for trace, weight in posterior if weight > 0]
    values = [{name: node["value"] for name, node in nodes.items()} for nodes in latents]
    scores = score(values, what="the posterior's trace ")
    recorded = posterior.log_weights[live] - math.log(len(posterior))
    if bool(((scores.log_joint - recorded).abs() > _SAME_DENSITY).any()):
        raise ValueError(
            "posterior= does not belong to this program on these arguments with this language "
            "model (or was resampled): its traces have other densities there. Run "
            "infer(model, *args, method='exact') with the same model, args and lm"
        )
    return scores.log_joint - scores.log_q
