"""LMGuide: an amortized posterior of a program, trained once and asked often."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lmppl import runtime
from lmppl.guides.automatic import AutomaticProposer, SiteScore, TrainedSites, score_draws
from lmppl.guides.parameters import SavedParams, Trainables, trainable
from lmppl.guides.program import PriorProposer, ProgramProposer, score_program
from lmppl.guides.prompts import Observations, find_observations, number_comes_first, show
from lmppl.lm import LM
from lmppl.primitives import default_lm, use
from lmppl.report.history import History
from lmppl.runtime import Proposer
from lmppl.runtime.arguments import check_program
from lmppl.runtime.records import Recaller

if TYPE_CHECKING:
    from peft import LoraConfig

    from lmppl.runtime.simulation import Simulated


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
        history: one dict a training step: loss, log_z, elbo, ess, alive, length, seconds, ...
        notes: what training has to say of itself ("complete traces only: ...").
    """

    def __init__(
        self,
        model: Callable[..., Any],
        lm: LM | None = None,
        program: Callable[..., Any] | None = None,
        lora: LoraConfig | None = None,
        condition_on: Literal["all"] | Collection[str] = "all",
        adapter_per_site: bool = False,
    ) -> None:
        lm = lm if lm is not None else default_lm()
        if lm is None:
            raise ValueError("LMGuide needs a language model: pass lm= or call lmppl.use(lm)")
        check_program(model)
        if program is not None:
            check_program(program, "program")
        if isinstance(condition_on, str) and condition_on != "all":
            raise ValueError(
                f"condition_on={condition_on!r}: give 'all' or a list of names, [{condition_on!r}]"
            )
        if program is not None and (lora is not None or adapter_per_site):
            raise ValueError(
                "lora= and adapter_per_site= are for the automatic guide; a guide program makes its "
                "own adapters, q = lm.adapter(LoraConfig(...))"
            )
        self.model, self.base, self.program = model, lm, program
        self._given_program = program
        self.condition_on = condition_on
        self.adapter_per_site = adapter_per_site
        self.history = History()
        self.notes: list[str] = []
        self.heads = nn.ModuleDict()
        self._lora = lora
        self._adapters: dict[str, LM] = {}  # of sites; under "" the one that all share
        if program is None and not adapter_per_site:
            self._adapters[""] = _adapter(lm, lora)
        self._trainables = Trainables(lm)  # of a guide program
        self._pending: dict[str, Any] | None = None  # loaded state of a program not yet run
        self.saved_params = SavedParams()  # of a guide program, which it has not come to yet
        self.strict_prompts = False  # set by fit: several inputs must be told apart
        self.tempered_target: float | None = None
        self.sites = TrainedSites()

    def adapter_for(self, name: str) -> LM:
        """The language model from which the automatic guide draws a latent text site."""
        key = name if self.adapter_per_site else ""
        if key not in self._adapters:
            self._adapters[key] = _adapter(self.base, self._lora)
        return self._adapters[key]

    @property
    def adapted_sites(self) -> list[str]:
        """Of ``adapters()``, the sites that they are for; ``""`` for all."""
        return list(self._adapters)

    # --- drawing -------------------------------------------------------------------------------

    def proposer_factory(
        self,
        args: tuple[Any, ...],
        *,
        temperature: float = 1.0,
        observations: Observations | None = None,
    ) -> Callable[[int, int], Proposer]:
        """What makes the proposer of each particle on one input, from its slot and a seed.

        Args:
            args: the program's arguments.
            temperature: texts are drawn from ``q ** (1 / temperature)`` (automatic guides only);
                ``math.inf``: all is drawn from the model, and remembered for the guide to score.
            observations: what ``observations(args)`` found, as training knows it. Without, the guide
                is put to use, and warns of sites that it was not trained for.
        """
        with use(self.base):
            if self.program is not None:
                self.restore_pending(args)
                program = self.program
                if temperature == math.inf:
                    return lambda slot, seed: PriorProposer(program, args)
                return lambda slot, seed: ProgramProposer.make(program, args, slot, seed)
            seen = self.observations(args) if observations is None else observations
            sites = self.sites if observations is None else None
            return lambda slot, seed: AutomaticProposer(self, seen, temperature, sites)

    def recaller(self, args: tuple[Any, ...], observations: Observations) -> Recaller:
        """A proposer for traces whose latents are known, which remembers them as its own draws.

        Args:
            args: the program's arguments.
            observations: what ``observations(args)`` found.
        """
        if self.program is not None:
            return PriorProposer(self.program, args)
        return AutomaticProposer(self, observations)

    def observations(
        self, args: tuple[Any, ...], model: Callable[..., Any] | None = None
    ) -> Observations:
        """What the automatic guide reads of an input.

        Args:
            args: the program's arguments.
            model: the program, where it observes more than ``self.model`` (a simulated input).
        """
        return self.observations_of([(model or self.model, args)])[0]

    def observations_of(
        self, inputs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]
    ) -> list[Observations]:
        """The same of many inputs, pairs of program and arguments, in one batch of runs."""
        if self.program is not None:
            return [{} for _ in inputs]
        with use(self.base):
            return find_observations(
                inputs, self.base.vocabulary, self.condition_on, strict=self._strict
            )

    def observations_of_simulation(
        self, one: Simulated, program: Callable[..., Any]
    ) -> Observations | None:
        """The same of a simulated input, whose runs all observe what was simulated.

        Args:
            one: the simulation.
            program: the program that observes it.

        Returns:
            None if runs of the program have to tell, since it also observes what was not simulated.
        """
        if self.program is not None:
            return {}
        if not one.is_all_observed or number_comes_first(one.sites):
            return None
        sites = {
            name: node
            for name, node in one.sites.items()
            if name in one.observations
            and (self.condition_on == "all" or name in self.condition_on)
        }
        return show(sites, program, self.base.vocabulary, strict=self._strict)

    @property
    def _strict(self) -> bool:
        """Whether what the guide reads must be certain, lest it takes one input for another."""
        return self.strict_prompts or self.condition_on != "all"

    # --- scoring -------------------------------------------------------------------------------

    def score(self, proposers: Sequence[Any], *, grad: bool = True) -> list[dict[str, SiteScore]]:
        """log q of what the proposers drew, with gradients: per proposer, by site.

        One teacher-forced pass over finished samples; never through the decoding loop.
        """
        if self.program is None:
            if grad:
                for proposer in proposers:
                    proposer.learn_sites(self.sites)
            return score_draws(self, list(proposers), grad=grad)
        # Some inputs and branches may have parameters that the first runs did not use.
        seen = self._trainables.add if grad else None
        return score_program(self.program, proposers, grad=grad, seen=seen)

    # --- parameters ------------------------------------------------------------------------------

    def prepare(
        self,
        args: tuple[Any, ...],
        model: Callable[..., Any] | None = None,
        observations: Observations | None = None,
    ) -> None:
        """Run the guide on an input, so that all its parameters exist and are known.

        Args:
            args: the program's arguments.
            model: the program, where it observes more than ``self.model`` (a simulated input).
            observations: what it reads of the input; None: to be found out.
        """
        model = model or self.model
        with use(self.base):
            if self.program is not None:
                self._find_trainables(args)
            if observations is None:
                observations = self.observations(args, model)
            factory = self.proposer_factory(args, observations=observations)
            particles = runtime.start(model, args, 2, seed=0, proposer=factory)
            with runtime.ending(particles):
                runtime.run_to_end(particles)

    def adapters(self) -> list[LM]:
        """The language models with trainable parameters, in the order in which it uses them."""
        return [*self._trainables.adapters, *self._adapters.values()]

    @property
    def param_names(self) -> list[str]:
        """The ``pyro.param``s of a guide program."""
        return self._trainables.param_names

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters (of a guide program: those that it used when prepared)."""
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The same by name."""
        named = self._trainables.named_parameters()
        for i, adapter in enumerate(self._adapters.values()):
            named |= {f"adapter-{i}.{name}": p for name, p in trainable(adapter).items()}
        return named | {f"heads.{name}": p for name, p in self.heads.named_parameters()}

    def _find_trainables(self, args: tuple[Any, ...]) -> None:
        assert self.program is not None
        with use(self.base):
            self._trainables.find(self.program, args)
        if not self._trainables.named_parameters():
            raise ValueError(
                "the guide program has nothing to train: draw its texts from an adapter, "
                "lm_sample(..., lm=q) with q = lm.adapter(), or use pyro.param"
            )

    # --- training, saving ------------------------------------------------------------------------

    def fit(self, data: Iterable[Any] | None = None, steps: int = 500, **options: Any) -> LMGuide:
        """Train on inputs; see ``lmppl.training.fit.fit`` for the options.

        Args:
            data: the inputs: each a tuple of positional arguments of the program, or a dict of
                its arguments by name. A list or a ``datasets.Dataset``; an iterator is read as it
                is needed. None: inputs are simulated, ``simulate=N``.
            steps: optimiser steps.

        Returns:
            The guide itself.
        """
        from lmppl.training.fit import fit

        fit(self, data, steps, **options)
        return self

    def save(self, path: str | Path) -> None:
        """Write the guide to a folder: a standard peft adapter, heads and a description.

        The folder appears whole or not at all.
        """
        from lmppl.guides.saving import save

        save(self, Path(path))

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
            lm: the language model that it was trained on.
            program: the guide program, if it has one.

        Raises:
            FileNotFoundError: if there is no guide.
            ValueError: if it belongs to another base model, or to another kind of guide.
        """
        from lmppl.guides.saving import load

        return load(Path(path), model, lm, program)

    def restore_later(self, state: dict[str, Any]) -> None:
        """Loaded parameters of a guide program, which are not known before it is run."""
        assert self._given_program is not None
        self._pending = state
        self.saved_params = SavedParams()
        self.program = self.saved_params.around(self._given_program)

    def restore_pending(self, args: tuple[Any, ...] | None) -> None:
        """Put them in, by a run on an input (None: it was run before). Those that it does not come
        to are put in later."""
        if self._pending is not None:
            from lmppl.guides.saving import restore_program

            state = self._pending
            self.saved_params.waiting = dict(state["params"])
            if args is not None:
                self._find_trainables(args)
            restore_program(self.adapters(), self.param_names, state)
            self.saved_params.put_in(self.param_names)
            self._pending = None  # not before: after an error it is tried again

    def __repr__(self) -> str:
        kind = "automatic" if self.program is None else getattr(self.program, "__name__", "program")
        name = getattr(self.model, "__name__", type(self.model).__name__)
        return f"LMGuide({name}, {kind}, lm={self.base.name!r}, {len(self.history)} steps)"


def _adapter(lm: LM, lora: LoraConfig | None) -> LM:
    """A new adapter, with the same first weights every time, so that a seed of ``fit`` is enough
    to reproduce a guide."""
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return lm.adapter(lora)
