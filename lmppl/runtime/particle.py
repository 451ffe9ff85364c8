"""One run of a program, advanced from language-model site to language-model site.

A particle runs the program in a coroutine under a recorder, the outermost Pyro handler. At each
site the recorder decides where the value comes from (an observation, a replayed trace, a proposal,
the model itself), suspends the run where a language model has to be asked, and writes the
log-probabilities onto the trace, so that nothing is scored twice.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace

from lmppl.distributions import LMText, ToolCall
from lmppl.runtime.arguments import call, name_of
from lmppl.runtime.coroutine import Coroutine, GlobalState, suspend
from lmppl.runtime.sites import is_latent
from lmppl.runtime.waits import ChoiceWait, DrawWait, ScoreWait, Wait

Site = Any  # a Pyro message


@dataclass(frozen=True, eq=False)
class Given:
    """A value that a latent site is to take, with its known log-densities (unscaled, nats)."""

    value: torch.Tensor
    log_prob: torch.Tensor | None = None  # under the model; None: to be scored
    proposal_log_prob: torch.Tensor | None = None  # None: it is no draw, so it costs nothing


class Proposer(Protocol):
    """Where one particle's latent values come from, instead of the model."""

    def propose(self, site: Site, trace: Trace) -> Given | None:
        """A value for a latent site and log q of it; None: to be drawn from the model."""

    def finish(self, trace: Trace) -> None:
        """The program has ended; raises if a proposed value was for no site of it."""

    def fork(self, streams: Proposer) -> Proposer:
        """A copy at the same point of the program, with another's random streams."""

    def close(self) -> None:
        """End what is suspended."""


class Rejected(BaseException):
    """A hard condition failed: the particle has probability zero and its program stops.

    Not an ``Exception``, so that a program's own ``except Exception`` does not swallow it.
    """


class ReplayError(RuntimeError):
    """A program did not repeat itself when it was run again on recorded values."""


