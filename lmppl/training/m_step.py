"""The M-step of learning a program: one step of maximum likelihood on draws for its posterior.

    z_i ~ m = a q + b p + c r     (the guide q, the program p itself, and r: the best traces so far)
    w_i = R(z_i) / m(z_i)         (the balance heuristic of Veach & Guibas, 1995)
    one step of AdamW on the mean over inputs of sum_i w_i log R(z_i) / sum_i w_i

A young guide, or one that has lost a mode, does not draw what explains the data, and nothing shows
it: all its draws weigh alike. The program comes to what the guide has forgotten, what was found once
is not lost again, and no weight is larger than the likelihood over b.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmppl import runtime
from lmppl.distributions import SiteScore
from lmppl.guides.guide import Guide, TrainableGuide
from lmppl.guides.parameters import SavedParams, Trainables
from lmppl.runtime import Given, Particle
from lmppl.runtime.records import Record
from lmppl.training.behaviour import Drawn, Recalled
from lmppl.training.inputs import Input, observe
from lmppl.training.optimizer import Optimizer
from lmppl.training.options import FitOptions
from lmppl.training.samples import Sample
from lmppl.training.trainer import mean


@dataclass(frozen=True, eq=False)
class _Draws:
    """Draws for one input."""

    records: list[Record]
    log_weights: torch.Tensor  # (num_samples,) float64, nats


class _Mixture:
    """What the draws for an input come from: the guide, the program, and the traces in its buffer.

    Args:
        input_: the input.
        num: how many draws.
        options: ``prior_fraction`` and ``replay_fraction`` are the shares of the latter two.
        seed: of the draws.
    """

    def __init__(self, input_: Input, num: int, options: FitOptions, seed: int) -> None:
        self.input, self._num = input_, num
        self._kept = input_.buffer.as_distribution()
        self._of_buffer = round(options.replay_fraction * num) if self._kept else 0
        by_program = max(1, round(options.prior_fraction * num)) if options.prior_fraction else 0
        self._of_program = min(by_program, num - self._of_buffer - 1)
        self._seeds = runtime.slot_seeds(seed, 3)

    def start(self, guide: Guide) -> list[Particle]:
        """The runs of the program, each at its first wait."""
        of_guide = self._num - self._of_program - self._of_buffer
        policies: list[Drawn | Recalled] = [
            Drawn("guide", of_guide, 1.0, self._seeds[0]),
            Drawn("prior", self._of_program, math.inf, self._seeds[1]),
        ]
        if self._of_buffer:
            generator = torch.Generator().manual_seed(self._seeds[2] % 2**63)
            records, log_shares = zip(*self._kept.values(), strict=True)
            shares = torch.tensor(log_shares, dtype=torch.float64).exp()
            picks = torch.multinomial(shares, self._of_buffer, True, generator=generator).tolist()
            seeds = runtime.slot_seeds(self._seeds[2], self._of_buffer)
            chosen = [records[k] for k in picks]
            policies.append(Recalled("replay", chosen, [None] * self._of_buffer, seeds))
        return [run for policy in policies for run in policy.start(guide, self.input)]

    def log_weight(self, sample: Sample, scores: Mapping[str, SiteScore]) -> float:
        """log R less the log-density of a trace in the mixture, nats; ``scores``: of the guide."""
        if sample.log_r == -math.inf:
            return -math.inf
        of_guide = self._num - self._of_program - self._of_buffer
        terms = [(of_guide, sample.log_q(scores)), (self._of_program, sample.log_p)]
        if (key := sample.record.discrete_key) in self._kept:
            terms.append((self._of_buffer, self._kept[key][1]))
        log_terms = [math.log(num / self._num) + log_prob for num, log_prob in terms if num]
        return sample.log_r - float(torch.logsumexp(torch.tensor(log_terms).double(), 0))


class MStep:
    """The optimiser of a program's parameters.

    Args:
        guide: draws the latents.
        inputs: of the data.
        options: of the training.
        rate: AdamW's; None: the guide's. It warms up and decays as the guide's does.
        steps: how many there will be.
        num_samples: draws for each input.
        saved: is around the program, for parameters of a resumed run that it comes to late.

    Raises:
        ValueError: if the program has no parameters, or shares them with its guide.
    """

    def __init__(
        self,
        guide: TrainableGuide,
        inputs: Sequence[Input],
        options: FitOptions,
        rate: float | None,
        steps: int,
        num_samples: int,
        saved: SavedParams | None = None,
    ) -> None:
        self._guide, self._inputs, self._options = guide, inputs, options
        self.num_samples, self._given_rate = num_samples, rate
        self._saved = saved or SavedParams()
        self._trainables = Trainables(guide.base)
        self._trainables.find(guide.model, inputs[0].args)
        parameters = {id(p) for p in self.named_parameters().values()}
        if not parameters:
            raise ValueError(
                "the program has nothing to learn: let a site name an adapter, "
                "lm_sample(..., lm=m) with m = lm.adapter(), or use pyro.param"
            )
        if parameters & {id(p) for p in guide.named_parameters().values()}:
            raise ValueError(
                "the program and its guide train the same parameters: give the guide an adapter of "
                "its own"
            )
        rate = options.rate(guide.base.hidden_size) if rate is None else rate
        self._optimizer = Optimizer(options, rate, steps)
        self._adopt()

    def _adopt(self) -> None:
        """Some inputs and branches may have parameters that the first runs did not use."""
        for lm in self._trainables.adapters:
            lm.memory = self._options.memory(lm.memory)
        self._optimizer.adopt(self.named_parameters())

    def step(self, inputs: Sequence[Input], number: int, seed: int) -> dict[str, float]:
        """Raise the likelihood of some inputs' observations. Returns its figures."""
        draws = self._draw(inputs, seed)
        log_joints = self._log_joints(
            [(input_, record) for input_, drawn in zip(inputs, draws, strict=True)
             for record in drawn.records]
        )  # fmt: skip
        losses, evidence, sizes = [], [], []
        for drawn, log_joint in zip(draws, log_joints.split(self.num_samples), strict=True):
            log_weights = drawn.log_weights
            if bool((log_weights == -math.inf).all()):
                evidence.append(-math.inf)
                continue
            live = log_weights > -math.inf
            weights = torch.softmax(log_weights[live], 0).to(log_joint)
            losses.append(-(weights * log_joint[live.to(log_joint.device)]).sum())
            evidence.append(runtime.log_mean_exp(log_weights))
            sizes.append(runtime.ess(log_weights) / len(log_weights))
        if losses:
            loss = torch.stack(losses).mean()
            self._update(loss, number)
        return {
            "log_evidence": mean(evidence),
            "model_loss": float(loss.detach()) if losses else math.nan,
            "model_ess": mean(sizes),
        }

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be the same one; JSON's types."""
        return {"num_samples": self.num_samples, "model_learning_rate": self._given_rate}

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Of the program, as far as its runs have used them."""
        return self._trainables.named_parameters()

    # --- its state, for checkpoints --------------------------------------------------------------

    def forget(self) -> None:
        """Drop what the model's adapters remember of prompts. It is made again when needed."""
        for lm in self._trainables.adapters:
            lm.forget()

    def state_dict(self) -> dict[str, Any]:
        named = self.named_parameters()
        waiting = {f"params.{name}": value for name, value in self._saved.waiting.items()}
        return {
            "values": {name: p.detach() for name, p in named.items()} | waiting,
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        values = state["values"]
        self._find(values)
        self._adopt()
        named = self.named_parameters()
        for name in values:
            if name not in named and not name.startswith("params."):
                raise ValueError(
                    f"the run to be resumed had learned {name!r}, a weight of an adapter that no run "
                    "of the program has used as yet: give it the inputs that it was begun with"
                )
        with torch.no_grad():
            for name in values.keys() & named.keys():
                named[name].copy_(values[name])
        self._saved.waiting = {
            name.removeprefix("params."): value
            for name, value in values.items()
            if name not in named
        }
        self._optimizer.load_state_dict(state["optimizer"])
        self.forget()

    def _find(self, names: Iterable[str]) -> None:
        """Look for parameters that only some inputs and branches use."""
        for each in self._inputs:
            known = self.named_parameters()
            if all(name in known for name in names):
                break
            self._trainables.find(each.program, each.args)

    # --- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _draw(self, inputs: Sequence[Input], seed: int) -> list[_Draws]:
        """Draws of the mixture for each input, with their log-weights."""
        observe(self._guide, inputs)
        mixtures = [
            _Mixture(input_, self.num_samples, self._options, input_seed)
            for input_, input_seed in zip(
                inputs, runtime.slot_seeds(seed, len(inputs)), strict=True
            )
        ]
        with runtime.ending([]) as particles:
            for mixture in mixtures:
                particles += mixture.start(self._guide)
            runtime.run_to_end(particles)
        samples = [Sample.of(particle, "guide") for particle in particles]
        scores = self._guide.score([sample.proposer for sample in samples], grad=False)
        draws = []
        for k, mixture in enumerate(mixtures):
            here = slice(k * self.num_samples, (k + 1) * self.num_samples)
            pairs = zip(samples[here], scores[here], strict=True)
            log_weights = [mixture.log_weight(sample, score) for sample, score in pairs]
            records = [sample.record for sample in samples[here]]
            for record in records:
                mixture.input.buffer.add(record)  # the guide learns from what was found, too
            draws.append(_Draws(records, torch.tensor(log_weights, dtype=torch.float64)))
        return draws

    def _log_joints(self, drawn: Sequence[tuple[Input, Record]]) -> torch.Tensor:
        """log p(latents, observations) of each draw, (N,) with gradient."""
        runs = []
        for slot, (input_, record) in enumerate(drawn):
            values = {**record.values, **record.tools}
            given = {name: Given(torch.as_tensor(value)) for name, value in values.items()}
            run = Particle(
                input_.program, input_.args, seed=slot, given=given, grad=True, slot=slot
            )
            run.resume()
            runs.append(run)
        with runtime.ending(runs):
            runtime.run_to_draws(runs, grad=True)
            self._trainables.add(runs)
        return torch.stack(
            [torch.stack([n["log_prob_sum"] for n in run.sites.values()]).sum() for run in runs]
        )

    def _update(self, loss: torch.Tensor, number: int) -> None:
        self._adopt()
        if not math.isfinite(self._optimizer.step(loss, number)):
            raise FloatingPointError(
                "the loss of the model, or its gradient, is not finite: its parameters are kept as "
                "they were. Lower model_learning_rate"
            )
