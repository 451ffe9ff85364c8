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

import inspect
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from lmppl import runtime
from lmppl.checks import check_callable, check_choice, check_int
from lmppl.guides.guide import Guide
from lmppl.report.history import History
from lmppl.report.progress import progress_bar
from lmppl.training import evaluation
from lmppl.training.callbacks import DivergenceGuard, EarlyStopping
from lmppl.training.checkpoints import Checkpoints, Part
from lmppl.training.fingerprints import digest_of
from lmppl.training.inputs import Input
from lmppl.training.options import FitOptions
from lmppl.training.ranks import Parallel, check_group
from lmppl.training.sharing import sharing_of
from lmppl.training.tracking import tracker
from lmppl.training.trainer import Trainer


class Learner(ABC):
    """What a run trains, a step at a time.

    Attributes:
        watched: the figure of a step that tells divergence, that of ``evaluate`` which it estimates,
            and its name in messages.
        judged: the figure of held-out inputs by which the best parameters are chosen, and its name.
    """

    task: str  # what it does, for the progress bar
    shown: tuple[str, ...]  # figures that the bar shows
    watched: tuple[str, str, str]
    judged: tuple[str, str]
    trainer: Trainer  # of the guide
    history: History  # one dict a step
    inputs: Sequence[Input]  # of the last step

    @abstractmethod
    def step(self, number: int) -> dict[str, Any] | None:
        """One step. Returns its figures; None if the data have ended."""

    @abstractmethod
    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that it trains."""

    def begin(self) -> None:
        """Before the first step."""
        self.trainer.begin()

    def parts(self) -> dict[str, Part]:
        """What has a state, beside the trainer of the guide."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be the same one, beside the trainer's; JSON's types."""
        return {}

    def forget(self) -> None:  # noqa: B027
        """Drop what a checkpoint does not hold, beside the trainer's."""


