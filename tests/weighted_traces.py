"""Traces and posteriors made by hand."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace

from lmppl import Posterior
from lmppl.distributions import ToolCall, ToolResult


class Words(dist.Categorical):
    """A distribution over token rows with a ``text`` method, as ``LMText`` has."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        super().__init__(torch.ones(len(texts)))

    def text(self, value: torch.Tensor) -> str:
        return self.texts[int(value[0])]


def trace_of(**sites: Any) -> Trace:
    """A trace: a str makes an LM site, a number a Normal one, a tuple is (fn, value, observed)."""
    trace = Trace()
    for name, given_value in sites.items():
        observed = False
        if isinstance(given_value, str):
            fn, value = Words([given_value]), torch.tensor([0, -1])
        elif isinstance(given_value, ToolResult):
            fn, value = ToolCall(lambda: None, (), "raise"), given_value
        elif isinstance(given_value, tuple):
            fn, value, observed = given_value
        else:
            fn, value = dist.Normal(0.0, 1.0), torch.as_tensor(given_value)
        trace.add_node(
            name, name=name, type="sample", fn=fn, value=value, is_observed=observed, infer={}
        )
    return trace


def posterior_of(texts: list[str], weights: list[float], **kwargs: Any) -> Posterior:
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    return Posterior([trace_of(z=text) for text in texts], log_weights, list(texts), **kwargs)


CHAINS = {
    "engine": "mcmc",
    "ess": 312.4,
    "chain": [(0, 0), (0, 1), (1, 0), (1, 1)],
    "chains": {
        "num_chains": 2,
        "num_draws": 2,
        "acceptance": {"z": 0.312, "kind": 0.5},
        "diagnostics": {
            "log joint": {"r_hat": 1.0041, "ess_bulk": 1312.4, "ess_tail": 290.2},
            "length of z": {"r_hat": 1.2, "ess_bulk": 31.0, "ess_tail": None},
        },
    },
}
"""What a posterior by Markov chains has in its ``info``; they disagree on a length."""
