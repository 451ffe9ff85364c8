"""How fast a model's matrix products can be: what its forward passes are compared with."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

_SECONDS = 0.04  # of measuring one rate, about
# A processor is measured on parts of large matrices, and anything on fewer rows where one product
# would take more than this: rates have long levelled off there.
_CPU_PART = 1 << 22  # parameters
_MAX_FLOPS = {"cpu": 1 << 32}
_MAX_FLOPS_ELSEWHERE = 1 << 38
_MAX_OUTPUT_BYTES = 1 << 26


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


# The thread's own time, in which other programs have no part. (Windows counts it in long ticks.)
_cpu_clock = time.perf_counter if sys.platform == "win32" else time.thread_time

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
    matrices = [m.detach() for m in matrices if (m.device, m.dtype) == (device, dtype)]
    if device.type == "cpu":
        matrices = [part for m in matrices for part in _equal_parts(m)]
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


def _equal_parts(matrix: torch.Tensor) -> list[torch.Tensor]:
    """All of a matrix, but for a few rows if its parts would differ."""
    num = -(-matrix.numel() // _CPU_PART)
    size = max(1, matrix.shape[0] // num)
    return [part for part in matrix.split(size) if len(part) == size]


def _measure(matrices: Sequence[torch.Tensor], rows: int) -> float:
    device, dtype = matrices[0].device, matrices[0].dtype
    inputs = {
        n: torch.ones(rows, n, dtype=dtype, device=device) for n in {m.shape[1] for m in matrices}
    }

    def multiply(some: Iterable[torch.Tensor]) -> None:
        for matrix in some:
            F.linear(inputs[matrix.shape[1]], matrix)

    multiply({m.shape: m for m in matrices}.values())  # whatever is done once a shape
    # The best of several, as whatever else the machine does can only slow it.
    best: dict[Any, float] = {}
    began = time.perf_counter()
    if device.type == "cpu":
        # One by one, as all of them may take long. They come in the model's order, so that each
        # is read from memory.
        shapes = {m.shape for m in matrices}
        for matrix in itertools.cycle(matrices):
            start = _cpu_clock()
            multiply([matrix])
            best[matrix.shape] = min(_cpu_clock() - start, best.get(matrix.shape, math.inf))
            if time.perf_counter() - began > _SECONDS and len(best) == len(shapes):
                break
        seconds = sum(best[m.shape] for m in matrices)
    else:
        whole = functools.partial(multiply, matrices)
        run = _as_graph(whole, device) if device.type == "cuda" else whole
        seconds = math.inf
        while time.perf_counter() - began < _SECONDS or seconds == math.inf:
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            seconds = min(seconds, time.perf_counter() - start)
    return 2 * rows * sum(m.numel() for m in matrices) / seconds


def _as_graph(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same on CUDA, launched at once; as it is where that can't be."""
    try:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # capturing wants it to have run on another stream
                run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
    except RuntimeError:
        return run
    return graph.replay


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
