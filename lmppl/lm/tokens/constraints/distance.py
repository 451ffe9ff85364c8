"""Distance: how many tokens a text still needs before it can match a regular expression.

A matcher of a grammar tells which tokens can go on, not whether a match can be reached within the
tokens that are left. Here a finite automaton does (:mod:`.byte_automaton`). Its language contains
that of the regular expression, so what it rules out is ruled out for certain.

    needed[s] = 0 if s matches, else 1 + min over tokens of needed[state after s and the token]

    within(s, left):
        1  bytes decide: every state that s reaches is spelled by at most ``left`` tokens of one
           byte each: nothing is ruled out
        2  else find all states, and the state after each token (once for a pattern, breadth-first
           backwards from the matching states); a token is ruled out if needed[after it] > left

Step 1 costs a look-up, so a text of which much is left costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lmppl.lm.tokens.constraints.byte_automaton import DEAD, END, ByteAutomaton, TooLarge
from lmppl.lm.tokens.constraints.regex_syntax import Sequence, UnknownSyntax, any_bytes, parse
from lmppl.lm.tokens.vocabulary import Vocabulary

_MOST_STEPS = 100_000_000  # of states times beginnings of tokens: about a second
_MOST_STATES = 2_000


class Distance:
    """How many tokens a text needs at least to match a regular expression (a lower bound).

    It is exact where the pattern is read exactly (see :mod:`.regex_syntax`). The whole text must
    match. States are numbers; ``DEAD`` (-1) is the one from which no match can follow.

    Attributes:
        start: the state of the empty text.
        is_exact_in_ascii: whether texts in ASCII that have come to the same state may go on alike.
    """

    def __init__(
        self, automaton: ByteAutomaton, vocabulary: Vocabulary, is_exact_in_ascii: bool
    ) -> None:
        """See :meth:`of`."""
        self._automaton = automaton
        self.is_exact_in_ascii = is_exact_in_ascii and automaton.counts
        self._tokens = _TokenTrie.of(vocabulary)
        self.start = automaton.start
        single = self._tokens.single_bytes
        self._bytes_needed = automaton.distances(lambda bits: True)
        spelled = automaton.distances(lambda bits: bool(bits & single))
        self._most_needed = {p: spelled.get(p, math.inf) for p in self._bytes_needed}
        self._most_needed_later = automaton.farthest(self._most_needed)
        self._bounds: dict[int, float] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Distance:
        return self  # what it computes later does not change what it says

    @staticmethod
    def of(pattern: str, vocabulary: Vocabulary, *, cut: bool = False) -> Distance | None:
        """The distances to a pattern in Rust's syntax (as llguidance reads it).

        Args:
            pattern: the regular expression.
            vocabulary: of the model.
            cut: whether a stop string may cut the text, so that one whose beginning matches counts
                as a match too.

        Returns:
            None if the pattern has syntax that is not read here, or more than 6,000 sets of bytes,
            or if the text of this vocabulary is not the concatenation of its tokens' bytes.
        """
        if not vocabulary.concatenates:
            return None
        try:
            syntax = parse(pattern, _TokenTrie.of(vocabulary).characters)
            tree = Sequence((syntax.tree, any_bytes())) if cut else syntax.tree
            return Distance(ByteAutomaton(tree), vocabulary, syntax.is_exact_in_ascii)
        except (UnknownSyntax, TooLarge):
            return None

    def after(self, state: int, data: bytes) -> int:
        """The state after some more bytes of text; ``DEAD`` if no match can follow."""
        return self._automaton.after(state, data)

    def needed(self, state: int) -> float:
        """The least number of further tokens to a match: 0 if the text matches now, infinity if no
        tokens lead to a match. A lower bound for automata of too many states (see ``within``)."""
        positions = self._automaton.positions(state)
        if END in positions:
            return 0.0
        if state == DEAD:
            return math.inf
        if self._tables is not None:
            return float(self._tables.needed[state])
        fewest_bytes = min(self._bytes_needed[p] for p in positions)
        return float(math.ceil(fewest_bytes / self._tokens.longest))

    def can_match_within(self, state: int, left: int) -> bool:
        """Whether a match within ``left`` further tokens is not ruled out."""
        positions = self._automaton.positions(state)
        if any(self._most_needed[p] <= left for p in positions):
            return True
        return self.needed(state) <= left

    def within(self, state: int, left: int) -> Tensor | None:
        """The tokens after which a match within ``left`` further tokens is not ruled out.

        Returns:
            (V,) bool, false for special tokens and EOS, which add no text to match. None: of the
            tokens that can go on at all, none is ruled out; or the automaton has too many states
            to tell (2,000, or 100 million divided by the number of distinct beginnings of tokens).
        """
        if self._later_bound(state) <= left or self._tables is None:
            return None
        if self._tables.farthest[state] <= left:
            return None
        return torch.from_numpy(_needed_after(self, state) <= left)

    def _later_bound(self, state: int) -> float:
        """At most so many tokens are needed after any token from here that can go on."""
        bound = self._bounds.get(state)
        if bound is None:
            later = (self._most_needed_later[p] for p in self._automaton.positions(state))
            bound = self._bounds[state] = max(later, default=0.0)
        return bound

    @cached_property
    def _tables(self) -> _Tables | None:
        most = min(_MOST_STATES, _MOST_STEPS // self._tokens.size)
        try:
            return _Tables(self._automaton, self._tokens, most)
        except TooLarge:
            return None


@lru_cache(maxsize=256)  # of all patterns together, as each takes 4 bytes a token
def _needed_after(distance: Distance, state: int) -> np.ndarray:
    """(V,) how many tokens are needed after each token; infinity for those that can't go on."""
    tables = distance._tables
    assert tables is not None
    return tables.needed[tables.after_tokens(state)]


