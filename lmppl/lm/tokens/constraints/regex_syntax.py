"""The syntax of Rust's regular expressions, as far as it is common, read into a tree over bytes.

The tree's language *contains* that of the pattern: what is hard to tell exactly is read as more than
it is, never as less. Exact are literals, escapes, classes of listed characters (their negation,
union, intersection and difference too), ``.``, ``\\s``, groups, alternatives and repetitions. Read as
more are: ``\\d``, ``\\w`` and general categories such as ``\\p{Lu}``, which are exact in ASCII and for
*familiar* characters, and may hold others; any other ``\\p{..}``, which holds every character; a class
without regard to case, which if it holds any character beyond ASCII holds all; anchors and word
boundaries, which always hold; and a repetition counted beyond a limit, which has no end. A text is
in UTF-8.

Grammar of a pattern, after https://docs.rs/regex/latest/regex/#syntax::

    alternatives = sequence ("|" sequence)*
    sequence     = (atom quantifier*)*
    quantifier   = ("*" | "+" | "?" | "{" m ["," [n]] "}") ["?"]
    atom         = "(" [flags or name] alternatives ")" | class | "." | "^" | "$" | escape | literal
    class        = "[" ["^"] item* (("&&" | "--" | "~~") item*)* "]"
    item         = class | "[:" ["^"] name ":]" | escape | literal ["-" literal]
"""

from __future__ import annotations

import re
import string
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby

Ranges = tuple[tuple[int, int], ...]  # of code points, sorted and disjoint, both ends included


class UnknownSyntax(ValueError):
    """The pattern uses syntax that is not read here."""


@dataclass(frozen=True)
class Byte:
    """One byte of a set, given as bits: bit b stands for byte b."""

    bits: int


@dataclass(frozen=True)
class Sequence:
    """Its parts one after another; nothing where there are none."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Alternatives:
    """One of its parts; no text at all where there are none."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeated:
    """``part`` at least ``least`` and at most ``most`` times; no end if ``most`` is None."""

    part: Node
    least: int
    most: int | None


Node = Byte | Sequence | Alternatives | Repeated


@dataclass(frozen=True)
class Syntax:
    """A pattern, read.

    Attributes:
        tree: its language contains the pattern's.
        is_exact_in_ascii: whether all that was read as more differs in characters beyond ASCII alone:
            two texts in ASCII that may go on alike by the tree may do so by the pattern.
    """

    tree: Node
    is_exact_in_ascii: bool


def parse(pattern: str, familiar: frozenset[str] = frozenset()) -> Syntax:
    """A pattern as a tree.

    Args:
        pattern: in the syntax of Rust's regular expressions.
        familiar: characters beyond ASCII of which it should be exact whether ``\\d``, ``\\w`` and
            ``\\p{..}`` hold them.

    Raises:
        UnknownSyntax: syntax that is not read here, or that Rust's regular expressions lack.
    """
    parser = _Parser(pattern, familiar)
    tree = parser.alternatives()
    if not parser.ended:
        raise UnknownSyntax(f"unopened group at {parser.at} of {pattern!r}")
    return Syntax(tree, parser.is_exact_in_ascii)


def any_bytes() -> Node:
    """Any string of bytes."""
    return Repeated(Byte((1 << 256) - 1), 0, None)


# Sets of characters.


