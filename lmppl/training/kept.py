"""What training keeps of an input, as tensors and JSON's values: for checkpoints and other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lmppl.distributions import ToolResult
from lmppl.lm.batches.requests import Scored
from lmppl.runtime.records import Record
from lmppl.states import is_state
from lmppl.training.inputs import Input

_FACTS = ("visits", "alive", "rejects", "features")
_RECORDS = ("buffer", "stock")
_UNKNOWN = object()


def _kept(input_: Input) -> dict[str, Any]:
    """What is kept of an input, without the records that a file can't hold."""
    records = {"buffer": input_.buffer.records, "stock": input_.stock}
    return {name: getattr(input_, name) for name in _FACTS} | {
        name: list(filter(_is_plain, records[name])) for name in _RECORDS
    }


def state_of_input(input_: Input) -> dict[str, Any]:
    """What is kept of an input, as tensors and JSON's values."""
    kept = _kept(input_)
    return kept | {name: list(map(record_state, kept[name])) for name in _RECORDS}


def load_input(input_: Input, state: Mapping[str, Any]) -> None:
    """Take over what ``state_of_input`` gave."""
    for name in _FACTS:
        setattr(input_, name, state[name])
    input_.buffer.records = [record_of_state(kept) for kept in state["buffer"]]
    input_.stock = [record_of_state(kept) for kept in state["stock"]]


# --- for other processes -------------------------------------------------------------------------


def news_of(input_: Input) -> dict[str, Any]:
    """What other processes are told of an input after a step: what they do not know. Instead of a record
    that they have, its place among those that they had. Of an input that does not come again, they are
    told no records."""
    kept, shared = _kept(input_), input_.shared
    news = {name: kept[name] for name in _FACTS if kept[name] is not shared.get(name, _UNKNOWN)}
    if input_.comes_again:
        for name in _RECORDS:
            places = {id(record): place for place, record in enumerate(shared.get(name, ()))}
            news[name] = [
                places[id(record)] if id(record) in places else record_state(record)
                for record in kept[name]
            ]
        input_.shared = kept
    return news


def hear_news(input_: Input, news: Mapping[str, Any]) -> None:
    """Take over what ``news_of`` gave in another process."""
    state = dict(news)
    for name in _RECORDS:
        if name in news:
            state[name] = [
                input_.shared[name][record] if isinstance(record, int) else record_of_state(record)
                for record in news[name]
            ]
    for name in _FACTS:
        setattr(input_, name, state.get(name, getattr(input_, name)))
    if input_.comes_again:
        input_.buffer.records, input_.stock = state["buffer"], state["stock"]
        input_.shared = _kept(input_)


def _is_plain(record: Record) -> bool:
    """Whether a file can hold the results of its tools; other records are left out."""
    return all(is_state(node.result) for node in record.tools.values())


def record_state(record: Record) -> dict[str, Any]:
    """A record, as tensors and JSON's values."""
    known = {
        name: [log_prob, *([scored.log_probs, scored.closing_log_probs] if scored else ())]
        for name, (log_prob, scored) in record.known.items()
    }
    tools = {
        name: [node.result, f"{type(node.error).__name__}: {node.error}" if node.error else None]
        for name, node in record.tools.items()
    }
    state = {field.name: getattr(record, field.name) for field in fields(record)}
    state["features"] = {name: read.cpu() for name, read in record.features.items()}
    return state | {"known": known, "tools": tools, "counts": sorted(record.counts)}


def record_of_state(state: Mapping[str, Any]) -> Record:
    """The record of which ``record_state`` gave this."""
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
