"""Learning the program itself: maximum likelihood by expectation maximisation, with a guide.

    for every step:
        E: some training steps of the guide, towards the posterior under the present model
        M: latents ~ guide, self-normalised weights w of R / q;
           one ascent step of sum w log p(latents, observations) in the model's parameters
        stored rewards are scored anew when they are next used

The gradient of the M-step is that of log p(observations), in expectation over the posterior (Fisher's
identity). ``method="wake-sleep"`` trains the guide on what the model dreams, in place of the E-step
(Hinton et al., 1995; Bornschein & Bengio, 2015, arXiv 1406.2751).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from lmppl import runtime
from lmppl.guides.data import check_simulated, simulated_input
from lmppl.guides.history import History
from lmppl.guides.inputs import Input, observe, read_inputs
from lmppl.guides.options import FitOptions
from lmppl.guides.records import Record, record_of
from lmppl.guides.simulation import simulate
from lmppl.guides.sources import Collection, Source, Stream
from lmppl.guides.trainables import Trainables
from lmppl.guides.trainer import Trainer, mean
from lmppl.primitives import use
from lmppl.progress import progress_bar
from lmppl.runtime import Given, Particle

if TYPE_CHECKING:
    from lmppl.guides.guide import LMGuide


def learn(
    guide: LMGuide,
    data: Iterable[Any],
    steps: int = 200,
    *,
    method: Literal["em", "wake-sleep"] = "em",
    guide_steps: int = 2,
    num_samples: int = 16,
    model_learning_rate: float | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> History:
    """Fit the parameters of a guide's program to data, and the guide with them.

    The parameters are the adapters that the program's sites name (``lm_sample(..., lm=m)`` with
    ``m = lm.adapter()``) and its ``pyro.param``s. They are changed in place.

    Args:
        guide: a guide for the program, trained or not.
        data: inputs, observations included.
        steps: M-steps.
        method: ``"em"``: the guide learns from the posterior under the present model, by the loss
            of ``options``; ``"wake-sleep"``: from latents and observations that the model dreams
            (not for programs with factors).
        guide_steps: training steps of the guide for each M-step.
        num_samples: draws of the guide for each input of an M-step.
        model_learning_rate: AdamW's for the program's parameters; None: the guide's.
        seed: makes the run reproducible.
        progress: show a progress bar; None: on a terminal.
        callback: called with each step's figures.
        **options: of the guide's training, see ``FitOptions``.

    Returns:
        One dict a step: ``log_evidence`` (mean estimate over the step's inputs, nats),
        ``model_loss``, ``model_ess`` and the guide's figures.

    Raises:
        ValueError: if the program has nothing to learn, options are out of range, or no trace of any
            input was ever alive. (Inputs of which that is true while others live are warned of.)
        FloatingPointError: if a loss is not finite; the last good parameters are kept.
    """
    if method not in ("em", "wake-sleep"):
        raise ValueError(f"method={method!r}, allowed: 'em', 'wake-sleep'")
    for name, value in (
        ("steps", steps), ("guide_steps", guide_steps), ("num_samples", num_samples)
    ):  # fmt: skip
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: it must be an int of at least 1")
    if method == "wake-sleep":
        check_simulated(guide)
        options.setdefault("loss", "sft")
    own = inspect.signature(learn).parameters.values()
    settings = FitOptions.of(options, [each.name for each in own if each.kind is each.KEYWORD_ONLY])
    seed, own_seed = runtime.slot_seeds(runtime.fresh_seed(seed), 2)  # the guide's, the M-step's
    generator = torch.Generator().manual_seed(seed % 2**63)
    with use(guide.base):
        inputs = [
            Input(guide.model, args, i, settings)
            for i, args in enumerate(read_inputs(guide.model, data))
        ]
        learner = _Learner(guide, inputs[0], settings, model_learning_rate)
        guide.strict_prompts = len(inputs) > 1
        guide.tempered_target = settings.tempered_target
        guide.prepare(inputs[0].args)
        source: Source = Collection(inputs, generator)
        dreams = (
            Stream(_dreams(guide, inputs, settings, seed)) if method == "wake-sleep" else source
        )
        trainer = Trainer(guide, dreams, steps * guide_steps, settings, seed, generator)
        history = History()
        with progress_bar("learning the model", steps, show=progress) as bar:
            for number in range(steps):
                figures: dict[str, Any] = {}
                for k in range(guide_steps):
                    figures = trainer.step(number * guide_steps + k) or figures
                members = source.next(settings.inputs_per_step)
                found = learner.step(members, num_samples, runtime.nth_seed(own_seed, number))
                for each in inputs:
                    each.rescore()
                history.append({"step": number, **figures, **found})
                guide.history.append({**figures, "step": len(guide.history)})
                bar.advance(log_evidence=found["log_evidence"])
                if callback is not None:
                    callback(history[-1])
        trainer.report_dead()
    return history


def _dreams(
    guide: LMGuide, inputs: Sequence[Input], options: FitOptions, seed: int
) -> Iterator[Input]:
    """Inputs simulated under the model as it is when they are asked for, a batch at a time."""
    number = 0
    while True:
        args = inputs[number % len(inputs)].args
        drawn = simulate(guide.model, args, options.batch_size, seed=seed + number)
        for one in drawn:
            each = simulated_input(guide, args, one, number, options)
            if options.kind.draws != "given":
                each.rescore()  # the model may change before the last of the batch is used
            yield each
        number += 1


class _Learner:
    """The M-step."""

    def __init__(
        self, guide: LMGuide, example: Input, options: FitOptions, rate: float | None
    ) -> None:
        self._guide, self._options = guide, options
        self._trainables = Trainables(guide.base)
        self._trainables.find(guide.model, example.args)
        self._parameters = list(self._trainables.named_parameters().values())
        if not self._parameters:
            raise ValueError(
                "the program has nothing to learn: let a site name an adapter, "
                "lm_sample(..., lm=m) with m = lm.adapter(), or use pyro.param"
            )
        shared = {id(p) for p in self._parameters} & {id(p) for p in guide.parameters()}
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
        new = [p for p in self._trainables.named_parameters().values() if id(p) not in known]
        if new:
            self._optimizer.add_param_group({"params": new})
            self._parameters += new

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

    @torch.no_grad()
    def _draw(
        self, members: Sequence[Input], num: int, seed: int
    ) -> list[list[tuple[Record, float]]]:
        """Draws of the guide for each input, with their log-weights (nats)."""
        seeds = runtime.slot_seeds(seed, len(members))
        observe(self._guide, members)
        with runtime.closing([]) as particles:
            for each, own in zip(members, seeds, strict=True):
                factory = self._guide.proposer_factory(each.args, observations=each.observations)
                particles += runtime.start(each.program, each.args, num, seed=own, proposer=factory)
            runtime.complete(particles)
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
        with runtime.closing(runs):
            runtime.settle(runs, grad=True)
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
