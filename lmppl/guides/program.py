"""A guide that the user wrote: a Pyro program that draws the model's latent sites.

The guide program runs in step with the model: when the model comes to a latent site, the guide is
advanced until it has drawn a site of that name. So a guide works in SMC as in importance
sampling, whatever the order of its sites.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace

from lmppl import runtime
from lmppl.distributions import LMText, SiteScore
from lmppl.guides.guide import Guide
from lmppl.guides.parameters import SavedParams, Trainables, adapter_state, load_adapter_state
from lmppl.guides.prompts import Observations
from lmppl.lm import LM
from lmppl.runtime import (
    ChoiceWait,
    DrawWait,
    Given,
    Particle,
    Proposer,
    ProposerFactory,
    latents_of,
    suspend,
)
from lmppl.runtime.arguments import Args, check_program, name_of


class ProgramGuide(Guide):
    """A guide program as a ``Guide``. What is trained are its adapters and ``pyro.param``s.

    Args:
        program: takes the model's arguments, and draws latent sites of the same names.
        base: the language model of sites that name none, which is never trained; None: it is that of
            ``lmppl.use``, and the guide is not trained.
    """

    reads_observations = False
    adapted_sites: list[str] = []

    def __init__(self, program: Callable[..., Any], base: LM | None = None) -> None:
        self.program = self._given_program = program
        self.name = name_of(program)
        self._trainables = Trainables(base)
        self.param_names = self._trainables.param_names
        self._saved = SavedParams()
        self._pending: Mapping[str, Any] | None = None  # loaded state of a program not run since

    def proposer_factory(
        self, args: Args, *, temperature: float = 1.0, observations: Observations | None = None
    ) -> ProposerFactory:
        self._restore(args)
        program = self.program
        if temperature == math.inf:
            return lambda slot, seed: PriorProposer(program, args)
        return lambda slot, seed: ProgramProposer(
            Particle(program, args, seed=seed, is_guide=True, slot=slot)
        )

    def recaller(self, args: Args, observations: Observations) -> PriorProposer:
        self._restore(args)
        return PriorProposer(self.program, args)

    def score(self, proposers: Sequence[Any], *, grad: bool = True) -> list[dict[str, SiteScore]]:
        # A trace that a hard condition ended is scored up to the first site that it has not.
        runs = []
        for slot, proposer in enumerate(proposers):
            given = {name: Given(node["value"]) for name, node in proposer.draws.items()}
            options: Any = {"score_closing": True, "grad": grad, "is_guide": True, "slot": slot}
            runs.append(Particle(self.program, proposer.args, seed=slot, given=given, **options))
        with runtime.ending(runs):
            runtime.resume(runs)
            runtime.run_to_draws(runs, grad=grad)
            if grad:  # some branches may have parameters that the first runs did not use
                self._trainables.add(runs)
            return [_scores(run, proposer) for run, proposer in zip(runs, proposers, strict=True)]

    # --- parameters and state --------------------------------------------------------------------

    def find_parameters(self, args: Args) -> None:
        self._trainables.find(self.program, args, is_guide=True)
        if not self.named_parameters():
            raise ValueError(
                "the guide program has nothing to train: draw its texts from an adapter, "
                "lm_sample(..., lm=q) with q = lm.adapter(), or use pyro.param"
            )

    def leave_out(self, names: Collection[str]) -> None:
        self._trainables.leave_out(names)

    def adapters(self) -> list[LM]:
        return list(self._trainables.adapters)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._trainables.named_parameters()

    def identity(self) -> dict[str, Any]:
        return {"guide program": self.program}

    def state_dict(self) -> dict[str, Any]:
        if self._pending is not None:
            return dict(self._pending)
        if not self.named_parameters():
            raise ValueError(
                "the guide program has not been run yet, so its parameters are not known: fit it, or "
                "draw from it, before it is saved"
            )
        store = pyro.get_param_store()
        params = {name: store._params[name].detach() for name in self.param_names}
        return {
            "kind": "program",
            "adapters": [adapter_state(adapter) for adapter in self.adapters()],
            "params": params | self._saved.waiting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pending, self._saved = state, SavedParams()
        self.program = self._saved.around(self._given_program)
        if self.named_parameters():
            self._restore(None)  # else when it is first run

    def _restore(self, args: Args | None) -> None:
        """Put in what was loaded, after runs on an input (None: it was run before). Parameters that it
        does not come to wait for it."""
        if self._pending is None:
            return
        adapters, params = self._pending["adapters"], self._pending["params"]
        self._saved.waiting = dict(params)
        if args is not None:
            self._trainables.find(self.program, args, is_guide=True)
        known = not params or bool(set(self.param_names) & set(params))
        if len(self.adapters()) != len(adapters) or not known:
            raise ValueError(
                f"the saved guide program had {len(adapters)} adapters and the parameters "
                f"{sorted(params)}, this one has {len(self.adapters())} and "
                f"{sorted(self.param_names)}"
            )
        for adapter, state in zip(self.adapters(), adapters, strict=True):
            load_adapter_state(adapter, state)
        self._saved.put_in(self.param_names)
        self._pending = None  # not before: after an error it is tried again


class ProgramProposer(Proposer):
    """Proposes what one run of a guide program draws; ``trace`` is that of the model's run."""

    def __init__(self, run: Particle) -> None:
        self.run, self.args = run, run.args
        self.trace = Trace()
        # Sites that it leaves to the model where it goes on to another one: pairs of both.
        self._left: set[tuple[str, str]] = set()

    @property
    def draws(self) -> dict[str, Any]:
        """The sites that it drew, by name."""
        return self.run.latents

    def propose(self, site: Any, trace: Trace) -> Given | None:
        name, self.trace = site["name"], trace
        node = self._advance_to(name)
        if node is None:
            return None  # as in Pyro, the guide may leave a latent to the model
        value = node["value"]
        if isinstance(site["fn"], LMText) or isinstance(node["fn"], LMText):
            value = _text_value(name, site["fn"], node["fn"], value)
        elif value.shape != site["fn"].shape():
            raise ValueError(
                f"site '{name}': the guide draws a value of shape {tuple(value.shape)}, the model "
                f"has shape {tuple(site['fn'].shape())}"
            )
        return Given(value, proposal_log_prob=node["unscaled_log_prob"].sum())

    def condition(self, site: Any, trace: Trace, value: torch.Tensor) -> torch.Tensor | None:
        """See ``MixtureProposer``. The guide is run again up to there."""
        name, old = site["name"], self.run
        if old.finished and name not in old.latents:
            return None
        before = dict(itertools.takewhile(lambda item: item[0] != name, old.sites.items()))
        seed = int(torch.randint(2**62, ()))
        self.run = old.rerun(before, {name: Given(value)}, seed=seed)
        old.close()
        node = self._advance_to(name)
        if node is None:
            return None
        check_alike(name, site["fn"], node["fn"])
        return node["unscaled_log_prob"].sum()

    def law(self, site: Any, trace: Trace) -> Any:
        """The distribution that the guide draws a site from, after the latents in ``trace``; None: it
        leaves the site to the model. See ``laws.Laws``. The guide is run again up to there."""
        name = site["name"]
        run = self._run_after(latents_of(trace), enumerate_latents=True)
        try:
            run.resume()
            while run.waiting is not None and not isinstance(run.waiting, (DrawWait, ChoiceWait)):
                run.resume(suspend(run.waiting))
            wait = run.waiting
        finally:
            run.close()
        if wait is not None and wait.name == name:
            return wait.fn
        if wait is not None and (name, wait.name) not in self._left:
            self._check_left(name, wait.name, latents_of(trace))
        return None

    def _check_left(self, name: str, other: str, latents: Mapping[str, Any]) -> None:
        """Remember that the guide, which goes on to another site, leaves this one to the model. Raises
        ``ValueError`` if it does draw it, after the other."""
        run = self._run_after(latents)
        try:
            run.resume()
            while not run.finished and name not in run.trace.nodes:
                run.resume(suspend(run.waiting))
        finally:
            run.close()
        if name in run.latents:
            raise ValueError(
                f"the guide draws site '{other}' before '{name}', the program after it. For Markov "
                f"moves a guide must draw in the program's order: its law of '{name}' alone is not "
                "known otherwise"
            )
        self._left.add((name, other))

    def _run_after(self, latents: Mapping[str, Any], **options: Any) -> Particle:
        """A run of the guide, not begun, in which latents (their nodes, by site) are given."""
        given = {name: Given(node["value"], torch.zeros(())) for name, node in latents.items()}
        options |= {"given": given, "is_guide": True}
        return Particle(self.run.program, self.args, seed=0, **options)

    def resumed(self, latents: Mapping[str, Any], streams: ProgramProposer) -> ProgramProposer:
        """A proposer that goes on after latents (their nodes, by site) that are given, with another's
        random streams."""
        run = self._run_after(latents, slot=streams.run.slot)
        run.coroutine.global_state.take_streams(streams.run.coroutine.global_state)
        return ProgramProposer(run)

    def _advance_to(self, name: str | None) -> Any:
        """Run the guide on to a latent site, whose node is returned if it draws it, or to its end.
        What it waits for is passed to whoever runs the model."""
        run = self.run
        while not run.finished and name not in run.trace.nodes:
            run.resume(None if run.waiting is None else suspend(run.waiting))  # None: it begins
        if run.rejected_by is not None:
            raise ValueError(
                f"the guide rejects its own draw at site '{run.rejected_by}': a guide must be a "
                "distribution, so it may not use require or a rejecting tool; constrain the model"
            )
        return None if name is None else run.latents.get(name)

    def finish(self, trace: Trace) -> None:
        self.trace = trace
        self._advance_to(None)
        missing = [name for name in self.run.latents if name not in trace.nodes]
        if missing:
            raise ValueError(
                f"the guide proposes site '{missing[0]}', which the model has not (its sites: "
                f"{', '.join(n for n, s in trace.nodes.items() if s['type'] == 'sample')}). Every "
                "latent site of a guide must be one of the model's, on the same branch"
            )

    def fork(self, streams: Proposer) -> ProgramProposer:
        assert isinstance(streams, ProgramProposer)
        return ProgramProposer(self.run.fork(streams.run))

    def close(self) -> None:
        self.run.close()


