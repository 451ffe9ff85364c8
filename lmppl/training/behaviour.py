"""What a guide learns from: the traces of a step, and the behaviour policies that draw them.

    for each input of the step:
        how many traces each policy draws          (by what the loss learns from)
        each policy starts its runs of the program
    all runs go on side by side to their ends
    the best traces are kept in the input's buffer, for replay

A policy is an object that starts runs. ``Drawn`` draws from the guide, at its own or another
temperature, or from the program (the prior); ``Recalled`` has latents that are known: kept in the
buffer, drawn ahead, or given by the user. A trace that is still remembered as it was drawn is not run
again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lmppl import runtime
from lmppl.guides.automatic import TextDraw
from lmppl.guides.guide import Guide, TrainableGuide
from lmppl.runtime import Particle
from lmppl.runtime.records import Record, rescore
from lmppl.runtime.sites import is_text
from lmppl.training.fingerprints import digest_of
from lmppl.training.inputs import Input, observe
from lmppl.training.options import FitOptions
from lmppl.training.samples import Origin, Sample

TEMPERATURES = (0.5, 2.0)
"""Range of the tempered policy."""

_PRIOR_STOCK = 8
"""For how many steps of an input traces of the program itself are drawn at a time, at most. They do
not depend on the guide, and a model decodes many for the price of few."""

_MOST_READINGS = 10_000
_MOST_REMEMBERED = 4096


@dataclass(frozen=True)
class Drawn:
    """``num`` draws from the guide."""

    origin: Origin
    num: int
    temperature: float  # of the texts; inf: all is drawn from the program instead
    seed: int
    ahead: int = 0  # how many of them are for later steps

    def start(self, guide: Guide, input_: Input) -> list[Particle]:
        if self.num < 1:
            return []
        program, args = input_.program, input_.args
        proposer = guide.proposer_factory(
            args, temperature=self.temperature, observations=input_.observations
        )
        scoring = {"score_closing": True, "score_late": True}
        return runtime.start(program, args, self.num, seed=self.seed, proposer=proposer, **scoring)


@dataclass(frozen=True)
class Recalled:
    """Traces whose latents are known; what they leave open is drawn from the guide."""

    origin: Origin
    records: Sequence[Record]
    seed: int  # of what is drawn beside them
    complete: bool = False  # whether a latent that a record has not is an error

    def start(self, guide: Guide, input_: Input) -> list[Particle]:
        assert input_.observations is not None
        kind = "demonstration" if self.origin == "given" else "stored trace"
        seeds = runtime.slot_seeds(self.seed, len(self.records))
        return [
            rescore(
                record,
                input_.program,
                input_.args,
                guide.recaller(input_.args, input_.observations),
                what=f"a {kind} of input {input_.index}",
                complete=self.complete,
                seed=seeds[slot],
                slot=slot,
            )
            for slot, record in enumerate(self.records)
        ]


@dataclass(frozen=True)
class Turn:
    """An input in one step. Its random streams are its own, so that its traces do not depend on what
    else the step draws, nor on which process draws it.

    Attributes:
        input: the input.
        num: how many traces it gets.
        seeds: of its policies.
        generator: of other choices.
    """

    input: Input
    num: int
    seeds: Sequence[int]
    generator: torch.Generator


def turns_of(inputs: Sequence[Input], batch_size: int, seed: int, number: int) -> list[Turn]:
    """The turns of all inputs of step ``number`` of the run with that seed, which share the batch."""
    count = len(inputs)
    seeds = runtime.slot_seeds(runtime.nth_seed(seed, number), 5 * count)
    turns = []
    for k, input_ in enumerate(inputs):
        generator = torch.Generator().manual_seed(seeds[4 * count + k] >> 1)
        policies = (*seeds[3 * k : 3 * k + 3], seeds[3 * count + k])
        turns.append(Turn(input_, batch_size // count, policies, generator))
    return turns


class Behaviour:
    """Draws the traces of each step; ``visits``: about how often each input is used."""

    def __init__(self, guide: Guide, options: FitOptions, visits: int) -> None:
        self._guide, self._options, self._loss = guide, options, options.loss
        self._stocked_steps = max(1, min(_PRIOR_STOCK, visits))
        self._most_remembered = _MOST_REMEMBERED if visits > 1 else 0
        self._remembered: dict[int, Sample] = {}  # as they were drawn, by the id of their record

    def forget(self) -> None:
        """Forget the traces that a checkpoint holds as records only."""
        self._remembered.clear()

    def _remember(self, sample: Sample) -> Record:
        """The record of a trace, which need not be run again; the oldest one is forgotten."""
        self._remembered[id(sample.record)] = sample
        if len(self._remembered) > self._most_remembered:
            del self._remembered[next(iter(self._remembered))]
        return sample.record

    def draw(self, turns: Sequence[Turn]) -> list[list[Sample]]:
        """Complete traces of each turn of a step."""
        inputs = [turn.input for turn in turns]
        observe(self._guide, inputs)
        runs: list[tuple[int, Drawn | Recalled, list[Particle]]] = []
        known: list[Sequence[Sample | None]] = []
        with runtime.ending([]) as started:
            for k, turn in enumerate(turns):
                turn.input.visits += 1
                for policy, remembered in self._policies(turn):
                    particles = policy.start(self._guide, turn.input)
                    started += particles
                    runs.append((k, policy, particles))
                    known.append(remembered)
            runtime.run_to_end(started)
        drawn: list[list[Sample]] = [[] for _ in inputs]
        for (k, policy, particles), remembered in zip(runs, known, strict=True):
            new = iter(self._keep(inputs[k], policy, particles))
            # In one order, whether this process remembers a trace or not.
            drawn[k] += [sample or next(new) for sample in remembered]
            drawn[k] += new
        return drawn

    def _policies(self, turn: Turn) -> list[tuple[Drawn | Recalled, Sequence[Sample | None]]]:
        """What draws the traces of a turn, and some for later steps, each with the traces that it need
        not draw, at their places: those that are remembered."""
        options, loss = self._options, self._loss
        input_, share, seeds = turn.input, turn.num, turn.seeds
        low, high = TEMPERATURES
        heat = low * (high / low) ** float(torch.rand((), generator=turn.generator))
        given = self._given(turn)
        by_program = round(share * options.prior_fraction)
        replayed: list[Record] = []
        tempered = prior = drawn = 0
        if loss.draws == "mixture":
            num = round((share - len(given)) * options.replay_fraction)
            replayed = input_.buffer.draw(num, turn.generator)
            tempered, prior = round(share * options.tempered_fraction), by_program
            drawn = max(1, share - len(given) - len(replayed) - tempered - prior)
        elif loss.draws == "guide":
            prior = by_program if loss.defended and input_.rejects else 0
            drawn = max(2, share - len(given) - prior)
        if len(input_.stock) < prior:
            ahead, stocked = (self._stocked_steps - 1) * prior, []
        else:
            ahead, stocked = 0, [input_.stock.pop() for _ in range(prior)]
        policies: list[tuple[Drawn | Recalled, Sequence[Sample | None]]] = [
            (Drawn("guide", drawn, 1.0, seeds[0]), ()),
            (Drawn("tempered", tempered, heat, seeds[1]), ()),
            (Drawn("prior", prior - len(stocked) + ahead, math.inf, seeds[2], ahead), ()),
        ]
        origins: tuple[Origin, ...] = ("given", "replay", "prior")
        for origin, records, seed in zip(
            origins, (given, replayed, stocked), runtime.slot_seeds(seeds[3], 3), strict=True
        ):
            known = [self._remembered.get(id(record)) for record in records]
            remembered = [sample and replace(sample, origin=origin) for sample in known]
            rest = [record for record, sample in zip(records, known, strict=True) if not sample]
            # What the guide draws itself is nothing to imitate.
            complete = origin == "given" and loss.draws == "given"
            policies.append((Recalled(origin, rest, seed, complete), remembered))
        return policies

    def _given(self, turn: Turn) -> list[Record]:
        """Latents that the user gave: always for losses on them; else once, to seed the buffer."""
        loss, input_, given, share = self._loss, turn.input, turn.input.given, turn.num
        most = share if loss.draws == "given" else max(1, share // 2)
        if loss.draws == "mixture":
            return given[(input_.visits - 1) * most : input_.visits * most]
        if loss.draws == "guide" and not loss.takes_simulated:
            return []
        picks = torch.randperm(len(given), generator=turn.generator)[:most].tolist()
        return [given[k] for k in sorted(picks)]

    def _keep(
        self, input_: Input, policy: Drawn | Recalled, particles: Sequence[Particle]
    ) -> list[Sample]:
        """Keep what later steps may use of a policy's traces. Returns those that are for this one."""
        samples = [Sample.of(particle, policy.origin) for particle in particles]
        dead = [sample.log_r == -math.inf for sample in samples]
        input_.alive |= not all(dead)
        input_.rejects |= any(dead)
        keeps = self._loss.draws == "mixture"
        if isinstance(policy, Recalled):
            for record, sample in zip(policy.records, samples, strict=True):
                if policy.origin == "given":
                    _check_given(input_, sample)
                    input_.given[input_.given.index(record)] = self._remember(sample)
                    if keeps:
                        input_.buffer.add(sample.record)
                elif policy.origin == "replay" and not record.known:  # the model has changed
                    input_.buffer.replace(record, self._remember(sample))
            return samples
        now = policy.num - policy.ahead
        input_.stock += [self._remember(sample) for sample in samples[now:]]
        for sample in sorted(samples, key=lambda sample: -sample.log_r) if keeps else ():
            if not sample.log_r > input_.buffer.least:
                break  # the others are no better
            if sample.discrete_key not in input_.buffer and input_.buffer.add(sample.record):
                self._remember(sample)
        return samples[:now]


