"""Traces as columns of values, a site each, which a file can hold; and traces made of these.

A trace that is made of columns has all values and log-probabilities of the one that it was made of,
but no distributions: ``SavedSite`` stands for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine import Trace
from pyro.poutine.util import site_is_factor

from lmppl.distributions import PAD, LMText, ToolCall, ToolResult
from lmppl.lm.tokens.vocabulary import Vocabulary
from lmppl.posterior.plain import (
    Unsaved,
    Vocabularies,
    Written,
    read,
    read_text,
    write,
    write_text,
)
from lmppl.runtime.sites import has_value, is_continuous, is_tool, value_of

FOUND = ("unscaled_log_prob", "log_prob", "log_prob_sum", "proposal_log_prob")
"""What was found at a site, nats; the log-probabilities of traces that were not scored are missing."""

_FLAGS = ("_deterministic", "hard")

Column = dict[str, Any]


class SavedSite(TorchDistribution):
    """Stands for the distribution of a site of a saved trace, whose density only the program knows."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, name: str, is_continuous: bool, event_shape: torch.Size) -> None:
        self.name, self._is_continuous = name, is_continuous
        super().__init__(torch.Size(()), event_shape, validate_args=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedSite:
        return self  # it never changes

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real if self._is_continuous else constraints.integer

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        raise self._unknown()

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        raise self._unknown()

    def _unknown(self) -> TypeError:
        return TypeError(
            f"site '{self.name}' was loaded without its program, which knows its distribution: give "
            "it, lmppl.Posterior.load(path, model, *args, lm=lm)"
        )


class SavedText(SavedSite):
    """Of a text: it knows those that were saved."""

    def __init__(self, name: str, texts: Mapping[tuple[int, ...], str], width: int) -> None:
        self.text_of = texts
        super().__init__(name, False, torch.Size((width,)))

    def text(self, value: torch.Tensor) -> str:
        """The text of one value."""
        return self.text_of[tuple(value.tolist())]

    def token_ids(self, value: torch.Tensor) -> tuple[int, ...]:
        """The tokens of one value, without the padding."""
        return tuple(token for token in value.tolist() if token != PAD)


# --- from traces ---------------------------------------------------------------------------------


def columns_of(traces: Sequence[Trace], vocabularies: Vocabularies) -> dict[str, Any]:
    """The sites of some traces: ``orders``, the different orders of their names, ``order``, that of each
    trace, and ``sites``, a column for each name. Left out are parameters, plates and what
    ``pyro.plate`` subsamples."""
    places: dict[str, list[int]] = {}
    orders: dict[tuple[str, ...], int] = {}
    order = []
    for i, trace in enumerate(traces):
        names = tuple(name for name in trace.nodes if _is_kept(trace, name))
        order.append(orders.setdefault(names, len(orders)))
        for name in names:
            places.setdefault(name, []).append(i)
    sites = [
        {"name": name, "at": torch.tensor(at), **_column(traces, name, at, vocabularies)}
        for name, at in places.items()
    ]
    return {"orders": list(map(list, orders)), "order": torch.tensor(order), "sites": sites}


def _is_kept(trace: Trace, name: str) -> bool:
    node = trace.nodes[name]
    return has_value(trace, name) or (node["type"] == "sample" and site_is_factor(node))


def _column(
    traces: Sequence[Trace], name: str, at: Sequence[int], vocabularies: Vocabularies
) -> Column:
    nodes = [traces[i].nodes[name] for i in at]
    column: Column = {
        "observed": torch.tensor([bool(node["is_observed"]) for node in nodes]),
        "flags": [flag for flag in _FLAGS if nodes[0]["infer"].get(flag)],
        "found": {key: _packed([node.get(key) for node in nodes]) for key in FOUND},
    }
    if site_is_factor(nodes[0]):
        return column | {"kind": "factor"}
    if is_tool(nodes[0]):
        results = [node["value"] for node in nodes]
        errors = [
            None if r.error is None else f"{type(r.error).__name__}: {r.error}" for r in results
        ]
        written = [write(result.result, vocabularies) for result in results]
        return column | {"kind": "tool", "results": written, "errors": errors}
    column["values"] = _packed([node["value"] for node in nodes])
    texts = [value_of(node) for node in nodes]
    if not all(isinstance(text, str) for text in texts):
        continuous = [is_continuous(node) for node in nodes]
        return column | {"kind": "numbers", "continuous": torch.tensor(continuous)}
    tables, table = _tables([tuple(node["value"].tolist()) for node in nodes], texts)
    written = [
        [[list(ids), write_text(text, vocabularies)] for ids, text in known.items()]
        for known in tables
    ]
    fns = [node["fn"] for node in nodes]
    return column | {
        "kind": "text",
        "tables": written,
        "table": torch.tensor(table),
        "fingerprints": [fn.fingerprint if isinstance(fn, LMText) else None for fn in fns],
    }


def _tables(
    values: Sequence[tuple[int, ...]], texts: Sequence[str]
) -> tuple[list[dict[tuple[int, ...], str]], list[int]]:
    """Tables of texts by their values, and which of them each text is in. (There is one table, but where
    equal tokens are other texts: those of another tokenizer.)"""
    tables: list[dict[tuple[int, ...], str]] = [{}]
    numbers = []
    for value, text in zip(values, texts, strict=True):
        number = next((i for i, known in enumerate(tables) if known.get(value, text) == text), None)
        if number is None:
            number = len(tables)
            tables.append({})
        tables[number].setdefault(value, text)
        numbers.append(number)
    return tables, numbers


def _packed(tensors: Sequence[Any]) -> dict[str, Any]:
    """Tensors (or None) as one of shape (n, ...) where they are alike."""
    each = [
        None if tensor is None else torch.as_tensor(tensor).detach().cpu() for tensor in tensors
    ]
    kinds = {None if tensor is None else (tensor.shape, tensor.dtype) for tensor in each}
    if len(kinds) == 1 and None not in kinds:
        return {"stacked": torch.stack([tensor for tensor in each if tensor is not None])}
    return {"each": None if kinds == {None} else each}


def _unpacked(packed: Mapping[str, Any], count: int) -> list[torch.Tensor | None]:
    if "stacked" in packed:
        return [tensor.clone() for tensor in packed["stacked"]]
    return [None] * count if packed["each"] is None else list(packed["each"])


# --- to traces -----------------------------------------------------------------------------------


def traces_of(columns: Mapping[str, Any], vocabularies: Sequence[Vocabulary | None]) -> list[Trace]:
    """The traces that the columns were made of; ``vocabularies``: see ``read_text``."""
    orders, order = columns["orders"], columns["order"].tolist()
    nodes: list[dict[str, Any]] = [{} for _ in order]
    for site in columns["sites"]:
        at = site["at"].tolist()
        for i, node in zip(at, _nodes(site, len(at), vocabularies), strict=True):
            nodes[i][site["name"]] = node
    traces = []
    for number, found in zip(order, nodes, strict=True):
        traces.append(trace := Trace())
        for name in orders[number]:
            trace.add_node(name, **found[name])
    return traces


def _nodes(
    site: Column, count: int, vocabularies: Sequence[Vocabulary | None]
) -> list[dict[str, Any]]:
    """The nodes of one site, in all traces that have it."""
    found = {key: _unpacked(packed, count) for key, packed in site["found"].items()}
    values, fns = _READERS[site["kind"]](site, count, found, vocabularies)
    infer = dict.fromkeys(site["flags"], True)
    nodes = []
    for i, (value, fn, observed) in enumerate(
        zip(values, fns, site["observed"].tolist(), strict=True)
    ):
        log_probs = {key: column[i] for key, column in found.items()}
        kept = {key: value for key, value in log_probs.items() if value is not None}
        node = {"name": site["name"], "type": "sample", "fn": fn, "value": value, "infer": infer}
        node |= {"is_observed": observed, "args": (), "kwargs": {}, "scale": 1.0, "mask": None}
        nodes.append(node | {"cond_indep_stack": (), "done": True} | kept)
        if "unscaled_log_prob" in kept:
            nodes[-1].setdefault("proposal_log_prob", None)
    return nodes


_Read = tuple[Sequence[Any], Sequence[Any]]
"""Values and distributions."""


def _factors(site: Column, count: int, found: Mapping[str, Any], _: Any) -> _Read:
    scores = [torch.tensor(0.0) if s is None else s for s in found["unscaled_log_prob"]]
    return [torch.zeros((*score.shape, 0)) for score in scores], list(map(dist.Unit, scores))


def _tools(
    site: Column, count: int, found: Any, vocabularies: Sequence[Vocabulary | None]
) -> _Read:
    name = site["name"]

    def unknown(*args: Any) -> Any:
        raise TypeError(f"the function of tool '{name}' is not saved with a posterior")

    def result(written: Written, error: str | None) -> ToolResult:
        kept = None if error is None else RuntimeError(error)
        return ToolResult.wrap(read(written, vocabularies), kept)

    pairs = zip(site["results"], site["errors"], strict=True)
    return [result(*pair) for pair in pairs], [ToolCall(unknown, (), "raise")] * count


def _numbers(site: Column, count: int, found: Any, _: Any) -> _Read:
    values = [value for value in _unpacked(site["values"], count) if value is not None]
    continuous = site["continuous"].tolist()
    fns = [
        SavedSite(site["name"], flag, value.shape)
        for flag, value in zip(continuous, values, strict=True)
    ]
    return values, fns


def _texts(
    site: Column, count: int, found: Any, vocabularies: Sequence[Vocabulary | None]
) -> _Read:
    values = [value for value in _unpacked(site["values"], count) if value is not None]
    tables = [
        {tuple(ids): read_text(written, vocabularies) for ids, written in known}
        for known in site["tables"]
    ]
    kinds = [(number, len(v)) for number, v in zip(site["table"].tolist(), values, strict=True)]
    fns = {kind: SavedText(site["name"], tables[kind[0]], kind[1]) for kind in set(kinds)}
    return values, [fns[kind] for kind in kinds]


_READERS: dict[str, Callable[..., _Read]] = {
    "factor": _factors, "tool": _tools, "numbers": _numbers, "text": _texts,
}  # fmt: skip


def unsaved_tools(traces: Sequence[Trace]) -> list[str]:
    """The tools some of whose results could not be saved."""
    return sorted(
        {
            name
            for trace in traces
            for name, node in trace.nodes.items()
            if is_tool(node) and isinstance(node["value"].result, Unsaved)
        }
    )
