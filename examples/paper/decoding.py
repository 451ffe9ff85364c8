"""Texts by transformers' own ``generate``: nucleus sampling, greedy decoding, beams.

They end as the texts of a site do: by its stop strings, an EOS, or at its most tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

import lmppl
from lmppl.lm.tokens.stopping import Stopping


def nucleus(
    lm: lmppl.LM, prompt: str, site: Stopping, num: int, top_p: float, seed: int
) -> list[lmppl.Text]:
    """Draws of the most probable tokens that together have the probability ``top_p`` (Holtzman et al.,
    2020, arXiv 1904.09751)."""
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return _generate(
            lm, prompt, site, do_sample=True, top_p=top_p, top_k=0, num_return_sequences=num
        )


def greedy(lm: lmppl.LM, prompt: str, site: Stopping) -> lmppl.Text:
    """The most probable token, one after another."""
    return _generate(lm, prompt, site, do_sample=False)[0]


def beams(lm: lmppl.LM, prompt: str, site: Stopping, num: int) -> list[lmppl.Text]:
    """What beam search with ``num`` beams finds, by the log-probability of the whole text."""
    if num == 1:
        return [greedy(lm, prompt, site)]
    return _generate(
        lm, prompt, site, do_sample=False, num_beams=num, num_return_sequences=num,
        length_penalty=0.0,
    )  # fmt: skip


def diverse_beams(
    lm: lmppl.LM, prompt: str, site: Stopping, num: int, penalty: float
) -> list[lmppl.Text]:
    """Diverse beam search (Vijayakumar et al., 2018, arXiv 1610.02424) in ``num`` groups of one beam
    each: greedy decoding, in which a token costs ``penalty`` nats for each earlier group that has taken
    it at the same step. (transformers keeps the code for larger groups outside its package.)"""
    length = len(lm.encode(prompt))
    groups = [_Penalty(length, site, penalty)]
    return _generate(lm, [prompt] * num, site, do_sample=False, logits_processor=groups)


def _generate(
    lm: lmppl.LM, prompts: str | list[str], site: Stopping, **options: Any
) -> list[lmppl.Text]:
    """``generate`` after one prompt, or copies of it."""
    copies = [prompts] if isinstance(prompts, str) else prompts
    ids = torch.tensor([lm.encode(prompt) for prompt in copies], device=lm.device)
    eos_ids = sorted(lm.vocabulary.eos_ids)
    rows = lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=site.max_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=eos_ids[0] if eos_ids else 0,
        stopping_criteria=[_Closed(ids.shape[1], site)],
        **options,
    )
    return [_text(row, site) for row in rows[:, ids.shape[1] :].tolist()]


def _text(tokens: list[int], site: Stopping) -> lmppl.Text:
    """The value that the tokens of a row begin with; padding follows."""
    closed = site.scan(tokens)
    assert closed is not None, "a row ends at the latest by its length"
    return site.text(tokens[: closed[0]])


class _Closed(StoppingCriteria):
    """Whether the texts that follow a prompt of ``start`` tokens have ended."""

    def __init__(self, start: int, site: Stopping) -> None:
        self._start, self._site = start, site

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        rows = input_ids[:, self._start :].tolist()
        closed = [self._site.scan(row) is not None for row in rows]
        return torch.tensor(closed, device=input_ids.device)


class _Penalty(LogitsProcessor):
    """Lets each row pay for the tokens that the rows before it are about to take."""

    def __init__(self, start: int, site: Stopping, penalty: float) -> None:
        self._start, self._site, self._penalty = start, site, penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float().log_softmax(-1)
        taken = torch.zeros_like(scores[0])
        for row, tokens in enumerate(input_ids[:, self._start :].tolist()):
            if self._site.scan(tokens) is None:
                scores[row] -= self._penalty * taken
                taken[scores[row].argmax()] += 1
        return scores
