"""Records of traces: what is kept of a run, so that it can be run again without asking a model.

A replay buffer, the stock of prior traces, demonstrations and checkpoints all hold records. A
record is plain tensors. ``rescore`` runs the program again on its latents: log-probabilities that
are known are not computed again, those that are not (of a demonstration, or after the model has
changed) are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from pyro.poutine.trace_struct import Trace

from lmppl.distributions import LMText, ToolCall
from lmppl.lm.batches.requests import Scored
from lmppl.runtime import Given, Particle, Proposer
from lmppl.runtime.simulation import Simulated
from lmppl.runtime.sites import is_continuous, is_text, latents_of

Value = torch.Tensor | str | float
"""What a user may give for a latent site: a text (kept as its tokens) or numbers."""


@dataclass(frozen=True, eq=False)
class Record:
    """The latents of one trace, and what is known of it by site."""

    values: Mapping[str, Value]  # of latents
    tools: Mapping[str, Any] = field(default_factory=dict)  # their results
    # Of language-model sites: log-probability (0-d, unscaled, nats) and its terms.
    known: Mapping[str, tuple[torch.Tensor, Scored | None]] = field(default_factory=dict)
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what the guide's head read
    log_r: float = math.nan  # log R, untempered, nats; NaN if it is not known
    tokens: tuple[int, ...] = ()  # of all latent texts, one after the other
    # The latents that are no texts and have discrete values. (A Bernoulli's are floating-point.)
    counts: frozenset[str] = frozenset()

    @cached_property
    def discrete_key(self) -> tuple[Any, ...]:
        """Equal for traces with the same texts and other discrete latents (if there are any).

        Continuous values never repeat: by them the most probable text would crowd out the others.
        """
        return discrete_key(self.values, self.counts)

    @cached_property
    def counts_key(self) -> tuple[Any, ...]:
        """Equal for traces whose discrete latents but for texts are equal."""
        return discrete_key({n: v for n, v in self.values.items() if n in self.counts}, self.counts)

    @property
    def is_discrete(self) -> bool:
        """Whether no latent is continuous."""
        return all(
            name in self.counts or not torch.as_tensor(value).is_floating_point()
            for name, value in self.values.items()
        )

    def forgotten(self) -> Record:
        """Without its log-probabilities, to be scored anew: the model has changed. The log R that
        it had stays, to rank it by."""
        return replace(self, known={})


def discrete_key(values: Mapping[str, Value], counts: Collection[str]) -> tuple[Any, ...]:
    """The ``discrete_key`` of the record of some latents; ``counts``: see there."""
    tensors = [(name, torch.as_tensor(value)) for name, value in values.items()]
    discrete = [
        (n, tensor) for n, tensor in tensors if n in counts or not tensor.is_floating_point()
    ]
    return tuple((name, *tensor.reshape(-1).tolist()) for name, tensor in discrete or tensors)


def record_of(particle: Particle, draws: Mapping[str, Any]) -> Record:
    """The record of a finished run, whose proposer drew ``draws``, by site."""
    sites, latents = particle.sites, particle.latents
    return Record(
        values={name: node["value"] for name, node in latents.items()},
        tools=_tools(sites),
        known={
            name: (_compact(node["unscaled_log_prob"]), _compact_terms(node.get("scored")))
            for name, node in sites.items()
            if is_text(node["fn"])
        },
        features={name: draw.features for name, draw in draws.items() if hasattr(draw, "features")},
        log_r=particle.log_joint,
        tokens=tuple(
            token
            for node in latents.values()
            if is_text(node["fn"])
            for token in node["fn"].token_ids(node["value"])
        ),
        counts=frozenset(name for name, node in latents.items() if is_count(node)),
    )


def record_of_trace(trace: Trace) -> Record:
    """The latents and the results of tools of a trace, whose log-probabilities are to be found anew."""
    nodes = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    values = {name: node["value"] for name, node in latents_of(trace).items()}
    return Record(values=values, tools=_tools(nodes))


def is_count(node: Any) -> bool:
    """Whether a latent site is no text and has discrete values."""
    return not isinstance(node["fn"], LMText) and not is_continuous(node)


def record_of_simulation(simulated: Simulated, *, latents_known: bool) -> Record:
    """The record of the latents that were simulated together with observations.

    Their log-probabilities are kept if ``latents_known``. A draw has no terms for the truncations of
    its text; without its log-probability it is scored anew, and then has.
    """
    known = {
        name: (_compact(node["unscaled_log_prob"]), None)
        for name, node in simulated.sites.items()
        if is_text(node["fn"]) and (latents_known or name in simulated.observations)
    }
    return Record(values=simulated.latents, tools=_tools(simulated.sites), known=known)


def _tools(sites: Mapping[str, Any]) -> dict[str, Any]:
    return {name: node["value"] for name, node in sites.items() if isinstance(node["fn"], ToolCall)}


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that keeps no larger one, that of a whole batch, in memory."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _compact_terms(scored: Scored | None) -> Scored | None:
    if scored is None:
        return None
    closing = scored.closing_log_probs
    return Scored(_compact(scored.log_probs), None if closing is None else _compact(closing))


class Recaller(Proposer, Protocol):
    """A proposer that can also be told what it drew."""

    @property
    def draws(self) -> dict[str, Any]:
        """What it drew, by site."""

    def recall(
        self, site: Any, trace: Trace, value: torch.Tensor, features: torch.Tensor | None
    ) -> None:
        """Remember ``value`` as the proposer's own draw, if it is a site that it draws."""


