"""What the automatic guide reads before it draws a latent text.

Its prompt holds marks for the latents before it, with those that its prefix does not hold, the
observations that come later in the program, a line each, and then the model's own prefix. (Why:
``docs/guides.md``, "What the automatic guide is".)
"""

from __future__ import annotations

import bisect
import inspect
import os.path
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from pyro.poutine.trace_struct import Trace

from lmppl import runtime
from lmppl.distributions import LMText
from lmppl.lm.tokens.vocabulary import Vocabulary
from lmppl.runtime import Particle, is_latent, latents_of
from lmppl.runtime.arguments import Args
from lmppl.runtime.sites import is_continuous, is_observation

ProgramInput = tuple[Callable[..., Any], Args]
"""A program and its arguments. (Each simulated input has a program of its own.)"""

SiteNames = Literal["all"] | Collection[str]
"""Names of the observed sites that a guide may see, or ``"all"``."""

Tokens = tuple[int, ...]
Observations = Mapping[str, Tokens]
"""Name of an observed site to the tokens that show it."""

OPENING = ""
"""Among them, how the program's first text begins, if a number is drawn before it."""

_ROUNDS = (2, 2, 4, 8, 16, 32)  # runs of an input at a time, until one has come to its end
_MOST_MARKS = 16
_MOST_SHOWN = 256
_MOST_NUMBERS = 16
_NUMBER = re.compile(r"-?\d+\.?\d*(?:[eE][-+]?\d+)?")
_warned: set[tuple[Any, str]] = set()


def find_observations(
    inputs: Sequence[ProgramInput], vocabulary: Vocabulary, condition_on: SiteNames, *, strict: bool
) -> list[Observations]:
    """The observed sites on each input that a guide may see, in the tokens of a vocabulary.

    They are found by two seeded runs of an input, all side by side. A run that is rejected stops
    before what it would have observed, so others are made, up to 64.

    Raises:
        ValueError: if the runs of an input observe different things and ``strict`` (else none is
            shown), or ``condition_on`` names a site that no run observes.
    """
    runs: list[list[Particle]] = [[] for _ in inputs]
    pending = list(range(len(inputs)))
    with runtime.ending([]) as particles:
        for number, num in enumerate(_ROUNDS):
            for i in pending:
                program, args = inputs[i]
                runs[i] += runtime.start(program, args, num, seed=number)
                particles += runs[i][-num:]
            runtime.run_to_end(particles)
            pending = [i for i in pending if all(run.rejected_by is not None for run in runs[i])]
            if not pending:
                break
    return [_observations_of(of_input, vocabulary, condition_on, strict) for of_input in runs]


def _observations_of(
    particles: Sequence[Particle], vocabulary: Vocabulary, condition_on: SiteNames, strict: bool
) -> Observations:
    found: dict[str, Any] = {}
    ended = [particle for particle in particles if particle.rejected_by is None][:2]
    particles = ended if len(ended) == 2 else particles
    differing: list[str] = []
    for particle in particles:
        for name, node in particle.sites.items():
            if is_observation(node):
                first = found.setdefault(name, node)
                if not torch.equal(first["value"], node["value"]):
                    differing.append(name)
    # A rejected run stopped early, so what it lacks says nothing.
    differing += [n for n in found if any(n not in particle.sites for particle in ended)]
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
        texts = [n for p in particles for n in p.latents.values() if isinstance(n["fn"], LMText)]
        if strict and any(node["infer"].get("guide_prompt") is None for node in texts):
            raise ValueError(
                f"two runs of the program on one input observe site '{differing[0]}' differently, so "
                "the automatic guide cannot tell what to read. Give each latent site a prompt, "
                "infer={'guide_prompt': text}, or name what it may see in condition_on=[...]"
            )
        return {}
    shown = show(found, particles[0].program, vocabulary, strict=strict)
    return {**_opening(particles, vocabulary), **shown}


def _opening(particles: Sequence[Particle], vocabulary: Vocabulary) -> Observations:
    """What the first texts of some runs have in common, where a head has no text to read."""
    if not number_comes_first(particles[0].sites):
        return {}
    texts = [[n["fn"] for n in p.sites.values() if is_text(n, vocabulary)] for p in particles]
    prefixes = [fns[0].prefix_ids for fns in texts if fns]  # a rejected run may have none
    common = tuple(os.path.commonprefix(prefixes))
    return {OPENING: _split_bos(common, vocabulary)[1]} if prefixes else {}


