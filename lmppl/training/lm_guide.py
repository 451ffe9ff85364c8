"""LMGuide: an amortized posterior of a program, trained once and asked often."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lmppl import runtime
from lmppl.distributions import check_lm
from lmppl.guides.automatic import AutomaticGuide
from lmppl.guides.parameters import base_state, lora_config, same_base
from lmppl.guides.program import ProgramGuide
from lmppl.guides.prompts import Observations, SiteNames
from lmppl.guides.saving import read_guide, write_guide
from lmppl.lm import LM
from lmppl.primitives import default_lm, use
from lmppl.report.history import History
from lmppl.runtime.arguments import Args, check_program
from lmppl.states import check_unused, present, replace_folder
from lmppl.training.fit import fit
from lmppl.training.loop import with_options_of

if TYPE_CHECKING:
    from peft import LoraConfig


class LMGuide:
    """A trainable distribution over the latent sites of a program.

    By default it follows the program: each latent text is drawn from a LoRA-adapted copy of the
    LM (Hu et al., 2024, arXiv 2310.04363) that reads the later observations and the site's own
    prefix, other latent sites from small networks on the LM's state. Or it is a guide program that
    the user wrote, whose trainable parts are the adapters and ``pyro.param``s in it.

    ```python
    guide = lmppl.LMGuide(infill, lm=lm)
    guide.fit([(x1, y1), (x2, y2)], steps=500)
    lmppl.infer(infill, x, y, lm=lm, method="smc", guide=guide)
    ```

    Args:
        model: the program.
        lm: its language model; by default that of ``lmppl.use``. Latent texts of other models are
            left to the program.
        program: a guide program with the model's arguments, instead of the automatic guide.
        lora: peft's configuration of the adapter.
        condition_on: names of the observed sites that the automatic guide may see; ``"all"``, or for
            instance all but a label that is not known when the guide is used.
        adapter_per_site: give each latent text site an adapter of its own, instead of one that all
            share. (A site in a loop, ``f"step_{i}"``, has as many as it has names.)

    Attributes:
        model: the program.
        base: its language model.
        inner: the guide itself, an ``AutomaticGuide`` or a ``ProgramGuide``.
        history: one dict a training step: loss, log_z, elbo, ess, alive, length, seconds, ...
        notes: what training has to say of itself ("complete traces only: ...").
        tempered_target: temperature of the posterior that it has learned; None: it is untempered.

    Raises:
        TypeError: for what is no program, language model or list of names.
        ValueError: without a language model, and for ``lora`` or ``adapter_per_site`` beside
            ``program``.
    """

    inner: AutomaticGuide | ProgramGuide
    tempered_target: float | None = None

    def __init__(
        self,
        model: Callable[..., Any],
        lm: LM | None = None,
        program: Callable[..., Any] | None = None,
        lora: LoraConfig | None = None,
        condition_on: SiteNames = "all",
        adapter_per_site: bool = False,
    ) -> None:
        lm = lm if lm is not None else default_lm()
        if lm is None:
            raise ValueError("LMGuide needs a language model: pass lm= or call lmppl.use(lm)")
        check_lm("LMGuide", lm)
        check_program(model)
        names = [] if condition_on == "all" else condition_on
        is_list = isinstance(names, Collection) and not isinstance(names, str)
        if not is_list or not all(isinstance(name, str) for name in names):
            raise TypeError(f"condition_on={condition_on!r}: give 'all' or a list of names, ['y']")
        self.model, self.base, self.condition_on = model, lm, condition_on
        self.history, self.notes = History(), list[str]()
        if program is None:
            self.inner = AutomaticGuide(model, lm, condition_on, lora, adapter_per_site)
            return
        check_program(program, "program")
        if lora is not None or adapter_per_site:
            raise ValueError(
                "lora= and adapter_per_site= are for the automatic guide; a guide program makes its "
                "own adapters, q = lm.adapter(LoraConfig(...))"
            )
        self.inner = ProgramGuide(program, lm)

    # --- what it draws, reads, scores and trains: see ``lmppl.guides.guide.Guide`` ----------------

    reads_observations: Any = property(attrgetter("inner.reads_observations"))
    proposer_factory: Any = property(attrgetter("inner.proposer_factory"))
    recaller: Any = property(attrgetter("inner.recaller"))
    observations_of: Any = property(attrgetter("inner.observations_of"))
    observations_of_simulation: Any = property(attrgetter("inner.observations_of_simulation"))
    score: Any = property(attrgetter("inner.score"))
    start_training: Any = property(attrgetter("inner.start_training"))
    find_parameters: Any = property(attrgetter("inner.find_parameters"))
    identity: Any = property(attrgetter("inner.identity"))
    parts: Any = property(attrgetter("inner.parts"))
    make_parts: Any = property(attrgetter("inner.make_parts"))
    leave_out: Any = property(attrgetter("inner.leave_out"))
    adapters: Any = property(attrgetter("inner.adapters"))
    named_parameters: Any = property(attrgetter("inner.named_parameters"))
    adapted_sites: Any = property(attrgetter("inner.adapted_sites"))

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters (of a guide program: those that it has used so far)."""
        return list(self.named_parameters().values())

    def observations(self, args: Args, model: Callable[..., Any] | None = None) -> Observations:
        """What the automatic guide reads of an input, by site: the tokens that show it.

        Args:
            args: the program's arguments.
            model: the program, where it observes more than ``self.model`` (a simulated input).
        """
        return self.observations_of([(model or self.model, args)])[0]

    def prepare(
        self,
        args: Args,
        model: Callable[..., Any] | None = None,
        observations: Observations | None = None,
    ) -> None:
        """Run the guide on an input, so that all its parameters exist; ``observations``: what it
        reads there, if that is known."""
        with use(self.base):
            self.find_parameters(args)
            if observations is None:
                observations = self.observations(args, model)
            proposer = self.proposer_factory(args, observations=observations)
            particles = runtime.start(model or self.model, args, 2, seed=0, proposer=proposer)
            with runtime.ending(particles):
                runtime.run_to_end(particles)

    # --- training, saving ------------------------------------------------------------------------

    @with_options_of(fit)
    def fit(self, data: Iterable[Any] | None = None, steps: int = 500, **options: Any) -> LMGuide:
        """Train on inputs. Returns the guide itself.

        Args:
            data: the inputs: each a tuple of positional arguments of the program, or a dict of
                its arguments by name. A list or a ``datasets.Dataset``; an iterator is read as it
                is needed. None: inputs are simulated, ``simulate=N``.
            steps: optimiser steps.
            **options: ``simulate``, ``demonstrations`` and ``eval_data``, see
                ``lmppl.training.fit.fit``; those of the run, see ``lmppl.training.loop.Run``; of the
                training, see ``FitOptions``; and of its loss, see ``lmppl.losses``.
        """
        fit(self, data, steps, **options)
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that makes the guide again, given its program and its language model."""
        return {
            "model": self._name,
            "base": base_state(self.base),
            "tempered_target": self.tempered_target,
            "notes": self.notes,
            "history": self.history,
            "guide": self.inner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; ``ValueError`` says in what the state is another
        guide's."""
        self.inner.load_state_dict(state["guide"])
        self.history[:], self.notes = state["history"], list(state["notes"])
        self.tempered_target = state["tempered_target"]

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the guide to a folder, which appears whole or not at all: a standard peft adapter,
        heads and a description.

        Args:
            path: the folder.
            overwrite: replace a guide that is there.

        Raises:
            FileExistsError: if ``path`` exists, unless it is a guide and ``overwrite`` is set.
            ValueError: if a guide program has not been run yet, so that its parameters are unknown.
        """
        check_unused(Path(path), overwrite=overwrite)
        state = self.state_dict()
        replace_folder(Path(path), "guide", lambda folder: write_guide(folder, state))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Callable[..., Any],
        lm: LM | None = None,
        program: Callable[..., Any] | None = None,
    ) -> LMGuide:
        """Read a guide that ``save`` wrote.

        Args:
            path: the folder.
            model: the program that it was trained for.
            lm: the language model that it was trained on, in any dtype.
            program: its guide program, if it has one.

        Raises:
            FileNotFoundError: if there is no guide.
            ValueError: if it belongs to another base model or to another kind of guide, or a file of
                it was damaged or edited; says which.
        """
        state = read_guide(present(Path(path)))
        inner, options = state["guide"], {}
        if inner["kind"] != ("automatic" if program is None else "program"):
            needed = "give program=" if inner["kind"] == "program" else "leave out program="
            raise ValueError(f"{path} holds a guide of kind {inner['kind']!r}: {needed}")
        if program is None:
            options = {
                "lora": lora_config(inner["lora"]),
                "condition_on": inner["condition_on"],
                "adapter_per_site": inner["adapted_sites"] is not None,
            }
        guide = cls(model, lm, program, **options)
        if not same_base(state["base"], base_state(guide.base)):
            raise ValueError(
                f"{path} was trained on the base model {state['base']['name']!r}, given "
                f"{guide.base.name!r}, whose weights or tokens are others: load that model, or train "
                "anew"
            )
        guide.load_state_dict(state)
        return guide

    @property
    def _name(self) -> str:
        return getattr(self.model, "__name__", type(self.model).__name__)

    def __repr__(self) -> str:
        made_as, steps = self.inner.name, len(self.history)
        return f"LMGuide({self._name}, {made_as}, lm={self.base.name!r}, {steps} steps)"
