"""The output layer: from a model's last hidden states to log-probabilities.

A vocabulary is wide, so logits are made for the positions that are asked for only, a bounded number
at a time, and in training they are made, used and dropped before the backward pass begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmppl.lm.network.linear import PackedLinear, PackedProduct, can_pack, packable_layers
from lmppl.lm.network.modules import clone, plain_logits, recomputed

# Logits (float32) that are held at a time. On a CPU, buffers of this size are used again, where
# larger ones come fresh from the system at every use, which costs more than the softmax.
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
        self._positions: Tensor | None = None  # of the flattened (B * T), None for all
        self._states: Tensor | None = None
        self._transparent = False
        self.opaque = False  # see OutputLayer

    @property
    def weight(self) -> Any:
        return self.layer.weight

    @property
    def size(self) -> int:
        """Width of the logits, V."""
        return int(self.weight.shape[0])

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to (0, V), which costs nothing; if opaque, to the (N, V) asked for."""
        if self._transparent:
            return self.layer(hidden)
        # As a contiguous matrix: with three dimensions, and weights that need no gradient, a
        # product with the output layer may copy its weights once a row.
        states = hidden.reshape(-1, hidden.shape[-1])
        if self._positions is not None:
            states = states.index_select(0, self._positions)
        self._states = states = states.contiguous()
        return self.layer(states) if self.opaque else hidden.new_zeros(0, self.size)

    @contextmanager
    def asking_for(self, positions: Tensor | None) -> Iterator[None]:
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

    def take(self) -> Tensor:
        """(N, hidden): what the last pass has kept."""
        states, self._states = self._states, None
        assert states is not None
        return states


class _HandOn(nn.Module):
    """Stands for all of a model below its output layer: its states are those that it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


class OutputLayer:
    """From states to logits, with whatever a model does to its logits (scaling, soft-capping).

    A pass ends with states, of which logits are made when they are wanted. Where that does not give
    what the model itself gives (``check``), the layer is *opaque*: a pass ends with the logits, and
    they stand for the states. ``packed`` is what logits are computed by, if it is packed.
    """

    def __init__(self, model: Any, head: OutputHead) -> None:
        self._model = model
        self._head = head
        self._rest: Any = None
        self._is_plain = False  # whether logits are the layer's product alone
        self._logits: Callable[[Tensor], Tensor] = head.layer
        self.packed: PackedLinear | None = None

    def check(self, tokens: Tensor) -> None:
        """Find out how to get logits, by comparison with the model's own after ``tokens`` (1, T)."""
        with self._head.as_it_is():
            want = plain_logits(self._model, tokens)[0]
        with self._head.asking_for(None):
            plain_logits(self._model, tokens)
        states = self._head.take()
        layer = self._head.layer
        self._is_plain = torch.equal(layer(states), want)
        if self._is_plain:
            if can_pack(layer) and layer in packable_layers(layer).values():
                packed = PackedLinear(PackedProduct([layer]), 0)
                if _close(packed(states), want):
                    self._logits = self.packed = packed
            return
        self._logits = self._through_model
        self._rest = clone(self._model)
        setattr(self._rest, self._rest.base_model_prefix, _HandOn())
        self._rest.set_output_embeddings(self._head)
        try:
            self._head.opaque = not _close(self._through_model(states), want)
        except Exception:  # whatever the model's code raises
            self._head.opaque = True

    def __call__(self, states: Tensor) -> Tensor:
        """(N, hidden) to (N, V), of the model's dtype. Differentiable."""
        return states if self._head.opaque else self._logits(states)

    def _through_model(self, states: Tensor) -> Tensor:
        with self._head.as_it_is():
            out = self._rest(inputs_embeds=states.unsqueeze(0), use_cache=False, return_dict=True)
        return out.logits[0]

    def log_probs(
        self,
        states: Tensor,
        picks: Tensor,
        temperatures: Tensor | None,
        masks: PackedMasks | None = None,
    ) -> Tensor:
        """The log-probabilities of some tokens at each state. Differentiable.

        Args:
            states: (N, hidden).
            picks: (N, K) tokens.
            temperatures: (N,) float32; None: all are 1.
            masks: of N states, the tokens over which each distribution is renormalised; None: all.

        Returns:
            (N, K) float32, in nats.
        """
        layer = self._head.layer
        simple = self._is_plain and type(layer) is nn.Linear and not layer.weight.requires_grad
        if simple and states.requires_grad:
            return _FrozenLogProbs.apply(states, picks, temperatures, layer.weight, self, masks)

        def some(part: slice) -> Tensor:
            return self.all_log_probs(states, temperatures, part, masks).gather(1, picks[part])

        run = functools.partial(recomputed, some) if states.requires_grad else some
        return torch.cat([run(part) for part in self.chunks(states)])

    def chunks(self, states: Tensor) -> Iterator[slice]:
        """Some states at a time."""
        step = chunk_rows(self._head.size, states.device)
        return (slice(at, at + step) for at in range(0, len(states), step))

    def all_log_probs(
        self,
        states: Tensor,
        temperatures: Tensor | None,
        part: slice,
        masks: PackedMasks | None = None,
    ) -> Tensor:
        """Of every token at some of the states: (n, V) float32."""
        logits = self(states[part]).float()  # softmax with dtype= is 6 times slower
        if temperatures is not None:
            logits = logits / temperatures[part].unsqueeze(-1)
        if masks is not None:
            logits = logits.masked_fill(~masks[part].to(logits.device), -torch.inf)
        return torch.log_softmax(logits, -1)


@dataclass(frozen=True, eq=False)
class PackedMasks:
    """Masks over a vocabulary of ``size`` tokens, a bit a token: (N, ceil(V / 8)) uint8."""

    bits: Tensor
    size: int

    @staticmethod
    def of(masks: Tensor) -> PackedMasks:
        """From (N, V) bool."""
        packed = np.packbits(masks.numpy(), axis=1, bitorder="little")
        return PackedMasks(torch.from_numpy(packed), masks.shape[1])

    def __getitem__(self, part: slice) -> Tensor:
        """Some of them, (n, V) bool."""
        unpacked = np.unpackbits(self.bits[part].numpy(), axis=1, bitorder="little")
        return torch.from_numpy(unpacked[:, : self.size]).bool()


class _FrozenLogProbs(torch.autograd.Function):
    """log softmax(W h + b)[picks] with W and b frozen.

    Its gradient is that of h alone, sum_k g_k (W[pick_k] - E_p[W]), and the expected row of W under
    the softmax is computed with the log-probabilities: logits are made once, and none are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        picks: Tensor,
        temperatures: Tensor | None,
        weight: Tensor,
        output: OutputLayer,
        masks: PackedMasks | None,
    ) -> Tensor:
        found, means = [], []
        for part in output.chunks(states):
            log_probs = output.all_log_probs(states.detach(), temperatures, part, masks)
            found.append(log_probs.gather(1, picks[part]))
            means.append(log_probs.exp_().to(weight.dtype) @ weight)
        ctx.save_for_backward(torch.cat(means), picks, temperatures, weight)
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        means, picks, temperatures, weight = ctx.saved_tensors
        if temperatures is not None:
            grad = grad / temperatures.unsqueeze(-1)
        rows = F.embedding(picks, weight)  # (N, K, hidden)
        gradient = (grad.unsqueeze(-1) * rows.float()).sum(1)
        gradient = gradient - grad.sum(1, keepdim=True) * means.float()
        return gradient.to(means.dtype), None, None, None, None, None


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else 0.02
    if one.shape != other.shape or not torch.isfinite(other).all():
        return one.shape == other.shape  # who draws from logits that are not finite reports them
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
