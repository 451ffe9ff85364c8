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
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lmppl import runtime
from lmppl.distributions import SiteScore
from lmppl.guides.guide import Guide, TrainableGuide
from lmppl.guides.parameters import SavedParams, Trainables
from lmppl.runtime import Given, Particle
from lmppl.runtime.records import Record
from lmppl.training.behaviour import Drawn, Recalled
from lmppl.training.inputs import Input, observe
from lmppl.training.kept import record_of_state, record_state
from lmppl.training.optimizer import Optimizer
from lmppl.training.options import FitOptions
from lmppl.training.samples import Sample, score_own_draws
from lmppl.training.sharing import SharedInputs, Sharing
from lmppl.training.trainer import mean


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
        of_program = max(1, round(options.prior_fraction * num)) if options.prior_fraction else 0
        self._of_program = min(of_program, num - self._of_buffer - 1)
        self._of_guide = num - self._of_program - self._of_buffer
        self._seeds = runtime.slot_seeds(seed, 3)

    def start(self, guide: Guide, slots: Sequence[int]) -> list[Particle]:
        """The runs of the program that are at these slots, each at its first wait."""
        of_guide, of_program, of_buffer = self._seeds
        policies: list[Drawn | Recalled] = [
            Drawn("guide", self._of_guide, 1.0, of_guide),
            Drawn("prior", self._of_program, math.inf, of_program),
        ]
        if self._of_buffer:
            records, log_shares = zip(*self._kept.values(), strict=True)
            shares = [math.exp(log_share) for log_share in log_shares]
            chosen = random.Random(of_buffer).choices(records, shares, k=self._of_buffer)
            policies.append(Recalled("replay", chosen, of_buffer))
        runs, begin = [], 0
        for policy in policies:
            of_policy = [slot - begin for slot in slots if 0 <= slot - begin < policy.num]
            runs += policy.start(guide, self.input, of_policy)
            begin += policy.num
        return runs

    def log_weight(self, sample: Sample, scores: Mapping[str, SiteScore]) -> float:
        """log R less the log-density of a trace in the mixture, nats; ``scores``: of the guide."""
        if sample.log_r == -math.inf:
            return -math.inf
        terms = [(self._of_guide, sample.log_q(scores)), (self._of_program, sample.log_own())]
        if (key := sample.record.discrete_key) in self._kept:
            terms.append((self._of_buffer, self._kept[key][1]))
        log_terms = [math.log(num / self._num) + log_prob for num, log_prob in terms if num]
        return sample.log_r - float(torch.logsumexp(torch.tensor(log_terms).double(), 0))


class _Draw(NamedTuple):
    """A draw for an input, and its log-weight (nats)."""

    record: Record | None  # None: another process has it, and the buffer need not keep it
    log_weight: float
    is_news: bool = True  # whether the buffer may keep it

    def told(self) -> tuple[Any, float]:
        """What other processes are told of it."""
        told = record_state(self.record) if self.record and self.is_news else None
        return told, self.log_weight

    @classmethod
    def heard(cls, told: tuple[Any, float]) -> _Draw:
        """What another process has told of it."""
        state, log_weight = told
        return cls(record_of_state(state) if state else None, log_weight, state is not None)


