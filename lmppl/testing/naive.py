"""A language model's densities computed the slow and obvious way.

The reference that everything else is compared with: no cache, no padding, no batches of unequal
sequences, no byte tables. Only the Hugging Face model and tokenizer of an ``LM`` are used.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from lmppl.lm import LM

Ids = tuple[int, ...]


class NaiveLM:
    """Next-token distributions by plain float32 forwards, remembered by the *whole* token prefix.

    Make a new one after the weights of ``lm`` have changed.
    """

    def __init__(self, lm: LM) -> None:
        self.tokenizer: Any = lm.tokenizer
        model: Any = lm.model
        if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
            model = copy.deepcopy(model).float()
        self.model = model
        self.eos_ids = _eos_ids(model, lm.tokenizer)
        self._rows: dict[Ids, torch.Tensor] = {}

    def next_log_probs(self, prefix: Ids, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the token after ``prefix``, ``(V,)`` float64, nats."""
        self._forward([prefix])
        return torch.log_softmax(self._rows[prefix] / temperature, -1)

    def log_prob(
        self, prefix: Ids, tokens: Sequence[int], temperature: float = 1.0
    ) -> torch.Tensor:
        """Log-probability of each of ``tokens`` after ``prefix``, ``(n,)`` float64, nats."""
        ids = (*prefix, *tokens)
        needed = [ids[:k] for k in range(len(prefix), len(ids))]
        if any(beginning not in self._rows for beginning in needed):
            logits = self._logits([ids[:-1]])[0]  # (T, V): the model is causal
            self._rows |= {beginning: logits[len(beginning) - 1] for beginning in needed}
        pairs = zip(needed, tokens, strict=True)
        terms = [self.next_log_probs(start, temperature)[token] for start, token in pairs]
        return torch.stack(terms) if terms else torch.zeros(0, dtype=torch.float64)

    def closes(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the last of ``tokens`` is an EOS, or a stop string has occurred in their text."""
        return tokens[-1] in self.eos_ids or any(string in self._decode(tokens) for string in stop)

    def text(self, tokens: Sequence[int]) -> str:
        """What they say, without EOS."""
        return self._decode([token for token in tokens if token not in self.eos_ids])

    def _decode(self, tokens: Sequence[int]) -> str:
        raw: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(list(tokens), **raw)

    def closes_first_at_end(
        self, tokens: Sequence[int], stop: Sequence[str], max_tokens: int
    ) -> bool:
        """Whether ``tokens`` is a complete value: closed by its last token, and by none before."""
        if not 1 <= len(tokens) <= max_tokens:
            return False
        closed = [self.closes(tokens[: k + 1], stop) for k in range(len(tokens))]
        return not any(closed[:-1]) and (closed[-1] or len(tokens) == max_tokens)

    def enumerate(
        self, prefix: Ids, max_tokens: int, stop: Sequence[str] | None, temperature: float
    ) -> dict[Ids, float]:
        """All complete values and their log-probabilities. With ``stop=None`` nothing closes, and a
        value has ``max_tokens`` tokens."""
        complete: dict[Ids, float] = {}
        open_: dict[Ids, float] = {(): 0.0}
        for _ in range(max_tokens):
            self._forward([(*prefix, *tokens) for tokens in open_])
            longer = {
                (*tokens, token): log_prob + term
                for tokens, log_prob in open_.items()
                for token, term in enumerate(
                    self.next_log_probs((*prefix, *tokens), temperature).tolist()
                )
            }
            closed = {tokens for tokens in longer if stop is not None and self.closes(tokens, stop)}
            complete |= {tokens: longer[tokens] for tokens in longer if tokens in closed}
            open_ = {tokens: longer[tokens] for tokens in longer if tokens not in closed}
        return complete | open_

    def _forward(self, prefixes: Iterable[Ids]) -> None:
        """Fill ``_rows`` for prefixes of one length, each read in full from its first token."""
        missing = [prefix for prefix in dict.fromkeys(prefixes) if prefix not in self._rows]
        for start in range(0, len(missing), 1024):
            chunk = missing[start : start + 1024]
            self._rows.update(zip(chunk, self._logits(chunk)[:, -1], strict=True))

    def _logits(self, sequences: Sequence[Ids]) -> torch.Tensor:
        """One plain forward over B sequences of T tokens each, ``(B, T, V)`` float64."""
        if not sequences[0]:
            raise ValueError("an empty prefix: the model needs a token (a BOS) to start from")
        ids = torch.tensor(sequences, device=next(self.model.parameters()).device)
        with torch.no_grad(), _evaluating(self.model):
            return self.model(input_ids=ids, use_cache=False).logits.cpu().double()


def naive_log_prob(
    lm: LM, prefix_ids: Sequence[int], token_ids: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of each token given all before it, ``(n,)`` float64, nats.

    By one plain float32 forward of ``lm.model`` over the whole sequence. No end factor.

    Args:
        lm: the language model.
        prefix_ids: the tokens before them, at least one.
        token_ids: n tokens.
        temperature: every step is renormalised as ``p ** (1 / temperature)``.

    Raises:
        ValueError: an empty prefix.
    """
    return NaiveLM(lm).log_prob(tuple(prefix_ids), tuple(token_ids), temperature)


def enumerate_site(
    lm: LM,
    prefix_ids: Sequence[int],
    max_tokens: int,
    stop: str | Sequence[str] | None = None,
    temperature: float = 1.0,
) -> dict[Ids, float]:
    """Every value of a latent site and its log-probability (nats), by brute force.

    A value ends with its first token that is an EOS or that completes a stop string (found by
    decoding every beginning with the tokenizer), or at ``max_tokens``. They sum to 1.

    Args:
        lm: the language model.
        prefix_ids: the tokens that the text follows, at least one.
        max_tokens: the most tokens, the closing one included.
        stop: a stop string or several.
        temperature: every step is renormalised as ``p ** (1 / temperature)``.

    Raises:
        ValueError: an empty prefix.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    return NaiveLM(lm).enumerate(tuple(prefix_ids), max_tokens, stops, temperature)


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that the model's, the generation's or the tokenizer's configuration calls EOS."""
    sources = (model.config, getattr(model, "generation_config", None), tokenizer)
    found = [getattr(source, "eos_token_id", None) for source in sources]
    several = [ids if isinstance(ids, (list, tuple)) else (ids,) for ids in found]
    return frozenset(token for ids in several for token in ids if token is not None)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off, and every module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
