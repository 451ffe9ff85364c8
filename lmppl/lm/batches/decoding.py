"""Decoding: sequences drawn side by side, one token a step; or all sequences of a site."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lmppl.lm.batches.requests import Draw, Drawn, no_distribution
from lmppl.lm.batches.rows import Rows
from lmppl.lm.meter.work import counting, region
from lmppl.lm.network.runner import Runner, without_grad
from lmppl.lm.tokens.stopping import Stopping, StoppingState
from lmppl.lm.tokens.text import FinishReason


class Decoding:
    """Sequences that grow together.

    ::

        decoding = Decoding([(runner, draw), ...])
        while not decoding.done:
            decoding.step()
            decoding.select(ancestors)      # if particles are resampled here
        drawn = decoding.results()

    Token k of a slot is drawn with the slot's own ``uniforms[k]``, whichever sequence it holds by
    then. Sequences leave the batch as they close, or as their constraint allows no further token.
    Models may differ from slot to slot.

    Raises:
        ValueError: a draw with an empty prefix, that does not fit the model's context, with too few
            uniforms, or with a temperature that is not positive.
    """

    @region("sampled")
    def __init__(self, draws: Sequence[tuple[Runner, Draw]]) -> None:
        self._draws = list(draws)
        for runner, draw in self._draws:
            _check(draw)
            runner.check_request(len(draw.prefix), _longest(draw), draw.name)
        self._uniforms: list[list[float]] = [draw.uniforms.tolist() for _, draw in self._draws]
        self.token_ids: list[list[int]] = [[] for _ in self._draws]  # of each slot
        # Of each token, and of all that its constraint allowed in its place (by rejection, an estimate),
        # under the model, in nats.
        self.log_probs: list[list[float]] = [[] for _ in self._draws]
        self.log_masses: list[list[float]] = [[] for _ in self._draws]
        # Why each slot's sequence closed; None while it is open, and of a dead end.
        self.reasons: list[FinishReason | None] = [None] * len(self._draws)
        self.num_steps = 0
        self._most_steps = max((_longest(draw) for _, draw in self._draws), default=0)
        self._states: list[StoppingState] = [_begin(draw) for _, draw in self._draws]
        self._batches: list[_Batch] = []
        by_model: dict[Runner, list[int]] = {}
        for slot, (runner, _) in enumerate(self._draws):
            by_model.setdefault(runner, []).append(slot)
        for runner, slots in by_model.items():
            requests = {slot: self._draws[slot][1] for slot in slots}
            size = runner.batch_rows(max(len(r.prefix) + _longest(r) for r in requests.values()))
            # Slots whose prefixes are alike stand together, so that a part shares them as well.
            slots = sorted(slots, key=lambda slot: requests[slot].prefix)
            num_parts = -(-len(slots) // size)
            step = -(-len(slots) // num_parts)
            for at in range(0, len(slots), step):
                part = sorted(slots[at : at + step])
                with counting("token", 0, self._most_steps):
                    self._batches.append(_Batch(runner, part, [requests[slot] for slot in part]))
        self._drop_dead_ends()

    def __len__(self) -> int:
        return len(self._draws)

    @property
    def done(self) -> bool:
        """Whether every sequence has closed or is at a dead end."""
        return not self._batches

    def is_dead(self, slot: int) -> bool:
        """Whether the slot's sequence can't match its constraint any more, or has closed without."""
        return not self._states[slot].is_alive or (self.log_masses[slot][-1:] == [-math.inf])

    def draw_of(self, slot: int) -> tuple[Runner, Draw]:
        """What the slot's sequence is drawn from; its uniforms are the ancestor's."""
        return self._draws[slot]

    @region("sampled")
    @without_grad()
    def step(self) -> None:
        """Draw one token for every open sequence.

        Raises:
            ValueError: the logits define no distribution, or a slot that took over a longer sequence
                has no uniform left; the message names the site.
        """
        for batch in self._batches:
            slots = batch.slots
            with counting("token", self.num_steps, self._most_steps):
                batch.advance(self.token_ids)
            for slot, token, log_prob, log_mass in zip(slots, *self._drawn(batch), strict=True):
                if math.isnan(log_prob):
                    raise self._invalid(slot)
                self.log_masses[slot].append(log_mass)
                if log_mass == -math.inf:  # a dead end: nothing was drawn
                    continue
                self.token_ids[slot].append(int(token))
                self.log_probs[slot].append(log_prob)
                with self._naming(slot):
                    reason = self._states[slot].push(int(token))
                if reason is None and len(self.token_ids[slot]) == _longest(self._draws[slot][1]):
                    reason = "length"  # a draw of a given number of tokens, which nothing closes
                self.reasons[slot] = reason
            batch.runner.usage.count(sampled=len(slots))
        self._drop_dead_ends()
        self.num_steps += 1

    def _drawn(self, batch: _Batch) -> list[list[float]]:
        """A token for each row of a batch, its log-probability, and that of all allowed ones."""
        draws = [self._draws[slot][1] for slot in batch.slots]
        numbers = [self._uniform(slot) for slot in batch.slots]
        uniforms = torch.tensor(numbers, dtype=torch.float64)
        temperatures = [draw.temperature for draw in draws]
        by_rejection = [draw.way == "rejection" for draw in draws]
        # The one wait for the device in a step: all at once. (float32 holds every id.)
        found: list[list[float]] = [[0.0] * len(draws) for _ in range(3)]
        if all(by_rejection):
            pass
        elif (allowed := self._allowed(batch)) is None:
            tokens, log_probs = batch.rows.draw(uniforms, temperatures)
            found[:2] = torch.stack([tokens.to(log_probs.dtype), log_probs]).tolist()
        else:
            tokens, *rest = batch.rows.draw_among(allowed, uniforms, temperatures)
            found = torch.stack([tokens.to(rest[0].dtype), *rest]).tolist()
        if any(by_rejection):
            allows = [
                self._allows(slot) if asked else None
                for slot, asked in zip(batch.slots, by_rejection, strict=True)
            ]
            drawn = batch.rows.draw_by_rejection(allows, numbers, temperatures)
            for row, accepted in enumerate(drawn):
                if accepted is not None:
                    for column, value in zip(found, accepted, strict=True):
                        column[row] = value
        return found

    def _allows(self, slot: int) -> Callable[[int], bool]:
        """Whether the constraint of a slot's sequence allows a next token."""
        state = self._states[slot]

        def allows(token: int) -> bool:
            with self._naming(slot):
                return state.allows(token)

        return allows

    def may_close(self, slot: int) -> bool:
        """Whether the slot's sequence is open, has a closing token, and its constraint allows that."""
        stopping, state = self._draws[slot][1].stopping, self._states[slot]
        closing_token = stopping.closing_token
        if state.reason is not None or closing_token is None:
            return False
        return stopping.constraint is None or self._allows(slot)(closing_token)

    def _allowed(self, batch: _Batch) -> Tensor | None:
        """(B, V) bool: the tokens among which each row is drawn by masks; None if those are all."""
        draws = [self._draws[slot][1] for slot in batch.slots]
        masked = [draw.stopping.constraint is not None and draw.way == "masks" for draw in draws]
        if not any(masked):
            return None
        masks = [torch.ones(batch.runner.size, dtype=torch.bool)] * len(draws)
        for row, (slot, draw) in enumerate(zip(batch.slots, draws, strict=True)):
            if masked[row]:
                with self._naming(slot):
                    masks[row] = self._states[slot].mask(steered=draw.steered)
        return torch.stack(masks)

    def _drop_dead_ends(self) -> None:
        """Keep the rows of open sequences alone."""
        for batch in self._batches:
            is_open = []
            for slot in batch.slots:
                with self._naming(slot):
                    is_open.append(self.reasons[slot] is None and not self.is_dead(slot))
            batch.keep([row for row, keeps in enumerate(is_open) if keeps])
        self._batches = [batch for batch in self._batches if batch.slots]

    @region("sampled")
    @without_grad()
    def closing_log_probs(self) -> list[float]:
        """The log-probability (nats) that the next token of each open sequence is its closing
        token; ``-inf`` where it has none, NaN of a sequence that has closed. The next step needs
        the same passes through the model, and gets them for nothing. Raises as ``step`` does."""
        found = [math.nan] * len(self)
        for batch in self._batches:
            batch.advance(self.token_ids)
            draws = [self._draws[slot][1] for slot in batch.slots]
            tokens = [draw.stopping.closing_token for draw in draws]
            temperatures = [draw.temperature for draw in draws]
            allowed = self._allowed(batch)
            log_probs = batch.rows.log_probs(
                [token or 0 for token in tokens], temperatures, allowed
            )
            for slot, token, log_prob in zip(batch.slots, tokens, log_probs.tolist(), strict=True):
                if math.isnan(log_prob):
                    raise self._invalid(slot)
                found[slot] = -math.inf if token is None else log_prob
        return found

    @region("sampled")
    def select(self, ancestors: Sequence[int]) -> None:
        """Slot i becomes a copy of slot ``ancestors[i]``, and keeps its own uniforms.
        ``IndexError``: an ancestor that is no slot; ``ValueError``: not one ancestor a slot."""
        ancestors = [int(a) for a in ancestors]
        if len(ancestors) != len(self):
            raise ValueError(f"{len(ancestors)} ancestors for {len(self)} slots")
        if not all(0 <= a < len(self) for a in ancestors):
            raise IndexError(f"ancestors {ancestors} are not all among the {len(self)} slots")
        self._draws = [self._draws[a] for a in ancestors]
        self.token_ids = [list(self.token_ids[a]) for a in ancestors]
        self.log_probs = [list(self.log_probs[a]) for a in ancestors]
        self.log_masses = [list(self.log_masses[a]) for a in ancestors]
        self.reasons = [self.reasons[a] for a in ancestors]
        self._states = [self._states[a].copy() for a in ancestors]
        for batch in self._batches:
            batch.select(ancestors)
        self._batches = [batch for batch in self._batches if batch.slots]

    def results(self) -> list[Drawn]:
        """The sequences, all of them closed or at dead ends; ``RuntimeError`` if one is open."""
        lengths = [len(ids) for ids in self.token_ids]
        log_probs = _flat(self.log_probs).split(lengths)
        masses = [values[:n] for values, n in zip(self.log_masses, lengths, strict=True)]
        log_masses = _flat(masses).split(lengths)
        drawn = []
        for slot, reason in enumerate(self.reasons):
            draw, is_dead = self._draws[slot][1], self.is_dead(slot)
            if reason is None and not is_dead:
                raise RuntimeError(f"site {draw.name!r}: its sequence in slot {slot} is still open")
            among = None if draw.stopping.constraint is None else log_masses[slot]
            ids = tuple(self.token_ids[slot])
            drawn.append(Drawn(ids, log_probs[slot], reason, not is_dead, among))
        return drawn

    def _uniform(self, slot: int) -> float:
        position = len(self.token_ids[slot])
        uniforms = self._uniforms[slot]
        if position >= len(uniforms):
            raise ValueError(
                f"site {self._draws[slot][1].name!r}: slot {slot} has {len(uniforms)} uniforms, "
                f"and its sequence now needs one for token {position + 1}; give every slot as "
                "many as the largest max_tokens"
            )
        return uniforms[position]

    @contextmanager
    def _naming(self, slot: int) -> Iterator[None]:
        """Let what a constraint raises name the site and the text so far."""
        try:
            yield
        except Exception as error:
            runner, draw = self._draws[slot]
            text = runner.decode([*draw.begun, *self.token_ids[slot]])
            error.add_note(f"raised at site {draw.name!r}, whose text so far is {text!r}")
            raise

    def _invalid(self, slot: int) -> ValueError:
        runner, draw = self._draws[slot]
        ids = self.token_ids[slot]
        return no_distribution(
            f"site {draw.name!r}, token {len(ids) + 1}: the model's logits after "
            f"{runner.decode(ids)!r}"
        )


