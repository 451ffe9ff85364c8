"""What some texts were drawn with, beside what scoring finds, in their model's dtype and in float32.

choose some of the texts that were drawn, evenly: about 1,024 tokens
for each language model:
    score them in one batch
    if asked:  score them by a copy of the model in float32, which is dropped again
compare each two of the three
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from lmppl.lm.batches.draw_log import LoggedText
from lmppl.report.tables import two_versions
from lmppl.runtime.mismatch import Mismatch, between

MismatchOption = bool | Literal["float32"]

MOST_TOKENS = 1024
_FEWEST_TEXTS = 8  # also of longer ones
_MUCH = 0.9  # of the effective sample size


def check_mismatch(asked: object) -> None:
    """Raise ``ValueError`` for what is no ``mismatch=`` of ``diagnose``."""
    if not isinstance(asked, bool) and asked != "float32":
        raise ValueError(f"mismatch={asked!r}, allowed: True, False, 'float32'")


def mismatches(
    texts: Sequence[LoggedText],
    guide: Any,
    asked: MismatchOption,
    most_tokens: int = MOST_TOKENS,
) -> dict[str, Mismatch]:
    """How far log-probabilities of texts that were drawn under a guide are apart: as they were drawn,
    as a pass without gradients scores them, and, if ``asked`` for, as one in float32 does; none
    without texts. Of more than ``most_tokens`` some are chosen.

    Raises:
        ValueError: a model with quantised weights, if float32 is asked for.
    """
    if getattr(guide, "reads_observations", False):  # it has let the program run, to find these
        texts = [text for text in texts if text.lm in guide.adapters()]
    chosen = _some(texts, most_tokens) if asked else []
    if not chosen:
        return {}
    versions = {"drawn": [text.log_probs for text in chosen], "scored": _scored(chosen)}
    if asked == "float32":
        versions["float32"] = _scored(chosen, in_float32=True)
    return {
        f"{first}, {second}": between(versions[first], versions[second])
        for first, second in (("drawn", "scored"), ("drawn", "float32"), ("scored", "float32"))
        if second in versions
    }


def _some(texts: Sequence[LoggedText], most_tokens: int) -> Sequence[LoggedText]:
    """Texts of all sites and slots: all, or about as many as have so many tokens."""
    tokens = sum(len(text.drawn.token_ids) for text in texts)
    if tokens <= most_tokens:
        return texts
    num = min(len(texts), max(_FEWEST_TEXTS, len(texts) * most_tokens // tokens))
    return [texts[k * len(texts) // num] for k in range(num)]


def _scored(texts: Sequence[LoggedText], *, in_float32: bool = False) -> list[torch.Tensor]:
    """The log-probabilities of the tokens of each text, by its model or a copy in float32."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for lm in dict.fromkeys(text.lm for text in texts):
        members = [i for i, text in enumerate(texts) if text.lm is lm]
        scorer = lm.in_float32() if in_float32 else lm
        answers = scorer.score([texts[i].request for i in members])
        for i, answer in zip(members, answers, strict=True):
            found[i] = answer.log_probs
    return found


def mismatch_notes(found: Mapping[str, Mismatch], guide: Any) -> Iterator[str]:
    """What to beware of. (Of the program's own draws the recorded log q cancels against log p.)"""
    if guide is None:
        return
    pair, worst = min(found.items(), key=lambda item: item[1].ess_fraction, default=("", None))
    if worst is not None and worst.ess_fraction < _MUCH:
        yield (
            f"{two_versions(pair)} are {worst.per_token:.2g} nats a token apart, which alone leaves "
            f"{worst.ess_fraction:.0%} of the effective sample size: load the language model with "
            "dtype='float32'"
        )
