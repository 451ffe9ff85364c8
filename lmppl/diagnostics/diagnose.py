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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lmppl import runtime
from lmppl.checks import check_int
from lmppl.diagnostics.diversity import TextDiversity, text_diversity
from lmppl.engines.dispatch import infer
from lmppl.guides.scoring import LatentScores, score_latents
from lmppl.lm import LM
from lmppl.posterior import Posterior, ZeroEvidenceError
from lmppl.primitives import use
from lmppl.report.tables import diagnosis_html, diagnosis_text
from lmppl.runtime import estimates
from lmppl.runtime.estimates import Bracket
from lmppl.training.lm_guide import LMGuide

__all__ = ["Diagnosis", "TextDiversity", "diagnose"]

# Nats by which a trace's density may differ from the one recorded, if a half-precision model
# scored both.
_SAME_DENSITY = 0.5


@dataclass(frozen=True, repr=False, eq=False)
class Diagnosis:
    """How good a guide is on one input; what ``diagnose`` returns. All in nats.

    A ``..._stderr`` is a standard error (of a bracket: the larger of its ends', as if ELBO and
    bounds were independent): 0 of an exact figure, None where it is not known. They are themselves
    estimated; with a ``pareto_k`` above its threshold, don't trust those of the importance bounds.

    Attributes:
        guide: what was diagnosed, in words.
        num_samples: draws of the guide.
        dead_fraction: share of them that has probability zero under the program.
        killed: site to the number of draws that it ended.
        elbo: mean of u = log R - log q over the draws; ``-inf`` if any is dead.
        elbo_alive: ELBO of the guide conditioned on being alive, q(trace) / q(alive): the mean of
            u over the live draws plus the log of their share. A lower bound of log Z; equal to
            ``elbo`` if no draw is dead.
        iw_bound: log of the mean of exp(u): a lower bound of log Z, and an estimate of it.
        eubo: mean of u over exact posterior draws, an upper bound of log Z; None without these;
            ``inf`` if the guide cannot draw one of them.
        iw_upper_bound: log of the mean of exp(u) over all draws of the guide and one exact draw,
            averaged over the exact draws: a tighter upper bound of log Z than ``eubo``.
        exact_source: ``"posterior"``, ``"latents"`` or None: where exact draws came from.
        log_z: a second estimate of log Z, independent of the guide; None if there is none.
        log_z_source: ``"exact"``, ``"prior"`` (importance sampling with the prior as proposal) or
            None.
        z_score: ``iw_bound`` less ``log_z`` in standard errors (and 0.001 nats for rounding).
        kl_guide_posterior: bracket of KL(q || p); infinite if a draw is dead.
        kl_alive_posterior: the same of the guide conditioned on being alive.
        kl_posterior_guide: bracket of KL(p || q); None without exact draws.
        ess_fraction: Kish's effective sample size of the weights over ``num_samples``.
        pareto_k: shape of the weights' upper tail, over live draws (Vehtari et al., 2024, arXiv
            1507.02646); above 0.5 the weights have no variance, above 1 no mean. None if it cannot
            be fitted (``notes`` say why).
        pareto_k_threshold: min(1 - 1 / log10(live draws), 0.7), above which it is bad.
        texts: diversity of the texts drawn, by latent site.
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
    notes: tuple[str, ...]
    samples: Posterior

    def summary(self) -> dict[str, Any]:
        """All figures in plain Python values, as the table shows them."""
        figures = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("samples", "texts", "notes")
        }
        texts = {name: dataclasses.asdict(text) for name, text in self.texts.items()}
        return {**figures, "texts": texts, "notes": list(self.notes)}

    def __repr__(self) -> str:
        return diagnosis_text(self.summary())

    def _repr_html_(self) -> str:
        return diagnosis_html(self.summary())


def diagnose(
    model: Callable[..., Any],
    *args: Any,
    guide: Any = None,
    lm: LM | None = None,
    num_samples: int = 256,
    posterior: Posterior | None = None,
    latents: Sequence[Mapping[str, Any]] | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """How good a guide is as an approximation of the posterior on one input.

    ```python
    exact = lmppl.infer(infill, x, y, lm=lm, method="exact")
    print(lmppl.diagnose(infill, x, y, guide=guide, lm=lm, posterior=exact))
    ```

    Draws alone bound KL(guide || posterior) only from below, and they cannot show what a guide
    never draws. Exact posterior draws (``posterior=`` or ``latents=``) bound it from above, and
    KL(posterior || guide) from both sides.

    Args:
        model: the program.
        *args: its positional arguments.
        guide: a ``LMGuide``, a guide program, or None: the program's prior.
        lm: the language model of sites that name none.
        num_samples: draws of the guide (and as many of the prior, without ``posterior``).
        posterior: of ``infer(model, *args, method="exact")``: log Z and all that is under the
            posterior are then exact.
        latents: exact posterior draws, each a dict from every latent site to its text or tensor,
            say those that the observation was simulated with. A ``str`` stands for its canonical
            tokens; a ``Text`` keeps its own.
        seed: makes the run reproducible; None: taken from torch's random stream.
        progress: show a progress bar; None: on a terminal.

    Raises:
        ValueError: ``num_samples`` below 2; a posterior that is not exact or of another program or
            input; latents that are no complete, possible trace of the program.
    """
    num_samples = check_int("num_samples", num_samples, least=2)
    _check_exact(posterior, latents)
    seeds = runtime.slot_seeds(runtime.fresh_seed(seed), 2)

    def draws(proposal: Any, own_seed: int) -> Posterior:
        try:
            return infer(
                model, *args, method="importance", lm=lm, guide=proposal, num_samples=num_samples,
                seed=own_seed, progress=progress,
            )  # fmt: skip
        except ZeroEvidenceError as error:
            return error.posterior  # that all are dead is a finding

    samples = draws(guide, seeds[0])
    u = samples.log_weights
    alive = u[u > -math.inf]
    elbo, elbo_stderr = estimates.mean_of(u)
    elbo_alive, elbo_alive_stderr = estimates.elbo_alive(u)
    iw_bound, iw_bound_stderr = float(runtime.log_mean_exp(u)), samples.log_evidence_stderr
    notes: list[str] = []

    exact = _exact_draws(guide, model, args, posterior, latents, lm)

    # log Z a second time, and the bounds that make the brackets.
    log_z, log_z_stderr, log_z_source = None, None, None
    lower, lower_stderr = iw_bound, iw_bound_stderr
    upper, upper_stderr = math.inf, iw_bound_stderr  # no upper bound: errors are those of the lower
    eubo, eubo_stderr = None, None
    if exact is not None and posterior is not None:
        assert posterior.log_evidence is not None
        log_z, log_z_stderr, log_z_source = posterior.log_evidence, 0.0, "exact"
        lower, lower_stderr = upper, upper_stderr = log_z, 0.0
        eubo, eubo_stderr = float(posterior.weights[posterior.weights > 0] @ exact), 0.0
    else:
        if guide is not None:
            prior = draws(None, seeds[1])
            log_z, log_z_stderr = prior.log_evidence, prior.log_evidence_stderr
            log_z_source = "prior"
        if exact is not None:
            eubo, eubo_stderr = estimates.mean_of(exact)
            upper, upper_stderr = estimates.iw_upper_bound(exact, u, iw_bound_stderr)
            error = estimates.combined(eubo_stderr, iw_bound_stderr, estimates.ROUNDING)
            if error is not None and iw_bound - eubo > 3 * error:
                notes.append("EUBO is below log Z: are the latents exact posterior draws?")
    known = [each for each in (lower_stderr, upper_stderr) if each is not None]
    bounds_stderr = max(known) if len(known) == 2 else None
    z_score = estimates.z_score(iw_bound, iw_bound_stderr, log_z, log_z_stderr)
    if z_score is not None and abs(z_score) > 3:
        notes.append(
            f"the guide's estimate of log Z and that of the {log_z_source} disagree by "
            f"{abs(z_score):.1f} standard errors"
        )
    if log_z_source == "prior" and log_z == -math.inf:
        notes.append("every draw of the prior is dead, so it estimates no log Z")
    pareto_k, threshold = _tail(alive, notes)
    return Diagnosis(
        guide=_in_words(guide),
        num_samples=num_samples,
        dead_fraction=1.0 - len(alive) / num_samples,
        killed=dict(samples.killed.most_common()),
        elbo=elbo,
        elbo_stderr=elbo_stderr,
        elbo_alive=elbo_alive,
        elbo_alive_stderr=elbo_alive_stderr,
        iw_bound=iw_bound,
        iw_bound_stderr=iw_bound_stderr,
        eubo=eubo,
        eubo_stderr=eubo_stderr,
        iw_upper_bound=None if exact is None else upper,
        iw_upper_bound_stderr=None if exact is None else upper_stderr,
        exact_source=None if exact is None else "latents" if posterior is None else "posterior",
        log_z=log_z,
        log_z_stderr=log_z_stderr,
        log_z_source=log_z_source,
        z_score=z_score,
        kl_guide_posterior=estimates.less(lower, upper, elbo),
        kl_guide_posterior_stderr=estimates.combined(elbo_stderr, bounds_stderr),
        kl_alive_posterior=estimates.less(lower, upper, elbo_alive),
        kl_alive_posterior_stderr=estimates.combined(elbo_alive_stderr, bounds_stderr),
        kl_posterior_guide=None if eubo is None else estimates.less(-upper, -lower, -eubo),
        kl_posterior_guide_stderr=estimates.combined(eubo_stderr, bounds_stderr),
        ess_fraction=samples.ess / num_samples,
        pareto_k=pareto_k,
        pareto_k_threshold=threshold,
        texts=text_diversity(samples),
        notes=tuple(notes),
        samples=samples,
    )


def _check_exact(posterior: Posterior | None, latents: Sequence[Mapping[str, Any]] | None) -> None:
    if posterior is not None and latents is not None:
        raise ValueError("give posterior= or latents=, not both: an exact posterior needs no draws")
    if posterior is not None and not isinstance(posterior, Posterior):
        raise TypeError(f"posterior takes a lmppl.Posterior, given {type(posterior).__name__}")
    if posterior is not None:
        engine = posterior.info.get("engine")
        if engine != "exact":
            raise ValueError(
                f"posterior= takes an exact one, infer(..., method='exact'); this is by {engine!r}. "
                "Draws that are known to be exact go into latents=[{site: value}, ...]"
            )
    if latents is not None:
        is_list = isinstance(latents, Sequence)
        if not is_list or not all(isinstance(draw, Mapping) for draw in latents):
            raise TypeError(
                f"latents takes a list of dicts, [{{site: text or tensor}}, ...], given {latents!r}"
            )
        if not latents:
            raise ValueError("latents=[] holds no draw: give at least one, or leave it out")


def _in_words(guide: Any) -> str:
    if guide is None:
        return "the prior"
    return repr(guide) if isinstance(guide, LMGuide) else getattr(guide, "__name__", "a program")


def _tail(alive: torch.Tensor, notes: list[str]) -> tuple[float | None, float | None]:
    """Pareto k of live log-weights and what it should be below, and notes on it."""
    pareto_k, why_not = estimates.pareto_k(alive.numpy())
    if pareto_k is None:
        notes.append(f"no Pareto k: {why_not}")
        return None, None
    threshold = min(1 - 1 / math.log10(len(alive)), 0.7)
    if pareto_k > threshold:
        notes.append(
            f"Pareto k is above {threshold:.2f}: the weights' tail is heavy, and the importance "
            "bounds and their standard errors are too optimistic"
        )
    return pareto_k, threshold


def _exact_draws(
    guide: Any,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    posterior: Posterior | None,
    latents: Sequence[Mapping[str, Any]] | None,
    lm: LM | None,
) -> torch.Tensor | None:
    """u of the latents, or of every live trace of the exact posterior, (K,) float64."""
    if latents is not None:
        scores = _score(guide, model, args, latents, lm, "latents")
        log_joint, log_q = scores.log_joint, scores.log_q
        dead = torch.nonzero(log_joint == -math.inf).flatten().tolist()
        if dead:
            raise ValueError(
                f"latents[{dead[0]}] has probability zero under the program on this input, so it "
                "is no draw from its posterior"
            )
        return log_joint - log_q
    if posterior is None:
        return None
    live = torch.nonzero(posterior.weights > 0).flatten().tolist()
    values = [
        {
            name: posterior.traces[i].nodes[name]["value"]
            for name, node in posterior.traces[i].nodes.items()
            if node["type"] == "sample" and runtime.is_latent(node)
        }
        for i in live
    ]
    scores = _score(guide, model, args, values, lm, "the posterior's trace ")
    log_joint, log_q = scores.log_joint, scores.log_q
    recorded = posterior.log_weights[live] - math.log(len(posterior))
    if bool(((log_joint - recorded).abs() > _SAME_DENSITY).any()):
        raise ValueError(
            "posterior= does not belong to this program on these arguments with this language "
            "model (or was resampled): its traces have other densities there. Run "
            "infer(model, *args, method='exact') with the same model, args and lm"
        )
    return log_joint - log_q


def _score(
    guide: Any,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    latents: Sequence[Mapping[str, Any]],
    lm: LM | None,
    what: str,
) -> LatentScores:
    with nullcontext() if lm is None else use(lm):
        return score_latents(guide, model, args, latents, what=what)