def _normal(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def _complement(ranges: Ranges) -> Ranges:
    """All characters (code points but surrogates) that are not in ``ranges``."""
    gaps, start = [], 0
    for low, high in _normal((*ranges, (0xD800, 0xDFFF))):
        if start < low:
            gaps.append((start, low - 1))
        start = high + 1
    if start <= 0x10FFFF:
        gaps.append((start, 0x10FFFF))
    return tuple(gaps)


@dataclass(frozen=True)
class Characters:
    """A set of characters that is known between two bounds, so that its complement is too.

    ``least`` holds only characters of the set, ``most`` holds all of them.
    """

    least: Ranges
    most: Ranges

    @property
    def is_exact_in_ascii(self) -> bool:
        """Whether it is known of every character in ASCII if it is in the set."""
        beyond = Characters.exactly(*_BEYOND_ASCII)
        return (self | beyond).least == (self | beyond).most

    @staticmethod
    def exactly(*ranges: tuple[int, int]) -> Characters:
        characters = _complement(_complement(ranges))  # less the surrogates
        return Characters(characters, characters)

    def __or__(self, other: Characters) -> Characters:
        return Characters(_normal(self.least + other.least), _normal(self.most + other.most))

    def __invert__(self) -> Characters:
        return Characters(_complement(self.most), _complement(self.least))

    def __and__(self, other: Characters) -> Characters:
        return ~(~self | ~other)

    def without_case(self) -> Characters:
        """The set with the other cases of its characters; beyond ASCII it may hold any of them."""
        least = _normal((*self.least, *_other_cases(self.least)))
        most = _normal((*self.most, *_other_cases(self.most)))
        if any(high > 127 or _overlap(low, high, "kKsS") for low, high in most):
            most = _normal((*most, *_BEYOND_ASCII))
        if any(low <= 0x212A <= high for low, high in self.most):  # the Kelvin sign
            most = _normal((*most, *_points("kK")))
        if any(low <= 0x017F <= high for low, high in self.most):  # the long s
            most = _normal((*most, *_points("sS")))
        return Characters(least, most)


@cache
def _categories() -> list[tuple[int, int, str]]:
    """First and last characters of runs of one general category, in the first two planes."""
    runs, start = [], 0
    for category, members in groupby(map(unicodedata.category, map(chr, range(0x20000)))):
        end = start + sum(1 for _ in members)
        runs.append((start, end - 1, category))
        start = end
    return runs


def _simplified(ranges: Ranges, familiar: frozenset[str]) -> Ranges:
    """Fewer and rounder ranges that hold all of ``ranges``, and of characters in ASCII or ``familiar``
    no others: in UTF-8 they have a small tree."""
    lows = [low for low, _ in ranges]

    def is_new(point: int) -> bool:
        place = bisect_right(lows, point) - 1
        return place < 0 or ranges[place][1] < point

    spared = sorted(filter(is_new, {*range(128), *map(ord, familiar)}))

    def is_free(low: int, high: int) -> bool:
        return bisect_left(spared, low) == bisect_right(spared, high)

    joined: list[tuple[int, int]] = []
    for low, high in ranges:
        for size in (1 << 18, 1 << 12, 1 << 6):  # blocks of equal first bytes
            low = low & -size if is_free(low & -size, low - 1) else low
            end = min(high | (size - 1), 0x10FFFF)
            high = end if is_free(high + 1, end) else high
        if joined and is_free(joined[-1][1] + 1, low - 1):
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return _complement(_complement(_normal(joined)))  # less the surrogates


def _points(characters: Iterable[str]) -> list[tuple[int, int]]:
    return [(ord(c), ord(c)) for c in characters]


def _overlap(low: int, high: int, characters: str) -> bool:
    return any(low <= ord(c) <= high for c in characters)


def _other_cases(ranges: Ranges) -> list[tuple[int, int]]:
    """The other case of each ASCII letter in ``ranges``."""
    return _points(c.swapcase() for c in string.ascii_letters for r in ranges if _overlap(*r, c))


_BEYOND_ASCII = _complement(((0, 127),))
_ANY = Characters.exactly(*_complement(()))
_SPACE = Characters.exactly(  # White_Space of Unicode, which Python's \s differs from
    (9, 13), (32, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
    (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000),
)  # fmt: skip
_POSIX = {
    "alnum": string.ascii_letters + string.digits,
    "alpha": string.ascii_letters,
    "ascii": "".join(map(chr, range(128))),
    "blank": " \t",
    "cntrl": "".join(map(chr, (*range(32), 127))),
    "digit": string.digits,
    "graph": "".join(map(chr, range(33, 127))),
    "lower": string.ascii_lowercase,
    "print": "".join(map(chr, range(32, 127))),
    "punct": string.punctuation,
    "space": "\t\n\v\f\r ",
    "upper": string.ascii_uppercase,
    "word": string.ascii_letters + string.digits + "_",
    "xdigit": string.hexdigits,
}
_CONTROLS = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_CATEGORIES = frozenset((
    "L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc", "Pd",
    "Ps", "Pe", "Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "Cc", "Cf",
))  # fmt: skip


@lru_cache(maxsize=64)
def _of_categories(names: str, also: Ranges, familiar: frozenset[str]) -> Characters:
    """The characters of general categories, given by the beginnings of their names.

    Exact in ASCII and for familiar characters, but that Rust may know characters that Python does
    not: the set may hold those that are unassigned, or in a plane above the first two.

    Args:
        names: of the categories, separated by spaces.
        also: characters that it holds too.
        familiar: see ``parse``.
    """
    starts = tuple(names.split())
    runs = [(low, high) for low, high, name in _categories() if name.startswith(starts)]
    unknown = [(low, high) for low, high, name in _categories() if name == "Cn"]
    certain = _normal((*runs, *also))
    possible = _normal((*certain, *unknown, (0x20000, 0x10FFFF)))
    least = _complement(_simplified(_complement(certain), familiar))
    return Characters(least, _simplified(possible, familiar))


_JOINERS = ((0x200C, 0x200D),)
_CIRCLED = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))  # letters


