"""Forward simulation of a program: endless data to train an amortized guide on.

    run the program forward, its observed sites drawn too      z, y ~ p(z, y)
    keep y as the observations; then z is an exact draw of     p(z | y)

That holds where the joint density is what forward simulation draws from, up to hard conditions: a
run that fails a ``require`` is discarded and drawn again, which draws from p(z, y | it holds). A text
under a global constraint is such a condition on a free text: it is drawn as the model writes it, and not
among the tokens that the constraint allows, until it matches or can't any more. One under a local
constraint is drawn from its own density, whose dead ends are discarded, too. It does not hold where the
program has factors, scaled sites or distributions with a mask of their own, and then an error says so.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor

from lmppl import runtime
from lmppl.checks import check_int
from lmppl.exclusive import exclusive
from lmppl.lm.tokens.text import Text
from lmppl.runtime import Particle, is_latent
from lmppl.runtime.arguments import check_program
from lmppl.runtime.particle import blind
from lmppl.runtime.sites import is_observation, value_of


@dataclass(frozen=True, eq=False)
class Simulated:
    """One forward run of a program: its latents are an exact draw of the posterior given the
    observations (and the results of the tools).

    Attributes:
        observations: what observed sites drew, by site; a ``Text`` keeps the drawn tokens.
        latents: values of the latent sites, by site.
        log_joint: log p(latents, observations), nats.
        sites: random ones and tools, as in Pyro's trace.
    """

    observations: dict[str, torch.Tensor | Text]
    latents: dict[str, torch.Tensor]
    log_joint: float
    sites: Mapping[str, Any] = field(repr=False)

    @property
    def is_all_observed(self) -> bool:
        """Whether ``observations`` holds all that the program observes (it lacks what
        ``poutine.mask`` hides, which is not simulated)."""
        observed = (name for name, node in self.sites.items() if is_observation(node))
        return all(name in self.observations for name in observed)

    def program(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """``model``, observing the simulated values in place of those that its arguments hold.

        It is to be called with the arguments of the simulation. Only the *sites* observe other
        values: a model that goes on with its argument ``y``, and not with what the site of ``y``
        returned, goes on with the old one, here as in the simulation.

        Raises:
            ValueError: in a run that observes other sites than the simulation did, or text of
                another length without ``stop`` and ``max_tokens``. Such a model has no posterior
                given these observations, since what it observes depends on its latents.
        """
        observations = self.observations  # alone: an input keeps its program, not the whole run

        @functools.wraps(model, updated=())
        def observing(*args: Any, **kwargs: Any) -> Any:
            observe = _Observe(observations)
            with observe:
                returned = model(*args, **kwargs)
            observe.check_all_met()
            return returned

        return observing


@exclusive()
def simulate(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    num: int,
    *,
    seed: int | None = None,
    observed: Collection[str] | None = None,
    max_attempts: int = 1000,
) -> list[Simulated]:
    """Forward runs of a program, side by side in shared language-model calls.

    Every observed site is drawn, from the distribution that it has with these arguments: text
    without ``stop`` and ``max_tokens`` in exactly as many tokens as was observed, with ``stop`` alone
    in at most one more. What ``poutine.mask`` hides keeps its value. Sites that name no language
    model use that of ``lmppl.use``.

    Args:
        model: a Pyro program.
        args: its positional arguments, observations included: they say what is observed.
        num: how many runs.
        seed: makes them reproducible; None: taken from torch's random stream.
        observed: sites that the arguments leave latent and that are to be observations too.
        max_attempts: how often a run that fails a hard condition is drawn again.

    Raises:
        ValueError: for a program whose simulated latents would be no posterior draws; for a name
            in ``observed`` that a run has no random site of; if ``max_attempts`` runs of one were all
            rejected.
    """
    num = check_int("num", num)
    check_program(model)
    seed = runtime.fresh_seed(seed)
    return _simulate_each(model, [args] * num, seed, _names(observed), max_attempts)


class SimulationStream(Iterator[tuple[tuple[Any, ...], Simulated]]):
    """Endless pairs of an input's arguments and a simulation of the program on them.

    It goes round the ``inputs`` (tuples of arguments), each time in another random order, and
    simulates ``block`` pairs together. A block is a function of the seed and its number alone, so a
    stream that skips what another has given goes on bit by bit (on the same machine) as that one. The
    other arguments are those of ``simulate``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        inputs: Sequence[tuple[Any, ...]],
        *,
        seed: int | None = None,
        observed: Collection[str] | None = None,
        block: int = 32,
        max_attempts: int = 1000,
    ) -> None:
        if not inputs:
            raise ValueError("inputs holds no input: give at least one, [(x, y)]")
        block = check_int("block", block)
        self._model, self._inputs, self._block = model, list(inputs), block
        self._observed, self._max_attempts = _names(observed), max_attempts
        self._seed = runtime.fresh_seed(seed)
        self._position = 0
        self._simulated: tuple[int, list[Any]] | None = None  # a block's number, and the block

    def __next__(self) -> tuple[tuple[Any, ...], Simulated]:
        number, within = divmod(self._position, self._block)
        if self._simulated is None or self._simulated[0] != number:
            self._simulated = number, self._simulate_block(number)
        self._position += 1
        return self._simulated[1][within]

    def skip(self, num: int) -> None:
        """Leave out the next ``num``, without simulating them."""
        self._position += num

    def forget(self) -> None:
        """Simulate anew what was simulated and has not come yet: the program has changed."""
        self._simulated = None

    @exclusive()
    def _simulate_block(self, number: int) -> list[Any]:
        first, size = number * self._block, len(self._inputs)
        rounds = range(first // size, (first + self._block - 1) // size + 1)
        order = [i for round_ in rounds for i in self._order(round_)]
        inputs = [self._inputs[order[first % size + k]] for k in range(self._block)]
        seed = _seed(self._seed, 0, number)
        runs = _simulate_each(self._model, inputs, seed, self._observed, self._max_attempts)
        return list(zip(inputs, runs, strict=True))

    def _order(self, number: int) -> list[int]:
        """The order of the inputs in one round."""
        generator = np.random.default_rng(_seed(self._seed, 1, number))
        return generator.permutation(len(self._inputs)).tolist()


def _names(observed: Collection[str] | None) -> tuple[str, ...]:
    if isinstance(observed, str):
        raise TypeError(f"observed takes a list of site names, given {observed!r}: [{observed!r}]")
    return tuple(observed or ())


def _seed(*words: int) -> int:
    """A seed of its own for every tuple of numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


# --- running forward ---------------------------------------------------------------------------


def _simulate_each(
    model: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    seed: int,
    observed: tuple[str, ...],
    max_attempts: int,
) -> list[Simulated]:
    """One run for each input, all side by side; those that are rejected are drawn again."""
    max_attempts = check_int("max_attempts", max_attempts)
    program = _Unobserve()(model)
    found: list[Simulated | None] = [None] * len(inputs)
    pending = list(range(len(inputs)))
    attempts, rejections = 0, Counter[str]()
    for number in itertools.count():
        # Of several runs at once the first that is not rejected counts, so their number changes
        # only the cost: it keeps batches wide where most runs fail.
        repeats = min(2**number, max(1, len(inputs) // len(pending)), max_attempts - attempts)
        slots = [i for i in pending for _ in range(repeats)]
        seeds = runtime.slot_seeds(_seed(seed, number), len(slots))
        particles = [
            Particle(program, inputs[i], seed=run_seed, purpose="simulation", slot=i)
            for i, run_seed in zip(slots, seeds, strict=True)
        ]
        with torch.no_grad(), runtime.ending(particles):
            runtime.resume(particles)
            runtime.run_to_end(particles)
        for i, particle in zip(slots, particles, strict=True):
            if particle.rejected_by is not None:
                rejections[particle.rejected_by] += 1
            elif found[i] is None:
                found[i] = _read(particle, observed)
        attempts += repeats
        pending = [i for i, run in enumerate(found) if run is None]
        if not pending:
            break
        if attempts >= max_attempts:
            sites = ", ".join(f"'{name}' ({count})" for name, count in rejections.most_common(3))
            raise ValueError(
                f"{attempts} forward runs of one input were all rejected, so it cannot be simulated. "
                f"Rejecting sites (rejected runs, of all inputs): {sites}. (A text under a constraint "
                "is drawn freely here, and is rejected if it does not match.) Loosen them, raise "
                "max_attempts, or train on given data"
            )
    return [run for run in found if run is not None]


def _read(particle: Particle, observed: tuple[str, ...]) -> Simulated:
    sites = particle.sites
    for name in observed:
        if name not in sites or not (is_latent(sites[name]) or is_observation(sites[name])):
            raise ValueError(
                f"observed names '{name}', but a run of the program ended without a random site of "
                f"that name; its random sites: {', '.join(particle.latents) or 'none'}. What is "
                "observed must be the same in every run"
            )
    drawn = {name for name, node in sites.items() if node["infer"].get("was_observed")}
    drawn |= {name for name in observed if is_latent(sites[name])}
    latents = particle.latents
    return Simulated(
        observations={name: value_of(node) for name, node in sites.items() if name in drawn},
        latents={name: node["value"] for name, node in latents.items() if name not in drawn},
        log_joint=particle.log_joint,
        sites=sites,
    )


class _Unobserve(Messenger):
    """Draws what a program observes. It stands around the program, inside the run's recorder.

    The mark ``was_observed`` is that of ``pyro.poutine.uncondition``, which also undoes factors.
    """

    def _pyro_sample(self, msg: Any) -> None:
        _check_drawn_from_its_density(msg)
        if not _is_simulated(msg):
            return
        msg["infer"]["was_observed"] = True
        if isinstance(msg["fn"], TorchDistributionMixin):
            msg["fn"] = _as_wide(msg["fn"], msg["value"])
        if bool(_shown(msg).all()):
            # The recorder draws it like a latent one: text together with that of other runs.
            msg["value"], msg["is_observed"] = None, False
            return
        fn, mask = msg["fn"], msg["mask"]
        drawn = fn(*msg["args"], **msg["kwargs"])
        shown = mask.reshape(mask.shape + (1,) * len(fn.event_shape))
        msg["value"] = torch.where(shown, drawn, msg["value"])


@blind
class _Observe(Messenger):
    """Observes simulated values. It stands around the program and so has the last word."""

    def __init__(self, observations: Mapping[str, torch.Tensor | Text]) -> None:
        super().__init__()
        self._observations = observations
        self._left = set(observations)

    def check_all_met(self) -> None:
        if self._left:
            name = min(self._left)
            raise ValueError(
                f"the program ended without site '{name}', which its simulation observed. {_SAME}"
            )

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self._observations:
            if _is_simulated(msg):
                raise ValueError(
                    f"the program observes site '{name}', which its simulation did not. {_SAME}"
                )
            return
        self._left.discard(name)
        value = self._observations[name]
        if isinstance(value, Text):
            ids, width = value.token_ids, fn.event_shape[0]
            if fn.choices is None and not fn.stopping.closes and len(ids) != width:
                raise ValueError(
                    f"site '{name}' observes the first {width} tokens of a text, in its simulation "
                    f"{len(ids)}. {_SAME} (Or give the site stop or max_tokens.)"
                )
            value = fn.value(ids if len(ids) <= width else ())
            if not fn.supports(value):
                # Another branch, whose site cannot produce this text: as a failed ``require``.
                msg["infer"]["hard"] = True
        msg["value"], msg["is_observed"] = value, True


_SAME = (
    "Call it with the arguments of the simulation; and which sites a program observes must not "
    "depend on its latents, nor how many tokens: use one site name in all branches."
)


def _is_simulated(msg: Any) -> bool:
    """Whether a site is an observation that is part of the joint, at least some of it."""
    return is_observation(msg) and bool(_shown(msg).any())


def _shown(msg: Any) -> torch.Tensor:
    """What of a site is not masked out."""
    return torch.as_tensor(True if msg["mask"] is None else msg["mask"])


def _as_wide(fn: Any, value: Any) -> Any:
    """The distribution of as many independent values as were observed at once."""
    shape = torch.as_tensor(value).shape
    batch = torch.broadcast_shapes(fn.batch_shape, shape[: len(shape) - len(fn.event_shape)])
    return fn if batch == fn.batch_shape else fn.expand(batch)


def _check_drawn_from_its_density(msg: Any) -> None:
    """Forward simulation must draw a site from what it contributes to the joint."""
    name, fn, hard = msg["name"], msg["fn"], msg["infer"].get("hard")
    if site_is_factor(msg) and not hard:
        raise _ignored(
            name, "is a factor", f"{_GIVE_DATA} (a hard condition can be a lmppl.require)"
        )
    if hard or not (is_latent(msg) or _is_simulated(msg)):
        return
    if not bool((torch.as_tensor(msg["scale"]) == 1).all()):
        what = f"is scaled by {msg['scale']} (poutine.scale, or a subsampled plate)"
        raise _ignored(name, what)
    while fn is not None:
        if isinstance(fn, dist.MaskedDistribution):
            what = "has a distribution with a mask of its own (.mask(...))"
            raise _ignored(name, what, "Mask the observation with pyro.poutine.mask")
        if isinstance(fn, dist.Delta) and bool((fn.log_density != 0).any()):
            raise _ignored(name, "is a Delta with a log_density, a factor")
        fn = getattr(fn, "base_dist", None)


_GIVE_DATA = "Give data to train on instead of simulating it"


def _ignored(name: str, what: str, instead: str = _GIVE_DATA) -> ValueError:
    return ValueError(
        f"site '{name}' {what}, which simulated draws would ignore: they would not come from the "
        f"posterior. {instead}"
    )
