"""Markov chain Monte Carlo over whole traces.

    each of C chains begins at a trace of positive probability: weighted draws of the program (or of the
        guide), or the traces of another posterior, resampled by weight
    warmup + thin * (num_samples / C) times:
        every chain proposes another trace: one latent anew from a token on, and what follows from it
        it goes there with probability min(1, ratio), else stays                        (``moves.py``)
    after the warm-up, the trace at every ``thin``-th move is a draw; all have equal weights

The chains advance side by side, so a move of all of them is one batch. Draws of a chain depend on each
other: how many independent ones they are worth is ``ess``, and R-hat says whether the chains agree.

With ``poutine.scale(scale=alpha)`` around a text the target is p^alpha of its language model: power
sampling (Karan and Du, 2025, "Reasoning with sampling"), for which ``proposal_temperature=1 / alpha``
and ``block=`` are made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from lmppl import runtime
from lmppl.checks import check_callable, check_choice, check_int, check_number
from lmppl.engines import moves
from lmppl.engines.base import Engine, State
from lmppl.engines.kernels import SiteKernel
from lmppl.engines.moves import ChainState
from lmppl.guides.laws import GuideLaws, Laws, laws_of
from lmppl.lm.batches.inverse_cdf import inverse_cdf
from lmppl.posterior import Posterior, ZeroEvidenceError
from lmppl.runtime import mixing
from lmppl.runtime.records import record_of_trace, rescore
from lmppl.runtime.sites import values_of

LOG_JOINT = "log joint"


@dataclass(frozen=True)
class MCMC(Engine):
    """Metropolis-Hastings chains over whole traces.

    Args:
        num_chains: how many chains, at most one for each sample.
        warmup: moves of each chain before its first draw.
        thin: moves from one draw of a chain to the next.
        initial: a posterior at whose traces the chains begin, resampled by weight; None: at traces of
            the program, or of ``guide=``, which are resampled out of ``num_starts``.
        num_starts: how many weighted draws those are.
        kernels: how to move a site, by its name: ``lmppl.Suffix(block)`` (the usual one of a text),
            ``lmppl.Redraw()`` (that of all others), or ``lmppl.RandomWalk(scale)``.
        proposal_temperature: texts are proposed at ``p ** (1 / proposal_temperature)``, token by token.
        block: the cut of a text is among its last ``block`` tokens, at the next move among its last
            ``2 * block``, and so on, and then from the beginning again; None: anywhere.
        later: ``"keep"``: sites after the cut keep their values where they are still legal;
            ``"redraw"``: they are all drawn anew.
        functions: by name, functions of the values of one trace (a dict by site) to a number, whose
            R-hat and effective sample sizes are computed; None: the log joint.

    ``ess`` is the least bulk effective sample size of these functions. ``log_evidence`` is None.

    Raises:
        TypeError: for an option of another type.
        ValueError: for one out of range.
    """

    num_chains: int = 8
    warmup: int = 50
    thin: int = 5
    initial: Posterior | None = None
    num_starts: int = 64
    kernels: Mapping[str, SiteKernel] = field(default_factory=dict)
    proposal_temperature: float = 1.0
    block: int | None = None
    later: Literal["keep", "redraw"] = "keep"
    functions: Mapping[str, Callable[[dict[str, Any]], Any]] | None = None

    name = "mcmc"

    def __post_init__(self) -> None:
        check_int("num_chains", self.num_chains)
        check_int("warmup", self.warmup, least=0)
        check_int("thin", self.thin)
        check_int("num_starts", self.num_starts)
        check_number("proposal_temperature", self.proposal_temperature, above=0)
        check_choice("later", self.later, ("keep", "redraw"))
        if self.block is not None:
            check_int("block", self.block)
        if self.initial is not None and not isinstance(self.initial, Posterior):
            raise TypeError(
                "initial= takes a posterior, as lmppl.infer gives it, given "
                f"{type(self.initial).__name__}"
            )
        _check_kernels(self.kernels)
        _check_functions(self.functions)

    def sample(self, state: State) -> None:
        laws = laws_of(state.guide, state.args, self.proposal_temperature)
        starts = self._start(state, laws)
        if not all(start.latents for start in starts):
            state.posterior()  # says so if there is nothing to infer in any
            raise ValueError(
                "a chain would begin at a trace without latent sites, where a tool's result decides "
                "that there are none: no move leads out of it. Let the program draw what decides "
                "(pyro.sample), or use method='smc'"
            )
        chains = Chains(self, state.seed, starts)
        num_draws = -(-state.num_samples // len(chains.states))
        draws: list[list[ChainState]] = []
        num_moves = self.warmup + self.thin * num_draws
        state.bar.begin(num_moves, "move")
        for turn in range(num_moves):
            chains.move(turn)
            state.report(moves=turn + 1, acceptance=chains.acceptance)
            made = turn + 1 - self.warmup
            if made == 0:
                chains.forget_warmup()
            elif made > 0 and made % self.thin == 0:
                draws.append(list(chains.states))
        self._finish(state, chains, draws)
        state.has_proposed = not isinstance(laws, GuideLaws) or laws.has_proposed

    # --- where the chains begin -----------------------------------------------------------------

    def _start(self, state: State, laws: Laws) -> list[ChainState]:
        """The chains' first traces."""
        num = min(self.num_chains, state.num_samples)
        # Stratified, so that few of them begin alike.
        uniforms = torch.rand(num, generator=state.generator, dtype=torch.float64)
        uniforms = (torch.arange(num) + uniforms) / num
        if self.initial is not None:
            return self._start_at(self.initial, uniforms, state, laws)
        state.start(self.num_starts)
        while state.extend():
            state.draw()
        if not state.ess:
            raise self._no_start(state)
        weights = (state.log_weights - state.log_weights.max()).exp()
        return [
            ChainState(state.particles[i], laws) for i in inverse_cdf(weights, uniforms).tolist()
        ]

    def _no_start(self, state: State) -> ZeroEvidenceError:
        """The error of a program of which all draws are dead."""
        try:
            state.posterior()
        except ZeroEvidenceError as error:
            return ZeroEvidenceError(
                f"no chain can begin: all {self.num_starts} draws for a start have probability zero, by "
                f"these sites (draws): {dict(error.posterior.killed.most_common())}. Raise num_starts=, "
                "give a guide= that meets the conditions, or begin at the traces of another posterior: "
                "initial=lmppl.infer(..., method='smc')",
                error.posterior,
            )
        raise AssertionError("a start is alive")

    def _start_at(
        self, initial: Posterior, uniforms: torch.Tensor, state: State, laws: Laws
    ) -> list[ChainState]:
        picks = inverse_cdf(initial.weights, uniforms).tolist()
        runs = state.particles
        with torch.no_grad():
            for slot, pick in enumerate(picks):
                record = record_of_trace(initial.traces[pick])
                what = f"initial= (its trace {pick})"
                runs.append(
                    rescore(
                        record, state.model, state.args, None, what=what, complete=True, slot=slot
                    )
                )
            runtime.run_to_end(runs)
        state.log_weights = torch.zeros(len(runs), dtype=torch.float64)
        for run, pick in zip(runs, picks, strict=True):
            if run.log_joint == -math.inf:
                raise ValueError(
                    f"initial=: its trace {pick} has probability zero under the program on these "
                    f"arguments, by site '{run.killed_by}', so no chain can begin there"
                )
        return [ChainState(run, laws) for run in runs]

    # --- the draws and what is said of them ------------------------------------------------------

    def _finish(self, state: State, chains: Chains, draws: list[list[ChainState]]) -> None:
        """Hand the draws to ``state``, chain by chain."""
        num = len(chains.states)
        order = [(c, d) for c in range(num) for d in range(len(draws))]
        # The last round may be more than was asked for.
        order = [(c, d) for c, d in order if d * num + c < state.num_samples]
        state.particles[:] = [draws[d][c].particle for c, d in order]
        state.log_weights = torch.zeros(len(order), dtype=torch.float64)
        state.claims_evidence = False
        num_draws = state.num_samples // num
        found = self._mixing(state, [[row[c] for row in draws[:num_draws]] for c in range(num)])
        state.info["chain"] = order
        state.info["chains"] = {
            "num_chains": num,
            "num_draws": num_draws,
            "acceptance": chains.acceptance_by_site,
            "diagnostics": found,
        }
        least = min((f["ess_bulk"] or math.nan for f in found.values()), default=math.nan)
        stuck = _stuck(chains, draws)
        most = sum(1 if c in stuck else num_draws for c in range(num))
        state.info["ess"] = min(least, float(most)) if least == least else math.nan
        self._warn(state, chains, stuck)

    def _mixing(self, state: State, chains: list[list[ChainState]]) -> dict[str, Any]:
        """R-hat and effective sample sizes, by the name of the function; empty without arviz-stats."""
        if not mixing.is_available():
            state.notes.append(
                "R-hat and the effective sample size of the chains need arviz-stats: pip install "
                "'lmppl-pyro[diagnostics]'"
            )
            return {}
        if len(chains[0]) < mixing.LEAST_DRAWS:
            state.notes.append(
                f"R-hat and effective sample sizes need {mixing.LEAST_DRAWS} draws a chain, here are "
                f"{len(chains[0])}: raise num_samples"
            )
        functions: dict[str, Any] = {LOG_JOINT: None}
        if self.functions is not None:
            functions = dict(self.functions)
        return {
            name: mixing.mixing(np.array([[_number(name, fn, s) for s in row] for row in chains]))
            for name, fn in functions.items()
        }

    def _warn(self, state: State, chains: Chains, stuck: list[int]) -> None:
        """Say what went wrong."""
        if stuck:
            total = self.warmup + self.thin * -(-state.num_samples // len(chains.states))
            state.warn(
                f"{len(stuck)} of {len(chains.states)} chains never came to another trace in {total} "
                "moves, so their draws are copies of where they began. Make more moves (warmup=, "
                "thin=), give a guide=, propose smaller changes (block=), or texts nearer to the target "
                "(proposal_temperature=)"
            )
        unmet = self.kernels.keys() - chains.met
        if unmet:
            state.warn(
                f"kernels= names {', '.join(map(repr, sorted(unmet)))}, where no chain chose to move; "
                f"sites where one did: {', '.join(sorted(chains.met)) or 'none'}. (A site may be on a "
                "branch that none took.)"
            )


class Chains:
    """Chains that move side by side.

    Attributes:
        states: where each is.
        has_moved: whether each has ever come to another trace.
        met: the sites at which moves have begun.
    """

    def __init__(self, options: MCMC, seed: int, states: list[ChainState]) -> None:
        self._options, self.states = options, states
        self._seeds = runtime.slot_seeds(seed, len(states))
        self.has_moved = [False] * len(states)
        self.met: set[str] = set()
        self._made, self._accepted = Counter[str](), Counter[str]()

    def move(self, turn: int) -> None:
        """One move of every chain."""
        options = self._options
        accepted = moves.move_all(
            self.states,
            self._seeds,
            turn,
            kernels=options.kernels,
            block=options.block,
            keep=options.later == "keep",
        )
        for slot, move in enumerate(accepted):
            self.met.add(move.site)
            self._made[move.site] += 1
            if move.state is not None:
                self._accepted[move.site] += 1
                if not self.has_moved[slot]:
                    self.has_moved[slot] = not moves.is_same(move.state, self.states[slot])
                self.states[slot] = move.state

    def forget_warmup(self) -> None:
        """Count acceptance from now on."""
        self._made.clear()
        self._accepted.clear()

    @property
    def acceptance(self) -> float:
        """The share of moves that were accepted."""
        return self._accepted.total() / max(1, self._made.total())

    @property
    def acceptance_by_site(self) -> dict[str, float]:
        """The same of those that began at a site."""
        return {name: self._accepted[name] / made for name, made in self._made.items()}


def _stuck(chains: Chains, draws: list[list[ChainState]]) -> list[int]:
    """The chains that have never come to another trace, and stay where none of the others comes to.
    (Most chains may well stay at a trace that has most of the mass.)"""
    moved = [c for c, has_moved in enumerate(chains.has_moved) if has_moved]
    visited = {id(row[c]): row[c] for row in draws for c in moved}.values()
    unmoved = [c for c, has_moved in enumerate(chains.has_moved) if not has_moved]
    return [c for c in unmoved if not any(moves.is_same(chains.states[c], v) for v in visited)]


def _number(name: str, fn: Callable[..., Any] | None, state: ChainState) -> float:
    """What a function says of a trace; None: its log joint."""
    if fn is None:  # rounded, lest chains at the same trace seem to disagree by their last bits
        return round(state.log_joint, 2)
    value = fn(values_of(state.particle.trace))
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"functions={{{name!r}: ...}} must give a number of a trace, it gave {value!r}"
        ) from None


def _check_kernels(kernels: Any) -> None:
    if not isinstance(kernels, Mapping):
        raise TypeError(
            f"kernels={kernels!r}: it takes a dict of kernels by site, {{'x': lmppl.RandomWalk(0.5)}}"
        )
    for name, kernel in kernels.items():
        if not isinstance(kernel, SiteKernel):
            raise TypeError(
                f"kernels= gives site {name!r} {kernel!r}, allowed: objects such as lmppl.Suffix(), "
                "lmppl.Redraw() and lmppl.RandomWalk(scale=0.5)"
            )


def _check_functions(functions: Any) -> None:
    if functions is None:
        return
    if not isinstance(functions, Mapping) or not functions:
        raise TypeError(
            f"functions={functions!r}: it takes a dict of functions by name, "
            "{'length': lambda values: len(values['z'])}"
        )
    for name, function in functions.items():
        check_callable(f"functions[{name!r}]", function)
