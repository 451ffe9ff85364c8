"""Bench: what every benchmark is given: a language model, prompts of any length, how much to do."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

import lmppl
from benchmarks.measuring import Contender, Local, Timed, Work, in_turns, kept
from lmppl.lm import embedded
from lmppl.lm.batches.requests import Draw, Score
from lmppl.lm.tokens.stopping import Stopping

Mode = Literal["smoke", "quick", "full"]
REPEATS: dict[Mode, int] = {"smoke": 1, "quick": 3, "full": 5}

PEERS = Path(__file__).parent.parent
GENLM_PYTHON = PEERS / ".venv-peers" / "genlm-control" / "bin" / "python"
GFN_LM_TUNING = PEERS / ".peers" / "gfn-lm-tuning"

PASSAGE = """\
The clock in the station had stopped at ten past four, and nobody had come to mend it. Travellers \
looked up at it out of habit, shook their heads, and ran for trains that had left long before. The \
old porter said that it was better so: a clock that is wrong twice a day would be a nuisance, but \
one that is right twice a day, and honest about the rest, gives people something to talk about. In \
the winter a girl came with a ladder and a bag of tools. She had read about clocks in a library \
book, and she wanted to see whether the book was true. She took off the hands, cleaned the wheels \
with a brush made of goose feathers, and put a drop of oil where two of them met. Then she waited. \
The porter brought her tea in a blue cup. Snow fell on the rails, a train came in and went out, and \
the wheels did not move. So she closed the little door, folded the ladder, and wrote on a piece of \
paper what she had tried and what she had not. Next year, she told him, she would bring another \
book. He hung the paper under the clock, where everyone could read it, and after that the people in \
the station talked about nothing else. Some came back only to add a line of their own.
"""

T = TypeVar("T")


@dataclass
class Bench:
    """What a benchmark is run with.

    Args:
        lm: lmppl's language model.
        source: where transformers finds the same model, a folder or a name; None: nowhere.
        mode: how much to do: ``"smoke"`` only shows that everything works.
        repeats: of every measurement.
        particles: numbers of particles, instead of a benchmark's own.
        passage: text that prompts are cut from.
        genlm_python: the python of an environment with genlm-control.
        gfn_lm_tuning: a checkout of that repository.
    """

    lm: lmppl.LM
    source: str | None = None
    mode: Mode = "quick"
    repeats: int = 1
    particles: Sequence[int] | None = None
    passage: str = PASSAGE
    genlm_python: Path = GENLM_PYTHON
    gfn_lm_tuning: Path = GFN_LM_TUNING

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def choose(self, *, smoke: T, quick: T, full: T) -> T:
        """The sizes for this mode."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.mode]

    def choose_particles(
        self, *, smoke: Sequence[int], quick: Sequence[int], full: Sequence[int]
    ) -> Sequence[int]:
        """The same for numbers of particles, which the command line can replace."""
        return self.particles or self.choose(smoke=smoke, quick=quick, full=full)

    # Language models

    @cached_property
    def ordinary(self) -> Any:
        """The same model as people load it: transformers, its weights needing a gradient.

        (Of frozen weights, ``generate`` would multiply some one row at a time.)
        """
        return self.load_ordinary()

    def load_ordinary(self) -> Any:
        """A new one, for those who change it."""
        if self.source is None:
            return copy.deepcopy(self.lm.model).requires_grad_(True)
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of the loading
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=self.lm.dtype)
        model.to(self.device).eval()
        _touch(model)
        return model

    def prepare(self) -> int | None:
        """Start the libraries and lmppl's machinery, so that no benchmark is the one to pay.

        Returns:
            How much memory lmppl keeps from then on beside the weights, in bytes.
        """
        _touch(self.lm.model)
        ids = torch.tensor([self.tokens(8)], device=self.device)
        with torch.no_grad():
            self.lm.model(input_ids=ids)

        def first_use() -> None:
            self.lm.draw(self.draws(self.tokens(6), 2, 2))
            self.lm.score([Score(self.tokens(6), self.tokens(2, 1))])

        return kept(first_use, self.device)

    # Prompts

    @cached_property
    def _passage_ids(self) -> tuple[int, ...]:
        return self.lm.vocabulary.encode(self.passage)

    def tokens(self, length: int, number: int = 0) -> tuple[int, ...]:
        """So many tokens of the passage, from another place for each number.

        Each repetition has a prompt of its own, so that no cache remembers it from the last.
        """
        ids = self._passage_ids
        return tuple(ids[(13 * number + i) % len(ids)] for i in range(length))

    def text(self, length: int, number: int = 0) -> str:
        """A piece of the passage that is so many tokens long when it is tokenised."""
        for k in range(len(self._passage_ids)):
            start = 13 * (number + 7 * k)
            ids = [self._passage_ids[(start + i) % len(self._passage_ids)] for i in range(length)]
            text = self.lm.vocabulary.decode(ids)
            if len(self.lm.encode(text)) == length:
                return text
        raise ValueError(f"no piece of the passage has {length} tokens")

    def random_tokens(self, num: int, length: int, number: int = 0) -> list[tuple[int, ...]]:
        """Different sequences of arbitrary tokens, where only their number matters."""
        generator = torch.Generator().manual_seed(number)
        size = self.lm.vocabulary.size
        rows = torch.randint(size, (num, length), generator=generator)
        return [tuple(row) for row in rows.tolist()]

    def draws(self, prompt: tuple[int, ...], num: int, length: int, seed: int = 0) -> list[Draw]:
        """Requests for continuations of exactly so many tokens, which nothing closes."""
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand((num, length), generator=generator, dtype=torch.float64)
        closing = Stopping(self.lm.vocabulary)
        return [Draw(prompt, closing, row) for row in uniforms]

    # Measuring

    def in_turns(
        self, contenders: Mapping[str, Contender | Work], repeats: int | None = None
    ) -> list[Timed]:
        """Measure contenders in turns, each by its label."""
        ready = {
            label: Local(contender, self.device) if callable(contender) else contender
            for label, contender in contenders.items()
        }
        return in_turns(ready, self.repeats if repeats is None else repeats)


def make(model: str, dtype: str | None, **options: Any) -> Bench:
    """A bench with a model by name, as ``LM.from_pretrained`` takes it."""
    lm = lmppl.LM.from_pretrained(model, dtype=dtype)
    source = str(embedded.model_dir()) if model.lower() == embedded.ALIAS else model
    return Bench(lm, source, **options)


def _touch(model: torch.nn.Module) -> None:
    """Read all weights: where files are mapped into memory, that is when they are loaded."""
    for parameter in model.parameters():
        parameter.detach().float().sum()