class _Batch:
    """The open sequences of one model. Row i belongs to ``slots[i]``."""

    def __init__(self, runner: Runner, slots: list[int], draws: list[Draw]) -> None:
        self.runner = runner
        self.slots = slots
        prefixes = [draw.prefix + draw.begun for draw in draws]
        self.rows = Rows.start(runner, prefixes, max(map(_longest, draws)))
        self._read = 0  # drawn tokens of each sequence that the rows have read

    def advance(self, token_ids: list[list[int]]) -> None:
        """Let the rows read the last tokens, which the slots got in the last step."""
        drawn = len(token_ids[self.slots[0]])
        if drawn > self._read:
            self.rows.extend([token_ids[slot][-1] for slot in self.slots])
            self._read = drawn

    def keep(self, open_rows: list[int]) -> None:
        """Drop the other rows. Holes are filled from the end, so that few rows are copied."""
        if len(open_rows) < len(self.slots):
            self._reorder([(self.slots[row], row) for row in _compact(open_rows)])

    def select(self, ancestors: list[int]) -> None:
        """New slots for copies of the rows, each a row."""
        row_of = {slot: row for row, slot in enumerate(self.slots)}
        new = [(slot, row_of[a]) for slot, a in enumerate(ancestors) if a in row_of]
        # One copy of each surviving row stays where it is; the others take the place of dead rows.
        placed = {row: (slot, row) for slot, row in new}
        others = [pair for pair in new if placed[pair[1]] != pair]
        free = (at for at in itertools.count() if at not in placed)
        placed |= dict(zip(itertools.islice(free, len(others)), others, strict=True))
        self._reorder([placed[at] for at in _compact(sorted(placed))])

    def _reorder(self, order: list[tuple[int, int]]) -> None:
        """``order``: of each new row, its slot and which row it is a copy of."""
        self.slots = [slot for slot, _ in order]
        if order:
            self.rows.select([row for _, row in order])