@dataclass
class Run:
    """What surrounds the steps of a run: the options that ``fit`` and ``learn`` share.

    Args:
        steps: how many.
        eval_every: steps between evaluations on held-out inputs; one more is at the end.
        eval_samples: draws for each of these inputs.
        patience: evaluations without a better figure after which the run stops, with the parameters
            of the best; None: it never stops early.
        checkpoint: a folder for checkpoints; None: none are written.
        checkpoint_every: steps between them.
        resume: whether to go on from the checkpoint that is there, to the same result as an unbroken
            run.
        log_with: trackers of each step's figures: a name that accelerate knows ("tensorboard",
            "wandb", ...), a tracker object, or a list of those.
        logging_dir: where they write.
        seed: makes the run reproducible.
        parallel: where torchrun or ``accelerate launch`` has begun several processes: ``"inputs"``
            shares out the inputs of each step, and trains as one process would; ``"split"`` shares
            out the traces of each input, for few inputs with many traces each, and trains as one
            process would, too; ``"none"``: each process trains by itself.
        progress: whether a progress bar is shown; None: on a terminal and in a notebook.
        callback: called with each step's dict of figures.

    Raises:
        TypeError, ValueError: for an option of another type or out of range.
    """

    steps: int
    eval_every: int = 50
    eval_samples: int = 64
    patience: int | None = None
    checkpoint: str | Path | None = None
    checkpoint_every: int = 100
    resume: bool = False
    log_with: Any = None
    logging_dir: str | Path = "runs"
    seed: int | None = None
    parallel: Parallel = "inputs"
    progress: bool | None = None
    callback: Callable[[dict[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        check_choice("parallel", self.parallel, ("inputs", "split", "none"))
        self.sharing = sharing_of(self.parallel)
        self.ranks = self.sharing.ranks
        with self.ranks.together("the beginning of a run"):
            pass  # all are here
        self.checkpoints = Checkpoints(
            self.checkpoint, self.checkpoint_every, self.resume, self.seed, self.sharing
        )
        if self.callback is not None:
            check_callable("callback", self.callback)
        EarlyStopping(self.patience)  # checks it
        for name in ("steps", "eval_every", "eval_samples"):
            setattr(self, name, check_int(name, getattr(self, name)))
        fresh = runtime.fresh_seed(self.seed)
        self.random_seed = self.ranks.of_first(fresh) if self.seed is None else fresh
        self.held_out: Sequence[Input] = ()

    def hold_out(self, inputs: Sequence[Input]) -> None:
        """Evaluate on these inputs; ``ValueError`` if there are none, and patience needs them."""
        if self.patience is not None and not inputs:
            raise ValueError(f"patience={self.patience} needs eval_data=, held-out inputs")
        self.held_out = inputs

    def evaluations(self) -> dict[str, Any]:
        """When held-out inputs are evaluated and which, by what it is called in messages."""
        held_out = digest_of([input_.args for input_ in self.held_out])
        options = ("eval_every", "eval_samples", "patience")
        return {"eval_data": held_out} | {f"option {name}": getattr(self, name) for name in options}

    def evaluate(self, guide: Guide, number: int) -> dict[str, float]:
        """Figures of the held-out inputs after step ``number``; none if it is not time."""
        due = (number + 1) % self.eval_every == 0 or number == self.steps - 1
        if not self.held_out or not due:
            return {}
        began = time.perf_counter()
        with self.ranks.alone("the evaluation of held-out inputs"):
            found = evaluation.evaluate(
                guide, self.held_out, self.eval_samples, seed=self.random_seed, sharing=self.sharing
            )
        return found | {"seconds_evaluation": time.perf_counter() - began}


F = TypeVar("F", bound=Callable[..., Any])


def with_options_of(
    function: Callable[..., Any] | None = None, /, **defaults: Any
) -> Callable[[F], F]:
    """Show in a signature, for ``help`` and completion, what is taken as ``**options``: keywords of
    ``function``, of the run, of the guide's training and, as the rest, of its loss.

    Args:
        function: to which the options are passed on; None: to this module alone.
        **defaults: of options, where they are others than usual.
    """

    def shown(decorated: F) -> F:
        signature = inspect.signature(decorated)
        *own, rest = signature.parameters.values()
        passed_on = [] if function is None else inspect.signature(function).parameters.values()
        added = {p.name: p for p in passed_on if p.kind is p.KEYWORD_ONLY}
        for option in (*fields(Run), *fields(FitOptions)):
            default = defaults.get(option.name, option.default)
            added[option.name] = inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option.type
            )
        for parameter in own:
            added.pop(parameter.name, None)
        parameters = [*own, *added.values(), rest.replace(name="loss_options")]
        decorated.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return decorated

    return shown


def read_options(
    function: Callable[..., Any], steps: int, options: Mapping[str, Any]
) -> tuple[Run, FitOptions]:
    """What ``function`` was given as ``**options``: of the run, and of the guide's training. Raises
    ``TypeError`` or ``ValueError`` for one that is unknown, of another type or out of range."""
    of_run = [option.name for option in fields(Run) if option.name != "steps"]
    of_guide = {name: value for name, value in options.items() if name not in of_run}
    keywords = inspect.getfullargspec(function).kwonlyargs
    settings = FitOptions.of(of_guide, beside=["steps", *keywords, *of_run])
    return Run(steps, **{name: options[name] for name in of_run if name in options}), settings


def train(learner: Learner, run: Run, **config: Any) -> None:
    """Take the steps of a run; ``config``: what else trackers are told of it. Raises what ``fit``
    says of a run's steps."""
    trainer, checkpoints = learner.trainer, run.checkpoints
    watched, evaluated, name = learner.watched
    guard, stopping = DivergenceGuard(name), EarlyStopping(run.patience)
    parts = {**learner.parts(), "guard": guard, "stopping": stopping}
    done = checkpoints.begin(trainer, parts, learner.identity(), run.evaluations())
    learner.begin()
    trainer.forget()  # what the model was used for before moves the last bits of a prompt's states
    learner.forget()
    history = learner.history  # with what the checkpoint has of it
    config |= {"steps": run.steps, "seed": run.random_seed, "loss": trainer.options.loss.name}

    def again() -> float:
        num, seed = run.eval_samples, run.random_seed
        figures = evaluation.evaluate(
            trainer.guide, learner.inputs, num, seed=seed, sharing=run.sharing
        )
        return figures[evaluated]

    show, log_with = (run.progress, run.log_with) if run.ranks.is_first else (False, None)
    with (
        progress_bar(learner.task, run.steps, show=show) as bar,
        tracker(log_with, directory=run.logging_dir, name="lmppl", config=config) as log,
        runtime.rare_collections(),
    ):
        bar.advance(done)
        for number in range(done, done if stopping.over else run.steps):
            check_group(run.ranks, run.parallel)
            figures = learner.step(number)
            if figures is None:
                warnings.warn(
                    f"the data ended after {number} of {run.steps} steps: training ends here, with a "
                    "learning rate that has not come to its end",
                    stacklevel=3,
                )
                checkpoints.save(number, last=True)
                break
            held_out = run.evaluate(trainer.guide, number)
            figures = {"step": len(history), **figures, **held_out}
            history.append(figures)
            (rate,) = History([figures]).column("samples_per_second")
            shown = {name: figures[name] for name in learner.shown if math.isfinite(figures[name])}
            bar.advance(1, **shown, **{"samples/s": rate})
            log(figures)
            if run.callback is not None:
                run.callback(figures)
            parameters = learner.named_parameters()
            guard.watch(number, figures[watched], parameters, again)
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
