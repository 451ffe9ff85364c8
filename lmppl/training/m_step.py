"""The M-step of learning a program: one step of maximum likelihood on draws of its guide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lmppl import runtime
from lmppl.guides.guide import TrainableGuide
from lmppl.guides.parameters import SavedParams, Trainables
from lmppl.runtime import Given, Particle
from lmppl.runtime.records import Record, record_of
from lmppl.training.inputs import Input, observe
from lmppl.training.options import FitOptions
from lmppl.training.trainer import mean, optimizer_state, restore_optimizer


class MStep:
    """The optimiser of a program's parameters.

    Args:
        guide: draws the latents.
        inputs: of the data.
        options: of the training.
        rate: AdamW's; None: the guide's.
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
        saved: SavedParams | None = None,
    ) -> None:
        self._guide, self._inputs, self._options = guide, inputs, options
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

    def step(self, members: Sequence[Input], num: int, seed: int) -> dict[str, float]:
        """Raise the likelihood of some inputs' observations. Returns its figures."""
        drawn = self._draw(members, num, seed)
        losses, evidence, sizes = [], [], []
        terms = self._log_joints(
            [(each, record) for each, pairs in zip(members, drawn, strict=True)
             for record, _ in pairs]
        )  # fmt: skip
        for pairs in drawn:
            own, terms = terms[: len(pairs)], terms[len(pairs) :]
            log_weights = torch.tensor([weight for _, weight in pairs], dtype=torch.float64)
            if not pairs or bool((log_weights == -math.inf).all()):
                evidence.append(-math.inf)
                continue
            weights = torch.softmax(log_weights, 0).to(own[0].dtype)
            live = [i for i, w in enumerate(weights.tolist()) if w > 0.0]
            losses.append(-torch.stack([weights[i] * own[i] for i in live]).sum())
            evidence.append(runtime.log_mean_exp(log_weights))
            sizes.append(runtime.ess(log_weights) / len(pairs))
        if losses:
            loss = torch.stack(losses).mean()
            self._update(loss)
        return {
            "log_evidence": mean(evidence),
            "model_loss": float(loss.detach()) if losses else math.nan,
            "model_ess": mean(sizes),
        }

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
    def _draw(
        self, members: Sequence[Input], num: int, seed: int
    ) -> list[list[tuple[Record, float]]]:
        """Draws of the guide for each input, with their log-weights (nats)."""
        seeds = runtime.slot_seeds(seed, len(members))
        observe(self._guide, members)
        with runtime.ending([]) as particles:
            for each, own in zip(members, seeds, strict=True):
                factory = self._guide.proposer_factory(each.args, observations=each.observations)
                particles += runtime.start(each.program, each.args, num, seed=own, proposer=factory)
            runtime.run_to_end(particles)
            pairs = [(record_of(p, {}), p.take_log_weight()) for p in particles]
        return [pairs[k * num : (k + 1) * num] for k in range(len(members))]

    def _log_joints(self, drawn: Sequence[tuple[Input, Record]]) -> list[torch.Tensor]:
        """log p(latents, observations) of each draw, 0-d with gradient."""
        runs = []
        for slot, (each, record) in enumerate(drawn):
            values = {**record.values, **record.tools}
            given = {name: Given(torch.as_tensor(value)) for name, value in values.items()}
            run = Particle(each.program, each.args, seed=slot, given=given, grad=True, slot=slot)
            run.resume()
            runs.append(run)
        with runtime.ending(runs):
            runtime.run_to_draws(runs, grad=True)
            self._trainables.add(runs)
        return [torch.stack([n["log_prob_sum"] for n in run.sites.values()]).sum() for run in runs]

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