def _compact(rows: list[int]) -> list[int]:
    """The same rows (increasing) in an order that leaves as many as possible in their places."""
    size = len(rows)
    order = list(range(size))
    present = {row for row in rows if row < size}
    late = [row for row in rows if row >= size]
    for hole in (at for at in range(size) if at not in present):
        order[hole] = late.pop()
    return order


def _begin(draw: Draw) -> StoppingState:
    """The state after the tokens that a draw begins with."""
    state = draw.stopping.start()
    for token in draw.begun:
        if state.push(token) is not None:
            raise ValueError(f"site {draw.name!r}: the text that a draw goes on with has closed")
    return state


def _flat(lists: list[list[float]]) -> Tensor:
    """(n,) float32 of all numbers."""
    return torch.tensor(list(itertools.chain(*lists)), dtype=torch.float32)


def _longest(draw: Draw) -> int:
    """The most tokens that are drawn of it: what its site leaves, or one for each uniform."""
    most = draw.stopping.max_tokens
    return draw.uniforms.numel() if most is None else most - len(draw.begun)


def _check(draw: Draw) -> None:
    where = f"site {draw.name!r}: "
    if draw.stopping.closes and draw.stopping.max_tokens is None:
        raise ValueError(where + "a latent text needs max_tokens")
    if not 0 < _longest(draw) <= draw.uniforms.numel():
        raise ValueError(
            where + f"{draw.uniforms.numel()} uniforms for max_tokens={draw.stopping.max_tokens}: "
            "each token takes one"
        )
    if not draw.temperature > 0 or math.isinf(draw.temperature):
        raise ValueError(where + f"temperature={draw.temperature}: it must be positive and finite")


