"""Parameters that are multiplied by, and the rate at which they can be."""

from __future__ import annotations

import pytest
import torch
from architectures import SIZE, make_model

from lmppl.lm.meter import roofline
from lmppl.lm.meter.roofline import gemm_rate
from lmppl.lm.network.linear import can_pack
from lmppl.lm.network.runner import Runner
from lmppl.testing.tiny import tiny_lm


def naive_flops(model, positions, outputs):
    """By the shapes that the model's layers are called with."""
    total = 0

    def count(layer, args, result):
        nonlocal total
        total += 2 * args[0].shape[-1] * result.numel()

    kinds = {"Linear", "Conv1D"}
    layers = [m for m in model.modules() if type(m).__name__ in kinds]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    model(torch.zeros(1, positions, dtype=torch.long), logits_to_keep=outputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_flops_are_those_of_the_linear_layers(name):
    model = make_model(name)
    matrices = Runner(model).matrices
    assert sum(matrices.flops(7, 3)) == naive_flops(model, 7, 3)
    assert matrices.flops(0, 2)[1] == 2 * 2 * SIZE * model.config.hidden_size


def test_an_adapter_has_its_own_matrices():
    lm = tiny_lm("ab.", seed=0)
    adapter = lm.adapter()
    base, adapted = lm.runner.matrices, adapter.runner.matrices
    trained = sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)
    assert adapted.flops(1, 0)[0] == base.flops(1, 0)[0] + 2 * trained
    assert adapter.sampler.runner.matrices.key == base.key != adapted.key


@pytest.fixture
def rates(monkeypatch):
    """Measured anew, and shortly."""
    monkeypatch.setattr(roofline, "_SECONDS", 0.001)
    monkeypatch.setattr(roofline, "_rates", rates := {})
    return rates


def test_rates_are_measured_once(rates, monkeypatch):
    matrices = [torch.ones(8, 16), torch.ones(16, 8), torch.ones(4, 4, dtype=torch.float64)]
    before = torch.get_rng_state()
    first = gemm_rate(matrices, 33)
    assert first > 0 and torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(roofline, "_measure", lambda *_: pytest.fail("measured again"))
    assert [gemm_rate(matrices, rows) for rows in (24, 32.0, 45)] == [first] * 3
    (key,) = rates
    assert key[:2] == (torch.device("cpu"), torch.float32) and 32 in key  # rows


def test_huge_products_are_not_measured_whole(rates, monkeypatch):
    monkeypatch.setattr(roofline, "_measure", lambda products, rows, *_: asked.append(rows) or 1.0)
    monkeypatch.setattr(roofline, "_CPU_PART", 30 * 8)
    asked = []
    gemm_rate([torch.ones(64, 8), torch.ones(6, 8)], 10)
    monkeypatch.setitem(roofline._MAX_FLOPS, "cpu", 2 * 21 * 8 * 16)
    gemm_rate([torch.ones(64, 8)], 100_000)
    monkeypatch.setattr(roofline, "_MAX_OUTPUT_BYTES", 4 * 21 * 7)
    rates.clear()
    gemm_rate([torch.ones(64, 8)], 100_000)
    gemm_rate([torch.ones(64, 8)], 0.3)
    assert asked == [8, 16, 4, 1]


def test_large_matrices_are_measured_in_parts(monkeypatch):
    monkeypatch.setattr(roofline, "_CPU_PART", 30 * 8)
    sizes = [len(part) for m in (64, 6) for part in roofline._equal_parts(torch.ones(m, 8))]
    assert sizes == [21, 21, 21, 6]


def test_the_faster_of_plain_and_packed_products_counts(rates, monkeypatch):
    packed = [roofline.Product((8, 8), torch.relu)]
    monkeypatch.setattr(
        roofline, "_measure", lambda products, *_: 2.0 if products is packed else 1.0
    )
    assert [gemm_rate([torch.ones(8, 8)], 4, given) for given in ([], packed)] == [1.0, 2.0]


@pytest.mark.skipif(not can_pack(torch.nn.Linear(4, 4).requires_grad_(False)), reason="no kernels")
def test_packed_products_are_those_of_the_model(rates):
    lm = tiny_lm("ab.", seed=0)
    lm.model.requires_grad_(False)
    runner = lm.runner
    assert runner.fast
    body, output = runner._packed()
    size = sum(rows * columns for rows, columns in (p.product.shape for p in body))
    assert 2 * size == runner.matrices.flops(1, 0)[0] and len(output) == 1
    assert runner.matrices.seconds(8, 4, 2) > 0
    assert {key[-1] for key in rates} == {len(body), 1}
    assert lm.adapter().runner._packed()[0] == []


def test_seconds_are_those_of_the_average_pass(rates, monkeypatch):
    asked = []

    def rate(matrices, rows, packed):
        asked.append(rows)
        return 1e3

    monkeypatch.setattr(roofline, "gemm_rate", rate)
    matrices = tiny_lm("ab.", seed=0).runner.matrices
    assert matrices.seconds(60, 12, 4) == pytest.approx(sum(matrices.flops(60, 12)) / 1e3)
    assert asked == [15, 3]
    assert matrices.seconds(0, 0, 4) is None
