"""How fast a model's matrix products can be: what its forward passes are compared with."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SECONDS = 0.025  # of measuring one rate, about
# A processor is measured on parts of large matrices, and anything on fewer rows where one product
# would take more than this: rates have long levelled off there.
_CPU_PART = 1 << 22  # parameters
_MAX_FLOPS = {"cpu": 1 << 32}
_MAX_FLOPS_ELSEWHERE = 1 << 38
_MAX_OUTPUT_BYTES = 1 << 26


class Product(NamedTuple):
    """A matrix product, from (M, in) to (M, out)."""

    shape: tuple[int, int]  # (out, in)
    multiply: Callable[[Tensor], Tensor]


class Matrices:
    """The matrices that a model's forward pass multiplies by.

    Embeddings are looked up, not multiplied by. Left out are expert matrices (of a mixture, of
    which a token meets a few) and those of attention, which depend on the context's length.

    Args:
        model: a causal language model.
        output_layer: of it, which only some positions go through.
        packed: gives what has a ``product`` laid out for this machine: outside the output layer,
            and in it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        output_layer: torch.nn.Module,
        packed: Callable[[], Sequence[Sequence[Any]]] = lambda: ((), ()),
    ) -> None:
        self.output = _matrices_of(output_layer.modules())
        outputs = {id(module) for module in output_layer.modules()}
        self.body = _matrices_of(m for m in model.modules() if id(m) not in outputs)
        # Equal for models of the same shapes, dtypes and device.
        self.key = tuple((m.device, m.dtype, m.shape) for m in [*self.body, *self.output])
        self._packed = packed
        self._num = (sum(m.numel() for m in self.body), sum(m.numel() for m in self.output))

    def flops(self, positions: int, outputs: int) -> tuple[int, int]:
        """Of a forward pass: outside the output layer, and in it."""
        return 2 * self._num[0] * positions, 2 * self._num[1] * outputs

    def seconds(self, positions: int, outputs: int, passes: int) -> float | None:
        """What the products of so many forward passes take at the rate of ``gemm_rate``; None if
        there are none. ``positions``, and of them the ``outputs`` that go through the output layer,
        are those of all ``passes`` together."""
        parts = zip((self.body, self.output), (positions, outputs), self._packed(), strict=True)
        total = 0.0
        for flops, part in zip(self.flops(positions, outputs), parts, strict=True):
            if flops:
                matrices, rows, packed = part
                products = [layers.product for layers in packed]
                total += flops / gemm_rate(matrices, rows / passes, products)
        return total or None


def _matrices_of(modules: Iterable[torch.nn.Module]) -> list[Tensor]:
    multiplying = (m for m in modules if not isinstance(m, torch.nn.Embedding))
    parameters = dict.fromkeys(p for m in multiplying for p in m.parameters(recurse=False))
    return [p for p in parameters if p.dim() == 2 and p.is_floating_point()]


# The thread's own time, in which other programs have no part. (Windows counts it in long ticks.)
_cpu_clock = time.perf_counter if sys.platform == "win32" else time.thread_time

_rates: dict[tuple[Any, ...], float] = {}


def gemm_rate(matrices: Sequence[Tensor], rows: float, packed: Sequence[Product] = ()) -> float:
    """FLOP/s of ``F.linear`` on matrices, one after another, as a forward pass meets them.

    Measured when it is first asked for, in less than 0.1 s, and remembered. Launching the products
    one by one is not counted on CUDA, where a graph can do without.

    Args:
        matrices: not empty. Only those of the most common device and dtype are measured: an
            adapter in float32 on a model in bfloat16 is work of that model, and small.
        rows: of what they are multiplied with; the nearest power of two is taken.
        packed: the same, laid out for this machine: the faster of the two counts.
    """
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for matrix in matrices:
        sizes[matrix.device, matrix.dtype] += matrix.numel()
    device, dtype = sizes.most_common(1)[0][0]
    matrices = [m.detach() for m in matrices if (m.device, m.dtype) == (device, dtype)]
    shapes = tuple(m.shape for m in matrices)
    wanted = 2 ** max(0, round(math.log2(rows)))
    key = (device, dtype, torch.get_num_threads(), wanted, shapes, len(packed))
    if key not in _rates:
        if device.type == "cpu":
            matrices = [part for m in matrices for part in _equal_parts(m)]
        plain = [Product((len(m), m.shape[1]), partial(F.linear, weight=m)) for m in matrices]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            _rates[key] = max(
                _measure(products, _measured_rows(products, wanted, device, dtype), device, dtype)
                for products in (plain, packed)
                if products
            )
    return _rates[key]


def _equal_parts(matrix: Tensor) -> list[Tensor]:
    """All of a matrix, but for a few rows if its parts would differ."""
    num = -(-matrix.numel() // _CPU_PART)
    size = max(1, matrix.shape[0] // num)
    return [part for part in matrix.split(size) if len(part) == size]


def _measured_rows(
    products: Sequence[Product], rows: int, device: torch.device, dtype: torch.dtype
) -> int:
    """As many as are wanted, or the power of two that keeps each product within bounds."""
    most = _MAX_FLOPS.get(device.type, _MAX_FLOPS_ELSEWHERE)
    width, size = max(p.shape[0] for p in products), max(math.prod(p.shape) for p in products)
    bound = max(1, min(_MAX_OUTPUT_BYTES // (width * dtype.itemsize), most // (2 * size)))
    return min(rows, 1 << (bound.bit_length() - 1))


def _measure(
    products: Sequence[Product], rows: int, device: torch.device, dtype: torch.dtype
) -> float:
    """FLOP/s."""
    widths = {p.shape[1] for p in products}
    inputs = {n: torch.ones(rows, n, dtype=dtype, device=device) for n in widths}

    def multiply(some: Iterable[Product]) -> None:
        for product in some:
            product.multiply(inputs[product.shape[1]])

    multiply({p.shape: p for p in products}.values())  # whatever is done once a shape
    # The best of several, as whatever else the machine does can only slow it.
    best: dict[tuple[int, int], float] = {}
    began = time.perf_counter()
    if device.type == "cpu":
        # One by one, as all of them may take long. They come in the model's order, so that each
        # is read from memory.
        shapes = {p.shape for p in products}
        for product in itertools.cycle(products):
            start = _cpu_clock()
            multiply([product])
            seconds = _cpu_clock() - start
            best[product.shape] = min(seconds, best.get(product.shape, math.inf))
            if time.perf_counter() - began > _SECONDS and len(best) == len(shapes):
                break
        seconds = sum(best[p.shape] for p in products)
    else:
        whole = partial(multiply, products)
        run = _as_graph(whole, device) if device.type == "cuda" else whole
        seconds = math.inf
        while time.perf_counter() - began < _SECONDS or seconds == math.inf:
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            seconds = min(seconds, time.perf_counter() - start)
    return 2 * rows * sum(math.prod(p.shape) for p in products) / seconds


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