class PriorProposer(Proposer):
    """Leaves every latent to the model, and remembers the ``trace`` of its run for a guide program to
    score."""

    def __init__(self, program: Callable[..., Any], args: Args) -> None:
        self.program, self.args = program, args
        self.trace = Trace()

    @property
    def draws(self) -> dict[str, Any]:
        """The latent sites of the model's run, which a hard condition may have ended."""
        return latents_of(self.trace)

    def propose(self, site: Any, trace: Trace) -> None:
        self.trace = trace

    def recall(self, site: Any, trace: Trace, value: torch.Tensor, features: Any) -> None:
        self.propose(site, trace)  # the rest is read off the trace

    def finish(self, trace: Trace) -> None:
        self.trace = trace

    def fork(self, streams: Proposer) -> PriorProposer:
        return PriorProposer(self.program, self.args)


def _scores(run: Particle, proposer: Any) -> dict[str, SiteScore]:
    """log q of what a proposer drew, by site, from a run of the guide on it."""
    latents, draws, model = run.latents, proposer.draws, proposer.trace.nodes
    waiting = [] if run.waiting is None else [run.waiting.name]
    extra = [name for name in [*latents, *waiting] if name not in draws]
    if extra and "_RETURN" in model:  # no hard condition has ended it
        raise ValueError(
            f"the guide draws site '{extra[0]}', which a trace that it is to score has not (its "
            f"latents: {', '.join(draws)}): they must be the model's, on the same branch"
        )
    scores: dict[str, SiteScore] = {
        name: (node["unscaled_log_prob"].sum(), None)
        for name, node in latents.items()
        if name in draws
    }
    # A text can be cut where nothing that the guide draws has read it, and the token that closes it
    # in the model closes it in the guide as well.
    last = next(reversed(latents), "")
    if last in scores and last in model and isinstance(model[last]["fn"], LMText):
        log_q, node = scores[last][0], latents[last]
        if node["fn"].stopping.closing_token == model[last]["fn"].stopping.closing_token:
            scores[last] = (log_q, node.get("scored"))
    return scores


