"""One run of a program, advanced from language-model site to language-model site.

A particle runs the program in a coroutine under a recorder, the outermost Pyro handler. At each
site the recorder decides where the value comes from (an observation, a replayed trace, a proposal,
the model itself), suspends the run where a language model has to be asked, and writes the
log-probabilities onto the trace, so that nothing is scored twice.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import pyro
import torch
from pyro.distributions.distribution import COERCIONS
from pyro.distributions.util import scale_and_mask
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace

from lmppl.distributions import Purpose
from lmppl.lm.tokens.text import Text
from lmppl.primitives import Call, CallMemory
from lmppl.runtime.arguments import call, name_of
from lmppl.runtime.coroutine import Coroutine, GlobalState, suspend
from lmppl.runtime.replay import Replay, Site, Unit
from lmppl.runtime.sites import is_latent, is_text, latents_of
from lmppl.runtime.waits import ChoiceWait, DrawWait, LateScoresWait, ScoreWait, Wait


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
        return

    def fork(self, streams: Proposer) -> Proposer:
        """A copy at the same point of the program, with another's random streams."""

    def close(self) -> None:
        """End what is suspended."""
        return


ProposerFactory = Callable[[int, int], Proposer]
"""Makes the proposer of a particle from its slot and a seed."""


class Rejected(BaseException):
    """A hard condition failed: the particle has probability zero and its program stops.

    Not an ``Exception``, so that a program's own ``except Exception`` does not swallow it.
    """


