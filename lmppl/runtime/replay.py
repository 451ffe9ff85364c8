"""Replay: a run repeats what another recorded, and says at which site it does not.

A fork of a particle runs the program again, since Python cannot copy a frame. It gets the recorded
values, and every site is compared with the recorded one. An ``lm_sample`` that is called as it was
then, within the same handlers, cannot be another site: it gets the recorded ``Text`` at once, and
so a fork costs little more than the program's own Python. A factor costs no new distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import _Subsample

from lmppl.distributions import LMText, ToolCall
from lmppl.lm.tokens.text import Text
from lmppl.primitives import Call, keep

Site = Any  # a Pyro message


class Unit(dist.Unit):
    """The distribution of a factor that is one number: made, checked and sampled once for all sites
    of runs that share them. (Pyro knows factors by the name of this class.)"""

    def __init__(self, log_factor: torch.Tensor) -> None:
        super().__init__(log_factor.clone())
        self._sample = super().sample()

    def expand(self, batch_shape: Any, _instance: Any = None) -> dist.Unit:
        return dist.Unit(self.log_factor.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        return super().sample(torch.Size(sample_shape)) if sample_shape else self._sample

    @classmethod
    def coerce(cls, shared: dict[Any, Any], made: Any, args: Any, kwargs: Any) -> Unit | None:
        """A coercion of Pyro, for ``pyro.factor`` outside of all handlers but the recorder: what a
        factor costs is mostly its distribution. None: where something else is made.

        Args:
            shared: those there are.
            made, args, kwargs: a class of distributions and its arguments.
        """
        if made is not dist.Unit or len(_PYRO_STACK) != 1 or kwargs != _OF_FACTOR:
            return None
        (log_factor,) = args
        if (
            type(log_factor) is not torch.Tensor
            or log_factor.dim()
            or log_factor.requires_grad
            or not log_factor.is_cpu
        ):
            return None
        kept = shared.setdefault(
            cls, {}
        )  # apart from the texts': it may fill with continuous values
        key = log_factor.dtype, log_factor.item()
        return kept.get(key) or keep(kept, key, cls(log_factor))


_OF_FACTOR = {"has_rsample": None}


class ReplayError(RuntimeError):
    """A program did not repeat itself when it was run again on recorded values."""


class Replay:
    """What a run is to repeat before anything new happens; ``left``: those sites that remain.

    Args:
        nodes: the recorded sites, by name, in their order.
        calls: how ``lm_sample`` was called at some of them, and what it returned. (To the attribute
            the run adds its own.)
        next_site: name and distribution of the site at which the recorded run waits, if it does.
    """

    def __init__(
        self,
        nodes: Mapping[str, Site],
        calls: Mapping[str, tuple[Call, Text]],
        next_site: tuple[str, Any] | None = None,
    ) -> None:
        self.nodes, self.calls, self._next_site = nodes, dict(calls), next_site
        self.left = dict(nodes)

    def recall(self, name: str, call: Call) -> Text | None:
        """What the recorded run got at a site by this very call of ``lm_sample``, and the site is
        repeated; None: the call was another one, or is not known."""
        recorded = self.calls.get(name)
        if recorded is None or not recorded[0].same_as(call):
            return None
        del self.left[name]
        return recorded[1]

    def repeat(self, site: Site) -> Site:
        """The recorded site, which a site of its name must be. Raises ``ReplayError`` otherwise."""
        name, fn, recorded = site["name"], site["fn"], self.left.pop(site["name"])
        before = recorded["fn"]
        if type(fn) is Unit and fn is before:
            same = True
        elif isinstance(fn, dist.Unit) and isinstance(before, dist.Unit):
            same = torch.equal(fn.log_factor, before.log_factor)
        else:
            same = _is_same_distribution(fn, site, recorded)
            if same and site["is_observed"]:
                same = torch.equal(site["value"], recorded["value"])
        if not same or site["is_observed"] != recorded["is_observed"]:
            raise _other_distribution(name, fn, before)
        if site["scale"] is not recorded["scale"] or site["mask"] is not recorded["mask"]:
            for what in ("scale", "mask"):
                _check_equal(name, what, site[what], recorded[what])
        return recorded

    def check_new(self, site: Site) -> None:
        """Raise ``ReplayError`` if a site that was not recorded comes too early, or is not that at
        which the recorded run waits: else values of one distribution would count as another's."""
        if self.left:
            raise ReplayError(
                f"a replayed run met site '{site['name']}' before the recorded site "
                f"'{self._missing}'. {_DETERMINISM}"
            )
        if self._next_site is None:
            return
        (name, fn), self._next_site = self._next_site, None
        if site["name"] != name:
            raise ReplayError(
                f"a replayed run met site '{site['name']}' instead of '{name}', at which the "
                f"recorded one waits. {_DETERMINISM}"
            )
        same = fn.same_as(site["fn"]) if isinstance(fn, LMText) else type(fn) is type(site["fn"])
        if not same:
            raise _other_distribution(name, site["fn"], fn)

    def check_ended(self) -> None:
        """Raise ``ReplayError`` if the run ends before it has repeated all."""
        if self.left or self._next_site is not None:
            raise ReplayError(
                f"a replayed run ended before site '{self._missing}' of the recorded one. "
                f"{_DETERMINISM}"
            )

    @property
    def _missing(self) -> str:
        return next(iter([*self.left, *([] if self._next_site is None else self._next_site[:1])]))


_DETERMINISM = (
    "Between its sites a program must be deterministic: draw random numbers with pyro.sample, and "
    "call what is not repeatable through lmppl.tool."
)


def _other_distribution(name: str, fn: Any, recorded: Any) -> ReplayError:
    constraints = [f.stopping.constraint for f in (fn, recorded) if isinstance(f, LMText)]
    if len(constraints) == 2 and constraints[0] != constraints[1]:
        one, other = constraints
        return ReplayError(
            f"at site '{name}' a replayed run has another constraint than the recorded one: {one!r} "
            f"against {other!r}. A constraint of your own whose attributes may change equals only "
            f"itself: make it once, outside of the program, or let its class define key. {_DETERMINISM}"
        )
    return ReplayError(
        f"at site '{name}' a replayed run has another distribution, prefix or observation than the "
        f"recorded one: {fn} against {recorded}. {_DETERMINISM}"
    )


def _is_same_distribution(fn: Any, site: Site, recorded: Site) -> bool:
    """Whether a site has the recorded distribution, or at least density of the recorded value."""
    if isinstance(fn, LMText):
        return fn.same_as(recorded["fn"])
    if isinstance(fn, (ToolCall, _Subsample)):
        return type(fn) is type(recorded["fn"])
    log_prob = fn.log_prob(recorded["value"], *site["args"], **site["kwargs"])
    return torch.equal(log_prob, recorded["unscaled_log_prob"])


def _check_equal(name: str, what: str, value: Any, recorded: Any) -> None:
    """Raise ``ReplayError`` unless two scales or masks are equal: numbers, tensors or None."""
    if value is None or recorded is None:
        same = value is recorded
    else:
        same = torch.equal(torch.as_tensor(value), torch.as_tensor(recorded))
    if not same:
        raise ReplayError(
            f"at site '{name}' a replayed run has {what}={value}, and the recorded one had "
            f"{what}={recorded}. {_DETERMINISM}"
        )
