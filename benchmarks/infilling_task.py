"""The program of the benchmarks that train a guide on a real language model: infilling.

A middle is drawn after an opening, and then an ending of fixed length. Openings are the first words
of the sentences in a file, or, without one, of sentences that the model writes. The ending is drawn
at a temperature below one: it then tells much of the middle, and the posterior is far from the prior.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lmppl
from lmppl import lm_sample

_SEED_OF_OPENINGS = "Here is a sentence from the news:"
_HELP = {
    "words": "of a sentence that make the opening",
    "middle": "tokens of the middle, at most",
    "ending": "tokens of the ending",
    "temperature": "of the ending",
}


@dataclass(frozen=True)
class Task:
    """Which program, and on which openings.

    Args:
        words: of a sentence that make the opening; shorter sentences are left out.
        middle: tokens of the middle, at most.
        ending: tokens of the ending, exactly.
        temperature: of the ending.
    """

    words: int = 6
    middle: int = 4
    ending: int = 8
    temperature: float = 0.5

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Those of the command line that ``of`` reads."""
        for field in fields(cls):
            default: Any = field.default
            parser.add_argument(
                f"--{field.name}", type=type(default), default=default, help=_HELP[field.name]
            )

    @classmethod
    def of(cls, args: argparse.Namespace) -> Task:
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    @property
    def key(self) -> dict[str, Any]:
        """What a row of results has of it; rows of other tasks are other rows."""
        return asdict(self)

    @property
    def program(self) -> Callable[..., lmppl.Text]:
        def infill(opening: str, ending: str | None = None) -> lmppl.Text:
            z = lm_sample("z", opening, max_tokens=self.middle, stop=".")
            lm_sample(
                "ending",
                [opening, z],
                max_tokens=self.ending,
                temperature=self.temperature,
                obs=ending,
            )
            return z

        return infill

    def openings(self, path: Path | None, lm: lmppl.LM, num: int) -> list[str]:
        """At most ``num`` of them, in an order that depends on nothing else."""
        if path is None:
            texts, _ = lm.sample(_SEED_OF_OPENINGS, 4 * num, max_tokens=24, stop=".", seed=0)
            lines = [str(text) for text in texts]
        else:
            lines = path.read_text().splitlines()
        sentences = [words for words in map(str.split, lines) if len(words) > self.words]
        distinct = list(dict.fromkeys(" ".join(words[: self.words]) for words in sentences))
        random.Random(0).shuffle(distinct)
        return distinct[:num]
