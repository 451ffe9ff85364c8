"""Posterior: what every engine returns, and what people ask of it.

It is a list of Pyro traces with log-weights, of which all else is computed.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine import Trace

from lmppl.checks import check_callable, check_int, check_seed, did_you_mean
from lmppl.lm.batches.inverse_cdf import inverse_cdf
from lmppl.report.posteriors import posterior_blocks
from lmppl.report.tables import Block, Report
from lmppl.runtime.sites import has_value, is_continuous, is_latent, key_of, value_of, values_of
from lmppl.runtime.weights import ess, log_mean_exp

if TYPE_CHECKING:
    from lmppl.report.profiling import Profile


class ZeroEvidenceError(RuntimeError):
    """No sample has a positive weight. The traces of ``.posterior`` say how far each one came."""

    def __init__(self, message: str, posterior: Posterior) -> None:
        super().__init__(message)
        self.posterior = posterior


class Posterior(Report):
    """Weighted traces of a program. (``copy.deepcopy`` shares its language models.)

    Args:
        traces: K traces; those of weight zero may be incomplete.
        log_weights: shape ``(K,)``, nats, with logmeanexp(log_weights) = log evidence; ``-inf`` for
            a sample of probability zero. Kept in float64 on the CPU.
        returns: what the program returned in each trace.
        guide: the guide, if one was trained.
        info: what the engine has to say of the run. The posterior itself reads

            - ``engine``: its name;
            - ``iid``: whether the weights are independent and identically distributed, so that
              the evidence has the textbook standard error (SMC's and enumeration's are not);
            - ``exact``: whether the weights are the probabilities themselves, as of an enumeration, so
              that a small effective sample size is no reason for doubt;
            - ``tokens_sampled``, ``tokens_scored``, ``tokens_trained``, ``seconds``: what it cost;
            - ``killed``: name of a site to the number of samples that it gave probability zero;
            - ``reasons``: name of such a site to one sentence, why the first sample ended there;
            - ``notes``: a list of sentences the reader must know ("the target is tempered");
            - ``ess``: the effective sample size, where that of the weights is not it (the draws of
              Markov chains have equal weights, and depend on each other);
            - ``chain``: of Markov chains, the pair (chain, draw) of each trace, counted from 0;
            - ``chains``: how these mixed, as the table shows it: a dict of ``num_chains``,
              ``num_draws`` (of each chain), ``acceptance`` (site to the share of moves accepted)
              and ``diagnostics`` (name of a function to its ``r_hat``, ``ess_bulk``, ``ess_tail``).
        claims_evidence: False where the mean weight does not estimate the evidence (raw draws of
            an uncorrected guide): ``log_evidence`` is None.

    Attributes:
        profile: where the time went, if ``infer`` was called with ``profile=True``; else None.

    Raises:
        ValueError: if the lengths differ, there are no traces, or a log-weight is NaN or +inf.
    """

    def __init__(
        self,
        traces: Sequence[Trace],
        log_weights: torch.Tensor,
        returns: Sequence[Any],
        *,
        guide: Any = None,
        info: Mapping[str, Any] | None = None,
        claims_evidence: bool = True,
    ) -> None:
        log_weights = torch.as_tensor(log_weights).detach().to("cpu", torch.float64).clone()
        if log_weights.shape != (len(traces),) or len(returns) != len(traces):
            given = f"log_weights of shape {tuple(log_weights.shape)} and {len(returns)} returns"
            needs = f"a posterior of {len(traces)} traces needs as many log-weights and returns"
            raise ValueError(f"{needs}, given {given}")
        if not traces:
            raise ValueError("a posterior needs at least one trace")
        bad = torch.nonzero(log_weights.isnan() | (log_weights == math.inf)).flatten().tolist()
        if bad:
            raise ValueError(
                f"log_weights[{bad[0]}] is {log_weights[bad[0]].item()}, allowed are numbers and "
                f"-inf ({len(bad)} of {len(traces)} are like this): some site's log-probability is "
                "not a number or its density is infinite"
            )
        self.traces: list[Trace] = list(traces)
        self.log_weights = log_weights  # (K,)
        self.returns: list[Any] = list(returns)
        self.guide = guide
        self.info: dict[str, Any] = dict(info or {})
        self.profile: Profile | None = None
        self._claims_evidence = claims_evidence

    @cached_property
    def weights(self) -> torch.Tensor:
        """Normalised weights, shape ``(K,)``, float64. Raises as ``check_alive`` does."""
        self.check_alive()
        return torch.softmax(self.log_weights, 0)

    def check_alive(self) -> None:
        """Raise a ``ZeroEvidenceError`` that names the sites to blame if all weights are zero."""
        if self._alive:
            return
        sites = ", ".join(f"'{name}' ({count})" for name, count in self.killed.most_common())
        by = f", by these sites (samples): {sites}" * bool(sites)
        why = "".join(
            f" '{name}', the first time: {reason.rstrip('.')}."
            for name, reason in self.reasons.items()
        )
        raise ZeroEvidenceError(
            f"all {len(self)} samples have probability zero{by}.{why} Draw more samples, use a "
            "proposal that meets the conditions (guide=), or see whether they can be met at all; "
            "the samples are in this error's .posterior",
            self,
        )

    @property
    def _alive(self) -> bool:
        return bool((self.log_weights > -math.inf).any())

    @property
    def killed(self) -> Counter[str]:
        """Name of a site to the number of samples to which it gave probability zero."""
        return Counter(self.info.get("killed") or {})

    @property
    def reasons(self) -> dict[str, str]:
        """Name of a site that gave samples probability zero to one sentence, why it did the first time;
        most frequent first. Sites that say nothing are not there."""
        reasons = self.info.get("reasons") or {}
        first = {name: reasons[name] for name, _ in self.killed.most_common() if name in reasons}
        return first | dict(reasons)

    @property
    def log_evidence(self) -> float | None:
        """log p(observations), nats: the logarithm of the mean weight. None: not estimated."""
        return log_mean_exp(self.log_weights) if self._claims_evidence else None

    @property
    def log_evidence_stderr(self) -> float | None:
        """Standard error of ``log_evidence``, nats, by the delta method; None unless the weights are
        i.i.d., positive for some sample and at least two. It is itself estimated from the weights:
        with an ESS of a few samples, don't trust it."""
        count = len(self)
        if not (self._claims_evidence and self.info.get("iid") and self._alive and count > 1):
            return None
        relative_variance = count * float((self.weights**2).sum()) - 1.0  # var(w) / mean(w)^2
        return math.sqrt(max(relative_variance, 0.0) / (count - 1))

    @property
    def ess(self) -> float:
        """Effective sample size: so many independent draws of the posterior estimate a mean as well.

        It is Kish's, 1 / sum(weights^2), which is at most K, and 0 if all are dead; unless the engine
        says another one (``info["ess"]``), as Markov chains do, whose draws depend on each other.
        """
        given = self.info.get("ess")
        return ess(self.log_weights) if given is None else float(given)

    @cached_property
    def sites(self) -> list[str]:
        """Names of all sites with a value, in the order in which the programs reached them."""
        names = (name for trace in self.traces for name in trace.nodes if has_value(trace, name))
        return list(dict.fromkeys(names))

    @cached_property
    def latents(self) -> list[str]:
        """Names of the latent sites: sampled, neither observed nor the result of a tool."""
        return [name for name in self.sites if any(map(is_latent, self._nodes(name)))]

    def _nodes(self, name: str) -> list[Any]:
        return [trace.nodes[name] for trace in self.traces if has_value(trace, name)]

    def _is_numeric(self, name: str) -> bool:
        """Whether a site is continuous: its values don't repeat, its moments mean something."""
        return any(map(is_continuous, self._nodes(name)))

    def __getitem__(self, name: str) -> list[Any]:
        """The values of a site, one a trace: a ``Text``, a tool's result or a tensor; None where the
        branch of the program does not reach it. KeyError if no trace has such a site."""
        self._check_site(name)
        return [value_of(t.nodes[name]) if has_value(t, name) else None for t in self.traces]

    def __contains__(self, name: object) -> bool:
        return name in self.sites

    def _check_site(self, name: str) -> None:
        if name not in self.sites:
            raise KeyError(f"no trace has a site {name!r}{did_you_mean(name, self.sites, 'Sites')}")

    def probs(self, name: str) -> dict[Any, float]:
        """Posterior probability of each value of a site, the largest first; they sum to 1. Texts that
        are equal as strings count as one; tensors are numbers or nested tuples; None: not reached.

        Raises:
            KeyError: if no trace has such a site.
            TypeError: for a continuous site, whose values are all different.
            ZeroEvidenceError: if all samples have probability zero.
        """
        self._check_site(name)
        if self._is_numeric(name):
            raise TypeError(
                f"site '{name}' is continuous, so each sample has a value of its own: use "
                f".mean('{name}'), or .resample(n)['{name}'] for unweighted draws"
            )
        return {value: weight for (value,), weight in self._ranked([name])}

    def _ranked(self, names: Sequence[str]) -> list[tuple[tuple[Hashable, ...], float]]:
        """The distinct joint values of some sites with their probabilities, the largest first."""
        totals: dict[tuple[Hashable, ...], float] = {}
        columns = [self[name] for name in names]
        for weight, *values in zip(self.weights.tolist(), *columns, strict=True):
            if weight > 0:
                key = tuple(map(key_of, values))
                totals[key] = totals.get(key, 0.0) + weight
        return sorted(totals.items(), key=lambda item: -item[1])

    def best(self, name: str) -> Any:
        """The most probable value of a site, None if no live sample has one. Raises as ``probs``."""
        return next((value for value in self.probs(name) if value is not None), None)

    def mean(self, name_or_fn: str | Callable[[dict[str, Any]], Any]) -> torch.Tensor:
        """Posterior expectation, float64, of a numeric site, or of a function from the values of one
        trace (a dict by site) to a number, a bool or a tensor:
        ``posterior.mean(lambda v: v["z"].endswith("."))`` is a probability.

        Raises:
            KeyError: if no trace has such a site.
            TypeError: for a site whose values are texts.
            ValueError: if a live sample has not reached the site.
        """
        if isinstance(name_or_fn, str):
            self._check_site(name_or_fn)
        else:
            check_callable("name_or_fn", name_or_fn)
        live = [(trace, weight) for trace, weight in self if weight > 0]  # others may be incomplete
        terms = [weight * _number_of(values_of(trace), name_or_fn) for trace, weight in live]
        return torch.stack(terms).sum(0)

    def resample(self, n: int, seed: int | None = None) -> Posterior:
        """``n`` independent draws of the traces by weight, all of equal weight; of torch's global
        random stream, if there is no ``seed``. The evidence is the same, and traces are shared. The
        effective sample size stays what it was, or is ``n`` if that is less or the weights exact."""
        n, seed = check_int("n", n), check_seed(seed)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        uniforms = torch.rand(n, dtype=torch.float64, generator=generator)
        picks = inverse_cdf(self.weights, uniforms).tolist()
        notes = [*self.info.get("notes", ()), f"resampled from {len(self)} samples"]
        traces, returns = [self.traces[i] for i in picks], [self.returns[i] for i in picks]
        log_weights = torch.full((n,), self.log_evidence or 0.0, dtype=torch.float64)
        info = {**self.info, "iid": False, "exact": False, "notes": notes}
        info["ess"] = float(n) if self.info.get("exact") else min(self.ess, float(n))
        info.pop("chain", None)
        return self._with(traces, log_weights, returns, info)

    def _with(
        self, traces: list[Trace], log_weights: torch.Tensor, returns: list[Any], info: Any
    ) -> Posterior:
        """Other samples by the same run."""
        common: dict[str, Any] = {"guide": self.guide, "claims_evidence": self._claims_evidence}
        new = Posterior(traces, log_weights, returns, info=info, **common)
        new.profile = self.profile
        return new

    def __copy__(self) -> Posterior:
        """New lists of the same traces and returned values."""
        return self._with(self.traces, self.log_weights, self.returns, self.info)

    def __deepcopy__(self, memo: dict[int, Any]) -> Posterior:
        """A posterior with values of its own. Shared are the guide, the profile, the distributions
        (and so the language models), the programs' arguments and the functions of tools."""
        traces = [_copied(trace, memo) for trace in self.traces]
        returns = [_value_copied(value, memo) for value in self.returns]
        return self._with(traces, self.log_weights, returns, copy.deepcopy(self.info, memo))

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Posterior holds language models and a program's objects and is not pickled: store "
            "posterior.summary(), or the values and posterior.log_weights: [str(z) for z in "
            "posterior['z']] and [z.token_ids for z in posterior['z']]"
        )

    def __len__(self) -> int:
        return len(self.traces)

    def __iter__(self) -> Iterator[tuple[Trace, float]]:
        """Pairs of a trace and its normalised weight."""
        return iter(zip(self.traces, self.weights.tolist(), strict=True))

    def summary(self) -> dict[str, Any]:
        """The posterior in plain Python values, as the table shows it. Never raises ZeroEvidenceError.

        ``"rows"`` are the distinct joint values of the discrete latent sites (``"sites"``), most
        probable first: ``{"weight": 0.31, "values": {"z": " ..."}}``; a site that a sample did
        not reach is missing there. ``"numeric"`` has the mean and standard deviation of the
        continuous ones over the samples that reach them. The other entries are ``engine``,
        ``num_samples``, ``ess``, ``chains``, ``log_evidence``, ``log_evidence_stderr``,
        ``tokens_sampled``, ``tokens_scored``, ``tokens_trained``, ``seconds``, ``killed``, ``reasons``
        and ``notes``.
        """
        numeric = [name for name in self.latents if self._is_numeric(name)]
        discrete = [name for name in self.latents if name not in numeric]
        ranked = self._ranked(discrete) if self._alive and discrete else []
        rows = [{"weight": weight, "values": _reached(discrete, key)} for key, weight in ranked]
        costs = ("tokens_sampled", "tokens_scored", "tokens_trained", "seconds")
        return {
            "engine": self.info.get("engine"),
            "num_samples": len(self),
            "ess": self.ess,
            "chains": self.info.get("chains"),
            "log_evidence": self.log_evidence,
            "log_evidence_stderr": self.log_evidence_stderr,
            **{cost: self.info.get(cost) for cost in costs},
            "killed": dict(self.killed.most_common()),
            "reasons": self.reasons,
            "notes": list(self.info.get("notes", ())),
            "sites": discrete,
            "rows": rows,
            "numeric": {name: self._moments(name) for name in numeric} if self._alive else {},
        }

    def _moments(self, name: str) -> dict[str, Any]:
        """Mean and standard deviation over the samples that reach a site, and their weight."""
        pairs = [
            (weight, value.detach().to("cpu", torch.float64))
            for value, weight in zip(self[name], self.weights.tolist(), strict=True)
            if weight > 0 and value is not None
        ]
        if not pairs:
            return {"mean": math.nan, "sd": math.nan, "weight": 0.0}
        total = sum(weight for weight, _ in pairs)
        weights = torch.tensor([weight / total for weight, _ in pairs], dtype=torch.float64)
        values = torch.stack([value for _, value in pairs])  # (n, *event_shape)
        mean = torch.tensordot(weights, values, 1)
        sd = torch.tensordot(weights, (values - mean) ** 2, 1).sqrt()
        return {"mean": mean.tolist(), "sd": sd.tolist(), "weight": total}

    def _blocks(self) -> list[Block]:
        return posterior_blocks(self.summary())


