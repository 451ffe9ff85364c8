"""The output layer: from a model's last hidden states to log-probabilities.

A vocabulary is wide, so logits are made for the positions that are asked for only, a bounded number
at a time, and in training they are made, used and dropped before the backward pass begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from lmppl.lm.network.linear import PackedLinear, can_pack, pack, packable_layers
from lmppl.lm.network.modules import clone, plain_logits

# Logits (float32) that are held at a time. On a CPU, buffers of this size are used again and again,
# where larger ones come fresh from the system at every use, which costs more than the softmax.
_CPU_CHUNK_BYTES = 16 << 20
_CHUNK_BYTES = 512 << 20


def chunk_rows(size: int, device: torch.device) -> int:
    """How many rows of ``size`` logits are made at a time."""
    limit = _CPU_CHUNK_BYTES if device.type == "cpu" else _CHUNK_BYTES
    return max(1, limit // (4 * size))


class OutputHead(nn.Module):
    """Stands in a model for its output layer, and keeps what would have entered it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._positions: torch.Tensor | None = None  # of the flattened (B * T), None for all
        self._states: torch.Tensor | None = None
        self._transparent = False
        self.opaque = False  # see OutputLayer

    @property
    def weight(self) -> Any:
        return self.layer.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden) to (0, V), so that what the model does with logits costs nothing; to the
        (N, V) that are asked for if they can't be had later."""
        if self._transparent:
            return self.layer(hidden)
        # As a contiguous matrix: with three dimensions, and weights that need no gradient, a
        # product with the output layer may copy its weights once a row.
        states = hidden.reshape(-1, hidden.shape[-1])
        if self._positions is not None:
            states = states.index_select(0, self._positions)
        self._states = states = states.contiguous()
        return self.layer(states) if self.opaque else hidden.new_zeros(0, self.weight.shape[0])

    @contextmanager
    def asking_for(self, positions: torch.Tensor | None) -> Iterator[None]:
        """Passes inside keep the states at these positions of the flattened batch; None: all."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Passes inside compute all their logits."""
        self._transparent = True
        try:
            yield
        finally:
            self._transparent = False

    def take(self) -> torch.Tensor:
        """(N, hidden): what the last pass has kept."""
        states, self._states = self._states, None
        assert states is not None
        return states


