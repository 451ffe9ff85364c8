"""Scoring: log-probabilities of given continuations, batched.

Requests that share a prefix read it once, whether all of them do or only some; equal ones are
scored once; only the positions that are asked for go through the output layer. Passes are as large
as the machine likes, and no larger.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.checkpoint import checkpoint

from lmppl.lm.batches.packing import WORTH_A_PROMPT, Row, batch, group_by_prefix, pack_rows
from lmppl.lm.batches.requests import Score, Scored
from lmppl.lm.meter.work import Kind, region, timed, watch_backward
from lmppl.lm.network.attention import PrefixCache
from lmppl.lm.network.runner import (
    NO_PROMPT,
    Prompt,
    Runner,
    Tokens,
    common_length,
    padded,
    without_autocast,
    without_grad,
)

# Rows of different prompts go through one pass if padding adds no more than this share.
_MAX_PADDING = 0.25


@dataclass(eq=False)
class _Sequence:
    """Tokens to be read, and the requests that are about them."""

    tokens: Tokens  # prefix + continuation without its last token
    start: int  # the position whose logits score the first target
    requests: list[Score] = field(default_factory=list)


@dataclass(eq=False)
class _Pass:
    """One forward pass."""

    sequences: list[_Sequence]
    tokens: torch.Tensor  # (B, T)
    cache: list[PrefixCache]  # at most one; none: the model runs plainly
    # (N,) of the flattened tokens: those of each sequence from its start on.
    positions: torch.Tensor

    def states(self, runner: Runner) -> torch.Tensor:
        """(N, hidden)"""
        if not self.cache:
            return runner.run_plain(self.tokens, self.positions)
        return runner.run_cached(self.tokens, self.cache[0], self.positions)


def score(runner: Runner, requests: Sequence[Score], *, grad: bool = False) -> list[Scored]:
    """The log-probability of every token of every continuation.

    Args:
        runner: of the model; its ``memory`` bounds the passes.
        requests: what to score. Equal ones cost nothing.
        grad: differentiable with respect to the model's trainable parameters.

    Returns:
        One ``Scored`` a request, (n,) float32, in nats; on the CPU, or with ``grad`` on the
        model's device. ``-inf`` is a probability of zero.

    Raises:
        ValueError: an empty prefix, tokens that do not fit the model's context, or logits that
            define no distribution (naming the site).
    """
    runner.refresh()
    sequences: dict[tuple[Tokens, int], _Sequence] = {}
    num_tokens = 0
    for request in dict.fromkeys(requests):
        if not request.prefix:
            raise ValueError(
                f"site {request.name!r}: the prefix has no tokens, and this model has no BOS token "
                "to start from; give a prefix"
            )
        runner.check_context(len(request.prefix), len(request.continuation), request.name)
        if request.continuation:
            tokens = (*request.prefix, *request.continuation)
            key = (tokens, len(request.prefix))
            if key not in sequences:
                sequences[key] = _Sequence(tokens[:-1], len(request.prefix) - 1)
                num_tokens += len(request.continuation)
            sequences[key].requests.append(request)
    device = runner.device if grad else torch.device("cpu")
    empty = torch.zeros(0, device=device)
    found = {
        r: Scored(empty, None if r.closing_token is None else empty)
        for r in requests
        if not r.continuation
    }
    run = without_autocast(_score) if grad else without_grad(_score)
    kind: Kind = "trained" if grad and runner.trains else "scored"
    with region(kind):
        run(runner, list(sequences.values()), grad, found)
    runner.usage.count(**{kind: num_tokens})
    if grad:
        for scored in found.values():
            watch_backward(t for t in (scored.log_probs, scored.closing_log_probs) if t is not None)
    return [found[request] for request in requests]


@timed("read")
@without_grad
def hidden(runner: Runner, prefixes: Sequence[Tokens]) -> torch.Tensor:
    """The last token's hidden state after each prefix, as it enters the output layer.

    Returns:
        (N, hidden) float32, on the model's device.

    Raises:
        ValueError: no prefix, an empty one, or one that does not fit the model's context.
    """
    if not prefixes or not all(prefixes):
        raise ValueError(
            "no prefix, or one without tokens (this model has no BOS token to start from)"
        )
    runner.refresh()
    for prefix in prefixes:
        runner.check_context(len(prefix), 0, "")
    distinct = [_Sequence(prefix, len(prefix) - 1) for prefix in dict.fromkeys(prefixes)]
    states: dict[Tokens, torch.Tensor] = {}
    for one_pass in _passes(runner, distinct, grad=False, most=runner.pass_tokens):
        one_pass.states(runner)
        names = (sequence.tokens for sequence in one_pass.sequences)
        states.update(zip(names, runner.hidden.float(), strict=True))
    return torch.stack([states[prefix] for prefix in prefixes])


def _score(
    runner: Runner,
    sequences: list[_Sequence],
    grad: bool,
    found: dict[Score, Scored],
) -> None:
    # The memory of a pass with gradients is in what is kept for the backward pass, whatever its
    # size: unless it is asked to be computed anew there.
    memory = runner.memory
    most = memory.training_tokens if grad else runner.pass_tokens
    again = memory.gradient_checkpointing or memory.training_tokens is not None
    for one_pass in _passes(runner, sequences, grad=grad, most=most, again=again):
        run = functools.partial(_log_probs, runner, one_pass, memory.gradient_checkpointing)
        if grad and memory.training_tokens is not None:
            both = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        else:
            both = run()
        _hand_out(both if grad else both.cpu(), one_pass, grad, found)


def _log_probs(runner: Runner, one_pass: _Pass, checkpointing: bool) -> torch.Tensor:
    """What the requests of a pass ask for, one after another: of tokens and closing tokens, (2, M).
    Without a closing token, its numbers are those of token 0."""
    with runner.checkpointing(checkpointing):
        states = one_pass.states(runner)
    first = 0
    rows: list[int] = []
    picks: list[tuple[int, int]] = []
    temperatures: list[float] = []
    for sequence in one_pass.sequences:
        n = len(sequence.tokens) - sequence.start
        for request in sequence.requests:
            rows.extend(range(first, first + n))
            closing = request.closing_token or 0
            picks.extend((token, closing) for token in request.continuation)
            temperatures.extend([request.temperature] * n)
        first += n
    if len(rows) != first:  # some are asked for more than once
        states = states.index_select(0, torch.tensor(rows, device=states.device))
    heat = None
    if any(t != 1.0 for t in temperatures):
        heat = torch.tensor(temperatures, device=states.device)
    return runner.output.log_probs(states, torch.tensor(picks, device=states.device), heat).T


def _hand_out(both: torch.Tensor, one_pass: _Pass, grad: bool, found: dict[Score, Scored]) -> None:
    at = 0
    for sequence in one_pass.sequences:
        n = len(sequence.tokens) - sequence.start
        for request in sequence.requests:
            log_probs = both[0, at : at + n]
            closing = both[1, at : at + n] if request.closing_token is not None else None
            if not grad and bool(torch.isnan(log_probs).any()):
                raise ValueError(
                    f"site {request.name!r}: the model's logits define no distribution: they "
                    "contain NaN or +inf, or give every token probability zero. Check the model's "
                    "weights, its dtype (float16 overflows), and any adapter that was trained"
                )
            found[request] = Scored(log_probs, closing)
            at += n


def _passes(
    runner: Runner,
    sequences: list[_Sequence],
    *,
    grad: bool,
    most: int | None,
    again: bool = False,
) -> Iterator[_Pass]:
    """The passes that read all sequences.

    Args:
        runner: of the model.
        sequences: what is read.
        grad: whether prompts are read with gradients.
        most: tokens of a pass, padding included (one row may have more); None: no limit.
        again: whether prompts with gradients are read anew in the backward pass.
    """
    if not runner.fast:
        yield from _plain_passes(runner, sequences, most)
        return
    groups = group_by_prefix(sequences, lambda s: s.tokens[: s.start])
    pending: list[tuple[Prompt, list[Row], list[_Sequence]]] = []
    for members in groups:
        prompt = _prompt(runner, members, grad, again)
        known = len(prompt.tokens)
        rows = pack_rows([s.tokens[known:] for s in members], runner.costs(known))
        step = len(rows)
        if most is not None:
            step = max(1, most // max(len(row.tokens) for row in rows))
        for at in range(0, len(rows), step):
            part = (prompt, rows[at : at + step], members)
            if pending and not _fits([*pending, part], most):
                yield _packed_pass(runner, pending)
                pending = []
            pending.append(part)
    if pending:
        yield _packed_pass(runner, pending)


def _prompt(runner: Runner, members: list[_Sequence], grad: bool, again: bool) -> Prompt:
    """What the sequences have in common, if it is worth reading by itself; with its graph, so that
    its gradient is computed once too."""
    sequences = [s.tokens for s in members]
    limit = min(s.start for s in members)
    if not grad:
        return runner.shared_prompt(sequences, limit)
    common = common_length(min(sequences), max(sequences), limit)
    if common * (len(sequences) - 1) < WORTH_A_PROMPT:
        return NO_PROMPT
    read = functools.partial(runner.extend_prompt, NO_PROMPT, sequences[0][:common])
    if again:
        return checkpoint(read, use_reentrant=False, preserve_rng_state=False)
    return read()


def _fits(parts: list[tuple[Prompt, list[Row], list[_Sequence]]], most: int | None) -> bool:
    """Whether the parts make one pass."""
    rows = [row for _, part, _ in parts for row in part]
    padded_size = len(rows) * max(len(row.tokens) for row in rows)
    size = sum(len(row.tokens) for row in rows)
    return (most is None or padded_size <= most) and padded_size <= (1 + _MAX_PADDING) * size


def _packed_pass(runner: Runner, parts: list[tuple[Prompt, list[Row], list[_Sequence]]]) -> _Pass:
    rows = [row for _, part, _ in parts for row in part]
    tokens, tree = batch(rows, runner.device)
    groups = [prompt.group(len(part)) for prompt, part, _ in parts]
    sequences: list[_Sequence] = []
    positions: list[int] = []
    first = 0
    for prompt, part, members in parts:
        known = len(prompt.tokens)
        for row in part:
            for member, slots in zip(row.members, row.slots, strict=True):
                sequences.append(members[member])
                positions += [first + slot for slot in slots[members[member].start - known :]]
            first += tokens.shape[1]
    cache = PrefixCache(groups, tree=tree, keep=False)
    return _Pass(sequences, tokens, [cache], torch.tensor(positions, device=runner.device))


def _plain_passes(runner: Runner, sequences: list[_Sequence], most: int | None) -> Iterator[_Pass]:
    """Rows of similar length together."""
    order = sorted(sequences, key=lambda s: len(s.tokens))
    while order:
        count = len(order)
        if most is not None:
            fitting = (n for n in range(1, count + 1) if n * len(order[n - 1].tokens) > most)
            count = max(1, next(fitting, count + 1) - 1)
        chunk, order = order[:count], order[count:]
        tokens = padded([s.tokens for s in chunk], runner.device)
        width = tokens.shape[1]
        at = [row * width + t for row, s in enumerate(chunk) for t in range(s.start, len(s.tokens))]
        yield _Pass(chunk, tokens, [], torch.tensor(at, device=runner.device))
