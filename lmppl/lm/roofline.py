"""How fast a model's matrix products can be: what its forward passes are compared with."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

_SECONDS = 0.04  # of measuring one rate, about
_MAX_OUTPUT_BYTES = 1 << 26
# Of one product. Rates have long levelled off where a product takes so much.
_MAX_FLOPS = {"cpu": 1 << 34}
_MAX_FLOPS_ELSEWHERE = 1 << 38


class Matrices:
    """The matrices that a model's forward pass multiplies by.

    Embeddings are looked up, not multiplied by. Expert matrices (of a mixture, of which a token
    meets a few) are left out, as are those of attention, which depend on the context's length.

    Attributes:
        body: outside the output layer.
        output: of the output layer, which only some positions go through.
        key: equal for models of the same shapes, dtypes and device.
    """

    def __init__(self, model: torch.nn.Module, output_layer: torch.nn.Module) -> None:
        self.output = list(_matrices_of(output_layer.modules()))
        own = {id(module) for module in output_layer.modules()}
        self.body = list(_matrices_of(m for m in model.modules() if id(m) not in own))
        everything = [*self.body, *self.output]
        self.key = tuple((m.device, m.dtype, m.shape) for m in everything)
        self._num = (sum(m.numel() for m in self.body), sum(m.numel() for m in self.output))

    def flops(self, positions: int, outputs: int) -> tuple[int, int]:
        """Of a forward pass: outside the output layer, and in it."""
        return 2 * self._num[0] * positions, 2 * self._num[1] * outputs

    def seconds(self, positions: int, outputs: int, passes: int) -> float | None:
        """What the products of so many forward passes take at the rate of ``gemm_rate``.

        None if the model has no such matrices.

        Args:
            positions: in all passes together.
            outputs: of them, those that go through the output layer.
            passes: among which the positions are divided evenly.
        """
        total = 0.0
        for flops, matrices, rows in zip(
            self.flops(positions, outputs),
            (self.body, self.output),
            (positions, outputs),
            strict=True,
        ):
            if flops:
                total += flops / gemm_rate(matrices, rows / passes)
        return total or None


def _matrices_of(modules: Iterable[torch.nn.Module]) -> Iterator[torch.Tensor]:
    seen = set()
    for module in modules:
        if isinstance(module, torch.nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 2 and parameter.is_floating_point() and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


_rates: dict[tuple[Any, ...], float] = {}


def gemm_rate(matrices: Sequence[torch.Tensor], rows: float) -> float:
    """FLOP/s of ``F.linear`` on matrices, one after another, as a forward pass meets them.

    Measured when it is first asked for, in less than 0.1 s, and remembered by device, dtype, shapes,
    number of threads and rows. Launching the products one by one is not counted on CUDA, where a
    graph can do without.

    Args:
        matrices: not empty. Only those of the most common device and dtype are measured: an
            adapter in float32 on a model in bfloat16 is work of that model, and small.
        rows: of what they are multiplied with; the nearest power of two is taken.
    """
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for matrix in matrices:
        sizes[matrix.device, matrix.dtype] += matrix.numel()
    device, dtype = sizes.most_common(1)[0][0]
    matrices = [m for m in matrices if (m.device, m.dtype) == (device, dtype)]
    num_rows = 2 ** max(0, round(math.log2(rows)))
    most = _MAX_FLOPS.get(device.type, _MAX_FLOPS_ELSEWHERE)
    width, size = max(m.shape[0] for m in matrices), max(m.numel() for m in matrices)
    while num_rows > 1 and (
        num_rows * width * dtype.itemsize > _MAX_OUTPUT_BYTES or 2 * num_rows * size > most
    ):
        num_rows //= 2
    shapes = tuple(m.shape for m in matrices)
    key = (device, dtype, torch.get_num_threads(), num_rows, shapes)
    if key not in _rates:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            _rates[key] = _measure(matrices, num_rows)
    return _rates[key]


def _measure(matrices: Sequence[torch.Tensor], rows: int) -> float:
    device, dtype = matrices[0].device, matrices[0].dtype
    inputs = {
        n: torch.ones(rows, n, dtype=dtype, device=device) for n in {m.shape[1] for m in matrices}
    }

    def multiply() -> int:
        """All of them, or on a processor as many as there is time for. Returns the FLOPs."""
        began, flops = time.perf_counter(), 0
        for matrix in matrices:
            F.linear(inputs[matrix.shape[1]], matrix)
            flops += 2 * rows * matrix.numel()
            if device.type == "cpu" and time.perf_counter() - began > _SECONDS:
                break
        return flops

    for matrix in {m.shape: m for m in matrices}.values():
        F.linear(inputs[matrix.shape[1]], matrix)  # whatever is done once a shape
    run = _as_graph(multiply, device) if device.type == "cuda" else multiply
    best, began = 0.0, time.perf_counter()
    while not best or time.perf_counter() - began < _SECONDS:
        wait_for(device)
        start = time.perf_counter()
        flops = run()
        wait_for(device)
        # The best, as whatever else the machine does can only slow it.
        best = max(best, flops / (time.perf_counter() - start))
    return best


def _as_graph(multiply: Callable[[], int], device: torch.device) -> Callable[[], int]:
    """The same on CUDA, launched at once; as it is where that can't be."""
    try:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # capturing wants it to have run on another stream
                flops = multiply()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                multiply()
    except RuntimeError:
        return multiply

    def replay() -> int:
        graph.replay()
        return flops

    return replay


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