class Particle:
    """A run of ``program(*args)``, on copies of the lists, dicts and sets among ``args``.

    Args:
        program: a Pyro program.
        args: its positional arguments.
        seed: of the run's own random streams.
        proposer: where latent values come from; None: the model.
        given: values for latent sites and tools, by name; they come before the proposer.
        known: what scoring a site would find, by name: ``(log_prob, scored)``, unscaled.
        replay: what it is to repeat before anything new happens; None: nothing.
        shared: of the runs that share them, the distributions that ``lm_sample`` has made.
        enumerate_latents: suspend at every latent site, with a ``DrawWait`` or a ``ChoiceWait``.
        score_closing: ask for closing-token log-probabilities when scoring latent sites.
        score_late: score texts after the program has ended, all in one wait, in a run that nobody
            weighs on the way: fewer switches and larger batches. (Not where a hard condition or
            a handler of the program may depend on it.) Such a run is not forked.
        purpose: what texts that it draws of the model itself are drawn for.
        grad: run with gradients enabled.
        is_guide: the program is a guide, so that it draws constrained texts by ``LMText.guided``.
        slot: its number, for error messages.

    Attributes:
        waiting: what it waits for; None when it has finished.
        trace: the Pyro trace so far; LM sites carry ``unscaled_log_prob``, ``log_prob``,
            ``log_prob_sum`` and latents ``proposal_log_prob``.
        rejected_by: the name of the site whose hard condition failed, or None.
        returned: what the program returned.
        calls: how ``lm_sample`` was called at its sites, and what it returned.
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
        replay: Replay | None = None,
        shared: dict[Any, Any] | None = None,
        enumerate_latents: bool = False,
        score_closing: bool = False,
        score_late: bool = False,
        purpose: Purpose = "density",
        grad: bool = False,
        is_guide: bool = False,
        slot: int = 0,
    ) -> None:
        self.program, self.args = program, args
        self.proposer, self.purpose = proposer, purpose
        self.given = dict(given or {})
        self._known = dict(known or {})
        self.slot = slot
        self.waiting: Wait | None = None
        self.rejected_by: str | None = None
        self.returned: Any = None
        self._replay = Replay({}, {}) if replay is None else replay
        self._uncounted: list[Site] = []
        self._enumerate, self._score_closing, self._grad = enumerate_latents, score_closing, grad
        self._is_guide = is_guide
        self._late: list[ScoreWait] | None = [] if score_late else None
        self._site = ""
        self._at: tuple[str, Any] | None = None  # the site that it is at, and its distribution
        self.calls = self._replay.calls
        self._recorder = _Recorder(self, {} if shared is None else shared)
        self.coroutine = Coroutine(self._run, GlobalState.fresh(seed, grad=grad))

    # --- life ----------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace:
        trace = self._recorder.trace
        for name in trace.nodes if len(trace._pred) < len(trace.nodes) else ():
            if name not in trace._pred:
                trace._pred[name], trace._succ[name] = set(), set()
        return trace

    @property
    def finished(self) -> bool:
        return self.coroutine.finished and self.waiting is None

    @property
    def site(self) -> tuple[str, Any] | None:
        """The program's site whose value is being found, with its distribution; None: no site. (What the
        run waits for may be another draw of its guide.)"""
        return None if self._at is None or self._at[0] in self._recorder.trace.nodes else self._at

    def resume(self, answer: Any = None, *, restore: bool = True) -> None:
        """Run to the next wait or to the end (see ``Coroutine.resume``)."""
        self.waiting = None
        if self.coroutine.finished and self._late:
            self._score_sites(self._late, answer)
            self._late = []
            return
        try:
            self.waiting = self.coroutine.resume(answer, restore=restore)
            if self.finished:
                self._recorder.release()
        except Rejected:
            self.close()
        except Exception as error:
            self._explain(error)
            raise
        if self.coroutine.finished and self._late:
            self.waiting = LateScoresWait("", tuple(self._late))

    def close(self) -> None:
        """End the run; what it recorded stays."""
        self.waiting = None
        try:
            self.coroutine.close()
        finally:
            self._recorder.release()
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
        assert self._late is None, "runs that are scored late are not forked"
        proposer = self.proposer
        if proposer is not None and streams.proposer is not None:
            proposer = proposer.fork(streams.proposer)
        return self._again(
            Replay(self.sites, self.calls, self._at if self.waiting else None),
            {**self.given, **(given or {})},
            streams=streams,
            seed=0,
            proposer=proposer,
            known=self._known,
            enumerate_latents=self._enumerate,
            score_closing=self._score_closing,
            grad=self._grad,
            slot=streams.slot,
        )

    def rerun(
        self,
        before: Mapping[str, Site],
        given: Mapping[str, Given],
        *,
        seed: int,
        proposer: Proposer | None = None,
        streams: Particle | None = None,
    ) -> Particle:
        """A run of the same program, at its first wait, that repeats the recorded sites ``before``, has
        given values at later ones, and takes the others from ``proposer`` (None: the program), with
        the random streams of ``seed``, or those with which another run would go on."""
        slot = self.slot if streams is None else streams.slot
        options: Any = {"seed": seed, "proposer": proposer, "slot": slot}
        return self._again(Replay(before, self.calls), given, streams, **options)

    def _again(self, replay: Replay, given: Any, streams: Any = None, **options: Any) -> Particle:
        """A run of the same program, at its first wait."""
        options |= {"replay": replay, "given": given, "shared": self._recorder.shared}
        options |= {"is_guide": self._is_guide, "purpose": self.purpose}
        new = Particle(self.program, self.args, **options)
        if streams is not None:
            new.coroutine.global_state.take_streams(streams.coroutine.global_state)
        new.resume()
        return new

    def _finished_copy(self, streams: Particle) -> Particle:
        """A run that has ended is not changed any more, so what it recorded can be shared. The
        streams stay those of the slot, which may need them for a later fork."""
        new = copy(self)
        new._uncounted = list(self._uncounted)
        new.slot, new.proposer, new.coroutine = streams.slot, streams.proposer, copy(self.coroutine)
        new.coroutine.global_state = streams.coroutine.global_state
        return new

    # --- what it found -------------------------------------------------------------------------

    @property
    def sites(self) -> dict[str, Any]:
        """The sample sites recorded so far."""
        nodes = self._recorder.trace.nodes
        return {name: node for name, node in nodes.items() if node["type"] == "sample"}

    @property
    def latents(self) -> dict[str, Any]:
        """The latent sites recorded so far (no tool results, no subsample indices)."""
        return latents_of(self._recorder.trace)

    def take_log_weight(self) -> float:
        """log p - log q (nats) of the sites recorded since this was last called (scale applied)."""
        fresh, self._uncounted = self._uncounted, []
        return sum(map(site_log_weight, fresh), 0.0)

    @property
    def log_joint(self) -> float:
        """log R: Pyro's log joint of the trace so far (scale and mask applied), nats."""
        return sum((float(node["log_prob_sum"]) for node in self.sites.values()), 0.0)

    @property
    def killed_by(self) -> str | None:
        """The first site of probability zero, or None."""
        sites = self.sites.items()
        return next(
            (name for name, node in sites if float(node["log_prob_sum"]) == -math.inf), None
        )

    # --- inside the coroutine ------------------------------------------------------------------

    def _run(self) -> None:
        with self._recorder:
            trace = self._recorder.trace
            COERCIONS.append(partial(Unit.coerce, self._recorder.shared))
            trace.add_node("_INPUT", name="_INPUT", type="args", args=self.args, kwargs={})
            self.returned = call(self.program, self.args)
            self._replay.check_ended()
            if self.proposer is not None:
                self.proposer.finish(trace)
            trace.add_node("_RETURN", name="_RETURN", type="return", value=self.returned)

    def _visit(self, site: Site) -> None:
        """Find the value and the log-probability of a site, and record it."""
        name, replay = site["name"], self._replay
        self._site = name
        if self._is_guide and is_latent(site) and is_text(site["fn"]):
            dict.__setitem__(site, "fn", site["fn"].guided())
        if name in replay.left:
            recorded = replay.repeat(site)
            if len(_PYRO_STACK) > 1:  # handlers of the program may read what was found
                for key in _FOUND:
                    if key in recorded:
                        dict.__setitem__(site, key, recorded[key])
            elif not site["is_observed"]:
                dict.__setitem__(site, "value", recorded["value"])
            if not replay.left:
                self._end_replay()
        elif name in self._recorder.trace.nodes:
            raise ValueError(
                f"site '{name}' is used twice in one run of the program: give every site its own "
                f"name, in a loop for example f'{name}_{{i}}'"
            )
        else:
            replay.check_new(site)
            self._find(site)
        site["done"] = True

    def _end_replay(self) -> None:
        """All recorded sites are repeated: take them into the trace. (Runs share them: nobody changes
        them any more.)"""
        self._recorder.trace.nodes.update(self._replay.nodes)

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

    def _draw(self, site: Site) -> None:
        name, fn = site["name"], site["fn"]
        trace = self._recorder.trace
        _check_weightable(site, trace)
        given = self.given.get(name)
        if given is None and self.proposer is not None:
            given = self.proposer.propose(site, trace)
        if given is not None:
            site["value"] = given.value
            site["proposal_log_prob"] = given.proposal_log_prob
            log_prob = given.log_prob if given.log_prob is not None else self._score(site)
        elif self._enumerate and not is_text(fn):
            site["value"], log_prob = suspend(ChoiceWait(name, fn))
            site["proposal_log_prob"] = None
        else:
            value, log_prob, log_q = draw_value(site, self.purpose)
            dict.__setitem__(site, "value", value)  # which is one of the site's, without a check
            site["proposal_log_prob"] = log_q if log_q.dim() == 0 else log_q.sum()
        self._record(site, log_prob)

    def _score(self, site: Site) -> torch.Tensor:
        fn, value = site["fn"], site["value"]
        if site["name"] in self._known:
            log_prob, site["scored"] = self._known[site["name"]]
            return log_prob
        if not is_text(fn):
            return fn.log_prob(value, *site["args"], **site["kwargs"])
        if fn.is_constrained and not fn.supports(value):
            return _IMPOSSIBLE  # at once, even in runs that are scored late: the program stops here
        score_closing = self._score_closing and not site["is_observed"]
        wait = ScoreWait(site["name"], fn, value, score_closing)
        is_judged = site["infer"].get("hard") or not _BLIND.issuperset(map(type, _PYRO_STACK[1:]))
        if self._late is not None and not is_judged:
            self._late.append(wait)
            return _UNKNOWN
        log_prob, site["scored"] = suspend(wait)
        return log_prob

    def _score_sites(
        self, waits: Sequence[ScoreWait], answers: Sequence[tuple[torch.Tensor, Any]]
    ) -> None:
        """After the program has ended, record what texts were found to have as log-probabilities."""
        for wait, (log_prob, scored) in zip(waits, answers, strict=True):
            node = self._recorder.trace.nodes.get(wait.name)
            if node is not None:  # Pyro leaves out sites that ask for it
                node["scored"] = scored
                self._record(node, log_prob)

    def _record(self, site: Site, log_prob: torch.Tensor) -> None:
        site["unscaled_log_prob"] = log_prob
        scale, mask = site["scale"], site["mask"]
        if mask is not None or type(scale) is not float or scale != 1.0:
            log_prob = _scaled(site, log_prob)
        site["log_prob"] = log_prob
        site["log_prob_sum"] = log_prob.sum() if log_prob.dim() else log_prob

    def _explain(self, error: Exception) -> None:
        """Say where in the program an exception came from, and what the particle had drawn."""
        where = f"at or after site '{self._site}'" if self._site else "before its first site"
        program = f"{name_of(self.program)}({', '.join(map(_repr.repr, self.args))})"
        note = f"raised in particle {self.slot} of {program}, {where}"
        shown = []
        for name, node in self.sites.items():
            fn, value = node["fn"], node["value"]
            if is_text(fn):
                possible = fn.supports(value)
                text = fn.text(value) if possible else fn.lm.vocabulary.decode(fn.token_ids(value))
                shown.append(f"{name}={str(text)!r}")
            elif is_latent(node):
                shown.append(f"{name}={value.tolist() if torch.is_tensor(value) else value!r}")
        error.add_note(note + (f"; so far: {', '.join(shown)}" if shown else ""))


