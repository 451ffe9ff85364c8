"""From what a user gives ``fit`` to inputs: data, simulations, demonstrations, what is held out."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lmppl import runtime
from lmppl.guides.guide import TrainableGuide
from lmppl.posterior import Posterior
from lmppl.report.progress import progress_bar
from lmppl.runtime import simulation
from lmppl.runtime.arguments import Args, items_of
from lmppl.runtime.records import Record, record_of_simulation
from lmppl.runtime.simulation import Simulated
from lmppl.training.inputs import (
    Collection,
    Input,
    Source,
    Stream,
    read_inputs,
    read_stream,
)
from lmppl.training.options import FitOptions

_MOST_DISTILLED = 64


def read_data(
    guide: TrainableGuide,
    data: Iterable[Any] | None,
    simulate: int | float | None,
    demonstrations: Sequence[Any] | None,
    eval_data: Iterable[Any] | int | None,
    options: FitOptions,
    seed: int,
    generator: torch.Generator,
    progress: bool | None = None,
) -> tuple[Source, list[Input], Input]:
    """The inputs of training, those held out, and one of them.

    Args:
        guide: what they are for.
        data, simulate, demonstrations, eval_data: see ``fit``.
        options: of the training.
        seed: of simulations, and of the draws of a distilled posterior.
        generator: of the order in which inputs come.
        progress: whether a bar shows how many are simulated; None: on a terminal.

    Raises:
        TypeError, ValueError: see ``fit``.
    """
    if simulate is not None:
        if demonstrations is not None:
            raise ValueError("simulate= has latents of its own: leave out demonstrations=")
        return _simulated_inputs(
            guide, data, simulate, eval_data, options, seed, generator, progress
        )
    if data is None:
        raise ValueError("fit needs inputs: data=[(x, y), ...], or simulate=N")
    if isinstance(eval_data, int):
        raise ValueError(
            f"eval_data={eval_data}: a number is for simulate=; give a list of held-out inputs"
        )
    held_out = held_out_inputs(guide, eval_data, options)
    items = items_of(data)
    if not hasattr(data, "__len__"):
        if demonstrations is not None:
            raise ValueError("demonstrations= needs data that is a list, in the same order")
        _check_loss(options, has_latents=False)
        stream = read_stream(guide.model, items, options)
        first = next(stream, None)
        if first is None:
            raise ValueError("data holds no input: give at least one, [(x, y)]")
        return Stream(itertools.chain([first], stream)), held_out, first
    args_of = read_inputs(guide.model, data)
    given = _demonstrations(demonstrations, len(args_of), seed)
    _check_loss(options, has_latents=any(given))
    inputs = [
        Input(guide.model, args, i, options, records)
        for i, (args, records) in enumerate(zip(args_of, given, strict=True))
    ]
    if options.loss.draws == "given":
        inputs = [each for each in inputs if each.given]
    return Collection(inputs, generator), held_out, inputs[0]


def _check_loss(options: FitOptions, *, has_latents: bool) -> None:
    if options.loss.draws == "guide" and has_latents:
        raise ValueError(
            f"loss={options.loss.name!r} learns from the guide's own draws only, so demonstrations= "
            "have no use: 'vargrad', 'tb' and 'subtb' learn from them too, 'sft' from nothing else"
        )
    if options.loss.draws == "given" and not has_latents:
        raise ValueError(
            f"loss={options.loss.name!r} is maximum likelihood on latents that are known: give "
            "demonstrations=[{'z': text}, ...] or simulate=N. Without, 'vargrad' (the default), "
            "'tb', 'subtb', 'elbo', 'wake' and 'ppo' learn from the program alone"
        )


def _simulated_inputs(
    guide: TrainableGuide,
    data: Iterable[Any] | None,
    number: int | float,
    eval_data: Iterable[Any] | int | None,
    options: FitOptions,
    seed: int,
    generator: torch.Generator,
    progress: bool | None,
) -> tuple[Source, list[Input], Input]:
    check_simulated(guide)
    if not (number == math.inf or (isinstance(number, int) and number >= 1)):
        raise ValueError(f"simulate={number!r}: it must be an int of at least 1, or math.inf")
    args_of = read_inputs(guide.model, [()] if data is None else data)
    seeds = runtime.slot_seeds(seed, 2)
    if isinstance(eval_data, int):
        held_out = list(
            simulated_inputs(guide, simulations(guide, args_of, seeds[1]), options, eval_data)
        )
    else:
        held_out = held_out_inputs(guide, eval_data, options)
    pairs = simulations(guide, args_of, seeds[0])
    if number == math.inf:
        (example,) = simulated_inputs(guide, simulations(guide, args_of, seeds[0]), options, 1)
        source = Stream(simulated_inputs(guide, pairs, options), pairs.skip, args_of)
        return source, held_out, example
    inputs = []
    with progress_bar("simulating inputs", int(number), show=progress) as bar:
        for each in simulated_inputs(guide, pairs, options, int(number)):
            inputs.append(each)
            bar.advance()
    return Collection(inputs, generator), held_out, inputs[0]


def check_simulated(guide: TrainableGuide) -> None:
    """Raises ``ValueError`` for a guide that would not see what is simulated."""
    if not guide.reads_observations:
        raise ValueError(
            "a guide program reads its arguments, which do not hold the simulated observations: "
            "give data, or use the automatic guide (it reads what the program's sites observe)"
        )


def simulations(guide: TrainableGuide, args_of: Sequence[Args], seed: int) -> simulation.Stream:
    """Endless simulations of a guide's program on some arguments."""
    observed = None if guide.condition_on == "all" else guide.condition_on
    return simulation.Stream(guide.model, args_of, seed=seed, observed=observed)


