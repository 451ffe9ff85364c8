"""A run of training on disk, so that it can go on as if it had not been interrupted.

    checkpoint.json     which run it is, where it is, and what the tensors are of
    state.safetensors   optimiser, random generator, records of the buffers, best parameters
    guide/              the guide so far, as ``LMGuide.save`` writes it

Whoever writes a checkpoint forgets what it remembered of prompts and merged weights, as whoever
reads one does. So both go on from the same numbers, bit by bit.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from lmppl.distributions import ToolResult
from lmppl.guides.automatic import TrainedSites
from lmppl.guides.saving import read_parameters, replace_folder, write_guide
from lmppl.lm.batches.requests import Scored
from lmppl.report.history import History
from lmppl.runtime.records import Record
from lmppl.training.fingerprints import identity
from lmppl.training.inputs import Input
from lmppl.training.trainer import optimizer_tensors, restore_optimizer

if TYPE_CHECKING:
    from lmppl.training.trainer import Trainer

FORMAT = 5


class Part(Protocol):
    """Something with a state, beside the trainer, that a run goes on from."""

    def state(self) -> dict[str, Any]:
        """What is no tensor, in JSON's types."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The rest, by name."""

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from both."""


@dataclass
class Checkpoints:
    """When and where a run is written to disk.

    Args:
        path: a folder for its checkpoint, or None.
        every: steps between them. (One more is written at the end.)
        resume: go on from the checkpoint, if there is one.
    """

    path: Path | None
    every: int
    resume: bool
    _trainer: Trainer = field(init=False, repr=False)
    _parts: Mapping[str, Part] = field(init=False, repr=False)
    _run: dict[str, Any] = field(init=False, repr=False)

    @classmethod
    def of(
        cls, checkpoint: str | Path | None, every: int, resume: bool, seed: int | None
    ) -> Checkpoints:
        """From the arguments of ``fit``.

        Raises:
            ValueError: for one out of range, or without what it needs.
        """
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"checkpoint_every={every!r}: it must be an int of at least 1")
        if resume and checkpoint is None:
            raise ValueError("resume=True needs checkpoint=: the folder of the run to go on with")
        if resume and seed is None:
            raise ValueError("resume=True needs seed=: the seed that the run was begun with")
        return cls(None if checkpoint is None else Path(checkpoint), every, resume)

    def begin(
        self, trainer: Trainer, parts: Mapping[str, Part], run: Mapping[str, Any] | None = None
    ) -> int:
        """Bring a new run to where it was interrupted. Returns how many steps are done.

        Args:
            trainer, parts: see ``write``.
            run: what else must be equal for a run to be the same one; in JSON's types.

        Raises:
            ValueError: for the checkpoint of another run; see ``read``.
            FileExistsError: if there is a checkpoint and the run is a new one.
        """
        if self.path is None:
            return 0
        # Now, before the steps change what it is made of.
        self._run = identity(trainer) | dict(run or {})
        self._trainer, self._parts = trainer, parts
        if not self.path.exists():
            return 0
        if not self.resume:
            raise FileExistsError(
                f"{self.path} exists: resume=True goes on with the run in it; for a new run give "
                "another folder"
            )
        done = read(self.path, trainer, parts, self._run)
        trainer.forget()
        return done

    def save(self, done: int, *, last: bool = False) -> bool:
        """Write the state of a run after ``done`` steps, if it is time or the run ends. A disk that
        is full is warned of, and training goes on.

        Returns:
            Whether it was time: then the trainer has forgotten what a resumed one does not know.
        """
        if self.path is None or not (last or done % self.every == 0):
            return False
        try:
            write(self.path, self._trainer, done, self._parts, self._run)
        except OSError as error:
            warnings.warn(
                f"the checkpoint of step {done} could not be written ({error}); the one before is "
                "kept, and training goes on",
                stacklevel=5,
            )
        self._trainer.forget()
        return True


def write(
    path: Path,
    trainer: Trainer,
    done: int,
    parts: Mapping[str, Part],
    run: Mapping[str, Any],
) -> None:
    """Write the state of a run after ``done`` steps; replaces the checkpoint that is there.

    Args:
        path: its folder.
        trainer: what trains the guide.
        done: steps.
        parts: what else has a state, by name.
        run: what must be equal for a run to be the same one, ``identity`` and more.

    Raises:
        OSError: if it cannot be written; the checkpoint before is kept.
        FileExistsError: if ``path`` is something else.
    """
    packed = _Packer()
    description = {
        "format": FORMAT,
        "run": run,
        "done": done,
        "source": trainer.source.state(),
        "inputs": [_pack_input(each, packed) for each in trainer.source.kept],
        "trainer": trainer.state(),
        **{name: part.state() for name, part in parts.items()},
    }
    tensors = packed.tensors()
    tensors["generator"] = trainer.generator.get_state()
    state = optimizer_tensors(trainer.optimizer, trainer.named_parameters())
    tensors |= _prefixed("optimizer", trainer.late_state | state)
    if trainer.log_z is not None:
        tensors |= _prefixed("log_z", trainer.log_z.state_dict())
    for name, part in parts.items():
        tensors |= _prefixed(name, part.tensors())

    def write_files(folder: Path) -> None:
        (folder / "guide").mkdir()
        write_guide(trainer.guide, folder / "guide")
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "state.safetensors")
        (folder / "checkpoint.json").write_text(json.dumps(description))

    replace_folder(path, "checkpoint", write_files)


def read(
    path: Path,
    trainer: Trainer,
    parts: Mapping[str, Part],
    run: Mapping[str, Any],
) -> int:
    """Bring a new trainer to where the run on disk was. Returns how many steps are done.

    Args:
        path, trainer, parts, run: see ``write``.

    Raises:
        ValueError: if it is another run's: of another program, model, data or options, or of
            another version of lmppl; says which.
    """
    description = json.loads((path / "checkpoint.json").read_text())
    if description.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoint {path} has format {description.get('format')!r}; this version of lmppl "
            f"reads {FORMAT}: train anew, in another folder"
        )
    saved = description["run"]
    for what in dict.fromkeys([*run, *saved]):
        if saved.get(what) != run.get(what):
            raise ValueError(
                f"the checkpoint {path} belongs to another run, its {what} differs: it has "
                f"{saved.get(what)!r}, this run {run.get(what)!r}. Resume with what it was begun "
                "with, or train anew in another folder"
            )
    guide = trainer.guide
    saved_guide = json.loads((path / "guide" / "guide.json").read_text())
    read_parameters(guide, path / "guide", saved_guide)
    guide.restore_pending(None)
    guide.history = History(saved_guide["history"])
    guide.notes = list(saved_guide["notes"])
    guide.sites = TrainedSites(saved_guide["sites"])
    tensors = load_file(path / "state.safetensors")
    unpack = _unpacker(tensors)
    trainer.source.restore(description["source"])
    for each, state in zip(trainer.source.kept, description["inputs"], strict=True):
        _unpack_input(each, state, unpack)
    trainer.restore(description["trainer"])
    trainer.generator.set_state(tensors["generator"])
    if trainer.log_z is not None:
        trainer.log_z.load_state_dict(under(tensors, "log_z."))
    trainer.adopt_new_parameters()
    trainer.late_state = under(tensors, "optimizer.")
    restore_optimizer(trainer.optimizer, trainer.named_parameters(), trainer.late_state)
    for name, part in parts.items():
        part.restore(description[name], under(tensors, f"{name}."))
    return int(description["done"])


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


# --- records -------------------------------------------------------------------------------------


class _Packer:
    """Many small tensors as a few large ones; each is found again by a reference."""

    def __init__(self) -> None:
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._sizes: dict[str, int] = {}

    def add(self, tensor: torch.Tensor) -> list[Any]:
        kind = str(tensor.dtype).removeprefix("torch.")
        at = self._sizes.get(kind, 0)
        self._parts.setdefault(kind, []).append(tensor.detach().cpu().reshape(-1))
        self._sizes[kind] = at + tensor.numel()
        return [kind, at, list(tensor.shape)]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"packed.{kind}": torch.cat(parts) for kind, parts in self._parts.items()}


def _unpacker(tensors: Mapping[str, torch.Tensor]) -> Callable[[Sequence[Any]], torch.Tensor]:
    def unpack(reference: Sequence[Any]) -> torch.Tensor:
        kind, at, shape = reference
        size = torch.Size(shape)
        return tensors[f"packed.{kind}"][at : at + size.numel()].reshape(size).clone()

    return unpack


def _pack_input(each: Input, packed: _Packer) -> dict[str, Any]:
    return {
        "visits": each.visits,
        "alive": each.alive,
        "rejects": each.rejects,
        "features": None if each.features is None else packed.add(each.features),
        "buffer": [_pack(r, packed) for r in each.buffer.records if _is_plain(r)],
        "stock": [_pack(r, packed) for r in each.stock if _is_plain(r)],
    }


def _unpack_input(
    each: Input, state: Mapping[str, Any], unpack: Callable[[Sequence[Any]], torch.Tensor]
) -> None:
    each.visits, each.alive, each.rejects = state["visits"], state["alive"], state["rejects"]
    each.features = None if state["features"] is None else unpack(state["features"])
    each.buffer.records = [_unpack(record, unpack) for record in state["buffer"]]
    each.stock = [_unpack(record, unpack) for record in state["stock"]]


def _is_plain(record: Record) -> bool:
    """Whether JSON can hold the results of its tools; other records are left out."""
    return all(_is_json(node.result) for node in record.tools.values())


def _error(node: ToolResult) -> str | None:
    return None if node.error is None else f"{type(node.error).__name__}: {node.error}"


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_json(each) for each in value)
    if isinstance(value, dict):
        return all(type(k) is str and _is_json(v) for k, v in value.items())
    return type(value) in (str, int, float, bool, type(None))


def _pack(record: Record, packed: _Packer) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, (log_prob, scored) in record.known.items():
        known[name] = [packed.add(log_prob)]
        if scored is not None:
            closing = scored.closing_log_probs
            known[name].append(packed.add(scored.log_probs))
            known[name].append(None if closing is None else packed.add(closing))
    return {
        "values": {name: packed.add(torch.as_tensor(v)) for name, v in record.values.items()},
        "tools": {name: [node.result, _error(node)] for name, node in record.tools.items()},
        "known": known,
        "features": {name: packed.add(tensor) for name, tensor in record.features.items()},
        "log_r": record.log_r,
        "tokens": list(record.tokens),
        "counts": sorted(record.counts),
    }


def _unpack(packed: Mapping[str, Any], unpack: Callable[[Sequence[Any]], torch.Tensor]) -> Record:
    known = {}
    for name, (log_prob, *rest) in packed["known"].items():
        scored = None
        if rest:
            terms, closing = rest
            scored = Scored(unpack(terms), None if closing is None else unpack(closing))
        known[name] = (unpack(log_prob), scored)
    return Record(
        values={name: unpack(value) for name, value in packed["values"].items()},
        tools={
            name: ToolResult.wrap(result, None if error is None else RuntimeError(error))
            for name, (result, error) in packed["tools"].items()
        },
        known=known,
        features={name: unpack(tensor) for name, tensor in packed["features"].items()},
        log_r=packed["log_r"],
        tokens=tuple(packed["tokens"]),
        counts=frozenset(packed["counts"]),
    )