_IMPOSSIBLE = torch.tensor(-math.inf)
_UNKNOWN = torch.tensor(math.nan)  # a text's log-probability, as long as it waits for its score

_BLIND: set[type] = {ScaleMessenger, MaskMessenger, ConditionMessenger, pyro.plate}
"""Handlers that never read what was found at a site."""


H = TypeVar("H")


def blind(handler: type[H]) -> type[H]:
    """Mark a class of handlers that never reads what was found at a site."""
    _BLIND.add(handler)
    return handler


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


class _Recorder(TraceMessenger, CallMemory):
    """The outermost handler of a particle: it sees a site after all handlers of the program."""

    def __init__(self, particle: Particle, shared: dict[Any, Any]) -> None:
        super().__init__()
        self._particle: Any = particle
        self.shared = shared

    def release(self) -> None:
        """The run has ended: it is no longer held, so that it is freed as soon as nobody needs it."""
        self._particle = None

    def _process_message(self, msg: Site) -> None:
        if msg["type"] == "sample":
            self._particle._visit(msg)
        else:
            super()._process_message(msg)

    def _postprocess_message(self, msg: Site) -> None:
        if msg["type"] != "sample":
            super()._postprocess_message(msg)
            return
        particle, name = self._particle, msg["name"]
        if name in particle._replay.nodes or msg["infer"].get("_do_not_trace"):
            return
        node = self.trace.nodes[name] = dict(msg)
        particle._uncounted.append(node)
        if _is_hard(msg) and float(msg["log_prob_sum"].detach()) == -math.inf:
            particle.rejected_by = name
            raise Rejected(name)

    def recall(self, name: str, call: Call) -> Text | None:
        particle = self._particle
        replay = particle._replay
        text = replay.recall(name, call) if name in replay.left else None
        if text is not None:
            particle._site = name
            if not replay.left:
                particle._end_replay()
        return text

    def remember(self, name: str, call: Call, text: Text) -> None:
        self._particle.calls[name] = call, text


