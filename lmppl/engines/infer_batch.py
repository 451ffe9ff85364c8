"""``infer_batch``: the posteriors of many inputs, whose particles share the LM's batches."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

from lmppl import runtime
from lmppl.checks import check_choice, check_int
from lmppl.engines import EngineLike, GFlowNet
from lmppl.engines.dispatch import infer, prepare
from lmppl.exclusive import exclusive
from lmppl.lm import LM
from lmppl.posterior import Posterior
from lmppl.primitives import default_lm
from lmppl.report.progress import progress_bar
from lmppl.runtime import Member
from lmppl.runtime.arguments import bind, by_kind, items_of
from lmppl.runtime.coroutine import GlobalState

# Beyond some hundreds of rows a batch gains little, while every particle takes memory; and inputs
# that run ahead are work lost if the loop is left.
_PARTICLES = 512
_INPUTS = 64


def infer_batch(
    model: Callable[..., Any],
    inputs: Iterable[Any],
    *,
    method: str | EngineLike = "smc",
    lm: LM | None = None,
    num_samples: int = 64,
    guide: Any = None,
    seed: int | Iterable[int] | None = None,
    progress: bool | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    on_error: Literal["raise", "return"] = "raise",
    at_once: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Generator[Posterior | Exception, None, None]:
    """The posterior of each of many inputs, in their order.

    ```python
    inputs = [(x1, y1), (x2, y2)]
    for posterior in lmppl.infer_batch(infill, inputs, lm=lm, guide=guide):
        print(posterior.best("z"))
    ```

    Each is what ``infer`` gives on that input with the seed ``posterior.info["seed"]`` (up to
    rounding). What the particles of inputs that run side by side ask of a language model at the
    same time is answered in one batch, but for the draws of SMC within a twisted or constrained site
    and the enumeration of ``"exact"``. Inputs are taken as they are needed: never more than
    ``at_once`` beyond the last posterior that was asked for. Leaving the loop ends what runs.

    Args:
        model: the program, as of ``infer``.
        inputs: tuples (or lists) of the program's positional arguments, or dicts of its arguments
            by name: a list, a generator, the rows of a data set.
        method: as of ``infer``.
        lm: as of ``infer``.
        num_samples: as of ``infer``, for each input.
        guide: a proposal, one for all inputs; ``"gflownet"`` needs one.
        seed: makes the run reproducible; None: taken from torch's random stream. Input i gets the
            seed ``SeedSequence(seed, spawn_key=(i,))`` (numpy), which is ``lmppl.runtime.nth_seed(seed,
            i)``, whatever the others are. Or a seed for each input, a list or an iterator that is read
            beside the inputs: so a part of the inputs gets what the whole would give it.
        progress: as of ``infer``; the bar counts inputs.
        callback: as of ``infer``; the figures have the input's number, from 0, as ``"input"``.
        on_error: ``"raise"``: an input's exception ends the run, in its turn. ``"return"``: it is
            yielded in place of the input's posterior. It has a note that names the input.
        at_once: how many inputs run side by side; None: as many as make 512 particles, at most 64.
        kwargs: arguments of the program by name that all inputs share; an input's own replace them.
        **options: of the engine, as of ``infer``.

    Yields:
        A ``Posterior`` (or an ``Exception``, see ``on_error``) for each input. Its ``.info`` has the
        ``"input"``'s number and ``"seed"``; its tokens are the input's own, its ``"seconds"`` those
        of all that ran beside it as well.

    Raises:
        ValueError, TypeError: as ``infer``, when called; ``"gflownet"`` without a guide; in its turn,
            an input for which there is no seed, or one that is none.
        Exception: what an input raises (``on_error="raise"``), or the iterable.
    """
    if "profile" in options:
        raise TypeError("infer_batch has no profile=: put the loop in `with lmppl.profile() as p:`")
    engine = prepare(model, method, lm, callback, options)
    num_samples = check_int("num_samples", num_samples)
    if isinstance(engine, GFlowNet) and guide is None:
        raise ValueError(
            "method='gflownet' without guide= would train a guide for every single input: train "
            "one on many, guide = lmppl.LMGuide(model, lm=lm).fit(inputs), and give it as guide="
        )
    source = enumerate(items_of(inputs))
    if not isinstance(kwargs := {} if kwargs is None else kwargs, Mapping):
        raise TypeError(f"kwargs= takes a dict of arguments by name, given {kwargs!r}")
    check_choice("on_error", on_error, ("raise", "return"))
    usual = max(1, min(_INPUTS, _PARTICLES // num_samples))
    at_once = usual if at_once is None else check_int("at_once", at_once)
    lm = default_lm() if lm is None else lm  # of here, wherever the posteriors are asked for
    seed_of = _seeds(seed)
    common: dict[str, Any] = {"method": engine, "lm": lm, "num_samples": num_samples}
    common |= {"guide": guide, "progress": False, "kwargs": {}}

    def start(index: int, item: Any) -> Member:
        input_seed = seed_of(index)

        def report(figures: dict[str, Any]) -> None:
            if callback is not None:
                callback({"input": index, **figures})

        def run() -> Posterior:
            try:
                program, args = _bound(model, item, index, kwargs)
                posterior = infer(program, *args, seed=input_seed, callback=report, **common)
            except Exception as error:
                error.add_note(f"raised for input {index} of the batch (seed={input_seed})")
                raise
            posterior.info.update(input=index, seed=input_seed)
            return posterior

        return Member(run, GlobalState.fresh(input_seed, grad=torch.is_grad_enabled()))

    bar = progress_bar(f"{engine.name}, inputs", operator.length_hint(inputs) or None, progress)
    return _in_order(source, start, at_once, on_error, bar)


def _seeds(seed: Any) -> Callable[[int], int]:
    """The seed of each input by its number, asked for in the order of the inputs."""
    if isinstance(seed, Iterable) and not isinstance(seed, str) and getattr(seed, "ndim", 1) != 0:
        seeds = iter(seed)

        def given(index: int) -> int:
            for input_seed in seeds:
                return runtime.fresh_seed(check_int("seed", input_seed, least=0))
            raise ValueError(f"input {index} of the batch has no seed: seed= holds {index} of them")

        return given
    first = runtime.fresh_seed(seed)
    return lambda index: runtime.nth_seed(first, index)


def _bound(
    model: Callable[..., Any], item: Any, index: int, shared: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The program and its positional arguments for one input; ``shared``: those by name of all inputs.
    Raises ``TypeError`` if the input does not fit; says which."""
    try:
        args, by_name = by_kind(item)
        fixed = model.keywords if isinstance(model, functools.partial) else {}
        for name in [name for name in by_name if name in fixed]:
            raise TypeError(f"functools.partial has bound {name!r}, give such arguments in kwargs=")
        return bind(model, args, {**shared, **by_name})
    except TypeError as error:
        raise TypeError(f"item {index} of the data does not fit: {error}") from None


def _in_order(
    source: Iterator[tuple[int, Any]],
    start: Callable[[int, Any], Member],
    at_once: int,
    on_error: str,
    bar: progress_bar,
) -> Generator[Posterior | Exception, None, None]:
    """Run a member for each input, ``at_once`` side by side, and yield what comes of them."""
    window: list[Member] = []  # taken, and not yet yielded
    end: Exception | None = None  # of the inputs, raised in its turn
    with bar, runtime.ending(window):
        while True:
            while len(window) < at_once and end is None:
                try:
                    window.append(start(*next(source)))
                except Exception as error:
                    end = error
                else:
                    with exclusive():
                        window[-1].go_on()
            if not window:
                break
            first = window[0]
            with exclusive():  # not while the caller has the word
                while not first.finished:
                    runtime.advance(window)
            window.pop(0)
            bar.advance()
            if first.error is not None and on_error == "raise":
                raise first.error
            yield first.result if first.error is None else first.error
    if end is not None and not isinstance(end, StopIteration):
        raise end
