"""What the automatic guide reads before it draws a latent text.

Its prompt holds marks for the latent texts before it, the observations that come later in the
program, a line each, and then what the model's own prefix holds. The prefix stands last, so that an
untrained guide continues it much as the model does.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor

from lmppl import runtime
from lmppl.distributions import LMText, ToolCall
from lmppl.lm.vocabulary import Vocabulary
from lmppl.runtime import is_latent

Observations = Mapping[str, tuple[int, ...]]
"""Name of an observed site to the tokens that show it."""


def find_observations(
    inputs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]],
    vocabulary: Vocabulary,
    condition_on: Literal["all"] | Collection[str],
    *,
    strict: bool,
) -> list[Observations]:
    """The observed sites of a program on each input, by two seeded runs of it, all side by side.

    Args:
        inputs: pairs of the program and its arguments. (Simulated inputs have a program of their
            own.)
        vocabulary: in whose tokens they are to be shown.
        condition_on: names of the sites that the guide may see, or ``"all"``.
        strict: raise if the runs disagree; otherwise show nothing.

    Raises:
        ValueError: ``strict`` and the runs observe different things, or ``condition_on`` names a
            site that neither run observes.
    """
    with runtime.closing([]) as particles:
        for program, args in inputs:
            particles += runtime.start(program, args, 2, seed=0)
        runtime.complete(particles)
    return [
        _observations_of(particles[2 * i : 2 * i + 2], vocabulary, condition_on, strict)
        for i in range(len(inputs))
    ]


def _observations_of(
    particles: Sequence[runtime.Particle],
    vocabulary: Vocabulary,
    condition_on: Literal["all"] | Collection[str],
    strict: bool,
) -> Observations:
    found: dict[str, Any] = {}
    ended = [particle for particle in particles if particle.rejected_by is None]
    differs: str | None = None
    for particle in particles:
        for name, node in particle.sites.items():
            if not is_observation(node):
                continue
            if name in found and not _same_value(found[name], node):
                differs = differs or name
            found.setdefault(name, node)
    for name in found:
        # A rejected run stopped early, so what it lacks says nothing.
        if any(name not in particle.sites for particle in ended):
            differs = differs or name
    if condition_on != "all":
        unknown = [name for name in condition_on if name not in found]
        if unknown:
            raise ValueError(
                f"condition_on names '{unknown[0]}', which is no observed site of the program on "
                f"this input; its observed sites: {', '.join(found) or 'none'}"
            )
        found = {name: node for name, node in found.items() if name in condition_on}
        differs = differs if differs in found else None
    if differs is not None:
        if strict and not all(map(_is_prompted, particles)):
            raise ValueError(
                f"two runs of the program on one input observe site '{differs}' differently, so the "
                "automatic guide cannot tell what to read. Give each latent site a prompt, "
                "infer={'guide_prompt': text}, or name what it may see in condition_on=[...]"
            )
        return {}
    shown = {name: _show(name, node, vocabulary) for name, node in found.items()}
    hidden = [name for name, ids in shown.items() if ids is None]
    written = inspect.unwrap(program)  # each simulated input has a program around it
    if hidden and strict and (written, hidden[0]) not in _warned:
        _warned.add((written, hidden[0]))
        warnings.warn(
            f"the automatic guide cannot see the observations {hidden}: the tokenizer has no tokens "
            "for them, so it cannot tell inputs apart by them",
            stacklevel=2,
        )
    return {name: ids for name, ids in shown.items() if ids}


