"""``infer``: one function in front of all engines."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from lmppl.checks import check_callable, check_flag, check_int, did_you_mean
from lmppl.distributions import check_lm
from lmppl.engines import ENGINES, EngineLike
from lmppl.exclusive import exclusive
from lmppl.lm import LM
from lmppl.posterior import Posterior, ZeroEvidenceError
from lmppl.primitives import use
from lmppl.report import profiling
from lmppl.runtime.arguments import bind, check_program


def infer(
    model: Callable[..., Any],
    *args: Any,
    method: str | EngineLike = "smc",
    lm: LM | None = None,
    num_samples: int = 64,
    guide: Any = None,
    seed: int | None = None,
    progress: bool | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    profile: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Posterior:
    """The posterior of a program's latent sites.

    ```python
    posterior = lmppl.infer(infill, x, y, lm=lm, method="smc", num_samples=64)
    ```

    Args:
        model: a Pyro program with ``lm_sample`` sites.
        *args: its positional arguments. Each particle has copies of the lists, dicts and sets. A
            single dict is an input as ``infer_batch`` takes it, the arguments by name, if its keys are
            names of the program's parameters and all required ones are there; else, or with
            ``kwargs={}``, it is an argument like any other.
        method: ``"smc"``, ``"importance"``, ``"mcmc"``, ``"gflownet"``, ``"exact"``, a name given to
            ``lmppl.register_engine``, or an engine object: ``lmppl.SMC(ess_threshold=0.5)``.
        lm: the language model of sites that name none.
        num_samples: how many weighted traces.
        guide: a proposal: a ``LMGuide`` or a guide program; None: the program's prior (and
            ``"gflownet"`` trains a guide).
        seed: makes the run reproducible; None: taken from torch's random stream.
        progress: show a progress bar; None: on a terminal and in a notebook.
        callback: called with a dict of figures at every stage.
        profile: measure where the time goes; the posterior's ``.profile`` says it.
        kwargs: the program's arguments by name: ``kwargs={"y": " The end."}``. (Those given here are not
            keywords of ``infer``: these are the engine's.)
        **options: the engine's, for example ``ess_threshold`` and ``twist`` for ``"smc"``.

    Raises:
        ValueError: unknown method, no language model, arguments that do not fit the program.
        TypeError: an option that the engine does not have.
        ZeroEvidenceError: every sample has probability zero; it names the sites that killed them.
    """
    engine = prepare(model, method, lm, callback, options)
    num_samples = check_int("num_samples", num_samples)
    check_flag("profile", profile)
    model, args = bind(model, args, kwargs)
    # Without lm=, sites fall back on lmppl.use, or name their own; one that cannot says so.
    with (
        exclusive(),
        nullcontext() if lm is None else use(lm),
        profiling.profile() if profile else nullcontext() as measured,
    ):
        common: dict[str, Any] = {"num_samples": num_samples, "guide": guide, "seed": seed}
        try:
            posterior = engine.run(model, *args, **common, progress=progress, callback=callback)
        except ZeroEvidenceError as error:
            error.posterior.profile = measured
            raise
        if measured is not None:
            posterior.profile = measured
        return posterior


def prepare(
    model: Any, method: str | EngineLike, lm: LM | None, callback: Any, options: dict[str, Any]
) -> EngineLike:
    """The engine of a call; raises for what is wrong with it whatever the program's arguments."""
    check_program(model)
    engine = _engine(model, method, options)
    if lm is not None:
        check_lm("infer", lm)
    if callback is not None:
        check_callable("callback", callback)
    return engine


def _engine(
    model: Callable[..., Any], method: str | EngineLike, options: dict[str, Any]
) -> EngineLike:
    """The engine object of a method and its options."""
    takes = "method= takes a name or an engine object, given"
    if isinstance(method, type):
        name = method.__name__
        raise TypeError(f"{takes} the class {name}: make an object of it, {name}()")
    if not isinstance(method, str):
        if not callable(getattr(method, "run", None)):
            raise TypeError(f"{takes} {type(method).__name__}; names: {', '.join(ENGINES)}")
        if options:
            raise TypeError(
                f"options {sorted(options)} beside an engine object: give them to the object, "
                f"{type(method).__name__}({', '.join(f'{name}=...' for name in options)})"
            )
        return method
    if method not in ENGINES:
        raise ValueError(f"unknown method {method!r}{did_you_mean(method, ENGINES)}")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(ENGINES[method]).parameters
    allowed = [name for name, parameter in parameters.items() if parameter.kind in kinds]
    for name in [name for name in options if name not in allowed]:
        common = list(inspect.signature(infer).parameters)[3:-1]
        argument = _argument_like(model, name)
        hint = did_you_mean(name, [*allowed, *common])
        if argument is not None:
            hint = f"; the program has an argument {argument!r}"
        raise TypeError(
            f"method={method!r} has no option {name!r}{hint}. (Keywords are the engine's. The program's "
            f"go in kwargs={{{argument or name!r}: ...}}, or are bound to it: "
            f"functools.partial(model, {argument or name}=...).)"
        )
    return ENGINES[method](**options)


def _argument_like(model: Callable[..., Any], name: str) -> str | None:
    """The argument of a program whose name is ``name``, or nearly so."""
    try:
        arguments = list(inspect.signature(model).parameters)
    except (TypeError, ValueError):  # some callables have no signature
        return None
    return next(iter(difflib.get_close_matches(name, arguments, n=1, cutoff=0.8)), None)
