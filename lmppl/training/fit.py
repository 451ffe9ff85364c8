"""Training a guide on inputs: what a run of it is made of.

The run itself is in ``loop.py``, what happens within a step in ``trainer.py``, what can be set in
``options.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lmppl.exclusive import exclusive
from lmppl.guides.guide import TrainableGuide
from lmppl.primitives import use
from lmppl.processes import naming_this_process
from lmppl.training.data import read_data
from lmppl.training.loop import Learner, read_options, train
from lmppl.training.trainer import Trainer


def fit(
    guide: TrainableGuide,
    data: Iterable[Any] | None,
    steps: int,
    *,
    simulate: int | float | None = None,
    demonstrations: Sequence[Any] | None = None,
    eval_data: Iterable[Any] | int | None = None,
    **options: Any,
) -> None:
    """Train ``guide`` (further, if it has been trained before).

    Args:
        guide: what is trained, in place.
        data: inputs: tuples of the program's positional arguments, or dicts of them by name. A
            collection is gone through in rounds; an iterator is read as training needs it, each of
            its inputs is used once, and training ends when it does.
        steps: how many optimiser steps.
        simulate: train on so many simulated inputs instead: the program is run forward on the
            arguments in ``data`` (in turn; on none, if ``data`` is None), observed sites are drawn
            as well, and the latents drawn with them are exact posterior draws.
            ``math.inf``: an endless stream, each input used once. Not for programs with factors.
        demonstrations: latents known for each input of ``data``, in its order: None, a dict of
            latent site to text or number, a list of such dicts, or a ``Posterior``, whose particles
            are distilled by weight. They seed the replay buffer, and ``loss="sft"`` is made of them.
        eval_data: held-out inputs (with ``simulate``: how many to simulate for this); the best
            parameters are those of the largest ESS fraction on them.
        **options: of the run, see ``lmppl.training.loop.Run``, and of training, see ``FitOptions``.

    Raises:
        TypeError: an input that is no tuple or dict, or does not fit the program; says which one.
        ValueError: for options out of range, a loss that the data do not allow, a checkpoint of
            another run, or if no trace of any input was ever alive.
        FloatingPointError: if the loss is not finite, or training diverges; the last good
            parameters are kept.
        KeyboardInterrupt: is passed on; the guide so far is kept and usable, as is the checkpoint.
    """
    run, settings = read_options(fit, steps, options)
    seed = run.random_seed
    generator = torch.Generator().manual_seed(seed % 2**63)
    with naming_this_process(), exclusive(), use(guide.base):
        with run.ranks.together("the preparation of training"):
            source, held_out, example = read_data(
                guide,
                data,
                simulate,
                demonstrations,
                eval_data,
                settings,
                seed,
                generator,
                run.progress if run.ranks.is_first else False,
            )
            run.hold_out(held_out)
            guide.start_training(several_inputs=source.num_inputs != 1)
            guide.tempered_target = settings.tempered_target
            guide.prepare(example.args, example.program, example.observations)
        trainer = Trainer(guide, source, run.steps, settings, seed, generator, run.sharing)
        train(_GuideLearner(trainer), run)


class _GuideLearner(Learner):
    """A guide that learns."""

    task = "training the guide"
    shown = "loss", "log_z", "elbo", "ess", "length"
    watched = "elbo", "eval_elbo", "ELBO"
    judged = "eval_ess", "ESS"

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.history = trainer, trainer.guide.history

    def step(self, number: int) -> dict[str, Any] | None:
        figures = self.trainer.step(number)
        self.inputs = self.trainer.inputs
        return figures

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.trainer.guide.named_parameters()
