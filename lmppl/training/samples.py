"""Samples that a guide learns from: complete traces and their truncations.

A *truncation* of a complete trace is the trace in which the last latent text is cut after t tokens
and closed by one token c. It is a complete trace of the same program, so at the optimum its
``u = log R - log q`` is the same log Z; but it costs no drawing, and log q of all truncations comes
out of the pass that scores the whole text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from lmppl import runtime
from lmppl.distributions import LMText, SiteScore, ToolCall
from lmppl.guides.scoring import is_constrained, own_draw_log_probs
from lmppl.runtime import Given, Particle, is_latent
from lmppl.runtime.records import Record, ReplayProposer, discrete_key, is_count, record_of
from lmppl.runtime.sites import is_text
from lmppl.training.ranks import Pool, alone

Origin = Literal["guide", "tempered", "prior", "replay", "given"]
"""Where latents come from: drawn from the guide itself; from the guide at another temperature; from the
program; from the replay buffer; or given: by the user, or simulated together with the observations."""


_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True, eq=False)
class Sample:
    """One complete trace of one input."""

    particle: Particle  # the finished run of the model
    proposer: Any  # what drew its latents
    log_r: float  # the trace's log joint (untempered, nats); -inf for a dead trace
    origin: Origin
    # log R of its truncations, as far as they are known, by length; None: not legal
    cut_rewards: dict[int, float | None] = field(default_factory=dict)
    # The log-density of latents as the program draws them itself, as far as it is known, by name
    own_draws: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, particle: Particle, origin: Origin) -> Sample:
        """The sample of a finished run."""
        proposer = particle.proposer
        inner = proposer.inner if isinstance(proposer, ReplayProposer) else proposer
        return cls(particle, inner, particle.log_joint, origin)

    @cached_property
    def record(self) -> Record:
        """What is kept of it."""
        return record_of(self.particle, self.proposer.draws)

    @property
    def discrete_key(self) -> tuple[Any, ...]:
        """That of its record."""
        latents = {name: self.sites[name] for name in self.log_priors}
        counts = [name for name, node in latents.items() if is_count(node)]
        return discrete_key({name: node["value"] for name, node in latents.items()}, counts)

    @cached_property
    def sites(self) -> dict[str, Any]:
        """Its sample sites, by name."""
        return self.particle.sites

    @cached_property
    def log_priors(self) -> dict[str, float]:
        """The program's own log-density (unscaled, nats) of each latent, by name."""
        return {
            name: float(log_prob.sum() if log_prob.dim() else log_prob)
            for name, node in self.sites.items()
            if is_latent(node) and (log_prob := node["unscaled_log_prob"]) is not None
        }

    @property
    def log_p(self) -> float:
        """The program's own log-density (unscaled, nats) of all latents."""
        return math.fsum(self.log_priors.values())

    def log_own(self, without: Mapping[str, Any] = _NOTHING) -> float:
        """log-density (unscaled, nats) of the latents that are not in ``without``, as the program draws
        them itself: that of a constrained text is not its own."""
        score_own_draws([self], [without])
        return math.fsum(log_p for name, log_p in self.own_draws.items() if name not in without)

    def log_q(self, scores: Mapping[str, SiteScore]) -> float:
        """log q of the whole trace (nats), without gradient."""
        return math.fsum(float(log_q) for log_q, _ in scores.values()) + self.log_own(scores)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all its texts."""
        return sum(map(_num_tokens, self.sites.values()))


@dataclass(frozen=True, eq=False)
class RemoteSample:
    """What this process knows of a complete trace that another one has, see ``Sample``."""

    origin: Origin
    log_r: float
    log_p: float
    num_tokens: int
    told: Record | None  # its record, where later steps may use it

    @property
    def record(self) -> Record:
        """What is kept of it."""
        assert self.told is not None
        return self.told

    @property
    def discrete_key(self) -> tuple[Any, ...]:
        """That of its record."""
        return self.record.discrete_key


AnySample = Sample | RemoteSample


def own_of(samples: Sequence[AnySample]) -> dict[int, Sample]:
    """Those that this process has, by their places."""
    return {i: sample for i, sample in enumerate(samples) if isinstance(sample, Sample)}


def score_own_draws(
    samples: Sequence[Sample], without: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Find ``own_draws`` of some samples in one batch, but for the sites that each has in ``without``.
    Only constrained texts need a language model."""
    without = [_NOTHING] * len(samples) if without is None else without
    sites = [
        (sample, name)
        for sample, names in zip(samples, without, strict=True)
        for name in sample.log_priors
        if name not in names and name not in sample.own_draws
    ]
    constrained = [(s, name) for s, name in sites if is_constrained(s.sites[name])]
    for sample, name in sites:
        sample.own_draws[name] = sample.log_priors[name]
    found = own_draw_log_probs([sample.sites[name] for sample, name in constrained])
    for (sample, name), log_prob in zip(constrained, found, strict=True):
        sample.own_draws[name] = log_prob


def _num_tokens(node: Any) -> int:
    fn = node["fn"]
    return len(fn.token_ids(node["value"])) if is_text(fn) else 0


