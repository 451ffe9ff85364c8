"""Records of traces: what is kept of a run, so that it can be run again without asking a model.

A replay buffer, the stock of prior traces, demonstrations and checkpoints all hold records. A
record is plain tensors. ``revive`` runs the program again on its latents: log-probabilities that
are known are not computed again, those that are not (of a demonstration, or after the model has
changed) are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from pyro.poutine.trace_struct import Trace

from lmppl.distributions import LMText, ToolCall
from lmppl.lm.requests import Scored
from lmppl.runtime import Given, Particle, Proposer

Value = torch.Tensor | str | float
"""What a user may give for a latent site: a text (kept as its tokens) or numbers."""


@dataclass(frozen=True, eq=False)
class Record:
    """The latents of one trace.

    Attributes:
        values: latent site to its value.
        tools: tool site to its result.
        known: language-model site to its log-probability (0-d, unscaled, nats) and its terms.
        features: site to what the guide's head read there.
        log_r: log R, untempered, nats; NaN if it is not known.
        tokens: the tokens of all latent texts, one after the other.
    """

    values: Mapping[str, Value]
    tools: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, tuple[torch.Tensor, Scored | None]] = field(default_factory=dict)
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    log_r: float = math.nan
    tokens: tuple[int, ...] = ()

    @property
    def discrete_key(self) -> tuple[Any, ...]:
        """Equal for traces with the same texts and other discrete latents (if there are any).

        Continuous values never repeat: by them the most probable text would crowd out the others.
        """
        tensors = {name: torch.as_tensor(value) for name, value in self.values.items()}
        discrete = {n: t for n, t in tensors.items() if not t.is_floating_point()}
        return tuple((name, *t.reshape(-1).tolist()) for name, t in (discrete or tensors).items())

    def forgotten(self) -> Record:
        """Without its log-probabilities, to be scored anew: the model has changed. The log R that
        it had stays, to rank it by."""
        return replace(self, known={})


def record_of(particle: Particle, draws: Mapping[str, Any]) -> Record:
    """The record of a finished run.

    Args:
        particle: the run.
        draws: what its proposer drew, by site.
    """
    known: dict[str, tuple[torch.Tensor, Scored | None]] = {}
    tokens: list[int] = []
    latents = particle.latents
    for name, node in particle.sites.items():
        fn = node["fn"]
        if isinstance(fn, LMText) and not fn.batch_shape:
            known[name] = (node["unscaled_log_prob"], node.get("scored"))
            tokens += fn.token_ids(node["value"]) if name in latents else ()
    return Record(
        values={name: node["value"] for name, node in latents.items()},
        tools={
            name: node["value"]
            for name, node in particle.sites.items()
            if isinstance(node["fn"], ToolCall)
        },
        known=known,
        features={name: draw.features for name, draw in draws.items() if hasattr(draw, "features")},
        log_r=particle.log_joint,
        tokens=tuple(tokens),
    )


class Recaller(Proposer, Protocol):
    """A proposer that can also be told what it drew."""

    draws: dict[str, Any]

    def recall(
        self, site: Any, trace: Trace, value: torch.Tensor, features: torch.Tensor | None
    ) -> None:
        """Remember ``value`` as the proposer's own draw, if it is a site that it draws."""


class Recalled:
    """Proposes the values of a record, and lets a proposer remember them as its own draws."""

    def __init__(self, inner: Recaller, record: Record) -> None:
        self.inner, self._record = inner, record

    def propose(self, site: Any, trace: Trace) -> Given | None:
        name = site["name"]
        if name not in self._record.values:
            return self.inner.propose(site, trace)
        value = _tensor(site, self._record.values[name])
        self.inner.recall(site, trace, value, self._record.features.get(name))
        return Given(value)

    def finish(self, trace: Trace) -> None:
        missing = [name for name in self._record.values if name not in trace.nodes]
        if missing:
            raise ValueError(
                f"site '{missing[0]}' is given a value, but the program did not come to it (its "
                f"sites: {', '.join(n for n, s in trace.nodes.items() if s['type'] == 'sample')})"
            )
        self.inner.finish(trace)

    def fork(self, streams: Proposer) -> Proposer:
        raise NotImplementedError("a recalled trace is not forked")

    def close(self) -> None:
        self.inner.close()


def revive(
    record: Record,
    program: Callable[..., Any],
    args: tuple[Any, ...],
    proposer: Recaller,
    *,
    seed: int = 0,
    slot: int = 0,
) -> Particle:
    """A run of the program on the latents of a record, at its first wait.

    It needs no language model if all is known. ``seed`` is of latents that the record lacks.
    """
    particle = Particle(
        program,
        args,
        seed=seed,
        proposer=Recalled(proposer, record),
        given={name: Given(value) for name, value in record.tools.items()},
        known=record.known,
        closing=True,
        slot=slot,
    )
    particle.resume()
    return particle


def _tensor(site: Any, value: Value) -> torch.Tensor:
    """A value as its site's distribution has it.

    Raises:
        ValueError: if the site cannot have it; says which site.
    """
    name, fn = site["name"], site["fn"]
    if isinstance(value, str):
        if not isinstance(fn, LMText):
            raise ValueError(
                f"site '{name}' is given the text {value!r}, but it is a {type(fn).__name__}: give "
                "a number or a tensor"
            )
        try:
            return fn.encode(value)
        except ValueError as error:
            raise ValueError(
                f"site '{name}' is given a text that it cannot have: {error}"
            ) from None
    tensor = torch.as_tensor(value)
    shape = fn.shape()
    if isinstance(fn, LMText) and tensor.dim() == 1 and tensor.shape != shape:
        tensor = fn.value(tensor[tensor >= 0].tolist())
    if tensor.shape != shape:
        raise ValueError(
            f"site '{name}' is given a value of shape {tuple(tensor.shape)}, its shape is "
            f"{tuple(shape)}"
        )
    return tensor
