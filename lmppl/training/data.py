"""From what a user gives ``fit`` to inputs: data, simulations, demonstrations, what is held out."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lmppl import runtime
from lmppl.checks import check_int
from lmppl.guides.guide import TrainableGuide
from lmppl.posterior import Posterior
from lmppl.report.progress import progress_bar
from lmppl.runtime.arguments import Args
from lmppl.runtime.records import Record, record_of_simulation
from lmppl.runtime.simulation import Simulated, SimulationStream
from lmppl.training.inputs import Collection, Input, Source, Stream, read_inputs
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
    stream = read_inputs(guide.model, data, options)
    if not hasattr(data, "__len__"):
        if demonstrations is not None:
            raise ValueError("demonstrations= needs data that is a list, in the same order")
        _check_loss(options, has_latents=False)
        first = next(stream)
        return Stream(itertools.chain([first], stream)), held_out, first
    inputs = list(stream)
    given = _demonstrations(demonstrations, len(inputs), seed)
    _check_loss(options, has_latents=any(given))
    for input_, records in zip(inputs, given, strict=True):
        input_.given = records
    if options.loss.draws == "given":
        inputs = [input_ for input_ in inputs if input_.given]
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
    if number != math.inf:
        try:
            check_int("simulate", number)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, or math.inf") from None
    given = read_inputs(guide.model, [()] if data is None else data, options)
    args_of = [input_.args for input_ in given]
    pairs, to_hold_out = (simulations(guide, args_of, s) for s in runtime.slot_seeds(seed, 2))
    if isinstance(eval_data, int):
        held_out = list(simulated_inputs(guide, to_hold_out, options, eval_data))
    else:
        held_out = held_out_inputs(guide, eval_data, options)
    if number == math.inf:
        (example,) = simulated_inputs(guide, pairs, options, 1)
        pairs.skip(-1)  # it comes again
        source = Stream(simulated_inputs(guide, pairs, options), pairs.skip, args_of)
        return source, held_out, example
    inputs = []
    with progress_bar("simulating inputs", int(number), show=progress) as bar:
        for input_ in simulated_inputs(guide, pairs, options, int(number)):
            inputs.append(input_)
            bar.advance()
    return Collection(inputs, generator), held_out, inputs[0]


def check_simulated(guide: TrainableGuide) -> None:
    """Raises ``ValueError`` for a guide that would not see what is simulated."""
    if not guide.reads_observations:
        raise ValueError(
            "a guide program reads its arguments, which do not hold the simulated observations: "
            "give data, or use the automatic guide (it reads what the program's sites observe)"
        )


def simulations(guide: TrainableGuide, args_of: Sequence[Args], seed: int) -> SimulationStream:
    """Endless simulations of a guide's program on some arguments."""
    observed = None if guide.condition_on == "all" else guide.condition_on
    return SimulationStream(guide.model, args_of, seed=seed, observed=observed)


def simulated_inputs(
    guide: TrainableGuide,
    pairs: Iterator[tuple[Args, Simulated]],
    options: FitOptions,
    number: int | None = None,
) -> Iterator[Input]:
    """The next ``number`` simulations (None: all) as inputs. What they have found out is not computed
    again."""
    for index, (args, one) in enumerate(itertools.islice(pairs, number)):
        may_reject = any(node["infer"].get("hard") for node in one.sites.values())
        if index == 0 and not one.observations and not may_reject:
            warnings.warn(
                "simulate=: the program observes nothing on these inputs, so its posterior is its "
                "prior, and the guide learns nothing. Name the sites that will be observed when the "
                f"guide is used, condition_on=[...]; its random sites: {', '.join(one.latents)}",
                stacklevel=2,
            )
        program = one.program(guide.model)
        record = record_of_simulation(one, latents_known=not options.loss.truncations)
        seen = guide.observations_of_simulation(one, program)
        # A tuple of its own: samples are told apart by it.
        yield Input(program, (*args,), index, options, [record], exact=True, observations=seen)


def held_out_inputs(
    guide: TrainableGuide, data: Iterable[Any] | None, options: FitOptions
) -> list[Input]:
    """Those that a user gives; none, if ``data`` is None."""
    return [] if data is None else list(read_inputs(guide.model, data, options, "eval_data"))


class Dreams(Stream):
    """Inputs simulated under the model as it is, a batch at a time.

    Args:
        guide: for which they are.
        inputs: on whose arguments they are simulated.
        options: of the training.
        seed: of the simulations.
    """

    def __init__(
        self, guide: TrainableGuide, inputs: Sequence[Input], options: FitOptions, seed: int
    ) -> None:
        args_of = [input_.args for input_ in inputs]
        pairs = SimulationStream(guide.model, args_of, seed=seed, block=options.batch_size)
        super().__init__(simulated_inputs(guide, pairs, options), pairs.skip)
        self.kept = inputs  # for the M-steps
        self._pairs, self._scored_again = pairs, options.loss.draws != "given"

    def next(self, num: int) -> list[Input]:
        chosen = super().next(num)
        for input_ in chosen if self._scored_again else ():
            input_.forget_scores()  # the model may have changed since
        return chosen

    def forget(self) -> None:
        """Dream anew: those that wait are not in a checkpoint."""
        self._pairs.forget()


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
    return [_records(item, i, seed) for i, item in enumerate(given)]


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
