"""Saved traces, run again by their program: so they get their distributions back.

    run the program on the saved values and tool results, with the saved log-probabilities
    compare every site with the saved one

No language model is asked, but for what had not been scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine import Trace

from lmppl import runtime
from lmppl.distributions import LMText, ToolCall
from lmppl.exclusive import exclusive
from lmppl.posterior.columns import unsaved_tools
from lmppl.posterior.saving import Loaded
from lmppl.runtime import Given, Particle
from lmppl.runtime.arguments import name_of
from lmppl.runtime.sites import has_value, is_latent, is_text

_FIX = "load the posterior with the program and arguments that it was made with"
_SAME = 1e-3  # nats; what a processor rounds differently


def rerun(
    loaded: Loaded, program: Callable[..., Any], args: tuple[Any, ...]
) -> dict[int, tuple[Trace, Any]]:
    """The different traces of a saved posterior that are alive, by their numbers, as ``program(*args)``
    makes them, and what it returns in each. Those of weight zero may have ended early, and stay as
    they were saved. Raises as ``replayed`` does."""
    weights = loaded.samples.log_weights.tolist()
    pairs = zip(loaded.trace, weights, strict=True)
    live = sorted({number for number, log_weight in pairs if log_weight > -math.inf})
    fingerprints: list[dict[str, str | None]] = [{} for _ in loaded.distinct]
    for site in loaded.columns["sites"]:
        if site["kind"] == "text":
            for i, fingerprint in zip(site["at"].tolist(), site["fingerprints"], strict=True):
                fingerprints[i][site["name"]] = fingerprint
    traces = [loaded.distinct[number] for number in live]
    found = replayed(traces, [fingerprints[number] for number in live], program, args)
    return dict(zip(live, found, strict=True))


@exclusive()
def replayed(
    traces: Sequence[Trace],
    fingerprints: Sequence[Mapping[str, str | None]],
    program: Callable[..., Any],
    args: tuple[Any, ...],
) -> list[tuple[Trace, Any]]:
    """The traces as ``program(*args)`` makes them, and what it returns in each.

    Args:
        traces: complete ones, of a saved posterior.
        fingerprints: of each, name of a text's site to the fingerprint of its distribution.
        program, args: what they were made by.

    Raises:
        ValueError: if this is another program, or has other arguments; says at which site.
    """
    if tools := unsaved_tools(traces):
        raise ValueError(
            f"tool '{tools[0]}' returned what could not be saved, so the program cannot be run on it "
            "again: leave out model= to load the values"
        )
    particles = [_particle(trace, program, args, slot) for slot, trace in enumerate(traces)]
    with runtime.ending(particles):
        try:
            runtime.resume(particles)
            runtime.run_to_draws(particles)
        except Exception as error:
            error.add_note(f"raised while the saved traces were run again: {_FIX}")
            raise
        for particle, trace, expected in zip(particles, traces, fingerprints, strict=True):
            _check_same(particle, trace, expected)
    return [(particle.trace, particle.returned) for particle in particles]


def _particle(
    trace: Trace, program: Callable[..., Any], args: tuple[Any, ...], slot: int
) -> Particle:
    """A run that is to have the values of a trace. It has not begun."""
    given, known = {}, {}
    for name in [name for name in trace.nodes if has_value(trace, name)]:
        node = trace.nodes[name]
        log_prob = node.get("unscaled_log_prob")
        if isinstance(node["fn"], ToolCall) or is_latent(node):
            is_number = not hasattr(node["fn"], "text")  # which costs little to score
            given[name] = Given(node["value"], None if is_number else log_prob)
        if log_prob is not None and hasattr(node["fn"], "text"):
            known[name] = log_prob, None
    return Particle(program, args, seed=0, given=given, known=known, slot=slot)


def _check_same(particle: Particle, trace: Trace, fingerprints: Mapping[str, str | None]) -> None:
    """Raise ``ValueError`` unless a run has the sites of a trace, and their densities. What the trace
    says of proposals goes to the run."""
    saved = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    run = particle.sites
    here = f"the program {name_of(particle.program)}, on these arguments,"
    if particle.waiting is not None:
        at = particle.waiting.name
        raise ValueError(f"{here} comes to site '{at}', which the saved trace has not: {_FIX}")
    extra = [name for name, node in run.items() if name not in saved and _counts(node)]
    if missing := [*extra, *(name for name in saved if name not in run)]:
        where = "the saved trace has not" if extra else "is in the saved trace but not in its run"
        raise ValueError(f"{here} has another site '{missing[0]}', which {where}: {_FIX}")
    for name, node in saved.items():
        if not _is_same(run[name], node, fingerprints.get(name)):
            raise ValueError(
                f"{here} has another distribution, prefix or observation at site '{name}' than the "
                f"saved trace: {_FIX}"
            )
        if "proposal_log_prob" in node:
            run[name]["proposal_log_prob"] = node["proposal_log_prob"]


def _counts(node: Any) -> bool:
    """Whether a site is one that is saved: no plate."""
    return type(node["fn"]).__name__ != "_Subsample"


def _is_same(node: Any, saved: Any, fingerprint: str | None) -> bool:
    if bool(node["is_observed"]) != bool(saved["is_observed"]):
        return False
    if is_text(node["fn"]) and node["fn"].fingerprint != fingerprint:
        return False
    if isinstance(node["fn"], LMText) or node["is_observed"]:
        one, other = node["value"], saved["value"]
        if one.shape != other.shape or not torch.allclose(one, other.to(one.dtype), rtol=1e-5):
            return False
    if (before := saved.get("unscaled_log_prob")) is None:
        return True
    after = node["unscaled_log_prob"]
    return after.shape == before.shape and all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=_SAME)
        for a, b in zip(after.flatten().tolist(), before.flatten().tolist(), strict=True)
    )
