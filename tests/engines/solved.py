"""A real language model that draws a text from its exact posterior, token by token."""

from __future__ import annotations

import math

import torch

from lmppl.lm import LM
from lmppl.testing import Enumeration, tiny_lm


def lm_that_draws(exact: Enumeration, prefix: str, lm: LM, site: str = "z") -> LM:
    """After ``prefix`` it continues with the posterior of ``site``: its output layer is solved for.

    There are fewer beginnings of a text than hidden dimensions, so any logits can be had.
    """
    mass: dict[tuple[int, ...], list[float]] = {}
    size = lm.vocabulary.size
    for trace in exact:
        ids = tuple(t for t in trace.data[site].tolist() if t >= 0)
        for n, token in enumerate(ids):
            row = mass.setdefault(ids[:n], [0.0] * size)
            row[token] += math.exp(trace.log_joint - exact.log_evidence)
    table = torch.tensor(list(mass.values()), dtype=torch.float64)
    # Beginnings without posterior are never drawn; tokens without, once in e^40 draws.
    logits = (table / table.sum(1, keepdim=True)).log().nan_to_num(nan=0.0).clamp_min(-40.0)

    def fresh() -> LM:
        tokens = lm.vocabulary.decode(range(size - 1))
        return tiny_lm(tokens, seed=9)

    start = lm.encode(prefix)
    states = fresh().hidden([(*start, *ids) for ids in mass]).double()
    assert len(states) <= states.shape[1] and logits.shape == (len(states), size)
    solved = fresh()
    with torch.no_grad():
        solved.model.lm_head.weight.copy_((torch.linalg.pinv(states) @ logits).T)
    return solved
