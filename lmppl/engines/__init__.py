"""One algorithm a file. An engine has its options in its constructor and one ``run``."""

from __future__ import annotations

from collections.abc import Callable

from lmppl.engines.base import Engine
from lmppl.engines.exact import Exact
from lmppl.engines.gflownet import GFlowNet
from lmppl.engines.importance import Importance
from lmppl.engines.smc import SMC

__all__ = ["ENGINES", "Engine", "Exact", "GFlowNet", "Importance", "SMC", "register_engine"]

ENGINES: dict[str, Callable[..., Engine]] = {
    "importance": Importance,
    "smc": SMC,
    "gflownet": GFlowNet,
    "exact": Exact,
}


def register_engine(name: str, engine: Callable[..., Engine]) -> None:
    """Make an engine available as ``lmppl.infer(..., method=name)``.

    Args:
        name: the method's name.
        engine: a class (or factory) whose keyword arguments are the engine's options, and whose
            objects have ``run`` (see ``Engine``).

    Raises:
        ValueError: if the name is taken.
    """
    if name in ENGINES:
        raise ValueError(f"an engine named {name!r} is registered already: choose another name")
    ENGINES[name] = engine