_MOST_LOGITS = 1 << 24  # numbers that are held at once


def _next_log_probs(
    runner: Runner, sequences: list[tuple[int, ...]], temperature: float
) -> Iterator[Tensor]:
    """The log-probabilities of the token after each sequence, (V,) float32, made for some at a time."""
    step = max(1, _MOST_LOGITS // runner.size)
    for at in range(0, len(sequences), step):
        with counting("text", at, len(sequences)):
            logits = Rows.start(runner, sequences[at : at + step], 1).logits
        yield from torch.log_softmax(logits.float() / temperature, -1).cpu()


def _surpasses(
    runner: Runner,
    prefix: tuple[int, ...],
    stopping: Stopping,
    temperature: float,
    limit: int,
) -> bool:
    """Whether it is seen in a few passes that a site without a constraint has more than ``limit``
    sequences of positive probability.

    Each token of positive probability begins one at least. So every open text that is read adds as many
    as it has such tokens, less one; depth first, only so many texts are read as may be needed.
    """
    count = 1
    level: list[tuple[tuple[int, ...], StoppingState]] = [((), stopping.start())]
    while level:
        needed = (limit - count) // max(runner.size - 1, 1) + 1
        sequences = [prefix + ids for ids, _ in level[:needed]]
        following: list[tuple[tuple[int, ...], StoppingState]] = []
        log_probs = _next_log_probs(runner, sequences, temperature)
        for (ids, state), row in zip(level, log_probs, strict=False):
            possible = torch.nonzero(row > -torch.inf).flatten()
            count += max(len(possible), 1) - 1
            if count > limit:
                return True
            for token in possible.tolist():
                if len(following) > (limit - count) // max(runner.size - 1, 1):
                    break
                after = state.copy()
                if after.push(token) is None:
                    following.append(((*ids, token), after))
        level = following
    return False


@region("read")
def enumerate_sequences(
    runner: Runner,
    prefix: tuple[int, ...],
    stopping: Stopping,
    temperature: float,
    *,
    limit: int,
    renormalised: bool = False,
) -> list[tuple[tuple[int, ...], Tensor]] | None:
    """Every closed sequence of positive probability that matches the constraint, with its log-density
    (0-d float32, nats), found breadth first, a pass a token; None if there are more than ``limit``.
    ``renormalised``: each token's density is that among the tokens which the constraint allows.

    Raises:
        ValueError: the context is too short, or the logits define no distribution.
    """
    runner.check_request(len(prefix), stopping.max_tokens or 0, "")
    may_surpass = stopping.constraint is None and runner.size ** (stopping.max_tokens or 0) > limit
    if may_surpass and _surpasses(runner, prefix, stopping, temperature, limit):
        return None
    complete: list[tuple[tuple[int, ...], Tensor]] = []
    nothing: tuple[int, ...] = ()
    level = [(nothing, torch.zeros(()), stopping.start())]
    while level:
        log_probs = _next_log_probs(runner, [prefix + ids for ids, _, _ in level], temperature)
        following = []
        for (ids, log_prob, state), row in zip(level, log_probs, strict=True):
            if bool(row.isnan().any()):
                raise no_distribution(f"the model's logits after {runner.decode(ids)!r}")
            if stopping.constraint is not None:
                row = row.masked_fill(~state.mask(steered=not renormalised), -torch.inf)
                row = torch.log_softmax(row, -1) if renormalised else row
            for token in torch.nonzero(row > -torch.inf).flatten().tolist():
                after = state.copy()
                longer, total = (*ids, token), log_prob + row[token]
                if after.push(token) is None:
                    following.append((longer, total, after))
                elif after.matches:
                    complete.append((longer, total))
                if len(complete) + len(following) > limit:
                    return None
        level = following
    return complete
