"""Actors that write what they answer, and do not try without end what kills them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from lmppl.ray.actor import Actor, node, table_of
from lmppl.ray.folder import Folder
from lmppl.ray.rows import joined, keys_of

_MOST_DEATHS = 2


def writing(infer: type[Actor], folder: Folder) -> type[Actor]:
    """The actors of ``infer`` that write their answers into a folder, and return the keys.

    Ray starts an actor that has died again, and gives it the batch that it had, without end. The folder
    knows how often a batch was begun: the second time its rows are answered one by one, which takes less
    memory, and a row on which processes die has failed.
    """

    class Infer(infer):  # type: ignore[misc, valid-type]
        def __call__(self, batch: Any) -> pa.Table:
            table = table_of(batch)
            keys = keys_of(table, self.settings.key)
            try:
                with folder.attempt("batch", keys) as deaths:
                    answers = self._one_by_one(table) if deaths else self.answer(table)
                    folder.write(answers)
            except OSError as error:
                raise OSError(
                    f"node {node()}: {error}. What was written before is whole: make room, and start "
                    "the same run again"
                ) from error
            return answers.select([self.settings.key])

        def _one_by_one(self, table: pa.Table) -> pa.Table:
            return pa.concat_tables([self._one(table.slice(i, 1)) for i in range(len(table))])

        def _one(self, row: pa.Table) -> pa.Table:
            (key,) = keys_of(row, self.settings.key)
            with folder.attempt("row", [key]) as deaths:
                if deaths < _MOST_DEATHS:
                    return self.answer(row)
                error = RuntimeError(
                    f"{deaths} processes died as they answered this input by itself: for want of memory "
                    "perhaps, which fewer samples, or more memory for an actor (memory=), may mend"
                )
                return joined(row, [self.failed(key, error)])

    return Infer
