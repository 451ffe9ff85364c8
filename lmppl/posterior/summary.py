"""What a table of a posterior shows, as plain values: a marginal a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.poutine import Trace

from lmppl.distributions import ToolResult
from lmppl.posterior.marginals import Joint, distinct, moments, rows
from lmppl.runtime.sites import (
    has_value,
    is_continuous,
    is_latent,
    is_output,
    is_tool,
    key_of,
    value_of,
)

_REMEDIES = {
    "exact": ["more draws (resample)"],  # its own weights are not doubted
    "importance": ["more samples (num_samples=)", 'method="smc"', "{guide}"],
    "smc": ["more samples (num_samples=)", 'a twist (twist="lookahead")', "{guide}"],
    "mcmc": ["more moves (num_samples=, thin=)", "better starts (initial=)", "{guide}"],
    "gflownet": ["more samples (num_samples=)", "more training of the guide (guide.fit)"],
}


def remedies(engine: str | None, has_guide: bool) -> list[str]:
    """What may help where the samples of an engine are too few to be trusted, the simplest first."""
    found = _REMEDIES.get(engine or "", ["more samples (num_samples=)"])
    guide = "a better guide" if has_guide else "a guide (guide=)"
    return [remedy.format(guide=guide) for remedy in found]


def summarise(
    traces: Sequence[Trace],
    weights: Sequence[float],
    names: Sequence[str],
    returns: Sequence[Any] | None = None,
    *,
    observed: bool = False,
) -> dict[str, Any]:
    """The marginals of some sites, and of what the program returned.

    Args:
        traces: the samples.
        weights: their normalised weights.
        names: the sites.
        returns: what the program returned in each sample; None: that is not asked for.
        observed: whether to show those of the sites that are neither latent nor computed, too.

    Returns:
        ``marginals`` (site to rows), ``numeric`` (site to moments), ``tools`` (the names of those among
        them that are results of tools), and ``returned`` (``{"rows": ...}``, ``{"numeric": ...}``, or
        None if it says nothing that a site does not say).
    """
    live = [i for i, weight in enumerate(weights) if weight > 0]
    traces, weights = [traces[i] for i in live], [weights[i] for i in live]
    returned = [None if returns is None else returns[i] for i in live]
    found: dict[str, Any] = {"marginals": {}, "numeric": {}, "tools": [], "returned": None}
    told = all(value is None for value in returned)
    for name in names:
        nodes = [t.nodes[name] if has_value(t, name) else None for t in traces]
        kind = next((node for node in nodes if node is not None), None)
        if kind is None:
            continue
        values = [None if node is None else value_of(node) for node in nodes]
        told = told or all(map(_is_same, values, returned))
        if not (is_latent(kind) or is_output(kind) or observed):
            continue
        if is_tool(kind):
            found["tools"].append(name)
        if _are_numbers(values) if is_output(kind) else is_number(nodes):
            found["numeric"][name] = moments(values, weights)
        else:
            found["marginals"][name] = rows(values, weights)
    if not told and live:
        numeric = _are_numbers(returned)
        of = (
            {"numeric": moments(returned, weights)}
            if numeric
            else {"rows": rows(returned, weights)}
        )
        found["returned"] = of
    return found


def is_number(nodes: Sequence[Any]) -> bool:
    """Whether a site, by its nodes (None where it is not reached), is continuous: its values don't
    repeat, its moments mean something."""
    return any(node is not None and is_continuous(node) for node in nodes)


def joint_rows(
    columns: Mapping[str, Sequence[Any]], weights: Sequence[float]
) -> list[dict[str, Any]]:
    """The distinct joint values of some sites: weight, and the values that there are by site."""
    ranked = distinct(list(columns.values()), weights)
    return [{"weight": weight, "values": _reached(list(columns), key)} for key, weight in ranked]


def _reached(names: Sequence[str], values: Joint) -> dict[str, Any]:
    plain = [str(value) if isinstance(value, str) else value for value in values]
    return {name: value for name, value in zip(names, plain, strict=True) if value is not None}


def _is_same(value: Any, returned: Any) -> bool:
    return value is returned or (value is not None and key_of(value) == key_of(returned))


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether the values that there are, at least one, are floating-point numbers or tensors."""
    kept = [value for value in values if value is not None]
    return bool(kept) and all(
        isinstance(value, float)
        or (torch.is_tensor(value) and value.is_floating_point())
        and not isinstance(value, ToolResult)
        for value in kept
    )
