"""Nested states on disk, without pickle.

A state is a nested dict of tensors and JSON's values. It is a folder:

    {kind}.json          format, digests, and the state, with a reference in place of each tensor
    {kind}.safetensors   the tensors, small ones packed together

What was damaged or edited since is refused by the name of the file.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lmppl.checks import check_flag

State = Mapping[str, Any]
"""A nested dict (with str keys) and lists of tensors and JSON's values."""

_TENSOR = "$tensor"  # the one key of a reference
_SMALL = 4096  # numbers of a tensor that is packed together with others
_LEFT_AFTER = 86400.0  # seconds without a change: whoever wrote to it was killed


# --- states --------------------------------------------------------------------------------------


def write_state(folder: Path, kind: str, version: int, state: State) -> None:
    """Write a state into a folder that exists, with digests of all files that are there already.

    The files are named by the ``kind`` of thing whose state it is; ``version`` is their format's.

    Raises:
        OSError: if it cannot be written.
        TypeError, ValueError: if it is no ``State``.
    """
    written, tensors = _split(state)
    save_tensors(tensors, folder / f"{kind}.safetensors")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    digests = {file.relative_to(folder).as_posix(): _digest_of_file(file) for file in files}
    body = json.dumps({"format": version, "files": digests, "state": written})
    digest = hashlib.sha256(body.encode()).hexdigest()
    (folder / f"{kind}.json").write_text(f'{{"digest": "{digest}", {body[1:]}')


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, **metadata: str) -> None:
    """Write one safetensors file. Raises ``OSError`` if it cannot be written."""
    try:
        save_file(tensors, file, metadata or None)
    except SafetensorError as error:  # which is no OSError, also if the disk is full
        raise OSError(f"{file}: {error}") from error


def read_state(folder: Path, kind: str, version: int, advice: str = "") -> dict[str, Any]:
    """The state that ``write_state`` wrote; ``advice`` is what to do about another format.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it has another format, or a file is not what was written; says which.
    """
    file = folder / f"{kind}.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no {kind}: it has no {file.name}")
    try:
        described = json.loads(file.read_text())
        assert isinstance(described, dict)
    except (ValueError, AssertionError) as error:
        raise _damaged(file) from error
    if described.get("format") != version:
        raise ValueError(
            f"the {kind} {folder} has format {described.get('format')!r}; this version of lmppl "
            f"reads {version}{advice}"
        )
    digest = described.pop("digest", None)
    if hashlib.sha256(json.dumps(described).encode()).hexdigest() != digest:
        raise _damaged(file)
    for name, expected in described["files"].items():
        if not (folder / name).is_file() or _digest_of_file(folder / name) != expected:
            raise _damaged(folder / name)
    tensors = load_file(folder / f"{kind}.safetensors")

    def with_tensor(value: dict[str, Any]) -> Any:
        if _TENSOR not in value:
            return value
        entry, offset, shape = value[_TENSOR]
        size = torch.Size(shape)
        return tensors[entry].reshape(-1)[offset : offset + size.numel()].reshape(size).clone()

    return json.loads(json.dumps(described["state"]), object_hook=with_tensor)


def _damaged(file: Path) -> ValueError:
    what = "was damaged or edited since it was saved" if file.is_file() else "is missing"
    return ValueError(f"{file} {what}: restore it from a copy, or save anew")


def _digest_of_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_state(value: Any) -> bool:
    """Whether ``write_state`` can write a value, and ``read_state`` reads an equal one."""
    if isinstance(value, list):
        return all(map(is_state, value))
    if isinstance(value, dict):
        pairs = value.items()
        return _TENSOR not in value and all(type(k) is str and is_state(v) for k, v in pairs)
    return type(value) in (str, int, float, bool, type(None)) or torch.is_tensor(value)


def _split(state: State) -> tuple[Any, dict[str, torch.Tensor]]:
    """A state with ``{"$tensor": [entry, offset, shape]}`` in place of each tensor, and the entries:
    the large tensors, and for each dtype the small ones, one after the other."""
    large: dict[str, torch.Tensor] = {}
    small: dict[str, list[torch.Tensor]] = defaultdict(list)
    sizes = Counter[str]()

    def split(value: Any, at: str) -> Any:
        if isinstance(value, Mapping):
            if _TENSOR in value:
                raise ValueError(f"{at} has a key {_TENSOR!r}, which stands for tensors")
            return {key: split(inner, f"{at}.{key}") for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [split(inner, f"{at}.{i}") for i, inner in enumerate(value)]
        if not torch.is_tensor(value):
            return value
        tensor, entry, offset = value.detach().cpu(), at, 0
        if tensor.numel() > _SMALL:
            large[entry] = tensor.contiguous()
        else:
            entry = str(tensor.dtype).removeprefix("torch.")
            offset = sizes[entry]
            small[entry].append(tensor.reshape(-1))
            sizes[entry] += tensor.numel()
        return {_TENSOR: [entry, offset, list(tensor.shape)]}

    written = split(state, "state")
    return written, large | {entry: torch.cat(parts) for entry, parts in small.items()}


# --- files and folders ---------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file (UTF-8) under a temporary name, and rename it: it is there whole or not at all.

    Raises:
        OSError: if it cannot be written; what was there before is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def check_unused(path: Path, *, overwrite: bool) -> None:
    """Check that nothing is lost if a folder is written there.

    Raises:
        FileExistsError: if something is there that may not be replaced.
        TypeError: ``overwrite`` is no bool.
    """
    check_flag("overwrite", overwrite)
    if present(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists: overwrite=True replaces it, or choose another name")


def replace_folder(path: Path, kind: str, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, and rename it: it is there whole or not at all.

    Interrupted between its two renames, it leaves what was there before where ``present`` finds it.
    Of two processes that write to one path at once, one may fail; the folder is that of the other.
    A folder that holds ``{kind}.json`` is replaced, nothing else is.

    Raises:
        FileExistsError: if ``path`` exists and is of no such kind.
        OSError: if it cannot be written; what was there before is kept.
    """
    if path.exists() and not (path / f"{kind}.json").is_file():
        raise FileExistsError(f"{path} exists and is no {kind}: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{which}") for which in (f"{uuid4().hex}.new", "old"))
    if present(path) == old:
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)
    for left_over in path.parent.glob(f".{glob.escape(path.name)}.*.new"):
        with suppress(OSError):
            if left_over.stat().st_mtime < time.time() - _LEFT_AFTER:
                shutil.rmtree(left_over)
    try:
        new.mkdir()
        write(new)
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if present(path) == old:
            os.replace(old, path)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def present(path: Path) -> Path:
    """Where a folder that ``replace_folder`` wrote is: at ``path``, or where an interruption between
    its two renames has left it."""
    old = path.with_name(f".{path.name}.old")
    return old if old.exists() and not path.exists() else path
