from __future__ import annotations

import pytest
import torch
from architectures import SIZE, make_model
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear

from lmppl.lm.batches.requests import Score
from lmppl.lm.network import adapter as network_adapter
from lmppl.lm.network.adapter import default_config
from lmppl.lm.network.modules import clone
from lmppl.testing.tiny import tiny_lm

REQUESTS = [Score((0, 1, 2) * 8, (0, 1, k, 2, 1)) for k in range(4)]


def log_probs(lm):
    return torch.stack([s.log_probs for s in lm.score(REQUESTS)])


def trainable(lm):
    return [p for p in lm.model.parameters() if p.requires_grad]


def perturb(lm, size=0.1):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainable(lm):
            p.add_(size * torch.randn(p.shape, generator=generator))


def state(lm):
    return {k: v.clone() for k, v in lm.model.state_dict().items()}


def assert_state(lm, expected):
    assert lm.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in lm.model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_clone_shares_tensors_and_nothing_else(name):
    model = make_model(name)
    copied = clone(model)
    assert type(copied) is type(model) and copied is not model
    assert [id(p) for p in copied.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in copied.buffers()] == [id(b) for b in model.buffers()]
    assert copied.config is not model.config
    assert not set(map(id, copied.modules())) & set(map(id, model.modules()))
    if name == "gpt2":  # tied
        assert copied.lm_head.weight is copied.transformer.wte.weight


def test_clone_with_other_parameters():
    model = make_model("gpt2")
    tied = model.lm_head.weight
    new = torch.nn.Parameter(tied.detach().clone())
    copied = clone(model, {tied: new})
    assert copied.lm_head.weight is copied.transformer.wte.weight is new
    others = [id(p) for p in model.parameters() if p is not tied]
    assert [id(p) for p in copied.parameters() if p is not new] == others
    assert model.lm_head.weight is tied


