"""Traces whose latent values are given: their density under a program, and under a guide of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from lmppl import runtime
from lmppl.distributions import LMText
from lmppl.guides import LMGuide
from lmppl.guides.automatic import AutomaticProposer
from lmppl.lm import LM
from lmppl.primitives import use
from lmppl.runtime import Given, Particle


def score_under(
    guide: Any,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    values: Sequence[Mapping[str, Any]],
    lm: LM | None,
    what: str = "latents",
) -> tuple[torch.Tensor, torch.Tensor]:
    """log R and log q of traces with given latents, each (N,) float64, nats.

    Args:
        guide: a ``LMGuide``, a guide program or None; what it leaves out is drawn from the model.
        model: the program.
        args: its arguments.
        values: per trace, every latent site's value: a tensor or a string.
        lm: the language model of sites that name none.
        what: these are, for messages.
    """
    automatic = isinstance(guide, LMGuide) and guide.program is None
    program = guide.program if isinstance(guide, LMGuide) else guide
    with nullcontext() if lm is None else use(lm), torch.no_grad():
        seen = guide.observations(args) if automatic else {}
        forced = [
            _Forced(each, f"{what}[{i}]", AutomaticProposer(guide, seen) if automatic else None)
            for i, each in enumerate(values)
        ]
        runs = [
            Particle(model, args, seed=i, proposer=each, slot=i) for i, each in enumerate(forced)
        ]
        with runtime.closing(runs):
            for run, proposer in zip(runs, forced, strict=True):
                run.resume()
                proposer.answer(run)
            while any(not run.finished for run in runs):
                runtime.settle(runs)
                for run, proposer in zip(runs, forced, strict=True):
                    proposer.answer(run)
        log_joint = torch.tensor([run.log_joint for run in runs], dtype=torch.float64)
        terms = [{n: _log_prob(node) for n, node in run.latents.items()} for run in runs]
        if automatic:
            for own, scores in zip(
                terms, guide.score([each.inner for each in forced], grad=False), strict=True
            ):
                own.update({name: float(score) for name, (score, _) in scores.items()})
        elif program is not None:
            for own, scored in zip(terms, _run_guide(program, args, runs), strict=True):
                own.update(scored)
    log_q = torch.tensor([math.fsum(each.values()) for each in terms], dtype=torch.float64)
    return log_joint, log_q


def _log_prob(node: Any) -> float:
    return float(node["unscaled_log_prob"].sum())


def _run_guide(
    program: Callable[..., Any], args: tuple[Any, ...], runs: Sequence[Particle]
) -> list[dict[str, float]]:
    """log q by site of what the runs of the model drew, under a guide program."""
    guides = []
    for slot, run in enumerate(runs):
        given = {name: Given(node["value"]) for name, node in run.latents.items()}
        guides.append(Particle(program, args, seed=slot, given=given, slot=slot))
    with runtime.closing(guides):
        for each in guides:
            each.resume()
        runtime.settle(guides)
        for each, run in zip(guides, runs, strict=True):
            waiting = [] if each.waiting is None else [each.waiting.name]
            extra = [name for name in [*each.latents, *waiting] if name not in run.latents]
            if extra:
                raise ValueError(
                    f"the guide draws site '{extra[0]}', which a given trace has not (its latents: "
                    f"{', '.join(run.latents)}): they must be the model's, on the same branch"
                )
        return [{n: _log_prob(node) for n, node in each.latents.items()} for each in guides]


class _Forced:
    """A proposer that draws what it is told to, and remembers it as the automatic guide's draw."""

    def __init__(
        self, values: Mapping[str, Any], what: str, inner: AutomaticProposer | None
    ) -> None:
        self.inner, self._given, self._what = inner, values, what
        self._values: dict[str, torch.Tensor] = {}

    def propose(self, site: Any, trace: Any) -> Given:
        name = site["name"]
        if name not in self._given:
            raise ValueError(
                f"{self._what} has no value for latent site '{name}', to which the program comes; "
                f"it has: {', '.join(self._given) or 'none'}"
            )
        value = self._values[name] = self._value(name, site["fn"])
        if self.inner is not None:
            self.inner.propose(site, trace)
            if name in self.inner.draws:
                draw = self.inner.draws[name]
                self.inner.draws[name] = dataclasses.replace(draw, value=value)
        return Given(value)

    def _value(self, name: str, fn: Any) -> torch.Tensor:
        value = self._given[name]
        if not isinstance(value, str):
            value = torch.as_tensor(value)
            if value.shape != fn.shape():
                raise ValueError(
                    f"{self._what}: site '{name}' has shape {tuple(fn.shape())}, given "
                    f"{tuple(value.shape)}"
                )
            return value
        if not isinstance(fn, LMText):
            raise ValueError(f"{self._what}: site '{name}' is no text, given {str(value)!r}")
        try:
            return fn.encode(value)
        except ValueError as error:
            raise ValueError(f"{self._what}: site '{name}': {error}") from None

    def answer(self, run: Particle) -> None:
        """Answer what the guide would draw."""
        while run.waiting is not None and run.waiting.kind == "draw":
            run.resume((self._values[run.waiting.name], torch.zeros(())))

    def finish(self, trace: Any) -> None:
        extra = [name for name in self._given if name not in self._values]
        if extra:
            latents = ", ".join(self._values) or "none"
            raise ValueError(
                f"{self._what} has a value for '{extra[0]}', which is no latent site of the program "
                f"on this input and branch; its latents: {latents}"
            )

    def fork(self, streams: Any) -> Any:
        raise NotImplementedError("forced runs are not forked")

    def close(self) -> None:
        """Nothing of it is suspended on its own."""