class Particle:
    """A run of ``program(*args)``, on copies of the lists, dicts and sets among ``args``.

    Args:
        program: a Pyro program.
        args: its positional arguments.
        seed: of the run's own random streams.
        proposer: where latent values come from; None: the model.
        given: values for latent sites and tools, by name; they come before the proposer.
        known: what scoring a site would find, by name: ``(log_prob, scored)``, unscaled.
        replay: sites of an earlier run to repeat before anything new happens.
        enumerate_latents: suspend at every latent site, with a ``DrawWait`` or a ``ChoiceWait``.
        score_closing: ask for closing-token log-probabilities when scoring latent sites.
        grad: run with gradients enabled.
        slot: its number, for error messages.

    Attributes:
        waiting: what it waits for; None when it has finished.
        trace: the Pyro trace so far; LM sites carry ``unscaled_log_prob``, ``log_prob``,
            ``log_prob_sum`` and latents ``proposal_log_prob``.
        rejected_by: the name of the site whose hard condition failed, or None.
        returned: what the program returned.
        has_proposed: whether a value came from the proposer (of a fork: since then).
    """

    def __init__(
        self,
        program: Callable[..., Any],
        args: tuple[Any, ...] = (),
        *,
        seed: int,
        proposer: Proposer | None = None,
        given: Mapping[str, Given] | None = None,
        known: Mapping[str, tuple[torch.Tensor, Any]] | None = None,
        replay: Mapping[str, Any] | None = None,
        enumerate_latents: bool = False,
        score_closing: bool = False,
        grad: bool = False,
        slot: int = 0,
    ) -> None:
        self.program, self.args = program, args
        self.proposer = proposer
        self.given = dict(given or {})
        self._known = dict(known or {})
        self.slot = slot
        self.waiting: Wait | None = None
        self.rejected_by: str | None = None
        self.returned: Any = None
        self.has_proposed = False
        self._replay = dict(replay or {})
        self._to_repeat = set(self._replay)
        self._counted = len(self._replay)
        self._enumerate, self._score_closing, self._grad = enumerate_latents, score_closing, grad
        self._site = ""
        self._at: tuple[str, Any] | None = None  # the site that it is at, and its distribution
        self._expected: tuple[str, Any] | None = None  # the same of the run that it repeats
        self._recorder = _Recorder(self)
        self.coroutine = Coroutine(self._run, GlobalState.fresh(seed, grad=grad))

    # --- life ----------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace:
        return self._recorder.trace

    @property
    def finished(self) -> bool:
        return self.coroutine.finished

    @property
    def site(self) -> tuple[str, Any] | None:
        """The program's site whose value is being found, with its distribution; None: no site.

        What the run waits for may be something else: a draw of the guide, which has a
        distribution of its own, may draw another site first, and may go on after the program.
        """
        return None if self._at is None or self._at[0] in self.trace.nodes else self._at

    def resume(self, answer: Any = None, *, restore: bool = True) -> None:
        """Run to the next wait or to the end (see ``Coroutine.resume``)."""
        self.waiting = None
        try:
            self.waiting = self.coroutine.resume(answer, restore=restore)
        except Rejected:
            self.close()
        except Exception as error:
            self._explain(error)
            raise

    def close(self) -> None:
        """End the run; what it recorded stays."""
        self.waiting = None
        try:
            self.coroutine.close()
        finally:
            if self.proposer is not None:
                self.proposer.close()

    def fork(
        self, streams: Particle | None = None, given: Mapping[str, Given] | None = None
    ) -> Particle:
        """A run of its own that has come to the same wait, by replay of this one's trace.

        Args:
            streams: whose random streams it goes on with (default: its own copy of this one's).
            given: values for latent sites that are still to come.
        """
        streams = streams or self
        if self.finished:
            return self._finished_copy(streams)
        proposer = self.proposer
        if proposer is not None and streams.proposer is not None:
            proposer = proposer.fork(streams.proposer)
        new = Particle(
            self.program,
            self.args,
            seed=0,
            proposer=proposer,
            given={**self.given, **(given or {})},
            known=self._known,
            replay=self.sites,
            enumerate_latents=self._enumerate,
            score_closing=self._score_closing,
            grad=self._grad,
            slot=streams.slot,
        )
        new._expected = None if self.waiting is None else self._at
        new.coroutine.global_state.take_streams(streams.coroutine.global_state)
        new.resume()
        return new

    def _finished_copy(self, streams: Particle) -> Particle:
        """A run that has ended is not changed any more, so what it recorded can be shared. The
        streams stay those of the slot, which may need them for a later fork."""
        new = copy(self)
        new.slot, new.proposer = streams.slot, streams.proposer
        new.coroutine = copy(self.coroutine)
        new.coroutine.global_state = copy(self.coroutine.global_state)
        new.coroutine.global_state.take_streams(streams.coroutine.global_state)
        return new

    # --- what it found -------------------------------------------------------------------------

    @property
    def sites(self) -> dict[str, Any]:
        """The sample sites recorded so far."""
        return {name: node for name, node in self.trace.nodes.items() if node["type"] == "sample"}

    @property
    def latents(self) -> dict[str, Any]:
        """The latent sites recorded so far (no tool results, no subsample indices)."""
        return {name: node for name, node in self.sites.items() if is_latent(node)}

    def take_log_weight(self) -> float:
        """log p - log q (nats) of the sites recorded since this was last called (scale applied)."""
        fresh = list(self.sites.values())[self._counted :]
        self._counted += len(fresh)
        return sum((site_log_weight(node) for node in fresh), 0.0)

    @property
    def log_joint(self) -> float:
        """log R: Pyro's log joint of the trace so far (scale and mask applied), nats."""
        return sum((float(node["log_prob_sum"]) for node in self.sites.values()), 0.0)

    @property
    def killed_by(self) -> str | None:
        """The first site of probability zero, or None."""
        for name, node in self.sites.items():
            if float(node["log_prob_sum"]) == -math.inf:
                return name
        return None

    # --- inside the coroutine ------------------------------------------------------------------

    def _run(self) -> None:
        with self._recorder:
            trace = self._recorder.trace
            trace.add_node("_INPUT", name="_INPUT", type="args", args=self.args, kwargs={})
            self.returned = call(self.program, self.args)
            if self._to_repeat or self._expected is not None:
                raise ReplayError(
                    f"a replayed run ended before site '{self._next_recorded}' of the recorded "
                    f"one. {_DETERMINISM}"
                )
            if self.proposer is not None:
                self.proposer.finish(trace)
            trace.add_node("_RETURN", name="_RETURN", type="return", value=self.returned)

    @property
    def _next_recorded(self) -> str:
        at = [] if self._expected is None else [self._expected[0]]
        return next(name for name in [*self._replay, *at] if name not in self.trace.nodes)

    def _visit(self, site: Site) -> None:
        """Find the value and the log-probability of a site."""
        name = site["name"]
        self._site = name
        if name in self.trace.nodes:
            raise ValueError(
                f"site '{name}' is used twice in one run of the program: give every site its own "
                f"name, in a loop for example f'{name}_{{i}}'"
            )
        if name in self._replay:
            self._repeat(site, self._replay[name])
        elif self._to_repeat:
            raise ReplayError(
                f"a replayed run met site '{name}' before the recorded site "
                f"'{self._next_recorded}'. {_DETERMINISM}"
            )
        else:
            self._check_expected(site)
            self._find(site)
        site["done"] = True

    def _find(self, site: Site) -> None:
        """The value and the log-probability of a site that is new."""
        fn = site["fn"]
        self._at = site["name"], fn
        if is_latent(site) and site["value"] is None:
            self._draw(site)
        else:
            if site["value"] is None:  # a tool or subsample indices
                given = self.given.get(site["name"])
                site["value"] = (
                    fn(*site["args"], **site["kwargs"]) if given is None else given.value
                )
            self._record(site, self._score(site))

    def _check_expected(self, site: Site) -> None:
        """A run that repeats a waiting one must come to the very site at which that one waits."""
        if self._expected is None:
            return
        (name, fn), self._expected = self._expected, None
        if site["name"] != name:
            raise ReplayError(
                f"a replayed run met site '{site['name']}' instead of '{name}', at which the "
                f"recorded one waits. {_DETERMINISM}"
            )
        same = fn.same_as(site["fn"]) if isinstance(fn, LMText) else type(fn) is type(site["fn"])
        if not same:
            raise _other_distribution(site, fn)

    def _draw(self, site: Site) -> None:
        name, fn = site["name"], site["fn"]
        _check_weightable(site, self.trace)
        given = self.given.get(name)
        if given is None and self.proposer is not None:
            given = self.proposer.propose(site, self.trace)
            self.has_proposed |= given is not None
        if given is not None:
            site["value"] = given.value
            site["proposal_log_prob"] = given.proposal_log_prob
            log_prob = given.log_prob if given.log_prob is not None else self._score(site)
        elif _is_lm_site(fn):
            uniforms = torch.rand(fn.num_uniforms, dtype=torch.float64, device="cpu")
            site["value"], log_prob = suspend(DrawWait(name, fn, uniforms))
            site["proposal_log_prob"] = log_prob
        elif self._enumerate:
            site["value"], log_prob = suspend(ChoiceWait(name, fn))
            site["proposal_log_prob"] = None
        else:
            site["value"] = fn(*site["args"], **site["kwargs"])
            log_prob = fn.log_prob(site["value"])
            site["proposal_log_prob"] = log_prob.sum()
        self._record(site, log_prob)

    def _score(self, site: Site) -> torch.Tensor:
        fn, value = site["fn"], site["value"]
        if site["name"] in self._known:
            log_prob, site["scored"] = self._known[site["name"]]
            return log_prob
        if not _is_lm_site(fn):
            return fn.log_prob(value, *site["args"], **site["kwargs"])
        score_closing = self._score_closing and not site["is_observed"]
        log_prob, scored = suspend(ScoreWait(site["name"], fn, value, score_closing))
        site["scored"] = scored
        return log_prob

    def _record(self, site: Site, log_prob: torch.Tensor) -> None:
        site["unscaled_log_prob"] = log_prob
        site["log_prob"] = scale_and_mask(log_prob, site["scale"], site["mask"])
        site["log_prob_sum"] = site["log_prob"].sum()

    def _repeat(self, site: Site, recorded: Site) -> None:
        name, fn = site["name"], site["fn"]
        self._to_repeat.discard(name)
        if isinstance(fn, LMText):
            same = fn.same_as(recorded["fn"])
        elif isinstance(fn, ToolCall | _Subsample):
            same = type(fn) is type(recorded["fn"])
        else:
            log_prob = fn.log_prob(recorded["value"], *site["args"], **site["kwargs"])
            same = torch.equal(log_prob, recorded["unscaled_log_prob"])
        if site["is_observed"]:
            same = (
                same and recorded["is_observed"] and torch.equal(site["value"], recorded["value"])
            )
        elif recorded["is_observed"]:
            same = False
        if not same:
            raise _other_distribution(site, recorded["fn"])
        for key in _RECORDED:
            if key in recorded:
                site[key] = recorded[key]

    @property
    def _call(self) -> str:
        """The program with its arguments, which tell its inputs apart."""
        return f"{name_of(self.program)}({', '.join(map(_repr.repr, self.args))})"

    def _explain(self, error: Exception) -> None:
        """Say where in the program an exception came from, and what the particle had drawn."""
        where = f"at or after site '{self._site}'" if self._site else "before its first site"
        note = f"raised in particle {self.slot} of {self._call}, {where}"
        texts = []
        for name, node in self.sites.items():
            value = node["value"]
            if _is_lm_site(node["fn"]):
                fn = node["fn"]
                text = (
                    fn.text(value)
                    if fn.supports(value)
                    else fn.lm.vocabulary.decode(fn.token_ids(value))
                )
                texts.append(f"{name}={str(text)!r}")
            elif is_latent(node):
                texts.append(f"{name}={value.tolist() if torch.is_tensor(value) else value!r}")
        error.add_note(note + (f"; so far: {', '.join(texts)}" if texts else ""))


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


