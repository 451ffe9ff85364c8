"""Tiny tokenizers made in memory, one of each family."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from lmppl.lm.tokens.vocabulary import Vocabulary

CORPUS = "the cat sat on the mat. The dog, the log.\n\nnaïve café résumé 日本語 日本 🙂🙃"


def byte_level(*, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind: characters outside ASCII are split between tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def characters() -> PreTrainedTokenizerFast:
    """One token a character; BOS in front and EOS behind by itself; no unknown token."""
    ids = {token: i for i, token in enumerate([*"ab. é", "<eos>", "<bos>"])}
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")


def sentencepiece(*, legacy: bool = False) -> PreTrainedTokenizerFast:
    """Llama 2's kind: a dummy space in front, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "a", "b", "t", "h", "e", ".", "th", "the", "▁the", "▁a", "▁▁", "▁b"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "▁"), ("▁", "b")]
    ids = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def spaced_words() -> PreTrainedTokenizerFast:
    """No decoder at all: tokens are joined by spaces."""
    ids = {token: i for i, token in enumerate(["the", "cat", "<eos>"])}
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's kind; no rule is written out for it, so tokens are decoded in context."""
    ids = {t: i for i, t in enumerate(["[UNK]", "the", "cat", "##s", "un", "##cat", "##."])}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def collapsing() -> PreTrainedTokenizerFast:
    """Repeated tokens are decoded once: the text is no concatenation of the tokens' bytes."""
    ids = {token: i for i, token in enumerate(["<pad>", "a", "b", ".", "<eos>"])}
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.CTC()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


FAMILIES = {
    "byte_level": byte_level,
    "characters": characters,
    "sentencepiece": sentencepiece,
    "sentencepiece_legacy": lambda: sentencepiece(legacy=True),
    "spaced_words": spaced_words,
    "word_pieces": word_pieces,
    "collapsing": collapsing,
}


def vocabulary_of(tokenizer: Any, *, unused: int = 2) -> Vocabulary:
    """Its vocabulary, with logits that belong to no token."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Vocabulary(tokenizer, eos, len(tokenizer) + unused)
