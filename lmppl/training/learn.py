"""Learning the program itself: maximum likelihood by expectation maximisation, with a guide.

    for every step:
        E: some training steps of the guide, towards the posterior under the present model
        M: latents ~ a mixture m of the guide, the program and the best traces so far,
           self-normalised weights w of R / m;
           one ascent step of sum w log p(latents, observations) in the model's parameters
        stored rewards are scored anew when they are next used

The gradient of the M-step is that of log p(observations), in expectation over the posterior (Fisher's
identity). ``method="wake-sleep"`` trains the guide on what the model dreams, in place of the E-step
(Hinton et al., 1995; Bornschein & Bengio, 2015, arXiv 1406.2751).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from lmppl import runtime
from lmppl.checks import check_choice, check_int
from lmppl.exclusive import exclusive
from lmppl.guides.guide import TrainableGuide
from lmppl.guides.parameters import SavedParams
from lmppl.primitives import use
from lmppl.processes import naming_this_process
from lmppl.report.history import History
from lmppl.training.checkpoints import Part
from lmppl.training.data import Dreams, check_simulated, held_out_inputs
from lmppl.training.inputs import Collection, read_inputs
from lmppl.training.loop import Learner, Run, read_options, train, with_options_of
from lmppl.training.m_step import MStep
from lmppl.training.trainer import Trainer, mean

_FEWEST_EFFECTIVE = 3.0
_SOONER: dict[str, Any] = {
    "eval_every": 20,
    "checkpoint_every": 20,
}  # M-steps cost more than steps of a guide


@with_options_of(**_SOONER)
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
        num_samples: draws for each input of an M-step: ``prior_fraction`` of them the program's own,
            ``replay_fraction`` of the best traces so far, the others the guide's.
        model_learning_rate: AdamW's for the program's parameters; None: the guide's. It warms up
            and decays as the guide's does, so in all it moves a parameter by at most about half of
            ``steps * model_learning_rate``.
        eval_data: held-out inputs, observations included; the best parameters, the program's and the
            guide's, are those of the largest ``eval_log_z``, the bound of their log evidence.
        **options: of the run, in M-steps, see ``lmppl.training.loop.Run`` (``eval_every`` and
            ``checkpoint_every`` are 20), and of the guide's training, see ``FitOptions``.

    Returns:
        One dict a step: ``log_evidence`` (mean estimate over the step's inputs, nats),
        ``model_loss``, ``model_ess`` and the guide's figures; on held-out inputs ``eval_log_z``, the
        mean lower bound of their log evidence (nats), and the others of ``fit``.

    Raises:
        TypeError: for what is no guide, or an argument of another type.
        ValueError: if the program has nothing to learn, options are out of range, the checkpoint is
            of another run, or no trace of any input was ever alive. (Inputs of which that is true
            while others live are warned of.)
        FloatingPointError: if a loss is not finite, or learning diverges; the last good parameters
            are kept.
    """
    if not hasattr(guide, "named_parameters"):
        raise TypeError(
            f"learn takes a guide of the program, lmppl.LMGuide(program, lm=lm), given "
            f"{type(guide).__name__}"
        )
    check_choice("method", method, ("em", "wake-sleep"))
    guide_steps = check_int("guide_steps", guide_steps)
    num_samples = check_int("num_samples", num_samples)
    if method == "wake-sleep":
        check_simulated(guide)
        options.setdefault("loss", "sft")
    options = {**_SOONER, **options}
    run, settings = read_options(learn, steps, options)
    saved = SavedParams()
    with naming_this_process(), exclusive(), use(guide.base), _restoring(guide, saved):
        with run.ranks.together("the preparation of learning"):
            run.hold_out(held_out_inputs(guide, eval_data, settings))
            inputs = list(read_inputs(guide.model, data, settings))
            m_step = MStep(
                guide,
                inputs,
                settings,
                model_learning_rate,
                run.steps,
                num_samples,
                run.sharing,
                saved,
            )
            guide.start_training(several_inputs=len(inputs) > 1)
            guide.tempered_target = settings.tempered_target
            guide.prepare(inputs[0].args)
        learner = _ProgramLearner(m_step, method, guide_steps, run)
        train(learner, run, method=method)
        guide.notes += _poor_draws(learner.history, num_samples)
    for name in saved.waiting:
        warnings.warn(
            f"the parameter {name!r} had been learned, but no run of the program came to it since "
            "learning was resumed: its value is in the checkpoint alone",
            stacklevel=3,
        )
    return learner.history


class _ProgramLearner(Learner):
    """A program that learns, with its guide.

    Args:
        m_step: of the program's parameters.
        method, guide_steps: see ``learn``.
        run: of which it is.
    """

    task = "learning the program"
    shown = "log_evidence", "model_ess", "elbo"
    watched = "log_evidence", "eval_log_z", "log evidence"
    judged = "eval_log_z", "log evidence"

    def __init__(self, m_step: MStep, method: str, guide_steps: int, run: Run) -> None:
        self.history = History()
        self._m_step, self._method, self._guide_steps = m_step, method, guide_steps
        guide, inputs, options = m_step.guide, m_step.inputs, m_step.options
        guide_seed, self._seed = runtime.slot_seeds(run.random_seed, 2)
        generator = torch.Generator().manual_seed(guide_seed % 2**63)
        self._data = Collection(inputs, generator)
        self._dreams = Dreams(guide, inputs, options, guide_seed) if method != "em" else None
        source, steps = self._dreams or self._data, run.steps * guide_steps
        self.trainer = Trainer(guide, source, steps, options, guide_seed, generator, run.sharing)

    def step(self, number: int) -> dict[str, Any] | None:
        """Some training steps of the guide, and an M-step."""
        figures: dict[str, Any] = {}
        for k in range(self._guide_steps):
            figures = self.trainer.step(number * self._guide_steps + k) or figures
        guide_history = self.trainer.guide.history
        guide_history.append({**figures, "step": len(guide_history)})
        self.inputs = self._data.next(self._m_step.options.inputs_per_step)
        found = self._m_step.step(self.inputs, number, runtime.nth_seed(self._seed, number))
        for input_ in self._data.kept:
            input_.forget_scores()
        return {**figures, **found}

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        guide, model = self.trainer.guide.named_parameters(), self._m_step.named_parameters()
        named = {f"guide.{name}": parameter for name, parameter in guide.items()}
        return named | {f"model.{name}": parameter for name, parameter in model.items()}

    def begin(self) -> None:
        super().begin()
        self._m_step.begin()

    def parts(self) -> dict[str, Part]:
        return {"m_step": self._m_step, "learner": self}

    def identity(self) -> dict[str, Any]:
        made = {"method": self._method, "guide_steps": self._guide_steps}
        return made | self._m_step.identity()

    def forget(self) -> None:
        self._m_step.forget()
        if self._dreams is not None:
            self._dreams.forget()

    def state_dict(self) -> dict[str, Any]:
        """Which inputs come next, and the figures so far."""
        return {"source": self._data.state_dict(), "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._data.load_state_dict(state["source"])
        self.history += state["history"]


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
