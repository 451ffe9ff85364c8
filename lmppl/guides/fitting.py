"""Training a guide: the program's joint density is the reward.

    for every step, for some inputs:
        traces ~ guide (on policy), guide at a random temperature, and the replay buffer
        log R  = log joint of each trace           (the model, no gradient)
        log R' = the same of a random few truncations
        log q  = one teacher-forced pass           (the guide, with gradient)
        loss   = variance of log R - log q over all of them, plus the term for dead traces
        one AdamW step

After Hu et al. (2024, arXiv 2310.04363), with the loss of Richter et al. (2020, arXiv 2010.10436).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from lmppl import objectives, runtime
from lmppl.guides.automatic import SiteScore
from lmppl.guides.inputs import read_inputs
from lmppl.guides.prompts import Observations
from lmppl.guides.samples import ReplayBuffer, Sample, Truncation, truncate
from lmppl.lm.memory import Memory
from lmppl.primitives import use
from lmppl.progress import progress_bar

if TYPE_CHECKING:
    from lmppl.guides.guide import LMGuide

TEMPERATURES = (0.5, 2.0)
"""Range of the tempered behaviour policy."""

_HEAD_RATE = 4.0
"""Learning rate of heads, small and new networks, in units of the adapter's."""

_PRIOR_STOCK = 8
"""For how many steps traces of the program itself are drawn at a time."""

_LOSSES = ("vargrad", "tb", "subtb")


@dataclass(frozen=True)
class FitOptions:
    """How to train; the defaults are meant for every program.

    Args:
        batch_size: complete traces a step, over all its inputs.
        inputs_per_step: how many inputs share a step (at most).
        learning_rate: AdamW's; it warms up over 5% of the steps and decays along a cosine. None:
            3e-3 for a hidden size of 64 or less, and falling with the square root of the size
            (1e-3 at 576, 4e-4 at 4096).
        loss: ``"vargrad"``, ``"tb"`` or ``"subtb"`` (see ``lmppl.objectives``).
        subtb_lambda: weight of a pair of truncations decays as ``lambda ** distance``.
        tempered_fraction: of the traces, drawn from the guide at a temperature in [0.5, 2].
        prior_fraction: of the traces, drawn from the program itself. Its support holds every mode
            of the posterior, also one that the guide has lost.
        replay_fraction: of the traces, drawn again from the best seen.
        huber: beyond this distance from log Z (nats) a trace counts linearly in ``"vargrad"``.
        truncations: how many tokens the rewards of truncations may cost, as a multiple of the
            complete traces'; 0: none.
        reward_temperature: first and last: the reward is ``R ** (1 / temperature)``. If the last
            is not 1, the guide's target is a *tempered* posterior.
        max_grad_norm: gradients are clipped to it.
        gradient_checkpointing: keep only what enters each layer of the language model for the
            backward pass, and compute the rest anew there (see ``lmppl.Memory``).
        training_tokens: read at most so many tokens a pass, one pass after another: the gradient
            of the whole batch in the memory of a pass. None: the batch at once.
    """

    batch_size: int = 32
    inputs_per_step: int = 4
    learning_rate: float | None = None
    loss: Literal["vargrad", "tb", "subtb"] = "vargrad"
    subtb_lambda: float = 1.0
    tempered_fraction: float = 0.125
    prior_fraction: float = 0.125
    replay_fraction: float = 0.25
    huber: float = 3.0
    truncations: float = 1.0
    reward_temperature: tuple[float, float] = (1.0, 1.0)
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    training_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: the variance needs at least 2 traces")
        if self.inputs_per_step < 1:
            raise ValueError(f"inputs_per_step={self.inputs_per_step}: it must be at least 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: it must be positive")
        if self.loss not in _LOSSES:
            raise ValueError(f"loss={self.loss!r}, allowed: {', '.join(_LOSSES)}")
        fractions = (self.tempered_fraction, self.prior_fraction, self.replay_fraction)
        if min(fractions) < 0 or sum(fractions) > 1:
            raise ValueError(
                f"tempered_fraction, prior_fraction and replay_fraction are {fractions}: they must "
                "not be negative, and together at most 1"
            )
        if self.truncations < 0:
            raise ValueError(f"truncations={self.truncations}: it must not be negative")
        self.memory(Memory())  # checks training_tokens
        if min(self.reward_temperature) < 1.0:
            raise ValueError(f"reward_temperature={self.reward_temperature}: at least 1 each")

    def rate(self, hidden_size: int) -> float:
        """The learning rate for a language model of this width."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-3 * min(1.0, math.sqrt(64 / hidden_size))

    def memory(self, usual: Memory) -> Memory:
        """What a trained language model's passes may take."""
        return replace(
            usual,
            gradient_checkpointing=self.gradient_checkpointing or usual.gradient_checkpointing,
            training_tokens=self.training_tokens or usual.training_tokens,
        )

    @property
    def tempered_target(self) -> float | None:
        """The temperature of the posterior that the guide ends at, or None if it is untempered."""
        last = self.reward_temperature[1]
        return None if last == 1.0 else last