def test_what_is_done_to_the_base_later_reaches_its_adapters():
    base = tiny_lm("ab.")
    base.model.requires_grad_(False)
    adapter = base.adapter()
    log_probs(adapter), adapter.sample("ab", 2, max_tokens=2)
    with torch.no_grad():
        base.model.model.layers[0].self_attn.q_proj.weight.mul_(2.0)
    torch.testing.assert_close(log_probs(adapter), log_probs(base), atol=1e-4, rtol=0)
    base.model.bfloat16()
    frozen = {p.dtype for p in adapter.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_adapter_starts_as_the_base_and_leaves_it_alone():
    base = tiny_lm("ab.")
    model, before, scores = base.model, state(base), log_probs(base)
    flags = [p.requires_grad for p in model.parameters()]
    adapter = base.adapter()
    # Not to the bit: frozen weights are laid out for other kernels.
    torch.testing.assert_close(log_probs(adapter), scores, atol=1e-5, rtol=0)
    assert base.model is model and not isinstance(model, PeftModel)
    assert isinstance(adapter.model, PeftModel)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert adapter.usage is base.usage
    assert adapter.vocabulary is base.vocabulary
    assert adapter.name == base.name

    optimiser = torch.optim.SGD(trainable(adapter), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        loss = -sum(s.log_probs.sum() for s in adapter.score(REQUESTS, grad=True))
        loss.backward()
        optimiser.step()
        assert torch.equal(log_probs(base), scores)  # in turn with the adapter
    assert float((log_probs(adapter) - scores).abs().max()) > 0.1
    assert_state(base, before)
    assert all(p.grad is None for p in model.parameters())


def test_two_adapters_of_one_base():
    base = tiny_lm("ab.")
    one, two = base.adapter(), base.adapter()
    perturb(one)
    torch.testing.assert_close(log_probs(two), log_probs(base), atol=1e-5, rtol=0)
    assert not torch.allclose(log_probs(one), log_probs(base), atol=1e-2)
    pointers = {p.data_ptr() for p in base.model.parameters()}
    assert pointers <= {p.data_ptr() for p in one.model.parameters()}


def test_default_config():
    config = default_config(make_model("llama"))
    assert (config.r, config.lora_dropout, config.target_modules) == (16, 0.0, "all-linear")
    assert not config.fan_in_fan_out
    assert default_config(make_model("gpt2")).fan_in_fan_out


def test_adapts_every_linear_layer_but_the_head():
    adapter = tiny_lm("ab.").adapter()
    names = {n.split(".")[-4] for n, p in adapter.model.named_parameters() if p.requires_grad}
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names == layers


def test_own_config_is_used_and_not_changed():
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = tiny_lm("ab.").adapter(config)
    assert {min(p.shape) for p in trainable(adapter)} == {2}
    assert config.target_modules == {"q_proj"} or config.target_modules == ["q_proj"]
    assert config.base_model_name_or_path is None


def test_adapter_of_an_adapter():
    adapter = tiny_lm("ab.").adapter()
    with pytest.raises(TypeError, match="has an adapter already"):
        adapter.adapter()
    adapter.merged().adapter()


def test_adapter_is_float32_on_a_bfloat16_base():
    base = tiny_lm("ab.")
    base.model.bfloat16()
    adapter = base.adapter()
    assert {p.dtype for p in trainable(adapter)} == {torch.float32}
    assert {p.dtype for p in adapter.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    perturb(adapter)
    scored = adapter.score(REQUESTS, grad=True)
    assert scored[0].log_probs.dtype == torch.float32
    sum(s.log_probs.sum() for s in scored).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable(adapter))


@pytest.mark.parametrize("dora", [False, True])
def test_merged_equals_the_adapter(dora):
    base = tiny_lm("ab.")
    before = state(base)
    config = default_config(base.model)
    config.use_dora = dora
    adapter = base.adapter(config)
    perturb(adapter)
    adapter_before = state(adapter)
    sampler = adapter.merged()
    torch.testing.assert_close(log_probs(sampler), log_probs(adapter), atol=1e-4, rtol=0)
    assert not torch.allclose(log_probs(sampler), log_probs(base), atol=1e-2)
    assert_state(base, before)
    assert_state(adapter, adapter_before)
    assert not isinstance(sampler.model, PeftModel)
    assert type(sampler.model) is type(base.model)
    assert not any(p.requires_grad for p in sampler.model.parameters())
    assert sampler.usage is base.usage
    scores = log_probs(sampler)
    perturb(adapter)  # training goes on: the merged copy stays
    assert torch.equal(log_probs(sampler), scores)


def test_merged_shares_what_was_not_adapted():
    base = tiny_lm("ab.")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    sampler = base.adapter(config).merged()
    for (name, new), (_, old) in zip(
        sampler.model.named_parameters(), base.model.named_parameters(), strict=True
    ):
        assert (new.data_ptr() == old.data_ptr()) is ("q_proj" not in name), name


def test_merged_rounds_once():
    base = tiny_lm("ab.")
    base.model.bfloat16()
    adapter = base.adapter()
    perturb(adapter, 0.02)
    sampler = adapter.merged()
    for name, layer in adapter.model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            want = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
            got = sampler.model.get_submodule(name).weight
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, want.bfloat16())


def test_no_more_than_one_layer_is_float32_while_they_are_merged(monkeypatch):
    base = tiny_lm("ab.")
    base.model.bfloat16()
    adapter = base.adapter()
    whole, merge = [], Linear.merge

    def merge_and_look(layer, *args, **options):
        copied = [m.get_base_layer() for m in layers if isinstance(m, Linear)]
        whole.append(sum(m.weight.dtype == torch.float32 for m in copied))
        return merge(layer, *args, **options)

    def clone_and_look(*args):
        copied = clone(*args)
        layers.extend(copied.modules())
        return copied

    layers = []
    monkeypatch.setattr(network_adapter, "clone", clone_and_look)
    monkeypatch.setattr(Linear, "merge", merge_and_look)
    merged = network_adapter.merge(adapter.model)
    tuned = sum(isinstance(module, Linear) for module in layers)
    assert tuned > 1 and whole[:tuned] == [1] * tuned and set(whole[tuned:]) <= {0}
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_merged_of_a_base_is_the_base():
    base = tiny_lm("ab.")
    assert base.merged() is base


def test_gpt2_adapter_and_merge():
    model = make_model("gpt2")
    base = tiny_lm("ab.")
    base = type(base)(model, base.tokenizer, name="gpt2")
    before = state(base)
    requests = [Score((1, 5, SIZE - 1), (3, 2, k)) for k in range(3)]
    adapter = base.adapter()
    perturb(adapter, 0.05)
    got = [s.log_probs for s in adapter.merged().score(requests)]
    want = [s.log_probs for s in adapter.score(requests)]
    torch.testing.assert_close(torch.stack(got), torch.stack(want), atol=1e-4, rtol=0)
    assert_state(base, before)
