"""One algorithm a file; see ``base`` for what they share, and docs/how-to/new_engine.md to add one."""

from __future__ import annotations

from collections.abc import Callable

from lmppl.checks import check_callable
from lmppl.engines.base import Engine, EngineLike, State
from lmppl.engines.exact import Exact
from lmppl.engines.gflownet import GFlowNet
from lmppl.engines.importance import Importance
from lmppl.engines.kernels import RandomWalk, Redraw, SiteKernel, Suffix
from lmppl.engines.mcmc import MCMC
from lmppl.engines.smc import SMC

__all__ = [
    "ENGINES", "Engine", "EngineLike", "Exact", "GFlowNet", "Importance", "MCMC", "RandomWalk",
    "Redraw", "SMC", "SiteKernel", "State", "Suffix", "register_engine",
]  # fmt: skip

ENGINES: dict[str, Callable[..., EngineLike]] = {
    engine.name: engine for engine in (Importance, SMC, MCMC, GFlowNet, Exact)
}
"""What ``method=`` names: engines by their name, those of ``register_engine`` as well."""


def register_engine(name: str, engine: Callable[..., EngineLike]) -> None:
    """Make an engine available as ``lmppl.infer(..., method=name)``.

    ``engine`` is a class (or factory) whose keyword arguments are the engine's options, and whose
    objects have ``run``, such as a subclass of ``Engine``.

    Raises:
        TypeError: if the name is no string, or ``engine`` makes none.
        ValueError: if the name is taken.
    """
    if not isinstance(name, str):
        raise TypeError(f"an engine's name must be a string, given {name!r}")
    check_callable("engine", engine)
    if name in ENGINES:
        raise ValueError(f"an engine named {name!r} is registered already: choose another name")
    ENGINES[name] = engine
