"""A finite automaton over bytes whose language contains that of a regular expression.

    positions: every set of bytes in the pattern's tree, and END        (Glushkov, 1961)
    follow[p] = positions that may come right after p
    state     = set of positions that may come next; END among them: the text matches
    move(state, byte) = union of follow[p] over p in state that hold the byte

States are made when they are first reached. Positions from which END cannot be reached are left
out, so a state with any position left can still match, and the empty one is ``DEAD``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import numpy as np

from lmppl.lm.tokens.constraints.regex_syntax import Alternatives, Byte, Node, Repeated, Sequence

DEAD: Final = -1  # the state from which no match can follow
END: Final = 0  # the position after the last byte of a match
_MOST_POSITIONS = 6_000
_MOST_PAIRS = 100_000  # of a position and one that follows it
_LONGEST_COUNTS = 1_000, 100, 10, 1  # tried in turn: a longer counted repetition has no end

Positions = frozenset[int]
_NONE: Positions = frozenset()


class TooLarge(ValueError):
    """The automaton would have too many positions, or too many states."""


class ByteAutomaton:
    """A deterministic automaton that is built as far as it is used.

    Args:
        tree: of the pattern.

    Raises:
        TooLarge: more than 6,000 positions or 100,000 pairs of successive ones, even if counted
            repetitions have no end.

    Attributes:
        start: the state before the first byte; ``DEAD`` if nothing can match.
        counts: whether every repetition ends where it does in the tree, so that the languages are equal.
    """

    def __init__(self, tree: Node) -> None:
        graph = _graph(tree)
        self.counts = graph.counts
        self._classes = _Classes(graph.bits)
        within = {bits: self._classes.within(bits) for bits in set(graph.bits)}
        self._holds = [within[bits] for bits in graph.bits]
        self._predecessors: list[list[int]] = [[] for _ in graph.bits]
        for position, following in enumerate(graph.follow):
            for after in following:
                self._predecessors[after].append(position)
        self._bits = graph.bits
        live = frozenset(self.distances(lambda bits: True))
        self._follow = [live & following for following in graph.follow]
        self._sets: list[Positions] = []
        self._number: dict[Positions, int] = {}
        self._rows: list[list[int] | None] = []
        self.start = self._state(live & graph.first)

    def __len__(self) -> int:
        """How many states have been made."""
        return len(self._sets)

    def positions(self, state: int) -> Positions:
        """The positions that may come next."""
        return _NONE if state == DEAD else self._sets[state]

    def after(self, state: int, data: bytes) -> int:
        """The state after some bytes; ``DEAD`` if no match can follow."""
        for byte in data:
            if state == DEAD:
                break
            state = self._row(state)[self._classes.of_byte[byte]]
        return state

    def table(self, most_states: int) -> tuple[np.ndarray, np.ndarray]:
        """All states that the start reaches: the next ones (N + 1, C) by classes of bytes, where
        row N, which is also row ``DEAD``, is dead; and the class of each byte (256,).

        Raises:
            TooLarge: there are more than ``most_states``.
        """
        state = 0
        while state < len(self._sets):
            if len(self._sets) > most_states:
                raise TooLarge(f"the automaton has more than {most_states} states")
            self._row(state)
            state += 1
        dead = [DEAD] * self._classes.count
        return np.array([*self._rows, dead], np.int32), np.array(self._classes.of_byte, np.int32)

    def distances(self, usable: Callable[[int], bool]) -> dict[int, int]:
        """The least number of bytes from each position to ``END``, where a position counts only if
        ``usable`` of its set of bytes (as bits); positions without a way are left out."""
        distance, queue = {END: 0}, deque([END])
        while queue:
            position = queue.popleft()
            for before in self._predecessors[position]:
                if before not in distance and usable(self._bits[before]):
                    distance[before] = distance[position] + 1
                    queue.append(before)
        return distance

    def farthest(self, values: Mapping[int, float]) -> dict[int, float]:
        """For each position the largest of ``values`` at positions that it reaches, itself too."""
        largest: dict[int, float] = {}
        for position in sorted(values, key=lambda p: -values[p]):
            stack = [position]
            while stack:
                reaching = stack.pop()
                if reaching not in largest:
                    largest[reaching] = values[position]
                    stack.extend(self._predecessors[reaching])
        return largest

    def _row(self, state: int) -> list[int]:
        """The states after each class of bytes."""
        row = self._rows[state]
        if row is None:
            following: list[set[int]] = [set() for _ in range(self._classes.count)]
            for position in self._sets[state]:
                for byte_class in self._holds[position]:
                    following[byte_class] |= self._follow[position]
            row = self._rows[state] = [self._state(frozenset(f)) for f in following]
        return row

    def _state(self, positions: Positions) -> int:
        if not positions:
            return DEAD
        number = self._number.setdefault(positions, len(self._sets))
        if number == len(self._sets):
            self._sets.append(positions)
            self._rows.append(None)
        return number


class _Classes:
    """Bytes that no set tells apart are of one class."""

    def __init__(self, sets: Iterable[int]) -> None:
        classes = [(1 << 256) - 1]
        for bits in set(sets):
            parts = [part for c in classes for part in (c & bits, c & ~bits)]
            classes = [part for part in parts if part]
        self._classes = classes
        self.count = len(classes)
        self.of_byte = [0] * 256
        for number, bits in enumerate(classes):
            for byte in range(256):
                if bits >> byte & 1:
                    self.of_byte[byte] = number

    def within(self, bits: int) -> list[int]:
        """The classes that a set consists of."""
        return [number for number, c in enumerate(self._classes) if c & bits]


def _graph(tree: Node) -> _Graph:
    for longest in _LONGEST_COUNTS:
        try:
            return _Graph(tree, longest)
        except TooLarge as error:
            reason = error
    raise reason


class _Graph:
    """Positions and what follows them; counts above ``longest`` are read as repetitions without end.

    Attributes:
        bits: the set of bytes of each position; none for ``END``.
        follow: the positions that may come right after each.
        first: the positions that may come first.
        counts: whether no count is above ``longest``.
    """

    def __init__(self, tree: Node, longest: int) -> None:
        self._longest = longest
        self.counts = True
        self._pairs = 0
        self.bits = [0]
        self.follow: list[set[int]] = [set()]
        first, last, nullable = self._add(tree)
        self._join(last, frozenset((END,)))
        self.first = first | {END} if nullable else first

    def _add(self, node: Node) -> tuple[Positions, Positions, bool]:
        """Add a tree. Returns its first and its last positions, and whether it may be empty."""
        match node:
            case Byte(bits):
                return self._add_byte(bits)
            case Sequence(parts):
                return self._add_sequence(parts)
            case Alternatives(parts):
                added = [self._add(part) for part in parts]
                first = _NONE.union(*(f for f, _, _ in added))
                last = _NONE.union(*(e for _, e, _ in added))
                return first, last, any(nullable for _, _, nullable in added)
            case Repeated(part, least, most):
                return self._add_repeated(part, least, most)

    def _add_byte(self, bits: int) -> tuple[Positions, Positions, bool]:
        self.bits.append(bits)
        self.follow.append(set())
        if len(self.bits) > _MOST_POSITIONS:
            raise TooLarge(f"the pattern has more than {_MOST_POSITIONS} positions")
        position = frozenset((len(self.bits) - 1,))
        return position, position, False

    def _add_sequence(self, parts: Iterable[Node]) -> tuple[Positions, Positions, bool]:
        first, last, nullable = _NONE, _NONE, True
        for part in parts:
            part_first, part_last, part_nullable = self._add(part)
            self._join(last, part_first)
            first = first | part_first if nullable else first
            last = last | part_last if part_nullable else part_last
            nullable = nullable and part_nullable
        return first, last, nullable

    def _add_repeated(
        self, part: Node, least: int, most: int | None
    ) -> tuple[Positions, Positions, bool]:
        if max(least, most or 0) > self._longest:
            least, most = min(least, self._longest), None
            self.counts = False
        if most is None:
            first, last, nullable = self._add_sequence([part] * (least - 1))
            looped = self._add(part)
            self._join(last | looped[1], looped[0])
            first = first | looped[0] if nullable else first
            skipped = least == 0 or looped[2]
            return first, last | looped[1] if skipped else looped[1], nullable and skipped
        first, last, nullable = self._add_sequence([part] * least)
        ends = last  # of any number of copies; each may come only right after the one before
        for count in range(most - least):
            more = self._add(part)
            self._join(last, more[0])
            first = first | more[0] if nullable and count == 0 else first
            last = more[1]
            ends = ends | last
        return first, ends, nullable

    def _join(self, before: Positions, after: Positions) -> None:
        self._pairs += len(before) * len(after)
        if self._pairs > _MOST_PAIRS:
            raise TooLarge(f"the pattern has more than {_MOST_PAIRS} pairs of positions")
        for position in before:
            self.follow[position] |= after
