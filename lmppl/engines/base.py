"""What all engines share: the set-up, weighted particles with the verbs that move them, the end.

    state = the program, its arguments, guide and seed          (``Engine.run``)
    sample(state): the algorithm, of these verbs
        start       N particles run to their first latent site
        extend      they run to their next latent site or the end;  log w_i += log p - log q
        draw        each draws the latent site at which it waits, from the guide or the program
        select      slot i goes on as a copy of particle ancestors[i]
    posterior of the particles and their weights

An engine is a frozen dataclass: its fields are the options, ``sample`` is the algorithm.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, final

import torch

from lmppl import runtime
from lmppl.checks import check_int
from lmppl.distributions import LMText
from lmppl.engines.genealogy import Genealogy
from lmppl.exclusive import exclusive
from lmppl.guides import proposer_factory
from lmppl.guides.mixture import MixtureProposer, mixed
from lmppl.posterior import Posterior
from lmppl.posterior.pooling import pooled_runs
from lmppl.report.progress import progress_bar
from lmppl.runtime import Particle, Proposer, own_usage

Callback = Callable[[dict[str, Any]], None]


class EngineLike(Protocol):
    """What ``infer`` takes as ``method=``: an ``Engine``, or any object that runs like one."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def run(self) -> Callable[..., Posterior]:
        """Gives the posterior of ``model(*args)``; its options are those of ``Engine.run``."""


class Engine(ABC):
    """An inference algorithm: options in its fields, one program a ``run``."""

    name: ClassVar[str]
    """What it is called in progress bars and ``posterior.info["engine"]``."""

    @abstractmethod
    def sample(self, state: State) -> None:
        """The algorithm: give ``state`` finished particles and their weights."""

    @final
    def run(
        self,
        model: Callable[..., Any],
        *args: Any,
        num_samples: int = 64,
        guide: Any = None,
        seed: int | None = None,
        progress: bool | None = None,
        callback: Callback | None = None,
    ) -> Posterior:
        """The posterior of a program, whose sites use the language model of ``lmppl.use``.

        Args:
            model: the program, as of ``infer``.
            *args: its arguments.
            num_samples: as of ``infer``, like all that follow.
            guide: a proposal.
            seed: of the run.
            progress: whether to show a bar.
            callback: called with a dict of figures at every stage.

        Raises:
            ValueError: for a program without a latent site.
            ZeroEvidenceError: if all weights are zero; it carries the posterior.
        """
        num_samples, seed = check_int("num_samples", num_samples), runtime.fresh_seed(seed)
        with exclusive(), ExitStack() as ends:
            state = State(self.name, model, args, num_samples, guide, seed, progress, callback)
            ends.push(state.bar)  # it begins with the first stage: training has a bar of its own
            ends.enter_context(runtime.ending(state.particles))
            self.sample(state)
            return state.posterior()


