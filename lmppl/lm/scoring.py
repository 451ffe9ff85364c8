"""Scoring: log-probabilities of given continuations, batched.

Requests that share a prefix read it once; equal ones are scored once; only the positions that are
asked for go through the output layer, and a bounded number of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import torch

from lmppl.lm.attention import PrefixCache
from lmppl.lm.inverse_cdf import tempered
from lmppl.lm.requests import Score, Scored
from lmppl.lm.runner import (
    NO_PROMPT,
    Prompt,
    Runner,
    Tokens,
    common_length,
    padded,
    runner_of,
    without_grad,
)
from lmppl.lm.work import Kind, region, timed

if TYPE_CHECKING:
    from lmppl.lm.model import LM

T = TypeVar("T")
_Keyed = tuple[Tokens, int]

# A group of requests gets a forward pass of its own if what it shares saves this many tokens.
_WORTH_A_PASS = 64
_MAX_SCORE_BYTES = 1 << 30  # attention scores of a pass with gradients
_MAX_DEPTH = 32  # of the tree of shared prefixes
_LOG_SOFTMAX_ROWS = 256


@dataclass(eq=False)
class _Row:
    """One sequence to be read, and the requests that are about it."""

    tokens: Tokens  # prefix + continuation without its last token
    targets: Tokens  # the continuation
    requests: list[Score]

    @property
    def start(self) -> int:
        """The position whose logits score the first target."""
        return len(self.tokens) - len(self.targets)


def score(
    lm: LM,
    requests: Sequence[Score],
    *,
    grad: bool = False,
    max_bytes: int = 512 << 20,
) -> list[Scored]:
    """The log-probability of every token of every continuation.

    Args:
        lm: the language model.
        requests: what to score. Equal ones cost nothing.
        grad: differentiable with respect to the model's trainable parameters.
        max_bytes: bound on the logits (float32) that are held at a time; a single request may
            exceed it. With ``grad`` they are kept for the backward pass anyway.

    Returns:
        One ``Scored`` a request, (n,) float32, in nats; on the CPU, or with ``grad`` on the
        model's device. ``-inf`` is a probability of zero.

    Raises:
        ValueError: an empty prefix, or logits that define no distribution (naming the site).
    """
    runner = runner_of(lm)
    rows: dict[tuple[Tokens, Tokens], _Row] = {}
    for request in dict.fromkeys(requests):
        if not request.prefix:
            raise ValueError(
                f"site {request.name!r}: the prefix has no tokens, and this model has no BOS token "
                "to start from; give a prefix"
            )
        prefix, targets = request.prefix, request.continuation
        if targets:
            tokens = (*prefix, *targets[:-1])
            rows.setdefault((prefix, targets), _Row(tokens, targets, [])).requests.append(request)
    device = runner.device if grad else torch.device("cpu")
    empty = torch.zeros(0, device=device)
    found = {
        r: Scored(empty, None if r.closing_token is None else empty)
        for r in requests
        if not r.continuation
    }
    run = _score_rows if grad else without_grad(_score_rows)
    kind: Kind = "trained" if grad and runner.trains else "scored"
    with region(kind):
        run(runner, list(rows.values()), grad, max_bytes, found)
    lm.usage.count(**{kind: sum(len(row.targets) for row in rows.values())})
    return [found[request] for request in requests]


@timed("read")
@without_grad
def hidden(lm: LM, prefixes: Sequence[Tokens]) -> torch.Tensor:
    """The last token's hidden state after each prefix, as it enters the output layer.

    Returns:
        (N, hidden) float32, on the model's device.

    Raises:
        ValueError: no prefix, or an empty one.
    """
    if not prefixes or not all(prefixes):
        raise ValueError(
            "no prefix, or one without tokens (this model has no BOS token to start from)"
        )
    runner = runner_of(lm)
    distinct = list(dict.fromkeys(prefixes))
    states: dict[Tokens, torch.Tensor] = {}
    for group in _groups(distinct, lambda p: p[:-1]) if runner.fast else [distinct]:
        _read(runner, group, [(len(p) - 1, len(p)) for p in group], grad=False)
        states.update(zip(group, runner.hidden.float(), strict=True))
    return torch.stack([states[p] for p in prefixes])


def _score_rows(
    runner: Runner,
    rows: list[_Row],
    grad: bool,
    max_bytes: int,
    found: dict[Score, Scored],
) -> None:
    most = max(1, max_bytes // (4 * runner.size))
    groups = _groups(rows, lambda row: row.tokens[: row.start]) if runner.fast else [rows]
    for group in groups:
        for chunk in _chunks(group, most):
            spans = [(row.start, len(row.tokens)) for row in chunk]
            logits = _read(runner, [row.tokens for row in chunk], spans, grad=grad)
            _gather(logits, chunk, grad, found)


def _read(
    runner: Runner, sequences: list[Tokens], spans: list[tuple[int, int]], *, grad: bool
) -> torch.Tensor:
    """Logits (N, V) at positions ``start <= t < end`` of each sequence, one after another."""
    limit = min(start for start, _ in spans)
    if not runner.fast:
        prompt = None
    elif grad:
        prompt = _prompt_with_grad(runner, sequences, limit)
    else:
        prompt = runner.shared_prompt(sequences, limit)
    known = len(prompt.tokens) if prompt else 0
    tokens = padded([s[known:] for s in sequences], runner.device)
    width = tokens.shape[1]
    at = [
        row * width + t - known for row, (start, end) in enumerate(spans) for t in range(start, end)
    ]
    positions = torch.tensor(at, device=runner.device)
    if prompt is None:
        return runner.run_plain(tokens, positions)
    return runner.run_cached(tokens, PrefixCache(prompt.layers, known), positions)


def _prompt_with_grad(runner: Runner, sequences: list[Tokens], limit: int) -> Prompt | None:
    """The common prefix with its graph, so that its gradient is computed once too; None where
    the model had better run plainly, as its own attention keeps less for the backward pass."""
    common = common_length(min(sequences), max(sequences), limit)
    longest = max(map(len, sequences))
    scores = runner.num_layers * runner.num_heads * (longest - common) * longest * len(sequences)
    if common * (len(sequences) - 1) < _WORTH_A_PASS or 8 * scores > _MAX_SCORE_BYTES:
        return None
    return runner.extend_prompt(NO_PROMPT, sequences[0][:common])


def _gather(
    logits: torch.Tensor, chunk: list[_Row], grad: bool, found: dict[Score, Scored]
) -> None:
    """Pick the numbers that the chunk's requests ask for. logits: (N, V)."""
    first = 0
    asked: list[tuple[Score, int]] = []
    rows: list[int] = []
    targets: list[int] = []
    closings: list[int] = []
    temperatures: list[float] = []
    for row in chunk:
        n = len(row.targets)
        for request in row.requests:
            asked.append((request, n))
            rows.extend(range(first, first + n))
            targets.extend(row.targets)
            closing = request.closing_token
            closings.extend([0 if closing is None else closing] * n)
            temperatures.extend([request.temperature] * n)
        first += n
    picks = torch.tensor([targets, closings], device=logits.device).T  # (M, 2)
    same = rows == list(range(first))
    parts = []
    for m in range(0, len(rows), _LOG_SOFTMAX_ROWS):
        part = slice(m, m + _LOG_SOFTMAX_ROWS)
        some = logits[part] if same else logits[torch.tensor(rows[part], device=logits.device)]
        some = tempered(some, temperatures[part])
        picked = some.gather(1, picks[part]).float()
        parts.append(picked - torch.logsumexp(some.float(), -1, keepdim=True))
    both = torch.cat(parts).T  # (2, M)
    if not grad:
        both = both.cpu()
    at = 0
    for request, n in asked:
        log_probs = both[0, at : at + n]
        closing_log_probs = both[1, at : at + n] if request.closing_token is not None else None
        if not grad and bool(torch.isnan(log_probs).any()):
            raise ValueError(
                f"site {request.name!r}: the model's logits define no distribution: they contain "
                "NaN or +inf, or give every token probability zero. Check the model's weights, "
                "its dtype (float16 overflows), and any adapter that was trained"
            )
        found[request] = Scored(log_probs, closing_log_probs)
        at += n