def simulated_inputs(
    guide: TrainableGuide,
    pairs: Iterator[tuple[Args, Simulated]],
    options: FitOptions,
    number: int | None = None,
) -> Iterator[Input]:
    """The next ``number`` simulations (None: all) as inputs."""
    for index, (args, one) in enumerate(itertools.islice(pairs, number)):
        if index == 0 and not one.observations and not _may_reject(one):
            warnings.warn(
                "simulate=: the program observes nothing on these inputs, so its posterior is its "
                "prior, and the guide learns nothing. Name the sites that will be observed when the "
                f"guide is used, condition_on=[...]; its random sites: {', '.join(one.latents)}",
                stacklevel=2,
            )
        yield simulated_input(guide, args, one, index, options)


def _may_reject(one: Simulated) -> bool:
    return any(node["infer"].get("hard") for node in one.sites.values())


def simulated_input(
    guide: TrainableGuide, args: Args, one: Simulated, index: int, options: FitOptions
) -> Input:
    """A simulation as an input. What the simulation has found out is not computed again.

    Args:
        guide: for which it is.
        args: of the simulation.
        one: the simulation.
        index: its number.
        options: of the training.
    """
    # A tuple of its own: samples are told apart by it.
    program, args = one.program(guide.model), (*args,)
    record = record_of_simulation(one, latents_known=not options.loss.truncations)
    each = Input(program, args, index, options, [record], exact=True)
    each.observations = guide.observations_of_simulation(one, program)
    return each


def held_out_inputs(
    guide: TrainableGuide, data: Iterable[Any] | None, options: FitOptions
) -> list[Input]:
    """Those that a user gives; none, if ``data`` is None."""
    if data is None:
        return []
    args_of = read_inputs(guide.model, data, "eval_data")
    return [Input(guide.model, args, i, options) for i, args in enumerate(args_of)]


def _demonstrations(given: Sequence[Any] | None, num: int, seed: int) -> list[list[Record]]:
    if given is None:
        return [[] for _ in range(num)]
    one = isinstance(given, (str, Mapping, Posterior)) or not hasattr(given, "__len__")
    if one or len(given) != num:
        size = f"one {type(given).__name__}" if one else str(len(given))
        raise ValueError(
            f"demonstrations must be a list as long as the data, one entry an input ({num}), given "
            f"{size}"
        )
    return [_records(each, i, seed) for i, each in enumerate(given)]


def _records(given: Any, index: int, seed: int) -> list[Record]:
    if given is None:
        return []
    if isinstance(given, Posterior):
        # Equal draws stay: how often a text comes is its weight. (A buffer keeps one of them.)
        drawn = given.resample(_MOST_DISTILLED, seed=seed % 2**31)
        return [
            Record({n: trace.nodes[n]["value"] for n in drawn.latents if n in trace.nodes})
            for trace in drawn.traces
        ]
    items = [given] if isinstance(given, Mapping) else given
    if isinstance(items, str) or not all(isinstance(item, Mapping) for item in items):
        raise TypeError(
            f"demonstration {index} is a {type(given).__name__}: give a dict of latent site to text "
            "or number, a list of such dicts, a Posterior, or None"
        )
    return [Record(dict(item)) for item in items]