@dataclass(eq=False)
class State:
    """Weighted particles of one program, in the hands of an engine.

    Args:
        engine: its name.
        model: the program, as of ``Engine.run``, like all that follow.
        args: the program's arguments.
        num_samples: how many are wanted.
        guide: a proposal, or None. It may be changed before ``start``.
        seed: of the run.
        progress: whether to show a bar.
        callback: called with a dict of figures at every stage.

    Attributes:
        particles: the runs; always the same list.
        log_weights: one for each, float64, nats: the mean of w estimates the evidence of what was
            observed so far.
        stage: how many stages are done: how often they were extended.
        proposer: what makes a particle's proposer, once they have started; None: the program.
        has_proposed: whether a guide, if there is one, has proposed a value.
        generator: of the engine's own random choices.
        iid: whether the weights are independent and identically distributed.
        claims_evidence: whether the mean of w estimates the evidence.
        trained: the guide that the posterior is to carry.
        notes, info: what the posterior is to say of the run.
        genealogy: what became of the particles; None: the engine does not take it down.
        islands: the runs that the posterior is to be pooled of (see ``on_islands``); none: it is of the
            particles.
    """

    engine: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    num_samples: int
    guide: Any
    seed: int
    progress: bool | None = False
    callback: Callback | None = None

    def __post_init__(self) -> None:
        self.bar = progress_bar(self.engine, show=self.progress)
        self.particles: list[Particle] = []
        self.log_weights = torch.zeros(0, dtype=torch.float64)
        self.stage = 0
        self.proposer: Callable[[int, int], Proposer] | None = None
        self.generator = torch.Generator().manual_seed(self.seed % 2**63)
        self.iid, self.claims_evidence = False, True
        self.trained: Any = None
        self.notes: list[str] = []
        self.info: dict[str, Any] = {}
        self.genealogy: Genealogy | None = None
        self.islands: list[Posterior] = []
        self._began, self._usage = time.perf_counter(), own_usage()
        self.has_proposed = False

    def start(self, num: int | None = None, *, prior_fraction: float = 0.0, **options: Any) -> None:
        """Make ``num`` particles (None: ``num_samples``) of weight 1, and run each to its first latent
        site or observation. ``prior_fraction`` mixes so many draws of the program into a guide's;
        ``options`` are further arguments of ``Particle``."""
        num = self.num_samples if num is None else num
        factory = proposer_factory(self.guide, self.args)
        self.proposer = None if factory is None else mixed(factory, prior_fraction)
        self.has_proposed = factory is None
        self.particles[:] = runtime.start(
            self.model, self.args, num, seed=self.seed, proposer=self.proposer, **options
        )
        self.log_weights = torch.zeros(num, dtype=torch.float64)

    def extend(self) -> bool:
        """Run all to their next latent site or their end: score what they observe on the way, and
        multiply their weights by p / q of it. One of weight zero ends here.

        Returns:
            Whether any waits at a latent site.
        """
        self.extend_part(0, len(self.particles))
        num, finished = len(self.particles), sum(p.finished for p in self.particles)
        self.report(ess=self.ess, finished=finished, of=num)
        return finished < num

    def extend_part(self, begin: int, end: int) -> None:
        """What ``extend`` does, to the particles of slots ``begin`` up to ``end``, without a report."""
        part = self.particles[begin:end]
        runtime.run_to_draws(part)
        increments = [particle.take_log_weight() for particle in part]
        self.log_weights = self.log_weights.clone()
        self.log_weights[begin:end] += torch.tensor(increments, dtype=torch.float64)
        self.has_proposed |= any(getattr(p.proposer, "draws", True) for p in part)
        for particle, log_weight in zip(part, self.log_weights[begin:end].tolist(), strict=True):
            if log_weight == -math.inf and not particle.finished:
                particle.close()  # nothing that it does can matter any more

    def report(self, **figures: Any) -> None:
        """Say that a stage is done, with its ``figures``: to the progress bar and to ``callback``."""
        if self.stage == 0:
            self.bar.__enter__()
        figures = {"stage": self.stage, **figures}
        self.bar.advance(**figures)
        if self.callback is not None:
            self.callback({"engine": self.engine, **figures})
        self.stage += 1

    def draw(self) -> None:
        """Let every particle that waits at a latent site draw it, in one batched call."""
        runtime.serve_draws(self.particles)

    def select(self, ancestors: Sequence[int], *, is_drawing: bool = False) -> None:
        """Let slot i go on as a copy of particle ``ancestors[i]``, with its own random streams; weights
        stay. ``is_drawing``: the texts at which they wait are under way already."""
        before = list(self.particles)
        for particle in before if is_drawing else ():
            if isinstance(particle.proposer, MixtureProposer):
                particle.proposer.hold()
        replaced = {slot: ancestor for slot, ancestor in enumerate(ancestors) if ancestor != slot}
        for slot, ancestor in replaced.items():
            self.particles[slot] = before[ancestor].fork(streams=before[slot])
        for slot in replaced:
            before[slot].close()

    @property
    def ess(self) -> float:
        """Effective sample size of the weights."""
        return runtime.ess(self.log_weights)

    def posterior(self) -> Posterior:
        """The posterior of finished particles.

        Raises:
            ValueError: for a program without a latent site.
            ZeroEvidenceError: if all weights are zero; it carries the posterior.
        """
        posterior = self.unchecked_posterior()
        if not self.has_proposed:
            self.warn(
                f"the guide {getattr(self.guide, '__name__', repr(self.guide))} proposed nothing: all "
                "latents of all particles were drawn from the program. A guide draws the program's "
                "sites by their names, and an LMGuide the texts of models with its own vocabulary"
            )
            posterior.info["notes"].append(self.notes[-1])
        posterior.check_alive()
        return posterior

    def unchecked_posterior(self) -> Posterior:
        """The same of an island: all its weights may be zero, and what there is to warn of is not said,
        as it may be true of this island alone.

        Raises:
            ValueError: for a program without a latent site.
        """
        told = {"engine": self.engine, "seed": self.seed, "has_guide": self.guide is not None}
        told |= asdict(own_usage() - self._usage)
        told |= {"seconds": time.perf_counter() - self._began, **self.info}
        if self.islands:
            posterior = pooled_runs(self.islands)
            posterior.info |= told
            posterior.info["notes"] += self.notes
            return posterior
        weights = zip(self.particles, self.log_weights.tolist(), strict=True)
        dead = [(p, p.killed_by or "(the engine)") for p, w in weights if w == -math.inf]
        killed = Counter(name for _, name in dead)
        if not killed and not any(particle.latents for particle in self.particles):
            raise ValueError(
                "the program has no latent site, so there is nothing to infer: leave out obs= at "
                "the site that you want the posterior of"
            )
        info = {"iid": self.iid, "killed": killed, "notes": list(self.notes)}
        info |= {"reasons": _reasons(dead), **told}
        traces = [particle.trace for particle in self.particles]
        returns = [particle.returned for particle in self.particles]
        common = {"guide": self.trained, "claims_evidence": self.claims_evidence}
        posterior = Posterior(traces, self.log_weights, returns, info=info, **common)
        posterior.genealogies = [None if self.genealogy is None else self.genealogy.steps]
        return posterior

    def warn(self, message: str) -> None:
        """Say ``message`` as a warning and as a note of the posterior."""
        self.notes.append(message)
        warnings.warn(message, stacklevel=5)


def _reasons(dead: Sequence[tuple[Particle, str]]) -> dict[str, str]:
    """Why the first of dead particles, each with the site that killed it, ended there: by site, where
    a constraint says why."""
    reasons: dict[str, str] = {}
    for particle, name in dead:
        node = {} if name in reasons else particle.sites.get(name, {})
        fn = node.get("fn")
        if isinstance(fn, LMText) and (why := fn.mismatch(node["value"])):
            ids = fn.token_ids(node["value"])
            dead_end = "" if node["is_observed"] else fn.stopping.dead_end(ids)
            reasons[name] = f"{why}; {dead_end}" if dead_end else why
    return reasons
