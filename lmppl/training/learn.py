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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from lmppl import runtime
from lmppl.guides.guide import TrainableGuide
from lmppl.guides.parameters import SavedParams
from lmppl.primitives import use
from lmppl.report.history import History
from lmppl.report.progress import progress_bar
from lmppl.runtime.simulation import simulate
from lmppl.training.checkpoints import Checkpoints, Part
from lmppl.training.data import check_simulated, held_out_inputs, simulated_input
from lmppl.training.evaluation import HeldOut
from lmppl.training.fingerprints import digest_of
from lmppl.training.inputs import Collection, Input, Source, read_inputs
from lmppl.training.m_step import MStep
from lmppl.training.options import FitOptions
from lmppl.training.tracking import tracker
from lmppl.training.trainer import Trainer, mean

_FEWEST_EFFECTIVE = 3.0


def learn(
    guide: TrainableGuide,
    data: Iterable[Any],
    steps: int = 200,
    *,
    method: Literal["em", "wake-sleep"] = "em",
    guide_steps: int = 2,
    num_samples: int = 16,
    model_learning_rate: float | None = None,
    eval_data: Iterable[Any] | None = None,
    eval_every: int = 20,
    eval_samples: int = 64,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 20,
    resume: bool = False,
    log_with: Any = None,
    logging_dir: str | Path = "runs",
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
        eval_data: held-out inputs, observations included.
        eval_every, eval_samples: M-steps between evaluations on them, and draws for each.
        patience: evaluations without a better ``eval_log_z``, the bound of their log evidence, after
            which learning stops, with the parameters of the best, the program's and the guide's;
            None: it never stops early.
        checkpoint, checkpoint_every, resume: a folder for checkpoints, M-steps between them, and
            whether to go on from the one that is there: to the same result as an unbroken run.
        log_with, logging_dir: trackers of each step's figures, and where they write; see ``fit``.
        seed: makes the run reproducible.
        progress: show a progress bar; None: on a terminal.
        callback: called with each step's figures.
        **options: of the guide's training, see ``FitOptions``.

    Returns:
        One dict a step: ``log_evidence`` (mean estimate over the step's inputs, nats),
        ``model_loss``, ``model_ess`` and the guide's figures; on held-out inputs ``eval_log_z``, the
        mean lower bound of their log evidence (nats), and the others of ``fit``.

    Raises:
        ValueError: if the program has nothing to learn, options are out of range, the checkpoint is
            of another run, or no trace of any input was ever alive. (Inputs of which that is true
            while others live are warned of.)
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
    checkpoints = Checkpoints.of(checkpoint, checkpoint_every, resume, seed)
    seed = runtime.fresh_seed(seed)
    config = {"steps": steps, "seed": seed, "method": method, "loss": settings.loss.name}
    seed, own_seed = runtime.slot_seeds(seed, 2)  # the guide's, the M-step's
    held_out = HeldOut(eval_every, eval_samples, seed)
    generator = torch.Generator().manual_seed(seed % 2**63)
    saved = SavedParams()
    with use(guide.base), _restoring(guide, saved):
        held_out = replace(held_out, inputs=held_out_inputs(guide, eval_data, settings))
        stopping = held_out.stopping(patience)
        inputs = [
            Input(guide.model, args, i, settings)
            for i, args in enumerate(read_inputs(guide.model, data))
        ]
        m_step = MStep(guide, inputs, settings, model_learning_rate, saved)
        guide.start_training(several_inputs=len(inputs) > 1)
        guide.tempered_target = settings.tempered_target
        guide.prepare(inputs[0].args)
        source = Collection(inputs, generator)
        dreams = _Dreams(guide, inputs, settings, seed) if method == "wake-sleep" else None
        trainer = Trainer(guide, dreams or source, steps * guide_steps, settings, seed, generator)
        progress_of = _Steps(source)
        parts: dict[str, Part] = {
            "m_step": m_step, "m_steps": progress_of, "stopping": stopping
        }  # fmt: skip
        this_run = {
            "method": method,
            "guide_steps": guide_steps,
            "num_samples": num_samples,
            "model_learning_rate": model_learning_rate,
            "data of the M-steps": digest_of([each.args for each in inputs]),
        }
        history = progress_of.history
        done = checkpoints.begin(trainer, parts, this_run)
        with (
            progress_bar("learning the model", steps, show=progress) as bar,
            tracker(log_with, directory=logging_dir, name="lmppl", config=config) as track,
        ):
            bar.advance(done)
            for number in range(done, done if stopping.over else steps):
                figures: dict[str, Any] = {}
                for k in range(guide_steps):
                    figures = trainer.step(number * guide_steps + k) or figures
                members = source.next(settings.inputs_per_step)
                found = m_step.step(members, num_samples, runtime.nth_seed(own_seed, number))
                for each in inputs:
                    each.forget_scores()
                tried = held_out.figures(guide, number, steps)
                history.append({"step": number, **figures, **found, **tried})
                guide.history.append({**figures, "step": len(guide.history)})
                bar.advance(log_evidence=found["log_evidence"])
                track.log(history[-1], number)
                if callback is not None:
                    callback(history[-1])
                stop = bool(tried) and stopping.should_stop(
                    number,
                    -math.inf if tried.get("eval_dead") else tried["eval_log_z"],
                    _parameters(guide, m_step),
                )
                if stop:
                    guide.notes.append(
                        f"learning stopped after {number + 1} M-steps: no better held-out log "
                        f"evidence since step {stopping.best_step}"
                    )
                last = stop or number == steps - 1
                if checkpoints.save(number + 1, last=last):
                    m_step.forget()
                    if dreams is not None:
                        dreams.forget()
                if stop:
                    break
        stopping.finish(_parameters(guide, m_step))
        trainer.report_dead()
        guide.notes += _poor_draws(history, num_samples)
    for name in saved.waiting:
        warnings.warn(
            f"the parameter {name!r} had been learned, but no run of the program came to it since "
            "learning was resumed: its value is in the checkpoint alone",
            stacklevel=3,
        )
    return history


def _poor_draws(history: History, num_samples: int) -> list[str]:
    """A note, if the last quarter of the M-steps had few effective samples."""
    last = [figures["model_ess"] for figures in history[-max(1, len(history) // 4) :]]
    effective = mean(last) * num_samples
    if not effective < min(_FEWEST_EFFECTIVE, num_samples / 2):
        return []
    return [
        f"the M-steps had {effective:.1f} effective samples of {num_samples} draws for each input: so "
        "few pull the program's parameters towards what the guide draws. Raise num_samples or "
        "guide_steps, or let the guide read what is observed"
    ]


@contextmanager
def _restoring(guide: TrainableGuide, saved: SavedParams) -> Iterator[None]:
    """A resumed run may come late to parameters that it had learned."""
    model, guide.model = guide.model, saved.around(guide.model)
    try:
        yield
    finally:
        guide.model = model


def _parameters(guide: TrainableGuide, m_step: MStep) -> dict[str, torch.nn.Parameter]:
    """Of both, for early stopping."""
    model = {f"model.{name}": p for name, p in m_step.named_parameters().items()}
    return {f"guide.{name}": p for name, p in guide.named_parameters().items()} | model


class _Dreams(Source):
    """Inputs simulated under the model as it is when they are asked for, a batch at a time."""

    def __init__(
        self, guide: TrainableGuide, inputs: Sequence[Input], options: FitOptions, seed: int
    ) -> None:
        self._guide, self._inputs, self._options, self._seed = guide, inputs, options, seed
        self._waiting: list[Input] = []
        self._batches = self._taken = 0

    def next(self, num: int) -> list[Input]:
        while len(self._waiting) < num:
            self._waiting += self._batch()
        chosen, self._waiting = self._waiting[:num], self._waiting[num:]
        return chosen

    def _batch(self) -> list[Input]:
        guide, options, number = self._guide, self._options, self._batches
        self._batches += 1
        args = self._inputs[number % len(self._inputs)].args
        drawn = simulate(guide.model, args, options.batch_size, seed=self._seed + number)
        batch = []
        for index, one in enumerate(drawn, self._taken):
            batch.append(simulated_input(guide, args, one, index, options))
            if options.loss.draws != "given":
                batch[
                    -1
                ].forget_scores()  # the model may change before the last of the batch is used
        self._taken += len(batch)
        return batch

    @property
    def kept(self) -> list[Input]:
        return []

    def forget(self) -> None:
        """Dream anew: those that wait are not in a checkpoint."""
        self._waiting.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches, self._taken = state["batches"], state["taken"]


class _Steps:
    """Where the M-steps of a run are: their inputs and figures."""

    def __init__(self, source: Source) -> None:
        self.source, self.history = source, History()

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source.state_dict(), "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self.history += state["history"]
