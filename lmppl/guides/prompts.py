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

    A run that is rejected stops before what it would have observed, so others are made, up to 64.

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
    runs: list[list[runtime.Particle]] = [[] for _ in inputs]
    pending = list(range(len(inputs)))
    with runtime.closing([]) as particles:
        for number, num in enumerate(_ROUNDS):
            for i in pending:
                program, args = inputs[i]
                runs[i] += runtime.start(program, args, num, seed=number)
                particles += runs[i][-num:]
            runtime.complete(particles)
            pending = [i for i in pending if len(_ended(runs[i])) < 2]
            if not pending:
                break
    return [_observations_of(own, vocabulary, condition_on, strict) for own in runs]


_ROUNDS = (2, 2, 4, 8, 16, 32)
"""Runs of an input at a time, until two have come to their end."""


def _ended(particles: Sequence[runtime.Particle]) -> list[runtime.Particle]:
    return [particle for particle in particles if particle.rejected_by is None]


def _observations_of(
    particles: Sequence[runtime.Particle],
    vocabulary: Vocabulary,
    condition_on: Literal["all"] | Collection[str],
    strict: bool,
) -> Observations:
    found: dict[str, Any] = {}
    ended = _ended(particles)[:2]
    particles = ended if len(ended) == 2 else particles
    differing: list[str] = []
    for particle in particles:
        for name, node in particle.sites.items():
            if not is_observation(node):
                continue
            if name in found and not _same_value(found[name], node):
                differing.append(name)
            found.setdefault(name, node)
    for name in found:
        # A rejected run stopped early, so what it lacks says nothing.
        if any(name not in particle.sites for particle in ended):
            differing.append(name)
    if condition_on != "all":
        unknown = [name for name in condition_on if name not in found]
        if unknown:
            short = "" if ended else f" (none of {len(particles)} runs of it came to its end)"
            raise ValueError(
                f"condition_on names '{unknown[0]}', which is no observed site of the program on "
                f"this input; its observed sites: {', '.join(found) or 'none'}{short}"
            )
        found = {name: node for name, node in found.items() if name in condition_on}
        differing = [name for name in differing if name in found]
    if differing:
        if strict and not all(map(_is_prompted, particles)):
            raise ValueError(
                f"two runs of the program on one input observe site '{differing[0]}' differently, so "
                "the automatic guide cannot tell what to read. Give each latent site a prompt, "
                "infer={'guide_prompt': text}, or name what it may see in condition_on=[...]"
            )
        return {}
    return show(found, particles[0].program, vocabulary, strict=strict)


def show(
    found: Mapping[str, Any], program: Callable[..., Any], vocabulary: Vocabulary, *, strict: bool
) -> Observations:
    """Observed sites in the tokens of a vocabulary.

    Args:
        found: name to Pyro message.
        program: that they are of.
        vocabulary: in whose tokens they are to be shown; those that it cannot show are left out.
        strict: warn of them, once a program.
    """
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


def _is_prompted(particle: runtime.Particle) -> bool:
    """Whether the user gave a prompt for each latent text of a run."""
    return all(
        node["infer"].get("guide_prompt") is not None
        for node in particle.latents.values()
        if isinstance(node["fn"], LMText)
    )


def is_observation(node: Any) -> bool:
    """Whether a site is data: observed, and no factor, tool or deterministic value."""
    return (
        node["is_observed"]
        and not site_is_factor(node)
        and not node["infer"].get("_deterministic")
        and not isinstance(node["fn"], ToolCall)
    )


def _same_value(first: Any, second: Any) -> bool:
    one, two = first["value"], second["value"]
    return one.shape == two.shape and bool((one == two).all())


_warned: set[tuple[Any, str]] = set()


def _show(name: str, node: Any, vocabulary: Vocabulary) -> tuple[int, ...] | None:
    """The tokens of an observation: a text as it is, anything else as ``name = value``.

    None where the vocabulary has not its characters.
    """
    fn, value = node["fn"], node["value"]
    if isinstance(fn, LMText) and not fn.batch_shape and fn.lm.vocabulary.same_as(vocabulary):
        return tuple(t for t in fn.token_ids(value) if t not in vocabulary.eos_ids)
    return _encode(
        str(fn.text(value)) if isinstance(fn, LMText) else f"{name} = {value.tolist()}", vocabulary
    )


@lru_cache(maxsize=256)  # a tokenizer's refusal takes milliseconds, and is not remembered there
def _encode(text: str, vocabulary: Vocabulary) -> tuple[int, ...] | None:
    try:
        return vocabulary.encode(text)
    except ValueError:
        return None


def guide_prompt(site: Any, trace: Trace, observations: Observations) -> tuple[int, ...]:
    """The tokens after which the automatic guide draws a latent text.

    Args:
        site: the latent site's Pyro message.
        trace: the run so far.
        observations: of the input; those that the run has passed already are left out.
    """
    fn: LMText = site["fn"]
    vocabulary = fn.lm.vocabulary
    own = site["infer"].get("guide_prompt")
    if own is not None:
        return fn.lm.encode(own, name=site["name"])
    newline = _encode("\n", vocabulary) or ()
    later = [ids for name, ids in observations.items() if name not in trace.nodes]
    lines = tuple(token for ids in later for token in (*ids, *newline))
    eos = vocabulary.eos_id
    head = () if eos is None else _marks(trace, fn.prefix_ids, eos)
    bos = vocabulary.bos_ids
    if bos and fn.prefix_ids[: len(bos)] == bos:
        return (*bos, *head, *lines, *fn.prefix_ids[len(bos) :])
    return (*head, *lines, *fn.prefix_ids)


def _marks(trace: Trace, prefix_ids: tuple[int, ...], eos: int) -> tuple[int, ...]:
    """What stands in front, for each latent text that the run has drawn: EOS; and if it ended by
    EOS, another one, with the text between them where it is the end of the prefix.

    A text that ended by EOS leaves no mark of its end in a later prefix. So the prompt of a second
    site can be that of the middle of the first; and with ``[x, z]`` as the prefix of w, "a" then
    "b" is z = "ab", or z = "a" and the beginning of w, or w alone. The model answers all of them
    alike; the posterior does not. The marks tell them apart, and mean no more to the untrained
    model than that other documents came before.
    """
    marks: list[int] = []
    for node in trace.nodes.values():
        fn = node.get("fn")
        if node["type"] != "sample" or not isinstance(fn, LMText) or not is_latent(node):
            continue
        if len(marks) >= _MOST_MARKS:
            break
        marks.append(eos)
        if fn.batch_shape:
            continue
        *ids, last = fn.token_ids(node["value"])
        if last in fn.lm.vocabulary.eos_ids:
            adjoins = ids and prefix_ids[-len(ids) :] == tuple(ids)
            marks += [*ids, eos] if adjoins else [eos]
    return tuple(marks)


_MOST_MARKS = 16