def _reached(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The values that there are, by site; plain strings for texts."""
    plain = [str(value) if isinstance(value, str) else value for value in values]
    return {name: value for name, value in zip(names, plain, strict=True) if value is not None}


def _number_of(values: dict[str, Any], name_or_fn: str | Callable[..., Any]) -> torch.Tensor:
    """A site's value, or what a function says of a sample's values, as float64 on the CPU."""
    if not isinstance(name_or_fn, str):
        value, where = name_or_fn(values), "the function"
    elif name_or_fn in values:
        value, where = values[name_or_fn], f"site '{name_or_fn}'"
    else:
        missing = f"site '{name_or_fn}' is not reached in every sample"
        raise ValueError(f"{missing}; give a function of its values that says what counts there")
    try:
        return torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{where} has no mean, as it gives {value!r} and no number, bool or tensor: "
            "posterior.probs(name) has the probabilities of a site's values"
        ) from error


def _copied(trace: Trace, memo: dict[int, Any]) -> Trace:
    """A trace with values of its own; the copy of one that stands in several places is one, too."""
    if id(trace) not in memo:
        memo[id(trace)] = new = trace.copy()
        for name, node in trace.nodes.items():
            parts = {key: node[key] for key in node if key not in ("fn", "args", "kwargs")}
            new.nodes[name] = node | {key: _value_copied(part, memo) for key, part in parts.items()}
    return memo[id(trace)]


def _value_copied(value: Any, memo: dict[int, Any]) -> Any:
    # Pyro's own traces may hold a graph, which torch does not copy.
    return copy.deepcopy(value.detach() if isinstance(value, torch.Tensor) else value, memo)
