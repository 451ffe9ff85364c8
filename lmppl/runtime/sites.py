"""What the sites of a trace are to a reader: which have a value, and what it looks like."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import site_is_factor, site_is_subsample

from lmppl.distributions import LMText, ToolCall, ToolResult
from lmppl.lm.tokens.text import Text


def has_value(trace: Trace, name: str) -> bool:
    """Whether a trace has a random variable of this name (no factor, no plate, no parameter)."""
    node = trace.nodes.get(name)
    return (
        node is not None
        and node["type"] == "sample"
        and node["value"] is not None
        and not site_is_subsample(node)
        and not site_is_factor(node)
    )


def is_latent(node: Mapping[str, Any]) -> bool:
    """Whether a sample site is a random choice to be inferred: no data, tool or subsample."""
    if node["is_observed"]:
        return False
    fn = node["fn"]  # the commonest first: Pyro's metaclass is slow to say what is none of its own
    return type(fn) is LMText or not isinstance(fn, ToolCall | _Subsample)


def is_tool(node: Mapping[str, Any]) -> bool:
    """Whether a sample site is the result of a tool."""
    return isinstance(node["fn"], ToolCall)


def is_output(node: Mapping[str, Any]) -> bool:
    """Whether a sample site is what the program computed: a tool's result, or ``pyro.deterministic``."""
    return is_tool(node) or bool(node["infer"].get("_deterministic"))


def is_text(fn: Any) -> bool:
    """Whether a distribution is that of one text. (A batch of texts serves itself.)"""
    return isinstance(fn, LMText) and not fn.batch_shape


def latents_of(trace: Trace) -> dict[str, Any]:
    """The latent sites of a trace, by name."""
    nodes = trace.nodes.items()
    return {name: node for name, node in nodes if node["type"] == "sample" and is_latent(node)}


def is_observation(node: Mapping[str, Any]) -> bool:
    """Whether a sample site is data: observed, and no factor, tool or deterministic value."""
    return node["is_observed"] and not site_is_factor(node) and not is_output(node)


def is_continuous(node: Mapping[str, Any]) -> bool:
    """Whether the values of a site hardly ever repeat."""
    if isinstance(node["value"], ToolResult) or not torch.is_floating_point(node["value"]):
        return False
    try:
        return not node["fn"].support.is_discrete  # a Bernoulli's values are floating-point, too
    except (AttributeError, NotImplementedError):
        return True


def value_of(node: Mapping[str, Any]) -> Any:
    """A site's value as the program saw it: ``Text``, a tool's result, or a tensor."""
    value = node["value"]
    if isinstance(value, ToolResult):
        return value.result
    text = getattr(node["fn"], "text", None)  # that of LMText
    return value if text is None or value.dim() != 1 else text(value)


def values_of(trace: Trace) -> dict[str, Any]:
    """The values of all sites of a trace."""
    return {name: value_of(trace.nodes[name]) for name in trace.nodes if has_value(trace, name)}


def key_of(value: Any) -> Hashable:
    """Equal for values that count as one: texts by their string, tensors by their numbers."""
    if isinstance(value, torch.Tensor):
        return _frozen(value.tolist())
    try:
        hash(value)
    except TypeError:  # a tool may return anything
        return repr(without_tokens(value))
    return value


def without_tokens(value: Any) -> Any:
    """A value with a plain ``str`` for every ``Text`` in it, or in the containers that it is made of."""
    if isinstance(value, Text):
        return str(value)
    if type(value) is dict:
        return {without_tokens(key): without_tokens(part) for key, part in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(without_tokens, value))
    return value


def _frozen(value: Any) -> Hashable:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
