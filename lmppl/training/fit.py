"""The life of a run of training: its inputs, evaluations, checkpoints and end.

What happens within a step is in ``trainer.py``, what can be set in ``options.py``.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmppl import runtime
from lmppl.checks import check_int
from lmppl.guides.guide import TrainableGuide
from lmppl.primitives import use
from lmppl.report.history import History
from lmppl.report.progress import progress_bar
from lmppl.training.callbacks import DivergenceGuard, EarlyStopping
from lmppl.training.checkpoints import Checkpoints, Part
from lmppl.training.data import read_data
from lmppl.training.evaluation import HeldOut, evaluate
from lmppl.training.options import FitOptions
from lmppl.training.tracking import tracker
from lmppl.training.trainer import Trainer

_SHOWN = ("loss", "log_z", "elbo", "ess", "length")


@dataclass(frozen=True)
class Run:
    """What surrounds the steps of a run.

    Args:
        steps: optimiser steps.
        seed: of all random choices.
        checkpoints: where its state is kept.
        log_with: trackers of figures: a name that accelerate knows ("tensorboard", "wandb", ...),
            a tracker object, or a list of those.
        logging_dir: where they write.
    """

    steps: int
    seed: int
    checkpoints: Checkpoints
    log_with: Any
    logging_dir: str | Path

    def __post_init__(self) -> None:
        check_int("steps", self.steps)


def fit(
    guide: TrainableGuide,
    data: Iterable[Any] | None,
    steps: int,
    *,
    simulate: int | float | None = None,
    demonstrations: Sequence[Any] | None = None,
    eval_data: Iterable[Any] | int | None = None,
    eval_every: int = 50,
    eval_samples: int = 64,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    log_with: Any = None,
    logging_dir: str | Path = "runs",
    seed: int | None = None,
    progress: bool | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> None:
    """Train ``guide`` (further, if it has been trained before).

    Args:
        guide: the guide.
        data: inputs: tuples of the program's positional arguments, or dicts of them by name. A
            collection is gone through in rounds; an iterator is read as training needs it, each of
            its inputs is used once, and training ends when it does.
        steps: optimiser steps.
        simulate: train on so many simulated inputs instead: the program is run forward on the
            arguments in ``data`` (in turn; on none, if ``data`` is None), observed sites are drawn
            as well, and the latents drawn with them are exact posterior draws.
            ``math.inf``: an endless stream, each input used once. Not for programs with factors.
        demonstrations: latents known for each input of ``data``, in its order: None, a dict of
            latent site to text or number, a list of such dicts, or a ``Posterior``, whose particles
            are distilled by weight. They seed the replay buffer, and ``loss="sft"`` is made of them.
        eval_data: held-out inputs (with ``simulate``: how many to simulate for this).
        eval_every, eval_samples: steps between evaluations on them, and draws for each.
        patience: evaluations without a better ESS fraction after which training stops, with the
            parameters of the best; None: it never stops early.
        log_with, logging_dir: see ``Run``.
        checkpoint, checkpoint_every, resume: a folder for checkpoints, steps between them, and
            whether to go on from the one that is there.
        seed: makes the run reproducible.
        progress: show a progress bar; None: on a terminal.
        callback: called with each step's dict of figures (kept in ``guide.history``).
        **options: see ``FitOptions``.

    Raises:
        TypeError: an input that is no tuple or dict, or does not fit the program; says which one.
        ValueError: for options out of range, a loss that the data do not allow, a checkpoint of
            another run, or if no trace of any input was ever alive.
        FloatingPointError: if the loss is not finite, or training diverges; the last good
            parameters are kept.
        KeyboardInterrupt: is passed on; the guide so far is kept and usable, as is the checkpoint.
    """
    own = inspect.signature(fit).parameters.values()
    settings = FitOptions.of(options, [each.name for each in own if each.kind is each.KEYWORD_ONLY])
    run = Run(
        steps,
        runtime.fresh_seed(seed),
        Checkpoints.of(checkpoint, checkpoint_every, resume, seed),
        log_with,
        logging_dir,
    )
    held_out = HeldOut(eval_every, eval_samples, run.seed)
    generator = torch.Generator().manual_seed(run.seed % 2**63)
    with use(guide.base):
        source, eval_inputs, example = read_data(
            guide,
            data,
            simulate,
            demonstrations,
            eval_data,
            settings,
            run.seed,
            generator,
            progress,
        )
        held_out = replace(held_out, inputs=eval_inputs)
        stopping = held_out.stopping(patience)
        guide.start_training(several_inputs=source.num_inputs != 1)
        guide.tempered_target = settings.tempered_target
        guide.prepare(example.args, example.program, example.observations)
        trainer = Trainer(guide, source, steps, settings, run.seed, generator)
        _Loop(trainer, held_out, stopping, run, callback).run(progress)


class _Loop:
    """The steps of a run, and what happens between them."""

    def __init__(
        self,
        trainer: Trainer,
        held_out: HeldOut,
        stopping: EarlyStopping,
        run: Run,
        callback: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._trainer, self._held_out, self._run = trainer, held_out, run
        self._callback = callback
        self._guide = trainer.guide
        self._guard, self._stopping = DivergenceGuard(), stopping

    def run(self, progress: bool | None) -> None:
        run, trainer = self._run, self._trainer
        checkpoints = run.checkpoints
        parts: dict[str, Part] = {"guard": self._guard, "stopping": self._stopping}
        done = checkpoints.begin(trainer, parts)
        config = {"steps": run.steps, "seed": run.seed, "loss": trainer.options.loss.name}
        with (
            progress_bar("training the guide", run.steps, show=progress) as bar,
            tracker(run.log_with, directory=run.logging_dir, name="lmppl", config=config) as track,
        ):
            bar.advance(done)
            for number in range(done, done if self._stopping.over else run.steps):
                figures = trainer.step(number)
                if figures is None:
                    warnings.warn(
                        f"the data ended after {number} of {run.steps} steps: training ends here, "
                        "with a learning rate that has not come to its end",
                        stacklevel=4,
                    )
                    checkpoints.save(number, last=True)
                    break
                figures = {"step": len(self._guide.history), **figures}
                stop = self._evaluate(number, figures)
                self._guide.history.append(figures)
                bar.advance(**_shown(figures))
                track.log(figures, figures["step"])
                if self._callback is not None:
                    self._callback(figures)
                self._guard.watch(
                    number, figures["elbo"], self._guide.named_parameters(), self._elbo_again
                )
                if stop:
                    self._guide.notes.append(
                        f"stopped after {number + 1} steps: no better held-out ESS since step "
                        f"{self._stopping.best_step}"
                    )
                last = stop or number == run.steps - 1
                checkpoints.save(number + 1, last=last)
                if stop:
                    break
        self._stopping.finish(self._guide.named_parameters())
        trainer.report_dead()

    def _elbo_again(self) -> float:
        """Of the last step's inputs, under the parameters as they now are."""
        samples, seed = self._held_out.num_samples, self._held_out.seed
        return evaluate(self._guide, self._trainer.inputs, samples, seed=seed)["eval_elbo"]

    def _evaluate(self, number: int, figures: dict[str, Any]) -> bool:
        """Adds held-out figures to a step's, when it is time. Returns whether to stop."""
        found = self._held_out.figures(self._guide, number, self._run.steps)
        figures |= found
        if not found:
            return False
        return self._stopping.should_stop(number, found["eval_ess"], self._guide.named_parameters())


def _shown(figures: Mapping[str, Any]) -> dict[str, Any]:
    (rate,) = History([dict(figures)]).column("samples_per_second")
    shown = {name: figures[name] for name in _SHOWN if math.isfinite(figures[name])}
    return {**shown, "samples/s": rate}