_FOUND = (
    "value", "unscaled_log_prob", "log_prob", "log_prob_sum", "proposal_log_prob", "scored",
)  # fmt: skip


def _is_hard(site: Site) -> bool:
    """Whether a site of probability zero ends the run: a hard condition, or a text under a constraint
    (but for what a guide draws, which is no condition)."""
    fn = site["fn"]
    is_condition = is_text(fn) and fn.is_constrained and fn.law != "proposal"
    return bool(site["infer"].get("hard")) or is_condition


def _scaled(site: Site, log_prob: torch.Tensor) -> torch.Tensor:
    """The log-probability (nats) of a site with its scale and mask. Of 0 times ``-inf``, which is no
    number, an observation or a factor counts as nothing, which is what scale 0 says; a hard condition
    that has failed, and a latent value that is none of its site's, stay impossible."""
    scale, mask = site["scale"], site["mask"]
    if not (isinstance(scale, (int, float)) and scale):
        is_undefined = (log_prob == -math.inf) & (torch.as_tensor(scale) == 0)
        if _is_hard(site) or is_latent(site):
            scale = torch.where(is_undefined, 1.0, scale)
        else:
            log_prob = torch.where(is_undefined, 0.0, log_prob)
    return scale_and_mask(log_prob, scale, mask)


def draw_value(
    site: Site, purpose: Purpose = "density"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a latent site, inside a particle's run, from its own distribution: a value, its log-density,
    and log q of the draw, which differs from it under a global constraint (unscaled, nats, of the
    distribution's batch shape)."""
    name, fn = site["name"], site["fn"]
    if is_text(fn):
        uniforms = torch.rand(fn.num_uniforms, dtype=torch.float64, device="cpu")
        return suspend(DrawWait(name, fn, uniforms, purpose=purpose))[:3]
    value = fn(*site["args"], **site["kwargs"])
    log_prob = fn.log_prob(value)
    return value, log_prob, log_prob


def score_value(site: Site, value: torch.Tensor) -> torch.Tensor:
    """The log-density of a value of a latent site under its own distribution, in the same way."""
    if is_text(site["fn"]):
        return suspend(ScoreWait(site["name"], site["fn"], value))[0]
    return site["fn"].log_prob(value, *site["args"], **site["kwargs"])


def score_draw(site: Site, value: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
    """log q of ``draw_value`` at a value whose log-density is known, in the same way."""
    fn = site["fn"]
    if is_text(fn) and fn.is_constrained and fn.law == "global":
        return suspend(ScoreWait(site["name"], fn.proposal(), value))[0]
    return log_prob


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
    if mask is not None and not bool(torch.as_tensor(mask).all()):
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
