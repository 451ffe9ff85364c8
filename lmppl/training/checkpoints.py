"""A run of training on disk, so that it can go on as if it had not been interrupted.

    checkpoint.json         which run it is, where it is, optimiser, generator, records of the buffers
    checkpoint.safetensors  its tensors
    guide/                  the guide so far, as ``LMGuide.save`` writes it

Whoever writes a checkpoint forgets what it remembered of prompts and merged weights, as a run does
before its first step. So both go on from the same numbers, bit by bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from lmppl.checks import check_flag, check_int
from lmppl.distributions import ToolResult
from lmppl.guides.parameters import same_base
from lmppl.guides.saving import read_guide, write_guide
from lmppl.lm.batches.requests import Scored
from lmppl.runtime.records import Record
from lmppl.states import is_state, present, read_state, replace_folder, write_state
from lmppl.training.fingerprints import identity
from lmppl.training.inputs import Input
from lmppl.training.trainer import Trainer

FORMAT = 8


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

    Raises:
        ValueError: for one out of range, or without what it needs.
    """

    _trainer: Trainer
    _parts: Mapping[str, Part]
    _run: dict[str, Any]

    def __init__(
        self, checkpoint: str | Path | None, every: int, resume: bool, seed: int | None
    ) -> None:
        self._path = None if checkpoint is None else Path(checkpoint)
        self._every = check_int("checkpoint_every", every)
        self._resume = check_flag("resume", resume)
        if resume and checkpoint is None:
            raise ValueError("resume=True needs checkpoint=: the folder of the run to go on with")
        if resume and seed is None:
            raise ValueError("resume=True needs seed=: the seed that the run was begun with")

    def begin(self, trainer: Trainer, parts: Mapping[str, Part], run: Mapping[str, Any]) -> int:
        """Bring a new run to where it was interrupted. Returns how many steps are done.

        Args:
            trainer: what trains the guide.
            parts: what else has a state, by name.
            run: what else must be equal for a run to be the same one; in JSON's types.

        Raises:
            ValueError: if the checkpoint is another run's: of another program, model, data or
                options, or of another version of lmppl, or if a file of it was damaged; says which.
            FileExistsError: if there is a checkpoint and the run is a new one.
        """
        if self._path is None:
            return 0
        self._trainer, self._parts = trainer, parts
        source, options, steps = trainer.source, trainer.options, trainer.steps
        # Now, before the steps change what it is made of.
        self._run = {**identity(trainer.guide, source, options, steps, trainer.seed), **run}
        folder = present(self._path)
        if not folder.exists():
            return 0
        if not self._resume:
            raise FileExistsError(
                f"{self._path} exists: resume=True goes on with the run in it; for a new run give "
                "another folder"
            )
        state = read_state(folder, "checkpoint", FORMAT, ": train anew, in another folder")
        self._check_run(state["run"])
        trainer.guide.load_state_dict(read_guide(folder / "guide"))
        trainer.load_state_dict(state["trainer"])
        for input_, kept in zip(trainer.source.kept, state["inputs"], strict=True):
            _load_input(input_, kept)
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        return int(state["done"])

    def _check_run(self, saved: Mapping[str, Any]) -> None:
        for what in dict.fromkeys([*self._run, *saved]):
            one, two = saved.get(what), self._run.get(what)
            if what == "language model":
                if same_base(saved[what], self._run[what]):
                    continue
                one, two = saved[what]["name"], self._run[what]["name"]
            elif one == two:
                continue
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
        if self._path is None or not (last or done % self._every == 0):
            return False
        try:
            replace_folder(self._path, "checkpoint", lambda folder: self._write(folder, done))
        except OSError as error:
            warnings.warn(
                f"the checkpoint of step {done} could not be written ({error}); the one before is "
                "kept, and training goes on",
                stacklevel=5,
            )
        self._trainer.forget()
        return True

    def _write(self, folder: Path, done: int) -> None:
        trainer = self._trainer
        state = {
            "run": self._run,
            "done": done,
            "inputs": [_input_state(input_) for input_ in trainer.source.kept],
            "trainer": trainer.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        (folder / "guide").mkdir()
        write_guide(folder / "guide", trainer.guide.state_dict())
        write_state(folder, "checkpoint", FORMAT, state)


# --- inputs and records --------------------------------------------------------------------------


_KEPT = ("visits", "alive", "rejects", "features")


def _input_state(input_: Input) -> dict[str, Any]:
    records = {"buffer": input_.buffer.records, "stock": input_.stock}
    return {name: getattr(input_, name) for name in _KEPT} | {
        name: [_record_state(record) for record in kept if _is_plain(record)]
        for name, kept in records.items()
    }


def _load_input(input_: Input, state: Mapping[str, Any]) -> None:
    for name in _KEPT:
        setattr(input_, name, state[name])
    input_.buffer.records = [_record(kept) for kept in state["buffer"]]
    input_.stock = [_record(kept) for kept in state["stock"]]


def _is_plain(record: Record) -> bool:
    """Whether a file can hold the results of its tools; other records are left out."""
    return all(is_state(node.result) for node in record.tools.values())


def _record_state(record: Record) -> dict[str, Any]:
    known = {
        name: [log_prob, *([scored.log_probs, scored.closing_log_probs] if scored else ())]
        for name, (log_prob, scored) in record.known.items()
    }
    tools = {
        name: [node.result, f"{type(node.error).__name__}: {node.error}" if node.error else None]
        for name, node in record.tools.items()
    }
    state = {field.name: getattr(record, field.name) for field in fields(record)}
    return state | {"known": known, "tools": tools, "counts": sorted(record.counts)}


def _record(state: Mapping[str, Any]) -> Record:
    known = {
        name: (log_prob, Scored(*terms) if terms else None)
        for name, (log_prob, *terms) in state["known"].items()
    }
    tools = {
        name: ToolResult.wrap(result, RuntimeError(error) if error else None)
        for name, (result, error) in state["tools"].items()
    }
    tokens, counts = tuple(state["tokens"]), frozenset(state["counts"])
    return Record(**{**state, "known": known, "tools": tools, "tokens": tokens, "counts": counts})