def _check_given(input_: Input, sample: Sample) -> None:
    if sample.log_r == -math.inf:
        node = sample.sites[sample.particle.killed_by or ""]
        why = node["fn"].mismatch(node["value"]) if is_text(node["fn"]) else ""
        why = f", where {why}" if why else ""
        raise ValueError(
            f"a demonstration of input {input_.index} has probability zero under the program, by "
            f"site '{node['name']}'{why}: correct it, or leave it out"
        )


class Lookalikes:
    """Warns, once, of inputs that differ in what the guide does not read."""

    def __init__(self, guide: TrainableGuide, num_inputs: int) -> None:
        self._readings: dict[Any, tuple[str, int]] = {}  # what was read, and of which input
        reads_all = guide.reads_observations and guide.condition_on == "all"
        self._over = num_inputs == 1 or not reads_all

    def look(self, input_: Input, samples: Sequence[Sample]) -> None:
        """Look at the traces of an input that is used for the first time. (The arguments of
        simulated ones do not say what was observed.)"""
        if self._over or input_.exact or input_.visits > 1:
            return
        read = _first_reading(input_, samples)
        if read is None or len(self._readings) >= _MOST_READINGS:
            return
        given = digest_of(input_.args)
        other, index = self._readings.setdefault(read, (given, input_.index))
        if other != given:
            self._over = True
            warnings.warn(
                f"inputs {index} and {input_.index} of the data have other arguments, but the guide "
                "reads the same of both, their observations and the prefix of the first text. Where "
                "their posteriors differ it can be right for neither: let it read what they differ "
                "in, by a prefix or infer={'guide_prompt': text}",
                stacklevel=6,
            )


def _first_reading(input_: Input, samples: Sequence[Sample]) -> Any:
    """What the automatic guide reads before it draws anything, by which it tells inputs apart. None
    if it draws nothing, or the user said what it is to read."""
    for sample in samples:
        for name, draw in sample.proposer.draws.items():
            if not isinstance(draw, TextDraw):
                return tuple((input_.observations or {}).items())
            prompt = sample.sites[name]["infer"].get("guide_prompt")
            return draw.fn.prefix_ids if prompt is None else None
    return None