class ReplayProposer:
    """Proposes the values of a record, and lets another proposer, ``inner``, remember them as its own
    draws (None: nobody). The other arguments are those of ``rescore``."""

    def __init__(
        self, inner: Recaller | None, record: Record, what: str, *, complete: bool
    ) -> None:
        self.inner, self._record = inner, record
        self._what, self._complete = what, complete

    def propose(self, site: Any, trace: Trace) -> Given | None:
        name, values = site["name"], self._record.values
        if name not in values:
            if self._complete:
                raise ValueError(
                    f"{self._what} has no value for latent site '{name}', to which the program "
                    f"comes; it has: {', '.join(values) or 'none'}"
                )
            return None if self.inner is None else self.inner.propose(site, trace)
        value = self._tensor(site, values[name])
        if self.inner is not None:
            self.inner.recall(site, trace, value, self._record.features.get(name))
        return Given(value)

    def _tensor(self, site: Any, value: Value) -> torch.Tensor:
        """A value as its site's distribution has it."""
        name, fn = site["name"], site["fn"]
        if isinstance(value, str):
            if not isinstance(fn, LMText):
                raise ValueError(
                    f"{self._what}: site '{name}' is no text but a {type(fn).__name__}, given "
                    f"{str(value)!r}: give a number or a tensor"
                )
            try:
                return fn.encode(value)
            except ValueError as error:
                raise ValueError(f"{self._what}: site '{name}': {error}") from None
        tensor = torch.as_tensor(value)
        if not torch.is_tensor(value) and tensor.shape == fn.shape():
            with torch.random.fork_rng(devices=[]):
                tensor = tensor.to(fn.sample().dtype)  # of a Bernoulli 1 is 1.0
        if tensor.shape != fn.shape():
            raise ValueError(
                f"{self._what}: site '{name}' has shape {tuple(fn.shape())}, given "
                f"{tuple(tensor.shape)}"
            )
        return tensor

    def finish(self, trace: Trace) -> None:
        latents = latents_of(trace)
        extra = [name for name in self._record.values if name not in latents]
        if extra:
            raise ValueError(
                f"{self._what} has a value for '{extra[0]}', which is no latent site of the program "
                f"on this input and branch; its latents: {', '.join(latents) or 'none'}"
            )
        if self.inner is not None:
            self.inner.finish(trace)

    def fork(self, streams: Proposer) -> Proposer:
        raise NotImplementedError("a run on the values of a record is not forked")

    def close(self) -> None:
        if self.inner is not None:
            self.inner.close()


def rescore(
    record: Record,
    program: Callable[..., Any],
    args: tuple[Any, ...],
    proposer: Recaller | None = None,
    *,
    what: str = "a record",
    complete: bool = False,
    seed: int = 0,
    slot: int = 0,
) -> Particle:
    """A run of ``program(*args)`` on the latents of a record, at its first wait. It needs no language
    model if all is known.

    Args:
        record: the latents.
        proposer: whose draws they are to be; None: nobody's, and the program draws what is missing.
        what: the record is, for messages.
        complete: whether it must have all latents; else ``proposer`` draws the others.
        program, args, seed, slot: as of ``Particle``.

    Raises:
        ValueError: if a site cannot have its value, or there is no such site; says which.
    """
    particle = Particle(
        program,
        args,
        seed=seed,
        proposer=ReplayProposer(proposer, record, what, complete=complete),
        given={name: Given(value) for name, value in record.tools.items()},
        known=record.known,
        score_closing=True,
        score_late=True,
        slot=slot,
    )
    particle.resume()
    return particle