def check_alike(name: str, model_fn: Any, guide_fn: Any) -> None:
    """Raise ``ValueError`` unless both draw texts of one tokenizer, or neither draws a text."""
    texts = [isinstance(fn, LMText) for fn in (model_fn, guide_fn)]
    if any(texts) and not all(texts):
        raise ValueError(
            f"site '{name}': the guide draws from {type(guide_fn).__name__}, the model from "
            f"{type(model_fn).__name__}: only one of them is a text"
        )
    if all(texts) and not model_fn.lm.vocabulary.same_as(guide_fn.lm.vocabulary):
        raise ValueError(
            f"site '{name}': the guide's model {guide_fn.lm.name!r} has another tokenizer than "
            f"{model_fn.lm.name!r}: a guide must draw the tokens that the model scores"
        )


def _text_value(name: str, model_fn: Any, guide_fn: Any, value: Any) -> Any:
    """The guide's text as a value of the model's site."""
    check_alike(name, model_fn, guide_fn)
    ids = guide_fn.token_ids(value)
    if len(ids) > model_fn.event_shape[0]:
        raise ValueError(
            f"site '{name}': the guide draws up to {guide_fn.event_shape[0]} tokens, the model's "
            f"site holds {model_fn.event_shape[0]}: give both the same max_tokens and stop"
        )
    closed = None if model_fn.choices is not None else model_fn.stopping.scan(ids)
    if closed is None or closed[0] == len(ids):
        return model_fn.value(ids)
    if not model_fn.is_constrained:
        raise ValueError(
            f"site '{name}': the guide draws {str(guide_fn.text(value))!r}, and the model's site ends "
            f"after token {closed[0]} of it: give both the same max_tokens and stop"
        )
    if closed[1] == "constraint" and not guide_fn.is_constrained:
        _warn_of_no_end(name, model_fn.stopping.constraint)
    return model_fn.value(ids)  # which is dead, as what does not match


