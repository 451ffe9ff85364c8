"""``run``: rows are checked and shared out, actors answer them, and what is answered is kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from lmppl.checks import check_int
from lmppl.ray.actor import Actor
from lmppl.ray.folder import Folder
from lmppl.ray.rows import Key, arguments_of, check_distinct, keys_of
from lmppl.ray.writer import writing


def run(
    infer: type[Actor],
    rows: Any,
    *,
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 64,
    folder: str | Path | None = None,
    **resources: Any,
) -> Any:
    """Answer the rows of a Ray data set.

    ```python
    infer = lmppl.ray.Infer(infill, lm="smollm2-135m-instruct")
    rows = ray.data.read_json("inputs.jsonl")
    answers = lmppl.ray.run(infer, rows, concurrency=2, num_gpus=1)
    lmppl.ray.run(infer, rows, concurrency=2, folder="answers")     # may be stopped, and started again
    ```

    It is ``rows.map_batches(infer, ...)``, and what is easily forgotten around it. All keys are compared
    before anything is loaded. The rows are read, into Ray's object store, before actors take the
    processors that reading needs, and cut into batches, which go one by one to whichever actor is free.

    With a ``folder``, actors write each batch as it is answered, as a Parquet file that is there
    whole or not at all; rows whose keys are there already are left out. So a run that was stopped, or
    whose machine died, is started again by the same command, and has lost the batches under way. (Of
    ``Dataset.write_parquet``, a run that is killed leaves halves of files.) Let one run at a time write
    into a folder; on several machines it has to be on a file system that they share.

    A process that dies is started again by Ray, and its batch is answered again: with a ``folder``, its
    rows one by one, and an input on which a process died twice in that has failed, as with any other
    error (``on_error=``). Without a folder an input that kills its process is tried without end.

    Args:
        infer: what to infer, ``lmppl.ray.Infer(...)``.
        rows: a ``ray.data.Dataset``.
        concurrency: how many actors, or the least and the most of them.
        batch_size: rows of a batch. A row's answer does not depend on it.
        folder: where answers are kept; None: in the data set that is returned.
        **resources: what an actor gets and where it runs, as of ``Dataset.map_batches``: ``num_cpus``
            (by default 1; as many threads), ``num_gpus``, ``memory``, ``label_selector``, ...

    Returns:
        A ``ray.data.Dataset`` of the answers, in any order. With a ``folder``: of all that are there.
        Without: they are inferred when they are asked for, each time.

    Raises:
        TypeError: for what is not from ``Infer``, or no data set.
        ValueError: without rows; if keys are missing or equal, columns are no arguments of the program,
            or the folder was answered under other settings.
        OSError: if the folder cannot be read.
        RuntimeError: if answers are missing in the folder when all is done.
        ray.exceptions.RayError: what an actor has raised, with its text: an input that failed, a
            language model that its node cannot load, a file that it cannot write.
    """
    if not (isinstance(infer, type) and issubclass(infer, Actor)):
        raise TypeError(f"run takes lmppl.ray.Infer(...), given {infer!r}")
    if not isinstance(rows, ray.data.Dataset):
        kind = type(rows).__name__
        raise TypeError(f"rows= takes a Ray data set, given a {kind}: ray.data.from_items([...])")
    settings, batch_size = infer.settings, check_int("batch_size", batch_size)
    least, most = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    least, most = check_int("concurrency", least), check_int("concurrency", most)
    into = None
    if folder is not None:
        into = Folder(folder, settings.key, settings.described())
        into.forget_attempts()
        infer = writing(infer, into)
    rows = rows.materialize()
    if rows.count() == 0:
        raise ValueError("the data set has no rows")
    schema, keys = _looked_over(rows, settings.key)
    arguments_of(schema.names, settings)
    left = _left(settings.key, schema, set() if into is None else into.keys())
    rows = rows.map_batches(left, batch_format="pyarrow")
    rows = rows.repartition(target_num_rows_per_block=batch_size, strict=True).materialize()
    if rows.count() > 0:  # what there are no batches for, no actor need be started for
        most = min(most, rows.num_blocks())
        pool = ray.data.ActorPoolStrategy(
            min_size=min(least, most), max_size=most, max_tasks_in_flight_per_actor=1
        )
        answers = rows.map_batches(
            infer, compute=pool, batch_size=batch_size, batch_format="pyarrow", **resources
        )
        if into is None:
            return answers
        answers.materialize()
    assert into is not None
    if lost := keys - into.keys():
        raise RuntimeError(
            f"{len(lost)} of {len(keys)} answers are not in {into.uri}, where this process looks: on "
            "several machines it has to be on a file system that all of them share"
        )
    return ray.data.read_parquet(into.uri)


def _looked_over(rows: Any, key: str) -> tuple[pa.Schema, set[Key]]:
    """The columns of a data set, and its keys. (Each block has columns and types of its own: those of a
    JSON file are read off its rows.)

    Raises:
        ValueError: if keys are missing, or some are equal.
        TypeError: if blocks do not go together: a column of numbers in one, of strings in another.
    """

    def look(table: pa.Table) -> pa.Table:
        told = []
        if len(table) > 0:  # others may have no columns
            columns = table.schema.remove_metadata().serialize().to_pybytes()
            told = [{"schema": columns, "keys": json.dumps(keys_of(table, key))}]
        return pa.Table.from_pylist(told, pa.schema({"schema": pa.binary(), "keys": pa.string()}))

    schemas, counts = [], Counter[Key]()
    for block in rows.map_batches(look, batch_format="pyarrow").take_all():
        schemas.append(pa.ipc.read_schema(pa.py_buffer(block["schema"])))
        counts.update(json.loads(block["keys"]))
    check_distinct(counts, key)
    return pa.unify_schemas(schemas, promote_options="permissive"), set(counts)


def _left(key: str, schema: pa.Schema, done: set[Key]) -> Callable[[pa.Table], pa.Table]:
    """Leaves out rows whose keys are done, and gives all blocks the same columns and types."""

    def left(table: pa.Table) -> pa.Table:
        for field in [field for field in schema if field.name not in table.column_names]:
            table = table.append_column(field, pa.nulls(len(table), field.type))
        table = table.filter(pa.array([k not in done for k in keys_of(table, key)], pa.bool_()))
        return table.select(schema.names).cast(schema)

    return left