# --- truncations ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Truncation:
    """``length`` tokens of the last latent text ``name`` of ``sample``, closed by c."""

    sample: AnySample
    name: str
    length: int
    log_r: float  # of the truncated trace, nats
    full_length: int  # tokens of the whole text, without c where it ends with it


def truncate(
    samples: Sequence[Sequence[AnySample]],
    *,
    budget: float,
    generators: Sequence[torch.Generator],
    pool: Pool = alone,
) -> list[Truncation]:
    """Rewards of a random few legal truncations of each input's samples, of those that this process has.

    Everything after the cut is run again on the truncated value: factors, tools, branches and
    observations. A truncation is not legal if the program comes to another latent after it, or if what
    is left of the text does not match its constraint.

    Args:
        samples: of each input.
        budget: tokens that may be spent on an input, as a share of those of its samples. Truncations
            that need no language model (nothing is observed after the text) are free, and all taken.
        generators: choose those of each input, and the same in all processes.
        pool: brings together how texts can be cut, where other processes have some of the samples.
    """
    own = [
        {i: _CutText(one, name) for i, one in own_of(of_input).items() if (name := _last_text(one))}
        for of_input in samples
    ]
    possible = pool(
        [{i: text.cuts() for i, text in of_input.items()} for of_input in own],
        tell=tuple,
        hear=lambda told: _Cuts(*told),
    )
    texts = [text for of_input in own for text in of_input.values()]
    chosen: list[tuple[_CutText, int]] = []
    for of_input, group, cuts, generator in zip(samples, own, possible, generators, strict=True):
        tokens = sum(sample.num_tokens for sample in of_input)
        affordable = _affordable(cuts, round(budget * tokens), generator)
        chosen += [(group[i], length) for i, length in affordable if i in group]
    complete = {text.key(text.full_length): text.sample.log_r for text in texts if text.is_closed}
    unknown, runs = [], dict[Any, Particle]()  # equal truncations of different samples are run once
    for text, length in chosen:
        if length in text.rewards:
            continue
        key = text.key(length)
        if key in complete:
            text.rewards[length] = complete[key]
            continue
        unknown.append((text, length, key))
        if key not in runs:
            runs[key] = text.run(length)
    with runtime.ending(list(runs.values())):
        runtime.run_to_draws(list(runs.values()))
        for text, length, key in unknown:
            run = runs[key]
            # Legal is a run that has ended, by itself or by a hard condition, and no latent followed.
            is_legal = run.finished and next(reversed(run.latents)) == text.name
            text.rewards[length] = run.log_joint if is_legal else None
    return [
        Truncation(text.sample, text.name, length, log_r, text.full_length)
        for text, length in chosen
        if (log_r := text.rewards[length]) is not None
    ]


class _Cuts(NamedTuple):
    """How a text can be cut."""

    cost: int  # tokens of the texts that are observed after it
    lengths: list[int]  # after how many tokens c closes the text, so that it is one of the site's


