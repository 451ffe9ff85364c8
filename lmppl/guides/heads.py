"""Guides for latent sites that are not text: small networks on the language model's state.

The guide of such a site is the model's own family of distributions with moved parameters. The
move, in unconstrained space, is read off the frozen LM's hidden state after the texts so far, and
starts at zero, so that an untrained guide is the prior.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import nn
from torch.distributions import biject_to, constraints

_WIDTH = 64


class Head(nn.Module):
    """From features (N, num_features) to moves of unconstrained parameters (N, num_moves).

    The features are ``num_numbers`` numbers, of any size, which are not to drown the state of a
    language model that follows, nor be drowned by it.
    """

    def __init__(self, num_features: int, num_moves: int, num_numbers: int = 0) -> None:
        super().__init__()
        self.sizes = num_features, num_moves, num_numbers
        self.norm = nn.LayerNorm(num_features - num_numbers)
        self.hidden = nn.Linear(num_features, _WIDTH)
        self.out = nn.Linear(_WIDTH, num_moves)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        numbers, state = features.tensor_split([self.sizes[2]], -1)
        read = torch.cat([numbers.asinh(), self.norm(state)], -1)
        return self.out(torch.tanh(self.hidden(read)))


def make_head(heads: nn.ModuleDict, key: str, sizes: tuple[int, int, int]) -> Head:
    """The head of that key, which has the same first weights in every process."""
    if key not in heads:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(key.encode()))
            heads[key] = Head(*sizes)
    head: Any = heads[key]
    return head


def head_for(heads: nn.ModuleDict, names: list[str], sizes: tuple[int, int, int]) -> Head:
    """The head of the first of some sites, after the others; made when it is first met. Raises
    ``ValueError`` if ``sizes``, which are ``Head``'s, are not those that it was made with."""
    # The name of a module has no dots, and is no attribute of modules.
    escaped = [name.replace("_", "__").replace(".", "_d").replace("-", "_h") for name in names]
    key = "-".join(["head", *escaped])
    head = make_head(heads, key, sizes)
    if head.sizes[:2] != sizes[:2]:
        raise ValueError(
            f"site '{names[0]}': its guide was made for {head.sizes[0]} features and {head.sizes[1]} "
            f"parameters, and now there are {sizes[0]} and {sizes[1]}: a latent site must keep its "
            "shape and the latents before it on every run"
        )
    return head


_known_moves: dict[Any, int | None] = {}  # to find it takes as long as the draw


def num_moves(fn: Any) -> int | None:
    """How many unconstrained parameters a distribution has; None where the head cannot move it."""
    kind = _kind(fn)
    if kind in _known_moves:
        return _known_moves[kind]
    base, found = _base(fn)[0], None
    with suppress(NotImplementedError, AttributeError, TypeError, ValueError):
        num = sum(value.numel() for value in _unconstrained(base).values())
        # Some families are not made from their arg_constraints alone; of some (Uniform) the
        # parameters are the ends of the support.
        if num and _same(base.support, moved(base, torch.ones(num)).support):
            found = num
    if kind is not None:
        _known_moves[kind] = found
    return found


def _kind(fn: Any) -> tuple[Any, ...] | None:
    """Equal for distributions that differ in nothing but values of parameters; None if unknown."""
    kind: list[Any] = [type(fn)]
    for name, value in vars(fn).items():
        if isinstance(value, torch.Tensor) and (name[0] == "_" or name in fn.arg_constraints):
            value = value.shape
        elif isinstance(value, torch.distributions.Distribution):
            value = _kind(value) or fn
        if value is not None and not isinstance(value, (int, float, str, tuple)):
            return None
        kind.append((name, value))
    return tuple(kind)


def _same(one: Any, two: Any) -> bool:
    """Whether two constraints hold of the same values."""
    if isinstance(one, constraints.Constraint):
        return type(one) is type(two) and _same(vars(one), vars(two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return torch.equal(one, two) if torch.is_tensor(one) else bool(one == two)


def moved(fn: Any, moves: torch.Tensor) -> TorchDistributionMixin:
    """``fn`` with its unconstrained parameters moved by ``moves``, (num_moves,). Differentiable."""
    base, event_dims = _base(fn)
    parameters = {name: getattr(base, name) for name in _parameter_names(base)}
    at = 0
    for name, value in _unconstrained(base).items():
        move = moves[at : at + value.numel()].reshape(value.shape).to(value)
        parameters[name] = biject_to(base.arg_constraints[name])(value + move)
        at += value.numel()
    new = type(base)(**parameters, validate_args=False)
    return new.to_event(event_dims) if event_dims else new


def _base(fn: Any) -> tuple[Any, int]:
    event_dims = 0
    while hasattr(fn, "reinterpreted_batch_ndims"):
        event_dims += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return fn, event_dims


def _parameter_names(fn: Any) -> list[str]:
    names = list(fn.arg_constraints)
    return [n for n in names if n != "probs"] if "logits" in names else names


def _unconstrained(fn: Any) -> dict[str, torch.Tensor]:
    unconstrained = {}
    for name in _parameter_names(fn):
        constraint = fn.arg_constraints[name]
        if constraint.is_discrete:
            continue  # it says what the values are, such as a number of trials
        if constraints.is_dependent(constraint):
            raise NotImplementedError  # on other parameters, as may the support (Uniform)
        unconstrained[name] = biject_to(constraint).inv(getattr(fn, name)).detach()
    return unconstrained
