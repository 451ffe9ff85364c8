"""One training step after another: draw, reward, score, update.

    for every step, for some inputs:
        traces ~ guide (on policy), guide at a random temperature, the program, and the replay buffer
        log R  = log joint of each trace           (the model, no gradient)
        log R' = the same of a random few truncations
        log q  = one teacher-forced pass           (the guide, with gradient)
        loss   = variance of log R - log q over all of them, plus the term for dead traces
        one AdamW step

After Hu et al. (2024, arXiv 2310.04363), with the loss of Richter et al. (2020, arXiv 2010.10436).
Other losses take other samples (``options.LOSSES``).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lmppl import runtime
from lmppl.guides.guide import TrainableGuide
from lmppl.runtime.records import Record, rescore
from lmppl.training.fingerprints import digest_of
from lmppl.training.inputs import Input, Source, observe
from lmppl.training.losses import Batch, LogZ, loss_of, prompt_state
from lmppl.training.options import FitOptions
from lmppl.training.samples import Origin, Sample, Truncation, first_reading, truncate

TEMPERATURES = (0.5, 2.0)
"""Range of the tempered behaviour policy."""

_HEAD_RATE = 4.0
"""Learning rate of heads, small and new networks, in units of the adapter's."""

_LOG_Z_RATE = 25.0
"""Of a learned log Z, which is far from its start and has few gradients."""

_PRIOR_STOCK = 8
"""For how many steps of an input traces of the program itself are drawn at a time, at most."""

_MOST_READINGS = 10_000

_TRIAL_STEPS = 8
_FEWEST_TRUNCATIONS = 0.05
"""If so few truncations a trace are legal and affordable in the first steps, none are tried more."""


