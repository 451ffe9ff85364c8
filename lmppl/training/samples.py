"""Samples that a guide learns from: complete traces and their truncations.

A *truncation* of a complete trace is the trace in which the last latent text is cut after t tokens
and closed by one token c. It is a complete trace of the same program, so at the optimum its
``u = log R - log q`` is the same log Z; but it costs no drawing, and log q of all truncations comes
out of the pass that scores the whole text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rapidfuzz.distance import Levenshtein

from lmppl import runtime
from lmppl.distributions import LMText, SiteScore, ToolCall
from lmppl.guides.automatic import TextDraw
from lmppl.guides.prompts import Observations
from lmppl.lm.batches.requests import Scored
from lmppl.runtime import Given, Particle, is_latent
from lmppl.runtime.records import Record, ReplayProposer, record_of

Origin = Literal["guide", "tempered", "prior", "replay", "given"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One complete trace of one input.

    Attributes:
        particle: the finished run of the model.
        proposer: what drew its latents.
        log_r: log R, the trace's log joint (untempered, nats); ``-inf`` for a dead trace.
        origin: where its latents come from: drawn from the guide itself; from the guide at another
            temperature; from the program's prior; from the replay buffer; or given: by the user,
            or simulated together with the observations.
    """

    particle: Particle
    proposer: Any
    log_r: float
    origin: Origin

    @classmethod
    def of(cls, particle: Particle, origin: Origin) -> Sample:
        """The sample of a finished run."""
        proposer = particle.proposer
        inner = proposer.inner if isinstance(proposer, ReplayProposer) else proposer
        return cls(particle, inner, particle.log_joint, origin)

    @property
    def record(self) -> Record:
        """What is kept of it."""
        return record_of(self.particle, self.proposer.draws)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for traces with the same latents."""
        return tuple((name, _numbers(node)) for name, node in self.particle.latents.items())

    def left_to_model(self, scores: Mapping[str, SiteScore]) -> float:
        """log-density (nats) of the latents that the guide, whose scores these are, has not: they
        are drawn from the model, so their density in q is the model's."""
        latents = self.particle.latents.items()
        return math.fsum(
            float(node["unscaled_log_prob"].sum()) for name, node in latents if name not in scores
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all its texts."""
        return sum(_num_tokens(node) for node in self.particle.sites.values())


@dataclass(frozen=True, eq=False)
class Truncation:
    """``t`` tokens of the last latent text ``name`` of ``sample``, closed by c."""

    sample: Sample
    name: str
    length: int
    log_r: float

    @property
    def full_length(self) -> int:
        """Tokens of the whole text, without c where it ends with it."""
        return _cuts(self.sample.particle.sites[self.name]).stop

    def log_q(self, scores: dict[str, SiteScore]) -> torch.Tensor:
        """log q of the truncated trace (0-d, nats), from the scores of the complete one."""
        own = scores[self.name][1]
        assert own is not None
        others = [score for name, (score, _) in scores.items() if name != self.name]
        total = closed_log_prob(own, self.length) + self.sample.left_to_model(scores)
        return total + sum(other.to(total.device) for other in others)


def first_reading(samples: Sequence[Sample], observations: Observations | None) -> Any:
    """What the automatic guide reads before it draws anything, by which it tells inputs apart. None
    if it draws nothing, or the user said what it is to read."""
    for sample in samples:
        for name, draw in sample.proposer.draws.items():
            if not isinstance(draw, TextDraw):
                return tuple((observations or {}).items())
            own = sample.particle.sites[name]["infer"].get("guide_prompt")
            return draw.fn.prefix_ids if own is None else None
    return None


def closed_log_prob(scored: Scored, length: int) -> torch.Tensor:
    """log-probability of the first ``length`` tokens and then the closing token (0-d, nats)."""
    assert scored.closing_log_probs is not None
    return scored.log_probs[:length].sum() + scored.closing_log_probs[length]


def truncate(
    samples: Sequence[Sample], *, token_budget: int, generator: torch.Generator
) -> list[Truncation]:
    """Rewards of a random few legal truncations of the samples.

    Everything after the cut is run again on the truncated value: factors, tools, branches and
    observations. A truncation after which the program comes to another latent is not legal.

    Args:
        samples: complete traces; dead ones are left out.
        token_budget: how many tokens the rewards may cost. Truncations that need no language model
            (nothing is observed after the text) are free, and all of them are taken.
        generator: of the random choice.
    """
    free: list[tuple[Sample, str, int, int]] = []
    costly: list[tuple[Sample, str, int, int]] = []
    for sample in samples:
        name = _last_text(sample)
        if name is None:
            continue
        node = sample.particle.sites[name]
        for length in _cuts(node):
            cost = _cost_after(sample, name)
            entry = (sample, name, length, cost + length if cost else 0)
            (costly if cost else free).append(entry)
    chosen, spent = list(free), 0
    for k in torch.randperm(len(costly), generator=generator).tolist():
        if spent + costly[k][3] > token_budget:
            break
        spent += costly[k][3]
        chosen.append(costly[k])
    runs: dict[Any, Particle] = {}  # equal truncations of different samples are run once
    keys = [_cut_key(sample, name, length) for sample, name, length, _ in chosen]
    for key, (sample, name, length, _) in zip(keys, chosen, strict=True):
        if key not in runs:
            runs[key] = _rerun(sample, name, length)
    with runtime.ending(list(runs.values())):
        runtime.run_to_draws(list(runs.values()))
        return [
            Truncation(sample, name, length, runs[key].log_joint)
            for key, (sample, name, length, _) in zip(keys, chosen, strict=True)
            if _is_legal(runs[key], name)
        ]


def _numbers(node: Any) -> tuple[Any, ...]:
    return tuple(node["value"].reshape(-1).tolist())


def _cut_key(sample: Sample, name: str, length: int) -> tuple[Any, ...]:
    """Equal for truncations to the same trace of the same input, continuous values included."""
    before: list[Any] = []
    for other, node in sample.particle.sites.items():
        if other == name:
            break
        if is_latent(node):
            before.append((other, _numbers(node)))
        elif isinstance(node["fn"], ToolCall):
            before.append((other, id(node["value"])))  # a tool may answer differently each time
    node = sample.particle.sites[name]
    tokens = node["fn"].token_ids(node["value"])[:length]
    # A simulated input is a program of its own.
    return id(sample.particle.program), id(sample.particle.args), *before, name, tokens


def _last_text(sample: Sample) -> str | None:
    """The last latent site, if its text can be cut: proposed, and scored token by token."""
    names = list(sample.particle.latents)
    if not names or sample.log_r == -math.inf:
        return None
    node = sample.particle.sites[names[-1]]
    scored = node.get("scored")
    if scored is None or scored.closing_log_probs is None or names[-1] not in sample.proposer.draws:
        return None
    return names[-1]


def _cuts(node: Any) -> range:
    """Lengths t at which the text can be cut; the complete trace itself is not among them."""
    fn: LMText = node["fn"]
    ids = fn.token_ids(node["value"])
    ends_with_c = ids[-1] == fn.stopping.closing_token
    return range(0, len(ids) - 1 if ends_with_c else len(ids))


def _num_tokens(node: Any) -> int:
    fn = node["fn"]
    return len(fn.token_ids(node["value"])) if isinstance(fn, LMText) and not fn.batch_shape else 0


def _cost_after(sample: Sample, name: str) -> int:
    """Tokens of the texts that are observed after a site."""
    sites = list(sample.particle.sites)
    after = sites[sites.index(name) + 1 :]
    return sum(_num_tokens(sample.particle.sites[other]) for other in after)


def _rerun(sample: Sample, name: str, length: int) -> Particle:
    """The model on the truncated value; its own density is known from the complete trace."""
    original = sample.particle
    node = original.sites[name]
    fn: LMText = node["fn"]
    ids = fn.token_ids(node["value"])[:length]
    c = fn.stopping.closing_token
    assert c is not None  # _last_text asked for its scores
    value = fn.value([*ids, c])
    before: dict[str, Any] = {}
    for other, site in original.sites.items():
        if other == name:
            break
        before[other] = site
    run = Particle(
        original.program,
        original.args,
        seed=length,
        replay=before,
        given={name: Given(value, log_prob=closed_log_prob(node["scored"], length))},
        slot=original.slot,
    )
    run.resume()
    return run


def _is_legal(run: Particle, name: str) -> bool:
    """It has ended, by itself or by a hard condition, and no latent followed."""
    return run.finished and list(run.latents)[-1:] == [name]


# --- the replay buffer ---------------------------------------------------------------------------


class ReplayBuffer:
    """Records of one input.

    Args:
        capacity: how many it keeps; beyond it the worst goes.
        near_duplicates: two traces are near duplicates if the edit distance of their latent
            tokens is below this fraction of the shorter one's length, and their other discrete
            latents are equal.
    """

    def __init__(self, capacity: int = 64, near_duplicates: float = 0.0) -> None:
        self._capacity, self._near = capacity, near_duplicates
        self._records: dict[tuple[Any, ...], Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> list[Record]:
        """Those kept, in the order in which they came."""
        return list(self._records.values())

    @records.setter
    def records(self, records: Sequence[Record]) -> None:
        self._records = {record.discrete_key: record for record in records}

    def add(self, record: Record) -> None:
        """Keep a live trace, unless it or a better near duplicate is kept, or it is the worst."""
        if not record.log_r > -math.inf:
            return
        key = record.discrete_key
        if key in self._records:
            return
        if len(self._records) >= self._capacity:
            worst = min(self._records, key=lambda k: self._records[k].log_r)
            if self._records[worst].log_r >= record.log_r:
                return
        near = self._near_duplicates_of(record)
        if any(self._records[k].log_r >= record.log_r for k in near):
            return
        for k in near:
            del self._records[k]
        self._records[key] = record
        if len(self._records) > self._capacity:
            del self._records[worst]

    def replace(self, old: Record, new: Record) -> None:
        """Put the same trace, scored anew, in the place of a kept one (if it still is)."""
        if old.discrete_key not in self._records:
            return
        if new.log_r > -math.inf:
            self._records[old.discrete_key] = new
        else:
            del self._records[old.discrete_key]

    def _near_duplicates_of(self, record: Record) -> list[tuple[Any, ...]]:
        if not self._near:
            return []
        found = []
        for key, other in self._records.items():
            if not record.tokens or not other.tokens or record.counts_key != other.counts_key:
                continue
            bound = self._near * min(len(record.tokens), len(other.tokens))
            # Distances above the cutoff are not computed to their end.
            distance = Levenshtein.distance(
                record.tokens, other.tokens, score_cutoff=math.ceil(bound)
            )
            if distance < bound:
                found.append(key)
        return found

    def draw(self, num: int, generator: torch.Generator) -> list[Record]:
        """``num`` distinct traces (or all there are); the r-th best with weight 1 / r."""
        ranked = sorted(self._records.values(), key=lambda record: -record.log_r)
        num = min(num, len(ranked))
        if not num:
            return []
        weights = 1.0 / torch.arange(1, len(ranked) + 1, dtype=torch.float64)
        picks = torch.multinomial(weights, num, replacement=False, generator=generator)
        return [ranked[k] for k in picks.tolist()]
