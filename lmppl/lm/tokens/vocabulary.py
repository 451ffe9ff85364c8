"""Vocabulary: all that a program needs to know of a tokenizer.

Tokenizers are made for whole texts: some put a BOS in front, add a space or strip one. A program
needs the tokens of a text that *continues* another, and the text of tokens from the middle of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from lmppl.lm.tokens.token_bytes import Rule, byte_level, component, rules_of


class Vocabulary:
    """The tokens of a language model: text to ids, ids to text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        eos_ids: every token that ends a text.
        size: width of the model's logits, in tokens; may exceed ``len(tokenizer)``.
    """

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int], size: int) -> None:
        self.tokenizer = tokenizer
        self.size = int(size)
        self.eos_ids: frozenset[int] = frozenset(int(t) for t in eos_ids)
        wrong = [t for t in sorted(self.eos_ids) if not 0 <= t < self.size]
        if wrong:
            raise ValueError(f"EOS ids {wrong} are outside the model's vocabulary of {self.size}")
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # in Rust, if it is
        self._bytes: dict[int, bytes] = {}
        self._encode = lru_cache(maxsize=1 << 14)(self._encode_anew)

    def __deepcopy__(self, memo: dict[int, Any]) -> Vocabulary:
        return self  # immutable; a Text that is copied with it must stay of the same vocabulary

    def __repr__(self) -> str:
        return f"Vocabulary({type(self.tokenizer).__name__}, size={self.size})"

    @cached_property
    def eos_id(self) -> int | None:
        """The EOS that ends an observed string; None if the model has none."""
        named = getattr(self.tokenizer, "eos_token_id", None)
        return named if named in self.eos_ids else min(self.eos_ids, default=None)

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts in front of a text by itself."""
        for text in ("a", *map(self._written, range(min(self.size, 64)))):
            try:
                bare, full = self._tokenize(text or "", False), self._tokenize(text or "", True)
            except Exception:  # a vocabulary without this text
                continue
            if bare and set(bare).isdisjoint(self.special_ids):
                for start in range(len(full) - len(bare) + 1):
                    if full[start : start + len(bare)] == bare:
                        return full[:start]
        return ()

    def encode(self, text: str) -> tuple[int, ...]:
        """The canonical tokens of ``text`` where it continues a text: no BOS, no added space.
        ``ValueError``: the tokenizer cannot write it, or the model lacks one of its tokens."""
        return self._encode(str(text), False)

    def encode_prefix(self, parts: Sequence[str | tuple[int, ...]]) -> tuple[int, ...]:
        """The tokens of a text made of ``parts``: strings to tokenise, tuples of ids to keep. A
        string at the very front is tokenised as the tokenizer starts a text, every later one as a
        continuation. BOS stands once, at the front, unless the first part brings its own."""
        ids: list[int] = []
        for part in parts:
            if not isinstance(part, str):
                ids.extend(part)
            elif part:
                ids.extend(self._encode(str(part), not ids))
        bos = self.bos_ids
        return tuple(ids) if bos and tuple(ids[: len(bos)]) == bos else (*bos, *ids)

    def _encode_anew(self, text: str, at_start: bool) -> tuple[int, ...]:
        try:
            ids = self._tokenize(text, False) if at_start else self._continue(text)
        except Exception as error:
            raise ValueError(f"the tokenizer cannot encode {text!r}: {error}") from error
        if ids and max(ids) >= self.size:
            raise ValueError(
                f"{text!r} encodes to token {max(ids)}, but the model knows {self.size} tokens. "
                "Use the tokenizer that belongs to the model, or resize its embeddings."
            )
        if self._loses(text, ids):
            raise ValueError(
                f"the tokenizer loses part of {text!r}: its vocabulary lacks some of the bytes. "
                "Leave out what it cannot write."
            )
        return ids

    def _continue(self, text: str) -> tuple[int, ...]:
        """The tokens of ``text`` after another text."""
        if not text:
            return ()
        if self._continuing_backend is not None:
            return tuple(self._continuing_backend.encode(text, None, False, False).ids)
        if self._backend is None:  # written in Python: tokenise after something, and cut it off
            for front in ("\n", "\n\n", "a"):
                head, whole = self._tokenize(front, False), self._tokenize(front + text, False)
                if head and whole[: len(head)] == head and self._after(head, whole) is not None:
                    return whole[len(head) :]
        return self._tokenize(text, False)

    def _loses(self, text: str, ids: tuple[int, ...]) -> bool:
        """Whether a byte-level vocabulary lacks bytes: those it drops without a word."""
        if self._rule is not byte_level or not self._added.keys().isdisjoint(ids):
            return False  # (added tokens may take the white space beside them)
        if self._backend is not None and self._backend.normalizer is not None:
            return False
        return sum(len(self.token_bytes(t)) for t in ids) < len(text.encode())

    def _tokenize(self, text: str, special: bool) -> tuple[int, ...]:
        output = self.tokenizer(
            text, add_special_tokens=special, padding=False, truncation=False, verbose=False
        )
        return tuple(int(t) for t in output["input_ids"])

    @cached_property
    def _continuing_backend(self) -> Any:
        """A copy of the tokenizer's backend that adds no space in front; None if it adds none."""
        backend = self._backend
        if backend is None:
            return None
        normalizer = component(backend.normalizer)
        pre_tokenizer = component(backend.pre_tokenizer)
        without = _without_prefix(normalizer), _without_prefix(pre_tokenizer)
        if without == (normalizer, pre_tokenizer):
            return None
        description = json.loads(backend.to_str())
        description["normalizer"], description["pre_tokenizer"] = without
        description["truncation"] = description["padding"] = None
        return type(backend).from_str(json.dumps(description))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` in the middle of a text: special tokens kept, nothing cleaned up.

        Bytes that are not (yet) a whole character become U+FFFD.
        """
        if self.concatenates:
            return self.bytes_of(ids).decode("utf-8", errors="replace")
        ids = [int(t) for t in ids if int(t) < len(self.tokenizer)]
        text = self._after(self._anchor, (*self._anchor, *ids))
        return self._decode_by_tokenizer(ids) if text is None else text

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of the text of ``ids``, whole characters or not."""
        if self.concatenates:
            return b"".join(map(self.token_bytes, ids))
        return self.decode(tuple(ids)).encode()

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token adds to a text (or if not ``concatenates``, has alone); none
        for ids beyond the tokenizer."""
        token = int(token)
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._find_bytes(token, self._rule)
        return known

    @cached_property
    def concatenates(self) -> bool:
        """Whether the text of a sequence is the concatenation of its tokens' bytes."""
        return self._rule is not None or self._holds(None)

    def _find_bytes(self, token: int, rule: Rule | None) -> bytes:
        if token < 0:
            raise ValueError(f"{token} is not a token (padding must be cut off first)")
        written = self._written(token)
        if written is None:
            return b""
        if token in self._added:
            return self._added[token].encode()
        if rule is not None:
            return rule(written)
        text = self._after(self._anchor, (*self._anchor, token))
        return (written if text is None else text).encode()

    @cached_property
    def _rule(self) -> Rule | None:
        """The rule for token bytes that ``tokenizer.decode`` obeys. None: there is none, and each
        token is decoded after another one."""
        return next(filter(self._holds, rules_of(self.tokenizer)), None)

    def _holds(self, rule: Rule | None) -> bool:
        """Compare a rule with ``tokenizer.decode`` on a sample of tokens, between two others."""
        anchor = self._anchor
        frame = b"".join(self._find_bytes(t, rule) for t in anchor)
        length = min(self.size, len(self.tokenizer))
        for token in range(0, length, max(1, length // 128)):
            if token in self._added or self._written(token) is None:
                continue
            try:
                middle = self._find_bytes(token, rule)
                expected = (frame + middle + middle + frame).decode()
            except UnicodeDecodeError:  # part of a character: says nothing by itself
                continue
            actual = self._decode_by_tokenizer((*anchor, token, token, *anchor))
            if actual.lstrip(" ") != expected.lstrip(" "):
                return False
        return True

    @cached_property
    def _anchor(self) -> tuple[int, ...]:
        """Some token of visible text, to stand before others."""
        for token in range(min(self.size, len(self.tokenizer))):
            text = self._decode_by_tokenizer((token,))
            if token not in self._added and text.strip() and "\ufffd" not in text:
                return (token,)
        return ()

    def _after(self, head: tuple[int, ...], whole: tuple[int, ...]) -> str | None:
        """What ``whole`` decodes to after what ``head`` does, which it begins with; else None."""
        begin, text = self._decode_by_tokenizer(head), self._decode_by_tokenizer(whole)
        return text[len(begin) :] if text.startswith(begin) else None

    def _decode_by_tokenizer(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _written(self, token: int) -> str | None:
        """How the tokenizer writes a token; None if it has none of this id."""
        try:
            return self.tokenizer.convert_ids_to_tokens(token)
        except (IndexError, KeyError, OverflowError):
            return None

    @cached_property
    def _added(self) -> dict[int, str]:
        added = self.tokenizer.added_tokens_decoder
        return {int(token): getattr(entry, "content", str(entry)) for token, entry in added.items()}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def text_tokens(self) -> Tensor:
        """(size,) bool: the tokens that are text: not special, no EOS, and of at least one byte."""
        special = self.special_ids | self.eos_ids
        is_text = [t not in special and bool(self.token_bytes(t)) for t in range(self.size)]
        return torch.tensor(is_text, dtype=torch.bool)

    @cached_property
    def token_of_bytes(self) -> dict[bytes, int]:
        """A token of text with these bytes, of several the first."""
        tokens = reversed(self.text_tokens.nonzero().flatten().tolist())
        return {self.token_bytes(token): token for token in tokens}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and their ids: equal for two loads of one tokenizer."""
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

    def same_as(self, other: Vocabulary) -> bool:
        """Whether ids mean the same tokens in both."""
        return self is other or self.fingerprint == other.fingerprint


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer, less what puts a space in front of a text."""
    if part is None:
        return None
    match part:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            part = {k: v for k, v in part.items() if k != "add_prefix_space"}
            return {**part, "prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": True}:
            return {**part, "add_prefix_space": False}
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            kept = [_without_prefix(step) for step in part[key]]
            return {**part, key: [step for step in kept if step is not None]}
    return part
