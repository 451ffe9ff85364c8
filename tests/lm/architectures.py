"""Tiny random models of several architectures, and the naive pass they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

SIZE = 61
_LLAMA: dict[str, Any] = dict(
    vocab_size=SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def _config(name: str) -> PretrainedConfig:
    if name == "llama":
        return LlamaConfig(**_LLAMA)
    if name == "gpt2":
        return GPT2Config(
            vocab_size=SIZE,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=256,
            bos_token_id=None,
            eos_token_id=None,
        )
    if name == "qwen2":  # the first layer sees everything, the others 5 tokens
        return Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    if name == "mistral":
        return MistralConfig(**_LLAMA, sliding_window=6)
    if name == "gemma2":  # soft-capped scores and logits, alternating windows
        return Gemma2Config(
            **_LLAMA,
            head_dim=8,
            sliding_window=6,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=4.0,
        )
    if name == "qwen3":  # normalised queries and keys
        return Qwen3Config(**_LLAMA, head_dim=8)
    if name == "gemma":  # one key and value head for all queries
        return GemmaConfig(**{**_LLAMA, "num_key_value_heads": 1}, head_dim=8)
    if name == "gemma3":  # windows in all layers but the last, another rotation in them
        return Gemma3TextConfig(
            **_LLAMA,
            head_dim=8,
            sliding_window=6,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        )
    if name == "bloom":  # its attention can't be reached: the slow path
        return BloomConfig(
            vocab_size=SIZE,
            hidden_size=32,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    raise ValueError(name)


FAST = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"]


def make_model(name: str, *, frozen: bool = True) -> Any:
    """A seeded model in float32, its weights large enough that attention matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_config(name)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.requires_grad_(not frozen)


@torch.no_grad()
def naive_log_probs(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """(T, V): log-softmax of every position's logits; one sequence, no cache, no padding."""
    return torch.log_softmax(model(torch.tensor([tokens]), use_cache=False).logits[0].float(), -1)