class _Recorder(TraceMessenger):
    """The outermost handler of a particle: it sees a site after all handlers of the program."""

    def __init__(self, particle: Particle) -> None:
        super().__init__()
        self._particle = particle

    def _pyro_sample(self, msg: Site) -> None:
        self._particle._visit(msg)

    def _pyro_post_sample(self, msg: Site) -> None:
        super()._pyro_post_sample(msg)
        if msg["infer"].get("hard") and float(msg["log_prob_sum"]) == -math.inf:
            self._particle.rejected_by = msg["name"]
            raise Rejected(msg["name"])


_RECORDED = (
    "value",
    "unscaled_log_prob",
    "log_prob",
    "log_prob_sum",
    "proposal_log_prob",
    "scored",
)
_DETERMINISM = (
    "Between its sites a program must be deterministic: draw random numbers with pyro.sample, and "
    "call what is not repeatable through lmppl.tool."
)


def _other_distribution(site: Site, recorded: Any) -> ReplayError:
    return ReplayError(
        f"at site '{site['name']}' a replayed run has another distribution, prefix or observation "
        f"than the recorded one: {site['fn']} against {recorded}. {_DETERMINISM}"
    )


def _is_lm_site(fn: Any) -> bool:
    """Whether the runtime serves the site (a batched ``LMText`` serves itself)."""
    return isinstance(fn, LMText) and not fn.batch_shape


def site_log_weight(node: Site) -> float:
    """What a site adds to the importance weight: log p (scaled), less log q where it was drawn."""
    log_prob = float(node["log_prob_sum"])
    if log_prob == -math.inf:
        return -math.inf
    proposal = node.get("proposal_log_prob")
    return log_prob - (0.0 if proposal is None else float(proposal))


def _check_weightable(site: Site, trace: Trace) -> None:
    """Latents whose density Pyro would drop or reweight have no importance weight."""
    name, mask = site["name"], site["mask"]
    if mask is not None and mask is not True and not (torch.is_tensor(mask) and bool(mask.all())):
        raise ValueError(
            f"site '{name}' is latent and masked out (poutine.mask): its density is not part of the "
            "joint, so no weight can account for it. Leave it out of the program instead."
        )
    for frame in site["cond_indep_stack"]:
        plate = trace.nodes.get(frame.name)
        fn = None if plate is None else plate["fn"]
        if isinstance(fn, _Subsample) and (fn.subsample_size or fn.size) < fn.size:
            raise ValueError(
                f"site '{name}' is latent in the subsampled plate '{frame.name}' "
                f"({fn.subsample_size} of {fn.size}): its posterior is not defined by one "
                "subsample. Use the plate without subsample_size."
            )
