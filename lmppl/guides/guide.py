"""What a guide is to an engine: whatever makes a proposer for each particle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmppl.guides.program import ProgramProposer
from lmppl.runtime import Proposer
from lmppl.runtime.arguments import check_program


def proposer_factory(guide: Any, args: tuple[Any, ...]) -> Callable[[int, int], Proposer] | None:
    """What makes the proposer of each particle, from its slot and a seed.

    Args:
        guide: None (the program's prior), a guide program, or an ``LMGuide``.
        args: the program's arguments.
    """
    if guide is None:
        return None
    if hasattr(guide, "proposer_factory"):
        return guide.proposer_factory(args)
    if callable(guide):
        check_program(guide, "guide")
        return lambda slot, seed: ProgramProposer.make(guide, args, slot, seed)
    raise TypeError(
        f"guide= takes a lmppl.LMGuide or a guide program (a callable), given {type(guide).__name__}"
    )