class Trainer:
    """The state of one run of training.

    Args:
        guide: what is trained.
        source: its inputs.
        steps: how many there will be, for the schedules.
        options: how.
        seed: of what it draws.
        generator: of its other random choices; that of the source, so that one state is kept.

    Attributes:
        members: the inputs of the last step.
        late_state: of the optimiser of a run that is resumed: also of parameters that it has not come
            to yet.
    """

    def __init__(
        self,
        guide: TrainableGuide,
        source: Source,
        steps: int,
        options: FitOptions,
        seed: int,
        generator: torch.Generator,
    ) -> None:
        self.guide, self.source, self.steps, self.options = guide, source, steps, options
        self.seed, self.generator = seed, generator
        self._rate = options.rate(guide.base.hidden_size)
        self.log_z: LogZ | None = None
        self.late_state: dict[str, Any] = {}
        # Gradients of a variance shrink with it, so a memory of 1,000 steps of their size (0.999)
        # would hold the last steps back.
        groups: list[dict[str, Any]] = [{"params": []}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self._rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self._rates = [self._rate]
        if options.loss == "tb":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.log_z = LogZ(guide.base.hidden_size, source.num_inputs)
            self._add_group(list(self.log_z.parameters()), _LOG_Z_RATE)
        self.adopt_new_parameters()
        self.members: list[Input] = []
        self._dead: set[int] = set()  # inputs all of whose traces were dead
        self._any_alive = False
        self._readings: dict[Any, tuple[str, int]] = {}  # what was read, and of which input
        self._alike_told = False
        self._traces_cut = [0, 0]  # in the steps of trial: traces, and truncations of them
        self._cuts = options.kind.truncations and options.truncations > 0

    def step(self, number: int) -> dict[str, Any] | None:
        """One step. Returns its figures; None if the data have ended."""
        began = time.perf_counter()
        members = self.members = self.source.next(self._num_inputs)
        if not members:
            return None
        with torch.no_grad():
            batches = self._sample(members, number)
            self.adopt_new_parameters()
            sampled = time.perf_counter()
            truncations = self._truncate(batches)
        rewarded = time.perf_counter()
        samples = [sample for batch in batches for sample in batch]
        old: list[torch.Tensor | None] = [None] * len(members)
        updates = self.options.ppo_updates if self.options.kind.repeats else 1
        norm = math.nan
        for update in range(updates):
            scored = self._score(members, batches, truncations, old)
            losses = [
                self._loss(each, batch, number) for each, batch in zip(members, scored, strict=True)
            ]
            found = [loss for loss in losses if loss is not None]
            if found:
                norm = self._update(torch.stack(found).mean(), number)
            if update == 0:
                self._try_truncations(scored, number)
                first, old = (scored, losses), [batch.old_log_q for batch in scored]
        figures = [batch.figures() for batch in first[0]]
        for figure, loss in zip(figures, first[1], strict=True):
            figure["loss"] = math.nan if loss is None else float(loss.detach())
        return {
            "loss": mean([figure["loss"] for figure in figures]),
            **{k: mean([figure[k] for figure in figures]) for k in figures[0] if k != "loss"},
            "grad_norm": norm,
            "learning_rate": self._rate * self.options.schedule(number, self.steps),
            "inputs": len(members),
            "samples": len(samples),
            "truncations": sum(len(batch.truncations) for batch in first[0]),
            "seconds_sampling": sampled - began,
            "seconds_truncations": rewarded - sampled,
            "seconds_gradient": time.perf_counter() - rewarded,
        }

    @property
    def _num_inputs(self) -> int:
        options = self.options
        if options.kind.draws == "given":  # each has few
            return options.batch_size
        return min(options.inputs_per_step, options.batch_size // 2)

    @property
    def _stocked_steps(self) -> int:
        """For how many of an input's steps its traces of the program are drawn at a time."""
        if self.source.num_inputs == 0:
            return 1  # it comes once
        visits = self.steps * min(self._num_inputs, self.source.num_inputs)
        return max(1, min(_PRIOR_STOCK, visits // self.source.num_inputs))

    # --- drawing ---------------------------------------------------------------------------------

    def _sample(self, members: Sequence[Input], number: int) -> list[list[Sample]]:
        """Complete traces of each input, by the behaviour policies that the loss learns from."""
        options = self.options
        share = options.batch_size // len(members)
        low, high = (math.log(t) for t in TEMPERATURES)
        heat = math.exp(low + (high - low) * float(torch.rand((), generator=self.generator)))
        seeds = runtime.slot_seeds(runtime.nth_seed(self.seed, number), 4 * len(members))
        redrawn = seeds[3 * len(members) :]  # of what a record leaves open
        runs: list[tuple[int, Origin, runtime.Particle, Record | None]] = []
        mixed = options.kind.draws == "mixture"
        observe(self.guide, members)
        with runtime.ending([]) as started:
            for k, each in enumerate(members):
                each.visits += 1
                given = self._given(each, share)
                recalled: list[tuple[Origin, Record]] = [("given", record) for record in given]
                tempered = prior = policy = 0
                if mixed:
                    replayed = round((share - len(given)) * options.replay_fraction)
                    recalled += [
                        ("replay", record) for record in each.buffer.draw(replayed, self.generator)
                    ]
                    tempered = round(share * options.tempered_fraction)
                    prior = round(share * options.prior_fraction)
                    policy = max(1, share - len(recalled) - tempered - prior)
                elif options.kind.draws == "guide":
                    if options.kind.defended and each.rejects:
                        prior = round(share * options.prior_fraction)
                    policy = max(2, share - len(given) - prior)
                # They do not depend on the guide, and a model decodes many for the price of few.
                stock = self._stocked_steps * prior if len(each.stock) < prior else 0
                policies: list[tuple[Origin, int, float, int]] = [
                    ("guide", policy, 1.0, seeds[3 * k]),
                    ("tempered", tempered, heat, seeds[3 * k + 1]),
                    ("prior", stock, math.inf, seeds[3 * k + 2]),
                ]
                for origin, num, temperature, seed in policies:
                    fresh = self._start(each, num, temperature, seed)
                    started += fresh
                    runs += [(k, origin, particle, None) for particle in fresh]
                recalled += [
                    ("prior", each.stock.pop()) for _ in range(min(len(each.stock), prior))
                ]
                own = runtime.slot_seeds(redrawn[k], len(recalled))
                for slot, (origin, kept) in enumerate(recalled):
                    particle = self._revive(each, kept, origin, own[slot], slot)
                    started.append(particle)
                    runs.append((k, origin, particle, kept))
            runtime.run_to_end(started)
        batches: list[list[Sample]] = [[] for _ in members]
        for k, origin, particle, record in runs:
            each, sample = members[k], Sample.of(particle, origin)
            each.alive |= sample.log_r > -math.inf
            each.rejects |= sample.log_r == -math.inf
            if origin == "given" and record is not None:
                self._check_given(each, sample)
                each.given[each.given.index(record)] = sample.record  # scored now
            if origin == "replay" and record is not None and not record.known:
                each.buffer.replace(record, sample.record)  # the model has changed meanwhile
            elif origin != "replay" and mixed:
                each.buffer.add(sample.record)
            drawn = sum(s.origin == "prior" for s in batches[k])
            if origin == "prior" and drawn >= round(share * options.prior_fraction):
                each.stock.append(sample.record)
            else:
                batches[k].append(sample)
        for each, batch in zip(members, batches, strict=True):
            if each.visits == 1:
                self._check_told_apart(each, batch)
            self._any_alive |= each.alive
            (self._dead.discard if each.alive else self._dead.add)(each.index)
        return batches

    def _check_told_apart(self, each: Input, batch: Sequence[Sample]) -> None:
        """Warn, once, of inputs that differ in what the guide does not read. (The arguments of
        simulated ones do not say what was observed.)"""
        guide = self.guide
        sees_all = guide.reads_observations and guide.condition_on == "all"
        alone = self.source.num_inputs == 1
        if not sees_all or each.exact or alone or self._alike_told:
            return
        read = first_reading(batch, each.observations)
        if read is None or len(self._readings) >= _MOST_READINGS:
            return
        given = digest_of(each.args)
        other, index = self._readings.setdefault(read, (given, each.index))
        if other != given:
            self._alike_told = True
            warnings.warn(
                f"inputs {index} and {each.index} of the data have other arguments, but the guide "
                "reads the same of both, their observations and the prefix of the first text. Where "
                "their posteriors differ it can be right for neither: let it read what they differ "
                "in, by a prefix or infer={'guide_prompt': text}",
                stacklevel=6,
            )

    def _given(self, each: Input, share: int) -> list[Record]:
        """Latents that the user gave: always for losses on them; else once each, to seed the
        buffer."""
        kind = self.options.kind
        most = share if kind.draws == "given" else max(1, share // 2)
        if kind.draws == "mixture":
            return each.given[(each.visits - 1) * most : each.visits * most]
        if kind.draws == "guide" and self.options.loss != "wake":
            return []
        num = min(len(each.given), most)
        picks = torch.randperm(len(each.given), generator=self.generator)[:num].tolist()
        return [each.given[k] for k in sorted(picks)]

    def _start(
        self, each: Input, num: int, temperature: float, seed: int
    ) -> list[runtime.Particle]:
        if num < 1:
            return []
        factory = self.guide.proposer_factory(
            each.args, temperature=temperature, observations=each.observations
        )
        return runtime.start(
            each.program, each.args, num, seed=seed, proposer=factory, score_closing=True
        )

    def _revive(
        self, each: Input, record: Record, origin: Origin, seed: int, slot: int
    ) -> runtime.Particle:
        assert each.observations is not None
        recaller = self.guide.recaller(each.args, each.observations)
        is_given = origin == "given"
        return rescore(
            record,
            each.program,
            each.args,
            recaller,
            what=f"a {'demonstration' if is_given else 'stored trace'} of input {each.index}",
            # What the guide draws itself is nothing to imitate.
            complete=is_given and self.options.kind.draws == "given",
            seed=seed,
            slot=slot,
        )

    def _check_given(self, each: Input, sample: Sample) -> None:
        if sample.log_r == -math.inf:
            raise ValueError(
                f"a demonstration of input {each.index} has probability zero under the program, by "
                f"site '{sample.particle.killed_by}': correct it, or leave it out"
            )

    def _truncate(self, batches: Sequence[Sequence[Sample]]) -> list[Truncation]:
        if not self._cuts:
            return []
        samples = [sample for batch in batches for sample in batch]
        budget = round(self.options.truncations * sum(sample.num_tokens for sample in samples))
        return truncate(samples, token_budget=budget, generator=self.generator)

    def _try_truncations(self, batches: Sequence[Batch], number: int) -> None:
        """Give truncations up if in the first steps hardly any were of use."""
        if not self._cuts or number >= _TRIAL_STEPS:
            return
        self._traces_cut[0] += sum(len(batch.samples) for batch in batches)
        self._traces_cut[1] += sum(len(batch.truncations) for batch in batches)
        traces, cuts = self._traces_cut
        if number < _TRIAL_STEPS - 1 or cuts >= _FEWEST_TRUNCATIONS * traces:
            return
        if self.options.loss == "subtb":
            raise ValueError(
                f"loss='subtb' compares truncations of a trace, but of {traces} traces only {cuts} "
                "were legal and within the budget (a truncation is not legal if another latent site "
                "follows it): use loss='vargrad' or 'tb', or raise truncations="
            )
        self._cuts = False
        self.guide.notes.append(
            f"complete traces only: of {traces} traces, {cuts} truncations were legal and within "
            "the budget"
        )

    # --- learning --------------------------------------------------------------------------------

    def _score(
        self,
        members: Sequence[Input],
        batches: Sequence[Sequence[Sample]],
        truncations: Sequence[Truncation],
        old: Sequence[torch.Tensor | None],
    ) -> list[Batch]:
        samples = [sample for batch in batches for sample in batch]
        scores = self.guide.score([sample.proposer for sample in samples])
        by_sample = {id(sample): score for sample, score in zip(samples, scores, strict=True)}
        own: list[list[Truncation]] = [[] for _ in members]
        at = {id(sample): k for k, batch in enumerate(batches) for sample in batch}
        for truncation in truncations:
            if by_sample[id(truncation.sample)][truncation.name][1] is not None:
                own[at[id(truncation.sample)]].append(truncation)
        return [
            Batch.of(batch, cuts, by_sample, before)
            for batch, cuts, before in zip(batches, own, old, strict=True)
        ]

    def _loss(self, each: Input, batch: Batch, number: int) -> torch.Tensor | None:
        log_z = torch.zeros(())
        if self.log_z is not None:
            if each.features is None:
                each.features = prompt_state(self.guide.base, batch.samples)
            log_z = self.log_z(each.features, each.index)
        return loss_of(
            batch,
            self.options,
            beta=self.options.inverse_temperature(number, self.steps),
            likelihood_weight=self.options.likelihood_weight(number, self.steps),
            log_z=log_z,
        )

    def _update(self, loss: torch.Tensor, number: int) -> float:
        """One step of the optimiser. Returns the norm of the gradient."""
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the loss of step {number} is {float(loss.detach())}: the parameters of the step "
                "before are kept. Lower learning_rate, or look at the program's factors for values "
                "that are not finite"
            )
        self.adopt_new_parameters()  # that a guide program's runs for the scores were first to use
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"the gradient of step {number} is not finite: the parameters of the step before are "
                "kept. Lower learning_rate, or use float32 (dtype=torch.float32)"
            )
        factor = self.options.schedule(number, self.steps)
        for group, base in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * factor
        self.optimizer.step()
        return float(norm)

    def adopt_new_parameters(self) -> None:
        """Sites that were met for the first time have parameters that are to be trained."""
        for lm in self.guide.adapters():
            lm.memory = self.options.memory(lm.memory)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        new = {n: p for n, p in self.guide.named_parameters().items() if id(p) not in known}
        for is_head, rate in ((False, 1.0), (True, _HEAD_RATE)):
            parameters = [p for name, p in new.items() if name.startswith("heads.") is is_head]
            if parameters:
                self._add_group(parameters, rate)
        if new and self.late_state:
            restore_optimizer(self.optimizer, new, self.late_state)

    def report_dead(self) -> None:
        """Say which inputs had no trace of positive probability.

        Raises:
            ValueError: if none had.
        """
        dead = sorted(self._dead)
        if dead and not self._any_alive:
            raise ValueError(
                "no trace of any input had a positive probability, so the guide learned nothing: the "
                "program's hard conditions (require, tools that reject) are never met by what the "
                "model draws. Loosen them, or raise batch_size"
            )
        if dead:
            warnings.warn(
                f"inputs {dead[:10]} of the data were skipped: none of their traces had a positive "
                "probability",
                stacklevel=5,
            )

    # --- its state, for checkpoints --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where it is, but for the guide and what is kept of inputs."""
        named = self.named_parameters()
        return {
            "traces_cut": list(self._traces_cut),
            "cuts": self._cuts,
            "dead": sorted(self._dead),
            "any_alive": self._any_alive,
            "source": self.source.state_dict(),
            "generator": self.generator.get_state(),
            "optimizer": self.late_state | optimizer_state(self.optimizer, named),
            "log_z": {} if self.log_z is None else self.log_z.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave; the guide has been loaded."""
        self._traces_cut, self._cuts = list(state["traces_cut"]), state["cuts"]
        self._dead, self._any_alive = set(state["dead"]), state["any_alive"]
        self.source.load_state_dict(state["source"])
        self.generator.set_state(state["generator"])
        if self.log_z is not None:
            self.log_z.load_state_dict(state["log_z"])
        self.adopt_new_parameters()
        self.late_state = dict(state["optimizer"])
        restore_optimizer(self.optimizer, self.named_parameters(), self.late_state)

    def forget(self) -> None:
        """Drop what is remembered of prompts and merged weights. It is made again when needed."""
        for lm in (self.guide.base, *self.guide.adapters()):
            lm.forget()

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that the optimiser moves."""
        named = self.guide.named_parameters()
        if self.log_z is not None:
            named |= {f"log_z.{n}": p for n, p in self.log_z.named_parameters()}
        return named

    def _add_group(self, parameters: list[torch.nn.Parameter], rate: float) -> None:
        self.optimizer.add_param_group({"params": parameters, "lr": rate * self._rate})
        self._rates.append(rate * self._rate)


def mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


# --- the state of an optimiser by names of parameters, for checkpoints -----------------------------


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, dict[str, torch.Tensor]]:
    """The state of an optimiser, of each parameter that has had a gradient."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    state: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Put back what ``optimizer_state`` gave."""
    for name in parameters.keys() & state.keys():
        parameter = parameters[name]
        # AdamW counts its steps on the CPU.
        optimizer.state[parameter] = {
            key: tensor if key == "step" else tensor.to(parameter.device, parameter.dtype)
            for key, tensor in state[name].items()
        }