def _groups(items: Sequence[T], shared_of: Callable[[T], Tokens]) -> list[list[T]]:
    """Groups to be read together, each of which shares what is worth reading once.

    Args:
        items: what is read.
        shared_of: the tokens of an item that it may share with others.
    """
    keyed = sorted(((shared_of(item), n) for n, item in enumerate(items)), key=lambda k: k[0])
    groups, rest = _split(keyed, 0, 0)
    return [[items[n] for _, n in group] for group in (*groups, rest) if group]


def _split(keyed: list[_Keyed], known: int, depth: int) -> tuple[list[list[_Keyed]], list[_Keyed]]:
    """Split off groups whose common prefix saves a pass beyond the ``known`` first tokens."""
    common = common_length(keyed[0][0], keyed[-1][0]) if keyed else 0
    groups: list[list[_Keyed]] = []
    rest: list[_Keyed] = []
    most = (len(keyed) - 1) * (max((len(k) for k, _ in keyed), default=0) - common)
    if most < _WORTH_A_PASS or depth == _MAX_DEPTH:
        rest = keyed
    else:
        for goes_on, branch in groupby(keyed, key=lambda k: k[0][common : common + 1]):
            left = list(branch)
            if goes_on:
                more, left = _split(left, common, depth + 1)
                groups += more
            rest += left
    if len(rest) > 1:
        saved = (len(rest) - 1) * (common_length(rest[0][0], rest[-1][0]) - known)
        if saved >= _WORTH_A_PASS:
            return [*groups, rest], []
    return groups, rest


def _chunks(rows: list[_Row], most: int) -> Iterator[list[_Row]]:
    """Rows of similar length together, at most ``most`` positions with padding (or one row)."""
    chunk: list[_Row] = []
    for row in sorted(rows, key=lambda r: len(r.tokens)):
        scored = sum(len(r.targets) for r in chunk) + len(row.targets)
        if chunk and scored > most:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk
