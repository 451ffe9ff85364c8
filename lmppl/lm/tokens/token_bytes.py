"""What bytes each token adds to a text.

A stop string may end within a token, and a character may begin in one token and end in the next, so
text is assembled and searched in UTF-8 bytes. How a token's written form becomes bytes depends on
the tokenizer's decoder. Here are the rules of the common families; whoever uses one checks it
against the tokenizer's own ``decode`` first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

Rule = Callable[[str], bytes]  # a token's written form -> the bytes it adds in mid-text

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's one-to-one map from printable characters to bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def byte_level(token: str) -> bytes:
    alphabet = byte_level_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # not written in the alphabet: it stands for itself
        return token.encode("utf-8", errors="replace")


def raw_bytes(token: str) -> bytes:
    """ByT5's kind: a byte is written as the character of that number."""
    is_byte = len(token) == 1 and ord(token) < 256
    return bytes([ord(token)]) if is_byte else token.encode("utf-8", errors="replace")


def rules_of(tokenizer: Any) -> Iterator[Rule]:
    """Rules that may describe ``tokenizer.decode``, the likeliest first."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: nothing says how it decodes, so try
        yield from (byte_level, _replacing([("\u2581", " ")], byte_fallback=True), raw_bytes)
        return
    rule = _rule_of_decoder(component(backend.decoder))
    if rule is not None:
        yield rule


def component(part: Any) -> dict[str, Any] | None:
    """The description of a normalizer, pre-tokenizer or decoder of the ``tokenizers`` library."""
    if part is None:
        return None
    try:
        return json.loads(part.__getstate__())
    except Exception:  # a component written in Python has no description
        return {"type": "unknown"}


def _rule_of_decoder(decoder: dict[str, Any] | None) -> Rule | None:
    if decoder is None:  # tokens are joined by spaces
        return lambda token: b" " + token.encode("utf-8", errors="replace")
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if any(step["type"] == "ByteLevel" for step in steps):
        return byte_level if len(steps) == 1 else None
    replacements: list[tuple[str, str]] = []
    byte_fallback = fused = False
    for step in steps:
        match step:
            case {"type": "Fuse"}:
                fused = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Metaspace", "replacement": str(mark)}:
                replacements.append((mark, " "))
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip"} if fused:
                pass  # of the whole text's ends, so of nothing in mid-text
            case _:
                return None
    return _replacing(replacements, byte_fallback)


def _replacing(replacements: list[tuple[str, str]], byte_fallback: bool) -> Rule:
    """SentencePiece's kind: text with marks for spaces, and bytes such as ``<0x0A>``."""

    def rule(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
        if byte:
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode("utf-8", errors="replace")

    return rule
