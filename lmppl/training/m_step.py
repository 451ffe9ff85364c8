"""The M-step of learning a program: one step of maximum likelihood on draws of its guide.

    z_i ~ (1 - eps) q + eps p                       (the guide q, and the program p itself)
    w_i = R(z_i) / ((1 - eps) q(z_i) + eps p(z_i))  (the balance heuristic of Veach & Guibas, 1995)
    one step of AdamW on the mean over inputs of sum_i w_i log R(z_i) / sum_i w_i

A guide that is young, or that has lost a mode, gives explanations of the data that it does not draw no
weight, and nothing shows it: all its draws weigh alike. Draws of the program find them, and no weight
is larger than the likelihood over eps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmppl import runtime
from lmppl.guides.guide import TrainableGuide
from lmppl.guides.parameters import SavedParams, Trainables
from lmppl.runtime import Given, Particle
from lmppl.runtime.records import Record, record_of
from lmppl.training.inputs import Input, observe
from lmppl.training.options import FitOptions
from lmppl.training.samples import Sample
from lmppl.training.trainer import mean, optimizer_state, restore_optimizer


@dataclass(frozen=True, eq=False)
class _Draws:
    """Draws for one input."""

    records: list[Record]
    log_weights: torch.Tensor  # (num_samples,) float64, nats


class MStep:
    """The optimiser of a program's parameters.

    Args:
        guide: draws the latents.
        inputs: of the data.
        options: of the training.
        rate: AdamW's; None: the guide's.
        num_samples: draws for each input, ``options.prior_fraction`` of them the program's own.
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
        num_samples: int,
        saved: SavedParams | None = None,
    ) -> None:
        self._guide, self._inputs, self._options = guide, inputs, options
        self.num_samples, self._given_rate = num_samples, rate
        share = round(options.prior_fraction * num_samples)
        self._by_program = min(max(1, share), num_samples - 1) if options.prior_fraction else 0
        self._saved = saved or SavedParams()
        self._late_state: dict[str, Any] = {}
        self._trainables = Trainables(guide.base)
        self._trainables.find(guide.model, inputs[0].args)
        self._parameters = list(self.named_parameters().values())
        if not self._parameters:
            raise ValueError(
                "the program has nothing to learn: let a site name an adapter, "
                "lm_sample(..., lm=m) with m = lm.adapter(), or use pyro.param"
            )
        shared = {id(p) for p in self._parameters} & {
            id(p) for p in guide.named_parameters().values()
        }
        if shared:
            raise ValueError(
                "the program and its guide train the same parameters: give the guide an adapter of "
                "its own"
            )
        rate = options.rate(guide.base.hidden_size) if rate is None else rate
        self._optimizer = torch.optim.AdamW(self._parameters, lr=rate, weight_decay=0.0)
        self._adopt()

    def _adopt(self) -> None:
        """Some inputs and branches may have parameters that the first runs did not use."""
        for lm in self._trainables.adapters:
            lm.memory = self._options.memory(lm.memory)
        known = {id(p) for p in self._parameters}
        new = {n: p for n, p in self.named_parameters().items() if id(p) not in known}
        if new:
            self._optimizer.add_param_group({"params": list(new.values())})
            self._parameters += new.values()
            restore_optimizer(self._optimizer, new, self._late_state)

    def step(self, inputs: Sequence[Input], seed: int) -> dict[str, float]:
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
            self._update(loss)
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
            "optimizer": self._late_state | optimizer_state(self._optimizer, named),
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
        self._late_state = dict(state["optimizer"])
        restore_optimizer(self._optimizer, named, self._late_state)
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
        """Draws of the guide for each input, and a few of the program."""
        seeds = iter(runtime.slot_seeds(seed, 2 * len(inputs)))
        observe(self._guide, inputs)
        by_program = self._by_program
        with runtime.ending([]) as particles:
            for input_ in inputs:
                for num, temperature in (
                    (self.num_samples - by_program, 1.0),
                    (by_program, math.inf),
                ):
                    factory = self._guide.proposer_factory(
                        input_.args, temperature=temperature, observations=input_.observations
                    )
                    particles += runtime.start(
                        input_.program, input_.args, num, seed=next(seeds), proposer=factory
                    )
            runtime.run_to_end(particles)
        samples = [Sample.of(particle, "guide") for particle in particles]
        records = [record_of(sample.particle, {}) for sample in samples]
        log_weights = self._log_weights(samples)
        num = self.num_samples
        return [
            _Draws(records[first : first + num], log_weights[first : first + num])
            for first in range(0, len(samples), num)
        ]

    def _log_weights(self, samples: Sequence[Sample]) -> torch.Tensor:
        """log R - log((1 - eps) q + eps p) of each draw, (N,) float64, nats (R: the joint density, q:
        of the latents in the guide, p: in the program, eps: the program's share of the draws)."""
        scores = self._guide.score([sample.proposer for sample in samples], grad=False)
        log_q = [sample.log_q(score) for sample, score in zip(samples, scores, strict=True)]
        log_p = [math.fsum(sample.log_priors.values()) for sample in samples]
        log_r = torch.tensor([sample.log_r for sample in samples], dtype=torch.float64)
        eps = torch.tensor(self._by_program / self.num_samples, dtype=torch.float64)
        log_drawn = torch.logaddexp(
            torch.tensor(log_q, dtype=torch.float64) + torch.log1p(-eps),
            torch.tensor(log_p, dtype=torch.float64) + eps.log(),
        )
        return torch.where(log_r > -math.inf, log_r - log_drawn, -math.inf)

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

    def _update(self, loss: torch.Tensor) -> None:
        self._adopt()
        self._optimizer.zero_grad(set_to_none=True)
        if bool(torch.isfinite(loss)):
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._options.max_grad_norm)
            if bool(torch.isfinite(norm)):
                self._optimizer.step()
                return
        raise FloatingPointError(
            "the loss of the model, or its gradient, is not finite: its parameters are kept as they "
            "were. Lower model_learning_rate"
        )
