"""Rows: a batch of sequences, their keys and values, and what the next token of each is drawn from.

A batch is started once and then grows by a token a row; rows can be copied, dropped and reordered
in between. What all of them, or groups of them, have in common is held once and never copied.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lmppl.lm.batches.inverse_cdf import invert, invert_among, tempered
from lmppl.lm.batches.packing import group_by_prefix
from lmppl.lm.batches.rejection import Accepted, draw_allowed
from lmppl.lm.network.attention import BufferedCache, Group, LayerKV, PrefixCache
from lmppl.lm.network.cuda_graph import StaticStep
from lmppl.lm.network.output import chunk_rows
from lmppl.lm.network.runner import Runner, Tokens, padded, without_grad

_FIRST_CAPACITY = 64  # slots that are allocated before they are needed
_STATIC_DEVICES = {"cuda"}  # where a step of fixed shapes is worth its price


class Rows(ABC):
    """A batch of sequences."""

    _runner: Runner
    _states: Tensor  # (B, hidden): what the next token's logits are made of

    @staticmethod
    def start(runner: Runner, prefixes: Sequence[Tokens], max_new: int) -> Rows:
        """Read the prefixes, one a row, none empty: what they share once, then each distinct rest
        once. A row will get at most ``max_new`` tokens."""
        runner.refresh()
        kind = CachedRows if runner.fast else PlainRows
        return kind(runner, prefixes, max_new)

    @property
    @without_grad()
    def logits(self) -> Tensor:
        """(B, V) of the model's dtype: the next token's logits of every row."""
        return self._runner.output(self._states)

    @without_grad()
    def draw(self, uniforms: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The next token of each row (B,), and its log-probability (B,) float32, in nats, as
        ``inverse_cdf.invert`` gives them for ``uniforms`` (B,)."""
        parts = [
            invert(logits, uniforms[part], temperatures[part]) for part, logits in self._parts()
        ]
        tokens, log_probs = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(log_probs)

    @without_grad()
    def draw_among(
        self, allowed: Tensor, uniforms: Tensor, temperatures: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next token of each row among those ``allowed`` (B, V) bool, as
        ``inverse_cdf.invert_among`` gives them."""
        parts = []
        for part, logits in self._parts():
            mask = allowed[part].to(logits.device)
            parts.append(invert_among(mask, logits, uniforms[part], temperatures[part]))
        tokens, log_probs, log_masses = map(torch.cat, zip(*parts, strict=True))
        return tokens, log_probs, log_masses

    @without_grad()
    def draw_by_rejection(
        self,
        allows: Sequence[Callable[[int], bool] | None],
        uniforms: Sequence[float],
        temperatures: Sequence[float],
    ) -> list[Accepted | None]:
        """The next token of each row among those that its ``allows`` allows, as
        ``rejection.draw_allowed`` gives them; None: of rows without."""
        drawn: list[Accepted | None] = []
        for part, logits in self._parts():
            # float64: all that is allowed may have less probability than float32 can hold.
            probs = torch.softmax(tempered(logits, temperatures[part]).cpu().double(), -1).numpy()
            rows = zip(probs, uniforms[part], allows[part], strict=True)
            drawn += [f and draw_allowed(row, uniform, f) for row, uniform, f in rows]
        return drawn

    @without_grad()
    def log_probs(
        self, tokens: Sequence[int], temperatures: Sequence[float], allowed: Tensor | None = None
    ) -> Tensor:
        """The log-probability of a given next token of each row, (B,) float32, in nats; with
        ``allowed`` (B, V) bool, among those tokens; ``-inf`` where there are none."""
        index = torch.tensor(tokens, device=self._states.device).unsqueeze(1)
        found = []
        for part, logits in self._parts():
            logits = tempered(logits, temperatures[part]).float()
            if allowed is not None:
                among = allowed[part].to(logits.device)
                logits = logits.masked_fill(~among, -torch.inf)
            log_probs = torch.log_softmax(logits, -1).gather(1, index[part]).squeeze(1)
            if allowed is not None:  # a softmax over nothing is NaN
                log_probs = log_probs.masked_fill(~among.any(-1), -torch.inf)
            found.append(log_probs)
        return torch.cat(found)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time, and their logits."""
        step = chunk_rows(self._runner.size, self._states.device)
        for at in range(0, len(self._states), step):
            part = slice(at, at + step)
            yield part, self._runner.output(self._states[part])

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def extend(self, tokens: Tensor | Sequence[int]) -> None:
        """Append one token to each row: (B,)."""

    @abstractmethod
    def select(self, index: Tensor | Sequence[int]) -> None:
        """Row i becomes a copy of row ``index[i]``; there are ``len(index)`` rows then."""


class CachedRows(Rows):
    """Rows whose keys and values are kept.

    Rows of one group of prefixes lie side by side in the buffers, so a row's *place* there may
    differ from its number. Where steps are static, rows that were dropped keep their places until
    half of them are empty, since fewer rows would be another shape.
    """

    @without_grad()
    def __init__(self, runner: Runner, prefixes: Sequence[Tokens], max_new: int) -> None:
        self._runner = runner
        device = runner.device
        members = group_by_prefix(range(len(prefixes)), lambda row: prefixes[row][:-1])
        self._prompts = [runner.shared_prompt([prefixes[row] for row in rows]) for rows in members]
        rest: list[Tokens] = []
        at: list[int] = []  # of each place, which of the remainders
        counts: list[int] = []  # of each group, how many distinct remainders
        for prompt, rows in zip(self._prompts, members, strict=True):
            distinct: dict[Tokens, int] = {}
            for row in rows:
                remainder = prefixes[row][len(prompt.tokens) :]
                at.append(distinct.setdefault(remainder, len(rest) + len(distinct)))
            rest += distinct
            counts.append(len(distinct))
        tokens = padded(rest, device)
        width = tokens.shape[1]
        last = [n * width + len(r) - 1 for n, r in enumerate(rest)]
        groups = [p.group(n) for p, n in zip(self._prompts, counts, strict=True)]
        cache = PrefixCache(groups)
        states = runner.run_cached(tokens, cache, torch.tensor(last, device=device))
        self._group_of = [n for n, rows in enumerate(members) for _ in rows]  # of each place
        self._set_places([row for rows in members for row in rows])
        self._lengths = [len(rest[i]) for i in at]  # filled slots, of each place
        self._most = width + max_new
        self._step: StaticStep | None = None  # on the present buffers and groups
        self._buffers: list[LayerKV] = cache.suffix
        self._gather(at, min(self._most, width + _FIRST_CAPACITY))
        self._keep(states.index_select(0, torch.tensor(at, device=device)))
        self._cache = BufferedCache(self._groups(), self._buffers)

    def _set_places(self, rows: list[int]) -> None:
        """``rows``: the row at each place; -1: none."""
        self._rows = rows
        self._place_of = {row: place for place, row in enumerate(rows) if row >= 0}
        self._places: Tensor | None = None  # of each row; None: its own number
        if any(row != place for place, row in enumerate(rows)):
            places = [self._place_of[row] for row in range(len(self._place_of))]
            self._places = torch.tensor(places, device=self._runner.device)

    def _keep(self, states: Tensor) -> None:
        """``states``: in the order of the places."""
        self._states = states if self._places is None else states.index_select(0, self._places)

    def _groups(self) -> list[Group]:
        groups = [p.group(self._group_of.count(n)) for n, p in enumerate(self._prompts)]
        return [group for group in groups if group.num_rows]

    def __len__(self) -> int:
        return len(self._place_of)

    @property
    def _is_static(self) -> bool:
        return self._runner.device.type in _STATIC_DEVICES and self._runner.can_record

    @without_grad()
    def extend(self, tokens: Tensor | Sequence[int]) -> None:
        device, filled = self._runner.device, max(self._lengths)
        if filled == self._capacity:
            places = [place for place, row in enumerate(self._rows) if row >= 0]
            self._gather(places, min(max(self._most, filled + 1), 2 * filled))
            self._arrange(places, [self._rows[place] for place in places])
        tokens = torch.as_tensor(tokens, dtype=torch.long, device=device)
        if self._places is not None:
            placed = torch.zeros(len(self._rows), dtype=torch.long, device=device)
            tokens = placed.index_copy_(0, self._places, tokens)
        if self._is_static:
            if self._step is None:
                self._step = StaticStep(self._runner, self._cache, self._lengths)
            # (A copy, as a replay writes to the same place.)
            self._keep(self._step.run(tokens).clone())
        else:
            self._cache.begin(self._lengths, device)
            self._keep(self._runner.run_cached(tokens.unsqueeze(1), self._cache))
        self._lengths = [n + 1 for n in self._lengths]

    @without_grad()
    def select(self, index: Tensor | Sequence[int]) -> None:
        index = [int(i) for i in index]
        sources = [self._place_of[i] for i in index]  # of each new row, the old place
        states = self._states.index_select(0, torch.tensor(index, device=self._states.device))
        if self._is_static and len(set(index)) == len(index) and 2 * len(index) >= len(self._rows):
            rows = [-1] * len(self._rows)
            for row, place in enumerate(sources):
                rows[place] = row
            self._set_places(rows)
        else:
            order = sorted(range(len(index)), key=lambda row: self._group_of[sources[row]])
            places = [sources[row] for row in order]  # of each new place, the old one
            self._move(places)
            self._arrange(places, order)
        self._states = states

    def _arrange(self, places: list[int], rows: list[int]) -> None:
        """Place i now holds what place ``places[i]`` held, and is that of row ``rows[i]``."""
        groups = [self._group_of[place] for place in places]
        same = groups == self._group_of
        self._group_of = groups
        self._lengths = [self._lengths[place] for place in places]
        self._set_places(rows)
        if not same:
            self._cache.groups, self._step = self._groups(), None
            self._cache.prepare(self._runner.device)
        if self._step is not None:
            self._step.move(self._lengths)

    def _move(self, places: list[int]) -> None:
        """The keys and values at place i become those of place ``places[i]``."""
        if len(places) > len(self._rows):
            self._gather(places, self._capacity)
            return
        moved = [pair for pair in enumerate(places) if pair[0] != pair[1]]
        if moved:
            filled = max(self._lengths)
            new, old = torch.tensor(moved, device=self._runner.device).T
            for buffer in itertools.chain(*self._buffers):
                part = buffer[:, :, :filled]
                part.index_copy_(0, new, part.index_select(0, old))
        if len(places) < len(self._rows):
            n = len(places)
            self._buffers[:] = [(k[:n], v[:n]) for k, v in self._buffers]
            self._step = None

    def _gather(self, places: list[int], capacity: int) -> None:
        """The same in new buffers, with room for so many slots: (B, H_kv, capacity, D)."""
        filled = max(self._lengths)
        index = torch.tensor(places, device=self._runner.device)

        def copied(old: Tensor) -> Tensor:
            # Zeros, as 0 times whatever stands in unused memory need not be 0.
            new = old.new_zeros(len(places), old.shape[1], capacity, old.shape[3])
            new[:, :, :filled] = old[:, :, :filled].index_select(0, index)
            return new

        self._capacity, self._step = capacity, None
        self._buffers[:] = [(copied(k), copied(v)) for k, v in self._buffers]


class PlainRows(Rows):
    """Rows without a cache, for models whose attention cannot be reached, and as the reference
    that ``CachedRows`` must equal: every step reads everything anew."""

    def __init__(self, runner: Runner, prefixes: Sequence[Tokens], max_new: int) -> None:
        self._runner = runner
        self._sequences = list(prefixes)
        self._run()

    @without_grad()
    def _run(self) -> None:
        distinct: dict[Tokens, int] = {}
        index = [distinct.setdefault(s, len(distinct)) for s in self._sequences]
        tokens = padded(list(distinct), self._runner.device)
        width = tokens.shape[1]
        last = [n * width + len(s) - 1 for n, s in enumerate(distinct)]
        states = self._runner.run_plain(tokens, torch.tensor(last, device=tokens.device))
        self._states = states.index_select(0, torch.tensor(index, device=tokens.device))

    def __len__(self) -> int:
        return len(self._sequences)

    def extend(self, tokens: Tensor | Sequence[int]) -> None:
        new = [int(t) for t in tokens]
        self._sequences = [(*s, t) for s, t in zip(self._sequences, new, strict=True)]
        self._run()

    def select(self, index: Tensor | Sequence[int]) -> None:
        rows = [int(i) for i in index]
        self._sequences = [self._sequences[i] for i in rows]
        self._states = self._states.index_select(0, torch.tensor(rows, device=self._states.device))