class _HandOn(nn.Module):
    """Stands for all of a model below its output layer: its states are those that it is given."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


class OutputLayer:
    """From states to logits, with whatever a model does to its logits (scaling, soft-capping).

    A pass ends with states, and this makes logits of those that are wanted, when they are wanted.
    Where that does not give what the model itself gives (``check``), the output layer is *opaque*:
    a pass ends with the logits, and they stand for the states.

    Args:
        model: a causal LM of transformers whose output layer is ``head``; not changed.
        head: its stand-in.
    """

    def __init__(self, model: Any, head: OutputHead) -> None:
        self._model = model
        self._head = head
        self._rest: Any = None
        self._is_plain = False
        self._packed: PackedLinear | None = None

    @property
    def size(self) -> int:
        return int(self._head.weight.shape[0])

    @property
    def packed(self) -> PackedLinear | None:
        """What logits are computed by, if it is packed."""
        return self._packed

    def check(self, tokens: torch.Tensor) -> None:
        """Find out how to get logits, by comparison with the model's own after ``tokens`` (1, T)."""
        with self._head.as_it_is():
            want = plain_logits(self._model, tokens)[0]
        with self._head.asking_for(None):
            plain_logits(self._model, tokens)
        states = self._head.take()
        layer = self._head.layer
        self._is_plain = torch.equal(layer(states), want)
        if self._is_plain:
            holder = nn.ModuleDict({"layer": layer})
            if can_pack(holder) and packable_layers(holder).keys() == {"layer"}:
                pack(holder, [["layer"]])
                packed = holder["layer"]
                assert isinstance(packed, PackedLinear)
                self._packed = packed if _close(packed(states), want) else None
            return
        self._rest = clone(self._model)
        setattr(self._rest, self._rest.base_model_prefix, _HandOn())
        self._rest.set_output_embeddings(self._head)
        try:
            self._head.opaque = not _close(self._through_model(states), want)
        except Exception:  # whatever the model's code raises
            self._head.opaque = True

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(N, hidden) to (N, V), of the model's dtype. Differentiable."""
        if self._head.opaque:
            return states
        if not self._is_plain:
            return self._through_model(states)
        if self._packed is not None:
            return self._packed(states)
        return self._head.layer(states)

    def _through_model(self, states: torch.Tensor) -> torch.Tensor:
        with self._head.as_it_is():
            out = self._rest(inputs_embeds=states.unsqueeze(0), use_cache=False, return_dict=True)
        return out.logits[0]

    def log_probs(
        self, states: torch.Tensor, picks: torch.Tensor, temperatures: torch.Tensor | None
    ) -> torch.Tensor:
        """The log-probabilities of some tokens at each state. Differentiable.

        Args:
            states: (N, hidden).
            picks: (N, K) tokens.
            temperatures: (N,) float32; None: all are 1.

        Returns:
            (N, K) float32, in nats.
        """
        if not states.requires_grad:
            parts = self._chunks(states, picks, temperatures)
            return torch.cat([self._some_log_probs(*part) for part in parts])
        layer = self._head.layer
        if self._is_plain and type(layer) is nn.Linear and not layer.weight.requires_grad:
            return _FrozenLogProbs.apply(
                states, picks, temperatures, layer.weight, layer.bias, self
            )
        return torch.cat(
            [
                checkpoint(
                    self._some_log_probs, *part, use_reentrant=False, preserve_rng_state=False
                )
                for part in self._chunks(states, picks, temperatures)
            ]
        )

    def _chunks(
        self, states: torch.Tensor, picks: torch.Tensor, temperatures: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        step = chunk_rows(self.size, states.device)
        for at in range(0, len(states), step):
            part = slice(at, at + step)
            yield states[part], picks[part], None if temperatures is None else temperatures[part]

    def _some_log_probs(
        self, states: torch.Tensor, picks: torch.Tensor, temperatures: torch.Tensor | None
    ) -> torch.Tensor:
        logits = self(states).float()  # first to float32: softmax with dtype= is 6 times slower
        if temperatures is not None:
            logits = logits / temperatures.unsqueeze(-1)
        return torch.log_softmax(logits, -1).gather(1, picks)


class _FrozenLogProbs(torch.autograd.Function):
    """log softmax(W h + b)[picks] with W and b frozen.

    Its gradient is that of h alone, sum_k g_k (W[pick_k] - E_p[W]), and the expected row of W under
    the softmax is computed with the log-probabilities: logits are made once, and none are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        picks: torch.Tensor,
        temperatures: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        output: OutputLayer,
    ) -> torch.Tensor:
        found, means = [], []
        for some, tokens, heat in output._chunks(states.detach(), picks, temperatures):
            logits = output(some).float()
            if heat is not None:
                logits = logits / heat.unsqueeze(-1)
            log_probs = torch.log_softmax(logits, -1)
            found.append(log_probs.gather(1, tokens))
            means.append(log_probs.exp_().to(weight.dtype) @ weight)
        ctx.save_for_backward(torch.cat(means), picks, temperatures, weight)
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        means, picks, temperatures, weight = ctx.saved_tensors
        if temperatures is not None:
            grad = grad / temperatures.unsqueeze(-1)
        rows = F.embedding(picks, weight)  # (N, K, hidden)
        gradient = (grad.unsqueeze(-1) * rows.float()).sum(1)
        gradient = gradient - grad.sum(1, keepdim=True) * means.float()
        return gradient.to(means.dtype), None, None, None, None, None


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else 0.02
    if one.shape != other.shape:
        return False
    # Logits that are not finite are reported by whoever draws from them.
    valid = bool(torch.isfinite(other).all())
    return not valid or bool((one - other).abs().max() <= tolerance * other.abs().max())
