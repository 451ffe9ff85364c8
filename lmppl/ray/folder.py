"""A folder of answers: Parquet files, each there whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from lmppl.ray.rows import Key, keys_of

_SETTINGS = b"lmppl"
_BEGUN = ".begun"


class Folder:
    """Answers as files.

    A file is written under a temporary name, which readers pass over, and renamed. Its name is made of
    the keys in it: rows that are answered again replace what they were.

    Args:
        path: a folder, or a URI that pyarrow knows (``s3://bucket/folder``).
        key: the column of the keys.
        settings: what answers depend on; kept in each file.
    """

    def __init__(self, path: str | Path, key: str, settings: Mapping[str, Any]) -> None:
        given = str(path) if "://" in str(path) else str(Path(path).expanduser().absolute())
        self.system, self.path = fs.FileSystem.from_uri(given)
        self.uri, self._key, self._settings = given, key, dict(settings)
        self._run = uuid4().hex

    def write(self, table: pa.Table) -> str:
        """Write some answers; returns the file.

        Raises:
            OSError: if they cannot be written; nothing is left of them.
        """
        name = _digest(keys_of(table, self._key))
        file, new = f"{self.path}/{name}.parquet", f"{self.path}/.{name}.{uuid4().hex}.new"
        told = {_SETTINGS: json.dumps(self._settings).encode()}
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **told})
        try:
            self.system.create_dir(self.path, recursive=True)
            pq.write_table(table, new, filesystem=self.system)
            self.system.move(new, file)
        except OSError as error:
            self._discard(new)
            raise OSError(f"cannot write {file}: {error}") from error
        return file

    def _discard(self, file: str) -> None:
        if self._is_there(file):
            self.system.delete_file(file)

    def _is_there(self, file: str) -> bool:
        return self.system.get_file_info(file).type != fs.FileType.NotFound

    @contextmanager
    def attempt(self, what: str, keys: Sequence[Key]) -> Iterator[int]:
        """Leave a mark while something is done with the rows of these keys. It outlives a process that
        dies in it. Gives the number of such processes in this run.

        Raises:
            OSError: if the mark cannot be written.
        """
        name = f"{self.path}/.{_digest([what, *keys])}.{self._run}"
        deaths = 0
        while self._is_there(f"{name}.{deaths}{_BEGUN}"):
            deaths += 1
        file = f"{name}.{deaths}{_BEGUN}"
        try:
            self.system.create_dir(self.path, recursive=True)
            self.system.open_output_stream(file).close()
        except OSError as error:
            raise OSError(f"cannot write {file}: {error}") from error
        try:
            yield deaths
        finally:
            for number in range(deaths + 1):
                self._discard(f"{name}.{number}{_BEGUN}")

    def forget_attempts(self) -> None:
        """Remove the marks of runs that were stopped."""
        for file in self._paths():
            if file.endswith(_BEGUN):
                self._discard(file)

    def keys(self) -> set[Key]:
        """The keys that are answered.

        Raises:
            ValueError: if they were answered under other settings, or one of them twice.
        """
        files: dict[Key, str] = {}
        for file in self._files():
            table = pq.read_table(file, columns=[self._key], filesystem=self.system)
            self._check(json.loads((table.schema.metadata or {}).get(_SETTINGS, b"{}")), file)
            for key in keys_of(table, self._key):
                if key in files:
                    raise ValueError(
                        f"{self._key}={key!r} is in {files[key]} and in {file}: two runs wrote there at "
                        "once. Remove one of the files, and start the run again"
                    )
                files[key] = file
        return set(files)

    def _files(self) -> Iterable[str]:
        return sorted(path for path in self._paths() if path.endswith(".parquet"))

    def _paths(self) -> list[str]:
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return [info.path for info in self.system.get_file_info(selector)]

    def _check(self, settings: Mapping[str, Any], file: str) -> None:
        ours = json.loads(json.dumps(self._settings))
        for name in [n for n in {**settings, **ours} if settings.get(n) != ours.get(n)]:
            raise ValueError(
                f"{file} was answered with {name}={settings.get(name)!r}, given {ours.get(name)!r}: "
                "choose another folder, or go on as it was begun"
            )


def _digest(keys: Sequence[Key]) -> str:
    """A file name for some keys."""
    return hashlib.blake2b(json.dumps(list(keys)).encode(), digest_size=16).hexdigest()