def _perl(name: str, familiar: frozenset[str]) -> Characters:
    """What ``\\d``, ``\\s`` or ``\\w`` holds."""
    if name == "d":
        return _of_categories("Nd", (), familiar)
    if name == "w":
        return _of_categories("L M Nd Nl Pc", (*_JOINERS, *_CIRCLED), familiar)
    return _SPACE


def _property(name: str, familiar: frozenset[str]) -> Characters:
    """What ``\\p{name}`` holds: any character unless it names a general category."""
    if name in _CATEGORIES:
        return _of_categories(name, (), familiar)
    return Characters((), _ANY.most)


# From characters to bytes.


@lru_cache(maxsize=256)
def _in_utf8(ranges: Ranges) -> Node:
    """The tree of the UTF-8 bytes of one character in ``ranges``."""
    return _by_last_byte([s for low, high in ranges for s in _byte_ranges(low, high)])


def _byte_ranges(low: int, high: int) -> list[tuple[int, ...]]:
    """The characters from ``low`` to ``high`` as sequences of sets of bytes (in bits)."""
    for last in (0x7F, 0x7FF, 0xFFFF):  # the last characters of one, two and three bytes
        if low <= last < high:
            return _byte_ranges(low, last) + _byte_ranges(last + 1, high)
    if high > 0x7F:
        for digits in (6, 12, 18):
            rest = (1 << digits) - 1
            if low | rest == high | rest:
                continue  # alike in all that stands before these digits
            if low & rest:
                return _byte_ranges(low, low | rest) + _byte_ranges((low | rest) + 1, high)
            if high & rest != rest:
                return _byte_ranges(low, (high & ~rest) - 1) + _byte_ranges(high & ~rest, high)
    pairs = zip(chr(low).encode(), chr(high).encode(), strict=True)
    return [tuple((1 << last + 1) - (1 << first) for first, last in pairs)]


def _by_last_byte(sequences: list[tuple[int, ...]]) -> Node:
    """Alternatives of sequences of sets of bytes; equal ends are shared."""
    single, before = 0, dict[int, list[tuple[int, ...]]]()
    for *head, last in sequences:
        if head:
            before.setdefault(last, []).append(tuple(head))
        else:
            single |= last
    parts: list[Node] = [Byte(single)] if single else []
    parts += [Sequence((_by_last_byte(heads), Byte(last))) for last, heads in before.items()]
    return parts[0] if len(parts) == 1 else Alternatives(tuple(parts))


# The parser.

