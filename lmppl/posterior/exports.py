"""Posteriors for other libraries: a pandas data frame, and what ArviZ works on."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine import Trace

from lmppl.distributions import ToolResult
from lmppl.runtime.sites import has_value, is_latent, is_observation, is_output, key_of, value_of

Chain = Sequence[tuple[int, int]]
"""Of each sample of Markov chains, the chain and the draw."""


def need(module: str, package: str, extra: str, what: str) -> Any:
    """An optional library. Raises ``ImportError``, which says how it is installed, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install 'lmppl-pyro[{extra}]'") from error


def to_dataframe(
    traces: Sequence[Trace],
    weights: torch.Tensor,
    log_weights: torch.Tensor,
    chain: Chain | None,
    returns: Sequence[Any] | None,
) -> Any:
    """The data frame of ``Posterior.to_dataframe``; ``returns``: None to leave them out."""
    pandas = need("pandas", "pandas", "pandas", "to_dataframe()")
    names = _names(traces)
    columns: dict[str, Any] = {}

    def add(name: str, values: Any) -> None:
        columns[_free(name, names)] = values

    if chain is not None:
        add("chain", [pair[0] for pair in chain])
        add("draw", [pair[1] for pair in chain])
    add("weight", weights.numpy())
    add("log_weight", log_weights.numpy())
    for name in names:
        columns[name] = [_cell(value) for value in _column(traces, name)]
    if returns is not None:
        add("returned", [_cell(value) for value in returns])
    return pandas.DataFrame(columns)


def to_arviz(
    traces: Sequence[Trace],
    weights: torch.Tensor | None,
    chain: Chain | None,
    attributes: Mapping[str, Any],
) -> Any:
    """The ``DataTree`` of ``Posterior.to_arviz``.

    Args:
        traces: of the samples, all of positive weight.
        weights: normalised, to be told; None: they are equal.
        chain: of Markov chains; None: all samples are one chain.
        attributes: of the whole tree.

    Raises:
        ValueError: if chains have different draws.
    """
    base = need("arviz_base", "arviz-base", "arviz", "to_arviz()")
    order, shape = _grid(chain, len(traces))
    traces = [traces[i] for i in order]
    groups: dict[str, dict[str, Any]] = {}

    def add(group: str, name: str, array: np.ndarray, sampled: bool = True) -> None:
        entries = groups.setdefault(group, {})
        free = _free(name.replace("/", "_"), [*entries, "chain", "draw"])
        entries[free] = array.reshape(shape + array.shape[1:]) if sampled else array

    for name in _names(traces):
        nodes = [trace.nodes[name] for trace in traces if has_value(trace, name)]
        if is_latent(nodes[0]) or is_output(nodes[0]):
            add("posterior", name, _array(_column(traces, name)))
        elif is_observation(nodes[0]) and len(nodes) == len(traces):
            values = [value_of(node) for node in nodes]
            if len(set(map(key_of, values))) == 1:
                add("observed_data", name, _array(values[:1]).reshape(_shape(values[0])), False)
            scores = [node.get("unscaled_log_prob") for node in nodes]
            if all(score is not None for score in scores):
                add("log_likelihood", name, _array(scores))
    if all(_is_scored(trace) for trace in traces):
        log_joint = [float(trace.log_prob_sum()) for trace in traces]
        add("sample_stats", "lp", np.array(log_joint))
    if weights is not None:
        add("sample_stats", "log_weight", weights[order].log().numpy())
    with warnings.catch_warnings():
        # ArviZ suspects that the two were mixed up where there are fewer draws than chains.
        warnings.filterwarnings(
            "ignore", "Found chain dimension to be longer than draw", UserWarning
        )
        return base.from_dict(groups, attrs={"/": dict(attributes)})


def _names(traces: Sequence[Trace]) -> list[str]:
    """The sites with a value, in their order."""
    names = (name for trace in traces for name in trace.nodes if has_value(trace, name))
    return list(dict.fromkeys(names))


def _free(name: str, taken: Sequence[str]) -> str:
    """A name that is not taken: underscores are added to it."""
    while name in taken:
        name += "_"
    return name


def _column(traces: Sequence[Trace], name: str) -> list[Any]:
    return [value_of(t.nodes[name]) if has_value(t, name) else None for t in traces]


def _is_scored(trace: Trace) -> bool:
    nodes = trace.nodes.values()
    return all("log_prob_sum" in node for node in nodes if node["type"] == "sample")


def _grid(chain: Chain | None, count: int) -> tuple[list[int], tuple[int, int]]:
    """The samples by chain and draw, and how many there are of both."""
    if chain is None:
        return list(range(count)), (1, count)
    order = sorted(range(count), key=lambda i: tuple(chain[i]))
    draws: dict[int, list[int]] = {}
    for i in order:
        draws.setdefault(chain[i][0], []).append(chain[i][1])
    first = next(iter(draws.values()))
    if any(of_chain != first for of_chain in draws.values()):
        lengths = {number: len(of_chain) for number, of_chain in draws.items()}
        raise ValueError(
            f"ArviZ takes chains with the same draws; info['chain'] has (chain: draws) {lengths}"
        )
    return order, (len(draws), len(first))


def _cell(value: Any) -> Any:
    """A value in a data frame: a string, a number, an array, or what it is."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, torch.Tensor) and not isinstance(value, ToolResult):
        return _numpy(value) if value.dim() else value.item()
    return value


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _array(values: Sequence[Any]) -> np.ndarray:
    """Values as (n, *shape): numbers and tensors of one shape as numbers, with NaN for None; all else as
    objects, texts as ``str``. (xarray makes NaN of None among objects.)"""
    present = [value for value in values if value is not None]
    are_numbers = all(isinstance(v, (bool, int, float, torch.Tensor)) for v in present)
    if present and are_numbers and len(set(map(_shape, present))) == 1:
        arrays = [np.asarray(_cell(value)) for value in present]
        if len(present) == len(values):
            return np.stack(arrays)
        filled = np.full((len(values), *arrays[0].shape), np.nan)
        filled[[i for i, value in enumerate(values) if value is not None]] = np.stack(arrays)
        return filled
    objects = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        objects[i] = _cell(value)
    return objects
