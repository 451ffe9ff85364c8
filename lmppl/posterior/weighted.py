"""Weighted traces: what an engine gives, before anything is asked of it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from pyro.poutine import Trace

from lmppl.checks import check_int, check_seed, did_you_mean
from lmppl.lm.batches.inverse_cdf import inverse_cdf
from lmppl.runtime import estimates
from lmppl.runtime.sites import has_value, is_latent, value_of
from lmppl.runtime.weights import ess, log_mean_exp

if TYPE_CHECKING:
    from lmppl.report.particles import ParticleStep
    from lmppl.report.profiling import Profile


class ZeroEvidenceError(RuntimeError):
    """No sample has a positive weight. The traces of ``.posterior`` say how far each one came.

    Args:
        message: what killed the samples, in words.
        posterior: the samples.
    """

    def __init__(self, message: str, posterior: Any) -> None:
        super().__init__(message)
        self.posterior = posterior


class WeightedTraces:
    """Traces of a program with log-weights: their evidence, effective sample size, values and copies.
    Arguments are those of ``Posterior``."""

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
        # What is known of particles, of each island; see ``particles`` and ``islands``.
        self.genealogies: list[Callable[[], list[ParticleStep]] | None]
        self.genealogies = [None] * len(self.info.get("islands") or [self])
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
        advice = (
            "These are all there are: the program cannot meet its conditions and observations"
            if self.info.get("exact")
            else "Draw more samples, use a proposal that meets the conditions (guide=), or see whether "
            "they can be met at all"
        )
        raise ZeroEvidenceError(
            f"all {len(self)} samples have probability zero{by}.{why} {advice}; the samples are in this "
            "error's .posterior",
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
        """Standard error of ``log_evidence``, nats. It is itself estimated: of i.i.d. weights from their
        spread, by the delta method; of at least four islands from theirs, by the jackknife. None: of
        neither, or all weights are zero. Where a few samples, or one island, have most of the weight,
        don't trust it. It is infinite if one island has all."""
        if not (self._claims_evidence and self._alive):
            return None
        count, sizes = len(self), self._island_sizes
        if self.info.get("iid") and count > 1:
            relative_variance = count * float((self.weights**2).sum()) - 1.0  # var(w) / mean(w)^2
            return math.sqrt(max(relative_variance, 0.0) / (count - 1))
        if len(sizes) < estimates.LEAST_ISLANDS:
            return None
        return estimates.jackknife_stderr(self._island_totals, sizes)

    @property
    def islands(self) -> list[Self]:
        """The independent runs that were pooled into this posterior, in their order; of a single run
        itself alone. Each has the weights that it had alone, so that its ``log_evidence`` is its own
        estimate, and what became of its particles (``posterior.islands[0].plot_particles()``). One whose
        particles are all dead is there, too."""
        told = self.info.get("islands")
        if not told:
            return [self]
        found, begin = [], 0
        for one, genealogy in zip(told, self.genealogies, strict=True):
            info = {key: value for key, value in one.items() if key != "num_samples"}
            part = slice(begin, begin + one["num_samples"])
            begin = part.stop
            samples = self.traces[part], self.log_weights[part], self.returns[part], info
            found.append(island := self._with(*samples))
            island.genealogies = [genealogy]
        return found

    @property
    def _island_sizes(self) -> list[int]:
        told = self.info.get("islands")
        return [one["num_samples"] for one in told] if told else [len(self)]

    @property
    def _island_totals(self) -> torch.Tensor:
        """Of each island, the log of the sum of its weights, (K,) nats."""
        parts = self.log_weights.split(self._island_sizes)
        return torch.stack([part.logsumexp(0) for part in parts])

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

    def resample(self, n: int, seed: int | None = None) -> Self:
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
        info.pop("islands", None)
        return self._with(traces, log_weights, returns, info)

    def _with(
        self, traces: list[Trace], log_weights: torch.Tensor, returns: list[Any], info: Any
    ) -> Self:
        """Other samples by the same run."""
        common: dict[str, Any] = {"guide": self.guide, "claims_evidence": self._claims_evidence}
        new = type(self)(traces, log_weights, returns, info=info, **common)
        new.profile, new.genealogies = self.profile, self.genealogies
        return new

    def __copy__(self) -> Self:
        """New lists of the same traces and returned values."""
        return self._with(self.traces, self.log_weights, self.returns, self.info)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A posterior with values of its own. Shared are the guide, the profile, what is known of
        particles, the distributions (and so the language models), the programs' arguments and the
        functions of tools."""
        traces = [_copied(trace, memo) for trace in self.traces]
        returns = [_value_copied(value, memo) for value in self.returns]
        return self._with(traces, self.log_weights, returns, copy.deepcopy(self.info, memo))

    def __len__(self) -> int:
        return len(self.traces)

    def __iter__(self) -> Iterator[tuple[Trace, float]]:
        """Pairs of a trace and its normalised weight."""
        return iter(zip(self.traces, self.weights.tolist(), strict=True))


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
