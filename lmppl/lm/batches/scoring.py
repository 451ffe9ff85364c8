"""Scoring: log-probabilities of given continuations, batched.

Requests that share a prefix read it once, whether all of them do or only some; equal ones are
scored once; only the positions that are asked for go through the output layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.lm.batches.packing import WORTH_A_PROMPT, Row, batch, group_by_prefix, pack_rows
from lmppl.lm.batches.requests import Score, Scored, no_distribution
from lmppl.lm.meter.work import Kind, counting, region, watch_backward
from lmppl.lm.network.attention import PrefixCache
from lmppl.lm.network.modules import recomputed
from lmppl.lm.network.output import PackedMasks
from lmppl.lm.network.runner import (
    NO_PROMPT,
    Prompt,
    Runner,
    Tokens,
    common_length,
    longest_beginning,
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
    tokens: Tensor  # (B, T)
    cache: PrefixCache | None  # None: the model runs plainly
    # (N,) of the flattened tokens: those of each sequence from its start on.
    positions: Tensor

    def states(self, runner: Runner) -> Tensor:
        """(N, hidden)"""
        if self.cache is None:
            return runner.run_plain(self.tokens, self.positions)
        return runner.run_cached(self.tokens, self.cache, self.positions)

    def requests(self) -> Iterator[tuple[Score, range]]:
        """What is asked for, and by which of the states it is scored."""
        first = 0
        for sequence in self.sequences:
            states = range(first, first + len(sequence.tokens) - sequence.start)
            for request in sequence.requests:
                yield request, states
            first = states.stop


class _Part(NamedTuple):
    """Rows of sequences that begin with one prompt."""

    prompt: Prompt
    rows: list[Row]
    members: list[_Sequence]  # of all the prompt's rows


def score(runner: Runner, requests: Sequence[Score], *, grad: bool = False) -> list[Scored]:
    """The log-probability of every token of every continuation; with ``grad``, differentiable with
    respect to the model's trainable parameters. The runner's ``memory`` bounds the passes.

    Returns:
        One ``Scored`` a request, (n,) float32, in nats; on the CPU, or with ``grad`` on the
        model's device. ``-inf`` is a probability of zero.

    Raises:
        ValueError: an empty prefix, tokens that do not fit the model's context, or logits that
            define no distribution (naming the site).
    """
    runner.refresh()
    sequences: dict[tuple[Tokens, int], _Sequence] = {}
    for request in dict.fromkeys(requests):
        runner.check_request(len(request.prefix), len(request.continuation), request.name)
        if request.continuation:
            tokens = (*request.prefix, *request.continuation)
            key = (tokens, len(request.prefix))
            if key not in sequences:
                sequences[key] = _Sequence(tokens[:-1], len(request.prefix) - 1)
            sequences[key].requests.append(request)
    device = runner.device if grad else torch.device("cpu")
    empty = torch.zeros(0, device=device)
    found = {
        r: Scored(empty, None if r.closing_token is None else empty)
        for r in requests
        if not r.continuation
    }
    kind: Kind = "trained" if grad and runner.trains else "scored"
    with region(kind), without_autocast() if grad else without_grad():
        _score(runner, list(sequences.values()), kind, grad, found)
    if grad:
        for scored in found.values():
            watch_backward(t for t in (scored.log_probs, scored.closing_log_probs) if t is not None)
    return [found[request] for request in requests]


@region("read")
@without_grad()
def hidden(runner: Runner, prefixes: Sequence[Tokens]) -> Tensor:
    """The last token's hidden state after each prefix, as it enters the output layer.

    Returns:
        (N, hidden) float32, on the model's device.

    Raises:
        ValueError: no prefix, an empty one, or one that does not fit the model's context.
    """
    if not prefixes:
        raise ValueError("no prefix is given")
    runner.refresh()
    for prefix in prefixes:
        runner.check_request(len(prefix), 0, "")
    distinct = [_Sequence(prefix, len(prefix) - 1) for prefix in dict.fromkeys(prefixes)]
    states: dict[Tokens, Tensor] = {}
    for one_pass in _passes(runner, distinct, grad=False):
        one_pass.states(runner)
        names = (sequence.tokens for sequence in one_pass.sequences)
        states.update(zip(names, runner.hidden.float(), strict=True))
    return torch.stack([states[prefix] for prefix in prefixes])


def _score(
    runner: Runner,
    sequences: list[_Sequence],
    kind: Kind,
    grad: bool,
    found: dict[Score, Scored],
) -> None:
    memory, done = runner.memory, 0
    for one_pass in _passes(runner, sequences, grad=grad):
        run = functools.partial(_log_probs, runner, one_pass, memory.gradient_checkpointing)
        with counting("text", done, len(sequences)):
            both = recomputed(run) if grad and memory.training_tokens is not None else run()
        done += len(one_pass.sequences)
        num_tokens = sum(len(sequence.tokens) - sequence.start for sequence in one_pass.sequences)
        runner.usage.count(**{kind: num_tokens})
        requests = [request for request, _ in one_pass.requests()]
        both = both if grad else both.cpu()
        parts = both.split([len(r.continuation) for r in requests], 1)
        invalid = not grad and bool(torch.isnan(both).any())
        for request, (log_probs, closing) in zip(requests, parts, strict=True):
            if invalid and bool(torch.isnan(log_probs).any()):
                raise no_distribution(f"site {request.name!r}: the model's logits")
            found[request] = Scored(log_probs, None if request.closing_token is None else closing)


def _log_probs(runner: Runner, one_pass: _Pass, checkpointing: bool) -> Tensor:
    """What the requests of a pass ask for, one after another: of tokens and closing tokens, (2, M).
    Without a closing token, its numbers are those of token 0."""
    with runner.checkpointing(checkpointing):
        states = one_pass.states(runner)
    rows: list[int] = []
    picks: list[tuple[int, int]] = []
    temperatures: list[float] = []
    for request, of_states in one_pass.requests():
        rows.extend(of_states)
        picks.extend((token, request.closing_token or 0) for token in request.continuation)
        temperatures.extend([request.temperature] * len(of_states))
    if len(rows) != len(states):  # some are asked for more than once
        states = states.index_select(0, torch.tensor(rows, device=states.device))
    heat = None
    if any(t != 1.0 for t in temperatures):
        heat = torch.tensor(temperatures, device=states.device)
    masks = _masks(runner.size, [request for request, _ in one_pass.requests()])
    tokens = torch.tensor(picks, device=states.device)
    return runner.output.log_probs(states, tokens, heat, masks).T


def _masks(size: int, requests: Sequence[Score]) -> PackedMasks | None:
    """Of every token of the requests, those among which its distribution is renormalised; None: all."""
    if all(request.allowed is None for request in requests):
        return None
    masks = []
    for request in requests:
        if request.allowed is None:
            mask = torch.ones(len(request.continuation), size, dtype=torch.bool)
        else:
            stopping, steered = request.allowed.stopping, request.allowed.steered
            mask = stopping.masks(request.continuation, steered=steered)
        masks.append(PackedMasks.of(mask))
    return PackedMasks(torch.cat([mask.bits for mask in masks]), size)


def _passes(runner: Runner, sequences: list[_Sequence], *, grad: bool) -> Iterator[_Pass]:
    """The passes that read all sequences; with ``grad``, prompts are read with their graphs."""
    # The memory of a pass with gradients is in what is kept for the backward pass, whatever its
    # size: unless it is asked to be computed anew there.
    most = runner.memory.training_tokens if grad else runner.pass_tokens  # None: no limit
    if not runner.fast:
        yield from _plain_passes(runner, sequences, most)
        return
    pending: list[_Part] = []
    known_prompts: dict[Tokens, Prompt] = {}  # those with graphs
    for members in group_by_prefix(sequences, lambda s: s.tokens[: s.start]):
        prompt = _prompt(runner, members, known_prompts if grad else None)
        known = len(prompt.tokens)
        rows = pack_rows([s.tokens[known:] for s in members], functools.partial(runner.cost, known))
        step = len(rows)
        if most is not None:
            step = max(1, most // max(len(row.tokens) for row in rows))
        for at in range(0, len(rows), step):
            part = _Part(prompt, rows[at : at + step], members)
            if pending and not _fits([*pending, part], most):
                yield _packed_pass(runner, pending)
                pending = []
            pending.append(part)
    if pending:
        yield _packed_pass(runner, pending)


def _prompt(runner: Runner, members: list[_Sequence], known: dict[Tokens, Prompt] | None) -> Prompt:
    """What the sequences have in common, if it is worth reading by itself. ``known``: prompts that
    have been read with their graphs, so that the gradient of what many share is computed once, too;
    None: no gradient is wanted."""
    sequences = [s.tokens for s in members]
    limit = min(s.start for s in members)
    if known is None:
        return runner.shared_prompt(sequences, limit)
    tokens = sequences[0][: common_length(min(sequences), max(sequences), limit)]
    longest = longest_beginning(known, tokens)
    shared = common_length(longest, tokens)
    base = known[longest].head(shared) if shared >= WORTH_A_PROMPT else NO_PROMPT
    if (len(tokens) - len(base.tokens)) * (len(sequences) - 1) < WORTH_A_PROMPT:
        return base
    read = functools.partial(runner.extend_prompt, base, tokens)
    again = runner.memory.gradient_checkpointing or runner.memory.training_tokens is not None
    known[tokens] = recomputed(read) if again else read()
    return known[tokens]


def _fits(parts: list[_Part], most: int | None) -> bool:
    """Whether the parts make one pass."""
    lengths = [len(row.tokens) for part in parts for row in part.rows]
    size = len(lengths) * max(lengths)  # with padding
    return (most is None or size <= most) and size <= (1 + _MAX_PADDING) * sum(lengths)


def _packed_pass(runner: Runner, parts: list[_Part]) -> _Pass:
    tokens, tree = batch([row for part in parts for row in part.rows], runner.device)
    sequences: list[_Sequence] = []
    positions: list[int] = []
    first = 0
    for prompt, rows, members in parts:
        known = len(prompt.tokens)
        for row in rows:
            for member, slots in zip(row.members, row.slots, strict=True):
                sequences.append(members[member])
                positions += [first + slot for slot in slots[members[member].start - known :]]
            first += tokens.shape[1]
    groups = [part.prompt.group(len(part.rows)) for part in parts]
    cache = PrefixCache(groups, tree=tree, keep=False)
    return _Pass(sequences, tokens, cache, torch.tensor(positions, device=runner.device))


def _plain_passes(runner: Runner, sequences: list[_Sequence], most: int | None) -> Iterator[_Pass]:
    """Rows of similar length together."""
    order = sorted(sequences, key=lambda s: len(s.tokens))
    limit = math.inf if most is None else most
    while order:
        count = 1
        while count < len(order) and (count + 1) * len(order[count].tokens) <= limit:
            count += 1
        chunk, order = order[:count], order[count:]
        tokens = padded([s.tokens for s in chunk], runner.device)
        width = tokens.shape[1]
        at = [row * width + t for row, s in enumerate(chunk) for t in range(s.start, len(s.tokens))]
        yield _Pass(chunk, tokens, None, torch.tensor(at, device=runner.device))
