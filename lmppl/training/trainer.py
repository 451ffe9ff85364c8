"""One training step of a guide after another: draw, reward, score, update.

    for every step, for some inputs:
        traces ~ guide (on policy), guide at a random temperature, the program, and the replay buffer
        log R  = log joint of each trace           (the model, no gradient)
        log R' = the same of a random few truncations
        log q  = one teacher-forced pass           (the guide, with gradient)
        loss   = variance of log R - log q over all of them, plus the term for dead traces
        one AdamW step

After Hu et al. (2024, arXiv 2310.04363), with the loss of Richter et al. (2020, arXiv 2010.10436).
Other losses (``lmppl.losses``) take other samples; who draws them is in ``behaviour``.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from lmppl import runtime
from lmppl.guides.guide import TrainableGuide
from lmppl.lm.batches.draw_log import DrawLog, logging_draws
from lmppl.runtime.mismatch import TextMismatch, over_texts, text_mismatches
from lmppl.training.batch import Batch, batches_of
from lmppl.training.behaviour import Behaviour, Lookalikes, Recalled, Turn, turns_of
from lmppl.training.fingerprints import digest_of
from lmppl.training.inputs import Input, Source, observe
from lmppl.training.losses import LogZ, first_prompts, prompt_state
from lmppl.training.optimizer import Optimizer, Update
from lmppl.training.options import FitOptions, moved
from lmppl.training.samples import AnySample, Sample, Truncation, own_of, truncate
from lmppl.training.sharing import SharedInputs, Sharing

_TRIAL_STEPS = 8
_FEWEST_TRUNCATIONS = 0.05
"""If so few truncations a trace are legal and affordable in the first steps, none are tried more."""


class Trainer:
    """The state of one run of a guide's training. All that is random comes from ``seed``, but the order
    of the inputs, for which the source has ``generator``."""

    def __init__(
        self,
        guide: TrainableGuide,
        source: Source,
        steps: int,
        options: FitOptions,
        seed: int,
        generator: torch.Generator,
        sharing: Sharing | None = None,
    ) -> None:
        self.guide, self.source, self.steps, self.options = guide, source, steps, options
        self.seed, self.generator = seed, generator
        self.sharing = SharedInputs() if sharing is None else sharing
        self.ranks = self.sharing.ranks
        # A stream's inputs come once.
        visits = steps * self._num_inputs // source.num_inputs if source.num_inputs else 1
        self._behaviour = Behaviour(guide, options, visits, self.sharing)
        self._lookalikes = Lookalikes(guide, source.num_inputs)
        self._rate = options.rate(guide.base.hidden_size)
        self._optimizer = Optimizer(options, self._rate, steps, self.sharing)
        self.log_z: LogZ | None = None
        if options.loss.learns_log_z:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.log_z = LogZ(guide.base.hidden_size, source.num_inputs)
        self._adopt()
        self._met: set[str] = set()  # parameters that all ranks have, with the same values
        self.inputs: list[Input] = []  # of the last step
        self._dead: set[int] = set()  # inputs all of whose traces were dead
        self._any_alive = False
        self._traces_cut = [0, 0]  # in the steps of trial: traces, and truncations of them
        self._cuts = options.loss.truncations and options.truncations > 0
        idle = self.sharing.idle(self._num_inputs, options.batch_size)
        if self.ranks.is_first and idle:
            warnings.warn(idle, stacklevel=4)

    def begin(self) -> None:
        """Before the first step: all ranks begin with the parameters of the first."""
        if self.ranks.num > 1:
            self._make(self.ranks.gather([self.guide.parts()]))
            self._level([])

    def step(self, number: int) -> dict[str, Any] | None:
        """One step. Returns its figures; None if the data have ended."""
        began = time.perf_counter()
        inputs = self.inputs = self._next_inputs(number)
        if not inputs:
            return None
        with self.sharing.work(f"step {number}"), logging_draws() as log:
            with torch.no_grad():
                all_turns = turns_of(inputs, self.options.batch_size, self.seed, number)
                turns = self.sharing.mine(all_turns)
                samples = self._draw(turns)
                sampled = time.perf_counter()
                truncations = self._truncate(turns, samples) if self._cuts else []
            rewarded = time.perf_counter()
            first = batches = self._score(samples, truncations)  # with the parameters that drew
        self._meet(inputs, samples)
        update = last = self._update(self._losses(turns, batches, number), number)
        for _ in range(1, self.options.loss.updates):
            batches = [
                replace(batch, old_log_q=drawn.old_log_q)
                for batch, drawn in zip(self._score(samples, truncations), first, strict=True)
            ]
            last = self._update(self._losses(turns, batches, number), number)
        figures, num_samples, num_truncations = self._share_out(first, log)
        self._try_truncations(num_samples, num_truncations, number)
        return {
            "loss": update.loss,
            **figures,
            "grad_norm": last.norm,
            "learning_rate": self._rate * self.options.schedule(number, self.steps),
            "inputs": len(inputs),
            "samples": num_samples,
            "truncations": num_truncations,
            "seconds_sampling": sampled - began,
            "seconds_truncations": rewarded - sampled,
            "seconds_gradient": time.perf_counter() - rewarded,
        }

    @property
    def _num_inputs(self) -> int:
        """How many inputs a step has, if there are as many."""
        options, few = self.options, self.source.num_inputs or math.inf
        if options.loss.draws == "given":  # each has few
            return int(min(options.batch_size, few))
        return int(min(options.inputs_per_step, options.batch_size // 2, few))

    def _next_inputs(self, number: int) -> list[Input]:
        """Those of step ``number``; ``ValueError`` on all ranks if they read others of a stream."""
        if self.source.num_inputs or self.ranks.num == 1:
            return self.source.next(self._num_inputs)
        with self.ranks.together(f"the inputs of step {number}"):
            inputs = self.source.next(self._num_inputs)
        if not self.ranks.agree([digest_of([input_.args for input_ in inputs])]):
            raise ValueError(
                f"the processes of this run have read other inputs for step {number}: give each the "
                "whole stream, in the same order (its inputs are shared out here)"
            )
        return inputs

    def _draw(self, turns: Sequence[Turn]) -> list[list[AnySample]]:
        samples = self._behaviour.draw(turns)
        for turn, of_input in zip(turns, samples, strict=True):
            self._lookalikes.look(turn.input, list(own_of(of_input).values()))
        self._adopt()
        return samples

    def _truncate(
        self, turns: Sequence[Turn], samples: Sequence[Sequence[AnySample]]
    ) -> list[Truncation]:
        budget, generators = self.options.truncations, [turn.generator for turn in turns]
        return truncate(samples, budget=budget, generators=generators, pool=self.sharing.pool)

    def _try_truncations(self, traces: int, cuts: int, number: int) -> None:
        """Give truncations up if in the first steps hardly any were of use."""
        if not self._cuts or number >= _TRIAL_STEPS:
            return
        traces, cuts = self._traces_cut[0] + traces, self._traces_cut[1] + cuts
        self._traces_cut = [traces, cuts]
        if number < _TRIAL_STEPS - 1 or cuts >= _FEWEST_TRUNCATIONS * traces:
            return
        if self.options.loss.needs_truncations:
            raise ValueError(
                f"loss={self.options.loss.name!r} compares truncations of a trace, but of {traces} "
                f"traces only {cuts} were legal and within the budget (a truncation is not legal if "
                "another latent site follows it): use loss='vargrad' or 'tb', or raise truncations="
            )
        self._cuts = False
        self.guide.notes.append(
            f"complete traces only: of {traces} traces, {cuts} truncations were legal and within "
            "the budget"
        )

    def _score(
        self,
        samples: Sequence[Sequence[AnySample]],
        truncations: Sequence[Truncation],
    ) -> list[Batch]:
        """The traces of each input, with the guide's densities."""
        own = [list(own_of(of_input).values()) for of_input in samples]
        proposers = [sample.proposer for of_input in own for sample in of_input]
        batches = batches_of(own, truncations, self.guide.score(proposers))
        return [batch.check() for batch in self.sharing.join(samples, batches)]

    def _losses(
        self, turns: Sequence[Turn], batches: Sequence[Batch], number: int
    ) -> list[torch.Tensor]:
        """Of each turn that has a trace to learn from."""
        beta = self.options.inverse_temperature(number, self.steps)
        losses = []
        for turn, batch in zip(turns, batches, strict=True):
            input_, log_z = turn.input, None
            if self.log_z is not None:
                if input_.features is None:
                    own = first_prompts(batch.samples)
                    (prompts,) = self.sharing.pool([own], tell=tuple, hear=tuple)
                    input_.features = prompt_state(self.guide.base, prompts)
                log_z = self.sharing.once(self.log_z(input_.features, input_.index))
            # Of latents that are given, it does not matter whether the program allows them.
            is_given = self.options.loss.draws == "given"
            if is_given or any(sample.log_r > -math.inf for sample in batch.samples):
                tempered = batch.tempered(beta, log_z)
                losses.append(self.options.loss.of(tempered, moved=moved(number, self.steps)))
        return losses

    def _update(self, losses: Sequence[torch.Tensor], number: int) -> Update:
        """One step of the optimiser on the mean of all inputs' losses."""
        self._adopt()  # what a guide program's runs for the scores were first to use
        update = self._optimizer.step(losses, number)
        if not math.isfinite(update.loss) and not update.is_empty:
            raise FloatingPointError(
                f"the loss of step {number} is {update.loss}: the parameters of the step "
                "before are kept. Lower learning_rate, or look at the program's factors for values "
                "that are not finite"
            )
        if not math.isfinite(update.norm) and not update.is_empty:
            raise FloatingPointError(
                f"the gradient of step {number} is not finite: the parameters of the step before are "
                "kept. Lower learning_rate, or use float32 (dtype=torch.float32)"
            )
        return update

    # --- what ranks tell each other --------------------------------------------------------------

    def _share_out(
        self, batches: Sequence[Batch], log: DrawLog
    ) -> tuple[dict[str, float], int, int]:
        """Tell the other ranks what this one has found out about its inputs and in its log, and hear of
        theirs. Returns the figures of the step, how many traces it had and how many truncations."""
        told = [(batch.figures(), batch.num, len(batch.truncations)) for batch in batches]
        heard = self.sharing.tell_inputs(self.inputs, told)
        texts = list(chain(*self.ranks.gather([text_mismatches(log.pairs)])))
        for input_ in self.inputs:
            self._any_alive |= input_.alive
            (self._dead.discard if input_.alive else self._dead.add)(input_.index)
        of_inputs, nums, cuts = zip(*heard, strict=True)
        figures = {name: mean([of_input[name] for of_input in of_inputs]) for name in of_inputs[0]}
        return figures | _mismatch_figures(texts), sum(nums), sum(cuts)

    def _meet(self, inputs: Sequence[Input], samples: Sequence[Sequence[AnySample]]) -> None:
        """A rank may be the first to come to a site with parameters. The others then make them too, so
        that all have them, with the same values."""
        if self.ranks.num == 1:
            return
        new, parts = sorted(self._named().keys() - self._met), self.guide.parts()
        if self.ranks.agree([*new, json.dumps(parts, sort_keys=True)]) and not new:
            return
        told = self.ranks.gather([(new, parts)])
        if not self._make([parts for _, parts in told]):
            # All run all traces in one order, by which adapters are told apart.
            own = [
                {i: sample.record for i, sample in own_of(of_input).items()} for of_input in samples
            ]
            records = self.sharing.records(own)
            self.guide.leave_out(new)
            observe(self.guide, inputs)
            for input_, of_input in zip(inputs, records, strict=True):
                runs = Recalled("replay", of_input, self.seed).start(self.guide, input_)
                with torch.no_grad(), runtime.ending(runs):
                    runtime.run_to_end(runs)
                self.guide.score([Sample.of(run, "replay").proposer for run in runs])
        self._level([names for names, _ in told])

    def _make(self, all_parts: Sequence[Any]) -> bool:
        """Make what the guides of all ranks have; False if only runs can."""
        for parts in all_parts:
            if parts is not None:
                self.guide.make_parts(parts)
        return None not in all_parts

    def _level(self, owners: Sequence[Sequence[str]]) -> None:
        self._adopt()
        named = self._named()
        self.ranks.level(named, self._met, owners)
        self._met = set(named)

    def _adopt(self) -> None:
        """Sites that were met for the first time have parameters that are to be trained."""
        for lm in self.guide.adapters():
            lm.memory = self.options.memory(lm.memory)
        self._optimizer.adopt(self._named())

    def _named(self) -> dict[str, torch.nn.Parameter]:
        log_z = {} if self.log_z is None else dict(self.log_z.named_parameters())
        named = {f"log_z.{name}": parameter for name, parameter in log_z.items()}
        return named | self.guide.named_parameters()

    def report_dead(self) -> None:
        """Say which inputs had no trace of positive probability; ``ValueError`` if none had one."""
        if not self._dead:
            return
        if not self._any_alive:
            raise ValueError(
                "no trace of any input had a positive probability, so the guide learned nothing: the "
                "program's hard conditions (require, tools that reject, constraints) are never met by "
                "what the model draws. Loosen them, or raise batch_size"
            )
        warnings.warn(
            f"inputs {sorted(self._dead)[:10]} of the data were skipped: none of their traces had a "
            "positive probability",
            stacklevel=5,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where it is, but for the guide and what is kept of inputs."""
        return {
            "traces_cut": self._traces_cut,
            "cuts": self._cuts,
            "dead": sorted(self._dead),
            "any_alive": self._any_alive,
            "source": self.source.state_dict(),
            "generator": self.generator.get_state(),
            "optimizer": self._optimizer.state_dict(),
            "log_z": {} if self.log_z is None else self.log_z.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave; the guide has been loaded."""
        self._traces_cut, self._cuts = state["traces_cut"], state["cuts"]
        self._dead, self._any_alive = set(state["dead"]), state["any_alive"]
        self.source.load_state_dict(state["source"])
        self.generator.set_state(state["generator"])
        if self.log_z is not None:
            self.log_z.load_state_dict(state["log_z"])
        self._adopt()
        self._optimizer.load_state_dict(state["optimizer"])

    def forget(self) -> None:
        """Drop what is remembered of traces, prompts and merged weights; it is made again."""
        self._behaviour.forget()
        for lm in (self.guide.base, *self.guide.adapters()):
            lm.forget()


def _mismatch_figures(texts: Sequence[TextMismatch]) -> dict[str, float]:
    """What drawing and scoring of the guide's own draws differ by; NaN if there are none."""
    if not texts:
        return {"mismatch": math.nan, "mismatch_ess": math.nan}
    found = over_texts(texts)
    return {"mismatch": found.per_token, "mismatch_ess": found.ess_fraction}


def mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
