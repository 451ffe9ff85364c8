"""A run of training, of a guide (``fit``) or of a program with its guide (``learn``).

    go on from the checkpoint, if there is one
    for every step:
        figures = learner.step(number)             (none: the data have ended, and the run with them)
        figures of held-out inputs, when it is time
        history, progress bar, trackers, callback
        much worse than at first?                  (the best parameters come back; an error)
        no better on held-out inputs for long?     (they come back, and the run ends)
        a checkpoint, when it is time

Whoever trains something else than a guide writes a ``Learner``; the guards are the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lmppl import runtime
from lmppl.checks import check_callable, check_int
from lmppl.report.history import History
from lmppl.report.progress import progress_bar
from lmppl.training.callbacks import DivergenceGuard, EarlyStopping
from lmppl.training.checkpoints import Checkpoints, Part
from lmppl.training.evaluation import HeldOut
from lmppl.training.tracking import tracker
from lmppl.training.trainer import Trainer


class Learner(Protocol):
    """What a run trains, a step at a time.

    Attributes:
        task: what it does, for the progress bar.
        trainer: of the guide.
        history: one dict a step.
        shown: figures that the progress bar shows.
        watched: the figure of a step that tells divergence, and its name in messages.
        judged: the same of held-out inputs, by which the best parameters are chosen.
    """

    task: str
    trainer: Trainer
    shown: tuple[str, ...]
    watched: tuple[str, str]
    judged: tuple[str, str]

    @property
    def history(self) -> History: ...

    def step(self, number: int) -> dict[str, Any] | None:
        """One step. Returns its figures; None if the data have ended."""

    def watched_again(self) -> float:
        """The watched figure of the last step's inputs, under the parameters as they now are."""

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that it trains."""

    def parts(self) -> dict[str, Part]:
        """What has a state, beside the trainer of the guide."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be the same one, beside the trainer's; JSON's types."""

    def forget(self) -> None:
        """Drop what a checkpoint does not hold, beside the trainer's."""


@dataclass(frozen=True)
class Run:
    """What surrounds the steps of a run.

    Args:
        steps: how many.
        seed: of all random choices.
        held_out: inputs held out from it.
        patience: evaluations on them without a better figure after which it stops; None: never.
        checkpoints: where its state is kept.
        log_with: trackers of figures: a name that accelerate knows ("tensorboard", "wandb", ...),
            a tracker object, or a list of those.
        logging_dir: where they write.
        progress: whether a progress bar is shown; None: on a terminal.
        callback: called with each step's figures.
    """

    steps: int
    seed: int
    held_out: HeldOut
    patience: int | None
    checkpoints: Checkpoints
    log_with: Any
    logging_dir: str | Path
    progress: bool | None
    callback: Callable[[dict[str, Any]], None] | None

    @classmethod
    def of(
        cls,
        steps: Any,
        seed: Any,
        *,
        eval_every: Any,
        eval_samples: Any,
        patience: Any,
        checkpoint: str | Path | None,
        checkpoint_every: Any,
        resume: bool,
        callback: Any,
        **rest: Any,
    ) -> Run:
        """From the arguments of ``fit`` and ``learn``; ``held_out`` has no inputs yet.

        Raises:
            TypeError, ValueError: for one of another type or out of range.
        """
        checkpoints = Checkpoints.of(checkpoint, checkpoint_every, resume, seed)
        if callback is not None:
            check_callable("callback", callback)
        EarlyStopping(patience)  # checks it
        seed = runtime.fresh_seed(seed)
        held_out = HeldOut(eval_every, eval_samples, seed)
        return cls(
            check_int("steps", steps),
            seed,
            held_out,
            patience,
            checkpoints,
            callback=callback,
            **rest,
        )


def train(learner: Learner, run: Run, **config: Any) -> None:
    """Take the steps of a run.

    Args:
        learner: what it trains.
        run: what surrounds the steps.
        config: what else trackers are told of it.

    Raises:
        ValueError: for the checkpoint of another run, or if no trace of any input was ever alive.
        FloatingPointError: if a loss is not finite, or training diverges.
    """
    trainer, checkpoints = learner.trainer, run.checkpoints
    guard, stopping = DivergenceGuard(learner.watched[1]), EarlyStopping(run.patience)
    parts = {**learner.parts(), "guard": guard, "stopping": stopping}
    done = checkpoints.begin(trainer, parts, learner.identity())
    history = learner.history  # with what the checkpoint has of it
    config = {"steps": run.steps, "seed": run.seed, **config, "loss": trainer.options.loss.name}
    with (
        progress_bar(learner.task, run.steps, show=run.progress) as bar,
        tracker(run.log_with, directory=run.logging_dir, name="lmppl", config=config) as track,
        runtime.rare_collections(),
    ):
        bar.advance(done)
        for number in range(done, done if stopping.over else run.steps):
            figures = learner.step(number)
            if figures is None:
                _warn_of_the_end(number, run.steps)
                checkpoints.save(number, last=True)
                break
            held_out = run.held_out.figures(trainer.guide, number, run.steps)
            figures = {"step": len(history), **figures, **held_out}
            history.append(figures)
            bar.advance(**_shown(figures, learner.shown))
            track.log(figures, figures["step"])
            if run.callback is not None:
                run.callback(figures)
            parameters = learner.named_parameters()
            guard.watch(number, figures[learner.watched[0]], parameters, learner.watched_again)
            if held_out and stopping.should_stop(number, _judged(held_out, learner), parameters):
                trainer.guide.notes.append(
                    f"stopped after {number + 1} steps: no better held-out {learner.judged[1]} "
                    f"since step {stopping.best_step}"
                )
            if checkpoints.save(number + 1, last=stopping.over or number == run.steps - 1):
                learner.forget()
            if stopping.over:
                break
    stopping.finish(learner.named_parameters())
    trainer.report_dead()


def _judged(held_out: Mapping[str, float], learner: Learner) -> float:
    """The figure by which parameters are the best. Where a held-out input is dead, the others'
    evidence alone may be better."""
    figure = learner.judged[0]
    return -math.inf if figure == "eval_log_z" and held_out.get("eval_dead") else held_out[figure]


def _warn_of_the_end(number: int, steps: int) -> None:
    warnings.warn(
        f"the data ended after {number} of {steps} steps: training ends here, with a learning rate "
        "that has not come to its end",
        stacklevel=4,
    )


def _shown(figures: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    (rate,) = History([dict(figures)]).column("samples_per_second")
    shown = {name: figures[name] for name in names if math.isfinite(figures[name])}
    return {**shown, "samples/s": rate}
