"""Tiny language models: real transformers models over a handful of tokens.

With so few tokens every program over them can be enumerated, so that an inference result is
compared with the exact answer. The weights are random, and large: a changed prefix moves the
distribution of the next token far (by a total variation above 0.3 on average; the tests assert
it), so a prefix that is lost, doubled or mixed up with another one cannot go unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmppl.lm import LM

EOS = "<eos>"
BOS = "<bos>"


def tiny_lm(
    tokens: str | Sequence[str] = "ab.",
    *,
    seed: int = 0,
    eos: bool = True,
    bos: bool = False,
    contrast: float = 2.0,
    hidden_size: int = 64,
    num_layers: int = 2,
    context_length: int = 256,
    unused_logits: int = 0,
) -> LM:
    """A random Llama over the given tokens, made in memory in a few milliseconds.

    Ids are positions in ``tokens``; then come EOS (``"<eos>"``) and BOS (``"<bos>"``), as far as
    they are wanted. Decoding concatenates. Encoding takes the longest token that fits, from left
    to right, and **raises** on a character that no token holds: there is no unknown token that
    could silently stand for it. Equal arguments give equal weights; torch's global random state
    is neither used nor changed.

    Args:
        tokens: the ordinary tokens: the characters of a string, or strings of any length.
        seed: of the weights.
        eos: whether the vocabulary has an end-of-sequence token.
        bos: whether the tokenizer puts a BOS in front of a text. Like any token of a real model's
            vocabulary, it can be sampled too.
        contrast: standard deviation of the logits over tokens and prefixes. At 0 every
            distribution is uniform.
        hidden_size: a multiple of 8.
        num_layers: keep two or more: with one layer a key or value depends on its own token only,
            so that a cache filled under a wrong prefix would still be right.
        context_length: of the model, in tokens.
        unused_logits: how many logits to add that belong to no token, as in models that pad
            their vocabulary. They have probability like any other.

    Raises:
        ValueError: no tokens, an empty token, or one given twice.
    """
    names = list(tokens)
    _check_tokens(names)
    return _tiny(
        tiny_tokenizer(names, eos=eos, bos=bos),
        f"tiny-{''.join(names)}-{seed}",
        seed=seed,
        contrast=contrast,
        hidden_size=hidden_size,
        num_layers=num_layers,
        context_length=context_length,
        unused_logits=unused_logits,
    )


def tiny_byte_lm(
    tokens: Sequence[bytes] = (b"a", b".", b"\xc3", b"\xa9", b"\xa8", b".\xc3"),
    *,
    seed: int = 0,
    eos: bool = True,
    bos: bool = False,
    **options: Any,
) -> LM:
    """A tiny LM with a byte-level tokenizer, whose tokens may split a unicode character.

    By default it writes ``a``, ``.``, and the two bytes each of ``"é"`` and ``"è"``; one token
    ends in the middle of a character.

    Args:
        tokens: the ordinary tokens, as bytes.
        seed: of the weights.
        eos: whether there is an end-of-sequence token.
        bos: whether the tokenizer puts a BOS in front of a text.
        **options: ``contrast``, ``hidden_size`` (by default 32), ``num_layers``, ``context_length`` and
            ``unused_logits``, as of ``tiny_lm``.

    Raises:
        ValueError: no tokens, an empty token, or one given twice.
    """
    to_char = byte_alphabet()
    names = ["".join(to_char[byte] for byte in token) for token in tokens]
    _check_tokens(names)
    tokenizer = tiny_tokenizer(names, eos=eos, bos=bos, byte_level=True)
    return _tiny(tokenizer, f"tiny-bytes-{seed}", seed=seed, **options)


def tiny_tokenizer(
    tokens: Sequence[str], *, eos: bool = True, bos: bool = False, byte_level: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of ``tiny_lm``.

    Args:
        tokens: the ordinary tokens; their ids are their positions.
        eos: whether EOS comes after them.
        bos: whether BOS comes last, and is put in front of a text.
        byte_level: whether tokens are written in GPT-2's byte alphabet.
    """
    special = [EOS] * eos + [BOS] * bos
    vocabulary = {token: i for i, token in enumerate([*tokens, *special])}
    # A word-level model has no unknown token unless it is given one: it raises instead. (BPE
    # would drop unknown characters without a word.)
    backend = Tokenizer(models.WordLevel(vocabulary))
    longest_first = sorted(tokens, key=len, reverse=True)
    split: Any = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    if byte_level:
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Sequence([to_bytes, split])
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel() if byte_level else decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS if eos else None,
        bos_token=BOS if bos else None,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    vocab_size: int,
    *,
    seed: int = 0,
    contrast: float = 2.0,
    hidden_size: int = 32,
    num_layers: int = 2,
    context_length: int = 256,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
) -> LlamaForCausalLM:
    """The model of ``tiny_lm``: float32, on the CPU, in evaluation mode.

    Args:
        vocab_size: how many tokens it knows.
        seed: of the weights.
        contrast: standard deviation of the logits over tokens and prefixes.
        hidden_size: a multiple of 8.
        num_layers: how many.
        context_length: in tokens.
        eos_token_id: of its configuration, None: there is none.
        bos_token_id: likewise.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # positions matter early
        eos_token_id=eos_token_id,
        bos_token_id=bos_token_id,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):  # transformers' own initialisation draws from it
        model = LlamaForCausalLM(config)
    model = model.to(device="cpu", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                std = _GAINS.get(name.split(".")[-2], 1.5) / weight.shape[1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        _calibrate(model, contrast, generator)
    return model


# How loud the output of a weight matrix is for inputs of size 1. Attention is neither uniform nor
# stuck at one position, and what earlier tokens say is heard over the current one.
_GAINS = {"embed_tokens": 1.0, "lm_head": 1.0, "v_proj": 2.0, "o_proj": 2.0}


def _calibrate(model: LlamaForCausalLM, contrast: float, generator: torch.Generator) -> None:
    """Make logits average zero for every token, and deviate by ``contrast``.

    Random weights alone leave some models with a favourite token whatever the prefix is.
    """
    prefixes = torch.randint(model.config.vocab_size, (256, 6), generator=generator)
    hidden = model.model(prefixes, use_cache=False).last_hidden_state.flatten(0, 1)  # (N, H)
    head = model.lm_head.weight  # (V, H)
    mean = hidden.mean(0)
    head -= torch.outer(head @ mean, mean) / mean.dot(mean)
    head -= head.mean(0)
    if len(head) > 1:
        head *= contrast / (hidden @ head.T).std()


def _tiny(
    tokenizer: PreTrainedTokenizerFast, name: str, *, unused_logits: int = 0, **options: Any
) -> LM:
    model = tiny_model(
        len(tokenizer) + unused_logits,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **options,
    )
    return LM(model, tokenizer, name=name)


def _check_tokens(tokens: Sequence[str]) -> None:
    if not tokens or not all(tokens):
        raise ValueError(f"a tiny LM needs at least one token, none of them empty: {tokens!r}")
    if len(set(tokens) | {EOS, BOS}) != len(tokens) + 2:
        raise ValueError(f"tokens must differ, also from {EOS!r} and {BOS!r}: {tokens!r}")


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}
