"""Training a guide on inputs: what a run of it is made of.

The run itself is in ``loop.py``, what happens within a step in ``trainer.py``, what can be set in
``options.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmppl.exclusive import exclusive
from lmppl.guides.guide import TrainableGuide
from lmppl.primitives import use
from lmppl.report.history import History
from lmppl.training.checkpoints import Part
from lmppl.training.data import read_data
from lmppl.training.evaluation import evaluate
from lmppl.training.loop import Run, train
from lmppl.training.options import FitOptions
from lmppl.training.trainer import Trainer


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
        log_with, logging_dir: see ``lmppl.training.loop.Run``.
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
    settings = FitOptions.of(options, beside=fit)
    run = Run.of(
        steps,
        seed,
        eval_every=eval_every,
        eval_samples=eval_samples,
        patience=patience,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        log_with=log_with,
        logging_dir=logging_dir,
        progress=progress,
        callback=callback,
    )
    generator = torch.Generator().manual_seed(run.seed % 2**63)
    with exclusive(), use(guide.base):
        source, held_out, example = read_data(
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
        run = replace(run, held_out=run.held_out.with_inputs(held_out, patience))
        guide.start_training(several_inputs=source.num_inputs != 1)
        guide.tempered_target = settings.tempered_target
        guide.prepare(example.args, example.program, example.observations)
        trainer = Trainer(guide, source, run.steps, settings, run.seed, generator)
        train(_GuideLearner(trainer, run), run)


class _GuideLearner:
    """A guide that learns."""

    task = "training the guide"
    shown: tuple[str, ...] = ("loss", "log_z", "elbo", "ess", "length")
    watched = "elbo", "ELBO"
    judged = "eval_ess", "ESS"

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self.trainer, self._held_out = trainer, run.held_out

    @property
    def history(self) -> History:
        return self.trainer.guide.history

    def step(self, number: int) -> dict[str, Any] | None:
        return self.trainer.step(number)

    def watched_again(self) -> float:
        samples, seed = self._held_out.num_samples, self._held_out.seed
        found = evaluate(self.trainer.guide, self.trainer.inputs, samples, seed=seed)
        return found["eval_elbo"]

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.trainer.guide.named_parameters()

    def parts(self) -> dict[str, Part]:
        return {}

    def identity(self) -> dict[str, Any]:
        return {}

    def forget(self) -> None:
        """The trainer has forgotten all."""
