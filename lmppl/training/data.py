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
from lmppl.guides.scoring import is_constrained
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
        progress: whether a bar shows how many are simulated; None: on a terminal and in a notebook.

    Raises:
        TypeError, ValueError: see ``fit``.
    """
    _check_together(guide, data, simulate, demonstrations, eval_data)
    given = read_inputs(guide.model, [()] if data is None else data, options)
    if simulate is None:
        held_out = held_out_inputs(guide, eval_data, options)
        if not hasattr(data, "__len__"):
            _check_loss(options, has_latents=False)
            first = next(given)
            return Stream(itertools.chain([first], given)), held_out, first
        inputs = list(given)
        _demonstrate(inputs, demonstrations, seed)
        _check_loss(options, has_latents=any(input_.given for input_ in inputs))
        if options.loss.draws == "given":
            inputs = [input_ for input_ in inputs if input_.given]
        return Collection(inputs, generator), held_out, inputs[0]
    args_of = [input_.args for input_ in given]
    pairs, to_hold_out = (simulations(guide, args_of, s) for s in runtime.slot_seeds(seed, 2))
    if isinstance(eval_data, int):
        held_out = list(simulated_inputs(guide, to_hold_out, options, eval_data))
    else:
        held_out = held_out_inputs(guide, eval_data, options)
    if simulate == math.inf:
        (example,) = simulated_inputs(guide, pairs, options, 1)
        pairs.skip(-1)  # it comes again
        source = Stream(simulated_inputs(guide, pairs, options), pairs.skip, args_of)
        return source, held_out, example
    inputs = []
    with progress_bar("simulating inputs", int(simulate), show=progress) as bar:
        for input_ in simulated_inputs(guide, pairs, options, int(simulate)):
            inputs.append(input_)
            bar.advance()
    return Collection(inputs, generator), held_out, inputs[0]


def _check_together(
    guide: TrainableGuide, data: Any, simulate: Any, demonstrations: Any, eval_data: Any
) -> None:
    if simulate is None:
        if data is None:
            raise ValueError("fit needs inputs: data=[(x, y), ...], or simulate=N")
        if isinstance(eval_data, int):
            raise ValueError(
                f"eval_data={eval_data}: a number is for simulate=; give a list of held-out inputs"
            )
        if demonstrations is not None and not hasattr(data, "__len__"):
            raise ValueError("demonstrations= needs data that is a list, in the same order")
        return
    if demonstrations is not None:
        raise ValueError("simulate= has latents of its own: leave out demonstrations=")
    check_simulated(guide)
    if simulate != math.inf:
        try:
            check_int("simulate", simulate)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, or math.inf") from None


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
        nodes = one.sites.values()
        may_reject = any(node["infer"].get("hard") or is_constrained(node) for node in nodes)
        if index == 0 and not one.observations and not may_reject:
            warnings.warn(
                "the program observes nothing on these inputs, so its posterior is its prior, and "
                "the guide learns nothing. Name the sites that will be observed when the guide is "
                f"used, condition_on=[...]; its random sites: {', '.join(one.latents)}",
                stacklevel=2,
            )
        program = one.program(guide.model)
        record = record_of_simulation(one, latents_known=not options.loss.truncations)
        seen = guide.observations_of_simulation(one, program)
        # A tuple of its own: samples are told apart by it.
        yield Input(program, (*args,), index, options, [record], exact=True, observations=seen)


def held_out_inputs(guide: TrainableGuide, data: Any, options: FitOptions) -> list[Input]:
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


def _demonstrate(inputs: Sequence[Input], given: Sequence[Any] | None, seed: int) -> None:
    """Give each input its demonstrations."""
    if given is None:
        return
    one = isinstance(given, (str, Mapping, Posterior)) or not hasattr(given, "__len__")
    if one or len(given) != len(inputs):
        size = f"one {type(given).__name__}" if one else str(len(given))
        raise ValueError(
            "demonstrations must be a list as long as the data, one entry an input "
            f"({len(inputs)}), given {size}"
        )
    for index, (input_, item) in enumerate(zip(inputs, given, strict=True)):
        input_.given = _records(item, index, seed)


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