def number_comes_first(sites: Mapping[str, Any]) -> bool:
    """Whether a run has drawn something else before its first text."""
    first = next((node for node in sites.values() if is_latent(node)), None)
    return first is not None and not isinstance(first["fn"], LMText)


def is_text(node: Any, vocabulary: Vocabulary) -> bool:
    """Whether a site is a text in the tokens of a vocabulary."""
    fn = node["fn"]
    return isinstance(fn, LMText) and not fn.batch_shape and fn.lm.vocabulary.same_as(vocabulary)


def _split_bos(ids: Tokens, vocabulary: Vocabulary) -> tuple[Tokens, Tokens]:
    num = len(vocabulary.bos_ids)
    return (ids[:num], ids[num:]) if ids[:num] == vocabulary.bos_ids else ((), ids)


def show(
    found: Mapping[str, Any], program: Callable[..., Any], vocabulary: Vocabulary, *, strict: bool
) -> Observations:
    """Observed sites of a program in the tokens of a vocabulary. Those that it cannot show are left
    out; if ``strict``, it is warned of them, once a program."""
    shown = {name: _show(node, vocabulary) for name, node in found.items()}
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


def _show(node: Any, vocabulary: Vocabulary) -> Tokens | None:
    """The tokens of a site: a text as it is, less EOS, anything else as ``name = value``; None where
    the vocabulary has not its characters."""
    fn, value = node["fn"], node["value"]
    if is_text(node, vocabulary):
        return tuple(t for t in fn.token_ids(value) if t not in vocabulary.eos_ids)
    text = str(fn.text(value)) if isinstance(fn, LMText) else f"{node['name']} = {value.tolist()}"
    return _encode(text, vocabulary)


@lru_cache(maxsize=256)  # a tokenizer's refusal takes milliseconds, and is not remembered there
def _encode(text: str, vocabulary: Vocabulary) -> Tokens | None:
    try:
        return vocabulary.encode(text)
    except ValueError:
        return None


def guide_prompt(site: Any, trace: Trace, observations: Observations, told: set[str]) -> Tokens:
    """The tokens after which the automatic guide draws a latent text.

    Where the context has no room for all, each observation is cut to its first k tokens, with the
    largest k that leaves room for a mark of each earlier latent.

    Args:
        site: the latent site's Pyro message.
        trace: the run so far.
        observations: of the input; those that the run has passed already are left out.
        told: names of sites of which it was warned that the observations are cut; it is added to.

    Raises:
        ValueError: if the prompt that the user gave for the site is too long.
    """
    name, fn = site["name"], site["fn"]
    vocabulary, limit = fn.lm.vocabulary, fn.lm.context_length
    given = site["infer"].get("guide_prompt")
    if given is not None:
        prompt = fn.lm.encode(given, name=name)
        if limit is not None and len(prompt) + fn.event_shape[0] > limit:
            raise ValueError(
                f"site '{name}': its guide_prompt of {len(prompt)} tokens, and up to "
                f"{fn.event_shape[0]} more, do not fit the context of {fn.lm.name!r}, {limit} "
                "tokens: shorten infer={'guide_prompt': ...}"
            )
        return prompt
    earlier = list(latents_of(trace).values())[-_MOST_MARKS:]
    later = {name: ids for name, ids in observations.items() if name not in trace.nodes}
    below, room = lines(later, vocabulary), _MOST_SHOWN
    if limit is not None:
        room = limit - len(fn.prefix_ids) - fn.event_shape[0]
        if len(below) > room:
            whole, below = below, _cut_lines(later, vocabulary, room - len(earlier))
            if name not in told and room >= 0:  # (else the program's own prefix is too long)
                told.add(name)
                warnings.warn(
                    f"site '{name}': the guide reads {len(below)} of the {len(whole)} tokens that "
                    f"show the observations, the beginning of each, since the context of "
                    f"{fn.lm.name!r} holds {limit}. Name those that it needs in condition_on=[...], "
                    "or give the site a prompt, infer={'guide_prompt': text}",
                    stacklevel=2,
                )
        room = min(_MOST_SHOWN, room - len(below))
    bos, prefix = _split_bos(fn.prefix_ids, vocabulary)
    return (*bos, *_marks(earlier, fn, room), *below, *prefix)