_QUANTIFIER = re.compile(r"([*+?]|\{\s*(\d+)\s*(,?)\s*(\d*)\s*\})\??")
_GROUP = re.compile(r"\?(?:P?<[^\W\d][\w.\[\]]*>|(?P<flags>[imsuUR]*(?:-[imsUR]+)?)(?P<end>[:)]))")
_CODE = re.compile(r"x\{([0-9A-Fa-f]+)\}|x([0-9A-Fa-f]{2})|[uU]\{([0-9A-Fa-f]+)\}"
                   r"|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})")  # fmt: skip
_PROPERTY = re.compile(r"[pP](?:\{([^}]*)\}|([A-Za-z]))")
_POSIX_CLASS = re.compile(r"\[:(\^?)(\w+):\]")
_BOUNDARY = re.compile(r"[AzB<>]|b(\{[a-z-]+\})?")
_DEEPEST = 50  # groups within groups


class _Parser:
    """A recursive descent over one pattern; ``at`` is where it has come to, ``is_exact_in_ascii`` as in
    ``Syntax``."""

    def __init__(self, pattern: str, familiar: frozenset[str]) -> None:
        self.pattern = pattern
        self._familiar = familiar
        self.at = 0
        self.is_exact_in_ascii = True
        self._ignore_case = self._dot_all = False
        self._depth = 0

    @property
    def ended(self) -> bool:
        return self.at == len(self.pattern)

    def alternatives(self) -> Node:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else Alternatives(tuple(parts))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while not self.ended and self._next not in "|)":
            part = self._atom()
            while quantifier := _QUANTIFIER.match(self.pattern, self.at):
                self.at = quantifier.end()
                part = Repeated(part, *_bounds(quantifier))
            parts.append(part)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _atom(self) -> Node:
        if self._take("("):
            return self._group()
        if self._take("["):
            return self._one_of(self._class())
        if self._take("."):
            return self._one_of(_ANY if self._dot_all else ~Characters.exactly((10, 10)))
        if self._take("^") or self._take("$"):
            return self._place()
        if self._take("\\"):
            boundary = _BOUNDARY.match(self.pattern, self.at)
            if boundary:
                self.at = boundary.end()
                return self._place()
            return self._one_of(self._escape())
        if self._next in "*+?{":
            raise self._unknown("a repetition of nothing")
        return self._one_of(self._characters(self._take_any()))

    def _one_of(self, characters: Characters) -> Node:
        """Any one of some characters."""
        self.is_exact_in_ascii &= characters.is_exact_in_ascii
        return _in_utf8(characters.most)

    def _place(self) -> Node:
        """A condition on what stands around a place, read as if it always held."""
        self.is_exact_in_ascii = False
        return Sequence(())

    def _group(self) -> Node:
        flags = self._ignore_case, self._dot_all
        opening = _GROUP.match(self.pattern, self.at)
        if opening is None and not self.ended and self._next == "?":
            raise self._unknown("a group of this kind")
        if opening:
            self.at = opening.end()
            self._set_flags(opening["flags"] or "")
            if opening["end"] == ")":
                return Sequence(())  # flags that hold until the group around them ends
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._unknown("groups nested this deep")
        inner = self.alternatives()
        self._depth -= 1
        if not self._take(")"):
            raise self._unknown("a group that is not closed")
        self._ignore_case, self._dot_all = flags
        return inner

    def _set_flags(self, flags: str) -> None:
        on, _, off = flags.partition("-")
        self._ignore_case = (self._ignore_case or "i" in on) and "i" not in off
        self._dot_all = (self._dot_all or "s" in on) and "s" not in off

    def _class(self) -> Characters:
        """A class in brackets; the opening one has been read."""
        negated = self._take("^")
        members = Characters.exactly()
        while self._take("-"):  # dashes are literal at the very front, and so is a bracket
            members |= Characters.exactly((ord("-"), ord("-")))
        if not members.most and self._take("]"):
            members = Characters.exactly((ord("]"), ord("]")))
        whole: Characters | None = None
        operator = ""
        while True:
            ahead = self.pattern[self.at : self.at + 2]
            closed = self._take("]")
            if closed or ahead in _OPERATORS:
                whole = members if whole is None else _OPERATORS[operator](whole, members)
                if closed:
                    return ~whole if negated else whole
                operator, members = ahead, Characters.exactly()
                self.at += 2
                continue
            members |= self._item()

    def _item(self) -> Characters:
        posix = _POSIX_CLASS.match(self.pattern, self.at)
        if posix and posix[2] in _POSIX:
            self.at = posix.end()
            named = Characters.exactly(*_points(_POSIX[posix[2]]))
            named = named.without_case() if self._ignore_case else named
            return ~named if posix[1] else named
        if self._take("["):
            self._depth += 1
            if self._depth > _DEEPEST:
                raise self._unknown("classes nested this deep")
            inner = self._class()
            self._depth -= 1
            return inner
        if self._next == "\\" and _CODE.match(self.pattern, self.at + 1) is None:
            escaped = self.pattern[self.at + 1 : self.at + 2]
            if escaped.isalpha() and escaped not in _CONTROLS:
                self.at += 1
                return self._escape()
        return self._range(self._character())

    def _range(self, first: str) -> Characters:
        """The characters from ``first`` to one that follows a dash; ``first`` alone if none does."""
        ahead = self.pattern[self.at : self.at + 2]
        if not ahead.startswith("-") or ahead in ("-]", "--"):
            return self._characters(first)
        self.at += 1
        last = self._character()
        if last < first:
            raise self._unknown("a range from a later character to an earlier one")
        return self._characters(first, last)

    def _character(self) -> str:
        """One character, written as itself or escaped."""
        if not self._take("\\"):
            return self._take_any()
        code = _CODE.match(self.pattern, self.at)
        if code:
            self.at = code.end()
            point = int(next(filter(None, code.groups())), 16)
            if point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
                raise self._unknown("a number that is no character's")
            return chr(point)
        escaped = self._take_any()
        if escaped in _CONTROLS:
            return _CONTROLS[escaped]
        if escaped.isascii() and not escaped.isalnum() and escaped not in "<>":
            return escaped
        raise self._unknown(f"the escape \\{escaped}")

    def _escape(self) -> Characters:
        """A set or a character whose backslash has been read."""
        found = _PROPERTY.match(self.pattern, self.at)
        if found:
            self.at = found.end()
            named = _property(found[1] or found[2], self._familiar)
            named = named.without_case() if self._ignore_case else named
            return ~named if found[0][0] == "P" else named
        if not self.ended and self._next in "dswDSW":
            name = self._take_any()
            named = _perl(name.lower(), self._familiar)
            return named if name.islower() else ~named
        self.at -= 1
        return self._characters(self._character())

    def _characters(self, first: str, last: str | None = None) -> Characters:
        """From ``first`` to ``last``, by the flags that hold here."""
        exact = Characters.exactly((ord(first), ord(last or first)))
        return exact.without_case() if self._ignore_case else exact

    @property
    def _next(self) -> str:
        if self.ended:
            raise self._unknown("an end in the middle")
        return self.pattern[self.at]

    def _take(self, character: str) -> bool:
        taken = self.pattern.startswith(character, self.at)
        self.at += taken
        return taken

    def _take_any(self) -> str:
        character = self._next
        self.at += 1
        return character

    def _unknown(self, what: str) -> UnknownSyntax:
        return UnknownSyntax(f"{what}, at {self.at} of {self.pattern!r}")


_OPERATORS: dict[str, Callable[[Characters, Characters], Characters]] = {
    "&&": lambda left, right: left & right,
    "--": lambda left, right: left & ~right,
    "~~": lambda left, right: (left & ~right) | (right & ~left),
}


def _bounds(quantifier: re.Match[str]) -> tuple[int, int | None]:
    symbol, least, comma, most = quantifier.groups()
    if symbol in "*+?":
        return int(symbol == "+"), 1 if symbol == "?" else None
    if not comma and most:
        raise UnknownSyntax(f"the repetition {symbol}")
    bounds = int(least), int(most) if most else None if comma else int(least)
    if bounds[1] is not None and bounds[1] < bounds[0]:
        raise UnknownSyntax(f"the repetition {symbol}")
    return bounds