class MStep:
    """The optimiser of a program's parameters.

    Args:
        guide: draws the latents.
        inputs: of the data.
        options: of the training.
        rate: AdamW's; None: the guide's. It warms up and decays as the guide's does.
        steps: how many there will be.
        num_samples: draws for each input.
        sharing: which draws fall to this process; None: all.
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
        sharing: Sharing | None = None,
        saved: SavedParams | None = None,
    ) -> None:
        self.guide, self.inputs, self.options = guide, inputs, options
        self.num_samples, self._given_rate = num_samples, rate
        self._sharing = SharedInputs() if sharing is None else sharing
        self._ranks = self._sharing.ranks
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
        self._optimizer = Optimizer(options, rate, steps, self._sharing)
        self._adopt()
        self._met: set[str] = set()  # parameters that all ranks have, with the same values

    def begin(self) -> None:
        """Before the first step: all ranks begin with the parameters of the first."""
        if self._ranks.num > 1:
            self._level([])

    def _adopt(self) -> None:
        """Some inputs and branches may have parameters that the first runs did not use."""
        for lm in self._trainables.adapters:
            lm.memory = self.options.memory(lm.memory)
        self._optimizer.adopt(self.named_parameters())

    def step(self, inputs: Sequence[Input], number: int, seed: int) -> dict[str, float]:
        """Raise the likelihood of some inputs' observations. Returns its figures."""
        seeds = runtime.slot_seeds(seed, len(inputs))
        seeded = self._sharing.mine(list(zip(inputs, seeds, strict=True)))
        mine = [input_ for input_, _ in seeded]
        with self._sharing.work(f"M-step {number}"):
            own = self._draw(seeded)
            log_weights = self._keep(mine, own)
            records = [
                {slot: draw.record for slot, draw in row.items() if draw.record} for row in own
            ]
            found = self._log_joints(mine, records)
            log_joints = self._sharing.vectors(list(map(list, records)), found)
        self._meet(inputs, records)
        losses = []
        for row, log_joint in zip(log_weights, log_joints, strict=True):
            live = row > -math.inf
            if bool(live.any()):
                weights = torch.softmax(row[live], 0).to(log_joint)
                losses.append(-(weights * log_joint[live.to(log_joint.device)]).sum())
        update = self._optimizer.step(losses, number)
        if not update.is_empty and not math.isfinite(update.norm):
            raise FloatingPointError(
                "the loss of the model, or its gradient, is not finite: its parameters are kept as "
                "they were. Lower model_learning_rate"
            )
        rows = self._sharing.tell_inputs(inputs, log_weights)
        alive = [row for row in rows if bool((row > -math.inf).any())]
        return {
            "log_evidence": mean([runtime.log_mean_exp(row) for row in rows]),
            "model_loss": update.loss,
            "model_ess": mean([runtime.ess(row) / len(row) for row in alive]),
        }

    def _keep(
        self, inputs: Sequence[Input], own: Sequence[Mapping[int, _Draw]]
    ) -> list[torch.Tensor]:
        """Keep the best of what all processes drew for inputs, as the guide learns from it, too. Returns
        the log-weights of all draws of each, (num_samples,) float64, nats."""
        rows = self._sharing.pool(own, tell=_Draw.told, hear=_Draw.heard)
        for input_, row in zip(inputs, rows, strict=True):
            for draw in row.values():
                if draw.record and draw.is_news:
                    input_.buffer.add(draw.record)
        log_weights = [[draw.log_weight for draw in row.values()] for row in rows]
        return list(torch.tensor(log_weights, dtype=torch.float64).reshape(-1, self.num_samples))

    def _meet(self, inputs: Sequence[Input], records: Sequence[Mapping[int, Record]]) -> None:
        """What only some ranks have come to, the others find by the same runs, in one order."""
        self._adopt()
        new = sorted(self.named_parameters().keys() - self._met)
        if self._ranks.num == 1 or (self._ranks.agree(new) and not new):
            return
        owners = self._ranks.gather([new])
        told = self._sharing.records(records)
        self._trainables.leave_out(new)
        for input_, of_input in zip(inputs, told, strict=True):
            with torch.no_grad():
                self._log_joints([input_], [dict(enumerate(of_input))])
        self._level(owners)

    def _level(self, owners: Sequence[Sequence[str]]) -> None:
        self._adopt()
        named = self.named_parameters()
        self._ranks.level(named, self._met, owners)
        self._met = set(named)

    @torch.no_grad()
    def _draw(self, seeded: Sequence[tuple[Input, int]]) -> list[dict[int, _Draw]]:
        """Draws of the mixture for each input, by slot, those that fall to this process."""
        observe(self.guide, [input_ for input_, _ in seeded])
        num = self.num_samples
        dealt = [self._sharing.slots(k * num, num) for k in range(len(seeded))]
        mixtures = [_Mixture(input_, num, self.options, one_seed) for input_, one_seed in seeded]
        with runtime.ending([]) as particles:
            for mixture, slots in zip(mixtures, dealt, strict=True):
                particles += mixture.start(self.guide, slots)
            runtime.run_to_end(particles)
        samples = [Sample.of(particle, "guide") for particle in particles]
        score_own_draws([sample for sample in samples if sample.log_r > -math.inf])
        scores = self.guide.score([sample.proposer for sample in samples], grad=False)
        scored = iter(zip(samples, scores, strict=True))
        found: list[dict[int, _Draw]] = []
        for mixture, slots in zip(mixtures, dealt, strict=True):
            found.append({})
            for slot, (sample, of_sample) in zip(slots, scored, strict=False):
                is_news = mixture.input.buffer.lacks(sample)
                log_weight = mixture.log_weight(sample, of_sample)
                found[-1][slot] = _Draw(sample.record, log_weight, is_news)
        return found

    def _log_joints(
        self, inputs: Sequence[Input], records: Sequence[Mapping[int, Record]]
    ) -> list[torch.Tensor]:
        """log p(latents, observations) of draws for each input, given by slot, with gradient."""
        runs = []
        for k, (input_, of_input) in enumerate(zip(inputs, records, strict=True)):
            for slot, record in of_input.items():
                given = {
                    name: Given(torch.as_tensor(value))
                    for name, value in {**record.values, **record.tools}.items()
                }
                at = k * self.num_samples + slot
                runs.append(
                    Particle(input_.program, input_.args, seed=at, given=given, grad=True, slot=at)
                )
        with runtime.ending(runs):
            runtime.resume(runs)
            runtime.run_to_draws(runs, grad=True)
            self._trainables.add(runs)
        log_joints = [sum(node["log_prob_sum"] for node in run.sites.values()) for run in runs]
        stacked = torch.stack(log_joints) if runs else torch.zeros(0)
        return list(stacked.split(list(map(len, records))))

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Of the program, as far as its runs have used them."""
        return self._trainables.named_parameters()

    # --- its state, for checkpoints --------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be the same one; JSON's types."""
        return {"num_samples": self.num_samples, "model_learning_rate": self._given_rate}

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
        for input_ in self.inputs:  # only some inputs and branches may use a parameter
            if values.keys() <= self.named_parameters().keys():
                break
            self._trainables.find(input_.program, input_.args)
        self._adopt()
        named = self.named_parameters()
        late = {name: value for name, value in values.items() if name not in named}
        for name in late:
            if not name.startswith("params."):
                raise ValueError(
                    f"the run to be resumed had learned {name!r}, a weight of an adapter that no run "
                    "of the program has used as yet: give it the inputs that it was begun with"
                )
        with torch.no_grad():
            for name in values.keys() & named.keys():
                named[name].copy_(values[name])
        self._saved.waiting = {name.removeprefix("params."): v for name, v in late.items()}
        self._optimizer.load_state_dict(state["optimizer"])
