"""A run of training on disk, so that it can go on as if it had not been interrupted.

    checkpoint.json         which run it is, where it is, optimiser, generator, records of the buffers
    checkpoint.safetensors  its tensors
    guide/                  the guide so far, as ``LMGuide.save`` writes it

Whoever writes a checkpoint forgets what it remembered of prompts and merged weights, as a run does
before its first step. So both go on from the same numbers, bit by bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from lmppl.checks import check_flag, check_int
from lmppl.guides.parameters import same_base
from lmppl.guides.saving import read_guide, write_guide
from lmppl.processes import this_process
from lmppl.states import present, read_state, replace_folder, write_state
from lmppl.training.fingerprints import identity, versions
from lmppl.training.kept import load_input, state_of_input
from lmppl.training.sharing import Sharing
from lmppl.training.trainer import Trainer

FORMAT = 9


class Part(Protocol):
    """Something with a state, beside the trainer, that a run goes on from."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON's values, nested."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""


class Checkpoints:
    """When and where a run is written to disk.

    Args:
        checkpoint: a folder for its checkpoint, or None.
        every: steps between them. (One more is written at the end.)
        resume: go on from the checkpoint, if there is one.
        seed: of the run, as it was given.
        sharing: the processes of the run, of which the first reads and writes.

    Raises:
        ValueError: for one out of range, or without what it needs.
    """

    _trainer: Trainer
    _parts: Mapping[str, Part]
    _run: dict[str, Any]

    def __init__(
        self,
        checkpoint: str | Path | None,
        every: int,
        resume: bool,
        seed: int | None,
        sharing: Sharing,
    ) -> None:
        self._path = None if checkpoint is None else Path(checkpoint)
        self._sharing, self._ranks = sharing, sharing.ranks
        self._every = check_int("checkpoint_every", every)
        self._resume = check_flag("resume", resume)
        if resume and checkpoint is None:
            raise ValueError("resume=True needs checkpoint=: the folder of the run to go on with")
        if resume and seed is None:
            raise ValueError("resume=True needs seed=: the seed that the run was begun with")

    def begin(
        self,
        trainer: Trainer,
        parts: Mapping[str, Part],
        run: Mapping[str, Any],
        beside: Mapping[str, Any],
    ) -> int:
        """Bring a new run to where it was interrupted. Returns how many steps are done.

        Args:
            trainer: what trains the guide.
            parts: what else has a state, by name.
            run: what else must be equal for a run to be the same one; in JSON's types.
            beside: what must be equal for all its processes alone.

        Raises:
            ValueError: if the checkpoint is another run's: of another program, model, data or
                options, or of another version of lmppl, or if a file of it was damaged; says which.
            FileExistsError: if there is a checkpoint and the run is a new one.
        """
        self._trainer, self._parts = trainer, parts
        self._every = self._ranks.of_first(0 if self._path is None else self._every)
        if self._path is None and self._ranks.num == 1:
            return 0
        source, options, steps = trainer.source, trainer.options, trainer.steps
        # Now, before the steps change what it is made of.
        self._run = {**identity(trainer.guide, source, options, steps, trainer.seed), **run}
        self._check_ranks(beside)
        found = self._ranks.of_first(self._found() if self._ranks.is_first else None)
        if found is None:
            return 0
        if isinstance(found, Exception):
            raise found
        state, guide_state = found
        self._check_run(state["run"])
        if state["processes"] != str(self._sharing):
            warnings.warn(
                f"the checkpoint {self._path} was written by a run of {state['processes']}, this one "
                f"has {self._sharing}: it goes on with the same draws, but for rounding",
                stacklevel=5,
            )
        trainer.guide.load_state_dict(guide_state)
        trainer.load_state_dict(state["trainer"])
        for input_, kept in zip(trainer.source.kept, state["inputs"], strict=True):
            load_input(input_, kept)
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        return int(state["done"])

    def _found(self) -> tuple[Any, Any] | Exception | None:
        """The state in the folder and its guide's; None if there is none. What is wrong with them is
        returned, so that all ranks can raise it."""
        if self._path is None or not (folder := present(self._path)).exists():
            return None
        if not self._resume:
            return FileExistsError(
                f"{self._path} exists: resume=True goes on with the run in it; for a new run give "
                "another folder"
            )
        try:
            state = read_state(folder, "checkpoint", FORMAT, ": train anew, in another folder")
            return state, read_guide(folder / "guide")
        except (OSError, ValueError) as error:
            return error

    def _check_ranks(self, beside: Mapping[str, Any]) -> None:
        """All processes must train the same."""
        parallel = {"option parallel": self._sharing.parallel}
        runs = self._ranks.gather([{**self._run, **beside, **parallel, "versions": versions()}])
        for rank, other in enumerate(runs):
            for what, one, two in _differences(runs[0], other):
                raise ValueError(
                    f"the processes of this run differ in their {what}: rank 0 has {one!r}, rank "
                    f"{rank} {two!r}. Start all with the same script, data, seeds and packages"
                )

    def _check_run(self, saved: Mapping[str, Any]) -> None:
        for what, one, two in _differences(saved, self._run):
            raise ValueError(
                f"the checkpoint {self._path} belongs to another run, its {what} differs: it has "
                f"{one!r}, this run {two!r}. Resume with what it was begun with, or train anew in "
                "another folder"
            )

    def save(self, done: int, *, last: bool = False) -> bool:
        """Write the state of a run after ``done`` steps, if it is time or the run ends. A disk that
        is full is warned of, and training goes on.

        Returns:
            Whether it was time. If so, the trainer has forgotten what a resumed one does not know.
        """
        if not self._every or not (last or done % self._every == 0):
            return False
        try:
            if self._ranks.is_first and self._path is not None:
                replace_folder(self._path, "checkpoint", lambda folder: self._write(folder, done))
        except OSError as error:
            by = this_process()
            warnings.warn(
                f"the checkpoint of step {done} could not be written to {self._path}"
                f"{by and f' by {by}'} ({error}); the one before is kept, and training goes on",
                stacklevel=5,
            )
        self._trainer.forget()
        return True

    def _write(self, folder: Path, done: int) -> None:
        trainer = self._trainer
        state = {
            "run": self._run,
            "done": done,
            "processes": str(self._sharing),
            "inputs": [state_of_input(input_) for input_ in trainer.source.kept],
            "trainer": trainer.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        (folder / "guide").mkdir()
        write_guide(folder / "guide", trainer.guide.state_dict())
        write_state(folder, "checkpoint", FORMAT, state)


def _differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """In what two runs are not the same, with what each has."""
    for what in dict.fromkeys([*two, *one]):
        first, second = one.get(what), two.get(what)
        if what == "language model":
            if not same_base(one[what], two[what]):
                yield what, one[what]["name"], two[what]["name"]
        elif first != second:
            yield what, first, second