_warned_of_no_end: set[str] = set()


def _warn_of_no_end(name: str, constraint: Any) -> None:
    """Warn, once a site, that a guide program does not end its texts where a constraint does."""
    if name not in _warned_of_no_end:
        _warned_of_no_end.add(name)
        warnings.warn(
            f"site '{name}': the guide's text goes on after a match of {constraint!r} that nothing "
            "extends, where the model's text ends without EOS. So the guide never draws that text, only "
            "the program's own share of the draws does (prior_fraction=, if there is one). Give the "
            "guide's site the same constraint",
            stacklevel=2,
        )


def as_guide(guide: Any) -> Guide | None:
    """What was given as ``guide=``: a guide as it is, a guide program as a guide; None: None. Raises
    ``TypeError`` for anything else."""
    if isinstance(guide, type):
        raise TypeError(
            f"guide= takes a guide, given the class {guide.__name__}: make an object of it"
        )
    if guide is None or hasattr(guide, "proposer_factory"):
        return guide
    if callable(guide):
        check_program(guide, "guide")
        return ProgramGuide(guide)
    raise TypeError(
        f"guide= takes a lmppl.LMGuide or a guide program (a callable), given {type(guide).__name__}"
    )


def proposer_factory(guide: Any, args: Args) -> ProposerFactory | None:
    """What makes the proposers of what was given as ``guide=``; None: the prior draws."""
    found = as_guide(guide)
    return None if found is None else found.proposer_factory(args)