def lines(observations: Observations, vocabulary: Vocabulary) -> Tokens:
    """Observations, a line each where the vocabulary has a newline, and less ``OPENING``."""
    newline = _encode("\n", vocabulary) or ()
    shown = [ids for name, ids in observations.items() if name != OPENING]
    return tuple(token for ids in shown for token in (*ids, *newline))


def _cut_lines(observations: Observations, vocabulary: Vocabulary, room: int) -> Tokens:
    """``lines`` of the first k tokens of each observation, with the largest k for which they have
    room; none if there is room for none."""

    def cut(k: int) -> Tokens:
        return lines({name: ids[:k] for name, ids in observations.items()}, vocabulary)

    longest = max((len(ids) for ids in observations.values()), default=0)
    k = bisect.bisect_right(range(longest + 1), room, key=lambda k: len(cut(k))) - 1
    return cut(k) if k > 0 else ()


def _marks(latents: Sequence[Any], fn: LMText, room: int) -> Tokens:
    """What stands in front, for each latent that the run has drawn, in at most ``room`` tokens.

    A text that the prefix holds has EOS alone; if it ended by EOS, another one, with the text
    between them where it is the end of the prefix. What the prefix does not hold stands there as a
    document of its own, a text as it is, a number as ``name = value``; if there is no room for all,
    the latest do.
    """
    # Room for a mark of each is kept, if there is any.
    least = _eos(fn.lm.vocabulary) if room >= len(latents) else ()
    room -= len(least) * len(latents)
    marks: list[Tokens] = []
    for node in reversed(latents):
        mark = _mark(node, fn)
        room -= len(mark) - len(least)
        marks.append(mark if room >= 0 else least)
    return tuple(token for mark in reversed(marks) for token in mark)


def _eos(vocabulary: Vocabulary) -> Tokens:
    return () if vocabulary.eos_id is None else (vocabulary.eos_id,)


def _mark(node: Any, fn: LMText) -> Tokens:
    vocabulary, other = fn.lm.vocabulary, node["fn"]
    eos = _eos(vocabulary)
    if not isinstance(other, LMText) or other.batch_shape:
        return _as_document(_written(node, vocabulary), vocabulary)
    visible = _show(node, vocabulary)
    if not is_text(node, vocabulary) or (visible and visible not in fn.texts_in_prefix):
        return _as_document(visible, vocabulary) or eos
    if other.token_ids(node["value"])[-1] not in vocabulary.eos_ids:
        return eos
    between = visible if visible and eos and fn.prefix_ids[-len(visible) :] == visible else ()
    return (*eos, *between, *eos)


def _as_document(ids: Tokens | None, vocabulary: Vocabulary) -> Tokens:
    """Tokens on their own, so that they run into nothing that follows."""
    eos = _eos(vocabulary)
    return () if ids is None else (*eos, *ids, *(_encode("\n", vocabulary) or eos))


def _written(node: Any, vocabulary: Vocabulary) -> Tokens | None:
    """The tokens of a latent that is no text; None where there is no way to write it. A vocabulary
    without digits writes whole numbers in binary, by its first two ordinary tokens."""
    value = node["value"]
    if value.numel() > _MOST_NUMBERS:
        return None
    written = str(value.tolist())
    if is_continuous(node):
        written = _NUMBER.sub(lambda found: f"{float(found[0]):.3g}", written)
    has_digits = _encode("0123456789", vocabulary) is not None
    ids = _encode(f"{node['name']} = {written}", vocabulary) if has_digits else None
    digits = [t for t in range(min(vocabulary.size, 64)) if t not in vocabulary.special_ids][:2]
    if ids is not None or is_continuous(node) or len(digits) < 2:
        return ids
    bits: list[int] = []
    for number in value.reshape(-1).long().tolist():
        code = 2 * number if number >= 0 else -2 * number - 1  # signs folded away
        written = f"{code + 1:b}"
        # As many zeros in front as digits follow the first (Elias, 1975): so it tells its own end.
        bits += [digits[int(bit)] for bit in "0" * (len(written) - 1) + written]
    return tuple(bits)