def _affordable(
    cuts: Mapping[int, _Cuts], tokens: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Some of an input's texts, by number, each with a length to cut it to: all that are free, and a
    random few for so many tokens."""
    pairs = [(i, length) for i, of_text in cuts.items() for length in of_text.lengths]
    chosen = [(i, length) for i, length in pairs if not cuts[i].cost]
    costly = [(i, length) for i, length in pairs if cuts[i].cost]
    for k in torch.randperm(len(costly), generator=generator).tolist():
        i, length = costly[k]
        tokens -= cuts[i].cost + length
        if tokens < 0:
            break
        chosen.append((i, length))
    return chosen


def _last_text(sample: Sample) -> str | None:
    """The last latent site, if its text can be cut: proposed, and scored token by token."""
    name = next(reversed(sample.log_priors), None)
    if name is None or sample.log_r == -math.inf or name not in sample.proposer.draws:
        return None
    scored = sample.sites[name].get("scored")
    return None if scored is None or scored.closing_log_probs is None else name


class _CutText:
    """The last latent text of a trace, which can be cut to fewer than ``full_length`` tokens."""

    def __init__(self, sample: Sample, name: str) -> None:
        self.sample, self.name, self.rewards = sample, name, sample.cut_rewards
        self._node = sample.sites[name]
        self._fn: LMText = self._node["fn"]
        self._ids = self._fn.token_ids(self._node["value"])
        self._closing = self._fn.stopping.closing_token
        self.is_closed = self._ids[-1] == self._closing  # that token does not count
        self.full_length = len(self._ids) - self.is_closed
        sites = list(sample.sites.items())
        at = list(sample.sites).index(name)
        self._before = dict(sites[:at])
        self._after = [node for _, node in sites[at + 1 :]]
        # A simulated input is a program of its own; a tool may answer differently each time.
        key: list[Any] = [id(sample.particle.program), id(sample.particle.args)]
        for other, node in self._before.items():
            if is_latent(node):
                key.append((other, *node["value"].reshape(-1).tolist()))
            elif isinstance(node["fn"], ToolCall):
                key.append((other, id(node["value"])))
        self._key = (*key, name)

    def key(self, length: int) -> tuple[Any, ...]:
        """Equal for truncations to the same trace of the same input, continuous values included."""
        return *self._key, self._ids[:length]

    def cuts(self) -> _Cuts:
        """How it can be cut."""
        return _Cuts(sum(map(_num_tokens, self._after)), self._lengths())

    def _lengths(self) -> list[int]:
        if not self._fn.is_constrained:
            return list(range(self.full_length))
        assert self._closing is not None
        found, state = [], self._fn.stopping.start()
        for length in range(self.full_length):
            if state.allows(self._closing):
                found.append(length)
            state.push(self._ids[length])
        return found

    def run(self, length: int) -> Particle:
        """The model on the truncated value; its own density is known from the complete trace."""
        assert self._closing is not None  # _last_text asked for its scores
        scored, value = self._node["scored"], self._fn.value([*self._ids[:length], self._closing])
        log_prob = scored.log_probs[:length].sum() + scored.closing_log_probs[length]
        given = {self.name: Given(value, log_prob=log_prob)}
        return self.sample.particle.rerun(self._before, given, seed=length)


# --- the replay buffer ---------------------------------------------------------------------------


class ReplayBuffer:
    """The best ``capacity`` traces of one input.

    Two are near duplicates if the edit distance of their latent tokens is below the fraction
    ``near_duplicates`` of the shorter one's length, and their other discrete latents are equal.
    """

    def __init__(self, capacity: int = 64, near_duplicates: float = 0.0) -> None:
        self._capacity, self._fraction = capacity, near_duplicates
        self._records: dict[tuple[Any, ...], Record] = {}
        self.least = -math.inf  # log R that a further trace must exceed, nats

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, discrete_key: tuple[Any, ...]) -> bool:
        return discrete_key in self._records

    def lacks(self, sample: AnySample) -> bool:
        """Whether a trace is new to it, and better than the worst one that it has to keep."""
        return sample.log_r > self.least and sample.discrete_key not in self

    @property
    def records(self) -> list[Record]:
        """Those kept, in the order in which they came."""
        return list(self._records.values())

    @records.setter
    def records(self, records: Sequence[Record]) -> None:
        self._records = {record.discrete_key: record for record in records}
        self._update_least()

    def _update_least(self) -> None:
        is_full = len(self) >= self._capacity
        self.least = min(r.log_r for r in self._records.values()) if is_full else -math.inf

    def add(self, record: Record) -> bool:
        """Keep a trace that is alive, new, better than the worst and than its near duplicates, in
        their place. Returns whether it is kept."""
        key, log_r = record.discrete_key, record.log_r
        if not log_r > self.least or key in self._records:
            return False
        near = self._near(record)
        if not all(self._records[other].log_r < log_r for other in near):
            return False
        for other in near:
            del self._records[other]
        if len(self) == self._capacity:
            del self._records[min(self._records, key=lambda other: self._records[other].log_r)]
        self._records[key] = record
        self._update_least()
        return True

    def replace(self, old: Record, new: Record) -> None:
        """Put the same trace, scored anew, in the place of a kept one (if it still is)."""
        key = old.discrete_key
        if key in self._records and new.log_r > -math.inf:
            self._records[key] = new
        else:
            self._records.pop(key, None)
        self._update_least()

    def _near(self, trace: Record) -> list[tuple[Any, ...]]:
        """The keys of the near duplicates of a trace."""
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist

        size = len(trace.tokens)
        if not self._fraction or not size:
            return []
        others = [
            (key, other.tokens)
            for key, other in self._records.items()
            if other.tokens and other.counts_key == trace.counts_key
        ]
        texts = [tokens for _, tokens in others]
        (distances,) = cdist([trace.tokens], texts, scorer=Levenshtein.distance).tolist()
        return [
            key
            for (key, tokens), distance in zip(others, distances, strict=True)
            if distance < self._fraction * min(size, len(tokens))
        ]

    def as_distribution(self) -> dict[tuple[Any, ...], tuple[Record, float]]:
        """The kept traces with their log-probabilities (nats) in proportion to R, by ``discrete_key``,
        but for those with continuous latents, which have no probability, and with tools, which may
        answer otherwise another time."""
        kept = [record for record in self.records if record.is_discrete and not record.tools]
        log_r = torch.tensor([record.log_r for record in kept], dtype=torch.float64)
        shares = zip(kept, torch.log_softmax(log_r, 0).tolist(), strict=True)
        return {record.discrete_key: (record, log_share) for record, log_share in shares}

    def draw(self, num: int, generator: torch.Generator) -> list[Record]:
        """``num`` distinct traces (or all there are); the r-th best with weight 1 / r."""
        ranked = sorted(self.records, key=lambda record: -record.log_r)
        num = min(num, len(ranked))
        if not num:
            return []
        weights = 1.0 / torch.arange(1, len(ranked) + 1, dtype=torch.float64)
        picks = torch.multinomial(weights, num, replacement=False, generator=generator)
        return [ranked[k] for k in picks.tolist()]