class Input:
    """One input, and what training keeps of it."""

    def __init__(self, args: tuple[Any, ...], index: int) -> None:
        self.args, self.index = args, index
        self.buffer = ReplayBuffer()
        self.prior: list[Sample] = []  # traces of the program itself, not used yet
        self.log_z: torch.Tensor = torch.zeros((), requires_grad=True)  # learned by "tb" only
        self.observations: Observations | None = None
        self.visits = 0
        self.ever_alive = False


class Trainer:
    """The state of one call of ``fit``."""

    def __init__(
        self, guide: LMGuide, inputs: Sequence[Input], steps: int, options: FitOptions, seed: int
    ) -> None:
        self.guide, self.inputs, self.steps, self.options = guide, inputs, steps, options
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        self._queue: list[int] = []
        guide.prepare(inputs[0].args)
        for lm in guide.adapters():
            lm.memory = options.memory(lm.memory)
        self._parameters = guide.parameters()
        self._rate = options.rate(guide.base.hidden_size)
        # Gradients of a variance shrink with it, so a memory of 1,000 steps of their size (0.999)
        # would hold the last steps back.
        heads = list(guide.heads.parameters())
        own = {id(parameter) for parameter in heads}
        adapter = [parameter for parameter in self._parameters if id(parameter) not in own]
        groups: list[dict[str, Any]] = [{"params": adapter}] if adapter else []
        if heads:
            groups.append({"params": heads, "lr": _HEAD_RATE * self._rate})
        self._optimizer = torch.optim.AdamW(
            groups, lr=self._rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        if options.loss == "tb":
            # log Z is far from its start and has few gradients, so it learns faster.
            group = {"params": [each.log_z for each in inputs], "lr": 25 * self._rate}
            self._optimizer.add_param_group(group)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    def step(self, number: int) -> dict[str, Any]:
        """One optimiser step. Returns its figures."""
        began = time.perf_counter()
        members = self._next_inputs()
        with torch.no_grad():
            batches = self._sample(members, number)
            sampled = time.perf_counter()
            truncations = self._truncate(batches)
        rewarded = time.perf_counter()
        samples = [sample for batch in batches for sample in batch]
        scores = self.guide.score([sample.proposer for sample in samples])
        by_sample = {id(sample): score for sample, score in zip(samples, scores, strict=True)}
        losses: list[torch.Tensor] = []
        figures: list[dict[str, float]] = []
        beta = self._inverse_temperature(number)
        for each, batch in zip(members, batches, strict=True):
            own = [t for t in truncations if t.sample.particle.args is each.args]
            loss, figure = self._loss(each, batch, own, by_sample, beta)
            figures.append(figure)
            if loss is not None:
                losses.append(loss)
        if losses:
            self._update(torch.stack(losses).mean(), number)
        return {
            "step": len(self.guide.history),
            **{key: _mean([figure[key] for figure in figures]) for key in figures[0]},
            "inputs": len(members),
            "samples": len(samples),
            "truncations": len(truncations),
            "seconds_sampling": sampled - began,
            "seconds_truncations": rewarded - sampled,
            "seconds_gradient": time.perf_counter() - rewarded,
        }

    # --- its parts -------------------------------------------------------------------------------

    def _next_inputs(self) -> list[Input]:
        num = min(self.options.inputs_per_step, len(self.inputs), self.options.batch_size // 2)
        if len(self._queue) < num:
            order = torch.randperm(len(self.inputs), generator=self._generator).tolist()
            # All of them once more; those that still wait come last, so that no step has one twice.
            self._queue += sorted(order, key=lambda i: i in self._queue)
        chosen, self._queue = self._queue[:num], self._queue[num:]
        return [self.inputs[i] for i in chosen]

    def _sample(self, members: Sequence[Input], number: int) -> list[list[Sample]]:
        """Complete traces of each input by the mixed behaviour policy."""
        options = self.options
        share = options.batch_size // len(members)
        low, high = (math.log(t) for t in TEMPERATURES)
        heat = math.exp(low + (high - low) * float(torch.rand((), generator=self._generator)))
        seeds = runtime.slot_seeds(self._seed + 1 + number, 3 * len(members))
        batches: list[list[Sample]] = []
        runs: list[tuple[int, float, runtime.Particle]] = []
        started: list[runtime.Particle] = []
        with runtime.closing(started):
            for k, each in enumerate(members):
                each.visits += 1
                if each.observations is None:
                    each.observations = self.guide.observations(each.args)
                replayed = each.buffer.draw(round(share * options.replay_fraction), self._generator)
                tempered = round(share * options.tempered_fraction)
                prior = round(share * options.prior_fraction)
                policy = max(1, share - len(replayed) - tempered - prior)
                # They do not depend on the guide, and a model decodes many for the price of few.
                stock = _PRIOR_STOCK * prior if len(each.prior) < prior else 0
                for num, temperature, seed in (
                    (policy, 1.0, seeds[3 * k]),
                    (tempered, heat, seeds[3 * k + 1]),
                    (stock, math.inf, seeds[3 * k + 2]),
                ):
                    if num < 1:
                        continue
                    factory = self.guide.proposer_factory(
                        each.args, temperature=temperature, observations=each.observations
                    )
                    fresh = runtime.start(
                        self.guide.model,
                        each.args,
                        num,
                        seed=seed,
                        proposer=factory,
                        closing=True,
                    )
                    started += fresh
                    runs += [(k, temperature, particle) for particle in fresh]
                batches.append([Sample(s.particle, s.proposer, s.log_r, False) for s in replayed])
            runtime.complete(started)
        for k, temperature, particle in runs:
            sample = Sample(particle, particle.proposer, particle.log_joint, temperature == 1.0)
            (members[k].prior if temperature == math.inf else batches[k]).append(sample)
            members[k].buffer.add(sample)
        for each, batch in zip(members, batches, strict=True):
            for _ in range(min(len(each.prior), round(share * options.prior_fraction))):
                batch.append(each.prior.pop())
        return batches

    def _truncate(self, batches: Sequence[Sequence[Sample]]) -> list[Truncation]:
        if self.options.truncations == 0:
            return []
        samples = [sample for batch in batches for sample in batch]
        budget = round(self.options.truncations * sum(sample.num_tokens for sample in samples))
        return truncate(samples, token_budget=budget, generator=self._generator)

    def _loss(
        self,
        each: Input,
        batch: Sequence[Sample],
        truncations: Sequence[Truncation],
        scores: dict[int, dict[str, SiteScore]],
        beta: float,
    ) -> tuple[torch.Tensor | None, dict[str, float]]:
        """The loss of one input's samples (None if all are dead), and its figures."""
        complete_q = torch.stack([_total(scores[id(sample)]) for sample in batch])
        complete_r = complete_q.new_tensor([sample.log_r for sample in batch])
        on_policy = torch.tensor([sample.on_policy for sample in batch])
        policy_r, policy_q = complete_r[on_policy], complete_q[on_policy]
        live = policy_r > -math.inf
        u = (policy_r - policy_q.detach())[live]
        n = len(u)
        figures = {
            "loss": math.nan,
            "log_z": float(torch.logsumexp(u, 0)) - math.log(len(live)) if n else -math.inf,
            "elbo": float(u.mean()) if n else math.nan,
            "ess": runtime.ess(u) / len(live),
            "alive": n / len(live),
            "length": _mean([float(sample.num_tokens) for sample in batch]),
        }
        if not bool((complete_r > -math.inf).any()):
            return None, figures
        each.ever_alive = True
        cut_q = [t.log_q(scores[id(t.sample)]) for t in truncations]
        cut_r = complete_q.new_tensor([t.log_r for t in truncations])
        log_q = torch.cat([complete_q, torch.stack(cut_q).to(complete_q)]) if cut_q else complete_q
        log_r = torch.cat([complete_r, cut_r]) * beta
        # A row of weight zero times -inf is no number, so dead rows stay -inf.
        log_r = torch.where(torch.cat([complete_r, cut_r]) == -math.inf, -math.inf, log_r)
        loss = self._objective(each, batch, truncations, log_r, log_q)
        if len(policy_q) > 1:
            loss = loss + objectives.alive(policy_r, policy_q)
        figures["loss"] = float(loss.detach())
        return loss, figures

    def _objective(
        self,
        each: Input,
        batch: Sequence[Sample],
        truncations: Sequence[Truncation],
        log_r: torch.Tensor,
        log_q: torch.Tensor,
    ) -> torch.Tensor:
        if self.options.loss == "vargrad":
            return objectives.vargrad(log_r, log_q, huber=self.options.huber)
        if self.options.loss == "tb":
            return objectives.tb(log_r, log_q, each.log_z.to(log_q.device))
        # Pairs within each sample: its truncations by length, and the complete trace last.
        terms = []
        cuts: dict[int, list[int]] = {}
        order = sorted(range(len(truncations)), key=lambda k: truncations[k].length)
        for k in order:
            cuts.setdefault(id(truncations[k].sample), []).append(len(batch) + k)
        for i, sample in enumerate(batch):
            rows = [*cuts.get(id(sample), []), i]
            terms.append(objectives.subtb(log_r[rows], log_q[rows], self.options.subtb_lambda))
        # Within samples u is tied together, and between them by the variance of complete traces.
        complete = objectives.vargrad(log_r[: len(batch)], log_q[: len(batch)])
        return torch.stack(terms).mean() + complete

    def _update(self, loss: torch.Tensor, number: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the loss of step {number} is {float(loss.detach())}: the parameters of the step "
                "before are kept. Lower learning_rate, or look at the program's factors for values "
                "that are not finite"
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(gradients, self.options.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"the gradient of step {number} is not finite: the parameters of the step before are "
                "kept. Lower learning_rate, or use float32 (dtype=torch.float32)"
            )
        rate = _schedule(number, self.steps)
        for group, base in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        self._optimizer.step()
        self._adopt_new_heads()

    def _adopt_new_heads(self) -> None:
        """Sites that were met for the first time have parameters that are to be trained."""
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        new = [p for p in self.guide.heads.parameters() if id(p) not in known]
        if new:
            self._optimizer.add_param_group({"params": new, "lr": _HEAD_RATE * self._rate})
            self._rates.append(_HEAD_RATE * self._rate)

    def _inverse_temperature(self, number: int) -> float:
        first, last = self.options.reward_temperature
        done = min(1.0, number / max(1, self.steps // 2))
        return 1.0 / (first + (last - first) * done)


def fit(
    guide: LMGuide,
    data: Iterable[Any],
    steps: int,
    *,
    seed: int | None = None,
    progress: bool | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> None:
    """Train ``guide`` (further, if it has been trained before).

    Args:
        guide: the guide.
        data: inputs: tuples of the program's positional arguments, or dicts of them by name.
        steps: optimiser steps.
        seed: makes the run reproducible.
        progress: show a progress bar; None: on a terminal.
        callback: called with each step's dict of figures (kept in ``guide.history``).
        **options: see ``FitOptions``.

    Raises:
        TypeError: an input that is no tuple or dict, or does not fit the program; says which one.
        ValueError: for options out of range, or if no trace of any input was ever alive.
        FloatingPointError: if the loss is not finite; the last good parameters are kept.
        KeyboardInterrupt: is passed on; the guide so far is kept and usable.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}: it must be an int of at least 1")
    settings = FitOptions(**options)
    inputs = [Input(args, i) for i, args in enumerate(read_inputs(guide.model, data))]
    guide.strict_prompts = len(inputs) > 1
    guide.tempered_target = settings.tempered_target
    with use(guide.base), progress_bar("training the guide", steps, show=progress) as bar:
        trainer = Trainer(guide, inputs, steps, settings, runtime.fresh_seed(seed))
        for number in range(steps):
            figures = trainer.step(number)
            guide.history.append(figures)
            bar.advance(loss=figures["loss"], log_z=figures["log_z"], ess=figures["ess"])
            if callback is not None:
                callback(figures)
    _report_dead(inputs)


def _report_dead(inputs: Sequence[Input]) -> None:
    visited = [each for each in inputs if each.visits]
    dead = [each.index for each in visited if not each.ever_alive]
    if dead and len(dead) == len(visited):
        raise ValueError(
            "no trace of any input had a positive probability, so the guide learned nothing: the "
            "program's hard conditions (require, tools that reject) are never met by what the model "
            "draws. Loosen them, or raise batch_size"
        )
    if dead:
        warnings.warn(
            f"inputs {dead[:10]} of the data were skipped: none of their traces had a positive "
            "probability",
            stacklevel=3,
        )


def _total(scores: dict[str, SiteScore]) -> torch.Tensor:
    """log q of a whole trace (0-d, nats)."""
    if not scores:
        raise ValueError("the guide has proposed no latent site of the program")
    terms = [score for score, _ in scores.values()]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _schedule(number: int, steps: int) -> float:
    """Warm-up over 5% of the steps, then a cosine down to 2% of the rate."""
    warmup = max(1, steps // 20)
    if number < warmup:
        return (number + 1) / warmup
    done = (number - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