@dataclass(frozen=True)
class Place:
    """Where a text has come to on its way to a match.

    Attributes:
        distance: to the match.
        state: of the text, by ``distance``.
    """

    distance: Distance
    state: int

    @staticmethod
    def at_start(distance: Distance) -> Place:
        """That of the empty text."""
        return Place(distance, distance.start)

    def after(self, data: bytes) -> Place:
        """Where it comes to by some more bytes."""
        return Place(self.distance, self.distance.after(self.state, data))

    def needed(self) -> float:
        """See ``Distance.needed``."""
        return self.distance.needed(self.state)

    def can_match_within(self, left: int) -> bool:
        """See ``Distance.can_match_within``."""
        return self.distance.can_match_within(self.state, left)

    def within(self, left: int) -> Tensor | None:
        """See ``Distance.within``."""
        return self.distance.within(self.state, left)


class _Tables:
    """What tokens do in every state of an automaton.

    Attributes:
        needed: (N + 1,) tokens to a match from each state; infinite for the dead one, the last.
        farthest: (N + 1,) the most tokens needed after any token that can go on.
    """

    def __init__(self, automaton: ByteAutomaton, tokens: _TokenTrie, most_states: int) -> None:
        self._tokens = tokens
        self._next, self._byte_class = automaton.table(most_states)
        states = len(self._next) - 1
        follows = np.zeros((states + 1, states + 1), bool)  # by one token
        for state in range(states):
            follows[state, self.after_tokens(state)] = True
        follows[:, DEAD] = False
        self.needed = np.full(states + 1, np.inf, np.float32)
        reached = np.array([END in automaton.positions(s) for s in range(states)] + [False])
        count = 0
        while reached.any():
            self.needed[reached] = count
            count += 1
            reached = follows[:, reached].any(1) & np.isinf(self.needed)
        self.farthest = np.where(follows, self.needed, 0.0).max(1)

    def after_tokens(self, state: int) -> np.ndarray:
        """(V,) the state after each token."""
        return self._tokens.after(state, self._next, self._byte_class)


class _TokenTrie:
    """The tokens that add text, as a trie of their bytes: a beginning that many share is walked
    once. Nodes are numbered by depth, the root first; one more than there are stands for tokens
    that add no text.

    Attributes:
        size: number of nodes.
        longest: number of bytes of the longest token.
        single_bytes: the bytes that are tokens of their own, as bits.
        characters: those beyond ASCII that are whole in some token.
    """

    _known: WeakKeyDictionary[Vocabulary, _TokenTrie] = WeakKeyDictionary()

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> _TokenTrie:
        """The trie of a vocabulary, which is made once."""
        trie = cls._known.get(vocabulary)
        if trie is None:
            trie = cls._known[vocabulary] = cls(vocabulary)
        return trie

    def __init__(self, vocabulary: Vocabulary) -> None:
        is_text = vocabulary.text_tokens.tolist()
        texts = [vocabulary.token_bytes(t) if text else b"" for t, text in enumerate(is_text)]
        self.longest = max(map(len, texts), default=0) or 1
        self.single_bytes = 0
        for text in texts:
            if len(text) == 1:
                self.single_bytes |= 1 << text[0]
        whole = b"".join(text for text in texts if not text.isascii()).decode(errors="ignore")
        self.characters = frozenset(c for c in whole if not c.isascii())
        node = np.zeros(len(texts), np.int64)  # where each token has come to; the root is 0
        lengths = np.array([len(text) for text in texts])
        levels: list[tuple[np.ndarray, np.ndarray]] = []  # per depth: parents and bytes
        self.size = 1
        for depth in range(self.longest):
            longer = np.flatnonzero(lengths > depth)
            byte = np.array([texts[t][depth] for t in longer])
            edges, number = np.unique(node[longer] * 256 + byte, return_inverse=True)
            levels.append((edges // 256, edges % 256))
            node[longer] = self.size + number
            self.size += len(edges)
        node[lengths == 0] = self.size
        self._levels = levels
        self._node = node

    def after(self, state: int, table: np.ndarray, byte_class: np.ndarray) -> np.ndarray:
        """(V,) the state after each token, by a table of states (N + 1, C) by classes of bytes."""
        states = np.full(self.size + 1, DEAD, table.dtype)
        states[0] = state
        end = 1
        for parents, bytes_ in self._levels:
            start, end = end, end + len(parents)
            states[start:end] = table[states[parents], byte_class[bytes_]]
            if states[start:end].max() == DEAD:
                break
        return states[self._node]
