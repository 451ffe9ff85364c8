"""What a guide learns from: the traces of a step, and the behaviour policies that draw them.

    for each input of the step:
        how many traces each policy draws          (by what the loss learns from)
        each policy starts its runs of the program
        those that fall to this process (see ``sharing``) go on side by side to their ends
    all processes are told of the traces
    the best are kept in the input's buffer, for replay

A policy is an object that starts runs. ``Drawn`` draws from the guide, at its own or another
temperature, or from the program (the prior); ``Recalled`` has latents that are known: kept in the
buffer, drawn ahead, or given by the user. A trace that is still remembered as it was drawn is not run
again.
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from lmppl import runtime
from lmppl.guides.automatic import TextDraw
from lmppl.guides.guide import Guide, TrainableGuide
from lmppl.runtime import Particle
from lmppl.runtime.records import Record, rescore
from lmppl.runtime.sites import is_text
from lmppl.training.fingerprints import digest_of
from lmppl.training.inputs import Input, observe
from lmppl.training.kept import record_of_state, record_state
from lmppl.training.options import FitOptions
from lmppl.training.samples import AnySample, Origin, RemoteSample, Sample
from lmppl.training.sharing import SharedInputs, Sharing

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

    def start(
        self, guide: Guide, input_: Input, slots: Sequence[int] | None = None
    ) -> list[Particle]:
        """The runs of some of the draws; None: of all."""
        if self.num < 1:
            return []
        program, args = input_.program, input_.args
        proposer = guide.proposer_factory(
            args, temperature=self.temperature, observations=input_.observations
        )
        scoring = {"score_closing": True, "score_late": True}
        return runtime.start(
            program, args, self.num, seed=self.seed, proposer=proposer, slots=slots, **scoring
        )


@dataclass(frozen=True)
class Recalled:
    """Traces whose latents are known; what they leave open is drawn from the guide."""

    origin: Origin
    records: Sequence[Record]
    seed: int  # of what is drawn beside them
    complete: bool = False  # whether a latent that a record has not is an error
    ahead = 0

    @property
    def num(self) -> int:
        """How many there are."""
        return len(self.records)

    def start(
        self, guide: Guide, input_: Input, slots: Sequence[int] | None = None
    ) -> list[Particle]:
        """The runs of some of them; None: of all."""
        assert input_.observations is not None
        kind = "demonstration" if self.origin == "given" else "stored trace"
        seeds = runtime.slot_seeds(self.seed, len(self.records))
        return [
            rescore(
                self.records[slot],
                input_.program,
                input_.args,
                guide.recaller(input_.args, input_.observations),
                what=f"a {kind} of input {input_.index}",
                complete=self.complete,
                seed=seeds[slot],
                slot=slot,
            )
            for slot in (range(self.num) if slots is None else slots)
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


class _Trace(NamedTuple):
    """A trace of a step, and whether later steps may use it, for which its record is told to all."""

    sample: AnySample
    is_news: bool


def _told(trace: _Trace) -> tuple[Any, ...]:
    sample = trace.sample
    state = None
    if trace.is_news:
        _check_tools(sample.record)
        state = record_state(sample.record)
    return sample.origin, sample.log_r, sample.log_p, sample.num_tokens, state


def _check_tools(record: Record) -> None:
    """Raises ``ValueError`` for results of tools that other processes cannot be told."""
    for name, node in record.tools.items():
        try:
            pickle.dumps(node.result)
        except Exception as error:
            raise ValueError(
                f"parallel='split' tells the other processes of a trace with what its tools returned, "
                f"but the result of '{name}', a {type(node.result).__name__}, cannot be pickled "
                f"({error}): let the tool return texts, numbers or tensors, or use parallel='inputs'"
            ) from error


def _heard(told: tuple[Any, ...]) -> _Trace:
    origin, log_r, log_p, num_tokens, state = told
    record = None if state is None else record_of_state(state)
    return _Trace(RemoteSample(origin, log_r, log_p, num_tokens, record), record is not None)


class Behaviour:
    """Draws the traces of each step; ``visits``: about how often each input is used."""

    def __init__(
        self, guide: Guide, options: FitOptions, visits: int, sharing: Sharing | None = None
    ) -> None:
        self._guide, self._options, self._loss = guide, options, options.loss
        self._sharing = SharedInputs() if sharing is None else sharing
        self._stocked_steps = max(1, min(_PRIOR_STOCK, visits))
        self._most_remembered = _MOST_REMEMBERED if visits > 1 else 0
        # Traces as they were run, with the record that is kept of them, by the id of that.
        self._remembered: dict[int, tuple[Record, Sample]] = {}

    def forget(self) -> None:
        """Forget the traces that a checkpoint holds as records only."""
        self._remembered.clear()

    def _remember(self, sample: AnySample, kept: Record | None = None) -> Record:
        """The record of a trace (None: its own), which need not be run again by the process that has it;
        the oldest one is forgotten."""
        record = sample.record if kept is None else kept
        if isinstance(sample, Sample):
            self._remembered[id(record)] = record, sample
            if len(self._remembered) > self._most_remembered:
                del self._remembered[next(iter(self._remembered))]
        return record

    def draw(self, turns: Sequence[Turn]) -> list[list[AnySample]]:
        """Complete traces of each turn of a step, in one order, whoever draws them."""
        observe(self._guide, [turn.input for turn in turns])
        plans = []
        for turn in turns:
            turn.input.visits += 1
            plans.append(self._policies(turn))
        rows = self._sharing.pool(self._run(turns, plans), tell=_told, hear=_heard)
        drawn: list[list[AnySample]] = [[] for _ in turns]
        for turn, policies, row, samples in zip(turns, plans, rows, drawn, strict=True):
            for number, policy in enumerate(policies):
                traces = [row[number, slot] for slot in range(policy.num)]
                samples += self._keep(turn.input, policy, traces)
        return drawn

    def _run(
        self, turns: Sequence[Turn], plans: Sequence[Sequence[Drawn | Recalled]]
    ) -> list[dict[tuple[int, int], _Trace]]:
        """Of each turn the traces that fall to this process, by the number of their policy and their
        slot; those that are remembered are not run again."""
        found: list[dict[tuple[int, int], _Trace]] = [{} for _ in turns]
        runs = []
        dealt = 0
        with runtime.ending([]) as started:
            for turn, policies, row in zip(turns, plans, found, strict=True):
                for number, policy in enumerate(policies):
                    slots = self._sharing.slots(dealt, policy.num)
                    dealt += policy.num - policy.ahead
                    known = self._known(policy, slots)
                    row |= {(number, slot): _Trace(one, False) for slot, one in known.items()}
                    rest = [slot for slot in slots if slot not in known]
                    particles = policy.start(self._guide, turn.input, rest)
                    started += particles
                    runs.append((turn.input, row, number, policy, rest, particles))
            runtime.run_to_end(started)
        for input_, row, number, policy, rest, particles in runs:
            for slot, particle in zip(rest, particles, strict=True):
                sample = Sample.of(particle, policy.origin)
                trace = _Trace(sample, self._is_news(input_, policy, slot, sample))
                row[number, slot] = trace
                if isinstance(policy, Recalled) and policy.origin == "replay" and not trace.is_news:
                    self._remember(sample, policy.records[slot])
        return found

    def _known(self, policy: Drawn | Recalled, slots: Sequence[int]) -> dict[int, Sample]:
        """The traces at these slots of a policy that are remembered."""
        if isinstance(policy, Drawn):
            return {}
        found = {slot: self._remembered.get(id(policy.records[slot])) for slot in slots}
        return {
            slot: replace(known[1], origin=policy.origin) for slot, known in found.items() if known
        }

    def _policies(self, turn: Turn) -> list[Drawn | Recalled]:
        """What draws the traces of a turn, and some for later steps."""
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
        # What the guide draws itself is nothing to imitate.
        complete = loss.draws == "given"
        of_given, of_replayed, of_stocked = runtime.slot_seeds(seeds[3], 3)
        return [
            Drawn("guide", drawn, 1.0, seeds[0]),
            Drawn("tempered", tempered, heat, seeds[1]),
            Drawn("prior", prior - len(stocked) + ahead, math.inf, seeds[2], ahead),
            Recalled("given", given, of_given, complete),
            Recalled("replay", replayed, of_replayed),
            Recalled("prior", stocked, of_stocked),
        ]

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

    def _is_news(self, input_: Input, policy: Drawn | Recalled, slot: int, sample: Sample) -> bool:
        """Whether later steps may use a trace that was run, so that it has to be kept."""
        if isinstance(policy, Drawn):
            is_ahead = slot >= policy.num - policy.ahead
            return is_ahead or (self._loss.draws == "mixture" and input_.buffer.lacks(sample))
        if policy.origin == "given":
            _check_given(input_, sample)
            return True
        return policy.origin == "replay" and not policy.records[slot].known  # the model has changed

    def _keep(
        self, input_: Input, policy: Drawn | Recalled, traces: Sequence[_Trace]
    ) -> list[AnySample]:
        """Keep what later steps may use of a policy's traces. Returns those that are for this one."""
        samples = [trace.sample for trace in traces]
        dead = [sample.log_r == -math.inf for sample in samples]
        input_.alive |= not all(dead)
        input_.rejects |= any(dead)
        keeps = self._loss.draws == "mixture"
        if isinstance(policy, Recalled):
            for record, (sample, is_news) in zip(policy.records, traces, strict=True):
                if is_news and policy.origin == "given":
                    input_.given[input_.given.index(record)] = self._remember(sample)
                    if keeps:
                        input_.buffer.add(sample.record)
                elif is_news:
                    input_.buffer.replace(record, self._remember(sample))
            return samples
        now = policy.num - policy.ahead
        input_.stock += [self._remember(sample) for sample in samples[now:]]
        news = [sample for sample, is_news in traces if is_news] if keeps else []
        for sample in sorted(news, key=lambda sample: -sample.log_r):
            if input_.buffer.lacks(sample) and input_.buffer.add(sample.record):
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
