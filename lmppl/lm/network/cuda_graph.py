"""A decoding step whose shapes never change, so that CUDA can record it once and replay it.

A CUDA graph launches all kernels of a step at once. It reads and writes fixed memory, and nothing
in it may wait for the device, so positions are tensors there, all slots of the buffers are looked
at, and the mask hides those that are not filled.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmppl.lm.network.attention import BufferedCache
from lmppl.lm.network.runner import Runner


class StaticStep:
    """Appends one token to each row of ``cache``, whose buffers and groups must stay as they are,
    again and again. The rows have filled ``lengths`` slots."""

    def __init__(self, runner: Runner, cache: BufferedCache, lengths: Sequence[int]) -> None:
        self._runner, self._cache = runner, cache
        self._capacity = int(cache.suffix[0][0].shape[2])
        device = runner.device
        self._tokens = torch.zeros(len(lengths), 1, dtype=torch.long, device=device)
        self._starts = torch.tensor(list(lengths), device=device)
        self._graph: Any = None
        self._states: Tensor | None = None
        cache.prepare(device)

    def run(self, tokens: Tensor) -> Tensor:
        """States (B, hidden) after ``tokens`` (B,). They are overwritten by the next run."""
        self._tokens.copy_(tokens.unsqueeze(1))
        if self._graph is None and self._tokens.device.type == "cuda":
            self._graph = self._record()
        self._runner.count(self._tokens, None)
        if not self._graph:
            return self._compute()
        self._graph.replay()
        assert self._states is not None
        return self._states

    def move(self, lengths: Sequence[int]) -> None:
        """Other rows, of these lengths, stand in the same buffers."""
        self._starts.copy_(torch.tensor(list(lengths)))

    def _compute(self) -> Tensor:
        self._cache.begin_at(self._starts, self._capacity)
        states = self._runner.run_cached(self._tokens, self._cache, counted=False)
        self._starts.add_(1)
        return states

    def _record(self) -> Any:
        """The graph, or False if the model does something that can't be recorded."""
        device = self._tokens.device
        before = self._starts.clone()
        with torch.cuda.device(device):  # the model's, whichever is the current one
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # what is done once (handles, workspaces) comes first
                for _ in range(2):
                    self._compute()
                    self._starts.copy_(before)
            torch.cuda.current_stream(device).wait_stream(side)
            graph: Any = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=side):
                    self._states = self._compute()
            except RuntimeError as error:
                warnings.warn(
                    f"decoding runs without CUDA graphs, which launch a step at once: {error}",
                    stacklevel=2,
                )
                self._runner.can_record = False
                graph = False
            self._starts.copy_(before)
        return graph
