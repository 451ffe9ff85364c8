"""Rows: from an input's row to the arguments of a program and its seed, and from a posterior to a row.

Whatever a row becomes depends on the row alone, never on those beside it. So it does not matter how rows
are shared out among processes, nor whether one is answered again.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from lmppl.checks import did_you_mean
from lmppl.posterior import Posterior
from lmppl.runtime import nth_seed
from lmppl.runtime.arguments import name_of

Key = int | str

ANSWER = pa.schema(
    [
        ("log_evidence", pa.float64()),
        ("log_evidence_stderr", pa.float64()),
        ("ess", pa.float64()),
        ("num_samples", pa.int64()),
        ("texts", pa.list_(pa.string())),
        ("weights", pa.list_(pa.float64())),
        ("notes", pa.list_(pa.string())),
        ("seed", pa.int64()),
        ("error", pa.string()),
    ]
)
"""The columns of an answer. Their types are the same in each batch, whatever is null in it."""


@dataclass(frozen=True)
class Settings:
    """What to infer; the fields are the arguments of ``Infer``."""

    model: Callable[..., Any]
    lm: Any
    method: Any
    guide: Any
    num_samples: int
    seed: int
    key: str
    arguments: Sequence[str] | None
    site: str | Callable[[dict[str, Any]], Any] | None
    top: int
    on_error: str
    at_once: int | None
    kwargs: Mapping[str, Any] | None
    dtype: Any
    device: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """What answers depend on, as JSON can hold it: the same in a later run of the same script."""
        names = ("model", "lm", "method", "guide", "num_samples", "seed", "key", "site", "top")
        told = {name: _described(getattr(self, name)) for name in (*names, "kwargs", "dtype")}
        return told | {name: _described(value) for name, value in sorted(self.options.items())}


def _described(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _described(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(inner) for inner in value]
    if hasattr(value, "run") and hasattr(value, "__dict__"):  # an engine
        return [type(value).__name__, _described(vars(value))]
    return name_of(value) if callable(value) else str(value)


# --- from a row ----------------------------------------------------------------------------------


def keys_of(table: pa.Table, key: str) -> list[Key]:
    """The keys of some rows, which are all different.

    Raises:
        ValueError: if there is no such column, a row without a key, or two with the same.
        TypeError: for keys that are neither whole numbers nor strings.
    """
    _check_column(key, table.column_names)
    kind, keys = table.schema.field(key).type, table.column(key).to_pylist()
    if None in keys:
        raise ValueError(f"row {keys.index(None)} has no {key!r}, from which its seed is made")
    if not all(type(value) in (int, str) for value in keys):
        raise TypeError(f"column {key!r} holds {kind}: keys are whole numbers or strings")
    check_distinct(Counter(keys), key)
    return keys


def _check_column(key: str, columns: Sequence[str]) -> None:
    if key not in columns:
        hint = did_you_mean(key, columns, "Columns")
        raise ValueError(f"the rows have no column {key!r} (key=), from which seeds are made{hint}")


def check_distinct(counts: Counter[Key], key: str) -> None:
    """Raise ``ValueError`` if a key has been counted more than once."""
    twice = [value for value, count in counts.most_common(4) if count > 1]
    if twice:
        more = " and others" * (len(twice) == 4)
        shown = ", ".join(map(repr, twice[:3])) + more
        raise ValueError(
            f"several rows have the {key!r} {shown}: they would get the same seed, and nobody could "
            "tell their answers apart. Give each row a key of its own"
        )


def seed_of(seed: int, key: Key) -> int:
    """The seed of an input: of a whole number i that of input i of ``infer_batch(seed=seed)``, of a
    string one of its digest."""
    if isinstance(key, str):
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        return nth_seed(seed, int.from_bytes(digest, "big"))
    return nth_seed(seed, key % 2**64)


def arguments_of(columns: Sequence[str], settings: Settings) -> list[str]:
    """The columns that are arguments of the program.

    Raises:
        ValueError: for a column that is none, or has the name of an answer's; without that of the keys.
    """
    _check_column(settings.key, columns)
    taken = [name for name in columns if name in ANSWER.names]
    if taken:
        raise ValueError(f"the rows have columns {taken}, which answers have too: rename them")
    for name in [name for name in settings.arguments or () if name not in columns]:
        hint = did_you_mean(name, columns, "Columns")
        raise ValueError(f"the rows have no column {name!r}, which arguments= names{hint}")
    chosen = settings.arguments
    names = [name for name in columns if name != settings.key] if chosen is None else list(chosen)
    try:
        parameters = inspect.signature(settings.model).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return names
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in [name for name in names if name not in parameters]:
            raise ValueError(
                f"the program {name_of(settings.model)} has no argument {name!r}, and the rows have "
                "such a column: rename it, or name the columns that are arguments, arguments=[...]"
            )
    return names


def inputs_of(table: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """The arguments of each row by name. What is null is left out, for the program's default to count:
    whether the column is there at all can depend on the other rows."""
    rows = table.select(list(names)).to_pylist() if names else [{}] * len(table)
    return [{name: v for name, v in row.items() if not _is_null(v)} for row in rows]


def _is_null(value: Any) -> bool:
    """None; or NaN, which numpy has in its place."""
    return value is None or (isinstance(value, float) and value != value)


# --- to a row ------------------------------------------------------------------------------------


def answer_of(posterior: Posterior, settings: Settings) -> dict[str, Any]:
    """The row of a posterior. Raises ``ValueError`` if it has several sites to rank."""
    ranked = list(posterior.probs(_site(posterior, settings)).items())[: settings.top]
    return {
        "log_evidence": posterior.log_evidence,
        "log_evidence_stderr": posterior.log_evidence_stderr,
        "ess": posterior.ess,
        "num_samples": len(posterior),
        "texts": [None if value is None else _unicode(value) for value, _ in ranked],
        "weights": [weight for _, weight in ranked],
        "notes": [_unicode(note) for note in posterior.info.get("notes", ())],
        "seed": posterior.info["seed"],
        "error": None,
    }


def answer_of_error(error: Exception, seed: int) -> dict[str, Any]:
    """The row of an input that failed."""
    said = _unicode(f"{type(error).__name__}: {error}")
    return dict.fromkeys(ANSWER.names) | {"seed": seed, "error": said}


def _site(posterior: Posterior, settings: Settings) -> Any:
    if settings.site is not None:
        return settings.site
    sites = posterior.summary(joint=True)["sites"]
    if len(sites) != 1:
        there = f"has the sites {', '.join(sites)}" if sites else "has no latent text"
        raise ValueError(
            f"the program {name_of(settings.model)} {there}: say what is to be ranked, site='name' or a "
            "function of a sample's values, site=lambda v: ..., as posterior.probs takes it"
        )
    return sites[0]


def _unicode(value: Any) -> str:
    """A string that a file can hold: without halves of surrogate pairs."""
    return str(value).encode("utf-8", "replace").decode()


def joined(table: pa.Table, answers: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows with their answers behind them."""
    found = pa.Table.from_pylist(list(answers), schema=ANSWER)
    for name in ANSWER.names:
        table = table.append_column(ANSWER.field(name), found.column(name))
    return table
